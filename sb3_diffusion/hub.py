"""A trained model as a folder for a hub: the pickle-free file, its scores, and a card in the format of Hugging Face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.model_file import saved_class_name
from sb3_diffusion.datasets import OfflineDataset
from sb3_diffusion.evaluation import EvaluationResult
from sb3_diffusion.evaluation.protocol import environment, write_json

MODEL_FILE, RESULTS_FILE, CARD_FILE = "model.zip", "results.json", "README.md"
HUB_EXTRA = "Model cards need the package huggingface_hub: pip install 'sb3-diffusion[hub]'."


def write_package(
    model: OfflineAlgorithm,
    folder: str | PathLike[str],
    *,
    env_id: str,
    result: EvaluationResult,
    deterministic: bool = True,
    dataset: OfflineDataset | None = None,
    commands: Sequence[str] = (),
    license: str = "mit",
    name: str | None = None,
    text: str = "",
    files: Sequence[str | PathLike[str]] = (),
) -> Path:
    """
    Write ``model.zip``, ``results.json`` and the card ``README.md`` into a new folder, which a hub takes as it is.

    :param model: trained
    :param folder: to make; must be empty or not there
    :param env_id: that it was evaluated in
    :param result: of [evaluate][sb3_diffusion.evaluation.evaluate]
    :param deterministic: whether that was with deterministic actions, which the card says
    :param dataset: that it learned from; None: the one attached to the model
    :param commands: that trained it
    :param license: of the model, an id that hubs know
    :param name: on the card; that of the folder by default
    :param text: further text of the card, in Markdown
    :param files: to put beside the model, such as a film
    :return: the folder
    :raises FileExistsError: if there is something in the folder
    :raises FileNotFoundError: if one of ``files`` is not there
    :raises ImportError: without huggingface_hub
    """
    try:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData
    except ImportError as error:
        raise ImportError(HUB_EXTRA) from error
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another folder.")
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file} to put beside the model.")
    folder.mkdir(parents=True, exist_ok=True)
    dataset = dataset if dataset is not None else model.dataset
    for file in map(Path, files):
        shutil.copyfile(file, folder / file.name)
    model.save(folder / MODEL_FILE)
    report = {
        "algorithm": type(model).__name__,
        "env": env_id,
        "dataset": None if dataset is None else dataset.name,
        "timesteps": model.num_timesteps,
        "updates": model._n_updates,
        "commands": list(commands),
        "evaluation": result.to_dict(),
        "deterministic": deterministic,
        "environment": environment(model.device),
    }
    write_json(folder / RESULTS_FILE, report)
    name = name or folder.resolve().name
    data = ModelCardData(
        license=license,
        library_name="sb3-diffusion",
        tags=["reinforcement-learning", "offline-reinforcement-learning", "diffusion", "stable-baselines3", env_id],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=env_id,
                dataset_name=env_id,
                metric_type="mean_reward",
                metric_value=f"{result.mean:.2f} +/- {result.std:.2f}",
            )
        ],
    )
    body = _card(name, report, result, dataset, license, text, [Path(file).name for file in files])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / CARD_FILE)
    return folder


def load_package(folder: str | PathLike[str], **kwargs: Any) -> OfflineAlgorithm:
    """
    Load the model of a folder that [write_package][sb3_diffusion.hub.write_package] wrote. Nothing in it is executed.

    :param folder: local, for instance what ``huggingface_hub.snapshot_download`` returned
    :param kwargs: arguments of ``load``, such as ``env``, ``dataset`` and ``device``
    :return: the model, of the class that its file tells
    :raises FileNotFoundError: if there is no model in it
    :raises FileFormatError: if the file is damaged or foreign
    :raises ValueError: if it is of a class that this package does not have
    """
    from sb3_diffusion import ALGORITHMS

    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"There is no {MODEL_FILE} in {folder}: expected a folder of `sb3-diffusion package`.")
    name = saved_class_name(path)
    classes = {cls.__name__: cls for cls in ALGORITHMS.values()}
    if name not in classes:
        raise ValueError(f"{path} holds a model of {name}; load it with that class: there are {', '.join(classes)} here.")
    return classes[name].load(path, **kwargs)


def _card(
    name: str,
    report: dict[str, Any],
    result: EvaluationResult,
    dataset: OfflineDataset | None,
    license: str,
    text: str,
    files: list[str],
) -> str:
    """:return: the card without its head"""
    where, algorithm, env_id = report["environment"], report["algorithm"], report["env"]
    n = len(result.returns)
    lines = [f"# {name}", "", f"{algorithm} of sb3_diffusion, acting in `{env_id}`.", "", *([text, ""] if text else [])]
    lines += ["## Scores", "", "| | mean | standard deviation | 95 % interval of the mean |", "|---|---:|---:|---:|"]
    rows = [("return", result.returns, False)]
    if result.normalized_scores is not None:
        rows.append(("normalised score (percent)", result.normalized_scores, True))
    for label, values, normalized in rows:
        interval = "" if n < 2 else "{:.1f} to {:.1f}".format(
            *result.confidence_interval(statistic="mean", normalized=normalized)
        )  # fmt: skip
        lines.append(f"| {label} | {values.mean():.1f} | {values.std():.1f} | {interval} |")
    actions = "deterministic" if report["deterministic"] else "sampled"
    lines += ["", f"{n} episodes of this one model, {actions} actions; each of them is in `{RESULTS_FILE}`.", ""]
    lines += ["## Training", "", f"- {report['timesteps']:,} timesteps, {report['updates']:,} updates"]
    if dataset is None:
        lines.append("- no logged data: learned in the environment")
    else:
        behavior = f"{dataset.episode_returns.mean():.1f}"
        size = f"{dataset.n_episodes} episodes, {len(dataset):,} steps, mean return {behavior}"
        lines.append(f"- data: `{dataset.name}` ({size})")
    lines += [f"- command: `{command}`" for command in report["commands"]]
    device = "" if where["device"] == "cpu" else f", {where['device']}"
    lines.append(f"- packaged on: {where['processor']}, {where['cpu_count']} logical cores{device}")
    versions = ", ".join(f"{library} {version}" for library, version in where["libraries"].items())
    lines += [f"- versions: Python {where['python']}, {versions}", ""]
    lines += ["## Use", "", "```python", "from sb3_diffusion.hub import load_package", ""]
    lines += [f'model = load_package("path/to/this/folder", env={json.dumps(env_id)})', "```", ""]
    lines += ["The file holds JSON and safetensors; loading it executes nothing.", ""]
    lines += [f"- `{file}`" for file in files]
    return "\n".join([*lines, *([""] if files else []), "## Licence", "", license, ""])
