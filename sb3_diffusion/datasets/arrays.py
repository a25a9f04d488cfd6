"""Arrays with one row per step: shapes, flags, places for messages, and statistics a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Observations = np.ndarray | dict[str, np.ndarray]

# Rows looked at together, so that checks need no temporary of the size of the data.
CHUNK_ROWS = 65_536


def chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """
    Go through an array a part at a time.

    :param array: ``(N, ...)``
    :return: the first row of each part, and the part, a view of at most `CHUNK_ROWS` rows
    """
    for start in range(0, len(array), CHUNK_ROWS):
        yield start, array[start : start + CHUNK_ROWS]


def flatten_observations(observations: Any) -> Any:
    """
    Bring a (nested) dict of arrays to one level, keys joined by ``"."``.

    :param observations: an array, or a nested dict of arrays, or something that numpy makes an array of
    :return: an array, or a flat dict of arrays
    """
    if isinstance(observations, Mapping):
        return dict(leaves(observations, ""))
    if isinstance(observations, tuple):
        raise TypeError("Tuple observations are not supported: got a tuple of arrays; give a dict of arrays instead.")
    return np.asarray(observations)


def place_of(row: int, episode_ends: np.ndarray) -> str:
    """
    Name a row for people.

    :param row: index into the arrays
    :param episode_ends: rows of the last steps, ascending
    :return: such as "episode 3, step 17"
    """
    episode = int(np.searchsorted(episode_ends, row))
    return f"episode {episode}, step {row - (int(episode_ends[episode - 1]) + 1 if episode else 0)}"


def check_flags(array: np.ndarray, field: str, episode_ends: np.ndarray) -> None:
    """
    Refuse flags that are neither true nor false.

    :param array: as it came, ``(N,)``
    :param field: its name
    :param episode_ends: rows of the last steps, for the message
    :raises ValueError: if another value than 0 and 1 is in it
    """
    if array.dtype == bool:
        return
    bad = np.flatnonzero(~np.isin(array, (0, 1)))
    if len(bad):
        place = place_of(int(bad[0]), episode_ends)
        raise ValueError(f"`{field}` must hold 0 or 1 (or booleans): got {array[bad[0]]} at {place}.")


def leaves(observations: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """
    :param observations: array or nested mapping of arrays
    :param prefix: name so far
    :return: pairs of joined name and array
    """
    if isinstance(observations, Mapping):
        for key, value in observations.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, np.asarray(observations)


def take_rows(observations: Observations, rows: slice) -> Observations:
    """
    :param observations: array or dict of arrays
    :param rows: which rows
    :return: views of these rows
    """
    if isinstance(observations, dict):
        return {key: value[rows] for key, value in observations.items()}
    return observations[rows]


def delayed(observations: np.ndarray, steps: np.ndarray, age: int) -> np.ndarray:
    """
    :param observations: ``(N, *shape)``
    :param steps: ``(N,)`` number of the step within its episode
    :param age: how many steps to look back
    :return: at each row the observation ``age`` steps ago, zeros where the episode was not that old
    """
    past = observations[np.maximum(np.arange(len(observations)) - age, 0)]
    past[steps < age] = 0
    return past


def as_column(array: Any, field: str) -> np.ndarray:
    """
    :param array: ``(N,)`` or ``(N, 1)``
    :param field: its name
    :return: ``(N,)``
    :raises ValueError: if it has another shape
    """
    array = np.asarray(array)
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"`{field}` must have shape (N,) or (N, 1): got {array.shape}.")
    return array


def with_shape(array: np.ndarray, shape: tuple[int, ...], field: str) -> np.ndarray:
    """
    :param array: with the steps as first axis
    :param shape: of one row as the space has it
    :param field: its name
    :return: the array; a missing or superfluous axis of length 1 is put right
    """
    if array.shape[1:] == shape:
        return array
    if [n for n in array.shape[1:] if n != 1] == [n for n in shape if n != 1]:
        return array.reshape(len(array), *shape)
    raise ValueError(f"`{field}` must have shape (N, {', '.join(map(str, shape))}) for its space: got {array.shape}.")


def count_rows(fields: Mapping[str, Any]) -> int:
    """
    :param fields: arrays and dicts of arrays by name; what is None is passed over
    :return: the number of rows that all of them have
    :raises ValueError: if they have different numbers, or none
    """
    parts = [part for field, value in fields.items() if value is not None for part in leaves(value, field)]
    lengths = {name: len(array) if array.ndim else 0 for name, array in parts}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{field} {length}" for field, length in lengths.items())
        raise ValueError(
            f"All arrays must have one row per step: got lengths {listed}. Episodes with T actions and T + 1 observations "
            "must be split into `observations` (all but the last) and `next_observations` (all but the first)."
        )
    n_rows = next(iter(lengths.values()))
    if n_rows == 0:
        raise ValueError("The dataset is empty: expected at least one step; got arrays of length 0.")
    return n_rows


def count_bad_rows(array: np.ndarray) -> int:
    """
    :param array: numbers with the steps as first axis
    :return: number of rows with a NaN or infinity in float32
    """
    with np.errstate(over="ignore"):
        return sum(
            int((~np.isfinite(chunk.astype(np.float32, copy=False).reshape(len(chunk), -1)).all(axis=1)).sum())
            for _, chunk in chunks(array)
        )


def statistics(values: np.ndarray) -> dict[str, float]:
    """
    :param values: one number per episode or step
    :return: mean, std, min, quartiles, max
    """
    quartiles = np.quantile(values, [0.0, 0.25, 0.5, 0.75, 1.0])
    stats = dict(zip(("min", "q25", "median", "q75", "max"), map(float, quartiles), strict=True))
    return {"mean": float(np.mean(values, dtype=np.float64)), "std": float(np.std(values, dtype=np.float64)), **stats}


def column_moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean and variance over the rows, in two passes of a part at a time, so that data on the disk stays there.

    :param values: ``(N, ...)``
    :return: two arrays ``(...)``, float64
    """
    parts = [part for _, part in chunks(values)]
    mean = np.sum([part.sum(axis=0, dtype=np.float64) for part in parts], axis=0) / len(values)
    variance = np.sum([np.square(part - mean).sum(axis=0) for part in parts], axis=0) / len(values)
    return mean, variance
