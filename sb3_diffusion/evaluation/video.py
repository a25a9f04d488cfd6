"""Films of a policy: MP4 and GIF, with the plan drawn in where the model plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_diffusion.datasets.env_specs import register_robotics
from sb3_diffusion.evaluation.episodes import frozen_normalization
from sb3_diffusion.wrappers import VecPlanningWrapper

MAX_FPS = {".mp4": 60.0, ".gif": 20.0}
"""Frames per second at most; of an env that renders more, some are left out, and the film still runs in real time."""
# Longer side of a GIF in pixels; its colours and its size do not bear more.
_GIF_SIDE = 320


class Recording(NamedTuple):
    """
    What was filmed.

    :ivar paths: files written
    :ivar returns: undiscounted return of each episode that was begun; of one that was cut by ``max_steps``, so far
    :ivar n_steps: env steps, all episodes together
    """

    paths: list[Path]
    returns: list[float]
    n_steps: int


def record_video(
    model: PolicyPredictor,
    env: str | Callable[[], gym.Env],
    *paths: str | PathLike[str],
    n_episodes: int = 1,
    max_steps: int | None = None,
    deterministic: bool = True,
    seed: int | None = None,
    n_action_steps: int | None = None,
    render_dims: tuple[int, ...] | None = (0, 1),
) -> Recording:
    """
    Film whole episodes.

    A model that plans (it has ``plan``, as Diffuser) acts through a
    [VecPlanningWrapper][sb3_diffusion.VecPlanningWrapper], which draws planned against realised states into the frames.
    Statistics of a ``VecNormalize`` that the model was trained under are applied, frozen.

    :param model: anything with SB3's ``predict``
    :param env: Gymnasium id, made with ``render_mode="rgb_array"``, or a function that makes an env that renders so
    :param paths: files to write; ``.mp4`` or ``.gif`` each
    :param n_episodes: number of episodes, one after the other in the same film
    :param max_steps: cut after so many env steps in all; None for whole episodes
    :param deterministic: passed to ``predict``; plans are seeded by ``seed`` instead
    :param seed: of the env and of planning
    :param n_action_steps: actions executed per plan; None: the model's own ``n_action_steps``, else 1
    :param render_dims: one or two dimensions of the observation that the plan is drawn in; None for no plan
    :return: files, returns and number of steps
    :raises ValueError: on other suffixes, counts below 1, or an env that renders no RGB frames
    :raises ImportError: without imageio and ffmpeg; names the extra to install
    """
    targets = [Path(path) for path in paths]
    if not targets or any(path.suffix not in MAX_FPS for path in targets):
        raise ValueError(f"Expected paths that end in .mp4 or .gif: got {[str(path) for path in targets]}.")
    if n_episodes < 1 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"`n_episodes` and `max_steps` must be at least 1: got {n_episodes} and {max_steps}.")

    if isinstance(env, str):
        register_robotics(env)

    def make() -> gym.Env:
        return Monitor(gym.make(env, render_mode="rgb_array") if isinstance(env, str) else env())

    venv = DummyVecEnv([make])
    try:
        if venv.render_mode != "rgb_array":
            raise ValueError(f'The env must render frames: expected render_mode="rgb_array", got {venv.render_mode!r}.')
        fps = float(venv.metadata.get("render_fps") or 30.0)  # type: ignore[arg-type]
        with frozen_normalization(model, venv) as normalized, ExitStack() as stack:
            films = [stack.enter_context(_Film(path, fps)) for path in targets]
            plans = callable(getattr(model, "plan", None))
            if plans:
                own_steps: int = getattr(model, "n_action_steps", 1)
                steps = own_steps if n_action_steps is None else n_action_steps
                normalized = VecPlanningWrapper(normalized, model, steps, render_dims=render_dims)
            if seed is not None:
                normalized.seed(seed)
            policy = None if plans else model
            returns, n_steps = _play(normalized, policy, films, n_episodes, max_steps, deterministic)
    finally:
        venv.close()
    return Recording(targets, returns, n_steps)


def _play(
    venv: VecEnv,
    policy: PolicyPredictor | None,
    films: list[_Film],
    n_episodes: int,
    max_steps: int | None,
    deterministic: bool,
) -> tuple[list[float], int]:
    """
    :param venv: one env
    :param policy: None if the env acts by plans of its own
    :param films: get a frame per step
    :param n_episodes: to play
    :param max_steps: in all, or None
    :param deterministic: passed to ``predict``
    :return: returns, and number of steps
    """
    observations = venv.reset()
    returns: list[float] = []
    state, starts, so_far, n_steps = None, np.ones(1, bool), 0.0, 0
    while len(returns) < n_episodes and (max_steps is None or n_steps < max_steps):
        actions = None
        if policy is not None:
            actions, state = policy.predict(observations, state=state, episode_start=starts, deterministic=deterministic)  # type: ignore[arg-type]
        wanted = [film for film in films if film.takes(n_steps)]
        if wanted:
            frame = np.asarray(venv.get_images()[0])
            for film in wanted:
                film.add(frame)
        observations, rewards, starts, _ = venv.step(actions)  # type: ignore[arg-type]
        so_far, n_steps = so_far + float(rewards[0]), n_steps + 1
        if starts[0]:
            returns.append(so_far)
            so_far = 0.0
    return [*returns, *([] if starts[0] else [so_far])], n_steps


class _Film:
    """
    A file that frames go to one by one.

    :param path: ends in ``.mp4`` or ``.gif``
    :param fps: frames per second that come
    """

    def __init__(self, path: Path, fps: float) -> None:
        try:
            import imageio.v2 as imageio
            import imageio_ffmpeg  # noqa: F401
        except ImportError as error:
            raise ImportError("Films need imageio and ffmpeg: pip install 'sb3-diffusion[video]'.") from error
        self.path = path
        self.is_gif = path.suffix == ".gif"
        self.every = math.ceil(fps / MAX_FPS[path.suffix])
        path.parent.mkdir(parents=True, exist_ok=True)
        fps = fps / self.every
        # H.264 wants even sides; the writer would round up to 16 and blur.
        settings: dict[str, Any] = (
            {"duration": 1000.0 / fps, "loop": 0} if self.is_gif else {"fps": fps, "macro_block_size": 2}
        )
        self._writer = imageio.get_writer(path, **settings)

    def __enter__(self) -> _Film:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self._writer.close()
        if error is not None and error is not KeyboardInterrupt:
            self.path.unlink(missing_ok=True)

    def takes(self, step: int) -> bool:
        """:return: whether the frame of this env step, counted from 0, belongs to the film"""
        return step % self.every == 0

    def add(self, frame: np.ndarray) -> None:
        """
        :param frame: RGB, ``(height, width, 3)``
        """
        shrink = math.ceil(max(frame.shape[:2]) / _GIF_SIDE) if self.is_gif else 1
        self._writer.append_data(_shrunk(frame, shrink))


def _shrunk(frame: np.ndarray, factor: int) -> np.ndarray:
    """:return: means of squares of ``factor`` pixels; rows and columns left over are cut off"""
    if factor == 1:
        return frame
    height, width = (size // factor for size in frame.shape[:2])
    squares = frame[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return squares.mean(axis=(1, 3)).round().astype(np.uint8)
