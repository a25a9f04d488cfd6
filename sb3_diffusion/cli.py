"""
The command ``sb3-diffusion``: each function in ``COMMANDS`` is one command, its arguments are the options.

Exit status: 0 success; 1 a mistake in what was asked for, told in one line; 2 options that cannot be read; 130 interrupted.
"""

from __future__ import annotations

import json as json_module
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Union
from zipfile import BadZipFile

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from tqdm import TqdmExperimentalWarning

from sb3_diffusion.evaluation import EvaluationResult, bootstrap_interval
from sb3_diffusion.evaluation import evaluate as evaluate_model
from sb3_diffusion.sweep import sweep

if TYPE_CHECKING:
    from sb3_diffusion.datasets import OfflineDataset

DEMO_EVALUATIONS = 8
# Smaller networks than the default ones, for a small task on a small machine.
DEMO_SETTINGS: dict[str, Any] = {"normalize_observations": True, "policy_kwargs": {"net_arch": [128, 128]}}
SUCCESS, USER_ERROR, INTERRUPTED = 0, 1, 130


# Commands -----------------------------------------------------------------------------------------------------------------


def demo(
    out: Path = Path("sb3_diffusion_demo"),
    *,
    dataset: str | None = None,
    steps: int = 4_000,
    episodes: int = 20,
    seed: int = 0,
) -> int:
    """
    Train DTQL on the embedded dataset, evaluate it against the behaviour that made the data, draw the learning curve.

    Examples:

        sb3-diffusion demo
        sb3-diffusion demo --out runs/demo --steps 20000

    :param out: folder for the model and the picture
    :param dataset: another dataset whose environment is known; the embedded one by default
    :param steps: gradient steps
    :param episodes: episodes of the last evaluation
    :param seed: of training and evaluation
    :return: exit status
    """
    from sb3_diffusion import DTQL
    from sb3_diffusion.datasets import DEFAULT_DATASET_ID

    _require_plots()
    data = _load_dataset(dataset or DEFAULT_DATASET_ID)
    if data.env_spec is None:
        raise ValueError(f"The dataset {data.name!r} does not say which environment it comes from; choose one that does.")
    env_id = data.env_spec.id
    out.mkdir(parents=True, exist_ok=True)
    print(data)
    print(f"Training DTQL on it: {steps} gradient steps, {DEMO_EVALUATIONS} evaluations in {env_id} on the way.")
    model = DTQL("MlpPolicy", env_id, dataset=data, seed=seed, **DEMO_SETTINGS)
    eval_env = make_vec_env(env_id, 10, seed=seed + 1_000)
    curve = EvalCallback(
        eval_env, n_eval_episodes=10, eval_freq=max(1, steps // DEMO_EVALUATIONS), log_path=str(out), verbose=0
    )
    model.learn(steps, callback=curve, progress_bar=True)
    eval_env.close()
    result = evaluate_model(model, env_id, episodes, seed=seed + 2_000, dataset=data)
    model.save(out / "model")
    _plot_learning_curve(out, data, env_id)
    _print_comparison(data, result, f"DTQL after {steps} steps")
    print(f"Learning curve: {out / 'demo_learning_curve.png'}")
    print(f"Model:          {out / 'model.zip'}")
    return SUCCESS


def train(
    *,
    algo: str | None = None,
    dataset: str | None = None,
    env: str | None = None,
    steps: int = 100_000,
    seed: int | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    online: bool = False,
    policy: str | None = None,
    device: str = "auto",
    eval_every: int = 0,
    episodes: int = 10,
) -> int:
    """
    Train an algorithm on a dataset, in an environment, or first on the one and then in the other.

    Ctrl-C (or SIGTERM) stops after the running step and writes interrupted.zip, from which --resume goes on exactly.

    Examples:

        sb3-diffusion train --dataset mujoco/hopper/medium-v0 --steps 200000 --seed 0 --out runs/hopper
        sb3-diffusion train --resume runs/hopper/interrupted.zip --steps 200000
        sb3-diffusion train --resume runs/hopper/model.zip --online --steps 250000 --out runs/hopper_online
        sb3-diffusion train --env Pendulum-v1 --steps 20000

    :param algo: name of the algorithm, such as dtql or diffusion_ql; dtql by default
    :param dataset: Minari id, path of an HDF5 file in D4RL's layout, or D4RL name; without one training is online
    :param env: Gymnasium id; by default the environment of the dataset
    :param steps: timesteps in total, those before --resume included; gradient steps offline, env steps online
    :param seed: of everything random
    :param out: folder for the results, ./sb3_diffusion_run by default; with --resume that of the file
    :param resume: model file to go on from; what is not given is taken from the train.json beside it
    :param online: step the environment although there is a dataset (fine-tuning)
    :param policy: MlpPolicy, CnnPolicy or MultiInputPolicy; by default what the observations ask for
    :param device: cpu, cuda, ... or auto
    :param eval_every: timesteps between evaluations on the way, which also keep best_model.zip; 0 for none
    :param episodes: episodes per evaluation; 0 for no evaluation at the end
    :return: exit status
    """
    settings: dict[str, Any] = {"algo": algo, "dataset": dataset, "env": env, "seed": seed}
    if resume is not None:
        if not resume.is_file():
            raise FileNotFoundError(f"There is no file {resume} to go on from.")
        before = resume.parent / "train.json"
        known = json_module.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
        settings = {key: known.get(key) if value is None else value for key, value in settings.items()}
        out = out or resume.parent
    out = out or Path("sb3_diffusion_run")
    if (out / "model.zip").exists() and (resume is None or resume != out / "model.zip"):
        raise FileExistsError(f"{out} already holds a finished model.zip: choose another folder with --out.")
    algorithm = _algorithm(settings["algo"])
    data = None if settings["dataset"] is None else _load_dataset(settings["dataset"], settings["env"])
    if data is None and settings["env"] is None:
        raise ValueError("There is nothing to learn from: pass --dataset, --env or both.")

    if resume is None:
        policy = policy or _policy_for(data, settings["env"])
        model = algorithm(policy, settings["env"], dataset=data, seed=settings["seed"], device=device, verbose=1)
    else:
        model = algorithm.load(resume, env=settings["env"], dataset=data, device=device)
        replay_file = resume.parent / "interrupted_replay_buffer.zip"
        if resume.name == "interrupted.zip" and replay_file.is_file():
            model.load_replay_buffer(replay_file)
    if steps <= model.num_timesteps:
        raise ValueError(
            f"`--steps` must be more than the {model.num_timesteps} timesteps that the model already has, these included: "
            f"got {steps}."
        )

    out.mkdir(parents=True, exist_ok=True)
    (out / "train.json").write_text(json_module.dumps(settings, indent=2) + "\n", encoding="utf-8")
    stop = _StopOnSignal()
    callbacks: list[BaseCallback] = [stop]
    env_id = settings["env"] or (data.env_spec.id if data is not None and data.env_spec is not None else None)
    if eval_every > 0 and env_id is not None:
        eval_env = make_vec_env(env_id, max(1, min(episodes, 10)), seed=settings["seed"])
        callbacks.append(
            EvalCallback(
                eval_env,
                n_eval_episodes=max(1, episodes),
                eval_freq=eval_every,
                log_path=str(out),
                best_model_save_path=str(out),
            )
        )
    offline = False if online or data is None else None
    model.learn(steps - model.num_timesteps, callback=callbacks, reset_num_timesteps=False, progress_bar=True, offline=offline)
    if stop.stopped:
        model.save(out / "interrupted")
        if offline is False:
            model.save_replay_buffer(out / "interrupted_replay_buffer.zip")
        print(f"Interrupted at {model.num_timesteps} of {steps} timesteps. To go on:")
        go_on = f"  sb3-diffusion train --resume {out / 'interrupted.zip'} --steps {steps}"
        print(f"{go_on} --online" if online else go_on)
        return INTERRUPTED
    model.save(out / "model")
    print(f"Model: {out / 'model.zip'}")
    if episodes > 0 and env_id is not None:
        result = evaluate_model(model, env_id, episodes, seed=settings["seed"], dataset=data)
        _print_comparison(data, result, f"{algorithm.__name__} after {model.num_timesteps} steps")
    return SUCCESS


def evaluate(
    model: Path,
    /,
    *,
    env: str | None = None,
    dataset: str | None = None,
    episodes: int = 10,
    n_envs: int | None = None,
    stochastic: bool = False,
    seed: int | None = None,
    algo: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> int:
    """
    Run a saved model in an environment: returns, lengths, normalised scores, with bootstrap intervals.

    Examples:

        sb3-diffusion evaluate runs/hopper/model.zip --env Hopper-v5
        sb3-diffusion evaluate runs/hopper/model.zip --dataset mujoco/hopper/medium-v0 --episodes 100 --json

    :param model: file that was written by model.save
    :param env: Gymnasium id; by default the environment of the dataset
    :param dataset: whose reference scores and behaviour to compare with
    :param episodes: number of episodes
    :param n_envs: environments that step together
    :param stochastic: sample actions instead of taking the deterministic ones
    :param seed: of the environments
    :param algo: name of the algorithm; by default that of the train.json beside the model, else dtql
    :param device: cpu, cuda, ... or auto
    :param json: print one JSON object instead of a table
    :return: exit status
    """
    if not model.is_file():
        raise FileNotFoundError(f"There is no model file {model}.")
    settings_file = model.parent / "train.json"
    known = json_module.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    data = None if dataset is None else _load_dataset(dataset, env)
    env_id = env or (data.env_spec.id if data is not None and data.env_spec is not None else known.get("env"))
    if env_id is None:
        raise ValueError("Which environment? Pass --env with a Gymnasium id, or --dataset with one that knows its own.")
    algorithm = _algorithm(algo or known.get("algo"))
    loaded = algorithm.load(model, device=device)
    result = evaluate_model(loaded, env_id, episodes, n_envs=n_envs, deterministic=not stochastic, seed=seed, dataset=data)
    if not json:
        _print_comparison(data, result, model.name)
        return SUCCESS
    report = {"model": str(model), "env": env_id, "seed": seed, "deterministic": not stochastic, **result.to_dict()}
    # JSON knows no NaN, which is what the interval of a single episode is.
    report["mean_interval_95"] = result.confidence_interval(statistic="mean") if episodes > 1 else None
    report["iqm"] = result.iqm
    report["iqm_interval_95"] = result.confidence_interval() if episodes > 1 else None
    print(json_module.dumps(report, allow_nan=False))
    return SUCCESS


def dataset_summary(source: str, /, *, json: bool = False) -> int:
    """
    Describe a dataset: returns, lengths, flags, ranges, saturation.

    Examples:

        sb3-diffusion dataset summary mujoco/hopper/medium-v0
        sb3-diffusion dataset summary logs.hdf5 --json

    :param source: Minari id, path of an HDF5 file in D4RL's layout, or D4RL name
    :param json: print one JSON object instead of text
    :return: exit status
    """
    data = _load_dataset(source)
    print(json_module.dumps(data.summary(), default=_to_plain) if json else data)
    return SUCCESS


def dataset_plot(source: str, /, *, out: Path = Path("dataset.png")) -> int:
    """
    Draw returns, lengths, rewards and actions of a dataset into one picture.

    Examples:

        sb3-diffusion dataset plot mujoco/hopper/medium-v0 --out hopper.png

    :param source: Minari id, path of an HDF5 file in D4RL's layout, or D4RL name
    :param out: picture to write; its suffix decides the format
    :return: exit status
    """
    _require_plots()
    _load_dataset(source).plot(out)
    print(out)
    return SUCCESS


def dataset_make(name: str | None = None, /) -> int:
    """
    Write an embedded dataset, if it is not there yet, and describe it.

    Examples:

        sb3-diffusion dataset make

    :param name: id of an embedded dataset; the default one if left out
    :return: exit status
    """
    from sb3_diffusion.datasets import DEFAULT_DATASET_ID, EMBEDDED_DATASETS

    if name is not None and name not in EMBEDDED_DATASETS:
        raise ValueError(f"There is no embedded dataset {name!r}; there are: {', '.join(sorted(EMBEDDED_DATASETS))}.")
    print(_load_dataset(name or DEFAULT_DATASET_ID))
    return SUCCESS


COMMANDS: dict[str, Any] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "sweep": sweep,
    "dataset": {"summary": dataset_summary, "plot": dataset_plot, "make": dataset_make},
}


def main(args: Sequence[str] | None = None) -> int:
    """
    Read the options, run the command, tell what went wrong in one line.

    :param args: command line after the program's name; that of the process by default
    :return: exit status
    """
    try:
        import tyro
    except ImportError:
        print("The command line needs tyro: pip install 'sb3-diffusion[cli]'.", file=sys.stderr)
        return USER_ERROR

    def group(commands: dict[str, Any]) -> Any:
        members = []
        for name, command in commands.items():
            if isinstance(command, dict):
                about = f"Commands on datasets: {', '.join(command)}."
                members.append(Annotated[group(command), tyro.conf.subcommand(name, description=about)])
            else:
                members.append(Annotated[Any, tyro.conf.subcommand(name, constructor=command)])
        return Union[tuple(members)]  # noqa: UP007

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmExperimentalWarning)  # about tqdm's rich bar, which SB3 uses
            return tyro.cli(
                group(COMMANDS),
                prog="sb3-diffusion",
                description="Diffusion-model reinforcement learning on logged data and live.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except (ValueError, OSError, ImportError, BadZipFile, gym.error.Error) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


# What they share ----------------------------------------------------------------------------------------------------------


class _StopOnSignal(BaseCallback):
    """
    Ends ``learn`` after the running step when the process gets SIGINT (Ctrl-C) or SIGTERM, so that the model can be saved.

    A second signal acts as it would have without this callback.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False
        self._handlers: dict[int, Any] = {}

    def _on_training_start(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_step(self) -> bool:
        return not self.stopped

    def _on_training_end(self) -> None:
        self._restore()


def _algorithm(name: str | None) -> type[Any]:
    from sb3_diffusion import ALGORITHMS

    known = {cls.__name__.lower(): cls for cls in ALGORITHMS.values()}  # dtql, diffusionql
    key = (name or "dtql").lower().replace("_", "").replace("-", "")
    if key not in known:
        raise ValueError(f"There is no algorithm {name!r}; there are: {', '.join(sorted(ALGORITHMS))}.")
    return known[key]


def _load_dataset(source: str, env_id: str | None = None) -> OfflineDataset:
    """The dataset; an environment that the user names decides over the spaces that a file leaves open."""
    from sb3_diffusion.datasets import load_dataset

    known: dict[str, Any] = {}
    if env_id is not None:
        env = gym.make(env_id)
        known = {"env_spec": env.spec, "observation_space": env.observation_space, "action_space": env.action_space}
        env.close()
    try:
        return load_dataset(source, **known)
    except TypeError as error:  # data of a kind that is not supported: not a fault of the program here
        raise ValueError(str(error)) from error


def _policy_for(data: OfflineDataset | None, env_id: str | None) -> str:
    """The policy alias that the observations ask for."""
    from stable_baselines3.common.preprocessing import is_image_space

    if data is not None:
        space = data.observation_space
    else:
        assert env_id is not None
        env = gym.make(env_id)
        space = env.observation_space
        env.close()
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"


def _require_plots() -> Callable[..., Any]:
    """:return: matplotlib's figure class, which draws without a display and without global state"""
    try:
        import scipy  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures and intervals need matplotlib and scipy: pip install 'sb3-diffusion[plots]'.") from error
    return Figure


def _plot_learning_curve(out: Path, data: OfflineDataset, env_id: str) -> None:
    with np.load(out / "evaluations.npz") as evaluations:
        timesteps, returns = evaluations["timesteps"], evaluations["results"]
    figure = _require_plots()(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(timesteps, returns, ".", color="tab:blue", alpha=0.3, markeredgewidth=0)
    axes.plot(timesteps, returns.mean(axis=1), "o-", color="tab:blue", label=f"DTQL, mean of {returns.shape[1]} episodes")
    behavior = data.episode_returns
    axes.axhline(behavior.mean(), color="tab:orange", linestyle="--", label="behaviour, mean of the data")
    axes.axhline(behavior.max(), color="tab:gray", linestyle=":", label="best episode of the data")
    axes.set(xlabel="gradient steps", ylabel="return", xlim=(0, None))
    axes.set_title(f"{env_id}, learned from\n{data.name}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "demo_learning_curve.png", dpi=120)


def _print_comparison(data: OfflineDataset | None, result: EvaluationResult, label: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Return per episode")
    for column in ("", "episodes", "mean", "95 % interval of the mean", "normalised"):
        table.add_column(column, justify="left" if column == "" else "right")

    def add(name: str, returns: np.ndarray, scores: np.ndarray | None) -> None:
        low, high = bootstrap_interval(returns, statistic="mean")
        interval = "" if np.isnan(low) else f"{low:.1f} to {high:.1f}"
        score = "" if scores is None else f"{np.mean(scores):.1f} %"
        table.add_row(name, str(len(returns)), f"{np.mean(returns):.1f}", interval, score)

    if data is not None:
        returns = data.episode_returns
        has_scores = data.ref_min_score is not None and data.ref_max_score is not None
        scores = np.asarray(data.normalized_score(returns)) if has_scores else None
        add("behaviour (the data)", returns, scores)
        best = int(np.argmax(returns))
        add("its best episode", returns[best : best + 1], None if scores is None else scores[best : best + 1])
    add(label, result.returns, result.normalized_scores)
    Console().print(table)


def _to_plain(value: Any) -> Any:
    """NumPy numbers and arrays as JSON knows them."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
