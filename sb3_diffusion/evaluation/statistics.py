"""
Averages of scores over runs and tasks, and how sure they are (arXiv 2108.13264).

Scores have the shape ``(n_runs, n_tasks)``, or ``(n_runs,)`` for one task. All intervals come from the stratified percentile
bootstrap: runs are drawn again with replacement within each task, never across tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

Scores = Sequence[float] | Sequence[Sequence[float]] | np.ndarray
Statistic = Literal["iqm", "mean", "median", "optimality_gap"]

N_RESAMPLES = 9_999
# Resamples of curves and of pairs of runs that are held in memory together.
_BATCH = 500


class Estimate(NamedTuple):
    """
    A number, or one number per threshold, with its interval.

    :ivar value: of the scores as they are
    :ivar low: lower end of the interval; NaN where fewer than two runs tell no spread
    :ivar high: upper end
    """

    value: Any
    low: Any
    high: Any


def interquartile_mean(scores: Scores) -> float:
    """
    Mean of the middle half of all scores: as robust as a median, and uses more of the data (arXiv 2108.13264, section 4.3).

    :param scores: of any shape, pooled
    :return: mean after a quarter of the scores, rounded down, is cut off at either end; with fewer than 4 the plain mean
    :raises ValueError: if there are no scores
    :raises ImportError: if scipy is not installed
    """
    pooled = np.asarray(scores, dtype=np.float64).ravel()
    if pooled.size == 0:
        raise ValueError("Expected at least one score, got none.")
    return float(_scipy_stats().trim_mean(pooled, 0.25))


def optimality_gap(scores: Scores, target: float = 100.0) -> float:
    """
    By how much the scores fall short of a target on average; what exceeds the target does not make up for other scores
    (arXiv 2108.13264, section 4.3).

    :param scores: of any shape, pooled
    :param target: score that counts as good enough; 100 is the expert of normalised scores
    :return: mean of ``target - min(score, target)``, at least 0; lower is better
    :raises ValueError: if there are no scores
    """
    pooled = np.asarray(scores, dtype=np.float64).ravel()
    if pooled.size == 0:
        raise ValueError("Expected at least one score, got none.")
    return float(_gap(pooled, target))


def bootstrap_interval(
    scores: Scores,
    *,
    statistic: Statistic = "iqm",
    level: float = 0.95,
    target: float = 100.0,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Stratified percentile bootstrap interval of an average over runs and tasks (arXiv 2108.13264, section 4.1).

    Runs are drawn again with replacement within each task, never across tasks; the statistic is taken over all scores of a
    resample together, the median too.

    :param scores: ``(n_runs,)`` for one task, or ``(n_runs, n_tasks)``
    :param statistic: ``"iqm"``, ``"mean"``, ``"median"`` or ``"optimality_gap"``
    :param level: coverage, between 0 and 1
    :param target: of the optimality gap
    :param seed: of the resampling; equal arguments give equal intervals
    :return: lower and upper end; both NaN with fewer than two runs, from which no spread can be told
    :raises ValueError: on another statistic, shape or level
    :raises ImportError: if scipy is not installed
    """
    estimated = estimate(scores, statistic=statistic, level=level, target=target, seed=seed)
    return estimated.low, estimated.high


def estimate(
    scores: Scores,
    *,
    statistic: Statistic = "iqm",
    level: float = 0.95,
    target: float = 100.0,
    seed: int = 0,
) -> Estimate:
    """
    An average over runs and tasks with the interval of
    [bootstrap_interval][sb3_diffusion.evaluation.bootstrap_interval].

    :param scores: ``(n_runs,)`` for one task, or ``(n_runs, n_tasks)``
    :param statistic: ``"iqm"``, ``"mean"``, ``"median"`` or ``"optimality_gap"``
    :param level: coverage, between 0 and 1
    :param target: of the optimality gap
    :param seed: of the resampling
    :return: value and interval
    :raises ValueError: on another statistic, shape or level
    :raises ImportError: if scipy is not installed
    """
    stats = _scipy_stats()
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "iqm": lambda pooled: stats.trim_mean(pooled, 0.25, axis=-1),
        "mean": lambda pooled: np.mean(pooled, axis=-1),
        "median": lambda pooled: np.median(pooled, axis=-1),
        "optimality_gap": lambda pooled: _gap(pooled, target),
    }
    tasks = _by_task(scores)
    if statistic not in functions:
        raise ValueError(f"`statistic` must be one of {sorted(functions)}: got {statistic!r}.")

    def pooled_statistic(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        return functions[statistic](np.concatenate(columns, axis=axis))

    value, low, high = _bootstrap(tasks, pooled_statistic, level, seed, None)
    return Estimate(float(value), float(low), float(high))


def performance_profile(
    scores: Scores, thresholds: Sequence[float] | np.ndarray, *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """
    Share of runs that score more than each threshold, averaged over tasks (arXiv 2108.13264, section 4.2).

    :param scores: ``(n_runs,)`` for one task, or ``(n_runs, n_tasks)``
    :param thresholds: ascending, shape ``(n_thresholds,)``
    :param level: coverage of the interval at each threshold by itself
    :param seed: of the resampling
    :return: three arrays of shape ``(n_thresholds,)``, in [0, 1]
    :raises ValueError: on another shape or level
    :raises ImportError: if scipy is not installed
    """
    limits = np.asarray(thresholds, dtype=np.float64)
    if limits.ndim != 1 or limits.size == 0:
        raise ValueError(f"`thresholds` must have shape (n_thresholds,), not empty: got {limits.shape}.")

    def share_above(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        pooled = np.sort(np.concatenate(columns, axis=axis), axis=axis)
        rows = pooled.reshape(-1, pooled.shape[-1])
        counts = np.stack([np.searchsorted(row, limits, side="right") for row in rows], axis=-1)
        return (1.0 - counts / pooled.shape[-1]).reshape(len(limits), *pooled.shape[:-1])

    return _bootstrap(_by_task(scores), share_above, level, seed, _BATCH)


def probability_of_improvement(first: Scores, second: Scores, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """
    Probability that a run of the first method scores more than one of the second on a task drawn at random; ties count
    half (arXiv 2108.13264, section 4.3). It is Mann and Whitney's U over the number of pairs, averaged over tasks, and says
    nothing of how much better.

    :param first: ``(n_runs,)`` for one task, or ``(n_runs, n_tasks)``
    :param second: of the same tasks; the number of runs may be another
    :param level: coverage of the interval
    :param seed: of the resampling
    :return: value and interval, in [0, 1]
    :raises ValueError: if the tasks do not agree, on another shape or level
    :raises ImportError: if scipy is not installed
    """
    firsts, seconds = _by_task(first), _by_task(second)
    if len(firsts) != len(seconds):
        raise ValueError(f"Both methods must have scores on the same tasks: got {len(firsts)} and {len(seconds)} tasks.")

    def share_of_wins(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        shares = []
        for ours, theirs in zip(columns[: len(firsts)], columns[len(firsts) :], strict=True):
            difference = ours[..., :, None] - theirs[..., None, :]
            shares.append(0.5 * (1.0 + np.sign(difference)).mean(axis=(-2, -1)))
        return np.mean(shares, axis=0)

    value, low, high = _bootstrap((*firsts, *seconds), share_of_wins, level, seed, _BATCH)
    return Estimate(float(value), float(low), float(high))


def _gap(scores: np.ndarray, target: float) -> np.ndarray:
    return target - np.minimum(scores, target).mean(axis=-1)


def _by_task(scores: Scores) -> tuple[np.ndarray, ...]:
    """:return: the scores of each task, ``(n_runs,)``"""
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim not in (1, 2) or table.size == 0:
        raise ValueError(f"Expected scores of shape (n_runs,) or (n_runs, n_tasks), not empty: got shape {table.shape}.")
    return tuple(table.reshape(len(table), -1).T)


def _bootstrap(
    tasks: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], level: float, seed: int, batch: int | None
) -> Estimate:
    """
    :param tasks: scores of each stratum, ``(n_runs,)``
    :param statistic: ``statistic(*tasks, axis)``; further axes of its result come first
    :param level: coverage
    :param seed: of the resampling
    :param batch: resamples that are held in memory together; None for all
    :return: value and interval, NaN where a stratum has fewer than two runs
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"`level` must be between 0 and 1: got {level}.")
    stats = _scipy_stats()
    value = statistic(*tasks, axis=-1)
    if min(map(len, tasks)) < 2:
        unknown = np.full(np.shape(value), np.nan)
        return Estimate(value, unknown, unknown)
    interval = stats.bootstrap(
        tasks,
        statistic,
        n_resamples=N_RESAMPLES,
        batch=batch,
        confidence_level=level,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, interval.low, interval.high)


def _scipy_stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "Interquartile means and bootstrap intervals need scipy: pip install 'sb3-diffusion[plots]'."
        ) from error
    return stats
