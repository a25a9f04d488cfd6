"""What the records of [runs][sb3_diffusion.evaluation.protocol.run] tell: scores, curves, averages."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from sb3_diffusion.evaluation.plots import Curve
from sb3_diffusion.evaluation.statistics import Estimate, Statistic, estimate


def read_runs(result_file: Path) -> dict[str, list[dict[str, Any]]]:
    """
    :param result_file: JSON file that [run][sb3_diffusion.evaluation.protocol.run] wrote
    :return: records of the finished runs by name of the setting, ordered by seed
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it holds no finished runs
    """
    content = json.loads(Path(result_file).read_text(encoding="utf-8"))
    runs = content.get("runs") if isinstance(content, dict) else None
    if not runs:
        raise ValueError(f"{result_file} holds no finished runs: expected the JSON that `sb3-diffusion benchmark` writes.")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in runs.values():
        groups[record["name"]].append(record)
    return {name: sorted(records, key=lambda record: record["seed"]) for name, records in groups.items()}


def is_normalized(record: dict[str, Any]) -> bool:
    """
    :param record: of a run
    :return: whether its scores are percentages
    """
    return all(evaluation["normalized_scores"] is not None for evaluation in record["evaluations"])


def episode_scores(record: dict[str, Any]) -> list[np.ndarray]:
    """
    :param record: of a run
    :return: per evaluation the scores of its episodes, ``(n_eval_episodes,)``, normalised if all are
    """
    key = "normalized_scores" if is_normalized(record) else "returns"
    return [np.asarray(evaluation[key], dtype=np.float64) for evaluation in record["evaluations"]]


def behavior_score(record: dict[str, Any], which: str) -> float:
    """
    :param record: of a run with a behaviour
    :param which: ``"mean"`` or ``"best"`` episode of the data
    :return: in the units of [episode_scores][sb3_diffusion.evaluation.results.episode_scores]
    """
    normalized = record["behavior"][f"normalized_{which}"]
    return record["behavior"][which] if normalized is None or not is_normalized(record) else normalized


def curve(records: list[dict[str, Any]]) -> Curve:
    """
    :param records: of the runs of one setting
    :return: mean score of each evaluation of each run
    :raises ValueError: if the runs were not evaluated at the same timesteps
    """
    timesteps = [[evaluation["timestep"] for evaluation in record["evaluations"]] for record in records]
    if any(row != timesteps[0] for row in timesteps):
        raise ValueError(f"The runs of {records[0]['name']!r} were evaluated at different timesteps and have no common curve.")
    scores = np.array([[scores.mean() for scores in episode_scores(record)] for record in records])
    return Curve(np.array(timesteps[0]), scores)


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Averages over the runs of one setting.

    :param records: of its runs
    :return: ready for JSON: ``seeds``, ``unit``, and for ``last`` and ``best`` evaluation of each run the ``scores`` and each
        average with its 95 % interval; the best one is chosen with knowledge of the outcome and flatters
    """
    scores = curve(records).scores
    normalized = all(map(is_normalized, records))
    statistics: tuple[Statistic, ...] = ("iqm", "mean", "median", *(("optimality_gap",) if normalized else ()))  # type: ignore[assignment]

    def averages(values: np.ndarray) -> dict[str, Any]:
        return {"scores": values.tolist(), **{name: _plain(estimate(values, statistic=name)) for name in statistics}}

    return {
        "seeds": [record["seed"] for record in records],
        "unit": "normalised score (percent)" if normalized else "return",
        "total_timesteps": records[0]["total_timesteps"],
        "last": averages(scores[:, -1]),
        "best": averages(scores.max(axis=1)),
        "timesteps_per_second": float(np.mean([record["timesteps_per_second"] for record in records])),
        "wall_seconds": float(np.mean([record["wall_seconds"] for record in records])),
    }


def _plain(value: Estimate) -> dict[str, float | None]:
    """JSON knows no NaN, which is the interval of a single run."""
    return {key: None if np.isnan(number) else float(number) for key, number in value._asdict().items()}
