"""Commands on saved models: ``evaluate``, ``record`` and ``package``."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sb3_diffusion.cli.shared import (
    SUCCESS,
    env_of,
    headless,
    load_data,
    load_model,
    print_comparison,
    read_settings,
    require,
)
from sb3_diffusion.evaluation import evaluate as play
from sb3_diffusion.evaluation.video import record_video

if TYPE_CHECKING:
    from sb3_diffusion.datasets import OfflineDataset


def _env_and_data(model: Path, env: str | None, dataset: str | None) -> tuple[str, OfflineDataset | None]:
    """
    :param model: model file; what is not given may stand beside it
    :param env: as the user said
    :param dataset: as the user said
    :return: id of the environment, and the dataset that the user named
    :raises ValueError: if no environment is known
    """
    settings = read_settings(model)
    data = None if dataset is None else load_data(dataset, env)
    env_id = env_of(env, data) or settings.get("env")
    if env_id is None and settings.get("dataset") is not None:
        env_id = env_of(None, load_data(settings["dataset"]))
    if env_id is None:
        raise ValueError("Which environment? Pass --env with a Gymnasium id, or --dataset with one that knows its own.")
    return env_id, data


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
    :param algo: name of the algorithm; by default the file tells
    :param device: cpu, cuda, ... or auto
    :param json: print one JSON object instead of a table
    :return: exit status
    """
    loaded = load_model(model, algo, device=device)
    env_id, data = _env_and_data(model, env, dataset)
    result = play(
        loaded,
        env_id,
        episodes,
        n_envs=n_envs,
        deterministic=not stochastic,
        seed=seed,
        dataset=data,
        progress_bar=not json and sys.stderr.isatty(),
    )
    if not json:
        print_comparison(data, result, model.name)
        return SUCCESS
    report = {"model": str(model), "env": env_id, "seed": seed, "deterministic": not stochastic, **result.to_dict()}
    # JSON knows no NaN, which is what the interval of a single episode is.
    report["mean_interval_95"] = result.confidence_interval(statistic="mean") if episodes > 1 else None
    report["iqm"] = result.iqm
    report["iqm_interval_95"] = result.confidence_interval() if episodes > 1 else None
    print(json_format.dumps(report, allow_nan=False))
    return SUCCESS


def record(
    model: Path,
    /,
    *,
    env: str | None = None,
    dataset: str | None = None,
    out: Path | None = None,
    episodes: int = 1,
    max_steps: int | None = None,
    stochastic: bool = False,
    seed: int | None = None,
    n_action_steps: int | None = None,
    render_dims: tuple[int, ...] = (0, 1),
    algo: str | None = None,
    device: str = "auto",
) -> int:
    """
    Film a saved model: an MP4 and a GIF; the plan of a Diffuser is drawn in.

    Works without a display: MuJoCo then renders by EGL; MUJOCO_GL=osmesa chooses software instead.

    Examples:

        sb3-diffusion record runs/hopper/model.zip --env Hopper-v5
        sb3-diffusion record runs/maze/model.zip --seed 3 --n-action-steps 32 --out film.gif

    :param model: file that was written by model.save
    :param env: Gymnasium id; by default the environment of the dataset, or that of the training
    :param dataset: whose environment to use
    :param out: .mp4 or .gif for one file; without suffix both; by default beside the model
    :param episodes: number of episodes, one after the other
    :param max_steps: cut after so many env steps
    :param stochastic: sample actions instead of taking the deterministic ones
    :param seed: of the environment and of planning
    :param n_action_steps: env steps per plan; by default the model's
    :param render_dims: one or two dimensions of the observation in which the plan is drawn
    :param algo: name of the algorithm; by default the file tells
    :param device: cpu, cuda, ... or auto
    :return: exit status
    """
    require("video", "imageio", "imageio_ffmpeg")
    headless()
    loaded = load_model(model, algo, device=device)
    env_id, _ = _env_and_data(model, env, dataset)
    target = model.with_suffix("") if out is None else out
    paths = [target] if target.suffix else [target.with_suffix(".mp4"), target.with_suffix(".gif")]
    film = record_video(
        loaded,
        env_id,
        *paths,
        n_episodes=episodes,
        max_steps=max_steps,
        deterministic=not stochastic,
        seed=seed,
        n_action_steps=n_action_steps,
        render_dims=render_dims or None,
    )
    returns = ", ".join(f"{value:.1f}" for value in film.returns)
    print(f"{film.n_steps} steps, return {returns}: {', '.join(map(str, film.paths))}")
    return SUCCESS


def package(
    model: Path,
    out: Path,
    /,
    *,
    env: str | None = None,
    dataset: str | None = None,
    episodes: int = 100,
    seed: int = 0,
    license: str = "mit",
    name: str | None = None,
    files: tuple[Path, ...] = (),
    algo: str | None = None,
    device: str = "auto",
) -> int:
    """
    Put a saved model into a folder that a hub takes as it is: the model, its scores, and a card that tells all about it.

    Examples:

        sb3-diffusion package runs/hopper/model.zip hub/dtql-hopper --env Hopper-v5 --files runs/hopper/model.mp4

    :param model: file that was written by model.save
    :param out: folder to make
    :param env: Gymnasium id to evaluate in; by default the environment of the dataset, or that of the training
    :param dataset: that the model learned from; by default that of the train.json beside the model
    :param episodes: of the evaluation
    :param seed: of the evaluation
    :param license: of the model, an id that hubs know, such as mit or cc-by-4.0
    :param name: of the model on its card; that of the folder by default
    :param files: to put beside the model, such as a film
    :param algo: name of the algorithm; by default the file tells
    :param device: cpu, cuda, ... or auto
    :return: exit status
    """
    from sb3_diffusion.hub import write_package

    require("hub", "huggingface_hub")
    loaded = load_model(model, algo, device=device)
    settings = read_settings(model)
    env_id, data = _env_and_data(model, env, dataset or settings.get("dataset"))
    result = play(loaded, env_id, episodes, seed=seed, dataset=data, progress_bar=sys.stderr.isatty())
    commands = settings.get("commands", [])
    write_package(
        loaded, out, env_id=env_id, result=result, dataset=data, commands=commands, license=license, name=name, files=files
    )
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return SUCCESS
