"""
Make ``docs/benchmarks.md`` and its pictures from ``benchmarks/results/*.json``.

    python benchmarks/make_tables.py

The same results give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sb3_diffusion.evaluation import bootstrap_interval, estimate, interquartile_mean
from sb3_diffusion.evaluation.plots import plot_learning_curves, plot_performance_profiles
from sb3_diffusion.evaluation.report import format_number as number
from sb3_diffusion.evaluation.results import behavior_score, curve, is_normalized
from sb3_diffusion.evaluation.results import episode_scores as scores
from sb3_diffusion.plotting import hide_edges

ROOT = Path(__file__).resolve().parent.parent

HEAD = """# Benchmarks

<!-- Made by benchmarks/make_tables.py from benchmarks/results/*.json: do not edit. -->

How to read the tables. A *score* is the mean over the episodes of one evaluation of one run: in percent between a random
policy (0) and an expert (100) where reference scores are known, else the return. **Last** is the score at the end of
training, **best** the highest of a run's evaluations, which is chosen with the knowledge of the outcome and therefore
flatters. Both are interquartile means over runs (seeds) with a 95 % stratified bootstrap interval in brackets; with fewer
than four runs the interquartile mean is the plain mean, with one run there is no interval. *All episodes* is the
interquartile mean of the single episodes of the last evaluation, all runs together. *Steps / s* counts training alone,
*time* evaluations too, *actions / s* one observation at a time; all are means over runs. Make the page again with `make
tables`.

The datasets `bench/...`, and `hopper_medium_expert-v2` in D4RL's layout, were recorded for these benchmarks by public
policies in Gymnasium's v5 environments. They are not the sets of similar names of Farama or D4RL, and not on Minari's
server: without them the commands stop, and on other data the numbers will differ. *Command*s name scripts as they were
called at that commit; `-dirty` after a commit says that tracked files were changed, as a table is that grows.
"""
GROUPS: dict[str, tuple[str, ...]] = {
    "All methods on the same data": ("comparison_",),
    "DTQL and DiffusionQL": (
        "hopper_medium",
        "pointmaze_",
        "pendulum",
        "fine_tune",
        "toy_",
        "bandit",
        "samplers",
        "candidates",
    ),
    "Diffuser": ("diffuser_", "walker2d_", "planning_", "agent_over_"),
    "BellmanDiffusion": ("bellman_",),
    "DiffSR": ("diffsr_",),
    "Speed": ("speed_",),
    "Data": ("data", "window_"),
    "What can go wrong": ("faults", "fuzz", "soak"),
}
"""Parts of the page, and how the names of their result files begin; they stand there in this order."""
OTHERS = "Others"


def main() -> int:
    """:return: exit status"""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    contents: dict[str, dict[str, Any]] = {}
    for path in sorted(options.results.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["kind"] not in RENDERERS:
                raise ValueError(f"its kind is {content['kind']!r}")
            contents[path.stem] = content
        except (json.JSONDecodeError, ValueError, KeyError, TypeError) as error:
            print(f"skipped {path.name}: not a result file that this script knows ({error!r})", file=sys.stderr)
    compared = [content for stem, content in contents.items() if stem.startswith("comparison_")]
    groups: dict[str, list[str]] = {group: [] for group in (*GROUPS, OTHERS)}
    groups[next(iter(GROUPS))] += profiles_section(compared, options.docs)
    for stem in sorted(contents, key=place_on_page):
        groups[group_of(stem)].append(RENDERERS[contents[stem]["kind"]](stem, contents[stem], options.docs))
    sections = [HEAD]
    for group, members in groups.items():
        sections += [f"## {group}\n", *members] if members else []
    page = options.docs / "benchmarks.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(sections), encoding="utf-8")
    print(page)
    return 0


def place_on_page(stem: str) -> tuple[int, str]:
    """
    :param stem: name of a result file
    :return: what sections of one group are ordered by
    """
    prefixes = GROUPS.get(group_of(stem), ())
    return next((i for i, prefix in enumerate(prefixes) if stem.startswith(prefix)), 0), stem


def group_of(stem: str) -> str:
    """
    :param stem: name of a result file
    :return: key of ``GROUPS``, or ``OTHERS``
    """
    return next((group for group, prefixes in GROUPS.items() if stem.startswith(prefixes)), OTHERS)


def headline(title: str, anchor: str) -> str:
    """
    :param title: of a section
    :param anchor: to link to
    :return: Markdown
    """
    return f"### {title} {{ #{anchor} }}"


def runs_section(stem: str, content: dict[str, Any], docs: Path) -> str:
    """
    Table and learning curves of finished runs.

    :param stem: name of the result file
    :param content: of the result file
    :param docs: folder of the documentation
    :return: Markdown
    """
    groups = runs_by_name(content)
    lines = [headline(content["title"], stem), ""]
    if content.get("text"):
        lines += [content["text"], ""]
    if not groups:
        return "\n".join([*lines, "No run has finished yet.", ""])
    rows = []
    for name, runs in groups.items():
        last = [scores(run)[-1].mean() for run in runs]
        best = [max(evaluation.mean() for evaluation in scores(run)) for run in runs]
        episodes = np.concatenate([scores(run)[-1] for run in runs])
        speeds = [run["actions_per_second"] for run in runs if "actions_per_second" in run]
        behavior = runs[0]["behavior"]
        rows.append(
            [
                name,
                str(len(runs)),
                f"{runs[0]['total_timesteps']:,}",
                "" if behavior is None else number(behavior_score(runs[0], "mean")),
                with_interval(last),
                with_interval(best),
                number(interquartile_mean(episodes)),
                f"{np.mean([run['timesteps_per_second'] for run in runs]):.0f}",
                f"{np.mean(speeds):.0f}" if speeds else "",
                f"{np.mean([run['wall_seconds'] for run in runs]) / 60:.1f} min",
            ]
        )
    heads = ["", "seeds", "timesteps", "behaviour", "last", "best", "all episodes", "steps / s", "actions / s", "time"]
    lines += markdown_table(heads, rows)
    picture = f"assets/{stem}.svg"
    draw_curves(docs / picture, groups, content["title"])
    lines += ["", f"![Learning curves: {content['title']}]({picture})", ""]
    every = [run for runs in groups.values() for run in runs]
    lines.append(caption(every, several_seeds=any(len(runs) > 1 for runs in groups.values())))
    lines += ["", *provenance([run["environment"] for run in every], [c for run in every for c in run["commands"]]), ""]
    return "\n".join(lines)


def caption(runs: list[dict[str, Any]], several_seeds: bool) -> str:
    """
    :param runs: that are drawn
    :param several_seeds: of at least one setting
    :return: what the picture of their curves shows
    """

    def counts(name: str) -> str:
        return " or ".join(str(count) for count in sorted({run[name] for run in runs}))

    parts = [f"{counts('n_eval_episodes')} episodes at each of {counts('n_evaluations')} evaluations."]
    if several_seeds:
        parts.append("Lines are interquartile means over seeds with 95 % bootstrap bands, thin lines single seeds.")
    if any(run["behavior"] for run in runs):
        parts.append("The dashed line is the behaviour that made the data.")
    return " ".join(parts)


def runs_by_name(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """
    :param content: of a result file of runs
    :return: its runs by name of the setting
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in content["runs"].values():
        groups[run["name"]].append(run)
    return groups


def profiles_section(contents: list[dict[str, Any]], docs: Path) -> list[str]:
    """
    What the methods reach over all compared tasks whose scores are normalised.

    :param contents: of the result files, one per task
    :param docs: folder of the documentation
    :return: Markdown; nothing where fewer than two methods have two runs in each of two tasks
    """
    tasks = [
        runs_by_name(content) for content in contents if content["runs"] and all(map(is_normalized, content["runs"].values()))
    ]
    tasks = whole_tables(tasks)
    if len(tasks) < 2:
        return []
    methods: dict[str, np.ndarray] = {}
    for name in sorted(set.intersection(*map(repeated, tasks))):
        n_runs = min(len(groups[name]) for groups in tasks)
        methods[name] = np.array([[scores(run)[-1].mean() for run in groups[name][:n_runs]] for groups in tasks]).T
    if len(methods) < 2:
        return []
    title, picture = "All methods over the tasks", "assets/comparison_profiles.svg"
    names = ", ".join(groups[next(iter(methods))][0]["behavior"]["dataset"] for groups in tasks)
    with_fixed_ids(
        lambda: plot_performance_profiles(methods, title=title, unit="normalised score (percent)"), docs / picture, title
    )
    rows = []
    for name, values in sorted(methods.items(), key=lambda item: -interquartile_mean(item[1])):
        cells = [estimate(values, statistic=statistic) for statistic in ("iqm", "mean", "median", "optimality_gap")]
        rows.append([name, str(len(values)), *(f"{number(e.value)} [{number(e.low)}, {number(e.high)}]" for e in cells)])
    return [
        "\n".join(
            [
                headline(title, "comparison"),
                "",
                f"{names}: last scores of the runs in the sections below, of methods with two runs or more on each task, as "
                "many seeds of each as all tasks have; a task whose table lacks a method is left out. Brackets are 95 % "
                "bootstrap intervals, stratified by task. The optimality gap is what is missing to 100 on average.",
                "",
                *markdown_table(["", "seeds", "interquartile mean", "mean", "median", "optimality gap"], rows),
                "",
                f"![Performance profiles]({picture})",
                "",
                "Share of the runs that score more than $\\tau$, with pointwise 95 % bootstrap bands: the higher curve is the "
                "better one.",
                "",
            ]
        )
    ]


def repeated(groups: dict[str, list[dict[str, Any]]]) -> set[str]:
    """
    :param groups: runs of a task by name of the method
    :return: methods with two runs or more
    """
    return {name for name, runs in groups.items() if len(runs) > 1}


def whole_tables(tasks: list[dict[str, list[dict[str, Any]]]]) -> list[dict[str, list[dict[str, Any]]]]:
    """
    :param tasks: runs of each task by name of the method
    :return: tasks that have every method that all the others have, twice or more: one whose table still grows is left out,
        rather than the methods that it lacks. A second setting of a method ("DTQL, ...") does not count as one
    """
    if len(tasks) < 3:
        return tasks
    methods = [{name for name in repeated(groups) if ", " not in name} for groups in tasks]
    elsewhere = [set.intersection(*methods[:i], *methods[i + 1 :]) for i in range(len(tasks))]
    return [groups for groups, has, needed in zip(tasks, methods, elsewhere, strict=True) if needed <= has]


def table_section(stem: str, content: dict[str, Any], docs: Path) -> str:
    """
    A table as it was measured, and pictures.

    :param stem: name of the result file
    :param content: of the result file
    :param docs: folder of the documentation
    :return: Markdown
    """
    lines = [headline(content["title"], stem), ""]
    if content.get("text"):
        lines += [content["text"], ""]
    if content["rows"]:
        rows = [
            ["" if value is None else number(value) if isinstance(value, float) else str(value) for value in row]
            for row in content["rows"]
        ]
        lines += [*markdown_table(content["columns"], rows), ""]
    for picture in content["pictures"]:
        if not (docs / picture["path"]).is_file():
            print(f"{stem}: the picture docs/{picture['path']} is not there", file=sys.stderr)
            continue
        lines += [f"![{picture['caption']}]({picture['path']})", "", picture["caption"], ""]
    return "\n".join([*lines, *provenance([content["environment"]], [content["environment"]["command"]]), ""])


def with_interval(values: list[float]) -> str:
    """
    :param values: one score per run
    :return: interquartile mean, and its interval if there is one
    """
    average = number(interquartile_mean(values))
    if len(values) < 2:
        return average
    low, high = bootstrap_interval(values)
    return f"{average} [{number(low)}, {number(high)}]"


def markdown_table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """
    :param heads: of the columns
    :param rows: of text
    :return: lines of Markdown
    """
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def provenance(environments: list[dict[str, Any]], commands: list[str]) -> list[str]:
    """
    :param environments: of all runs of a section
    :param commands: that made them
    :return: lines of Markdown: hardware, versions, commits and commands, each named once
    """
    hardware, versions, commits = set(), set(), set()
    for where in environments:
        device = "" if where["device"] == "cpu" else f", {where['device']}"
        threads = f"{where['torch_threads']} thread{'s' if where['torch_threads'] > 1 else ''}"
        hardware.add(f"{where['processor']}, {where['cpu_count']} logical cores, {threads}{device}")
        libraries = ", ".join(f"{name} {version}" for name, version in where["libraries"].items())
        versions.add(f"Python {where['python']}, {libraries}")
        commits.add(where["commit"] or "none")
    shown = "; ".join(f"`{command}`" for command in sorted(set(commands)))
    return [
        '??? note "Where these numbers come from"',
        "",
        f"    - hardware: {'; '.join(sorted(hardware))}",
        f"    - software: {'; '.join(sorted(versions))}",
        f"    - commit: {', '.join(f'`{commit}`' for commit in sorted(commits))}",
        f"    - command: {shown}",
    ]


def draw_curves(path: Path, groups: dict[str, list[dict[str, Any]]], title: str) -> None:
    """
    :param path: picture to write
    :param groups: runs by name
    :param title: of the picture
    """
    first = next(iter(groups.values()))[0]
    behaviors = sorted({behavior_score(run, "mean") for runs in groups.values() for run in runs if run["behavior"]})
    with_fixed_ids(
        lambda: plot_learning_curves(
            {name: curve(runs) for name, runs in groups.items()},
            title=title,
            unit="normalised score (percent)" if is_normalized(first) else "return",
            references={f"behaviour, {number(value)}": value for value in behaviors},
        ),
        path,
        title,
    )


def with_fixed_ids(draw: Callable[[], Figure], path: Path, salt: str) -> None:
    """
    Write a picture whose bytes depend on what it shows alone.

    :param draw: makes the figure
    :param path: picture to write
    :param salt: of the ids in it
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure = draw()
        hide_edges(figure)
        figure.savefig(path, metadata={"Date": None})


RENDERERS: dict[str, Callable[[str, dict[str, Any], Path], str]] = {"runs": runs_section, "table": table_section}
"""By the kind of a result file."""


if __name__ == "__main__":
    sys.exit(main())
