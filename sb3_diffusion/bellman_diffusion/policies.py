"""The policy of Bellman diffusion: the measure, the behaviour in the data, rewards, and what is distilled from them."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffusion.bellman_diffusion.networks import (
    ClippedGaussianActor,
    MeasureNetwork,
    MeasureValue,
    RewardModel,
    StateModel,
)
from sb3_diffusion.common.observations import CombinedExtractor, check_image, n_rows, repeat_rows
from sb3_diffusion.common.policies import ActionDenoiser, DiffusionPolicy, QCritic
from sb3_diffusion.common.samplers import sample_dpm_solver
from sb3_diffusion.common.torch_layers import Mish

RewardFunction = Callable[[Any], Any]
"""Rewards of states, vectorised: ``reward_fn(states) -> rewards`` from ``(n, *obs_shape)``, a dict of such arrays for ``Dict``
observations, to ``(n,)``. The states are as the environment gives them."""

N_BEHAVIOR_STEPS = 10
"""Steps in which candidates are drawn."""
EXPLORATION_STD = 0.1
"""Standard deviation of the actions of an actor that learns their mean alone, as TD3 explores (arXiv 1802.09477)."""


class Mixture(NamedTuple):
    """
    How a mean over the measure becomes a value per step: ``first * reward of the action + rest * mean over future states``.

    :ivar first: weight of the reward of the action itself
    :ivar rest: weight of the mean over future states
    :ivar n_steps: what the result is multiplied by to give the sum of rewards
    """

    first: th.Tensor | float
    rest: th.Tensor | float
    n_steps: th.Tensor | float


class BellmanDiffusionPolicy(DiffusionPolicy):
    r"""
    Policy of Bellman diffusion: ``measure`` tells futures, ``behavior`` the data's actions, ``reward_model`` rewards;
    ``value`` and ``actor`` are distilled from them, or with ``agent="rebrac"`` the actor follows a ``critic``.

    With ``n_action_samples=1`` the actor acts. Above, so many candidates of ``behavior`` are ranked by their value under the
    measure, each with the same noises of the futures, and the best one is taken: slow, and right for any reward function at
    once. ``deterministic=True`` takes the mean of the actor, or candidates whose latents all rows and calls share.

    :param observation_space: Box of vectors, or a ``Dict`` of them
    :param action_space: Box
    :param lr_schedule: learning rate as a function of the remaining progress
    :param net_arch: hidden layers of all networks, or a dict with ``pi`` (actor, behaviour) and ``qf`` (measure, value,
        rewards); by default three layers of 256
    :param activation_fn: activation of all networks
    :param features_extractor_class: class of the features extractor
    :param features_extractor_kwargs: its arguments
    :param normalize_images: not used: images are refused
    :param optimizer_class: class of the optimisers
    :param optimizer_kwargs: their arguments except the learning rate
    :param time_embedding_dim: size of the embedding of the diffusion step
    :param noise_schedule: ``"linear"``, ``"cosine"`` or ``"vp"``
    :param n_diffusion_steps: length of the chain
    :param prediction_type: what the network of the measure tells, ``"noise"``, ``"sample"`` or ``"v"``
    :param sampler: ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
    :param n_sampling_steps: steps of the sampler; None for the whole chain
    :param level_weighting: ``"uniform"`` or ``"ddpm"``
    :param alive_flag: model whether the episode still runs
    :param layer_norm: layer normalisation in the network of the measure
    :param agent: ``"distilled"``, or ``"rebrac"`` for an actor with critics of its own
    :param horizon: steps that the finite-horizon form looks ahead, None for the discounted form
    :param gamma: discount of the measure and of values
    :param rewards_of: whose actions earn the rewards of future states, ``"data"`` or ``"actor"``
    :param reward_fn: rewards of states; None for the learned ones
    :param n_action_samples: number of candidates per observation when acting; 1 acts with the actor
    :param n_future_samples: futures per candidate
    :param normalize_observations: normalise vector observations by frozen statistics of the data
    """

    measure: MeasureNetwork
    behavior: ActionDenoiser
    reward_model: RewardModel
    value: MeasureValue
    actor: ClippedGaussianActor
    actor_target: ClippedGaussianActor  # this one and the next three with `agent="rebrac"` alone
    critic: QCritic
    critic_target: QCritic
    state_model: StateModel

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        time_embedding_dim: int = 32,
        noise_schedule: str = "cosine",
        n_diffusion_steps: int = 20,
        prediction_type: str = "v",
        sampler: str = "ddim",
        n_sampling_steps: int | None = None,
        level_weighting: str = "uniform",
        alive_flag: bool = True,
        layer_norm: bool = True,
        agent: str = "distilled",
        horizon: int | None = None,
        gamma: float = 0.99,
        rewards_of: str = "data",
        reward_fn: RewardFunction | None = None,
        n_action_samples: int = 1,
        n_future_samples: int = 32,
        normalize_observations: bool = False,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        self._own_arguments: dict[str, Any] = dict(
            net_arch=net_arch,
            activation_fn=activation_fn,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            time_embedding_dim=time_embedding_dim,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            sampler=sampler,
            n_sampling_steps=n_sampling_steps,
            level_weighting=level_weighting,
            alive_flag=alive_flag,
            layer_norm=layer_norm,
            agent=agent,
            horizon=horizon,
            gamma=gamma,
            normalize_observations=normalize_observations,
        )
        self.gamma, self.horizon, self.rewards_of = gamma, horizon, rewards_of
        self.reward_fn = reward_fn
        self.measured_actions: Callable[[PyTorchObs], th.Tensor] | None = None  # of a policy that is no part of this one
        self.n_action_samples = n_action_samples
        self.n_future_samples = n_future_samples
        pi, qf = ([256] * 3, [256] * 3) if net_arch is None else get_actor_critic_arch(net_arch)
        self.net_arch = dict(pi=pi, qf=qf)
        network_arguments: dict[str, Any] = dict(
            observation_space=observation_space,
            action_space=action_space,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            normalize_images=normalize_images,
            normalize_observations=normalize_observations,
            activation_fn=activation_fn,
        )
        self.measure = MeasureNetwork(
            **network_arguments,
            net_arch=qf,
            time_embedding_dim=time_embedding_dim,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            sampler=sampler,
            n_sampling_steps=n_sampling_steps,
            level_weighting=level_weighting,
            alive_flag=alive_flag,
            horizon=horizon,
            layer_norm=layer_norm,
            average=True,
        )
        coder = self.measure.coder
        self.behavior = ActionDenoiser(**network_arguments, net_arch=pi)
        self.value = MeasureValue(**network_arguments, net_arch=qf)
        self.has_critic = agent == "rebrac"
        self.target_names = ("actor_target", "critic_target") if self.has_critic else ()
        fixed_std = EXPLORATION_STD if self.has_critic else None
        self.actor = ClippedGaussianActor(**network_arguments, net_arch=pi, fixed_std=fixed_std)
        if self.has_critic:
            self.actor_target = deepcopy(self.actor).requires_grad_(False)
            self.critic = QCritic(**network_arguments, net_arch=qf, layer_norm=True)
            self.critic_target = deepcopy(self.critic).requires_grad_(False)
            self.state_model = StateModel(self.measure, qf, activation_fn)
        self.reward_model = RewardModel(coder.state_dim, self.actor.action_dim, qf, activation_fn)
        for network in self.trained_networks.values():
            network.optimizer = self.make_optimizer(network, lr_schedule(1.0))
        self.set_training_mode(False)

    @property
    def trained_networks(self) -> dict[str, Any]:
        """All networks that have an optimiser, by name."""
        names = ["measure", "behavior", "reward_model", "value", "actor"]
        names += ["critic", "state_model"] if self.has_critic else []
        return {name: getattr(self, name) for name in names}

    def update_targets(self, tau: float) -> None:
        """
        Move the weights of the targets of actor and critic towards theirs; running statistics of batch normalisation are
        copied.

        :param tau: Polyak coefficient
        """
        self.actor_target.follow(self.actor, 1.0 - tau)
        self.critic_target.follow(self.critic, 1.0 - tau)

    def fit_states(self, observations: PyTorchObs) -> None:
        """
        Take the frozen statistics of modelled states from data.

        :param observations: batch of observations
        """
        for measure in (self.measure, self.measure.target):
            measure.coder.fit(observations)

    # ---------------------------------------------------------------- rewards and values

    def state_rewards(self, x: th.Tensor, reward_fn: RewardFunction | None) -> th.Tensor:
        """
        Rewards of states, 0 once the episode is over.

        :param x: coded states, shape ``(n, dim)``
        :param reward_fn: rewards of states; None for the learned ones
        :return: shape ``(n, 1)``
        :raises ValueError: if ``reward_fn`` does not return one number per state
        """
        coder = self.measure.coder
        if reward_fn is not None:
            rewards = call_reward_fn(reward_fn, coder.decode(x)).to(x.device)
        elif self.measured_actions is not None:
            rewards = self.reward_model.of_action(coder.standardized(x), self.measured_actions(coder.decode(x)))
        elif self.rewards_of == "actor":
            latents = self.actor.latents(len(x), deterministic=True)
            rewards = self.reward_model.of_action(coder.standardized(x), self.actor.act(coder.decode(x), latents))
        else:
            rewards = self.reward_model(coder.standardized(x))
        return rewards * coder.alive(x)

    def mixture(self, learned: bool, steps: th.Tensor | None = None) -> Mixture:
        r"""
        $Q = E_d[R] / (1 - \gamma)$ for rewards of states reached, $Q = r(s, a) + \frac{\gamma}{1 - \gamma} E_d[\bar r]$ for
        learned ones; over $n$ steps $n E_{d_n}[R]$ and $r(s, a) + (n - 1) E_{d_{n-1}}[\bar r]$, $n$ rewards each.

        :param learned: whether rewards are the learned ones
        :param steps: $n$, for the finite-horizon form, any shape; None for ``horizon``
        :return: the weights
        """
        if self.horizon is None:
            return (
                Mixture(1.0 - self.gamma, self.gamma, 1.0 / (1.0 - self.gamma))
                if learned
                else Mixture(0.0, 1.0, 1.0 / (1.0 - self.gamma))
            )
        n = self.horizon if steps is None else steps.float()
        return Mixture(1.0 / n, (n - 1.0) / n, n) if learned else Mixture(0.0, 1.0, n)

    def futures(
        self, observations: PyTorchObs, actions: th.Tensor, noise: th.Tensor, steps: th.Tensor | None = None
    ) -> th.Tensor:
        """
        Draw futures of each row.

        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :param noise: standard normal, shape ``(batch_size, n_samples, dim)``, or ``(1, n_samples, dim)`` shared by all rows
        :param steps: number of future states, for the finite-horizon form, shape ``(batch_size, 1)``; None for ``horizon``
        :return: coded states, shape ``(batch_size * n_samples, dim)``, those of a row side by side
        """
        target, n_samples = self.measure.target, noise.shape[1]
        condition = target.condition(observations, actions, steps).repeat_interleave(n_samples, dim=0)
        return target(condition, noise.expand(len(actions), -1, -1).reshape(len(condition), -1))

    def values(
        self,
        observations: PyTorchObs,
        actions: th.Tensor,
        noise: th.Tensor,
        reward_fn: RewardFunction | None,
        steps: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        Values of actions as means over futures.

        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :param noise: standard normal, shape ``(1, n_samples, dim)``: all rows share it, so that actions are compared fairly
        :param reward_fn: rewards of states; None for the learned ones
        :param steps: number of steps that are summed, for the finite-horizon form, shape ``(batch_size, 1)``; None for
            ``horizon``
        :return: shape ``(batch_size,)``
        """
        mixture = self.mixture(reward_fn is None, None if steps is None else steps.squeeze(1))
        if reward_fn is None and self.horizon is not None:  # the first step is the action's own
            steps = (actions.new_full((len(actions), 1), self.horizon) if steps is None else steps) - 1
        x = self.futures(observations, actions, noise, steps)
        mean = self.state_rewards(x, reward_fn).reshape(len(actions), -1).mean(dim=1)
        first: th.Tensor | float = 0.0
        if reward_fn is None:
            coder = self.measure.coder
            first = self.reward_model.of_action(coder.standardized(coder(observations)), actions).squeeze(1)
        return mixture.n_steps * (mixture.first * first + mixture.rest * mean)

    def shared_noise(self, n_samples: int) -> th.Tensor:
        """
        :param n_samples: futures per row
        :return: the same standard normal numbers at every call, shape ``(1, n_samples, dim)``
        """
        noise = th.randn(1, n_samples, self.measure.coder.dim, generator=th.Generator().manual_seed(0))
        return noise.to(self.device)

    # ---------------------------------------------------------------- acting

    def candidates(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        Actions of the diffusion model of the data.

        :param observations: batch of observations
        :param latents: standard normal, shape ``(batch_size, action_dim)``
        :return: in [-1, 1], shape ``(batch_size, action_dim)``
        """
        denoiser = self.behavior.denoiser
        levels = denoiser.sampling_levels(N_BEHAVIOR_STEPS)
        features = self.behavior.features(observations)
        return sample_dpm_solver(denoiser, denoiser.prior(latents, levels[:1]), levels, features).clamp(-1.0, 1.0)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self.n_action_samples == 1:
            return self.actor._predict(observation, deterministic)
        n, batch_size = self.n_action_samples, n_rows(observation)
        if deterministic:
            latents = th.randn(n, self.actor.action_dim, generator=th.Generator().manual_seed(0)).repeat(batch_size, 1)
        else:
            latents = th.randn(batch_size * n, self.actor.action_dim, generator=self.actor.generator)
        repeated = repeat_rows(observation, n)
        actions = self.candidates(repeated, latents.to(self.device))
        values = self.values(repeated, actions, self.shared_noise(self.n_future_samples), self.reward_fn)
        best = values.reshape(batch_size, n).argmax(dim=1)
        return actions.reshape(batch_size, n, -1)[th.arange(batch_size, device=self.device), best]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        acting = dict(
            reward_fn=self.reward_fn,
            rewards_of=self.rewards_of,
            n_action_samples=self.n_action_samples,
            n_future_samples=self.n_future_samples,
        )
        return dict(super()._get_constructor_parameters(), lr_schedule=self._dummy_schedule, **self._own_arguments, **acting)


def check_reward_fn(reward_fn: RewardFunction | None) -> None:
    """
    :param reward_fn: rewards of states, or None
    :raises ValueError: if it cannot be called
    """
    if reward_fn is not None and not callable(reward_fn):
        raise ValueError(f"`reward_fn` must be a function of states, or None: got {reward_fn!r}.")


def call_reward_fn(reward_fn: RewardFunction, states: PyTorchObs) -> th.Tensor:
    """
    :param reward_fn: rewards of states
    :param states: ``(n, *obs_shape)``, or a dict of such tensors
    :return: shape ``(n, 1)``
    :raises ValueError: if the function does not return one number per state
    """
    n = n_rows(states)
    rewards = np.asarray(reward_fn(as_arrays(states)), dtype=np.float32)
    if rewards.shape not in ((n,), (n, 1)):
        raise ValueError(
            f"`reward_fn` must return one reward per state: got shape {rewards.shape} for {n} states; it is called with all "
            "of them at once."
        )
    return th.as_tensor(rewards.reshape(n, 1))


def as_arrays(observations: PyTorchObs) -> Any:
    """
    :param observations: batch of observations
    :return: the same as arrays
    """
    if isinstance(observations, dict):
        return {key: value.cpu().numpy() for key, value in observations.items()}
    return observations.cpu().numpy()


MlpPolicy = BellmanDiffusionPolicy


class CnnPolicy(BellmanDiffusionPolicy):
    """For images, which BellmanDiffusion refuses."""

    def __init__(self, observation_space: spaces.Space, *args: Any, **kwargs: Any) -> None:
        check_image(observation_space)
        super().__init__(observation_space, *args, **kwargs)


class MultiInputPolicy(BellmanDiffusionPolicy):
    """
    [BellmanDiffusionPolicy][sb3_diffusion.bellman_diffusion.policies.BellmanDiffusionPolicy] on ``Dict`` observations, through
    SB3's ``CombinedExtractor``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
