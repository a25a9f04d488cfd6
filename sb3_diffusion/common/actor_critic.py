"""What the algorithms share that train an actor on action values: imitation, averaging, learning rates, exploration."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.observations import n_rows
from sb3_diffusion.common.policies import Actor, ActorCriticPolicy, QCritic
from sb3_diffusion.common.utils import check_bound, check_choice, check_integer, check_range


class ActorCriticAlgorithm(OfflineAlgorithm):
    """
    Base of the algorithms whose actor follows action values and stays near the data.

    :param args: positional arguments of [OfflineAlgorithm][sb3_diffusion.OfflineAlgorithm]
    :param n_imitation_steps: offline updates, counted from the first, in which the actor imitates the data before it follows
        the action values
    :param critic_learning_rate: learning rate of the critic; a float or a function of the remaining progress, None for
        ``learning_rate``
    :param n_action_samples: candidates per observation when acting
    :param candidate_choice: how one of several candidates is chosen: ``"softmax"`` draws by the softmax of target values,
        ``"argmax"`` takes the best
    :param ema_decay: decay of the moving average of the actor's weights
    :param exploration_noise: standard deviation of the normal noise on actions, scaled to [-1, 1], while collecting
        transitions; ``action_noise`` replaces it
    :param max_grad_norm: largest norm of the gradient of each network; None for no bound
    :param kwargs: further arguments of [OfflineAlgorithm][sb3_diffusion.OfflineAlgorithm]
    """

    policy: ActorCriticPolicy
    actor: Actor
    critic: QCritic
    critic_target: QCritic

    def __init__(
        self,
        *args: Any,
        n_imitation_steps: int,
        critic_learning_rate: float | Schedule | None,
        n_action_samples: int,
        candidate_choice: str,
        ema_decay: float,
        exploration_noise: float,
        max_grad_norm: float | None,
        **kwargs: Any,
    ) -> None:
        check_integer("n_imitation_steps", n_imitation_steps, 0)
        check_integer("n_action_samples", n_action_samples, 1)
        check_choice("candidate_choice", candidate_choice, ("softmax", "argmax"))
        check_range("ema_decay", ema_decay, 0.0, 1.0)
        check_range("exploration_noise", exploration_noise, 0.0)
        check_bound("max_grad_norm", max_grad_norm)
        super().__init__(*args, **kwargs)
        self.n_imitation_steps = n_imitation_steps
        self.critic_learning_rate = critic_learning_rate
        self.n_action_samples = n_action_samples
        self.candidate_choice = candidate_choice
        self.ema_decay = ema_decay
        self.exploration_noise = exploration_noise
        self.max_grad_norm = max_grad_norm

    # ---------------------------------------------------------------- construction

    def _policy_arguments(self) -> dict[str, Any]:
        return dict(
            n_action_samples=self.n_action_samples,
            candidate_choice=self.candidate_choice,
            normalize_observations=self.normalize_observations,
            critic_learning_rate=self.critic_lr_schedule(1.0),
        )

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        rate = self.learning_rate if self.critic_learning_rate is None else self.critic_learning_rate
        self.critic_lr_schedule = FloatSchedule(rate)

    def _trained_networks(self) -> list[str]:
        """:return: names of the networks on the policy that have an optimiser, the critic last"""
        return ["actor", "critic"]

    # ---------------------------------------------------------------- parts of an update

    @property
    def imitating(self) -> bool:
        """Whether the actor still imitates the data, before it follows the action values; this only happens offline."""
        return self._offline and self._n_updates < self.n_imitation_steps

    def _update_learning_rates(self) -> None:
        *others, _ = (getattr(self.policy, name).optimizer for name in self._trained_networks())
        self._update_learning_rate(others)
        schedule = self.lr_schedule if self.critic_learning_rate is None else self.critic_lr_schedule
        update_learning_rate(self.critic.optimizer, schedule(self._current_progress_remaining))

    def _update_critic_target(self) -> None:
        self.policy.update_critic_target(self.tau)

    def _draw_action_noise(self, observations: PyTorchObs) -> th.Tensor:
        return self._draw_normal(n_rows(observations), self.actor.action_dim)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """An actor that is held to the data has little randomness of its own left; exploring needs some."""
        action, scaled_action = super()._sample_action(learning_starts, action_noise, n_envs)
        if action_noise is None and self.exploration_noise > 0.0:
            noise = th.randn(scaled_action.shape, generator=self.acting_generator).numpy()
            scaled_action = np.clip(scaled_action + self.exploration_noise * noise, -1.0, 1.0)
            action = self.policy.unscale_action(scaled_action)
        return action, scaled_action

    # ---------------------------------------------------------------- files

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "critic", "critic_target", "critic_lr_schedule"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *[f"{name}.optimizer" for name in self._trained_networks()]], []
