"""Commands that train: ``demo`` and ``train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv

from sb3_diffusion.cli.shared import (
    INTERRUPTED,
    SETTINGS_FILE,
    SUCCESS,
    RecordedEnv,
    StopOnSignal,
    env_of,
    find_algorithm,
    load_data,
    make_model,
    model_path,
    policy_for,
    print_comparison,
    read_changes,
    read_settings,
    require,
)
from sb3_diffusion.common.model_file import saved_class_name
from sb3_diffusion.common.utils import check_range
from sb3_diffusion.evaluation import evaluate
from sb3_diffusion.evaluation.protocol import command_line
from sb3_diffusion.plotting import BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from sb3_diffusion.common.base_class import OfflineAlgorithm
    from sb3_diffusion.datasets import OfflineDataset

DEFAULTS: dict[str, Any] = {
    "online": False,
    "steps": 100_000,
    "eval_every": 0,
    "episodes": 10,
    "stochastic": False,
    "save_every": 0,
    "log": [],
}
"""Options of ``train`` that are neither given nor known from the run that is resumed."""
DEMO_EVALUATIONS = 8
# Smaller networks than the default ones, for a small task on a small machine.
DEMO_SETTINGS: dict[str, Any] = {"normalize_observations": True, "policy_kwargs": {"net_arch": [128, 128]}}


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
    :param seed: random seed of training and evaluation
    :return: exit status
    """
    from sb3_diffusion import DTQL
    from sb3_diffusion.datasets import DEFAULT_DATASET_ID

    require("plots", "matplotlib", "scipy")
    check_range("--steps", steps, 1)
    check_range("--episodes", episodes, 1)
    _check_unfinished(out)
    data = load_data(dataset or DEFAULT_DATASET_ID)
    if data.env_spec is None:
        raise ValueError(f"The dataset {data.name!r} does not say which environment it comes from; choose one that does.")
    env_id = data.env_spec.id
    out.mkdir(parents=True, exist_ok=True)
    print(data)
    print(f"Training DTQL on it: {steps} gradient steps, {DEMO_EVALUATIONS} evaluations in {env_id} on the way.")
    model = DTQL("MlpPolicy", None, dataset=data, seed=seed, **DEMO_SETTINGS)
    played = RecordedEnv(data, data.env_spec)
    eval_env = make_vec_env(played, 10, seed=seed + 1_000)
    curve = EvalCallback(
        eval_env, n_eval_episodes=10, eval_freq=max(1, steps // DEMO_EVALUATIONS), log_path=str(out), verbose=0
    )
    model.learn(steps, callback=curve, progress_bar=True)
    eval_env.close()
    result = evaluate(model, played, episodes, seed=seed + 2_000, dataset=data, progress_bar=True)
    model.save(out / "model")
    picture = _plot_learning_curve(out, data, env_id)
    print_comparison(data, result, f"DTQL after {steps} steps")
    print(f"Learning curve: {picture}")
    print(f"Model:          {out / 'model.zip'}")
    return SUCCESS


def _plot_learning_curve(out: Path, data: OfflineDataset, env_id: str) -> Path:
    with np.load(out / "evaluations.npz") as evaluations:
        timesteps, returns = evaluations["timesteps"], evaluations["results"]
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    axes.plot(timesteps, returns, ".", color=BLUE, alpha=0.3, markeredgewidth=0)
    axes.plot(timesteps, returns.mean(axis=1), "o-", color=BLUE, label=f"DTQL, mean of {returns.shape[1]} episodes")
    behavior = data.episode_returns
    axes.axhline(behavior.mean(), color=ORANGE, linestyle="--", label="behaviour, mean of the data")
    axes.axhline(behavior.max(), color=GREY, linestyle=":", label="best episode of the data")
    axes.set(xlabel="gradient steps", ylabel="return", xlim=(0, None))
    axes.set_title(f"{env_id}, learned from\n{data.name}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save_figure(figure, out / "demo_learning_curve.png")


def train(
    *,
    algo: str | None = None,
    dataset: str | None = None,
    env: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    online: bool = False,
    policy: str | None = None,
    preset: str | None = None,
    set: tuple[str, ...] = (),
    device: str = "auto",
    eval_every: int | None = None,
    episodes: int | None = None,
    stochastic: bool = False,
    save_every: int | None = None,
    log: tuple[Literal["csv", "json", "log", "tensorboard"], ...] = (),
) -> int:
    """
    Train an algorithm on a dataset, in an environment, or first on the one and then in the other.

    Ctrl-C (or SIGTERM) stops after the running step and writes interrupted.zip, from which --resume goes on exactly.

    Examples:

        sb3-diffusion train --dataset mujoco/hopper/medium-v0 --steps 200000 --seed 0 --out runs/hopper
        sb3-diffusion train --resume runs/hopper/interrupted.zip
        sb3-diffusion train --resume runs/hopper/model.zip --online --steps 250000 --out runs/hopper_online
        sb3-diffusion train --algo diffusion_ql --env Pendulum-v1 --steps 20000 --set n_diffusion_steps=10 batch_size=128

    :param algo: algorithm, such as dtql or diffusion_ql; dtql by default
    :param dataset: Minari id, D4RL name, or path of an .hdf5 (D4RL's layout), .npz or .mmap; without one, training is online
    :param env: Gymnasium id; by default the environment of the dataset
    :param steps: timesteps in total, with those before --resume; gradient steps offline, env steps online; 100,000 by default
    :param seed: random seed; with --resume that of the evaluations alone
    :param out: folder for the results, ./sb3_diffusion_run by default; with --resume that of the file
    :param resume: model file to go on from; all options that are not given are those of the train.json beside it
    :param online: step the environment although there is a dataset (fine-tuning); what is resumed from such a run does so too
    :param policy: MlpPolicy, CnnPolicy or MultiInputPolicy; by default the one that fits the observations
    :param preset: published settings of a task, such as hopper-medium, instead of the defaults
    :param set: further constructor arguments as name=value, such as policy_kwargs.net_arch=[64,64] or learning_rate=lin_3e-4
    :param device: cpu, cuda, ... or auto
    :param eval_every: timesteps between evaluations on the way, which also keep best_model.zip; 0, the default, for none
    :param episodes: episodes per evaluation, 10 by default; 0 for no evaluation at the end
    :param stochastic: evaluate with sampled actions instead of the deterministic ones, best_model.zip too
    :param save_every: timesteps between checkpoints to resume from; 0, the default, for none
    :param log: formats of the log in the folder
    :return: exit status
    """
    settings: dict[str, Any] = {
        "algo": algo,
        "dataset": dataset,
        "env": env,
        "seed": seed,
        "online": online or None,
        "steps": steps,
        "eval_every": eval_every,
        "episodes": episodes,
        "stochastic": stochastic or None,
        "save_every": save_every,
        "log": list(log) or None,
    }
    commands: list[str] = []
    if resume is not None:
        resume = model_path(resume)
        if policy is not None or preset is not None or set:
            raise ValueError("--policy, --preset and --set are for new models; one that is resumed has them in its file.")
        before = read_settings(resume)
        settings = {key: before.get(key) if value is None else value for key, value in settings.items()}
        commands = before.get("commands", [])
        settings["algo"] = settings["algo"] or saved_class_name(resume)
        out = out or resume.parent
    settings = {key: DEFAULTS.get(key) if value is None else value for key, value in settings.items()}
    for option in ("eval_every", "episodes", "save_every"):
        check_range(f"--{option.replace('_', '-')}", settings[option], 0)
    steps, episodes, online = settings["steps"], settings["episodes"], settings["online"]
    deterministic = not settings["stochastic"]
    out = out or Path("sb3_diffusion_run")
    if resume != out / "model.zip":
        _check_unfinished(out)
    algorithm = find_algorithm(settings["algo"])
    data = None if settings["dataset"] is None else load_data(settings["dataset"], settings["env"])
    if data is None and settings["env"] is None:
        raise ValueError("There is nothing to learn from: pass --dataset, --env or both.")

    if resume is None:
        policy = policy or policy_for(data, settings["env"])
        arguments = dict(dataset=data, seed=settings["seed"], device=device, verbose=1)
        model = make_model(algorithm, policy, settings["env"], preset, read_changes(set), **arguments)
    else:
        model = algorithm.load(resume, env=settings["env"], dataset=data, device=device)
        replay_file = _replay_file(resume)
        if replay_file.is_file():
            model.load_replay_buffer(replay_file)
    if steps <= model.num_timesteps:
        raise ValueError(
            f"`--steps` must be more than the {model.num_timesteps} timesteps that the model already has, these included: "
            f"got {steps}."
        )

    out.mkdir(parents=True, exist_ok=True)
    settings["commands"] = [*commands, command_line()]
    (out / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if settings["log"]:
        model.set_logger(configure(str(out / f"log_from_{model.num_timesteps}"), ["stdout", *settings["log"]]))
    offline = False if online or data is None else None
    stop = StopOnSignal()
    callbacks: list[BaseCallback] = [stop]
    played = env_of(settings["env"], data)
    if settings["eval_every"] > 0 and played is not None:
        eval_env = make_vec_env(played, max(1, min(episodes, 10)), seed=settings["seed"])
        curve = _evaluations(eval_env, max(1, episodes), settings["eval_every"], out, model.num_timesteps, deterministic)
        callbacks.append(curve)
    if settings["save_every"] > 0:
        callbacks.append(_Checkpoints(settings["save_every"], out, with_replay_buffer=offline is False))
    model.learn(steps - model.num_timesteps, callback=callbacks, reset_num_timesteps=False, progress_bar=True, offline=offline)
    if stop.stopped and model.num_timesteps < steps:
        _save_to_resume(model, out / "interrupted.zip", with_replay_buffer=offline is False)
        print(f"Interrupted at {model.num_timesteps} of {steps} timesteps. To go on:")
        print(f"  sb3-diffusion train --resume {out / 'interrupted.zip'}")
        return INTERRUPTED
    model.save(out / "model")
    print(f"Model: {out / 'model.zip'}")
    if episodes > 0 and played is not None:
        if stop.stopped:
            print("Interrupted before the last evaluation. To make it:")
            print(f"  sb3-diffusion evaluate {out / 'model.zip'}")
            return INTERRUPTED
        result = evaluate(
            model, played, episodes, deterministic=deterministic, seed=settings["seed"], dataset=data, progress_bar=True
        )
        print_comparison(data, result, f"{algorithm.__name__} after {model.num_timesteps} steps")
    return SUCCESS


def _check_unfinished(out: Path) -> None:
    """:raises FileExistsError: if the folder holds a model that would be overwritten"""
    if (out / "model.zip").exists():
        raise FileExistsError(f"{out} already holds a finished model.zip: choose another folder with --out.")


def _replay_file(model_file: Path) -> Path:
    """Where the replay buffer of a checkpoint is; a finished model has none."""
    return model_file.with_name(f"{model_file.stem}_replay_buffer.zip")


def _save_to_resume(model: OfflineAlgorithm, path: Path, with_replay_buffer: bool) -> None:
    if with_replay_buffer:
        model.save_replay_buffer(_replay_file(path))
    model.save(path)


class _Checkpoints(BaseCallback):
    """
    Writes ``checkpoint.zip`` again and again, with what is needed to go on from it.

    :param every: timesteps between two of them
    :param folder: to write to
    :param with_replay_buffer: online runs need it
    """

    def __init__(self, every: int, folder: Path, with_replay_buffer: bool) -> None:
        super().__init__()
        self.every, self.path, self.with_replay_buffer = every, folder / "checkpoint.zip", with_replay_buffer

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            _save_to_resume(self.model, self.path, self.with_replay_buffer)  # type: ignore[arg-type]
        return True


def _evaluations(eval_env: VecEnv, episodes: int, every: int, out: Path, start: int, deterministic: bool) -> EvalCallback:
    """
    :param eval_env: to evaluate in
    :param episodes: per evaluation
    :param every: timesteps between evaluations
    :param out: folder of ``evaluations.npz`` and ``best_model.zip``
    :param start: timesteps that the model has; evaluations up to there are kept
    :param deterministic: passed to ``predict``
    :return: SB3's callback, which goes on where an interrupted run stopped
    """
    callback = EvalCallback(
        eval_env,
        n_eval_episodes=episodes,
        eval_freq=every,
        log_path=str(out),
        best_model_save_path=str(out),
        deterministic=deterministic,
    )
    callback.n_calls = start
    earlier = out / "evaluations.npz"
    if start > 0 and earlier.is_file():
        with np.load(earlier) as known:
            done = known["timesteps"] <= start
            callback.evaluations_timesteps = known["timesteps"][done].tolist()
            callback.evaluations_results = known["results"][done].tolist()
            callback.evaluations_length = known["ep_lengths"][done].tolist()
            if "successes" in known:  # of the last evaluations, if not of all
                callback.evaluations_successes = known["successes"][done[-len(known["successes"]) :]].tolist()
        callback.best_mean_reward = max((float(np.mean(row)) for row in callback.evaluations_results), default=-np.inf)
    return callback
