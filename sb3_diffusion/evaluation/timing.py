"""Timing of things that are compared with each other in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from torch.utils.flop_counter import FlopCounterMode

KeyT = TypeVar("KeyT")

UNIT_OPERATIONS = 2 * 1024**3
"""Floating-point operations of one 1024 x 1024 by 1024 x 1024 product, the unit of speed."""


class Timing(NamedTuple):
    """
    What something costs.

    :ivar milliseconds: median
    :ivar ratio: median of the ratios to the reference that ran just before
    """

    milliseconds: float
    ratio: float


def _seconds(part: Callable[[], object], device: th.device | str, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    part()
    if th.device(device).type == "cuda":
        th.cuda.synchronize(device)
    return clock() - start


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
    seconds: dict[KeyT, list[float]] = {name: [] for name in parts}
    for _ in range(n_repetitions + n_warm_up):
        for name, part in parts.items():
            seconds[name].append(_seconds(part, device))
    return {name: 1e3 * float(np.median(values[n_warm_up:])) for name, values in seconds.items()}


def paired_timing(
    part: Callable[[], object],
    reference: Callable[[], object],
    n_repetitions: int = 30,
    n_warm_up: int = 3,
    device: th.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """
    Time something in units of a reference that runs just before it each time: other work on the machine slows both.

    Where other processes take turns on the same core, what is short runs within one turn and what is long waits for the
    others: with one thread, ``time.process_time`` does not count that.

    :param part: what to time
    :param reference: the unit
    :param n_repetitions: of both
    :param n_warm_up: repetitions before these, not counted
    :param device: waited for at the end of each if it is a GPU
    :param clock: tells seconds
    :return: medians
    """
    pairs = [(_seconds(reference, device, clock), _seconds(part, device, clock)) for _ in range(n_repetitions + n_warm_up)][
        n_warm_up:
    ]
    return Timing(1e3 * float(np.median([s for _, s in pairs])), float(np.median([s / unit for unit, s in pairs])))


def count_operations(part: Callable[[], object]) -> int:
    """
    Floating-point operations of the matrix products and convolutions in one run, from their sizes, as
    ``torch.utils.flop_counter`` counts them; products that are added in place are counted too.

    :param part: what to run, not compiled
    :return: a multiplication and an addition are two
    """
    with FlopCounterMode(display=False, custom_mapping={th.ops.aten.addmm_: _added_product}) as counter:
        part()
    return counter.get_total_flops()


def _added_product(added: Any, left: tuple[int, int], right: tuple[int, int], **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]
