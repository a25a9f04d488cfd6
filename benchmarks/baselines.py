"""What the algorithms are compared with: TD3+BC and behaviour cloning, on the library's own bases."""

from typing import Any, ClassVar

import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffusion.buffers import Batch
from sb3_diffusion.common.actor_critic import ActorCriticAlgorithm
from sb3_diffusion.common.policies import Actor, ActorCriticPolicy, QCritic
from sb3_diffusion.common.utils import MIN_SCALE

NET_ARCH = [256, 256]


class DeterministicActor(Actor):
    """An action for each observation, whatever the latent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = create_mlp(self.features_extractor.features_dim, self.action_dim, NET_ARCH, squash_output=True)
        self.net = nn.Sequential(*layers)
        self.add_average()
        self.acts_with_average = False

    def forward(self, observations: PyTorchObs, latents: th.Tensor | None = None) -> th.Tensor:
        """
        :param observations: batch of observations
        :param latents: not used
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        return self.net(self.features(observations))


class TD3BCPolicy(ActorCriticPolicy):
    """
    Networks of TD3+BC, two layers of 256 with ReLU; the target of the actor is its moving average.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate as a function of the remaining progress
    :param kwargs: arguments of [ActorCriticPolicy][sb3_diffusion.common.policies.ActorCriticPolicy]
    """

    actor: DeterministicActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        critic_learning_rate: float | None = None,
        features_extractor_class: Any = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            share_features_extractor=share_features_extractor,
            **kwargs,
        )
        self.actor = DeterministicActor(**self._network_arguments)
        critic_arguments: dict[str, Any] = dict(self._network_arguments, net_arch=NET_ARCH, activation_fn=nn.ReLU)
        self.critic, self.critic_target = QCritic(**critic_arguments), QCritic(**critic_arguments)
        self.critic_target.requires_grad_(False)
        self.copy_critic_to_target()
        self.actor.optimizer = self.make_optimizer(self.actor, lr_schedule(1.0))
        self.critic.optimizer = self.make_optimizer(self.critic, critic_learning_rate or lr_schedule(1.0))
        self.set_training_mode(False)


class TD3BCMultiInputPolicy(TD3BCPolicy):
    """The same on ``Dict`` observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)


class TD3BC(ActorCriticAlgorithm):
    """
    TD3+BC (arXiv 2106.06860) with its published settings.

    :param policy: ``"MlpPolicy"`` or ``"MultiInputPolicy"``
    :param env: environment
    :param alpha: weight of the action values; 0 clones the behaviour and learns no action values
    :param policy_delay: updates of the critic per update of the actor
    :param target_policy_noise: standard deviation of the noise on the target's actions
    :param target_noise_clip: largest noise
    :param learning_rate: of both networks
    :param kwargs: further arguments of [OfflineAlgorithm][sb3_diffusion.OfflineAlgorithm]
    """

    policy_aliases: ClassVar[dict[str, type[Any]]] = {"MlpPolicy": TD3BCPolicy, "MultiInputPolicy": TD3BCMultiInputPolicy}
    actor: DeterministicActor

    def __init__(
        self,
        policy: str | type[TD3BCPolicy],
        env: Any,
        *,
        alpha: float = 2.5,
        policy_delay: int = 2,
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.5,
        learning_rate: float = 3e-4,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_imitation_steps=0,
            critic_learning_rate=None,
            n_action_samples=1,
            candidate_choice="argmax",
            ema_decay=0.995,
            exploration_noise=0.1,
            max_grad_norm=None,
            **kwargs,
        )
        self.alpha = alpha
        self.policy_delay = policy_delay
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        if _init_setup_model:
            self._setup_model()

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """
        :param gradient_steps: number of updates
        :param batch_size: transitions per update; None for the model's ``batch_size``
        """
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        for _ in range(gradient_steps):
            batch = self.sample_batch(self.batch_size if batch_size is None else batch_size)
            self._n_updates += 1
            if self.alpha > 0.0:
                self._minimize("critic_loss", self.critic.optimizer, self._critic_loss(batch))
            if self.alpha == 0.0 or self._n_updates % self.policy_delay == 0:
                self._minimize("actor_loss", self.actor.optimizer, self._actor_loss(batch))
                self.actor.update_average(self.ema_decay)
                self._update_critic_target()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _critic_loss(self, batch: Batch) -> th.Tensor:
        r"""$\sum_k E[(r + \gamma \min_k Q'_k(s', a') - Q_k(s, a))^2]$, $a' = \pi'(s') + \mathrm{clip}(\epsilon)$."""
        with th.no_grad():
            noise = self.target_policy_noise * self._draw_action_noise(batch.next_observations)
            noise = noise.clamp(-self.target_noise_clip, self.target_noise_clip)
            target = self.actor.averaged
            assert isinstance(target, DeterministicActor)
            next_actions = (target(batch.next_observations) + noise).clamp(-1.0, 1.0)
            next_values = self.critic_target(batch.next_observations, next_actions).amin(dim=0)
            targets = batch.rewards + (1.0 - batch.dones) * self.gamma * next_values
            self._watch_targets(targets, batch.rewards)
        return (self.critic(batch.observations, batch.actions) - targets).square().mean(dim=(1, 2)).sum()

    def _actor_loss(self, batch: Batch) -> th.Tensor:
        r"""$E[(\pi(s) - a)^2] - \alpha E[Q_1(s, \pi(s))] / E|Q_1(s, \pi(s))|$ (eqs. 3 and 5)."""
        actions = self.actor(batch.observations)
        loss = F.mse_loss(actions, batch.actions)
        if self.alpha == 0.0:
            return loss
        q_values = self.critic(batch.observations, actions)[0]
        return loss - self.alpha * q_values.mean() / q_values.detach().abs().mean().clamp(min=MIN_SCALE)


class BehaviorCloning(TD3BC):
    """Behaviour cloning: TD3+BC without action values."""

    def __init__(self, *args: Any, alpha: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, alpha=alpha, **kwargs)
