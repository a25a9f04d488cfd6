"""What ``sample()`` returns, and how batches are put together."""

from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples

SamplesT = TypeVar("SamplesT", bound=tuple)


Batch = ReplayBufferSamples | DictReplayBufferSamples
"""What a buffer's ``sample`` returns: the observations of the second are dicts."""


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
