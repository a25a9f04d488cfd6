"""Datasets into files and back: equality of everything through the real writers and readers."""

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces

from sb3_diffusion import OfflineDataset, load_dataset
from sb3_diffusion.datasets import write_dataset, write_minari

TARGETS = ["folder/log.hdf5", "folder/log.npz", "written/log/any-v0"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def make(observation_space: spaces.Space, action_space: spaces.Box, env_id: str | None = None) -> OfflineDataset:
    """Episodes of 5, 1 and 3 steps whose steps follow each other; the second one terminates."""
    observation_space.seed(0)
    action_space.seed(0)
    lengths = [5, 1, 3]

    def rows(samples: list) -> object:
        if isinstance(samples[0], dict):
            return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        return np.stack(samples)

    episodes = [[observation_space.sample() for _ in range(length + 1)] for length in lengths]
    ends = np.cumsum(lengths) - 1
    terminations, truncations = np.zeros((2, sum(lengths)), bool)
    terminations[ends[1]] = truncations[ends[0]] = truncations[ends[2]] = True
    return OfflineDataset(
        rows([o for episode in episodes for o in episode[:-1]]),
        np.stack([action_space.sample() for _ in range(sum(lengths))]),
        np.linspace(-1.0, 1.0, sum(lengths)) / 3.0,
        rows([o for episode in episodes for o in episode[1:]]),
        terminations,
        truncations,
        observation_space=observation_space,
        action_space=action_space,
        env_spec=None if env_id is None else gym.spec(env_id),
        ref_min_score=-0.1,
        ref_max_score=1.0 / 3.0,
        name="made",
    )


ACTIONS = spaces.Box(np.array([-0.5, -2.0], np.float32), np.array([1.5, 2.0], np.float32))
DATASETS: dict[str, Callable[[], OfflineDataset]] = {
    "env": lambda: make(gym.make("Pendulum-v1").observation_space, spaces.Box(-2.0, 2.0, (1,)), "Pendulum-v1"),
    "float64": lambda: make(spaces.Box(-np.inf, np.inf, (3,), np.float64), spaces.Box(-1.0, 1.0, (2,), np.float64)),
    "dict": lambda: make(spaces.Dict({"a.b": spaces.Box(-1.0, 1.0, (2, 2)), "n": spaces.Discrete(4, start=1)}), ACTIONS),
    "images": lambda: make(spaces.Box(0, 255, (36, 40, 3), np.uint8), ACTIONS),
    "bits": lambda: make(spaces.Dict({"m": spaces.MultiBinary(3), "d": spaces.MultiDiscrete([2, 5])}), ACTIONS),
}


def assert_equal(found: OfflineDataset, expected: OfflineDataset) -> None:
    for field in ("observations", "next_observations", "actions", "rewards", "terminations", "truncations", "episode_ends"):
        one, other = getattr(found, field), getattr(expected, field)
        pairs = [(one[key], other[key]) for key in other] if isinstance(other, dict) else [(one, other)]
        for a, b in pairs:
            assert a.dtype == b.dtype, field
            np.testing.assert_array_equal(a, b, err_msg=field)
    assert found.observation_space == expected.observation_space
    assert found.action_space == expected.action_space and found.action_space.dtype == expected.action_space.dtype
    assert (found.ref_min_score, found.ref_max_score) == (expected.ref_min_score, expected.ref_max_score)
    assert (found.env_spec and found.env_spec.id) == (expected.env_spec and expected.env_spec.id)


@pytest.mark.parametrize("kind", DATASETS)
def test_round_trips(kind: str):
    """From each kind of target to the next one, and all of them equal to what was made."""
    dataset = expected = DATASETS[kind]()
    for target in (*TARGETS, "again.hdf5"):
        dataset = load_dataset(write_dataset(dataset, target))
        assert_equal(dataset, expected)


def test_layout_of_the_hdf5_file(tmp_path: Path):
    """What other programs that know D4RL's layout look for."""
    dataset = DATASETS["env"]()
    write_dataset(dataset, "log.hdf5")
    with h5py.File("log.hdf5") as file:
        assert {"observations", "next_observations", "actions", "rewards", "terminals", "timeouts"} <= set(file)
        assert {len(file[key]) for key in ("observations", "actions", "rewards", "terminals", "timeouts")} == {9}
        assert file["terminals"].dtype == bool and file["rewards"].shape == (9,)
        # Without what only this package knows the arrays are the same.
        copy = {key: file[key][()] for key in file if key != "metadata"}
    assert_equal_arrays = load_dataset(copy, action_space=dataset.action_space)
    np.testing.assert_array_equal(assert_equal_arrays.next_observations, dataset.next_observations)


def test_what_is_given_wins_over_the_file():
    dataset = DATASETS["float64"]()
    for target in TARGETS[:2]:
        write_dataset(dataset, target)
        space = spaces.Box(-3.0, 3.0, (2,))
        assert load_dataset(target, action_space=space).action_space == space


def test_plain_arrays_without_a_description():
    n = 6
    arrays = {
        "observations": np.ones((n, 2)),
        "actions": np.zeros((n, 1)),
        "rewards": np.ones(n),
        "terminals": np.arange(n) > 4,
    }
    np.savez("plain.npz", **arrays)
    dataset = load_dataset("plain.npz")
    assert (len(dataset), dataset.n_episodes, dataset.name) == (6, 1, "plain")
    np.savez("lacking.npz", **{key: arrays[key] for key in ("observations", "actions")})
    with pytest.raises(ValueError, match="rewards, terminals missing"):
        load_dataset("lacking.npz")


def test_files_that_are_refused():
    np.savez("pickled.npz", observations=np.array([object()]), actions=np.zeros(1), rewards=np.zeros(1), terminals=np.ones(1))
    with pytest.raises(ValueError, match="not a .npz file of plain arrays"):
        load_dataset("pickled.npz")
    Path("broken.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="not a .npz file of plain arrays"):
        load_dataset("broken.npz")
    with pytest.raises(FileNotFoundError, match="no file nothing.npz"):
        load_dataset("nothing.npz")


def test_nothing_is_overwritten_or_left_behind(monkeypatch: pytest.MonkeyPatch):
    dataset = DATASETS["env"]()
    for target in TARGETS:
        write_dataset(dataset, target)
        with pytest.raises(FileExistsError):
            write_dataset(dataset, target)
    with pytest.raises(ValueError, match=r"Expected a path that ends in"):
        write_dataset(dataset, "log.csv")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(dataset, "folder/other.npz")
    assert sorted(path.name for path in Path("folder").iterdir()) == ["log.hdf5", "log.npz"]


def test_steps_that_do_not_follow_each_other():
    dataset = DATASETS["env"]()
    dataset.next_observations[6] += 1.0
    with pytest.raises(ValueError, match=r"episode 2, step 0 \(1 steps in all\)"):
        write_minari(dataset, "written/log/gap-v0")
    assert_equal(load_dataset(write_dataset(dataset, "gap.npz")), dataset)
