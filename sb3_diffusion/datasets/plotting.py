"""Pictures of logged data."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_diffusion.plotting import BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from sb3_diffusion.datasets.offline_dataset import OfflineDataset

# Beyond this many action dimensions single bars cannot be read.
_MAX_DIMENSIONS = 32


def plot_dataset(dataset: OfflineDataset, path: str | PathLike[str]) -> Path:
    """
    Draw four panels: returns, lengths, rewards per step, and the range and saturation of each action dimension.

    :param dataset: what to draw
    :param path: file to write; the suffix decides the format, without one it becomes ``.png``
    :return: the path written
    :raises ImportError: without matplotlib
    """
    figure = new_figure(10, 6.5)
    axes = figure.subplots(2, 2)
    env = "" if dataset.env_spec is None else f" ({dataset.env_spec.id})"
    figure.suptitle(f"{dataset.name or 'dataset'}{env}: {dataset.n_episodes} episodes, {len(dataset)} steps")
    _draw_returns(axes[0, 0], dataset)
    _draw_lengths(axes[0, 1], dataset)
    _draw_histogram(axes[1, 0], dataset.rewards, BLUE)
    axes[1, 0].set(xlabel="reward per step", ylabel="steps", yscale="log", title="Rewards")
    _draw_actions(axes[1, 1], dataset)
    return save_figure(figure, path)


def _draw_histogram(axis: Any, values: np.ndarray, color: str) -> None:
    """
    :param axis: of matplotlib
    :param values: one number per episode or step
    :param color: of the bars
    """
    bins = 40 if len(np.unique(values)) > 1 else 1
    axis.hist(values, bins=bins, color=color, edgecolor="white", linewidth=0.4)


def _draw_returns(axis: Any, dataset: OfflineDataset) -> None:
    """
    :param axis: of matplotlib
    :param dataset: what to draw
    """
    returns = dataset.episode_returns
    _draw_histogram(axis, returns, BLUE)
    axis.axvline(returns.mean(), color=ORANGE, label=f"mean {returns.mean():.4g}")
    axis.set(xlabel="return", ylabel="episodes", title="Returns")
    axis.legend(frameon=False)
    if dataset.has_reference_scores:
        low, high = dataset.ref_min_score, dataset.ref_max_score
        assert low is not None and high is not None
        scores = axis.secondary_xaxis(
            "top", functions=(lambda x: 100 * (x - low) / (high - low), lambda x: low + x * (high - low) / 100)
        )
        scores.tick_params(colors=GREY, labelsize=8)
        scores.set_xlabel("normalized score (%)", color=GREY, fontsize=8)


def _draw_lengths(axis: Any, dataset: OfflineDataset) -> None:
    """
    :param axis: of matplotlib
    :param dataset: what to draw
    """
    lengths, terminated = dataset.episode_lengths, dataset.terminations[dataset.episode_ends]
    groups = [lengths[terminated], lengths[~terminated]]
    labels = [f"terminated ({len(groups[0])})", f"truncated ({len(groups[1])})"]
    bins = np.linspace(lengths.min() - 0.5, lengths.max() + 0.5, 2 + min(39, int(np.ptp(lengths))))
    axis.hist(groups, bins=bins, stacked=True, color=[BLUE, ORANGE], label=labels, edgecolor="white", linewidth=0.4)
    axis.set(xlabel="steps", ylabel="episodes", title="Lengths")
    axis.legend(frameon=False)


def _draw_actions(axis: Any, dataset: OfflineDataset) -> None:
    """
    :param axis: of matplotlib
    :param dataset: what to draw
    """
    flat = dataset.actions.reshape(len(dataset), -1)[:, :_MAX_DIMENSIONS]
    positions = np.arange(flat.shape[1])
    low, q05, q25, q50, q75, q95, high = np.quantile(flat, [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0], axis=0)
    axis.vlines(positions, low, high, color=GREY, linewidth=1, label="min to max")
    axis.bar(positions, q95 - q05, bottom=q05, width=0.5, color=BLUE, alpha=0.35, label="5 to 95 %")
    axis.bar(positions, q75 - q25, bottom=q25, width=0.5, color=BLUE, alpha=0.7, label="25 to 75 %")
    axis.hlines(q50, positions - 0.25, positions + 0.25, color="white")
    box_low, box_high = (
        bound.reshape(-1)[:_MAX_DIMENSIONS] for bound in (dataset.action_space.low, dataset.action_space.high)
    )
    for bound, label in ((box_low, "bounds"), (box_high, None)):
        if np.isfinite(bound).all():
            axis.hlines(bound, positions - 0.35, positions + 0.35, color=ORANGE, linewidth=1.2, label=label)
    saturation = dataset.summary()["action_saturation"]
    labels = [f"{i}\n{saturation[i]:.0%}" for i in positions] if len(positions) <= 12 else [str(i) for i in positions]
    axis.set_xticks(positions, labels, fontsize=8)
    axis.set(xlabel="action dimension, and share of steps at a bound", ylabel="action (env units)", title="Actions")
    axis.set_xlim(-0.6, len(positions) - 0.4)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top + 0.3 * (top - bottom))
    axis.legend(frameon=False, ncols=4, fontsize=8, loc="upper center")
