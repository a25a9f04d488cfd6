"""Networks of Diffuser: a diffusion model of trajectory windows that plans, and a value of noisy windows that guides it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffusion.common.denoisers import DiscreteDenoiser
from sb3_diffusion.common.observations import check_image, n_rows
from sb3_diffusion.common.policies import ChainActor, DiffusionPolicy, Network
from sb3_diffusion.common.samplers import SAMPLERS, Guide, steps_between
from sb3_diffusion.common.schedules import noise_schedule_betas
from sb3_diffusion.common.utils import MIN_SCALE, check_choice
from sb3_diffusion.diffuser.networks import (
    TemporalUnet,
    TrajectoryTransformer,
    ValueTransformer,
    ValueUnet,
    check_horizon,
)
from sb3_diffusion.diffuser.windows import (
    GOAL_KEY,
    ConditionedNet,
    WindowLayout,
    WindowNormalizer,
    shift_windows,
)


class Plan(NamedTuple):
    """
    What is planned for each observation of a batch, in the units of the environment, one row per env step.

    :ivar observations: shape ``(batch_size, n_steps, *obs_shape)``, a dict of such arrays for ``Dict`` observations; row 0 is
        the observation planned from
    :ivar actions: shape ``(batch_size, n_steps, *action_shape)``
    :ivar values: estimated return of each plan, shape ``(batch_size,)``; NaN without a value model
    """

    observations: Any
    actions: np.ndarray
    values: np.ndarray


def net_sizes(backbone: str, net_arch: list[int], of_value: bool) -> dict[str, Any]:
    """
    Layer sizes as SB3 gives them, in the terms of the networks.

    :param backbone: ``"unet"`` or ``"transformer"``
    :param net_arch: channels of the levels, or of the blocks, which are all of one width
    :param of_value: whether the network is a value, whose last level is made a multiple of 64 channels wide
    :return: arguments of the network
    :raises ValueError: if no such network can be built
    """
    if backbone == "transformer":
        if len(set(net_arch)) != 1:
            raise ValueError(f"`net_arch` of a transformer must hold one width for each block, all the same: got {net_arch}.")
        return dict(width=net_arch[0], n_layers=len(net_arch))
    if not net_arch or any(width < 8 or width % 8 for width in net_arch):
        raise ValueError(f"`net_arch` of a U-Net must hold channels of one level or more, multiples of 8: got {net_arch}.")
    widths = [*net_arch[:-1], 64 * math.ceil(net_arch[-1] / 64)] if of_value else net_arch
    base_width = math.gcd(*widths)
    return dict(base_width=base_width, multipliers=[width // base_width for width in widths])


def make_planner_net(backbone: str, layout: WindowLayout, net_kwargs: dict[str, Any]) -> nn.Module:
    """
    :param backbone: ``"unet"`` or ``"transformer"``
    :param layout: of the windows
    :param net_kwargs: sizes
    :return: network from windows to windows
    """
    check_choice("backbone", backbone, ("unet", "transformer"))
    if backbone == "transformer":
        return TrajectoryTransformer(layout.dim, layout.horizon, **net_kwargs)
    net = TemporalUnet(layout.dim, **net_kwargs)
    check_horizon(layout.horizon, net.n_levels)
    return net


def make_value_net(backbone: str, layout: WindowLayout, net_kwargs: dict[str, Any]) -> nn.Module:
    """
    :param backbone: ``"unet"`` or ``"transformer"``
    :param layout: of the windows
    :param net_kwargs: sizes; ``attention`` is for the planner alone
    :return: network from windows to one number each
    """
    if backbone == "transformer":
        return ValueTransformer(layout.dim, layout.horizon, **net_kwargs)
    return ValueUnet(layout.dim, layout.horizon, **{key: value for key, value in net_kwargs.items() if key != "attention"})


class WindowNetwork(Network):
    """
    What the planner and the value share: the layout of windows and its statistics.

    :param horizon: rows of a window
    :param stride: env steps from row to row
    :param goal_conditioned: the end of a window is given
    :param normalization: ``"gaussian"`` or ``"limits"``
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self, *args: Any, horizon: int, stride: int, goal_conditioned: bool, normalization: str, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.action_space, spaces.Box)
        self.layout = WindowLayout(self.observation_space, self.action_space, horizon, stride, goal_conditioned)
        self.window_normalizer = WindowNormalizer(normalization, self.layout.dim)
        self._own_arguments: dict[str, Any] = dict(
            horizon=horizon, stride=stride, goal_conditioned=goal_conditioned, normalization=normalization
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        spaces_only = dict(observation_space=self.observation_space, action_space=self.action_space)
        return dict(spaces_only, **self._own_arguments, average=self.averaged is not None)


class TrajectoryActor(WindowNetwork, ChainActor):
    r"""
    The planner: a diffusion model of windows whose first state (and end, if ``goal_conditioned``) is given.

    Its latents have the shape ``(n_draws, horizon, dim)``. Called as an actor it returns the first action of one window.

    :param backbone: ``"unet"`` or ``"transformer"``
    :param net_kwargs: sizes of the network
    :param noise_schedule: ``"linear"``, ``"cosine"`` or ``"vp"``
    :param n_diffusion_steps: length of the chain
    :param prediction_type: what the network tells, ``"noise"``, ``"sample"`` or ``"v"``
    :param clip: largest absolute value of a denoised entry, normalised; None for no bound
    :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
    :param n_sampling_steps: steps of the sampler; None for the whole chain
    :param average: keep a moving average of the weights
    :param kwargs: arguments of [WindowNetwork][sb3_diffusion.diffuser.policies.WindowNetwork]
    """

    def __init__(
        self,
        *args: Any,
        backbone: str = "unet",
        net_kwargs: dict[str, Any] | None = None,
        noise_schedule: str = "cosine",
        n_diffusion_steps: int = 20,
        prediction_type: str = "sample",
        clip: float | None = None,
        sampler: str = "ddpm",
        n_sampling_steps: int | None = None,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments.update(
            backbone=backbone,
            net_kwargs=net_kwargs,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            clip=clip,
        )
        net = make_planner_net(backbone, self.layout, net_kwargs or {})
        betas = noise_schedule_betas(noise_schedule, n_diffusion_steps)
        self.denoiser = DiscreteDenoiser(ConditionedNet(net, self.layout.known()), betas, prediction_type, clip)
        self.set_sampler(sampler, n_sampling_steps)
        if average:
            self.add_average()

    @property
    def conditioned(self) -> ConditionedNet:
        """The network, with what it does to the entries that are given."""
        assert isinstance(self.denoiser.net, ConditionedNet)
        return self.denoiser.net

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.n_draws, self.layout.horizon, self.layout.dim)

    @property
    def planner(self) -> "TrajectoryActor":
        """The network that plans: the moving average, or the trained weights if there is none."""
        averaged = self.averaged if self.acts_with_average else None
        return averaged if isinstance(averaged, TrajectoryActor) else self

    def condition(self, observations: PyTorchObs, goals: th.Tensor | None = None) -> th.Tensor:
        """
        Windows that hold what is given, normalised, and zeros elsewhere.

        :param observations: batch of observations
        :param goals: what the last row is given, shape ``(batch_size, *goal_shape)``; None takes ``desired_goal``
        :return: shape ``(batch_size, horizon, dim)``
        :raises ValueError: if a goal is needed and there is none
        """
        layout, normalize = self.layout, self.window_normalizer
        states = layout.states(observations)
        condition = states.new_zeros(len(states), layout.horizon, layout.dim)
        if layout.goal_conditioned:
            if goals is None and layout.has_goal_key:
                assert isinstance(observations, dict)
                goals = observations[GOAL_KEY]
            if goals is None:
                raise ValueError("This model was trained with the end of its windows given: pass `goal` to plan().")
            channels = layout.goal_channels
            condition[:, -1, channels] = normalize(goals.float().flatten(1), channels)
        channels = slice(layout.action_dim, None)
        condition[:, 0, channels] = normalize(states, channels)
        return condition

    def loss(self, windows: th.Tensor, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        Squared errors of denoising windows whose given entries stay clean; zero at these.

        :param windows: normalised, shape ``(batch_size, horizon, dim)``
        :param noise: standard normal, same shape
        :param level: diffusion steps, shape ``(batch_size,)``
        :return: same shape as ``windows``
        """
        errors = self.denoiser.loss(windows, noise, level, windows)
        return errors.masked_fill(self.conditioned.known, 0.0)

    def sample(
        self, condition: th.Tensor, latents: th.Tensor, make_guide: "MakeGuide | None" = None, start: "WarmStart | None" = None
    ) -> th.Tensor:
        """
        Run the reverse chain.

        :param condition: windows with the given entries, shape ``(batch_size, horizon, dim)``
        :param latents: what the chain draws, shape ``(batch_size, *latent_shape)``
        :param make_guide: makes the guide of the noisy windows from the chain's levels
        :param start: windows to start from, instead of noise
        :return: normalised windows, same shape as ``condition``, the given entries to the bit
        """
        levels = self.sampling_levels
        if start is not None:
            below = levels[levels < start.level]
            levels = below if len(below) > 0 else levels.new_tensor([start.level - 1])
        first, *noises = latents.unbind(dim=1)
        noises = noises[len(noises) + 1 - len(levels) :]
        x = self.denoiser.prior(first, levels[:1])
        if start is not None:
            x = self.denoiser.corrupt(start.windows, first, levels[:1])
        guide = None if make_guide is None else make_guide(levels, condition)
        x = SAMPLERS[self.sampler](self.denoiser, x, levels, condition, noises or None, guide=guide)
        return self.conditioned.condition(x, condition)

    def actions(self, windows: th.Tensor) -> th.Tensor:
        """
        :param windows: normalised, shape ``(batch_size, horizon, dim)``
        :return: actions in [-1, 1], one per env step, shape ``(batch_size, horizon * stride, action_dim)``
        """
        channels = slice(0, self.layout.action_dim)
        actions = self.window_normalizer.inverse(windows[..., channels], channels).clamp(-1.0, 1.0)
        return actions.reshape(len(windows), -1, self.layout.single_action_dim)

    def states(self, windows: th.Tensor) -> th.Tensor:
        """
        :param windows: normalised, shape ``(batch_size, horizon, dim)``
        :return: states in the units of the data, shape ``(batch_size, horizon, state_dim)``
        """
        channels = slice(self.layout.action_dim, None)
        return self.window_normalizer.inverse(windows[..., channels], channels)

    def forward(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        First action of one window per row, neither guided nor chosen.

        :param observations: batch of observations
        :param latents: what the chain draws, shape ``(batch_size, *latent_shape)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        return self.actions(self.sample(self.condition(observations), latents))[:, 0]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), sampler=self.sampler, n_sampling_steps=self.n_sampling_steps)


MakeGuide = Callable[[th.Tensor, th.Tensor], Guide]


class WarmStart(NamedTuple):
    """
    Windows to refine.

    :ivar windows: normalised, shape ``(batch_size, horizon, dim)``
    :ivar level: only diffusion steps below this one are run
    """

    windows: th.Tensor
    level: int


class TrajectoryValue(WindowNetwork):
    r"""
    The guide: expected return $J(x, i)$ of a noisy window, from its start to the end of the episode, in units of the rewards.

    The network tells the return normalised by frozen statistics of the data.

    :param backbone: ``"unet"`` or ``"transformer"``
    :param net_kwargs: sizes of the network
    :param average: keep a moving average of the weights
    :param kwargs: arguments of [WindowNetwork][sb3_diffusion.diffuser.policies.WindowNetwork]
    """

    return_mean: th.Tensor
    return_std: th.Tensor

    def __init__(
        self,
        *args: Any,
        backbone: str = "unet",
        net_kwargs: dict[str, Any] | None = None,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments.update(backbone=backbone, net_kwargs=net_kwargs)
        self.conditioned = ConditionedNet(make_value_net(backbone, self.layout, net_kwargs or {}), self.layout.known())
        self.register_buffer("return_mean", th.zeros(()))
        self.register_buffer("return_std", th.ones(()))
        if average:
            self.add_average()

    @property
    def guide(self) -> "TrajectoryValue":
        """The network that guides: the moving average, or the trained weights if there is none."""
        return self.averaged if isinstance(self.averaged, TrajectoryValue) else self

    def fit_returns(self, returns: th.Tensor) -> None:
        """
        Take the scale of returns from data.

        :param returns: shape ``(n,)``
        """
        std = returns.std() if len(returns) > 1 else th.zeros(())
        self.return_mean.copy_(returns.mean())
        self.return_std.copy_(std if std > MIN_SCALE else th.ones(()))

    def forward(self, windows: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param windows: noisy, normalised, shape ``(batch_size, horizon, dim)``
        :param condition: windows with the given entries, same shape
        :param level: diffusion steps, shape ``(batch_size,)`` or ``(1,)``
        :return: expected returns, shape ``(batch_size, 1)``
        """
        return self.return_mean + self.return_std * self.conditioned(windows, condition, level)

    def loss(self, windows: th.Tensor, condition: th.Tensor, level: th.Tensor, returns: th.Tensor) -> th.Tensor:
        """
        Squared errors of the normalised returns.

        :param windows: noisy, normalised, shape ``(batch_size, horizon, dim)``
        :param condition: windows with the given entries, same shape
        :param level: diffusion steps, shape ``(batch_size,)``
        :param returns: shape ``(batch_size, 1)``
        :return: shape ``(batch_size, 1)``
        """
        targets = (returns - self.return_mean) / self.return_std
        return (self.conditioned(windows, condition, level) - targets).square()

    def gradient(self, windows: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        r"""
        $\nabla_x J(x, i)$, of each window on its own.

        :param windows: noisy, normalised, shape ``(batch_size, horizon, dim)``
        :param condition: windows with the given entries, same shape
        :param level: diffusion step, shape ``(1,)``
        :return: same shape as ``windows``, zero at the given entries
        """
        with th.enable_grad():
            x = windows.detach().requires_grad_()
            (gradient,) = th.autograd.grad(self(x, condition, level).sum(), x)
        return gradient


class DiffuserPolicy(DiffusionPolicy):
    r"""
    Policy of Diffuser: ``actor`` plans, ``value`` guides and ranks the plans; both act through moving averages.

    For each observation ``n_candidates`` windows are drawn, guided towards high values, and the one with the highest value is
    acted on for ``n_action_steps`` env steps. The plan travels in the ``state`` of ``predict``: give it back at the next call,
    as ``evaluate_policy`` does. Without it each call plans anew.

    ``deterministic=True`` draws nothing: one candidate follows the means of the reverse chain from the noise 0, several take
    latents that all rows share. Otherwise each row has random numbers of its own, so that its plans depend on no other row.

    :param observation_space: Box of vectors, or a ``Dict`` of them
    :param action_space: Box
    :param lr_schedule: learning rate of the planner as a function of the remaining progress
    :param horizon: rows of a window
    :param stride: env steps from row to row
    :param goal_conditioned: the end of a window is given
    :param normalization: ``"gaussian"`` or ``"limits"``
    :param backbone: ``"unet"`` or ``"transformer"``
    :param net_arch: channels of the U-Net's levels, such as ``[32, 64, 128]``, or of the transformer's blocks, such as
        ``[256, 256]``; a dict with ``pi`` for the planner and ``qf`` for the value; None for the defaults of the networks
    :param net_kwargs: further sizes of the networks: ``base_width``, ``multipliers``, ``kernel_size`` and ``attention`` of
        [TemporalUnet][sb3_diffusion.diffuser.networks.TemporalUnet], or ``width``, ``n_layers`` and ``n_heads`` of
        [TrajectoryTransformer][sb3_diffusion.diffuser.networks.TrajectoryTransformer]
    :param optimizer_class: class of the optimisers
    :param optimizer_kwargs: their arguments except the learning rate
    :param noise_schedule: ``"linear"``, ``"cosine"`` or ``"vp"``
    :param n_diffusion_steps: length of the chain
    :param prediction_type: what the planner's network tells, ``"noise"``, ``"sample"`` or ``"v"``
    :param clip: largest absolute value of a denoised entry, normalised; None for no bound
    :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
    :param n_sampling_steps: steps of the sampler; None for the whole chain
    :param with_value: build the value
    :param n_candidates: plans drawn per observation
    :param guidance_scale: size of a step along the gradient of the value; 0 plans without guidance
    :param guidance_scaling: what multiplies the gradient: ``"variance"`` or ``"std"`` of the posterior of the denoising
        step, or None
    :param n_guidance_steps: gradient steps before each denoising step
    :param t_stopgrad: no guidance at diffusion steps below this one
    :param n_action_steps: env steps acted on before planning anew, at most ``horizon * stride``
    :param warm_start: share of the chain that refines the previous plan, shifted, instead of planning from noise; 0 is off
    :param tracker: ``tracker(observations, planned_next_observations, planned_actions) -> actions`` makes the actions, in env
        units, from planned states
    """

    actor: TrajectoryActor
    value: TrajectoryValue | None

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        horizon: int = 32,
        stride: int = 1,
        goal_conditioned: bool = False,
        normalization: str = "gaussian",
        backbone: str = "unet",
        net_arch: list[int] | dict[str, list[int]] | None = None,
        net_kwargs: dict[str, Any] | None = None,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        noise_schedule: str = "cosine",
        n_diffusion_steps: int = 20,
        prediction_type: str = "sample",
        clip: float | None = None,
        sampler: str = "ddpm",
        n_sampling_steps: int | None = None,
        with_value: bool = True,
        n_candidates: int = 64,
        guidance_scale: float = 0.1,
        guidance_scaling: str | None = "variance",
        n_guidance_steps: int = 2,
        t_stopgrad: int = 2,
        n_action_steps: int = 1,
        warm_start: float = 0.0,
        tracker: Any = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        self._own_arguments: dict[str, Any] = dict(
            optimizer_class=optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            horizon=horizon,
            stride=stride,
            goal_conditioned=goal_conditioned,
            normalization=normalization,
            backbone=backbone,
            net_arch=net_arch,
            net_kwargs=net_kwargs,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            clip=clip,
            with_value=with_value,
        )
        self.horizon = horizon
        self.n_candidates = n_candidates
        self.guidance_scale = guidance_scale
        self.guidance_scaling = guidance_scaling
        self.n_guidance_steps = n_guidance_steps
        self.t_stopgrad = t_stopgrad
        self.n_action_steps = n_action_steps
        self.warm_start = warm_start
        self.tracker = tracker
        window_arguments: dict[str, Any] = dict(
            observation_space=observation_space,
            action_space=action_space,
            horizon=horizon,
            stride=stride,
            goal_conditioned=goal_conditioned,
            normalization=normalization,
            backbone=backbone,
            average=True,
        )
        planner_sizes = value_sizes = net_kwargs or {}
        if net_arch is not None:
            planner_arch, value_arch = get_actor_critic_arch(net_arch)
            planner_sizes = {**net_sizes(backbone, planner_arch, of_value=False), **planner_sizes}
            value_sizes = {**net_sizes(backbone, value_arch, of_value=True), **value_sizes}
        self.actor = TrajectoryActor(
            **window_arguments,
            net_kwargs=planner_sizes,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            clip=clip,
            sampler=sampler,
            n_sampling_steps=n_sampling_steps,
        )
        self.value = TrajectoryValue(**window_arguments, net_kwargs=value_sizes) if with_value else None
        for network in self.trained_networks:
            network.optimizer = self.make_optimizer(network, lr_schedule(1.0))
        self.set_training_mode(False)

    @property
    def trained_networks(self) -> list[WindowNetwork]:
        """The planner, and the value if there is one."""
        return [self.actor] if self.value is None else [self.actor, self.value]

    @property
    def window_normalizers(self) -> list[WindowNormalizer]:
        """One in each network, all with the same statistics."""
        return [module for module in self.modules() if isinstance(module, WindowNormalizer)]

    # ---------------------------------------------------------------- planning

    def latents(self, seeds: np.ndarray, n_candidates: int, deterministic: bool = False) -> th.Tensor:
        """
        What the chains of each row draw: from random numbers of the row's own, or the same for all rows and calls if
        ``deterministic``, of which the first candidate's are 0.

        :param seeds: one per row
        :param n_candidates: chains per row
        :param deterministic: do not use the seeds
        :return: shape ``(len(seeds) * n_candidates, *latent_shape)``, those of a row side by side
        """
        shape = (n_candidates, *self.actor.latent_shape)
        rows = [th.randn(shape, generator=th.Generator().manual_seed(int(seed))) for seed in ([0] if deterministic else seeds)]
        if deterministic:
            rows[0][0] = 0.0
            rows = rows * len(seeds)
        return th.cat(rows).to(self.device)

    def plan_windows(
        self, condition: th.Tensor, latents: th.Tensor, start: WarmStart | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Sample candidates, guided, and take the best of each row.

        :param condition: windows with the given entries, one per row, shape ``(n_rows, horizon, dim)``
        :param latents: of all candidates, those of a row side by side, shape ``(n_rows * n_candidates, *latent_shape)``
        :param start: windows to refine, one per row
        :return: best window of each row, shape ``(n_rows, horizon, dim)``, and its value, shape ``(n_rows,)``
        """
        n = len(latents) // len(condition)
        repeated = condition.repeat_interleave(n, dim=0)
        if start is not None:
            start = start._replace(windows=start.windows.repeat_interleave(n, dim=0))
        guided = self.value is not None and self.guidance_scale != 0.0 and self.n_guidance_steps > 0
        planner = self.actor.planner
        windows = planner.sample(repeated, latents, self._make_guide if guided else None, start)
        if self.value is None:
            return windows, windows.new_full((len(windows),), float("nan"))
        clean = th.zeros(1, dtype=th.long, device=windows.device)
        values = self.value.guide(windows, repeated, clean).float().reshape(-1, n)
        best = values.argmax(dim=1)
        rows = th.arange(len(condition), device=windows.device)
        return windows.reshape(-1, n, *windows.shape[1:])[rows, best], values[rows, best]

    def _make_guide(self, levels: th.Tensor, condition: th.Tensor) -> Guide:
        r"""
        $x \leftarrow x + c\, V_i \nabla_x J(x, i)$, ``n_guidance_steps`` times before each denoising step (arXiv 2205.09991,
        algorithm 1, in the order of the authors' code).
        """
        assert self.value is not None
        value, posterior_std = self.value.guide, steps_between(self.actor.denoiser, levels).posterior_std
        powers: dict[str | None, th.Tensor] = {
            "variance": posterior_std.square(),
            "std": posterior_std,
            None: th.ones_like(posterior_std),
        }
        sizes = self.guidance_scale * powers[self.guidance_scaling]
        active = (levels >= self.t_stopgrad).tolist()

        def guide(k: int, x: th.Tensor) -> th.Tensor:
            if active[k]:
                for _ in range(self.n_guidance_steps):
                    x = x + sizes[k] * value.gradient(x, condition, levels[k : k + 1])
            return x

        return guide

    def decode(self, windows: th.Tensor, values: th.Tensor, goals: np.ndarray | None = None) -> Plan:
        """
        :param windows: normalised, shape ``(n_rows, horizon, dim)``
        :param values: shape ``(n_rows,)``
        :param goals: ``desired_goal`` of each row, where the space has goals that are no part of the windows
        :return: the plans in env units; with a ``stride``, states between planned ones are interpolated
        """
        layout = self.actor.layout
        actions = self.actor.actions(windows).cpu().numpy()
        states = self.actor.states(windows).cpu().numpy()
        if layout.stride > 1:
            at = np.arange(layout.horizon * layout.stride) / layout.stride
            left = np.minimum(at.astype(int), layout.horizon - 1)
            right, share = np.minimum(left + 1, layout.horizon - 1), (at % 1.0)[:, None].astype(states.dtype)
            states = states[:, left] + share * (states[:, right] - states[:, left])
        if goals is not None:
            goals = np.repeat(goals[:, None], states.shape[1], axis=1)
        shape = (*actions.shape[:2], *self.action_space.shape)  # type: ignore[misc]
        return Plan(layout.observations(states, goals), self.unscale_action(actions.reshape(shape)), values.cpu().numpy())

    # ---------------------------------------------------------------- acting

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        condition = self.actor.condition(observation)
        latents = self.latents(self.draw_seeds(len(condition)), self.n_candidates, deterministic)
        windows, _ = self.plan_windows(condition, latents)
        return self.actor.actions(windows)[:, 0]

    def draw_seeds(self, n: int) -> np.ndarray:
        """
        :param n: how many
        :return: seeds of the random numbers of rows, drawn from the policy's generator
        """
        return th.randint(2**62, (n,), generator=self.actor.generator).numpy()

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Act on the plans in ``state``; rows whose plan is used up, whose episode begins or whose ``desired_goal`` is another
        one are planned anew, in one batch; with ``warm_start`` those that go on from an old plan are a second one.

        :param observation: one observation or a batch of them
        :param state: what the last call returned; None plans for all
        :param episode_start: which rows begin an episode, shape ``(n_rows,)``
        :param deterministic: see the class
        :return: actions in env units and the state for the next call: windows, env steps taken of them, seeds
        """
        self.set_training_mode(False)
        if isinstance(observation, tuple):
            raise ValueError(
                "predict() takes observations: got a tuple, as env.reset() and env.step() of Gymnasium return. You are "
                "probably mixing Gym API and SB3's VecEnv API."
            )
        observations, vectorized = self.obs_to_tensor(observation)
        n = n_rows(observations)
        if state is None:
            windows = np.zeros((n, self.horizon, self.actor.layout.dim), dtype=np.float32)
            taken = np.full(n, -1)
            seeds = self.draw_seeds(n)
        else:
            windows, taken, seeds = (array.copy() for array in state)
            if len(windows) != n:
                raise ValueError(f"`state` must come from a call with as many observations: got {len(windows)}, now {n}.")
        if episode_start is not None:
            taken[np.asarray(episode_start, dtype=bool).reshape(-1)] = -1
        with th.no_grad():
            condition = self.actor.condition(observations)
            if self.actor.layout.goal_conditioned:
                goals = self.actor.layout.goals(condition).cpu().numpy()
                taken[np.any(self.actor.layout.goals(windows) != goals, axis=1)] = -1
            used_up = taken >= self.n_action_steps
            warm = used_up & (self.warm_start > 0.0)
            cold = ((taken < 0) | used_up) & ~warm
            for rows, start_warm in ((np.flatnonzero(cold), False), (np.flatnonzero(warm), True)):
                if len(rows) > 0:
                    fresh = self._replan(condition, windows, taken, seeds, rows, deterministic, start_warm)
                    windows[rows], taken[rows] = fresh, 0
                    seeds[rows] = _next_seeds(seeds[rows])
            actions = self._act(observation, observations, th.as_tensor(windows, device=self.device), taken)
        taken += 1
        return (actions if vectorized else actions[0]), (windows, taken, seeds)

    def _replan(
        self,
        condition: th.Tensor,
        windows: np.ndarray,
        taken: np.ndarray,
        seeds: np.ndarray,
        rows: np.ndarray,
        deterministic: bool,
        warm: bool,
    ) -> np.ndarray:
        """New windows of the given rows; ``warm`` ones from what is left of their old ones."""
        latents = self.latents(seeds[rows], self.n_candidates, deterministic)
        start = None
        if warm:
            level = max(1, round(self.warm_start * self.actor.denoiser.n_diffusion_steps))
            shifted = shift_windows(windows[rows], taken[rows] // self.actor.layout.stride)
            start = WarmStart(th.as_tensor(shifted, device=self.device), level)
        planned, _ = self.plan_windows(condition[th.as_tensor(rows, device=self.device)], latents, start)
        return planned.cpu().numpy()

    def _act(self, observation: Any, observations: PyTorchObs, windows: th.Tensor, taken: np.ndarray) -> np.ndarray:
        """The action of each row at its place in its plan, in env units."""
        rows = np.arange(len(taken))
        goals = None
        if self.actor.layout.has_goal_key:
            assert isinstance(observations, dict)
            goals = observations[GOAL_KEY].cpu().numpy()
        plan = self.decode(windows, windows.new_zeros(len(windows)), goals)
        actions = plan.actions[rows, taken]
        if self.tracker is None:
            return actions
        following = np.minimum(taken + 1, plan.actions.shape[1] - 1)
        if isinstance(plan.observations, dict):
            shapes = self.observation_space.spaces  # type: ignore[attr-defined]
            current: Any = {key: np.reshape(observation[key], (len(taken), *shapes[key].shape)) for key in shapes}
            ahead: Any = {key: value[rows, following] for key, value in plan.observations.items()}
        else:
            current = np.reshape(observation, (len(taken), *self.observation_space.shape))  # type: ignore[misc]
            ahead = plan.observations[rows, following]
        return np.clip(self.tracker(current, ahead, actions), self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        acting = dict(
            sampler=self.actor.sampler,
            n_sampling_steps=self.actor.n_sampling_steps,
            n_candidates=self.n_candidates,
            guidance_scale=self.guidance_scale,
            guidance_scaling=self.guidance_scaling,
            n_guidance_steps=self.n_guidance_steps,
            t_stopgrad=self.t_stopgrad,
            n_action_steps=self.n_action_steps,
            warm_start=self.warm_start,
            tracker=self.tracker,
        )
        spaces_only = dict(observation_space=self.observation_space, action_space=self.action_space)
        return dict(spaces_only, lr_schedule=self._dummy_schedule, **self._own_arguments, **acting)


def _next_seeds(seeds: np.ndarray) -> np.ndarray:
    """Seeds of the next plans of the same rows, by a linear congruential generator (Knuth's MMIX constants)."""
    following = seeds.astype(np.uint64) * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
    return (following >> np.uint64(2)).astype(np.int64)


MlpPolicy = DiffuserPolicy
MultiInputPolicy = DiffuserPolicy


class CnnPolicy(DiffuserPolicy):
    """For images, which Diffuser refuses."""

    def __init__(self, observation_space: spaces.Space, *args: Any, **kwargs: Any) -> None:
        check_image(observation_space)
        super().__init__(observation_space, *args, **kwargs)
