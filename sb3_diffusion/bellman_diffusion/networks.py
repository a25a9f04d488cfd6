"""Networks of Bellman diffusion that know shapes and spaces: coded states, the measure, rewards, values, actors."""

import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_diffusion.common.denoisers import DiscreteDenoiser
from sb3_diffusion.common.observations import FLAT_KEY, VectorLayout, subspaces
from sb3_diffusion.common.policies import Actor, Network
from sb3_diffusion.common.samplers import SAMPLERS
from sb3_diffusion.common.schedules import noise_schedule_betas
from sb3_diffusion.common.torch_layers import ConditionalMLP, Mish, ensemble_mlp
from sb3_diffusion.common.utils import MIN_SCALE, check_choice, check_integer

LOG_STD_RANGE = (-4.0, 0.0)
"""Bounds of the logarithm of the actor's standard deviation."""
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
        self.parts = VectorLayout(subspaces(observation_space), "BellmanDiffusion models states that are vectors")
        self.state_dim = self.parts.dim
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
        states = self.parts.join(observations).double()
        std = states.std(dim=0, correction=0)
        self.mean.copy_(states.mean(dim=0))
        self.std.copy_(th.where(std > MIN_SCALE, std, 1.0))

    def forward(self, observations: PyTorchObs, alive: th.Tensor | float = 1.0) -> th.Tensor:
        """
        :param observations: batch of observations
        :param alive: 1, or 0 where the episode is over, shape ``(batch_size, 1)`` or one number for all
        :return: shape ``(batch_size, dim)``
        """
        states = (self.parts.join(observations) - self.mean) / self.std
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
        parts = self.parts.split(self.standardized(x) * self.std + self.mean)
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
    :param layer_norm: layer normalisation before each activation; without it the network is slow to see states that are
        narrow beside the spread of all states, and a bootstrapped measure stays blurred meanwhile
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
        layer_norm: bool = True,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_choice("sampler", sampler, MEASURE_SAMPLERS)
        check_choice("level_weighting", level_weighting, ("uniform", "ddpm"))
        if n_sampling_steps is not None:
            check_integer("n_sampling_steps", n_sampling_steps, 1, n_diffusion_steps)
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
            layer_norm=layer_norm,
        )
        self.coder = StateCoder(self.observation_space, alive_flag)
        self.horizon, self.sampler, self.time_embedding_dim = horizon, sampler, time_embedding_dim
        condition_dim = self.features_extractor.features_dim + self.action_dim + (0 if horizon is None else 2)
        net = ConditionalMLP(self.coder.dim, condition_dim, net_arch, activation_fn, time_embedding_dim, layer_norm=layer_norm)
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


class StateModel(nn.Module):
    """
    A diffusion model of the data's states whatever came before, on the levels and in the code of a measure.

    :param measure: whose chain it shares
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    """

    optimizer: th.optim.Optimizer

    def __init__(self, measure: MeasureNetwork, net_arch: list[int], activation_fn: type[nn.Module]) -> None:
        super().__init__()
        self.net = ConditionalMLP(measure.coder.dim, 0, net_arch, activation_fn, measure.time_embedding_dim, layer_norm=True)

    def forward(self, noisy: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param noisy: coded states with noise, shape ``(batch_size, dim)``
        :param level: indices, shape ``(batch_size,)``
        :return: what the measure's network would tell, same shape as ``noisy``
        """
        return self.net(noisy, noisy[:, :0], level)


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


class ClippedGaussianActor(Actor):
    r"""
    $a = \mu(s) + \sigma(s) z$, clipped to [-1, 1], with $\mu$ inside of it; ``deterministic=True`` acts with $\mu$.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param fixed_std: $\sigma$, in (0, 1], for an actor that learns $\mu$ alone; None to learn it
    :param average: keep a moving average of the weights, which acts
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        fixed_std: float | None = None,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(net_arch=net_arch, activation_fn=activation_fn, fixed_std=fixed_std)
        self.fixed_std = fixed_std
        layers = create_mlp(self.features_extractor.features_dim, 2 * self.action_dim, net_arch, activation_fn)
        self.net = nn.Sequential(*layers)
        if average:
            self.add_average()

    def mean_and_log_std(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        r"""
        :param observations: batch of observations
        :return: $\mu$ and $\log \sigma$, each of shape ``(batch_size, action_dim)``
        """
        mean, log_std = self.net(self.features(observations)).chunk(2, dim=1)
        log_std = log_std.clamp(*LOG_STD_RANGE) if self.fixed_std is None else th.full_like(mean, math.log(self.fixed_std))
        return mean.tanh(), log_std

    def forward(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param latents: $z$, shape ``(batch_size, action_dim)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        mean, log_std = self.mean_and_log_std(observations)
        return (mean + log_std.exp() * latents).clamp(-1.0, 1.0)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), **self._own_arguments)


def fit_scale(network: RewardModel | MeasureValue, rewards: th.Tensor) -> None:
    """
    Take the scale of a network's output from data; what hardly varies keeps its scale.

    :param network: whose statistics are set
    :param rewards: any shape
    """
    std = rewards.std(correction=0)
    network.mean.copy_(rewards.mean())
    network.std.copy_(th.where(std > MIN_SCALE, std, 1.0))
