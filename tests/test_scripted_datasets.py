"""The embedded datasets: made on first use, deterministic, of mixed quality, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sb3_diffusion.datasets import DEFAULT_DATASET_ID, EMBEDDED_DATASETS, embedded_dataset, load_dataset, make_env, scripted
from sb3_diffusion.datasets.scripted import Level, run_episode

minari = pytest.importorskip("minari")
pytest.importorskip("h5py")
pytest.importorskip("mujoco")

PENDULUM_ID = "sb3-diffusion/pendulum/mixed-v0"


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests that only read."""
    return tmp_path_factory.mktemp("minari")


@pytest.fixture
def embedded(shared_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the data in the folder of this module."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(shared_root))


@pytest.mark.parametrize("dataset_id", EMBEDDED_DATASETS)
def test_mixture(dataset_id: str, embedded: None):
    recipe = EMBEDDED_DATASETS[dataset_id]
    data = load_dataset(dataset_id)
    assert 20_000 <= len(data) <= 40_000
    assert data.n_episodes == sum(level.n_episodes for level in recipe.levels)
    assert data.env_spec.id == recipe.env_id and data.score_label == "dataset metadata"
    scores = data.normalized_score(data.episode_returns)
    # worse than the best by far on average, but the best is in it
    assert 5 < scores.mean() < 65
    assert scores.max() > 95 and np.quantile(scores, 0.1) < 30
    # the levels are shuffled: no trend over the episodes
    half = len(scores) // 2
    assert abs(scores[:half].mean() - scores[half:].mean()) < 0.5 * scores.std()
    assert (np.abs(data.actions) <= data.action_space.high).all()


def test_default_is_a_mujoco_task_that_terminates(embedded: None):
    data = load_dataset(DEFAULT_DATASET_ID)
    assert data.env_spec.id == "InvertedDoublePendulum-v5"
    assert data.terminations.sum() > 100 and data.truncations.sum() >= 5
    env = make_env(DEFAULT_DATASET_ID)
    data.check_spaces(env.observation_space, env.action_space)
    assert len(env.get_dataset()) == len(data)


@pytest.mark.parametrize("dataset_id", EMBEDDED_DATASETS)
def test_reference_scores_are_what_the_controllers_reach(dataset_id: str):
    recipe = EMBEDDED_DATASETS[dataset_id]
    env, rng = gym.make(recipe.env_id), np.random.default_rng(7)

    def returns(level: Level, n_episodes: int) -> np.ndarray:
        return np.array([sum(run_episode(env, recipe, level, rng).rewards) for _ in range(n_episodes)])

    span = recipe.ref_max_score - recipe.ref_min_score
    best = returns(Level("best", 0, 1.0, 0.0), 4 if recipe.extra else 30)
    worst = returns(Level("random", 0, 0.0, 0.0), 30)
    assert abs(best.mean() - recipe.ref_max_score) < 0.05 * span
    assert abs(worst.mean() - recipe.ref_min_score) < 0.1 * span


def test_levels_are_ordered():
    recipe = EMBEDDED_DATASETS[DEFAULT_DATASET_ID]
    env, rng = gym.make(recipe.env_id), np.random.default_rng(3)
    means = [np.mean([len(run_episode(env, recipe, level, rng).rewards) for _ in range(8)]) for level in recipe.levels]
    assert means == sorted(means, reverse=True)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pendulum's dataset quick to record."""
    recipe = EMBEDDED_DATASETS[PENDULUM_ID]
    levels = tuple(level._replace(n_episodes=1) for level in recipe.levels)
    monkeypatch.setitem(EMBEDDED_DATASETS, PENDULUM_ID, recipe._replace(levels=levels))


def test_deterministic_in_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small(monkeypatch)
    data = []
    for root in ("a", "b"):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / root))
        data.append(load_dataset(PENDULUM_ID))
    other = load_dataset(embedded_dataset(PENDULUM_ID, seed=5))
    assert other.name == "sb3-diffusion/pendulum/mixed-seed5-v0"
    for field in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(data[0], field), getattr(data[1], field))
    assert not np.array_equal(data[0].actions, other.actions)
    assert len(load_dataset(PENDULUM_ID)) == 1000


def test_recorded_once_and_nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from minari.namespace import list_local_namespaces

    small(monkeypatch)
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    embedded_dataset(PENDULUM_ID)
    file = root / PENDULUM_ID / "data" / "main_data.hdf5"
    written = file.stat().st_mtime_ns
    embedded_dataset(PENDULUM_ID)
    assert file.stat().st_mtime_ns == written
    assert [path.name for path in root.iterdir()] == ["sb3-diffusion"]
    assert PENDULUM_ID in minari.list_local_datasets() and "sb3-diffusion" in list_local_namespaces()
    assert os.environ["MINARI_DATASETS_PATH"] == str(root)


def test_interrupted_recording_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small(monkeypatch)
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scripted, "run_episode", stop)
        embedded_dataset(PENDULUM_ID)
    assert not list(root.iterdir())
    assert len(load_dataset(PENDULUM_ID)) == 1000


def _load_length(root: str, barrier: Any, lengths: Any) -> None:
    os.environ["MINARI_DATASETS_PATH"] = root
    barrier.wait()
    lengths.put(len(load_dataset(PENDULUM_ID)))


def test_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small(monkeypatch)
    context = multiprocessing.get_context("fork")
    barrier, lengths = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_load_length, args=(str(tmp_path), barrier, lengths)) for _ in range(2)]
    for worker in workers:
        worker.start()
    got = [lengths.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert got == [1000, 1000]
    assert [path.name for path in tmp_path.iterdir()] == ["sb3-diffusion"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="There is no embedded dataset 'x'"):
        embedded_dataset("x")
    with pytest.raises(ValueError, match="`seed` must be 0 or greater"):
        embedded_dataset(seed=-1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "minari"))
    with pytest.raises(PermissionError, match="set MINARI_DATASETS_PATH to a folder of yours"):
        embedded_dataset(PENDULUM_ID)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"sb3-diffusion\[minari\]"):
        load_dataset(PENDULUM_ID)
