"""Networks of Bellman diffusion: the measure, the behaviour in the data, rewards, a distilled value and the actor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    create_mlp,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffusion.common.denoisers import DiscreteDenoiser
from sb3_diffusion.common.policies import FLAT_KEY, ActionDenoiser, Actor, DiffusionPolicy, Network, n_rows, repeat_rows
from sb3_diffusion.common.samplers import SAMPLERS, sample_dpm_solver
from sb3_diffusion.common.schedules import noise_schedule_betas
from sb3_diffusion.common.torch_layers import ConditionalMLP, Mish, ensemble_mlp
from sb3_diffusion.common.utils import check_choice, check_range

RewardFunction = Callable[[Any], Any]
"""Rewards of states, vectorised: ``reward_fn(states) -> rewards`` from ``(n, *obs_shape)``, a dict of such arrays for ``Dict``
observations, to ``(n,)``. The states are as the environment gives them."""

MIN_SCALE = 1e-3
"""What varies less than this in the data keeps its scale."""
LOG_STD_RANGE = (-4.0, 0.0)
"""Bounds of the logarithm of the actor's standard deviation."""
N_BEHAVIOR_STEPS = 10
"""Steps in which candidates are drawn."""
MEASURE_SAMPLERS = ("ddim", "dpm_solver", "heun")
"""Samplers without random draws on the way: they leave to the noise that they start from what future it becomes."""


class StateCoder(nn.Module):
    """
    States as standardised vectors by frozen statistics, with an "alive" flag at the end: 1, and -1 once an episode is over.

    :param observation_space: Box of vectors, or a ``Dict`` of them
    :param alive_flag: whether vectors have the flag
    :raises ValueError: if observations are anything else
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, observation_space: spaces.Space, alive_flag: bool) -> None:
        super().__init__()
        self.alive_flag = alive_flag
        self.is_dict = isinstance(observation_space, spaces.Dict)
        parts = dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {FLAT_KEY: observation_space}
        for key, part in parts.items():
            if not isinstance(part, spaces.Box) or is_image_space(part):
                raise ValueError(
                    f"BellmanDiffusion models states that are vectors: observations must be a Box that is no image, or a Dict "
                    f"of such Boxes, got {part} for {key!r}. DTQL and DiffusionQL learn from images."
                )
        self.shapes: dict[str, tuple[int, ...]] = {key: part.shape or () for key, part in parts.items()}
        self.sizes = {key: int(np.prod(shape)) for key, shape in self.shapes.items()}
        self.state_dim = sum(self.sizes.values())
        self.register_buffer("mean", th.zeros(self.state_dim))
        self.register_buffer("std", th.ones(self.state_dim))

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.state_dim + int(self.alive_flag)

    def fit(self, observations: PyTorchObs) -> None:
        """
        Take the statistics from data; entries that hardly vary keep their scale.

        :param observations: batch of observations
        """
        states = self._flat(observations).double()
        std = states.std(dim=0, correction=0)
        self.mean.copy_(states.mean(dim=0))
        self.std.copy_(th.where(std > MIN_SCALE, std, 1.0))

    def _flat(self, observations: PyTorchObs) -> th.Tensor:
        parts = observations if isinstance(observations, dict) else {FLAT_KEY: observations}
        return th.cat(
            [parts[key].float().flatten(1) if shape else parts[key].float()[:, None] for key, shape in self.shapes.items()],
            dim=1,
        )

    def forward(self, observations: PyTorchObs, alive: th.Tensor | float = 1.0) -> th.Tensor:
        """
        :param observations: batch of observations
        :param alive: 1, or 0 where the episode is over, shape ``(batch_size, 1)`` or one number for all
        :return: shape ``(batch_size, dim)``
        """
        states = (self._flat(observations) - self.mean) / self.std
        if not self.alive_flag:
            return states
        flag = 2.0 * th.as_tensor(alive, dtype=states.dtype, device=states.device).expand(len(states), 1) - 1.0
        return th.cat([states, flag], dim=1)

    def standardized(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n, dim)``
        :return: the same without the flag, shape ``(n, state_dim)``
        """
        return x[:, : self.state_dim]

    def alive(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n, dim)``
        :return: 1, or 0 where the episode is over, shape ``(n, 1)``
        """
        if not self.alive_flag:
            return x.new_ones(len(x), 1)
        return (x[:, -1:] > 0.0).to(x.dtype)

    def decode(self, x: th.Tensor) -> PyTorchObs:
        """
        :param x: shape ``(n, dim)``
        :return: states in the units of the observations, without the flag, ``(n, *obs_shape)`` or a dict of such tensors
        """
        values = (self.standardized(x) * self.std + self.mean).split(list(self.sizes.values()), dim=1)
        parts = {key: value.reshape(len(x), *self.shapes[key]) for key, value in zip(self.shapes, values, strict=True)}
        return parts if self.is_dict else parts[FLAT_KEY]


class MeasureNetwork(Network):
    r"""
    The successor measure $d(x | s, a)$: a diffusion model of the states that follow an observation and an action.

    Its ``averaged`` weights are the target, from which futures are drawn.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param time_embedding_dim: size of the embedding of the diffusion step
    :param noise_schedule: ``"linear"``, ``"cosine"`` or ``"vp"``
    :param n_diffusion_steps: length of the chain, $K$
    :param prediction_type: what the network tells, ``"noise"``, ``"sample"`` or ``"v"``
    :param sampler: ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
    :param n_sampling_steps: steps of the sampler; None for the whole chain
    :param level_weighting: ``"uniform"``, or ``"ddpm"`` for the weights of the bound on the likelihood
    :param alive_flag: model whether the episode still runs
    :param horizon: number of steps that the finite-horizon form looks ahead, None for the discounted form
    :param average: keep a moving average of the weights
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    level_weights: th.Tensor

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        time_embedding_dim: int = 32,
        noise_schedule: str = "cosine",
        n_diffusion_steps: int = 20,
        prediction_type: str = "v",
        sampler: str = "ddim",
        n_sampling_steps: int | None = None,
        level_weighting: str = "uniform",
        alive_flag: bool = True,
        horizon: int | None = None,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_choice("sampler", sampler, MEASURE_SAMPLERS)
        check_choice("level_weighting", level_weighting, ("uniform", "ddpm"))
        if n_sampling_steps is not None:
            check_range("n_sampling_steps", n_sampling_steps, 1, n_diffusion_steps)
        self._own_arguments = dict(
            net_arch=net_arch,
            activation_fn=activation_fn,
            time_embedding_dim=time_embedding_dim,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            sampler=sampler,
            n_sampling_steps=n_sampling_steps,
            level_weighting=level_weighting,
            alive_flag=alive_flag,
            horizon=horizon,
        )
        self.coder = StateCoder(self.observation_space, alive_flag)
        self.horizon, self.sampler = horizon, sampler
        condition_dim = self.features_extractor.features_dim + self.action_dim + (0 if horizon is None else 2)
        net = ConditionalMLP(self.coder.dim, condition_dim, net_arch, activation_fn, time_embedding_dim)
        betas = noise_schedule_betas(noise_schedule, n_diffusion_steps)
        self.denoiser = DiscreteDenoiser(net, betas, prediction_type)
        self.n_sampling_steps = n_diffusion_steps if n_sampling_steps is None else n_sampling_steps
        weights = self._ddpm_weights(betas) if level_weighting == "ddpm" else th.ones(n_diffusion_steps)
        self.register_buffer("level_weights", weights, persistent=False)
        if average:
            self.add_average()

    def _ddpm_weights(self, betas: th.Tensor) -> th.Tensor:
        r"""
        $\beta_i / (2 \alpha_i (1 - \bar\alpha_i))$, the weight of the error of $\epsilon$ in the bound on the likelihood
        (arXiv 2006.11239, eq. 12, with variance $\beta_i$), as a weight of what the network tells, of mean 1.
        """
        levels = th.arange(len(betas))
        alpha, sigma = self.denoiser.scales(levels)
        of_noise = betas.float() / (2.0 * (1.0 - betas.float()) * sigma.square())
        weights = of_noise * (alpha / sigma).square() / self.denoiser.loss_weight(levels)
        return weights / weights.mean()

    @property
    def target(self) -> "MeasureNetwork":
        """The network that futures are drawn from: the moving average, or the trained weights if there is none."""
        return self.averaged if isinstance(self.averaged, MeasureNetwork) else self

    @property
    def sampling_levels(self) -> th.Tensor:
        """Levels at which the chain stops, falling, shape ``(n_sampling_steps,)``; only these are trained."""
        return self.denoiser.sampling_levels(self.n_sampling_steps)

    def condition(self, observations: PyTorchObs, actions: th.Tensor, steps: th.Tensor | None = None) -> th.Tensor:
        """
        What the measure depends on.

        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :param steps: number of future states, for the finite-horizon form, shape ``(batch_size, 1)``; None for ``horizon``
        :return: shape ``(batch_size, condition_dim)``
        """
        parts = [self.features(observations), actions]
        if self.horizon is not None:
            n = actions.new_full((len(actions), 1), self.horizon) if steps is None else steps.to(actions.dtype).clamp(min=1.0)
            parts += [n / self.horizon, 1.0 / n]
        return th.cat(parts, dim=1)

    def run(self, condition: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Run the reverse chain.

        :param condition: shape ``(batch_size, condition_dim)``
        :param noise: standard normal, where it starts, shape ``(batch_size, dim)``
        :return: the noisy states at all sampling levels, shape ``(n_sampling_steps, batch_size, dim)``, and the clean ones
        """
        path: list[th.Tensor] = []

        def look(_: int, x: th.Tensor) -> th.Tensor:
            path.append(x)
            return x

        levels = self.sampling_levels
        start = self.denoiser.prior(noise, levels[:1])
        clean = SAMPLERS[self.sampler](self.denoiser, start, levels, condition, guide=look)
        return th.stack(path), clean

    def forward(self, condition: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Draw futures.

        :param condition: shape ``(batch_size, condition_dim)``
        :param noise: standard normal, shape ``(batch_size, dim)``
        :return: coded states, shape ``(batch_size, dim)``
        """
        return self.run(condition, noise)[1]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), average=self.averaged is not None, **self._own_arguments)


class RewardModel(nn.Module):
    r"""
    What the data say of rewards: $\hat r(s, a)$ of an action, and $\bar r(x)$ of a state, the mean over the data's actions
    there and 0 in terminal states. Both in the units of the rewards, through frozen statistics.

    :param state_dim: size of a standardised state
    :param action_dim: size of an action
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    """

    mean: th.Tensor
    std: th.Tensor
    optimizer: th.optim.Optimizer

    def __init__(self, state_dim: int, action_dim: int, net_arch: list[int], activation_fn: type[nn.Module]) -> None:
        super().__init__()
        self.action_net = ensemble_mlp(1, state_dim + action_dim, net_arch, activation_fn)
        self.state_net = ensemble_mlp(1, state_dim, net_arch, activation_fn)
        self.register_buffer("mean", th.zeros(()))
        self.register_buffer("std", th.ones(()))

    def of_action(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        r"""
        :param states: standardised, shape ``(n, state_dim)``
        :param actions: in [-1, 1], shape ``(n, action_dim)``
        :return: $\hat r(s, a)$, shape ``(n, 1)``
        """
        return self.mean + self.std * self.action_net(th.cat([states, actions], dim=1))[0]

    def forward(self, states: th.Tensor) -> th.Tensor:
        r"""
        :param states: standardised, shape ``(n, state_dim)``
        :return: $\bar r(x)$, shape ``(n, 1)``
        """
        return self.mean + self.std * self.state_net(states)[0]


class MeasureValue(Network):
    """
    A network that is told values which the measure gives, per step: those of actions, and of observations under the data.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, *args: Any, net_arch: list[int], activation_fn: type[nn.Module] = Mish, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(net_arch=net_arch, activation_fn=activation_fn)
        features_dim = self.features_extractor.features_dim
        self.q_net = ensemble_mlp(1, features_dim + self.action_dim, net_arch, activation_fn)
        self.v_net = ensemble_mlp(1, features_dim, net_arch, activation_fn)
        self.register_buffer("mean", th.zeros(()))
        self.register_buffer("std", th.ones(()))

    def forward(self, observations: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :return: standardised values of the actions and of the observations, each of shape ``(batch_size, 1)``
        """
        features = self.features(observations)
        return self.q_net(th.cat([features, actions], dim=1))[0], self.v_net(features)[0]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), **self._own_arguments)


class GaussianActor(Actor):
    r"""
    The distilled actor, $a = \mu(s) + \sigma(s) z$, bounded to [-1, 1]; ``deterministic=True`` acts with $\mu$.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param average: keep a moving average of the weights, which acts
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(net_arch=net_arch, activation_fn=activation_fn)
        layers = create_mlp(self.features_extractor.features_dim, 2 * self.action_dim, net_arch, activation_fn)
        self.net = nn.Sequential(*layers)
        if average:
            self.add_average()

    def moments(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        r"""
        :param observations: batch of observations
        :return: $\mu$ and $\log \sigma$, each of shape ``(batch_size, action_dim)``
        """
        mean, log_std = self.net(self.features(observations)).chunk(2, dim=1)
        return mean.tanh(), log_std.clamp(*LOG_STD_RANGE)

    def forward(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param latents: $z$, shape ``(batch_size, action_dim)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        mean, log_std = self.moments(observations)
        return (mean + log_std.exp() * latents).clamp(-1.0, 1.0)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), **self._own_arguments)


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
    ``value`` and ``actor`` are distilled from them.

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
    actor: GaussianActor

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
            horizon=horizon,
            gamma=gamma,
            rewards_of=rewards_of,
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
            average=True,
        )
        coder = self.measure.coder
        self.behavior = ActionDenoiser(**network_arguments, net_arch=pi)
        self.value = MeasureValue(**network_arguments, net_arch=qf)
        self.actor = GaussianActor(**network_arguments, net_arch=pi)
        self.reward_model = RewardModel(coder.state_dim, self.actor.action_dim, qf, activation_fn)
        for network in self.trained_networks.values():
            network.optimizer = self.make_optimizer(network, lr_schedule(1.0))
        self.set_training_mode(False)

    @property
    def trained_networks(self) -> dict[str, Any]:
        """All networks that have an optimiser, by name."""
        names = ("measure", "behavior", "reward_model", "value", "actor")
        return {name: getattr(self, name) for name in names}

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
        learned ones; over $n$ states $n E_{d_n}[R]$ and $r(s, a) + n E_{d_n}[\bar r]$.

        :param learned: whether rewards are the learned ones
        :param steps: number of future states, for the finite-horizon form, shape ``(n, 1)``; None for ``horizon``
        :return: the weights
        """
        if self.horizon is None:
            return (
                Mixture(1.0 - self.gamma, self.gamma, 1.0 / (1.0 - self.gamma))
                if learned
                else Mixture(0.0, 1.0, 1.0 / (1.0 - self.gamma))
            )
        n = self.horizon if steps is None else steps.float()
        return Mixture(1.0 / (n + 1.0), n / (n + 1.0), n + 1.0) if learned else Mixture(0.0, 1.0, n)

    def futures(self, observations: PyTorchObs, actions: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Draw futures of each row.

        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :param noise: standard normal, shape ``(batch_size, n_samples, dim)``, or ``(1, n_samples, dim)`` shared by all rows
        :return: coded states, shape ``(batch_size * n_samples, dim)``, those of a row side by side
        """
        target, n_samples = self.measure.target, noise.shape[1]
        condition = target.condition(observations, actions).repeat_interleave(n_samples, dim=0)
        return target(condition, noise.expand(len(actions), -1, -1).reshape(len(condition), -1))

    def values(
        self, observations: PyTorchObs, actions: th.Tensor, noise: th.Tensor, reward_fn: RewardFunction | None
    ) -> th.Tensor:
        """
        Values of actions as means over futures.

        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :param noise: standard normal, shape ``(1, n_samples, dim)``: all rows share it, so that actions are compared fairly
        :param reward_fn: rewards of states; None for the learned ones
        :return: shape ``(batch_size,)``
        """
        mixture = self.mixture(learned=reward_fn is None)
        x = self.futures(observations, actions, noise)
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
        acting = dict(reward_fn=self.reward_fn, n_action_samples=self.n_action_samples, n_future_samples=self.n_future_samples)
        return dict(super()._get_constructor_parameters(), lr_schedule=self._dummy_schedule, **self._own_arguments, **acting)


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


def fit_scale(network: RewardModel | MeasureValue, rewards: th.Tensor) -> None:
    """
    Take the scale of a network's output from data; what hardly varies keeps its scale.

    :param network: whose statistics are set
    :param rewards: any shape
    """
    std = rewards.std(correction=0)
    network.mean.copy_(rewards.mean())
    network.std.copy_(th.where(std > MIN_SCALE, std, 1.0))


def as_arrays(observations: PyTorchObs) -> Any:
    """
    :param observations: batch of observations
    :return: the same as arrays
    """
    if isinstance(observations, dict):
        return {key: value.cpu().numpy() for key, value in observations.items()}
    return observations.cpu().numpy()


MlpPolicy = BellmanDiffusionPolicy
CnnPolicy = BellmanDiffusionPolicy  # refuses images, and says so


class MultiInputPolicy(BellmanDiffusionPolicy):
    """
    [BellmanDiffusionPolicy][sb3_diffusion.bellman_diffusion.policies.BellmanDiffusionPolicy] on ``Dict`` observations, through
    SB3's ``CombinedExtractor``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
