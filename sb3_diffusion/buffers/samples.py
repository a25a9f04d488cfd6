"""What ``sample()`` returns, and how batches are put together."""

from typing import Any, NamedTuple, TypeVar

import torch as th
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples

SamplesT = TypeVar("SamplesT", bound=tuple)


Batch = ReplayBufferSamples | DictReplayBufferSamples
"""What a buffer's ``sample`` returns: the observations of the second are dicts."""

Observations = th.Tensor | dict[str, th.Tensor]


class TrajectorySamples(NamedTuple):
    """
    What ``TrajectoryReplayBuffer.sample(n)`` returns: ``n`` windows of ``H = horizon`` rows, ``stride`` env steps apart.

    :ivar observations: ``(n, H, *obs_shape)`` in the stored type, a dict of such tensors for Dict observations
    :ivar actions: ``(n, H, stride * action_dim)`` in [-1, 1]; those of one row one after the other
    :ivar rewards: ``(n, H)``, the sum of the rewards of each row's steps
    :ivar mask: ``(n, H)``, 1 on rows that begin with a stored step of the episode, 0 on padding
    :ivar returns: ``(n, 1)``, discounted sum of the raw rewards from each window's first step to the end of its episode
    :ivar terminated: ``(n, 1)``, 1 if that episode ended in a terminal state, 0 if it was truncated or still runs
    """

    observations: Observations
    actions: th.Tensor
    rewards: th.Tensor
    mask: th.Tensor
    returns: th.Tensor
    terminated: th.Tensor


class FutureStateSamples(NamedTuple):
    """
    What ``FutureStateReplayBuffer.sample(n)`` returns: transitions, in the order of SB3's samples, each with a state ``k``
    steps on.

    Where a transition starts at step ``t`` of an episode whose last state is ``s_T``, ``steps_remaining`` is ``T - t``.

    :ivar observations: ``s_t``, ``(n, *obs_shape)`` in the stored type, a dict of such tensors for Dict observations
    :ivar actions: ``a_t``, ``(n, action_dim)`` in [-1, 1]
    :ivar next_observations: ``s_{t+1}``, like ``observations``; after several steps if the buffer has ``n_steps`` above 1
    :ivar dones: ``(n, 1)``, 1 where ``next_observations`` is a terminal state, 0 at truncations
    :ivar rewards: ``(n, 1)``
    :ivar discounts: ``(n, 1)`` if the buffer has ``n_steps`` above 1, else None
    :ivar future_observations: ``s_{t+k}``, like ``observations``; ``s_T`` where ``k`` is above ``steps_remaining``
    :ivar offsets: ``k``, int64 ``(n, 1)``, at least 1. To tell the next state from later ones, compare these with 1
        rather than states with each other.
    :ivar steps_remaining: number of future states, int64 ``(n, 1)``, at least 1; one less for ``next_observations``
    :ivar next_actions: the logged action in ``next_observations``, ``(n, action_dim)``; zeros where there is none
    :ivar has_next_actions: ``(n, 1)``, 0 where the episode ends, or is only stored up to, ``next_observations``
    :ivar absorbed: ``(n, 1)``, 1 where ``k`` is above ``steps_remaining`` and the episode terminated: the future state is
        known to be ``s_T``, no longer alive
    :ivar unknown: ``(n, 1)``, 1 where ``k`` is above ``steps_remaining`` and the episode was truncated or still runs: the
        future state is not known, only that it follows ``s_T``
    :ivar step_rewards: the reward of the first step alone, ``(n, 1)``; equal to ``rewards`` unless ``n_steps`` is above 1
    :ivar n_future: how many future states the offset was drawn over, int64 ``(n, 1)``: ``steps_remaining``, unless the buffer
        has a ``horizon`` or `"n_step"` offsets; a geometric offset can be above it
    """

    observations: Observations
    actions: th.Tensor
    next_observations: Observations
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    future_observations: Observations
    offsets: th.Tensor
    steps_remaining: th.Tensor
    next_actions: th.Tensor
    has_next_actions: th.Tensor
    absorbed: th.Tensor
    unknown: th.Tensor
    step_rewards: th.Tensor
    n_future: th.Tensor


def concat_samples(first: SamplesT, second: SamplesT) -> SamplesT:
    """
    Put two batches into one, the rows of ``first`` before those of ``second``.

    For SB3's ``ReplayBufferSamples`` and ``DictReplayBufferSamples`` and for every other NamedTuple of tensors, dicts of
    tensors and ``None``. Floating point tensors of different precision are joined as float32 (SB3's Dict buffers keep
    float64 observations).

    ```python
    batch = concat_samples(dataset_buffer.sample(128), replay_buffer.sample(128))
    ```

    :param first: batch of ``n`` rows
    :param second: batch of ``m`` rows of the same kind, on the same device
    :return: batch of ``n + m`` rows, of the same class
    :raises TypeError: if the two are of different classes
    :raises ValueError: if a field is ``None`` in one batch only, or if keys or shapes of a field differ
    """
    if type(first) is not type(second):
        raise TypeError(
            f"Both batches must be of one class: got {type(first).__name__} and {type(second).__name__}; "
            "sample them from buffers of the same kind over the same observation space."
        )
    names: tuple[str, ...] = first._fields  # type: ignore[attr-defined]
    return type(first)(*map(_concat_field, names, first, second))


def _concat_field(name: str, first: Any, second: Any) -> Any:
    """
    Join one field of two batches.

    :param name: of the field, for messages
    :param first: tensor, dict of tensors or ``None``
    :param second: same kind as ``first``
    :return: same kind as ``first``
    """
    if first is None and second is None:
        return None
    if first is None or second is None:
        hint = " Give both buffers the same `n_steps`." if name == "discounts" else ""
        raise ValueError(f"`{name}` must be given in both batches or in none: it is None in one of the two only.{hint}")
    if isinstance(first, dict):
        if first.keys() != second.keys():
            raise ValueError(f"`{name}` must have the same keys in both batches: got {sorted(first)} and {sorted(second)}.")
        return {key: _concat_field(f"{name}[{key!r}]", first[key], second[key]) for key in first}
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"`{name}` must have rows of the same shape in both batches: "
            f"got {tuple(first.shape[1:])} and {tuple(second.shape[1:])}."
        )
    if first.dtype != second.dtype and first.is_floating_point() and second.is_floating_point():
        first, second = first.float(), second.float()
    return th.cat((first, second))
