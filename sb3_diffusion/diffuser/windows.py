"""Windows of trajectories as arrays: where observations and actions lie in them, how they are normalised, what is given."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_diffusion.common.compilation import CompiledInference
from sb3_diffusion.common.observations import FLAT_KEY, ArrayT, VectorLayout, subspaces
from sb3_diffusion.common.utils import MIN_SCALE, check_choice
from sb3_diffusion.datasets.arrays import column_moments

GOAL_KEY = "desired_goal"
ACHIEVED_KEY = "achieved_goal"


class WindowLayout:
    """
    How observations and actions lie side by side in the channels of a window: the actions first, then the states.

    A window has ``horizon`` rows that are ``stride`` env steps apart; each holds the ``stride`` actions up to the next one.
    The state of a ``Dict`` observation is that of all its keys. If ``goal_conditioned`` and the space has goals,
    ``desired_goal`` is no part of it: the ``achieved_goal`` of the last row takes its place.

    :param observation_space: Box of vectors, or a ``Dict`` of them
    :param action_space: Box
    :param horizon: rows of a window
    :param stride: env steps from row to row
    :param goal_conditioned: the end of a window is given
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Box, horizon: int, stride: int, goal_conditioned: bool
    ) -> None:
        self.observation_space = observation_space
        self.horizon, self.stride = horizon, stride
        self.goal_conditioned = goal_conditioned
        parts = subspaces(observation_space)
        self.has_goal_key = goal_conditioned and {GOAL_KEY, ACHIEVED_KEY} <= parts.keys()
        if self.has_goal_key:
            del parts[GOAL_KEY]
        self.parts = VectorLayout(parts, "Diffuser plans over vectors")
        self.single_action_dim = get_action_dim(action_space)
        self.action_dim = stride * self.single_action_dim
        self.dim = self.action_dim + self.parts.dim

    @property
    def goal_channels(self) -> slice:
        """Channels that are given in the last row, if ``goal_conditioned``."""
        if not self.has_goal_key:
            return slice(self.action_dim, self.dim)
        achieved = self.parts.slices[ACHIEVED_KEY]
        return slice(self.action_dim + achieved.start, self.action_dim + achieved.stop)

    @property
    def goal_shape(self) -> tuple[int, ...]:
        """Shape of a goal, if ``goal_conditioned``: that of the channels given at the end."""
        if self.has_goal_key:
            return self.parts.shapes[ACHIEVED_KEY]
        return self.parts.shapes[FLAT_KEY] if len(self.parts.shapes) == 1 else (self.parts.dim,)

    def goals(self, windows: ArrayT) -> ArrayT:
        """
        :param windows: of a ``goal_conditioned`` model, shape ``(n, horizon, dim)``
        :return: what is given at their end, shape ``(n, n_goal_channels)``
        """
        return windows[:, -1, self.goal_channels]

    def known(self) -> th.Tensor:
        """:return: which entries of a window are given, bool, shape ``(horizon, dim)``"""
        known = th.zeros(self.horizon, self.dim, dtype=th.bool)
        known[0, self.action_dim :] = True
        if self.goal_conditioned:
            known[-1, self.goal_channels] = True
        return known

    def states(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: tensor ``(*batch_shape, *obs_shape)``, or a dict of such tensors
        :return: shape ``(*batch_shape, dim - action_dim)``
        """
        return self.parts.join(observations)

    def observations(self, states: np.ndarray, goals: np.ndarray | None) -> Any:
        """
        :param states: shape ``(*batch_shape, dim - action_dim)``
        :param goals: ``desired_goal`` of a space with goals, shape ``(*batch_shape, *goal_shape)``
        :return: observations, shape ``(*batch_shape, *obs_shape)``, or a dict of such arrays
        """
        parts = self.parts.split(states)
        if not isinstance(self.observation_space, spaces.Dict):
            return parts[FLAT_KEY]
        if self.has_goal_key:
            assert goals is not None
            parts[GOAL_KEY] = goals
        return {key: parts[key] for key in self.observation_space.spaces}


class WindowNormalizer(nn.Module):
    """
    Normalises the channels of windows by frozen statistics of the data.

    :param kind: ``"gaussian"``: mean 0 and standard deviation 1; ``"limits"``: from [min, max] to [-1, 1]
    :param dim: channels
    """

    shift: th.Tensor
    scale: th.Tensor
    low: th.Tensor
    """Smallest value of each channel in the data."""
    high: th.Tensor
    """Largest value of each channel in the data."""

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        check_choice("normalization", kind, ("gaussian", "limits"))
        self.kind = kind
        self.register_buffer("shift", th.zeros(dim))
        self.register_buffer("scale", th.ones(dim))
        self.register_buffer("low", th.full((dim,), -float("inf")))
        self.register_buffer("high", th.full((dim,), float("inf")))

    def fit(self, channels: slice, values: np.ndarray, normalize: bool = True) -> None:
        """
        Take statistics from data; channels that hardly vary keep their scale.

        :param channels: which the values are of
        :param values: shape ``(n_steps, n_channels)``
        :param normalize: False takes the range alone and leaves these channels as they are
        """
        low, high = values.min(axis=0), values.max(axis=0)
        if not normalize:
            shift, scale = np.zeros_like(low), np.ones_like(low)
        elif self.kind == "limits":
            shift, scale = 0.5 * (low + high), 0.5 * (high - low)
        else:
            shift, variance = column_moments(values)
            scale = np.sqrt(variance)
        scale = np.where(scale > MIN_SCALE, scale, 1.0)
        for buffer, value in ((self.shift, shift), (self.scale, scale), (self.low, low), (self.high, high)):
            buffer[channels] = th.as_tensor(value, dtype=buffer.dtype, device=buffer.device)

    def forward(self, values: th.Tensor, channels: slice = slice(None)) -> th.Tensor:
        """
        :param values: shape ``(..., n_channels)``
        :param channels: which they are
        :return: normalised, same shape
        """
        return (values - self.shift[channels]) / self.scale[channels]

    def inverse(self, values: th.Tensor, channels: slice = slice(None)) -> th.Tensor:
        """
        :param values: normalised, shape ``(..., n_channels)``
        :param channels: which they are
        :return: as in the data, same shape
        """
        return values * self.scale[channels] + self.shift[channels]


class ConditionedNet(CompiledInference):
    """
    A network on windows some of whose entries are given: whatever stands there is replaced before the network sees it.

    :param net: ``net(x, level)``
    :param known: which entries are given, bool, shape ``(horizon, dim)``
    """

    known: th.Tensor

    def __init__(self, net: nn.Module, known: th.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("known", known, persistent=False)

    def condition(self, x: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        :param x: windows, shape ``(batch_size, horizon, dim)``
        :param condition: windows with the given entries, same shape
        :return: ``x`` with the given entries of ``condition``
        """
        return th.where(self.known, condition, x)

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param x: windows, shape ``(batch_size, horizon, dim)``
        :param condition: windows with the given entries, same shape
        :param level: noise levels, shape ``(batch_size,)`` or ``(1,)``
        :return: what ``net`` returns
        """
        return self.run(self.net, self.condition(x, condition), level)


def shift_windows(windows: np.ndarray, n_rows: np.ndarray) -> np.ndarray:
    """
    Drop the rows that lie behind; the last one is repeated in their place.

    :param windows: shape ``(n, horizon, dim)``
    :param n_rows: how many lie behind in each window, shape ``(n,)``
    :return: same shape as ``windows``
    """
    horizon = windows.shape[1]
    rows = np.minimum(np.arange(horizon) + n_rows[:, None], horizon - 1)
    return np.take_along_axis(windows, rows[:, :, None], axis=1)
