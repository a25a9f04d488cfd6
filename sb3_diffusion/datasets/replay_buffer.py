"""Replay buffers of Stable-Baselines3 as logged data."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_diffusion.datasets.arrays import Observations
from sb3_diffusion.datasets.offline_dataset import ACTION_TOLERANCE, OfflineDataset
from sb3_diffusion.datasets.spaces import check_action_space


def from_replay_buffer(buffer: Any, name: str = "replay buffer") -> OfflineDataset:
    """
    Copy what a replay buffer holds, oldest step first, one environment after the other.

    Actions are brought back from the [-1, 1] in which SB3's algorithms store them to the units of the action space. What
    ``timeouts`` marks becomes a truncation; so does the newest step of each environment, whose episode may still run. A
    buffer with ``optimize_memory_usage`` has lost the observations in which episodes ended and tells no time limits apart:
    each of its dones counts as a termination, with the step's own observation for the next one, as in flat
    arrays without next observations.

    :param buffer: a ``ReplayBuffer`` or ``DictReplayBuffer`` or a subclass (``HerReplayBuffer``)
    :param name: of the dataset
    :return: the flat dataset, without an env spec
    :raises ValueError: if it is empty, or its actions are not between -1 and 1
    :raises TypeError: if its actions are discrete
    """
    check_action_space(buffer.action_space)
    optimized = bool(getattr(buffer, "optimize_memory_usage", False))
    rows = np.arange(buffer.pos)
    if buffer.full:
        # in the optimized layout the newest next observation has replaced the oldest observation
        rows = np.concatenate([np.arange(buffer.pos + optimized, buffer.buffer_size), rows])
    if len(rows) == 0:
        raise ValueError("The replay buffer is empty: expected at least one step; collect or add some first.")

    ends = np.asarray(buffer.dones)[rows].astype(bool)
    timeouts = np.zeros_like(ends) if optimized else np.asarray(buffer.timeouts)[rows].astype(bool)
    # a time limit counts only where an episode ended
    truncations = ends & timeouts
    truncations[-1] |= ~ends[-1]
    space = buffer.observation_space
    observations = _gather(buffer.observations, rows[:, None], space)
    if optimized:
        successors = (rows[:, None] + ~ends) % buffer.buffer_size
        next_observations = _gather(buffer.observations, successors, space)
    else:
        next_observations = _gather(buffer.next_observations, rows[:, None], space)
    return OfflineDataset(
        observations,
        _unscaled(_columns(np.asarray(buffer.actions)[rows]), buffer.action_space),
        _columns(np.asarray(buffer.rewards)[rows]),
        next_observations,
        _columns(ends & ~timeouts),
        _columns(truncations),
        observation_space=space,
        action_space=buffer.action_space,
        name=name,
    )


def _columns(array: np.ndarray) -> np.ndarray:
    """
    :param array: ``(n_rows, n_envs, ...)``
    :return: ``(n_envs * n_rows, ...)``, all rows of the first env first
    """
    return np.ascontiguousarray(array.swapaxes(0, 1)).reshape(-1, *array.shape[2:])


def _gather(stored: Any, rows: np.ndarray, space: spaces.Space) -> Observations:
    """
    :param stored: ``(buffer_size, n_envs, ...)``, or a dict of such arrays
    :param rows: ``(n_rows, n_envs)``, or ``(n_rows, 1)`` for the same ones of each env; in time order
    :param space: of one observation
    :return: ``(n_envs * n_rows, *obs_shape)``, or a dict of such arrays
    """
    if isinstance(space, spaces.Dict):
        # SB3's buffers know no Dict inside of a Dict: each part is an array
        return {key: np.asarray(_gather(stored[key], rows, part)) for key, part in space.spaces.items()}
    assert space.shape is not None
    array = np.asarray(stored)
    array = _columns(array[rows, np.arange(array.shape[1])])
    return array.reshape(len(array), *space.shape)  # SB3 stores a Discrete observation in shape (1,)


def _unscaled(actions: np.ndarray, space: spaces.Box) -> np.ndarray:
    """
    :param actions: ``(N, action_dim)`` in [-1, 1]
    :param space: the Box that they were scaled from
    :return: ``(N, *action_shape)`` in the units of the Box
    """
    if len(actions) and not np.abs(actions).max() <= 1.0 + 2.0 * ACTION_TOLERANCE:
        if np.isfinite(actions).all():
            raise ValueError(
                "A replay buffer must hold actions scaled to [-1, 1], as SB3's algorithms store them: got values from "
                f"{actions.min()} to {actions.max()}. If you filled it with actions in env units, give a dict of arrays."
            )
    actions = actions.reshape(len(actions), *space.shape)
    if not space.is_bounded():
        raise ValueError(f"The action space of a replay buffer must be bounded, to undo the scaling to [-1, 1]: got {space}.")
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    return np.clip(low + 0.5 * (actions.astype(np.float32) + 1.0) * (high - low), low, high)
