"""Commands on saved models: ``evaluate``, ``record`` and ``package``."""

from __future__ import annotations

import json as json_format
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sb3_diffusion.cli.shared import (
    SUCCESS,
    USER_MISTAKES,
    RecordedEnv,
    env_of,
    headless,
    id_of,
    in_one_line,
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


def _env_and_data(model: Path, env: str | None, dataset: str | None) -> tuple[str | RecordedEnv, OfflineDataset | None]:
    """
    :param model: model file; what is not given is as in the train.json beside it
    :param env: as the user said
    :param dataset: as the user said
    :return: the environment, as an id or as recorded, and the dataset, if there is one
    :raises ValueError: if no environment is known
    """
    settings = read_settings(model)
    if dataset is None:
        env, dataset = env or settings.get("env"), settings.get("dataset")
    data = None if dataset is None else load_data(dataset, env)
    played = env_of(env, data) or settings.get("env")
    if played is None:
        raise ValueError("Which environment? Pass --env with a Gymnasium id, or --dataset with one that knows its own.")
    return played, data


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

    :param model: model file, as train or model.save wrote it
    :param env: Gymnasium id; by default the environment of the dataset, or that of the training
    :param dataset: dataset to compare with; by default that of the train.json beside the model
    :param episodes: number of episodes
    :param n_envs: environments that step together, 10 at most by default
    :param stochastic: sample actions instead of taking the deterministic ones
    :param seed: seed of the environments
    :param algo: algorithm; by default the one that the file names
    :param device: cpu, cuda, ... or auto
    :param json: print one JSON object instead of a table
    :return: exit status
    """
    loaded = load_model(model, algo, device=device)
    played: str | RecordedEnv
    try:
        played, data = _env_and_data(model, env, dataset)
    except USER_MISTAKES as error:
        of_training = env or read_settings(model).get("env")
        if dataset is not None or of_training is None:
            raise
        played, data = of_training, None
        print(f"Without the dataset of the training, which cannot be loaded: {in_one_line(error)}", file=sys.stderr)
    result = play(
        loaded,
        played,
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
    report = {
        "model": str(model),
        "env": id_of(played),
        "dataset": None if data is None else data.name,
        "seed": seed,
        "deterministic": not stochastic,
        **result.to_dict(),
    }
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

    :param model: model file, as train or model.save wrote it
    :param env: Gymnasium id; by default the environment of the dataset, or that of the training
    :param dataset: dataset whose environment to use
    :param out: path that ends in .mp4 or .gif; without a suffix, both are written; by default beside the model
    :param episodes: number of episodes, one after the other
    :param max_steps: stop after this many env steps
    :param stochastic: sample actions instead of taking the deterministic ones
    :param seed: seed of the environment and of planning
    :param n_action_steps: env steps per plan; by default the model's
    :param render_dims: one or two dimensions of the observation to draw the plan in
    :param algo: algorithm; by default the one that the file names
    :param device: cpu, cuda, ... or auto
    :return: exit status
    """
    require("video", "imageio", "imageio_ffmpeg")
    headless()
    loaded = load_model(model, algo, device=device)
    played = env or (read_settings(model).get("env") if dataset is None else None) or _env_and_data(model, env, dataset)[0]
    target = model.with_name(model.name.removesuffix(".zip")) if out is None else out
    named = out is not None and out.suffix != ""
    paths = [target] if named else [target.with_name(target.name + suffix) for suffix in (".mp4", ".gif")]
    film = record_video(
        loaded,
        partial(played, render_mode="rgb_array") if isinstance(played, RecordedEnv) else played,
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
    stochastic: bool = False,
    license: str = "mit",
    name: str | None = None,
    files: tuple[Path, ...] = (),
    algo: str | None = None,
    device: str = "auto",
) -> int:
    """
    Put a saved model into a folder that can be uploaded to a hub: the model, its scores, and a card that describes both.

    Examples:

        sb3-diffusion package runs/hopper/model.zip hub/dtql-hopper --env Hopper-v5 --files runs/hopper/model.mp4

    :param model: model file, as train or model.save wrote it
    :param out: folder to create
    :param env: Gymnasium id to evaluate in; by default the environment of the dataset, or that of the training
    :param dataset: dataset that the model learned from; by default that of the train.json beside the model
    :param episodes: episodes of the evaluation
    :param seed: seed of the evaluation
    :param stochastic: sample actions instead of taking the deterministic ones
    :param license: licence of the model, as an id that hubs know, such as mit or cc-by-4.0
    :param name: name of the model on its card; that of the folder by default
    :param files: files to put beside the model, such as a film
    :param algo: algorithm; by default the one that the file names
    :param device: cpu, cuda, ... or auto
    :return: exit status
    """
    from sb3_diffusion.hub import write_package

    require("hub", "huggingface_hub")
    loaded = load_model(model, algo, device=device)
    settings = read_settings(model)
    played, data = _env_and_data(model, env, dataset)
    result = play(
        loaded, played, episodes, seed=seed, deterministic=not stochastic, dataset=data, progress_bar=sys.stderr.isatty()
    )
    write_package(
        loaded,
        out,
        env_id=id_of(played),
        result=result,
        deterministic=not stochastic,
        dataset=data,
        commands=settings.get("commands", []),
        license=license,
        name=name,
        files=files,
    )
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return SUCCESS
