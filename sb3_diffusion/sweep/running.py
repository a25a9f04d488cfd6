"""Starting a sweep, and going on with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import gymnasium as gym

from sb3_diffusion.datasets import OfflineDataset, load_dataset, make_dataset_env
from sb3_diffusion.datasets.env_specs import register_robotics
from sb3_diffusion.datasets.memory_mapped import MEMORY_MAPPED_SUFFIX
from sb3_diffusion.sweep.arguments import algorithm_name
from sb3_diffusion.sweep.results import SweepResults
from sb3_diffusion.sweep.settings import SweepSettings

SETTINGS_FILE = "sweep.json"


def run_sweep(settings: SweepSettings, out: Path | str, *, address: str | None = None, verbose: int = 0) -> SweepResults:
    """
    Run all trials, and write tables and pictures: ``results.csv``, ``results.json``, ``curves.csv``, ``curves.png`` and, after
    a search, ``hyperparameters.png``.

    :param settings: what to run
    :param out: folder for the results; new, or without a sweep
    :param address: of a Ray cluster, ``"auto"`` for the one that this machine belongs to; None starts Ray on this machine.
        A Ray that this process is already connected to is used in any case
    :param verbose: 0 silent, 1 progress, 2 each result
    :return: what came out
    :raises FileExistsError: if ``out`` already holds a sweep
    :raises ValueError: if the settings are wrong, or an environment is unknown
    :raises ImportError: if Ray, or a package of an environment, is not installed; names the extra to install
    """
    settings.check()
    out = Path(out)
    if (out / SETTINGS_FILE).exists():
        raise FileExistsError(f"{out} already holds a sweep: choose another folder, or go on with `resume_sweep` (--resume).")
    settings = _plain(settings)
    for dataset in settings.datasets:  # a mistake shall show here, and an embedded dataset be made once
        _check_source(dataset, settings.env)
    _ray_tune()
    text = json.dumps(asdict(settings), indent=2)
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
    return _run(settings, out, address, verbose)


def resume_sweep(out: Path | str, *, address: str | None = None, verbose: int = 0) -> SweepResults:
    """
    Go on with a sweep whose process was killed: finished trials stay, others go on from their last checkpoints.

    Ray keeps its own state as pickle files beside the models: resume only a folder of your own.

    :param out: folder that was given to ``run_sweep``
    :param address: as in ``run_sweep``
    :param verbose: as in ``run_sweep``
    :return: what came out
    :raises FileNotFoundError: if there is no sweep
    """
    out = Path(out)
    if not (out / SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"There is no sweep in {out}: no file {SETTINGS_FILE}.")
    settings = SweepSettings(**json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8")))
    return _run(settings, out, address, verbose)


def _run(settings: SweepSettings, out: Path, address: str | None, verbose: int) -> SweepResults:
    results = _ray_tune().fit(settings, settings.storage or str(out.resolve()), address, verbose)
    results.save(out)
    return results


def _ray_tune() -> ModuleType:
    try:
        from sb3_diffusion.sweep import ray_tune
    except ImportError as error:
        raise ImportError("Sweeps need Ray Tune and Optuna: pip install 'sb3-diffusion[ray]'.") from error
    return ray_tune


def _plain(settings: SweepSettings) -> SweepSettings:
    """With lists, for JSON, names as in ``ALGORITHMS``, and full paths, as the trials have other working directories."""
    algos = [algorithm_name(algo) for algo in settings.algos]
    datasets = [d if d is None or not _is_path(d) else str(Path(d).resolve()) for d in settings.datasets]
    params = {name: list(values) for name, values in settings.params.items()}
    return replace(settings, algos=algos, datasets=datasets, seeds=list(settings.seeds), params=params)


def _is_path(dataset: str) -> bool:
    """Whether it is a file or a memory-mapped folder; another folder of that name does not make a path of an id."""
    return Path(dataset).is_file() or Path(dataset).suffix == MEMORY_MAPPED_SUFFIX


def _check_source(dataset: str | None, env: str | None) -> None:
    data, make_env = source_of(dataset, env)
    try:
        made = make_env()
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
        raise ValueError(f"The environment {env!r} is unknown: {error}") from error
    if data is not None:
        data.check_spaces(made.observation_space, made.action_space)
    made.close()


def source_of(dataset: str | None, env: str | None) -> tuple[OfflineDataset | None, Callable[[], gym.Env]]:
    """
    :param dataset: source of data, or None
    :param env: Gymnasium id, or None
    :return: the data, if any, and what makes the environment to evaluate in: that of the id, or that of the data, as recorded
    :raises ValueError: if no environment is known
    """
    data = None if dataset is None else load_dataset(dataset)
    if env is not None:
        register_robotics(env)
        return data, partial(gym.make, env)
    if data is None:
        raise ValueError("There is nothing to learn from: set `datasets`, `env` or both.")
    if data.env_spec is None:
        raise ValueError(f"The dataset {dataset!r} does not tell its environment, and trials are evaluated in one: set `env`.")
    return data, partial(make_dataset_env, data)
