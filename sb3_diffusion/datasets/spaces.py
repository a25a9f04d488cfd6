"""Spaces of logged data: which are supported, what fits what, and how they flatten and stack."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gymnasium import spaces


def check_action_space(action_space: spaces.Space) -> None:
    """
    Refuse actions that are not continuous.

    :param action_space: space of the data
    :raises TypeError: if it is not a Box
    """
    if not isinstance(action_space, spaces.Box):
        raise TypeError(
            f"Actions must be continuous (a Box): got {action_space}. The diffusion methods of this package generate real "
            "vectors; they cannot learn from data with discrete actions."
        )


def flatten_observation_space(space: spaces.Space) -> spaces.Space:
    """
    Bring a Dict of Dicts to one level, keys joined by ``"."``; all else stays.

    :param space: observation space of an environment or dataset
    :return: a Box, Discrete, MultiDiscrete or MultiBinary space, or a Dict of these
    :raises TypeError: if a part is something else (Tuple, Text, Graph, ...)
    """
    if not isinstance(space, spaces.Dict):
        _check_leaf_space(space, "The observation space")
        return space
    flat: dict[str, spaces.Space] = {}
    for key, subspace in _walk_space(space, ""):
        _check_leaf_space(subspace, f"The observation {key!r}")
        if key in flat:
            raise ValueError(f"Two observations would both be called {key!r} once the nested Dict is flat; rename one.")
        flat[key] = subspace
    if set(flat) == set(space.spaces):
        return space
    return spaces.Dict(flat)


def stacked_space(space: spaces.Space, n_stack: int) -> spaces.Space:
    """
    Space of ``n_stack`` observations put together.

    :param space: a Box or a Dict of Box
    :param n_stack: number of observations
    :return: the space with its bounds repeated; those of integers have room for the zeros before the start of an episode
    :raises TypeError: for other spaces
    """
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: stacked_space(subspace, n_stack) for key, subspace in space.spaces.items()})
    if not isinstance(space, spaces.Box) or not space.shape:
        raise TypeError(f"Only Box observations (and Dicts of them) can be stacked: got {space}.")
    axis = 0 if stacks_first(space) else -1
    low, high = np.repeat(space.low, n_stack, axis=axis), np.repeat(space.high, n_stack, axis=axis)
    if space.dtype.kind in "iu" and n_stack > 1:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    return spaces.Box(low, high, dtype=space.dtype.type)


def space_mismatch(data_space: spaces.Space, env_space: spaces.Space, bounds: bool = False) -> str | None:
    """
    Say in what two spaces differ that matters to the data.

    :param data_space: of the dataset
    :param env_space: of an environment
    :param bounds: whether the bounds of a Box must agree
    :return: None if they fit
    """
    if isinstance(data_space, spaces.Dict):
        if not isinstance(env_space, spaces.Dict):
            return "the dataset has a Dict of observations, the environment has not"
        env_space = flatten_observation_space(env_space)
        assert isinstance(env_space, spaces.Dict)
        if set(data_space.spaces) != set(env_space.spaces):
            return f"keys {sorted(data_space.spaces)} against {sorted(env_space.spaces)}"
        for key, subspace in data_space.spaces.items():
            problem = space_mismatch(subspace, env_space.spaces[key], bounds)
            if problem:
                return f"{key!r}: {problem}"
        return None
    if type(data_space) is not type(env_space):
        return f"{type(data_space).__name__} against {type(env_space).__name__}"
    if isinstance(data_space, spaces.Box) and isinstance(env_space, spaces.Box):
        if data_space.shape != env_space.shape:
            if is_image_space(data_space) and _transposed_shape(data_space) == env_space.shape:
                return None
            return f"shape {data_space.shape} against {env_space.shape}"
        if (data_space.dtype.kind == "f") != (env_space.dtype.kind == "f"):
            return f"{data_space.dtype} against {env_space.dtype}"
        if bounds and not (
            np.allclose(data_space.low, env_space.low, rtol=1e-4) and np.allclose(data_space.high, env_space.high, rtol=1e-4)
        ):
            return "different bounds"
        return None
    return None if data_space == env_space else "different sizes"


def is_image_space(space: spaces.Space) -> bool:
    """
    Tell images from other observations by SB3's rule.

    :param space: space of one observation
    :return: whether it is a uint8 Box of three axes from 0 to 255
    """
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and bool(np.all(space.low == 0) and np.all(space.high == 255))
    )


def integer_bounds(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """
    :param space: of integers: a Box of them, Discrete, MultiDiscrete or MultiBinary
    :return: the smallest and the largest values, two arrays of the shape of the space
    """
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64)
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    count = space.n if isinstance(space, spaces.Discrete) else space.nvec
    low = np.asarray(space.start, np.int64)
    return low, np.asarray(low + np.asarray(count, np.int64) - 1)


def stacks_first(space: spaces.Box) -> bool:
    """
    :param space: of one observation
    :return: whether it is an image with its channels on the first axis (the smallest one)
    """
    return is_image_space(space) and int(np.argmin(space.shape)) == 0


def _transposed_shape(space: spaces.Box) -> tuple[int, ...]:
    """
    :param space: of an image
    :return: its shape with the channels on the other side
    """
    if stacks_first(space):
        return (*space.shape[1:], space.shape[0])
    return (space.shape[-1], *space.shape[:-1])


def _walk_space(space: spaces.Dict, prefix: str) -> Iterator[tuple[str, spaces.Space]]:
    """
    :param space: Dict that may hold Dicts
    :param prefix: what the keys start with
    :return: pairs of joined key and part that is not a Dict
    """
    for key, subspace in space.spaces.items():
        if isinstance(subspace, spaces.Dict):
            yield from _walk_space(subspace, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", subspace


def _check_leaf_space(space: spaces.Space, label: str) -> None:
    """
    :param space: a part of an observation space
    :param label: what to call it
    """
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise TypeError(
            f"{label} must be a Box, Discrete, MultiDiscrete or MultiBinary space or a Dict of these: got {space}. "
            "Wrap the environment so that it gives a Dict, and record again."
        )
