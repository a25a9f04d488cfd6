"""Datasets into files and back: equality of everything through the real writers and readers."""

import copy
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_diffusion import DTQL, FutureStateReplayBuffer, OfflineDataset, TrajectoryReplayBuffer, load_dataset
from sb3_diffusion.buffers import EpisodeReplayBuffer
from sb3_diffusion.datasets import MemoryMappedWriter, env_specs, load_minari_parts, write_dataset, write_minari
from sb3_diffusion.datasets.arrays import column_moments

TARGETS = ["folder/log.hdf5", "folder/log.npz", "folder/log.mmap", "written/log/any-v0"]


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
    "starts": lambda: make(spaces.MultiDiscrete([[2, 5], [3, 4]], np.int32, start=[[1, -3], [0, 7]]), ACTIONS),
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
    assert found.env_spec == expected.env_spec


@pytest.mark.parametrize("kind", DATASETS)
def test_round_trips(kind: str):
    """From each kind of target to the next one, and all of them equal to what was made."""
    dataset = expected = DATASETS[kind]()
    for target in (*TARGETS, "again.hdf5"):
        dataset = load_dataset(write_dataset(dataset, target))
        assert_equal(dataset, expected)


def test_types_of_discrete_spaces_come_back():
    """Not from Minari, which takes all Discrete ones for int64."""
    if "dtype" not in inspect.signature(spaces.Discrete).parameters:
        pytest.skip("this version of Gymnasium has int64 alone")
    dataset = make(spaces.Dict({"n": spaces.Discrete(4, start=1, dtype=np.int32)}), ACTIONS)
    for target in TARGETS[:3]:
        found = load_dataset(write_dataset(dataset, target)).observation_space
        assert found == dataset.observation_space and found["n"].dtype == np.int32


def test_descriptions_without_starts_and_types_are_read():
    """As the first files have them."""
    dataset = DATASETS["bits"]()
    write_dataset(dataset, "log.mmap")
    file = Path("log.mmap/dataset.json")
    description = json.loads(file.read_text())
    part = description["observation_space"]["spaces"]["d"]
    del part["start"], part["dtype"]
    file.write_text(json.dumps(description))
    assert_equal(load_dataset("log.mmap"), dataset)


def pendulum(**changes: object) -> OfflineDataset:
    dataset = DATASETS["env"]()
    dataset.env_spec = copy.deepcopy(dataset.env_spec)
    for name, value in changes.items():
        setattr(dataset.env_spec, name, value)
    return dataset


def test_settings_of_the_environment_come_back():
    wrapper = gym.wrappers.ClipAction(gym.make("Pendulum-v1")).spec.additional_wrappers
    dataset = expected = pendulum(kwargs={"g": 5.0}, max_episode_steps=77, additional_wrappers=wrapper)
    for target in (*TARGETS, "again.npz"):
        dataset = load_dataset(write_dataset(dataset, target))
        assert_equal(dataset, expected)
    assert gym.make(dataset.env_spec).unwrapped.g == 5.0


@pytest.mark.parametrize("target", TARGETS[:3])
def test_environments_of_files_bring_no_code(target: str):
    """What is registered here is made, whatever entry point the file names; it may be no text where it is written."""
    expected = gym.spec("Pendulum-v1").entry_point
    write_dataset(pendulum(entry_point=lambda: pytest.fail("made")), target)
    assert load_dataset(target).env_spec.entry_point == expected


def test_an_environment_that_is_not_registered_is_left_out():
    spec = EnvSpec("Elsewhere-v0", entry_point="elsewhere:Env")
    dataset = DATASETS["env"]()
    dataset.env_spec = spec
    for target in TARGETS[:3]:
        write_dataset(dataset, target)
        with pytest.warns(
            UserWarning, match=rf"{target} was recorded in Elsewhere-v0 \(elsewhere:Env\), which is not registered"
        ):
            assert load_dataset(target).env_spec is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_dataset(target, env_spec="Pendulum-v1").env_spec.id == "Pendulum-v1"


def change_description(**changes: object) -> None:
    """What is None is taken out."""
    file = Path("log.mmap/dataset.json")
    description = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in description.items() if changes.get(key, 0) is not None}))


def test_descriptions_with_an_id_alone_are_read(monkeypatch: pytest.MonkeyPatch):
    """As the first files have them."""
    dataset = DATASETS["env"]()
    write_dataset(dataset, "log.mmap")
    change_description(env_spec=None)
    assert_equal(load_dataset("log.mmap"), dataset)
    # Robotics' environments are registered when they are asked for
    change_description(env_id="Late-v0")
    with pytest.warns(UserWarning, match="was recorded in Late-v0, which is not registered"):
        assert load_dataset("log.mmap").env_spec is None
    registered = {"Late-v0": EnvSpec("Late-v0")}
    monkeypatch.setattr(env_specs, "register_robotics", lambda env_id: gym.registry.update(registered))
    try:
        assert load_dataset("log.mmap").env_spec.id == "Late-v0"
    finally:
        gym.registry.pop("Late-v0", None)


def test_specs_of_other_versions_and_bad_ones():
    write_dataset(pendulum(kwargs={"g": 5.0}), "log.mmap")
    description = json.loads(Path("log.mmap/dataset.json").read_text())
    change_description(env_spec={**description["env_spec"], "autoreset": True})
    assert load_dataset("log.mmap").env_spec.kwargs == {"g": 5.0}
    for bad in ([], "Pendulum-v1", {"id": "Pendulum-v1"}, {**description["env_spec"], "id": "not an id"}):
        change_description(env_spec=bad)
        with pytest.raises(ValueError, match="malformed"):
            load_dataset("log.mmap")


def test_settings_that_are_no_json_are_left_out():
    dataset = pendulum(kwargs={"g": np.ones(1)})
    with pytest.warns(UserWarning, match="Pendulum-v1, only the id is written"):
        write_dataset(dataset, "log.mmap")
    assert load_dataset("log.mmap").env_spec == gym.spec("Pendulum-v1")


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
    for target in TARGETS[:3]:
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
    assert sorted(path.name for path in Path("folder").iterdir()) == ["log.hdf5", "log.mmap", "log.npz"]


def test_steps_that_do_not_follow_each_other():
    dataset = DATASETS["env"]()
    dataset.next_observations[6] += 1.0
    with pytest.raises(ValueError, match=r"episode 2, step 0 \(1 steps in all\)"):
        write_minari(dataset, "written/log/gap-v0")
    assert_equal(load_dataset(write_dataset(dataset, "gap.npz")), dataset)


def _numbered(n_episodes: int, first: int = 0) -> OfflineDataset:
    """Episodes of 4 steps whose values are their global row."""
    rows = np.arange(first, first + 4 * n_episodes, dtype=np.float32)
    ends = np.arange(4 * n_episodes) % 4 == 3
    return OfflineDataset(
        rows[:, None].repeat(3, axis=1),
        (rows[:, None] % 7) / 7.0,
        rows,
        rows[:, None].repeat(3, axis=1) + 1.0,
        ends & (np.arange(4 * n_episodes) % 8 == 3),
        ends & (np.arange(4 * n_episodes) % 8 == 7),
        observation_space=spaces.Box(-np.inf, np.inf, (3,)),
        action_space=spaces.Box(-1.0, 1.0, (1,)),
        name="numbered",
    )


def test_memory_mapped_parts_are_one_dataset_on_the_disk():
    with MemoryMappedWriter("log.mmap") as writer:
        for first in (0, 8, 16):
            writer.add(_numbered(2, first))
    mapped = load_dataset("log.mmap")
    assert_equal(mapped, _numbered(6))
    for name in ("observations", "next_observations", "actions", "rewards"):
        array = getattr(mapped, name)
        assert not array.flags.writeable and not array.flags.owndata
        assert isinstance(array.base, np.memmap)
    assert np.load("log.mmap/rewards.npy").tolist() == list(range(24))  # plain NumPy files


def test_buffers_of_memory_mapped_data_copy_no_observations():
    """Same draws as from the data in memory, gathered from the mapped file itself."""
    write_dataset(_numbered(50), "log.mmap")
    mapped, loaded = load_dataset("log.mmap"), _numbered(50)
    for cls, arguments in (
        (EpisodeReplayBuffer, {}),
        (FutureStateReplayBuffer, {}),
        (TrajectoryReplayBuffer, {"horizon": 4}),
    ):
        batches = []
        for data in (mapped, loaded):
            generator = th.Generator().manual_seed(0)
            spaces_of_data = (data.observation_space, data.action_space)
            buffer = cls.from_dataset(data, *spaces_of_data, device="cpu", generator=generator, **arguments)
            batches.append(buffer.sample(64))
            assert np.shares_memory(buffer.observations, data.observations)
        for one, other in zip(*batches, strict=True):
            assert (one is None and other is None) or th.equal(one, other)


def test_a_model_learns_the_same_from_mapped_and_from_loaded_data():
    write_dataset(_numbered(50), "log.mmap")
    models = [
        DTQL("MlpPolicy", None, dataset=data, seed=0, batch_size=16, policy_kwargs={"net_arch": [8]}, device="cpu").learn(5)
        for data in ("log.mmap", _numbered(50))
    ]
    weights = [model.policy.state_dict() for model in models]
    assert all(th.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_memory_mapped_writing_that_fails_leaves_nothing():
    with pytest.raises(ZeroDivisionError), MemoryMappedWriter("log.mmap") as writer:
        writer.add(_numbered(1))
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="Nothing was added"), MemoryMappedWriter("log.mmap"):
        pass
    with pytest.raises(ValueError, match="`action_space` of the first one"), MemoryMappedWriter("log.mmap") as writer:
        writer.add(make(spaces.Box(-np.inf, np.inf, (3,)), ACTIONS))
        writer.add(_numbered(1))
    with pytest.raises(RuntimeError, match="must be entered"):
        MemoryMappedWriter("log.mmap").add(_numbered(1))
    with pytest.raises(ValueError, match=r"must end in .mmap"):
        MemoryMappedWriter("log")
    assert list(Path().iterdir()) == []


def test_memory_mapped_folders_that_are_refused():
    write_dataset(_numbered(3), "log.mmap")
    rewards = Path("log.mmap/rewards.npy")
    whole = rewards.read_bytes()
    rewards.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"rewards.npy is not a .npy file"):
        load_dataset("log.mmap")
    np.save(rewards, np.array([object()] * 12), allow_pickle=True)
    with pytest.raises(ValueError, match=r"rewards.npy is not a .npy file of a plain array"):
        load_dataset("log.mmap")
    np.save(rewards, np.zeros(11, np.float32))
    with pytest.raises(ValueError, match="one row per step"):
        load_dataset("log.mmap")
    rewards.unlink()
    with pytest.raises(FileNotFoundError, match="rewards.npy is missing"):
        load_dataset("log.mmap")
    Path("log.mmap/dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="malformed"):
        load_dataset("log.mmap")
    with pytest.raises(FileNotFoundError, match=r"no dataset.json in other.mmap"):
        load_dataset("other.mmap")


def test_keys_cannot_leave_the_folder():
    dataset = make(spaces.Dict({"../../a": spaces.Box(-1.0, 1.0, (2,)), "b/c": spaces.Box(-1.0, 1.0, (2,))}), ACTIONS)
    assert_equal(load_dataset(write_dataset(dataset, "deep/log.mmap")), dataset)
    assert [path.name for path in Path().iterdir()] == ["deep"]
    assert len(list(Path("deep/log.mmap").iterdir())) == 9


def test_minari_data_is_converted_part_by_part():
    write_dataset(_numbered(9), "written/numbered/log-v0")
    parts = list(load_minari_parts("written/numbered/log-v0", n_steps=16))
    assert [len(part) for part in parts] == [12, 12, 12]
    with MemoryMappedWriter("log.mmap") as writer:
        for part in parts:
            writer.add(part)
    assert_equal(load_dataset("log.mmap"), _numbered(9))


def test_moments_go_through_data_in_parts():
    values = np.random.default_rng(0).normal(5.0, 1e-3, (70_001, 2)).astype(np.float32)
    mean, variance = column_moments(values)
    np.testing.assert_allclose(mean, values.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(variance, values.var(axis=0, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(column_moments(np.array([[0, 3], [2, 3]], np.uint8)), [[1.0, 3.0], [1.0, 0.0]])
