"""Ray Tune: what runs in the process of a trial, search and early stopping, and results as rows. Needs Ray and Optuna."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import ray
import torch as th
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from stable_baselines3.common.callbacks import BaseCallback

from sb3_diffusion import ALGORITHMS, OfflineAlgorithm, search_spaces
from sb3_diffusion.common.utils import policy_alias
from sb3_diffusion.evaluation import evaluate
from sb3_diffusion.sweep.arguments import with_changes
from sb3_diffusion.sweep.results import SweepResults
from sb3_diffusion.sweep.running import source_of
from sb3_diffusion.sweep.settings import SweepSettings
from sb3_diffusion.zoo.presets import parse_texts

RAY_FOLDER = "trials"
REDUCTION_FACTOR = 3  # of early stopping: the best third goes on
OBJECT_STORE_BYTES = 128 * 2**20  # trials exchange a few numbers


def fit(settings: SweepSettings, storage: str, address: str | None, verbose: int) -> SweepResults:
    """
    Run the trials that have not come to an end.

    :param settings: of the sweep
    :param storage: folder or URI of checkpoints and states
    :param address: of a Ray cluster; None starts Ray on this machine
    :param verbose: of Ray Tune
    :return: what came out
    """
    trainable = tune.with_resources(run_trial, {"cpu": settings.cpus, "gpu": settings.gpus})
    with _connected(settings, address):
        state = f"{storage}/{RAY_FOLDER}"
        if tune.Tuner.can_restore(state):
            tuner = tune.Tuner.restore(state, trainable, resume_errored=True)
        else:
            tuner = _new_tuner(settings, trainable, storage, verbose)
        return _collect(tuner.fit(), settings)


def _new_tuner(settings: SweepSettings, trainable: Any, storage: str, verbose: int) -> tune.Tuner:
    space: dict[str, Any] = {
        key: getattr(settings, key) for key in ("env", "steps", "evaluations", "episodes", "cpus", "device")
    }
    searcher = None
    n_samples = 1
    if settings.samples > 0:
        groups = list(itertools.product(settings.algos, settings.datasets))
        searcher = SearchByGroup(groups, settings.seeds, {name: values[0] for name, values in settings.params.items()})
        n_samples = settings.samples * len(groups)
    else:
        space["trial"] = tune.grid_search(settings.grid())
    scheduler = None
    if settings.early_stopping:
        grace = max(1, settings.steps // REDUCTION_FACTOR**2)
        scheduler = HalvingByGroup(max_t=settings.steps, grace_period=grace, reduction_factor=REDUCTION_FACTOR)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=n_samples,
            search_alg=searcher,
            scheduler=scheduler,
            max_concurrent_trials=settings.workers,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=RAY_FOLDER,
            storage_path=storage,
            failure_config=tune.FailureConfig(max_failures=settings.retries),
            # The best one and, as always, the last one
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
            verbose=verbose,
        ),
    )


@contextmanager
def _connected(settings: SweepSettings, address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    # A state for each checkpoint is what resuming needs, and Ray's warning about it nothing that a user could act on.
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    if address is not None:
        ray.init(address=address, log_to_driver=False)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        workers = settings.workers or max(1, int(_n_cpus() / settings.cpus))
        ray.init(
            address="local",
            num_cpus=math.ceil(workers * settings.cpus),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _n_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _trial_name(trial: Any) -> str:
    what = trial.config["trial"]
    dataset = (what["dataset"] or trial.config["env"]).replace("/", "-").replace(":", "-").strip("-")
    return f"{what['algo']}_{dataset[-60:]}_seed{what['seed']}_{trial.trial_id}"


# A trial, in a process of its own -----------------------------------------------------------------------------------------


def run_trial(config: dict[str, Any]) -> None:
    """
    What Ray calls for a trial: build the model, or load it from the last checkpoint, and let it learn to the end.

    :param config: settings of the sweep, and ``trial`` with algorithm, dataset, seed and hyperparameters
    """
    th.set_num_threads(max(1, int(config["cpus"])))
    what = config["trial"]
    algorithm = ALGORITHMS[what["algo"]]
    data, make_env = source_of(what["dataset"], config["env"])
    checkpoint = tune.get_checkpoint()
    seconds_before = 0.0
    if checkpoint is None:
        env = make_env()
        arguments = {
            "policy": policy_alias(env.observation_space),
            "seed": what["seed"],
            "device": config["device"],
            **constructor_arguments(algorithm, what),
        }
        model = algorithm(env=env, dataset=data, **arguments)
    else:
        with checkpoint.as_directory() as folder:
            model = algorithm.load(Path(folder, "model.zip"), make_env(), dataset=data, device=config["device"])
            if Path(folder, "replay_buffer.zip").is_file():
                model.load_replay_buffer(Path(folder, "replay_buffer.zip"))
            seconds_before = json.loads(Path(folder, "trial.json").read_text())["seconds"]
    report = _Report(make_env, config["steps"], config["evaluations"], config["episodes"], what["seed"], seconds_before)
    model.learn(config["steps"] - model.num_timesteps, report, reset_num_timesteps=False)


def constructor_arguments(algorithm: type[OfflineAlgorithm], trial: Mapping[str, Any]) -> dict[str, Any]:
    """
    Constructor arguments out of a preset, the values of a search and given values, each winning over those before it.

    :param algorithm: class of the algorithm
    :param trial: ``params``, values by name, where ``policy_kwargs.x`` means an entry of ``policy_kwargs``, and ``search``,
        values as Optuna drew them, if there was a search
    :return: constructor arguments
    :raises ValueError: if there is no preset of that name
    """
    params = dict(trial["params"])
    preset = params.pop("preset", None)
    arguments = {} if preset is None else dict(algorithm.preset(preset))
    arguments.pop("default_total_timesteps", None)
    searched = search_spaces.to_arguments(trial.get("search", {}))
    entries = {f"policy_kwargs.{name}": value for name, value in searched.pop("policy_kwargs", {}).items()}
    arguments = with_changes(arguments, {**searched, **entries})
    return parse_texts(with_changes(arguments, params))


class _Report(BaseCallback):
    """Evaluates the model at equal distances, and hands score and model to Ray."""

    def __init__(
        self,
        make_env: Callable[[], gym.Env],
        steps: int,
        evaluations: int,
        episodes: int,
        seed: int,
        seconds_before: float,
    ) -> None:
        super().__init__()
        self.make_env, self.episodes, self.eval_seed = make_env, episodes, seed + 1_000
        self.milestones = [round(steps * (i + 1) / evaluations) for i in range(evaluations)]
        self.seconds_before = seconds_before

    def _on_training_start(self) -> None:
        self.milestones = [m for m in self.milestones if m > self.num_timesteps]
        self.start = time.monotonic()

    def _on_step(self) -> bool:
        if self.milestones and self.num_timesteps >= self.milestones[0]:
            self.milestones = [m for m in self.milestones if m > self.num_timesteps]
            self._report()
        return True

    def _report(self) -> None:
        result = evaluate(self.model, self.make_env, self.episodes, seed=self.eval_seed)  # type: ignore[arg-type]
        scores = result.normalized_scores
        seconds = self.seconds_before + time.monotonic() - self.start
        metrics = {
            "timesteps": self.num_timesteps,
            "score": result.mean if scores is None else float(scores.mean()),
            "normalized": scores is not None,
            "return_mean": result.mean,
            "return_std": result.std,
            "length_mean": float(result.lengths.mean()),
            "seconds": seconds,
        }
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(Path(folder, "model.zip"))
            Path(folder, "trial.json").write_text(json.dumps(metrics), encoding="utf-8")
            if not self.model._offline:  # type: ignore[attr-defined]
                self.model.save_replay_buffer(Path(folder, "replay_buffer.zip"))  # type: ignore[attr-defined]
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


# Search and early stopping, for each algorithm and dataset apart ------------------------------------------------------------


class _Suggest:
    """
    Draws the hyperparameters of an algorithm; a class, because Ray pickles it.

    :param algo: name of the algorithm
    :param fixed: names of hyperparameters that have a value, and are not drawn
    """

    def __init__(self, algo: str, fixed: Collection[str] = ()) -> None:
        self.algo, self.fixed = algo, list(fixed)

    def __call__(self, trial: Any) -> None:
        search_spaces.suggest(self.algo, _WithoutFixed(trial, self.fixed))  # type: ignore[arg-type]


class _WithoutFixed:
    """
    Optuna's trial, which draws nothing for what is fixed.

    :param trial: of Optuna
    :param fixed: names of hyperparameters, as of constructor arguments
    """

    def __init__(self, trial: Any, fixed: Collection[str]) -> None:
        self.trial, self.fixed = trial, fixed

    def __getattr__(self, method: str) -> Any:
        attribute = getattr(self.trial, method)
        if not method.startswith("suggest_"):
            return attribute

        def draw(name: str, choices_or_low: Any, *args: Any, **kwargs: Any) -> Any:
            value = choices_or_low[0] if isinstance(choices_or_low, Sequence) else choices_or_low
            ((argument, known),) = search_spaces.to_arguments({name: value}).items()
            whole = f"{argument}.{next(iter(known))}." if isinstance(known, dict) else f"{argument}."
            is_fixed = any(whole.startswith(f"{given}.") or f"{given}.".startswith(whole) for given in self.fixed)
            return value if is_fixed else attribute(name, choices_or_low, *args, **kwargs)

        return draw


class SearchByGroup(Searcher):
    """
    A study of Optuna for each algorithm and dataset, asked in turn; the seeds go round within each.

    :param groups: algorithm and dataset of each study
    :param seeds: of the trials
    :param params: values that are not searched
    """

    def __init__(self, groups: Sequence[tuple[str, str | None]], seeds: Sequence[int], params: Mapping[str, Any]) -> None:
        super().__init__(metric="score", mode="max")
        self.groups, self.seeds, self.params = list(groups), list(seeds), dict(params)
        self.studies = [
            OptunaSearch(_Suggest(algo, self.params), metric="score", mode="max", seed=self.seeds[0] + i)
            for i, (algo, _) in enumerate(self.groups)
        ]
        self.n_suggested = 0
        self.study_of: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        group = self.n_suggested % len(self.groups)
        seed = self.seeds[self.n_suggested // len(self.groups) % len(self.seeds)]
        values = self.studies[group].suggest(trial_id)
        self.n_suggested += 1
        self.study_of[trial_id] = group
        algo, dataset = self.groups[group]
        return {"trial": {"algo": algo, "dataset": dataset, "seed": seed, "params": self.params, "search": values}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.studies[self.study_of[trial_id]].on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.studies[self.study_of[trial_id]].on_trial_complete(trial_id, result, error)

    # As Ray's own searchers do, in Ray's own folder.
    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(vars(self)))

    def restore(self, checkpoint_path: str) -> None:
        vars(self).update(pickle.loads(Path(checkpoint_path).read_bytes()))


class HalvingByGroup(FIFOScheduler):
    """
    Asynchronous successive halving (arXiv 1810.05934) among the trials of the same algorithm and dataset.

    :param kwargs: arguments of Ray's ``ASHAScheduler``
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs
        self.schedulers: dict[tuple[str, str | None], ASHAScheduler] = {}

    def _of(self, trial: Any) -> ASHAScheduler:
        group = (trial.config["trial"]["algo"], trial.config["trial"]["dataset"])
        if group not in self.schedulers:
            self.schedulers[group] = ASHAScheduler("timesteps", "score", "max", **self.kwargs)
        return self.schedulers[group]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


# Results ------------------------------------------------------------------------------------------------------------------


def _collect(grid: Any, settings: SweepSettings) -> SweepResults:
    """The results of Ray as ours."""
    trials, curves = [], []
    for result in grid:
        what = result.config["trial"]
        name = Path(result.path).name
        rows = _evaluations(result)
        last = rows[-1] if rows else {}
        best = max(rows, key=lambda row: row["score"], default={})
        timesteps = last.get("timesteps", 0)
        if result.error is not None:
            status = "failed"
        elif timesteps >= settings.steps:
            status = "finished"
        else:
            status = "stopped early" if (result.metrics or {}).get("done") else "unfinished"
        best_checkpoint = result.get_best_checkpoint("score", "max") if result.best_checkpoints else None
        trials.append(
            {
                "trial": name,
                **{key: what[key] for key in ("algo", "dataset")},
                "env": settings.env,
                "seed": what["seed"],
                "params": {**what.get("search", {}), **what["params"]},
                "status": status,
                "timesteps": timesteps,
                **{key: last.get(key) for key in ("score", "normalized", "return_mean", "return_std", "seconds")},
                "best_score": best.get("score"),
                "best_timesteps": best.get("timesteps"),
                "restarts": len({row["pid"] for row in rows}) - 1 if rows else 0,
                "model": None if result.checkpoint is None else f"{result.checkpoint.path}/model.zip",
                "best_model": None if best_checkpoint is None else f"{best_checkpoint.path}/model.zip",
                "error": None if result.error is None else str(result.error).strip().splitlines()[-1],
            }
        )
        keys = ("timesteps", "score", "return_mean", "return_std", "seconds")
        curves += [{"trial": name, **{key: row[key] for key in keys}} for row in rows]
    trials.sort(key=lambda row: row["trial"])
    curves.sort(key=lambda row: row["trial"])
    return SweepResults(trials, curves, searched=settings.samples > 0)


def _evaluations(result: Any) -> list[dict[str, Any]]:
    """Evaluations of a trial in their order; of those that were made again after a restart the last one counts."""
    frame = result.metrics_dataframe
    if frame is None or "timesteps" not in frame:
        return []
    by_step = {int(row["timesteps"]): row for row in frame.to_dict("records")}
    return [
        {**row, "timesteps": step, "normalized": bool(row["normalized"]), "pid": int(row["pid"])}
        for step, row in sorted(by_step.items())
    ]
