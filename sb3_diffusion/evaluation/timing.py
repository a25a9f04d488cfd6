"""Timing of things that are compared with each other in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch as th

KeyT = TypeVar("KeyT")


def median_milliseconds(
    parts: Mapping[KeyT, Callable[[], object]],
    n_repetitions: int = 60,
    n_warm_up: int = 5,
    device: th.device | str = "cpu",
) -> dict[KeyT, float]:
    """
    Time several things in turn, so that a machine that changes its speed changes all of them.

    :param parts: what to time, by name
    :param n_repetitions: of all of them, one after the other
    :param n_warm_up: repetitions before these, not counted
    :param device: waited for at the end of each if it is a GPU
    :return: median milliseconds of each
    """
    is_gpu = th.device(device).type == "cuda"
    seconds: dict[KeyT, list[float]] = {name: [] for name in parts}
    for repetition in range(n_repetitions + n_warm_up):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if is_gpu:
                th.cuda.synchronize(device)
            if repetition >= n_warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
