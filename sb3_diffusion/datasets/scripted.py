"""
Embedded datasets: scripted controllers of deliberately mixed quality, recorded on first use.

They need no download and take seconds. The better controller is in the data, most episodes come from worse ones, so that a
method which only imitates the average has something to improve on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from sb3_diffusion.datasets.minari_dataset import MINARI_EXTRA, minari_root, open_minari

NAMESPACE = "sb3-diffusion"

# Linear-quadratic regulator of InvertedDoublePendulum-v5 around the upright state: discrete time (0.05 s), dynamics
# linearised by central differences, state (cart, angle 1, angle 2, and their velocities) weighted by
# (1, 10, 10, 0.1, 0.1, 0.1), action weighted by 1.
_DOUBLE_PENDULUM_GAINS = np.array([0.2128, 1.8131, 5.5687, 0.3149, 0.9024, 0.8482])
# Energy of the upright, resting pendulum of Pendulum-v1 (mass 1, length 1, g = 10), with E = w^2 / 6 + 5 cos(angle).
_PENDULUM_UPRIGHT_ENERGY = 5.0


class Level(NamedTuple):
    """
    One quality of behaviour in a mixture.

    :ivar name: what it is called in the description of the dataset
    :ivar n_episodes: number of episodes
    :ivar gain: factor on the controller's gains: 1 is right, below it the controller is too weak; 0 means random actions
    :ivar noise: standard deviation of the noise on the action, as a share of half the range
    :ivar correlation: of the noise from one step to the next
    """

    name: str
    n_episodes: int
    gain: float
    noise: float
    correlation: float = 0.0


class Recipe(NamedTuple):
    """
    How an embedded dataset is made.

    :ivar env_id: Gymnasium environment
    :ivar controller: from observation and gain to an action in env units
    :ivar levels: the mixture
    :ivar ref_min_score: mean return of uniformly random actions, measured over 1000 episodes
    :ivar ref_max_score: mean return of the controller with gain 1 without noise, over at least 300 episodes
    :ivar extra: extra to install for the environment, if any
    """

    env_id: str
    controller: Callable[[np.ndarray, float], np.ndarray]
    levels: tuple[Level, ...]
    ref_min_score: float
    ref_max_score: float
    extra: str | None = None


def balance_double_pendulum(observation: np.ndarray, gain: float) -> np.ndarray:
    """
    Balance the double pendulum on its cart by linear state feedback.

    :param observation: of InvertedDoublePendulum-v5, shape (9,): cart, sines, cosines, velocities, constraint force
    :param gain: factor on the gains of the linear-quadratic regulator
    :return: action, shape (1,), not clipped
    """
    angles = np.arctan2(observation[1:3], observation[3:5])
    state = np.concatenate([observation[:1], angles, observation[5:8]])
    return np.array([-gain * float(_DOUBLE_PENDULUM_GAINS @ state)])


def swing_up_pendulum(observation: np.ndarray, gain: float) -> np.ndarray:
    """
    Swing a pendulum up by bringing its energy to that of the upright state, there hold it by proportional-derivative control.

    :param observation: of Pendulum-v1, shape (3,): cosine, sine, angular velocity; the angle is 0 at the top
    :param gain: factor on all gains
    :return: torque, shape (1,), not clipped
    """
    cosine, sine, velocity = map(float, observation)
    angle = np.arctan2(sine, cosine)
    if abs(angle) < 0.6 and abs(velocity) < 4.0:
        return np.array([-gain * (12.0 * angle + 3.0 * velocity)])
    missing = _PENDULUM_UPRIGHT_ENERGY - (velocity**2 / 6.0 + 5.0 * cosine)
    return np.array([gain * 2.0 * missing * (1.0 if velocity >= 0.0 else -1.0)])


DEFAULT_DATASET_ID = f"{NAMESPACE}/inverteddoublependulum/mixed-v0"

# What `load_dataset` can make by itself.
EMBEDDED_DATASETS: dict[str, Recipe] = {
    DEFAULT_DATASET_ID: Recipe(
        "InvertedDoublePendulum-v5",
        balance_double_pendulum,
        (
            Level("expert", 10, 1.0, 0.05),
            Level("sloppy", 40, 1.0, 0.2, 0.5),
            Level("weak", 60, 0.7, 0.1),
            Level("feeble", 30, 0.6, 0.1),
            Level("random", 30, 0.0, 0.0),
        ),
        ref_min_score=46.7,
        ref_max_score=9359.9,
        extra="mujoco",
    ),
    f"{NAMESPACE}/pendulum/mixed-v0": Recipe(
        "Pendulum-v1",
        swing_up_pendulum,
        (
            Level("expert", 15, 1.0, 0.05),
            Level("sloppy", 25, 1.0, 0.5, 0.5),
            Level("weak", 50, 0.3, 0.1),
            Level("feeble", 40, 0.1, 0.1),
            Level("random", 20, 0.0, 0.0),
        ),
        ref_min_score=-1222.5,
        ref_max_score=-151.3,
    ),
}


def embedded_dataset(dataset_id: str = DEFAULT_DATASET_ID, seed: int = 0) -> Any:
    """
    Open an embedded dataset; record it first if it is not on this machine yet.

    It is written by Minari itself into Minari's folder (``MINARI_DATASETS_PATH``, or ``~/.minari/datasets``), whole
    or not at all: two processes may ask for it at the same time. The same seed gives the same data.

    :param dataset_id: a key of ``EMBEDDED_DATASETS``
    :param seed: of environment and noise; other seeds than 0 are stored under an id of their own (``mixed-seed3-v0``)
    :return: the ``minari.MinariDataset``
    :raises ValueError: for an unknown id or a negative seed
    :raises ImportError: if minari or the environment's package is missing; names the extra to install
    :raises PermissionError: if Minari's folder cannot be written
    """
    if dataset_id not in EMBEDDED_DATASETS:
        raise ValueError(f"There is no embedded dataset {dataset_id!r}: choose one of {', '.join(EMBEDDED_DATASETS)}.")
    if seed < 0:
        raise ValueError(f"`seed` must be 0 or greater: got {seed}.")
    recipe = EMBEDDED_DATASETS[dataset_id]
    if seed:
        stem, _, version = dataset_id.rpartition("-")
        dataset_id = f"{stem}-seed{seed}-{version}"
    root = minari_root()
    if not (root / dataset_id / "data").is_dir():
        _make(recipe, dataset_id, seed, root)
    return open_minari(dataset_id)


def _make(recipe: Recipe, dataset_id: str, seed: int, root: Path) -> None:
    """
    Record a dataset beside its place and move it there when it is complete.

    :param recipe: how
    :param dataset_id: under which id
    :param seed: of environment and noise
    :param root: Minari's folder
    """
    try:
        import minari  # noqa: F401
    except ImportError as error:
        raise ImportError(MINARI_EXTRA) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        # on the same file system, so that moving is one step; hidden, so that Minari does not list it
        build = Path(tempfile.mkdtemp(prefix=".recording-", dir=root))
    except OSError as error:
        raise PermissionError(
            f"The embedded dataset {dataset_id!r} must be recorded into {root}, which cannot be written ({error}): set "
            "MINARI_DATASETS_PATH to a folder of yours."
        ) from error
    try:
        with _minari_root_at(build):
            _record(recipe, dataset_id, seed)
        target = root / dataset_id
        target.parent.mkdir(parents=True, exist_ok=True)
        for marker in sorted(build.rglob("namespace_metadata.json")):
            place = root / marker.relative_to(build)
            if not place.exists():
                shutil.copyfile(marker, place)
        try:
            os.rename(build / dataset_id, target)
        except OSError:
            # another process was quicker; its data is the same
            if not (target / "data").is_dir():
                raise
    finally:
        shutil.rmtree(build, ignore_errors=True)


@contextmanager
def _minari_root_at(folder: Path) -> Iterator[None]:
    """
    Let Minari write into another folder for a while.

    :param folder: where to
    """
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _record(recipe: Recipe, dataset_id: str, seed: int) -> None:
    """
    Run the mixture of controllers, episodes of all levels shuffled, and let Minari write it.

    :param recipe: how
    :param dataset_id: under which id
    :param seed: of environment and noise
    """
    from minari import create_dataset_from_buffers
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(seed)
    levels = [level for level in recipe.levels for _ in range(level.n_episodes)]
    mixture = ", ".join(f"{level.n_episodes} {level.name}" for level in recipe.levels)
    env = _make_recorded_env(recipe)
    try:
        episodes = [run_episode(env, recipe, levels[index], rng) for index in rng.permutation(len(levels))]
        create_dataset_from_buffers(
            dataset_id,
            [
                EpisodeBuffer(
                    seed=episode.seed,
                    observations=episode.observations,
                    actions=episode.actions,
                    rewards=episode.rewards,
                    terminations=episode.terminations,
                    truncations=episode.truncations,
                    infos={},
                )
                for episode in episodes
            ],
            env=env,
            eval_env=env,
            algorithm_name="scripted controllers of mixed quality",
            author="sb3_diffusion",
            author_email="none",
            code_permalink="none",
            ref_min_score=recipe.ref_min_score,
            ref_max_score=recipe.ref_max_score,
            description=f"Episodes in random order: {mixture}. Recorded by sb3_diffusion with seed {seed}.",
            data_format="hdf5",
        )
    finally:
        env.close()


class RecordedEpisode(NamedTuple):
    """
    What one episode of T steps left.

    :ivar seed: that the environment was reset with
    :ivar observations: T + 1 arrays
    :ivar actions: T arrays in env units
    :ivar rewards: T numbers
    :ivar terminations: T flags
    :ivar truncations: T flags
    """

    seed: int
    observations: list[np.ndarray]
    actions: list[np.ndarray]
    rewards: list[float]
    terminations: list[bool]
    truncations: list[bool]


def run_episode(env: gym.Env, recipe: Recipe, level: Level, rng: np.random.Generator) -> RecordedEpisode:
    """
    Run one episode of one level.

    :param env: environment of the recipe
    :param recipe: gives the controller
    :param level: how well it acts
    :param rng: of the start and the noise
    :return: the whole episode
    """
    space = env.action_space
    assert isinstance(space, gym.spaces.Box)
    half = 0.5 * (space.high - space.low)
    seed = int(rng.integers(2**31))
    observation, _ = env.reset(seed=seed)
    episode = RecordedEpisode(seed, [observation], [], [], [], [])
    noise, done = np.zeros(space.shape), False
    while not done:
        fresh = rng.standard_normal(space.shape)
        noise = level.correlation * noise + np.sqrt(1.0 - level.correlation**2) * fresh
        if level.gain == 0.0:
            action = rng.uniform(space.low, space.high)
        else:
            action = recipe.controller(observation, level.gain) + level.noise * half * noise
        action = np.clip(action, space.low, space.high).astype(space.dtype)
        observation, reward, terminated, truncated, _ = env.step(action)
        episode.observations.append(observation)
        episode.actions.append(action)
        episode.rewards.append(float(reward))
        episode.terminations.append(terminated)
        episode.truncations.append(truncated)
        done = terminated or truncated
    return episode


def _make_recorded_env(recipe: Recipe) -> gym.Env:
    """
    :param recipe: names the environment
    :return: the environment
    :raises ImportError: if its package is missing
    """
    try:
        return gym.make(recipe.env_id)
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        raise ImportError(
            f'{recipe.env_id} needs a package that is missing ({error}): pip install "sb3-diffusion[{recipe.extra}]"'
        ) from error
