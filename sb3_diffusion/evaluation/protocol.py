"""
The protocol of a training run that is measured: evaluations on the way, checkpoints, results as JSON.

A run is one training with one seed. It is evaluated ``n_evaluations`` times at equal distances; after each evaluation its
checkpoint and ``progress.json`` are written, so that a program that is stopped and started again goes on from there, and a
finished run is not repeated. Finished runs are merged into one result file per benchmark, also by several processes at once.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from filelock import FileLock
from stable_baselines3.common.callbacks import BaseCallback

from sb3_diffusion.evaluation.episodes import EvaluationEnv, evaluate

LIBRARIES = ("sb3-diffusion", "stable-baselines3", "torch", "gymnasium", "mujoco", "minari", "numpy")
# In these all runs of one name agree.
_LENGTHS = ("total_timesteps", "n_evaluations", "n_eval_episodes")
# Of the package: the root of a checkout, or the folder of installed packages.
_ROOT = Path(__file__).resolve().parent.parent.parent


def environment(device: th.device | str = "cpu") -> dict[str, Any]:
    """
    Where a number comes from.

    :param device: that the run uses
    :return: commit (None outside of a checkout; with ``-dirty`` if tracked files are changed), hardware, library versions,
        command line
    """
    uses_gpu = th.device(device).type == "cuda"
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": th.get_num_threads(),
        "device": th.cuda.get_device_name() if uses_gpu else "cpu",
        "python": platform.python_version(),
        "libraries": versions,
        "command": command_line(),
    }


def run(
    name: str,
    seed: int,
    make_model: Callable[[], Any],
    load_model: Callable[[Path], Any],
    total_timesteps: int,
    env: EvaluationEnv,
    result_file: Path,
    *,
    n_evaluations: int = 10,
    n_eval_episodes: int = 10,
    evaluate_first: bool = False,
    deterministic: bool = True,
    learn_kwargs: dict[str, Any] | None = None,
    replay_buffer: bool = False,
    dataset: Any = None,
    about: Callable[[Any], dict[str, Any]] | None = None,
    workdir: Path,
    callback: BaseCallback | None = None,
    progress_bar: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """
    Do one run, or what is left of it, and write it into the result file.

    A model that comes with timesteps (from an offline phase before) goes on counting; ``total_timesteps`` are those of this
    run. The episodes of the evaluations are seeded: others for each run and each evaluation, the same when repeated.

    :param name: of the setting that is compared; one line in the table
    :param seed: of the run; ``make_model`` has to use it too
    :param make_model: builds the model at the beginning
    :param load_model: reads it back from a checkpoint, with dataset and env attached
    :param total_timesteps: of this run
    :param env: for the evaluations, see [evaluate][sb3_diffusion.evaluation.evaluate]
    :param result_file: JSON file that collects the runs of a benchmark
    :param n_evaluations: at equal distances, the last one at the end
    :param n_eval_episodes: episodes per evaluation
    :param evaluate_first: evaluate before the first step too
    :param deterministic: passed to ``predict``
    :param learn_kwargs: further arguments of ``learn``, such as ``offline=False``
    :param replay_buffer: keep the replay buffer with the checkpoint, as online runs need it
    :param dataset: reference scores and behaviour; the model's own dataset by default, whose name does not tell runs apart
    :param about: makes further entries of the record from the trained model
    :param workdir: folder of the checkpoints, one folder below it per run
    :param callback: of SB3, called before the evaluations; when it stops the training, the run is kept as it is
    :param progress_bar: show one per run
    :param quiet: print nothing
    :return: the record of the run, or None if ``callback`` stopped it
    :raises ValueError: if a count is out of range; if ``workdir`` holds a run of this name and seed with another length, other
        evaluations, in another environment or on another dataset; or if ``result_file`` holds one of this name and another
        seed with another length or other evaluations
    """
    if n_evaluations < 1 or total_timesteps < n_evaluations:
        raise ValueError(
            f"`n_evaluations` must be at least 1 and at most `total_timesteps`: got {n_evaluations}, {total_timesteps}."
        )

    def tell(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    lengths = dict(zip(_LENGTHS, (total_timesteps, n_evaluations, n_eval_episodes), strict=True))
    _check_lengths(result_file, name, seed, lengths)
    folder = workdir / result_file.stem / f"{name}-seed{seed}".replace(os.sep, "_").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, progress_file = folder / "checkpoint.zip", folder / "progress.json"
    protocol = {
        **lengths,
        "deterministic": deterministic,
        "dataset": None if dataset is None else dataset.name,
        "env": _env_id(env),
    }
    progress: dict[str, Any] = {}
    if checkpoint.is_file() and progress_file.is_file():
        progress = json.loads(progress_file.read_text(encoding="utf-8"))
        if other := _difference(progress["protocol"], protocol):
            raise ValueError(f"{folder} belongs to a run with {other}: choose another folder (--out), or remove this one.")
        if progress["finished"]:
            tell(f"{name}, seed {seed}: finished before")
            return merge(result_file, name, seed, progress["record"])
        model = load_model(checkpoint)
        if replay_buffer:
            model.load_replay_buffer(folder / "replay_buffer.zip")
        # Stopped between the two files: what the checkpoint does not know of yet is evaluated again.
        progress["evaluations"] = [e for e in progress["evaluations"] if e["timestep"] <= model.num_timesteps]
        tell(f"{name}, seed {seed}: going on from timestep {model.num_timesteps}")
    else:
        model = make_model()
        progress = {
            "protocol": protocol,
            "start": model.num_timesteps,
            "evaluations": [],
            "train_seconds": 0.0,
            "wall_seconds": 0.0,
            "commands": [],
            "finished": False,
        }
        tell(f"{name}, seed {seed}: {total_timesteps} timesteps from {model.num_timesteps}")

    where = environment(model.device)
    if where["command"] not in progress["commands"]:
        progress["commands"].append(where["command"])

    def measure() -> None:
        episodes_seed = 1_000_000 * (seed + 1) + 1_000 * len(progress["evaluations"])
        result = evaluate(model, env, n_eval_episodes, deterministic=deterministic, seed=episodes_seed, dataset=dataset)
        progress["evaluations"].append({"timestep": int(model.num_timesteps), **result.to_dict()})
        scores = result.normalized_scores
        score = "" if scores is None else f", normalised {np.mean(scores):.1f}"
        tell(f"{name}, seed {seed}, timestep {model.num_timesteps}: return {result.mean:.1f}{score}")

    def keep() -> None:
        model.save(checkpoint)
        if replay_buffer:
            model.save_replay_buffer(folder / "replay_buffer.zip")
        write_json(progress_file, progress)

    start = progress["start"]
    due = [start + round(total_timesteps * (i + 1) / n_evaluations) for i in range(n_evaluations)]
    if evaluate_first:
        due.insert(0, start)
    schedule = _Schedule(due, progress, measure, keep)
    schedule.model = model
    schedule.catch_up()
    remaining = start + total_timesteps - model.num_timesteps
    if remaining > 0:
        model.learn(
            remaining,
            callback=schedule if callback is None else [callback, schedule],
            log_interval=None,
            reset_num_timesteps=False,
            progress_bar=progress_bar,
            **(learn_kwargs or {}),
        )
        schedule.catch_up()
    if model.num_timesteps < start + total_timesteps:
        keep()
        tell(f"{name}, seed {seed}: stopped at timestep {model.num_timesteps}")
        return None

    data = dataset if dataset is not None else getattr(model, "dataset", None)
    record = {
        "name": name,
        "seed": seed,
        **protocol,
        "dataset": None if data is None else data.name,
        "start": start,
        "evaluations": progress["evaluations"],
        "behavior": behavior(data),
        "train_seconds": round(progress["train_seconds"], 3),
        "wall_seconds": round(progress["wall_seconds"], 3),
        "timesteps_per_second": round((model.num_timesteps - start) / max(progress["train_seconds"], 1e-9), 3),
        "environment": where,
        "commands": progress["commands"],
        **(about(model) if about is not None else {}),
    }
    progress.update(finished=True, record=record)
    keep()
    return merge(result_file, name, seed, record)


class _Schedule(BaseCallback):
    """
    Evaluates and keeps the run at given timesteps, and counts the seconds between as training.

    :param due: timesteps of the evaluations, ascending
    :param progress: of the run; evaluations and seconds are written into it
    :param measure: evaluates the model
    :param keep: writes checkpoint and progress
    """

    def __init__(
        self, due: Sequence[int], progress: dict[str, Any], measure: Callable[[], None], keep: Callable[[], None]
    ) -> None:
        super().__init__()
        self.due, self.progress, self.measure, self.keep = list(due), progress, measure, keep
        self._clock: float | None = None

    def catch_up(self) -> None:
        """Evaluate if one more evaluation is due at the model's timestep than there is."""
        n_due = sum(timestep <= self.model.num_timesteps for timestep in self.due)
        if n_due <= len(self.progress["evaluations"]):
            return
        now = time.perf_counter()
        if self._clock is not None:
            self.progress["train_seconds"] += now - self._clock
            self.progress["wall_seconds"] += now - self._clock
        self.measure()
        self.progress["wall_seconds"] += time.perf_counter() - now
        self.keep()
        self._clock = time.perf_counter() if self._clock is not None else None

    def _on_training_start(self) -> None:
        self._clock = time.perf_counter()

    def _on_step(self) -> bool:
        self.catch_up()
        return True

    def _on_training_end(self) -> None:
        assert self._clock is not None
        seconds = time.perf_counter() - self._clock
        self.progress["train_seconds"] += seconds
        self.progress["wall_seconds"] += seconds
        self._clock = None


def behavior(dataset: Any) -> dict[str, Any] | None:
    """
    What the policy that made the data achieved.

    :param dataset: an ``OfflineDataset``, or None
    :return: mean return, return of the best episode, both normalised too if reference scores are known
    """
    if dataset is None:
        return None
    returns = dataset.episode_returns
    mean, best = float(returns.mean()), float(returns.max())
    known = dataset.has_reference_scores
    return {
        "dataset": dataset.name,
        "n_episodes": len(returns),
        "mean": mean,
        "best": best,
        "normalized_mean": float(dataset.normalized_score(mean)) if known else None,
        "normalized_best": float(dataset.normalized_score(best)) if known else None,
    }


def merge(result_file: Path, name: str, seed: int, record: dict[str, Any]) -> dict[str, Any]:
    """
    Put the record of a run into a result file, in place of an earlier one of that name and seed.

    Several processes may do so at once.

    :param result_file: JSON file, made if it is not there
    :param name: of the setting
    :param seed: of the run
    :param record: what to write
    :return: the record
    """
    with _lock(result_file):
        content: dict[str, Any] = {"kind": "runs", "title": result_file.stem, "runs": {}}
        if result_file.is_file():
            content = json.loads(result_file.read_text(encoding="utf-8"))
        content["runs"][f"{name}/{seed}"] = record
        content["runs"] = dict(sorted(content["runs"].items()))
        write_json(result_file, content)
    return record


def describe(result_file: Path, title: str, text: str = "", task: dict[str, Any] | None = None) -> None:
    """
    Give a result file of runs its headline and text in the tables.

    :param result_file: JSON file, made if it is not there
    :param title: headline
    :param text: what was done, in Markdown
    :param task: ``dataset`` and ``env`` of all its runs, by name; None if they may differ
    :raises ValueError: if the file holds runs of another task
    """
    with _lock(result_file):
        content: dict[str, Any] = {"kind": "runs", "title": title, "text": text, "runs": {}}
        if result_file.is_file():
            content = {**json.loads(result_file.read_text(encoding="utf-8")), "title": title, "text": text}
        if task is not None:
            if other := _difference(_task(content), task):
                raise ValueError(f"{result_file} belongs to a benchmark with {other}: choose another folder (--out).")
            content["task"] = task
        write_json(result_file, content)


def _check_lengths(result_file: Path, name: str, seed: int, lengths: dict[str, int]) -> None:
    """
    Runs of one name share a curve, so that they have to be equally long and equally often evaluated.

    :param result_file: of the run
    :param name: of its setting
    :param seed: of the run, which may replace an earlier one
    :param lengths: timesteps, evaluations and episodes per evaluation of the run
    :raises ValueError: if those of another seed are others
    """
    if not result_file.is_file():
        return
    for record in json.loads(result_file.read_text(encoding="utf-8"))["runs"].values():
        if record["name"] != name or record["seed"] == seed:
            continue
        if other := _difference({key: record[key] for key in lengths}, lengths):
            raise ValueError(
                f"{result_file} holds a run of {name!r} with seed {record['seed']} and {other}: seeds that are averaged must "
                "agree in these. Run the same again, or choose another name or another folder (--out)."
            )


def _task(content: dict[str, Any]) -> dict[str, Any]:
    """
    :param content: of a result file
    :return: what its runs are on; where it does not say so, at least their dataset, if they have one
    """
    behaviors = [record["behavior"] for record in content["runs"].values() if record["behavior"] is not None]
    return content.get("task", {"dataset": behaviors[0]["dataset"]} if behaviors else {})


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """:return: which entries of ``before`` are others now, as text; empty if there are none"""
    return ", ".join(f"{key} {value} (here {now[key]})" for key, value in before.items() if value != now[key])


def _env_id(env: EvaluationEnv) -> str | None:
    """:return: id of the environment, or None if it has none"""
    return env if isinstance(env, str) else getattr(getattr(env, "spec", env), "id", None)


def write_json(path: Path, content: Any) -> None:
    """
    Write JSON so that a reader sees either the old or the new file, never half of one.

    :param path: file to write
    :param content: plain numbers, strings, lists and dictionaries; no NaN
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def command_line() -> str:
    """:return: the command line of this process, without what depends on the machine"""
    program = Path(sys.argv[0]).resolve()
    if program.name == "sb3-diffusion" or program == _ROOT / "sb3_diffusion" / "__main__.py":
        return shlex.join(["sb3-diffusion", *sys.argv[1:]])
    script = program.relative_to(_ROOT).as_posix() if _is_checkout() and program.is_relative_to(_ROOT) else program.name
    return shlex.join(["python", script, *sys.argv[1:]])


def _is_checkout() -> bool:
    return (_ROOT / "pyproject.toml").is_file() and (_ROOT / ".git").exists()


def _commit() -> str | None:
    if not _is_checkout():
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # without git, or a checkout without commits
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
