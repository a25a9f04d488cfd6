"""A benchmark as one page of HTML that needs nothing beside itself: tables, pictures, and where the numbers come from."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_diffusion.evaluation.plots import (
    plot_comparison,
    plot_improvement,
    plot_learning_curves,
    plot_performance_profiles,
)
from sb3_diffusion.evaluation.results import behavior_score, curve, episode_scores, read_runs, summarize
from sb3_diffusion.plotting import hide_edges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } figure { margin: 1.2rem 0; } figcaption, .note { color: #555; font-size: .9rem; }
code { background: #f4f4f4; padding: .1rem .3rem; overflow-wrap: anywhere; } .wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if text %}<p>{{ text }}</p>{% endif %}
<h2>Scores</h2>
<p class="note">{{ unit|capitalize }}. <b>Last</b> is the score at the end of training, <b>best</b> the highest of a run's
evaluations, which is chosen with the knowledge of the outcome and therefore flatters. Interquartile means over runs with 95 %
stratified bootstrap intervals; with fewer than four runs they are plain means, with one run there is no interval.</p>
<div class="wide"><table id="scores">
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for caption, picture in pictures %}<figure>
<img alt="{{ caption }}" src="{{ picture }}">
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
<h2>Runs</h2>
<div class="wide"><table id="runs">
<tr><th>run</th><th>seed</th><th>last</th><th>best</th><th>episodes of the last evaluation</th><th>training</th></tr>
{% for row in runs %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<h2>Where these numbers come from</h2>
<ul>
{% for line in protocol %}<li>{{ line }}</li>
{% endfor %}{% for command in commands %}<li><code>{{ command }}</code></li>
{% endfor %}</ul>
</body>
</html>
"""


def write_report(result_file: Path, path: Path) -> Path:
    """
    Write the page of a result file.

    :param result_file: JSON file that [run][sb3_diffusion.evaluation.protocol.run] or ``sb3-diffusion benchmark`` wrote
    :param path: HTML file to write
    :return: the path written
    :raises ValueError: if the result file holds no finished runs
    :raises ImportError: without matplotlib, scipy or jinja2
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError("Reports need the package jinja2: pip install 'sb3-diffusion[plots]'.") from error
    groups = read_runs(result_file)
    content = json.loads(Path(result_file).read_text(encoding="utf-8"))
    records = [record for group in groups.values() for record in group]
    summaries = {name: summarize(group) for name, group in groups.items()}
    page = (
        Environment(autoescape=True)
        .from_string(_TEMPLATE)
        .render(
            title=content.get("title") or Path(result_file).stem,
            text=content.get("text", ""),
            unit=next(iter(summaries.values()))["unit"],
            heads=["", "seeds", "timesteps", "behaviour", "last", "best", "steps / s", "time"],
            rows=[_row(name, summary, groups[name][0]) for name, summary in summaries.items()],
            pictures=_pictures(groups, summaries),
            runs=[_run_row(record) for record in records],
            protocol=_provenance(records),
            commands=sorted({command for record in records for command in record["commands"]}),
        )
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def format_number(value: float) -> str:
    """
    :param value: any number
    :return: four significant digits, but no more than one decimal from 10 on
    """
    if 10 <= abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return f"{value:.4g}"


def format_estimate(estimate: dict[str, float | None]) -> str:
    """
    :param estimate: of [summarize][sb3_diffusion.evaluation.results.summarize]
    :return: the value, and its interval if there is one
    """
    value, low, high = (None if number is None else format_number(number) for number in estimate.values())
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def _row(name: str, summary: dict[str, Any], record: dict[str, Any]) -> list[str]:
    return [
        name,
        str(len(summary["seeds"])),
        f"{summary['total_timesteps']:,}",
        "" if record["behavior"] is None else format_number(behavior_score(record, "mean")),
        format_estimate(summary["last"]["iqm"]),
        format_estimate(summary["best"]["iqm"]),
        f"{summary['timesteps_per_second']:.0f}",
        f"{summary['wall_seconds'] / 60:.1f} min",
    ]


def _run_row(record: dict[str, Any]) -> list[str]:
    scores = episode_scores(record)
    means = [values.mean() for values in scores]
    last = scores[-1]
    return [
        record["name"],
        str(record["seed"]),
        format_number(means[-1]),
        format_number(max(means)),
        f"{format_number(last.min())} to {format_number(last.max())}",
        f"{record['train_seconds'] / 60:.1f} min",
    ]


def _pictures(groups: dict[str, list[dict[str, Any]]], summaries: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """:return: pairs of a caption and the picture as a data URI"""
    unit = next(iter(summaries.values()))["unit"]
    behavior = next((record for group in groups.values() for record in group if record["behavior"]), None)
    references = {} if behavior is None else {"behaviour, mean of the data": behavior_score(behavior, "mean")}
    curves = {name: curve(group) for name, group in groups.items()}
    figures = {
        "Learning curves: interquartile means over seeds with 95 % intervals, thin lines are single seeds.": (
            plot_learning_curves(curves, unit=unit, references=references)
        )
    }
    last = {name: summary["last"]["scores"] for name, summary in summaries.items()}
    if len(last) > 1:
        normalized = all("optimality_gap" in summary["last"] for summary in summaries.values())
        averages: Any = ("iqm", "mean", "median", *(("optimality_gap",) if normalized else ()))
        figures |= {
            "Averages over seeds at the end of training.": plot_comparison(last, statistics=averages, unit=unit),
            "Performance profile at the end of training.": plot_performance_profiles(last, unit=unit),
            "Probability that a run of one method scores more than one of the other, at the end of training.": (
                plot_improvement(last)
            ),
        }
    return [(caption, _data_uri(figure)) for caption, figure in figures.items()]


def _data_uri(figure: Figure) -> str:
    hide_edges(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _provenance(records: list[dict[str, Any]]) -> list[str]:
    lines = {
        f"{record['n_evaluations']} evaluations of {record['n_eval_episodes']} episodes each, at equal distances"
        for record in records
    }
    hardware, versions = set(), set()
    for where in (record["environment"] for record in records):
        device = "" if where["device"] == "cpu" else f", {where['device']}"
        hardware.add(
            f"{where['processor']}, {where['cpu_count']} logical cores, {where['torch_threads']} torch threads{device}"
        )
        libraries = ", ".join(f"{name} {version}" for name, version in where["libraries"].items())
        commit = "" if where["commit"] is None else f", commit {where['commit']}"
        versions.add(f"Python {where['python']}, {libraries}{commit}")
    return [*sorted(lines), *sorted(hardware), *sorted(versions)]
