"""Fixtures of the suite that every algorithm passes, see `algos.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algos import ALGOS, VARIANTS, AlgoSpec
from envs import POINT_ENV, POINT_GOAL_ENV
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.envs import FakeImageEnv

from sb3_diffusion import OfflineDataset, load_dataset

th.set_num_threads(1)  # the networks are small, and the workers of pytest-xdist share the cores

BOX_ID, GOAL_ID = "tests/point/random-v0", "tests/point/goal-v0"


@pytest.fixture(params=ALGOS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> AlgoSpec:
    """Each algorithm of the registry."""
    return request.param


@pytest.fixture(params=VARIANTS, ids=lambda spec: spec.name)
def variant(request: pytest.FixtureRequest) -> AlgoSpec:
    """Each algorithm of the registry, and further settings of them."""
    return request.param


def record(env: gym.Env, dataset_id: str, n_episodes: int = 8) -> None:
    """Record random episodes and write them by Minari itself."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    env.action_space.seed(0)
    episodes = []
    for seed in range(n_episodes):
        observations, steps, done = [env.reset(seed=seed)[0]], [], False
        while not done:
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            observations.append(observation)
            steps.append((action, reward, terminated, truncated))
            done = terminated or truncated
        actions, rewards, terminations, truncations = (np.stack(column) for column in zip(*steps, strict=True))
        if isinstance(observations[0], dict):
            observations = {key: np.stack([o[key] for o in observations]) for key in observations[0]}  # type: ignore[assignment]
        else:
            observations = np.stack(observations)  # type: ignore[assignment]
        episodes.append(
            EpisodeBuffer(
                observations=observations,
                actions=actions,
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
                infos={},
            )
        )
    with pytest.warns(UserWarning):  # it misses an author
        minari.create_dataset_from_buffers(dataset_id, episodes, env=env, data_format="hdf5")
    env.close()


@pytest.fixture(scope="session")
def minari_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Minari with the datasets ``BOX_ID`` and ``GOAL_ID``."""
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        record(gym.make(POINT_ENV), BOX_ID)
        record(gym.make(POINT_GOAL_ENV), GOAL_ID)
    return folder


@pytest.fixture
def minari_ids(minari_folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Ids of the two datasets, with Minari pointed to their folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_folder))
    return BOX_ID, GOAL_ID


def _loaded(folder: Path, dataset_id: str) -> OfflineDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        return load_dataset(dataset_id)


@pytest.fixture(scope="session")
def box_dataset(minari_folder: Path) -> OfflineDataset:
    """Random steps of the point environment with flat observations."""
    return _loaded(minari_folder, BOX_ID)


@pytest.fixture(scope="session")
def goal_dataset(minari_folder: Path) -> OfflineDataset:
    """Random steps of the point environment with the observations of goal environments."""
    return _loaded(minari_folder, GOAL_ID)


def image_env() -> gym.Env:
    """Images with the channels last, as cameras give them."""
    return FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)


@pytest.fixture(scope="session")
def image_dataset() -> OfflineDataset:
    """Random images in SB3's replay buffer."""
    env = image_env()
    buffer = ReplayBuffer(32, env.observation_space, env.action_space)
    env.observation_space.seed(0)
    env.action_space.seed(0)
    for step in range(32):
        images = [env.observation_space.sample() for _ in range(2)]
        done = step % 8 == 7
        info = [{"TimeLimit.truncated": done}]
        buffer.add(images[0], images[1], env.action_space.sample()[None], np.array([1.0]), np.array([done]), info)
    return load_dataset(buffer)


@pytest.fixture
def random_dataset() -> Callable[..., OfflineDataset]:
    """Makes datasets of random steps for any spaces."""

    def make(observation_space: spaces.Space, action_space: spaces.Box, n_steps: int = 48, length: int = 12) -> OfflineDataset:
        observation_space.seed(0)
        action_space.seed(0)
        timeouts = np.arange(1, n_steps + 1) % length == 0

        def draw() -> Any:
            samples = [observation_space.sample() for _ in range(n_steps)]
            if isinstance(observation_space, spaces.Dict):
                return {key: np.stack([sample[key] for sample in samples]) for key in observation_space.spaces}
            return np.stack(samples)

        actions = np.stack([action_space.sample() for _ in range(n_steps)])
        rewards = np.linspace(-1.0, 1.0, n_steps)
        arrays = (draw(), actions, rewards, draw(), np.zeros(n_steps, bool), timeouts)
        return OfflineDataset(*arrays, observation_space=observation_space, action_space=action_space)

    return make
