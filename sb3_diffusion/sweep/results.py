"""What came out of a sweep: rows, tables, pictures."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_diffusion.evaluation import bootstrap_interval, interquartile_mean
from sb3_diffusion.plotting import color_of, new_figure, save_figure

RESULTS_FILE, TABLE_FILE, CURVES_FILE = "results.json", "results.csv", "curves.csv"
INCOMPLETE = ("failed", "unfinished")
"""Status of a trial whose last evaluation is not that of a whole run."""


@dataclass(frozen=True)
class SweepResults:
    """
    What a sweep measured. A score is the mean of an evaluation: of normalised scores in percent where the dataset has
    reference scores (``normalized``), else of returns.

    :param trials: a row for each trial: ``trial`` (name), ``algo``, ``dataset``, ``env``, ``seed``, ``params`` (dict),
        ``status`` (``"finished"``, ``"stopped early"``, ``"unfinished"`` or ``"failed"``), ``timesteps``, ``score`` (of the
        last evaluation), ``best_score`` with ``best_timesteps``, ``normalized``, ``return_mean``, ``return_std``,
        ``seconds``, ``restarts``, ``model`` (file of the last evaluation), ``best_model``, ``error``
    :param curves: a row for each evaluation: ``trial``, ``timesteps``, ``score``, ``return_mean``, ``return_std``, ``seconds``
    :param searched: whether the hyperparameters come from a search
    """

    trials: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    searched: bool = False

    @classmethod
    def load(cls, out: Path | str) -> SweepResults:
        """
        :param out: folder of a sweep that came to an end
        :return: its results
        """
        return cls(**json.loads((Path(out) / RESULTS_FILE).read_text(encoding="utf-8")))

    def save(self, out: Path | str) -> None:
        """
        Write tables and pictures, see [run_sweep][sb3_diffusion.sweep.run_sweep].

        :param out: folder
        """
        out = Path(out)
        (out / RESULTS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        flat = [
            {**row, **{f"params.{name}": value for name, value in row["params"].items()}, "params": None}
            for row in self.trials
        ]
        for file, rows in ((TABLE_FILE, flat), (CURVES_FILE, self.curves)):
            columns = list(dict.fromkeys(key for row in rows for key in row if key != "params"))
            with open(out / file, "w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        if self.curves:
            self.plot_curves(out / "curves.png")
        if self.searched:
            self.plot_hyperparameters(out / "hyperparameters.png")

    def summary(self) -> list[dict[str, Any]]:
        """
        Trials that differ by nothing but the seed, taken together; those that failed or are unfinished are left out.

        :return: rows with ``algo``, ``dataset``, ``params``, ``n`` (seeds), ``score`` (interquartile mean of the last
            evaluations), ``low`` and ``high`` (its 95 % bootstrap interval over seeds, None for one), ``best_score``
            (interquartile mean of the best evaluations), ``timesteps`` (least), ``normalized``; the highest score first
        """
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in self.trials:
            if row["score"] is not None and row["status"] not in INCOMPLETE:
                groups.setdefault(json.dumps([row["algo"], row["dataset"], row["params"]]), []).append(row)
        rows = []
        for members in groups.values():
            scores = [row["score"] for row in members]
            low, high = bootstrap_interval(scores)
            rows.append(
                {
                    **{key: members[0][key] for key in ("algo", "dataset", "params", "normalized")},
                    "n": len(members),
                    "score": interquartile_mean(scores),
                    "low": None if np.isnan(low) else low,
                    "high": None if np.isnan(high) else high,
                    "best_score": interquartile_mean([row["best_score"] for row in members]),
                    "timesteps": min(row["timesteps"] for row in members),
                }
            )
        return sorted(rows, key=lambda row: (str(row["dataset"]), -row["score"]))

    def print(self, n_best: int = 10) -> None:
        """
        Print the summary as a table for each dataset, and what failed.

        :param n_best: rows for each dataset and algorithm
        """
        from rich.console import Console
        from rich.table import Table

        console = Console()
        label = self._labels()
        tables: dict[str, Table] = {}
        shown: Counter[tuple[str, str]] = Counter()
        for row in self.summary():
            dataset = row["dataset"] or "online"
            shown[dataset, row["algo"]] += 1
            if shown[dataset, row["algo"]] > n_best:
                continue
            if dataset not in tables:
                unit = "normalised scores in percent" if row["normalized"] else "returns"
                tables[dataset] = Table(title=f"{dataset}: {unit}, 95 % intervals over seeds")
                tables[dataset].add_column("algorithm", no_wrap=True)
                tables[dataset].add_column("hyperparameters", overflow="fold")
                for column in ("seeds", "steps", "last", "interval", "best"):
                    tables[dataset].add_column(column, justify="right", no_wrap=True)
            interval = "" if row["low"] is None else f"{row['low']:.1f} to {row['high']:.1f}"
            numbers = (str(row["n"]), str(row["timesteps"]), f"{row['score']:.1f}", interval, f"{row['best_score']:.1f}")
            tables[dataset].add_row(row["algo"], label(row["params"]), *numbers)
        for table in tables.values():
            console.print(table)
        if any(count > n_best for count in shown.values()):
            console.print(f"The {n_best} best of each; all of them are in {TABLE_FILE}.")
        for row in self.trials:
            if row["status"] in INCOMPLETE:
                console.print(f"{row['status']}: {row['trial']} {row['error'] or ''}", highlight=False, markup=False)

    def _labels(self) -> Callable[[Mapping[str, Any]], str]:
        """A text for hyperparameters, of those that differ between trials."""
        values: dict[str, set[str]] = {}
        for row in self.trials:
            for name, value in row["params"].items():
                values.setdefault(name, set()).add(str(value))

        def label(params: Mapping[str, Any]) -> str:
            parts = {name: value for name, value in params.items() if len(values[name]) > 1}
            return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in parts.items())

        return label

    def plot_curves(self, path: Path | str) -> None:
        """
        Draw scores over timesteps, a panel for each dataset: means over seeds with the range of the seeds.

        :param path: picture to write; its suffix decides the format
        """
        label = self._labels()
        groups: dict[str | None, dict[str, list[str]]] = {}
        for row in self.trials:
            line = f"{row['algo']} {label(row['params'])}".strip()
            groups.setdefault(row["dataset"], {}).setdefault(line, []).append(row["trial"])
        figure, panels = _panels(len(groups))
        for axes, (dataset, lines) in zip(panels, groups.items(), strict=True):
            for index, (name, trials) in enumerate(lines.items()):
                by_step: dict[int, list[float]] = {}
                for point in self.curves:
                    if point["trial"] in trials:
                        by_step.setdefault(point["timesteps"], []).append(point["score"])
                steps = sorted(by_step)
                means, color = [np.mean(by_step[step]) for step in steps], color_of(index)
                axes.plot(steps, means, "o-", color=color, markersize=3, label=name)
                low, high = ([pick(by_step[step]) for step in steps] for pick in (min, max))
                axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.set_title(dataset or "online", fontsize="medium")
            axes.set(xlabel="timesteps", ylabel="score", xlim=(0, None))
            axes.grid(alpha=0.3)
            if len(lines) <= 12:
                axes.legend(fontsize="x-small")
        save_figure(figure, path)

    def plot_hyperparameters(self, path: Path | str) -> None:
        """
        Draw the last score over each searched hyperparameter, a row of panels for each algorithm.

        :param path: picture to write; its suffix decides the format
        """
        searched = {(row["algo"], name) for row in self.trials for name in row["params"]}
        figure, panels = _panels(len(searched))
        for axes, (algo, name) in zip(panels, sorted(searched), strict=True):
            for index, dataset in enumerate(dict.fromkeys(row["dataset"] for row in self.trials)):
                rows = [
                    row
                    for row in self.trials
                    if (row["algo"], row["dataset"]) == (algo, dataset) and name in row["params"] and row["score"] is not None
                ]
                values = [row["params"][name] for row in rows]
                numbers = all(isinstance(value, int | float) for value in values)
                shown = values if numbers else list(map(str, values))
                axes.plot(shown, [row["score"] for row in rows], "o", color=color_of(index), label=dataset)
                if numbers and min(values, default=0) > 0 and max(values, default=0) >= 20 * min(values, default=0):
                    axes.set_xscale("log")
            axes.set(xlabel=name, ylabel="score")
            axes.set_title(algo, fontsize="medium")
            axes.grid(alpha=0.3)
        save_figure(figure, path)


def _panels(n: int) -> tuple[Any, list[Any]]:
    """A figure and its panels."""
    n_columns = min(3, n)
    n_rows = math.ceil(n / n_columns)
    figure = new_figure(5 * n_columns, 3.5 * n_rows)
    panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for unused in panels[n:]:
        unused.set_visible(False)
    return figure, panels[:n]
