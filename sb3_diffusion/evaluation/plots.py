"""Pictures of runs: learning curves, comparisons of methods, performance profiles. Intervals are those of ``statistics``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sb3_diffusion.evaluation.statistics import (
    Scores,
    Statistic,
    bootstrap_interval,
    estimate,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from sb3_diffusion.plotting import GREY, color_of, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES: dict[Statistic, str] = {
    "iqm": "interquartile mean",
    "mean": "mean",
    "median": "median",
    "optimality_gap": "optimality gap (less is better)",
}


class Curve(NamedTuple):
    """
    Scores of the runs of one method on the way.

    :ivar timesteps: of the evaluations, ``(n_evaluations,)``
    :ivar scores: of each run at each of them, ``(n_runs, n_evaluations)``
    """

    timesteps: np.ndarray
    scores: np.ndarray


def plot_learning_curves(
    curves: Mapping[str, Curve],
    *,
    title: str = "",
    unit: str = "score",
    references: Mapping[str, float] | None = None,
) -> Figure:
    """
    Interquartile means over runs with 95 % bootstrap bands; thin lines are single runs.

    :param curves: by name of the method
    :param title: of the picture
    :param unit: of the scores
    :param references: horizontal lines, such as the mean of the data, by name
    :return: figure, for [save_figure][sb3_diffusion.plotting.save_figure]
    :raises ImportError: without matplotlib or scipy
    """
    figure = new_figure(7.5, 4.2 + 0.1 * len(curves))
    axes = figure.subplots()
    for index, (name, (timesteps, scores)) in enumerate(curves.items()):
        color, scores = color_of(index), np.asarray(scores, dtype=np.float64)
        means = [interquartile_mean(column) for column in scores.T]
        axes.plot(timesteps, means, "o-", color=color, markersize=3, label=f"{name} ({len(scores)})")
        if len(scores) > 1:
            axes.plot(timesteps, scores.T, color=color, alpha=0.25, linewidth=0.7)
            low, high = np.array([bootstrap_interval(column) for column in scores.T]).T
            axes.fill_between(timesteps, low, high, color=color, alpha=0.15, linewidth=0)
    for style, (name, value) in zip(("--", ":", "-."), (references or {}).items(), strict=False):
        axes.axhline(value, color=GREY, linestyle=style, linewidth=1, label=name)
    axes.set(xlabel="timesteps", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def plot_comparison(
    scores: Mapping[str, Scores],
    *,
    statistics: Sequence[Statistic] = ("iqm", "mean", "median", "optimality_gap"),
    title: str = "",
    unit: str = "score",
    target: float = 100.0,
) -> Figure:
    """
    One panel per average: values as bars, 95 % bootstrap intervals as lines.

    :param scores: ``(n_runs,)`` or ``(n_runs, n_tasks)`` by name of the method
    :param statistics: averages to show
    :param title: of the picture
    :param unit: of the scores
    :param target: of the optimality gap
    :return: figure
    :raises ImportError: without matplotlib or scipy
    """
    figure = new_figure(3.0 * len(statistics) + 1.5, 0.45 * len(scores) + 1.4)
    panels = figure.subplots(1, len(statistics), sharey=True, squeeze=False)[0]
    figure.suptitle(title)
    positions = np.arange(len(scores))[::-1]
    for axes, statistic in zip(panels, statistics, strict=True):
        for index, (position, values) in enumerate(zip(positions, scores.values(), strict=True)):
            value, low, high = estimate(values, statistic=statistic, target=target)
            axes.barh(position, value, height=0.6, color=color_of(index), alpha=0.45)
            axes.hlines(position, low, high, color=color_of(index), linewidth=2.5)
        axes.set(title=TITLES[statistic], xlabel=unit)
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(positions, list(scores))
    return figure


def plot_performance_profiles(
    scores: Mapping[str, Scores],
    *,
    thresholds: Sequence[float] | np.ndarray | None = None,
    title: str = "",
    unit: str = "score",
) -> Figure:
    """
    Share of runs above each score, with pointwise 95 % bootstrap bands: the higher curve is the better one.

    :param scores: ``(n_runs,)`` or ``(n_runs, n_tasks)`` by name of the method
    :param thresholds: ascending; None: 101 of them over the range of all scores
    :param title: of the picture
    :param unit: of the scores
    :return: figure
    :raises ImportError: without matplotlib or scipy
    """
    if thresholds is None:
        every = np.concatenate([np.ravel(np.asarray(values, dtype=np.float64)) for values in scores.values()])
        thresholds = np.linspace(every.min() - 0.02 * np.ptp(every), every.max() + 0.02 * np.ptp(every), 101)
    figure = new_figure(7.5, 3.8 + 0.1 * len(scores))
    axes = figure.subplots()
    for index, (name, values) in enumerate(scores.items()):
        share, low, high = performance_profile(values, thresholds)
        axes.plot(thresholds, share, color=color_of(index), label=name)
        axes.fill_between(thresholds, low, high, color=color_of(index), alpha=0.15, linewidth=0)
    axes.set(xlabel=f"{unit} $\\tau$", ylabel="share of runs above $\\tau$", title=title, ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def plot_improvement(scores: Mapping[str, Scores], *, title: str = "") -> Figure:
    """
    Probability of improvement of each method over each later one, with 95 % bootstrap intervals.

    :param scores: ``(n_runs,)`` or ``(n_runs, n_tasks)`` by name of the method, at least two methods
    :param title: of the picture
    :return: figure
    :raises ValueError: with fewer than two methods
    :raises ImportError: without matplotlib or scipy
    """
    if len(scores) < 2:
        raise ValueError(f"A probability of improvement needs at least two methods: got {list(scores)}.")
    names = list(scores)
    pairs = [(first, second) for i, first in enumerate(names) for second in names[i + 1 :]]
    figure = new_figure(7.5, 0.5 * len(pairs) + 1.4)
    axes: Any = figure.subplots()
    for position, (first, second) in enumerate(pairs):
        value, low, high = probability_of_improvement(scores[first], scores[second])
        axes.hlines(-position, low, high, color=color_of(names.index(first)), linewidth=2.5)
        axes.plot(value, -position, "o", color=color_of(names.index(first)))
    axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks([-i for i in range(len(pairs))], [f"{first}\n> {second}" for first, second in pairs], fontsize="small")
    axes.set(xlabel="probability of improvement", xlim=(-0.03, 1.03), ylim=(-len(pairs) + 0.4, 0.6), title=title)
    axes.grid(alpha=0.3, axis="x")
    return figure
