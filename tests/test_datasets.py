"""Logged data: every source, and every trap in it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from stable_baselines3.her import HerReplayBuffer

import sb3_diffusion
from sb3_diffusion import DTQL, EpisodeReplayBuffer
from sb3_diffusion.common.vec_normalize import fit_vec_normalize, is_unused
from sb3_diffusion.datasets import (
    FlattenNestedDictObservation,
    OfflineDataset,
    SpacesEnv,
    find_dataset,
    from_flat_arrays,
    load_d4rl,
    load_dataset,
    load_minari,
    make_dataset_env,
    make_env,
)
from sb3_diffusion.datasets.reference_scores import d4rl_env_id, d4rl_horizon, d4rl_scores, minari_scores

h5py = pytest.importorskip("h5py")
minari = pytest.importorskip("minari")

OBS_SPACE = spaces.Box(-np.inf, np.inf, (2,), np.float64)
ACTION_SPACE = spaces.Box(-1.0, 1.0, (1,), np.float32)


@pytest.fixture(autouse=True)
def data_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Minari and D4RL inside of the test's own folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))


def write_minari(name: str, episodes: list[dict[str, Any]], observation_space: spaces.Space = OBS_SPACE, **kwargs: Any) -> Any:
    """Write a dataset by Minari itself."""
    from minari.data_collector import EpisodeBuffer

    kwargs = {"action_space": ACTION_SPACE, "data_format": "hdf5", **kwargs}
    buffers = [EpisodeBuffer(**{"infos": {}, **episode}) for episode in episodes]
    with pytest.warns(UserWarning):  # it misses an author
        return minari.create_dataset_from_buffers(name, buffers, observation_space=observation_space, **kwargs)


def episode(first: float, length: int, terminated: bool, truncated: bool, **fields: Any) -> dict[str, Any]:
    """An episode whose observations count up from ``first``."""
    flags = np.zeros((2, length), bool)
    flags[0, -1], flags[1, -1] = terminated, truncated
    return {
        "observations": np.stack([first + np.arange(length + 1.0)] * 2, axis=1),
        "actions": (0.01 * (first + np.arange(length)))[:, None].astype(np.float32) / 10,
        "rewards": first + np.arange(length) / 8,
        "terminations": flags[0],
        "truncations": flags[1],
        **fields,
    }


def toy_arrays(n: int = 12, ends: tuple[int, ...] = (3, 7)) -> dict[str, np.ndarray]:
    """D4RL arrays; observation i is i."""
    terminals = np.zeros(n, bool)
    terminals[list(ends)] = True
    return {
        "observations": np.stack([np.arange(n)] * 2, axis=1).astype(np.float32),
        "actions": np.linspace(-1, 1, n, dtype=np.float32)[:, None],
        "rewards": np.arange(n, dtype=np.float32),
        "terminals": terminals,
    }


def toy_dataset(**changes: Any) -> OfflineDataset:
    """Two episodes of three and two steps."""
    fields: dict[str, Any] = {
        "observations": np.arange(10.0).reshape(5, 2),
        "actions": np.array([[0.0], [0.5], [1.0], [-1.0], [0.2]]),
        "rewards": np.arange(5.0),
        "next_observations": np.arange(10.0).reshape(5, 2) + 2,
        "terminations": np.array([0, 0, 1, 0, 0]),
        "truncations": np.zeros(5, bool),
        "observation_space": OBS_SPACE,
        "action_space": ACTION_SPACE,
        **changes,
    }
    arrays = [fields.pop(key) for key in list(fields)[:6]]
    return OfflineDataset(*arrays, **fields)


def write_d4rl(path: Path, **arrays: np.ndarray) -> Path:
    """Write arrays in D4RL's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
        file["metadata/algorithm"] = "test"
        file["infos/qpos"] = np.zeros((len(arrays["rewards"]), 3))
    return path


# The flat structure ---------------------------------------------------------------------------------------------------


def test_offline_dataset_index_and_episodes():
    data = toy_dataset()
    assert len(data) == 5 and data.n_episodes == 2
    assert data.episode_ends.tolist() == [2, 4] and data.episode_ends.dtype == np.int64
    assert data.episode_starts.tolist() == [0, 3]
    assert data.episode_lengths.tolist() == [3, 2]
    assert data.episode_returns.tolist() == [3.0, 7.0]
    assert data.terminations.tolist() == [False, False, True, False, False]
    assert data.truncations.tolist() == [False] * 4 + [True], "data that ends without a flag was truncated"
    first, last = data.episodes[0], data.episodes[-1]
    assert first.terminated and not first.truncated and first.n_steps == 3 and first.episode_return == 3.0
    assert last.truncated and not last.terminated
    np.testing.assert_array_equal(last.observations, data.observations[3:])
    assert last.observations.base is not None and np.shares_memory(last.observations, data.observations)
    assert [e.n_steps for e in data.episodes] == [3, 2] and len(data.episodes[:1]) == 1
    with pytest.raises(IndexError, match="2 episodes"):
        data.episodes[2]


def test_types_float64_and_no_copy():
    data = toy_dataset()
    for array in (data.observations, data.next_observations, data.actions, data.rewards):
        assert array.dtype == np.float32
    observations = np.zeros((5, 2), np.float32)
    assert toy_dataset(observations=observations).observations is observations


def test_both_flags_count_as_termination():
    flags = np.array([0, 0, 1, 0, 1], bool)
    data = toy_dataset(terminations=flags, truncations=flags)
    assert data.terminations.tolist() == flags.tolist()
    assert not data.truncations.any()
    assert flags.tolist() == [False, False, True, False, True], "the caller's array is left alone"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "next_observations"])
def test_not_finite_values_are_located(field: str, bad: float):
    data = toy_dataset()
    array = getattr(data, field).copy()
    array[4, ...] = bad
    with pytest.raises(ValueError, match=rf"`{field}` must be finite.*{bad} at episode 1, step 1; 1 of 5"):
        toy_dataset(**{field: array})


def test_not_finite_in_a_dict_observation_and_in_flags():
    space = spaces.Dict({"a": OBS_SPACE, "b": OBS_SPACE})
    good = np.zeros((5, 2))
    bad = good.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"`observations\['b'\]` must be finite.*nan at episode 1, step 0"):
        toy_dataset(observations={"a": good, "b": bad}, next_observations={"a": good, "b": good}, observation_space=space)
    with pytest.raises(ValueError, match=r"`terminations` must hold 0 or 1.*nan at episode 0, step 1"):
        toy_dataset(terminations=np.array([0, np.nan, 1, 0, 0]))


def test_float64_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="`rewards` must be finite in float32: got 1e\\+300 at episode 0, step 1"):
        toy_dataset(rewards=np.array([0, 1e300, 0, 0, 0]))


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "next_observations", "terminations", "truncations"])
def test_mismatched_lengths(field: str):
    full = getattr(toy_dataset(), field)
    with pytest.raises(ValueError, match=rf"one row per step: got lengths .*{field} 4"):
        toy_dataset(**{field: full[:-1]})


def test_empty_dataset():
    empty = {key: getattr(toy_dataset(), key)[:0] for key in ("observations", "actions", "rewards", "next_observations")}
    with pytest.raises(ValueError, match="is empty: expected at least one step"):
        toy_dataset(**empty, terminations=np.zeros(0), truncations=np.zeros(0))


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)])
def test_discrete_actions_are_refused(space: spaces.Space):
    with pytest.raises(TypeError, match="must be continuous"):
        toy_dataset(actions=np.zeros(5, int), action_space=space)


def test_shapes_against_the_spaces():
    with pytest.raises(ValueError, match=r"`observations` must have shape \(N, 3\)"):
        toy_dataset(observation_space=spaces.Box(-1, 1, (3,)))
    with pytest.raises(ValueError, match=r"`actions` must have shape \(N, 2\)"):
        toy_dataset(action_space=spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match=r"`rewards` must have shape \(N,\) or \(N, 1\)"):
        toy_dataset(rewards=np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"must have the keys \['a'\]: got one array"):
        toy_dataset(observation_space=spaces.Dict({"a": OBS_SPACE}))
    with pytest.raises(TypeError, match="Box, Discrete, MultiDiscrete or MultiBinary"):
        toy_dataset(observation_space=spaces.Tuple([OBS_SPACE]))


def test_multidimensional_actions_keep_their_shape():
    data = toy_dataset(actions=np.zeros((5, 2, 3)), action_space=spaces.Box(-1, 1, (2, 3)))
    assert data.actions.shape == (5, 2, 3)


def test_integer_observations_keep_their_kind():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    space = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    data = toy_dataset(observations=images, next_observations=images, observation_space=space)
    assert data.observations.dtype == np.uint8
    data = toy_dataset(
        observations=np.arange(5.0)[:, None], next_observations=np.arange(5), observation_space=spaces.Discrete(5)
    )
    assert data.observations.shape == (5,) and data.observations.dtype.kind == "i"
    with pytest.raises(ValueError, match="must hold integers"):
        toy_dataset(observations=np.arange(5) / 2, next_observations=np.arange(5), observation_space=spaces.Discrete(5))


INTEGER_SPACES = {  # with observations inside, and the last one outside
    "picture": (spaces.Box(0, 255, (1, 2), np.uint8), [[[0, 255]], [[7, 300]]], 300, "0 to 255"),
    "box": (spaces.Box(np.array([0, -9]), np.array([5, -3]), dtype=np.int64), [[0, -9], [5, -3], [5, -2]], -2, "-9 to -3"),
    "discrete": (spaces.Discrete(3), [0, 2, 7], 7, "0 to 2"),
    "below": (spaces.Discrete(3, start=2), [2, 4, 1], 1, "2 to 4"),
    "multi-discrete": (spaces.MultiDiscrete([3, 4], start=[1, -2]), [[1, -2], [3, 1], [0, 0]], 0, "1 to 3"),
    "multi-binary": (spaces.MultiBinary(2), [[0, 1], [1, 2]], 2, "0 to 1"),
}


@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.float32])
@pytest.mark.parametrize("kind", INTEGER_SPACES)
def test_integers_outside_of_their_space_are_located(kind: str, dtype: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sb3_diffusion.datasets.arrays.CHUNK_ROWS", 2)
    space, rows, value, allowed = INTEGER_SPACES[kind]
    good = np.array((rows[:-1] * 5)[:5], dtype)
    data = toy_dataset(observations=good, next_observations=good, observation_space=space)
    np.testing.assert_array_equal(data.observations, good)
    bad = good.copy()
    bad[4] = rows[-1]
    where = rf"got {value}(\.0)? at episode 1, step 1, allowed {allowed}\. Give the right `observation_space`"
    with pytest.raises(ValueError, match=rf"`next_observations` must lie inside of the space .*: {where}"):
        toy_dataset(observations=good, next_observations=bad, observation_space=space)
    with pytest.raises(ValueError, match=rf"`observations\['a'\]` must lie inside of the space .*: {where}"):
        toy_dataset(observations={"a": bad}, next_observations={"a": good}, observation_space=spaces.Dict({"a": space}))


def test_bytes_of_pictures_need_no_look(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sb3_diffusion.datasets.arrays.CHUNK_ROWS", None)  # what reads data needs it
    images = np.arange(20, dtype=np.uint8).reshape(5, 2, 2, 1)
    space = spaces.Box(0, 255, (2, 2, 1), np.uint8)
    with pytest.raises(TypeError):
        toy_dataset(observations=images.astype(int), next_observations=images, observation_space=space)
    monkeypatch.setattr(OfflineDataset, "_checked_floats", lambda self, array, field: array.astype(np.float32))
    assert toy_dataset(observations=images, next_observations=images, observation_space=space).observations is images


@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.Dict({"n": spaces.Discrete(5)})])
def test_discrete_observations_as_a_column(space: spaces.Space):
    numbers = np.arange(12) % 5
    for column in (numbers, numbers[:, None]):
        arrays = {**toy_arrays(), "observations": {"n": column} if isinstance(space, spaces.Dict) else column}
        policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
        env = SpacesEnv(space, ACTION_SPACE)
        for data in (
            load_dataset(arrays, observation_space=space),
            DTQL(policy, env, dataset=arrays, policy_kwargs={"net_arch": [4]}, device="cpu").dataset,
        ):
            assert data.observation_space == space
            found = data.observations["n"] if isinstance(space, spaces.Dict) else data.observations
            np.testing.assert_array_equal(found, numbers[:-1])


def test_actions_outside_of_the_box():
    actions = np.zeros((5, 1))
    actions[3], actions[4] = 1.5, -7.0
    expected = r"2 of 5 actions lie outside.*first at episode 1, step 0: 1.5 in dimension 0, allowed \[-1.0, 1.0\]"
    with pytest.raises(ValueError, match=expected + ".*clip_actions=True"):
        toy_dataset(actions=actions)
    with pytest.warns(UserWarning, match=expected) as record:
        data = toy_dataset(actions=actions, clip_actions=True)
    assert len(record) == 1
    assert data.actions[3:, 0].tolist() == [1.0, -1.0]
    assert actions[3, 0] == 1.5, "the caller's array is left alone"


def test_rounding_outside_of_the_box_is_clipped_silently(recwarn: pytest.WarningsRecorder):
    actions = np.full((5, 1), 1.0 + 1e-5)
    assert (toy_dataset(actions=actions).actions == 1.0).all()
    # the tolerance is a share of the range: 0.1 % of 2000
    wide = spaces.Box(-1000.0, 1000.0, (1,))
    assert (toy_dataset(actions=np.full((5, 1), 1001.0), action_space=wide).actions == 1000.0).all()
    with pytest.raises(ValueError, match="lie outside"):
        toy_dataset(actions=np.full((5, 1), 1003.0), action_space=wide)
    assert not len(recwarn)


def test_check_spaces():
    data = toy_dataset()
    data.check_spaces(spaces.Box(-5, 5, (2,), np.float32), spaces.Box(-1.0, 1.0, (1,), np.float64))
    with pytest.raises(ValueError, match=r"observation space does not match.*shape \(2,\) against \(3,\)"):
        data.check_spaces(spaces.Box(-1, 1, (3,)), ACTION_SPACE)
    with pytest.raises(ValueError, match=r"dataset\.stack\(2\)"):
        data.check_spaces(spaces.Box(-1, 1, (4,)), ACTION_SPACE)
    with pytest.raises(ValueError, match=r"action space does not match.*different bounds"):
        data.check_spaces(OBS_SPACE, spaces.Box(-2, 2, (1,)))
    with pytest.raises(ValueError, match="Box against Discrete"):
        data.check_spaces(spaces.Discrete(2), ACTION_SPACE)
    with pytest.raises(ValueError, match="float64 against uint8"):
        data.check_spaces(spaces.Box(0, 255, (2,), np.uint8), ACTION_SPACE)


def test_check_spaces_images_and_dicts():
    def images(shape: tuple[int, ...]) -> spaces.Dict:
        return spaces.Dict({"camera": spaces.Box(0, 255, shape, np.uint8), "joint": OBS_SPACE})

    arrays = {"camera": np.zeros((5, 8, 8, 3), np.uint8), "joint": np.zeros((5, 2))}
    data = toy_dataset(observations=arrays, next_observations=arrays, observation_space=images((8, 8, 3)))
    data.check_spaces(images((3, 8, 8)), ACTION_SPACE)
    with pytest.raises(ValueError, match="'camera': shape"):
        data.check_spaces(images((9, 8, 3)), ACTION_SPACE)
    with pytest.raises(ValueError, match="keys"):
        data.check_spaces(spaces.Dict({"camera": OBS_SPACE}), ACTION_SPACE)
    with pytest.raises(ValueError, match="the environment has not"):
        data.check_spaces(OBS_SPACE, ACTION_SPACE)


def test_normalized_score():
    data = toy_dataset(ref_min_score=-10, ref_max_score=30)
    assert data.normalized_score(10.0) == 50.0 and isinstance(data.normalized_score(10), float)
    np.testing.assert_allclose(data.normalized_score([-10, 30, 50]), [0, 100, 150])
    assert data.has_reference_scores and not toy_dataset().has_reference_scores
    assert not toy_dataset(ref_max_score=30).has_reference_scores and not toy_dataset(ref_min_score=0).has_reference_scores
    with pytest.raises(ValueError, match="has no reference scores"):
        toy_dataset().normalized_score(1.0)


def test_summary_and_text():
    data = toy_dataset(name="toy", env_spec=gym.spec("Pendulum-v1"), ref_min_score=0, ref_max_score=10)
    summary = data.summary()
    assert summary["n_episodes"] == 2 and summary["n_steps"] == 5
    assert (summary["n_terminated"], summary["n_truncated"]) == (1, 1)
    assert summary["returns"]["mean"] == 5.0 and summary["lengths"]["max"] == 3.0
    assert summary["rewards"]["min"] == 0.0 and summary["nonzero_rewards"] == 0.8
    assert summary["action_min"] == [-1.0] and summary["action_max"] == [1.0]
    assert summary["action_saturation"] == [0.4]
    assert summary["normalized_return"] == 50.0
    assert repr(data) == "OfflineDataset('toy', 2 episodes, 5 steps, env=Pendulum-v1)"
    for part in ("'toy'", "Pendulum-v1", "1 terminated, 1 truncated", "normalized return  50.0"):
        assert part in str(data)


def test_plot(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = toy_dataset(ref_min_score=0, ref_max_score=10).plot(tmp_path / "new" / "toy.png")
    picture = imread(path)
    assert picture.shape[0] > 300 and picture.std() > 0.05
    # constant rewards, one episode, unbounded wide actions
    wide = spaces.Box(-np.inf, np.inf, (40,))
    data = toy_dataset(rewards=np.zeros(5), terminations=np.zeros(5), actions=np.zeros((5, 40)), action_space=wide)
    assert data.plot(tmp_path / "wide.pdf").stat().st_size > 1000
    path = data.plot(tmp_path / "bare")
    assert path == tmp_path / "bare.png" and imread(path).shape == picture.shape


# Stacking -------------------------------------------------------------------------------------------------------------


class CountingEnv(gym.Env):
    """Observations count steps over the env's whole life; episodes of lengths 4, 1, 6 terminate or are truncated in turn."""

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space, self.action_space = space, ACTION_SPACE
        self.count, self.episode = 0, -1

    def _observe(self, space: spaces.Space | None = None) -> Any:
        space = space or self.observation_space
        if isinstance(space, spaces.Dict):
            return {key: self._observe(part) for key, part in space.spaces.items()}
        size = int(np.prod(space.shape))
        return (self.count + np.arange(size)).reshape(space.shape).astype(space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.count, self.episode, self.steps = self.count + 1, self.episode + 1, 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count, self.steps = self.count + 1, self.steps + 1
        done = self.steps == (4, 1, 6)[self.episode % 3]
        return self._observe(), 1.0, done and self.episode % 2 == 0, done and self.episode % 2 == 1, {}


STACK_SPACES = {
    "vector": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "channels-last": spaces.Box(0, 255, (5, 4, 3), np.uint8),
    "channels-first": spaces.Box(0, 255, (3, 5, 4), np.uint8),
    "matrix": spaces.Box(-1e6, 1e6, (2, 3), np.float32),
    "dict": spaces.Dict({"image": spaces.Box(0, 255, (5, 4, 3), np.uint8), "joint": spaces.Box(-1e6, 1e6, (2,))}),
}


@pytest.mark.parametrize("n_stack", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", STACK_SPACES)
def test_stack_is_vec_frame_stack(kind: str, n_stack: int):
    space = STACK_SPACES[kind]
    n_steps = 14

    def collect(env: Any) -> tuple[list[Any], list[Any], list[bool], list[bool]]:
        def single(observation: Any) -> Any:
            return {k: v[0] for k, v in observation.items()} if isinstance(observation, dict) else observation[0]

        observations, successors, terminations, truncations = [], [], [], []
        observation = single(env.reset())
        for _ in range(n_steps):
            observations.append(observation)
            batch, _, dones, infos = env.step(np.zeros((1, 1), np.float32))
            observation = single(batch)
            successors.append(infos[0]["terminal_observation"] if dones[0] else observation)
            truncations.append(infos[0].get("TimeLimit.truncated", False))
            terminations.append(bool(dones[0]) and not truncations[-1])
        return observations, successors, terminations, truncations

    def arrays(rows: list[Any]) -> Any:
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]} if isinstance(rows[0], dict) else np.stack(rows)

    def assert_equal(ours: Any, expected: Any) -> None:
        for key in expected if isinstance(expected, dict) else [...]:
            np.testing.assert_array_equal(ours[key], expected[key])

    observations, successors, *flags = collect(DummyVecEnv([lambda: CountingEnv(space)]))
    data = OfflineDataset(
        arrays(observations),
        np.zeros((n_steps, 1)),
        np.ones(n_steps),
        arrays(successors),
        *map(np.array, flags),
        observation_space=space,
        action_space=ACTION_SPACE,
    )
    stacked = data.stack(n_stack)
    env = VecFrameStack(DummyVecEnv([lambda: CountingEnv(space)]), n_stack)
    observations, successors, *_ = collect(env)
    assert_equal(stacked.observations, arrays(observations))
    assert_equal(stacked.next_observations, arrays(successors))
    stacked.check_spaces(env.observation_space, env.action_space)
    for ours, theirs in (
        zip(stacked.observation_space.spaces.values(), env.observation_space.spaces.values(), strict=True)
        if isinstance(space, spaces.Dict)
        else [(stacked.observation_space, env.observation_space)]
    ):
        np.testing.assert_array_equal(ours.low, theirs.low)
        np.testing.assert_array_equal(ours.high, theirs.high)
    np.testing.assert_array_equal(stacked.episode_ends, data.episode_ends)


def test_stacked_integers_have_room_for_the_zeros_before_the_start():
    numbers = np.arange(1, 6)[:, None]
    for space, values in ((spaces.Box(1, 5, (1,), np.int64), numbers), (spaces.Box(-5, -1, (1,), np.int64), -numbers)):
        stacked = toy_dataset(observations=values, next_observations=values, observation_space=space).stack(2)
        assert stacked.observations[:, 0].tolist() == [0, *values[:2, 0], 0, *values[3:4, 0]]
        assert (stacked.observation_space.low <= 0).all() and (stacked.observation_space.high >= 0).all()


def test_statistics_of_stacked_data_need_a_normalizer_outside_of_the_stack():
    """In RL Zoo's order the wrapper sees single observations."""
    data = toy_dataset().stack(3)
    inside = VecNormalize(DummyVecEnv([lambda: CountingEnv(OBS_SPACE)]))
    with pytest.raises(ValueError, match=r"of shape \(6,\): got \(2,\).*VecNormalize\(VecFrameStack\(env\)\), not"):
        fit_vec_normalize(inside, data)
    assert is_unused(inside) and inside.obs_rms.mean.shape == (2,)
    VecFrameStack(inside, 3).reset()
    outside = VecNormalize(VecFrameStack(DummyVecEnv([lambda: CountingEnv(OBS_SPACE)]), 3))
    fit_vec_normalize(outside, data)
    np.testing.assert_allclose(outside.obs_rms.mean, data.observations.mean(axis=0))
    outside.reset()


def test_stack_refuses():
    with pytest.raises(ValueError, match="at least 1"):
        toy_dataset().stack(0)
    with pytest.raises(TypeError, match="can be stacked"):
        toy_dataset(
            observations=np.zeros(5, int), next_observations=np.zeros(5, int), observation_space=spaces.Discrete(2)
        ).stack(2)


# Minari ---------------------------------------------------------------------------------------------------------------


def test_minari_t_plus_one_observations():
    write_minari("test/toy-v0", [episode(0, 3, True, False), episode(100, 2, False, True), episode(200, 4, False, False)])
    data = load_dataset("test/toy-v0")
    assert data.name == "test/toy-v0" and len(data) == 9
    assert data.observations[:, 0].tolist() == [0, 1, 2, 100, 101, 200, 201, 202, 203]
    assert data.next_observations[:, 0].tolist() == [1, 2, 3, 101, 102, 201, 202, 203, 204]
    np.testing.assert_allclose(data.rewards, [0, 0.125, 0.25, 100, 100.125, 200, 200.125, 200.25, 200.375])
    np.testing.assert_allclose(data.actions[:, 0], data.observations[:, 0] * 0.001, rtol=1e-6)
    assert data.episode_ends.tolist() == [2, 4, 8]
    assert data.terminations.tolist() == [i == 2 for i in range(9)]
    assert data.truncations.tolist() == [i in (4, 8) for i in range(9)], "no flag at all means truncated"
    assert data.env_spec is None and data.observation_space == OBS_SPACE


def test_minari_dataset_objects_filtered_and_with_infos():
    infos = {"speed": np.zeros(4)}
    recorded = write_minari(
        "toy-v0", [episode(0, 3, True, False, infos=infos), episode(10, 2, False, True), episode(20, 1, True, False)]
    )
    assert len(load_minari(recorded)) == 6
    data = load_dataset(recorded.filter_episodes(lambda e: bool(e.terminations[-1])))
    assert data.observations[:, 0].tolist() == [0, 1, 2, 20]
    assert data.n_episodes == 2
    assert len(load_dataset("toy-v0")) == 6, "an id without a namespace"


def test_minari_nested_dict_observations():
    space = spaces.Dict(
        {
            "observation": OBS_SPACE,
            "goal": spaces.Dict({"kettle": spaces.Box(-1, 1, (1,)), "light": spaces.Dict({"on": spaces.Discrete(2)})}),
        }
    )

    def nested(length: int) -> dict[str, Any]:
        observations = {
            "observation": np.stack([np.arange(length + 1.0)] * 2, axis=1),
            "goal": {"kettle": np.linspace(0, 1, length + 1)[:, None], "light": {"on": np.arange(length + 1) % 2}},
        }
        return episode(0, length, False, True, observations=observations)

    write_minari("test/nested-v0", [nested(3), nested(2)], space)
    data = load_dataset("test/nested-v0")
    assert set(data.observations) == {"observation", "goal.kettle", "goal.light.on"}
    assert set(data.observation_space.spaces) == set(data.observations)
    assert data.observations["observation"][:, 0].tolist() == [0, 1, 2, 0, 1]
    assert data.next_observations["observation"][:, 0].tolist() == [1, 2, 3, 1, 2]
    assert data.next_observations["goal.light.on"].tolist() == [1, 0, 1, 1, 0]
    assert data.observations["goal.light.on"].dtype.kind == "i" and data.observations["goal.kettle"].dtype == np.float32
    data.check_spaces(space, ACTION_SPACE)


@pytest.mark.parametrize("jpeg", [True, False])
def test_minari_images(jpeg: bool):
    space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    images = np.repeat(np.arange(6, dtype=np.uint8) * 40, 32 * 32 * 3).reshape(6, 32, 32, 3)
    write_minari("test/images-v0", [episode(0, 5, True, False, observations=images)], space, jpeg_encoding=jpeg)
    data = load_dataset("test/images-v0")
    assert data.observations.dtype == np.uint8
    # JPEG loses a little
    np.testing.assert_allclose(data.observations, images[:-1], atol=2 if jpeg else 0)
    np.testing.assert_allclose(data.next_observations, images[1:], atol=2 if jpeg else 0)


def test_minari_discrete_actions_and_tuple_observations():
    write_minari("test/discrete-v0", [episode(0, 3, True, False, actions=np.zeros(3, int))], action_space=spaces.Discrete(2))
    with pytest.raises(TypeError, match="must be continuous"):
        load_dataset("test/discrete-v0")
    space = spaces.Tuple([OBS_SPACE, OBS_SPACE])
    observations = (np.zeros((4, 2)), np.zeros((4, 2)))
    write_minari("test/tuple-v0", [episode(0, 3, True, False, observations=observations)], space)
    with pytest.raises(TypeError, match="Tuple"):
        load_dataset("test/tuple-v0")


def test_minari_bad_data():
    write_minari("test/empty-v0", [])
    with pytest.raises(ValueError, match="is empty"):
        load_dataset("test/empty-v0")
    write_minari("test/short-v0", [episode(0, 3, True, False), episode(0, 3, True, False, actions=np.zeros((2, 1)))])
    with pytest.raises(ValueError, match=r"Episode 1 has 3 rewards.*'actions': 2"):
        load_dataset("test/short-v0")
    same = episode(0, 3, True, False)
    write_minari("test/same-v0", [{**same, "observations": same["observations"][:-1]}])
    with pytest.raises(ValueError, match="4 observations"):
        load_dataset("test/same-v0")
    recorded = write_minari("test/nan-v0", [episode(0, 3, True, False), episode(0, 4, True, False)])
    with h5py.File(recorded.storage.data_path / "main_data.hdf5", "a") as file:
        file["episode_1/rewards"][2] = np.nan
    with pytest.raises(ValueError, match=r"`rewards` must be finite.*episode 1, step 2"):
        load_dataset("test/nan-v0")
    recorded.storage.update_metadata({"total_steps": 9})
    with pytest.raises(ValueError, match="announces 9 steps but its episodes hold 7"):
        load_dataset("test/nan-v0")
    recorded.storage.update_metadata({"total_steps": 5})
    with pytest.raises(ValueError, match="announces 5 steps but holds more"):
        load_dataset("test/nan-v0")
    (recorded.storage.data_path / "main_data.hdf5").write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        load_dataset("test/nan-v0")
    recorded.storage.data_path.joinpath("metadata.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_dataset("test/nan-v0")


def test_minari_id_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="minari download mujoco/hopper/medium-v0") as error:
        load_dataset("mujoco/hopper/medium-v0")
    assert str(tmp_path / "minari") in str(error.value)
    with pytest.raises(FileNotFoundError, match="D4RL_DATASET_DIR") as error:
        load_dataset("hopper-medium-v2")
    assert str(tmp_path / "minari") in str(error.value) and str(tmp_path / "d4rl") in str(error.value)
    with pytest.raises(FileNotFoundError, match="minari download"):
        make_env("mujoco/hopper/medium-v0")
    with pytest.raises(FileNotFoundError, match="minari download D4RL/door/human-v2"):
        load_dataset("D4RL/door/human-v2")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sb3-diffusion/pendulum/mixed-v1", "No embedded dataset .*: there are .*, sb3-diffusion/pendulum/mixed-v0"),
        ("log.csv", "No dataset 'log.csv'.*no such file"),
        ("/tmp", "No Minari dataset '/tmp'.* ids read namespace/name-v0"),
        ("logs/run 3.csv", "ids read namespace/name-v0"),
        ("mujoco/hopper/medium", "ids read namespace/name-v0"),
        ("Pendulum-v1", "id of an environment: expected that of a dataset, such as 'sb3-diffusion/"),
    ],
)
def test_what_cannot_be_downloaded(source: str, message: str):
    for load in (load_dataset, make_env):
        with pytest.raises(FileNotFoundError, match=message) as error:
            load(source)
        assert "minari download" not in str(error.value)


def test_minari_reference_scores():
    recorded = write_minari("test/scores-v0", [episode(0, 3, True, False)])
    recorded.storage.update_metadata({"ref_min_score": -1.0, "ref_max_score": 7.0})
    data = load_dataset("test/scores-v0")
    assert (data.ref_min_score, data.ref_max_score, data.score_label) == (-1.0, 7.0, "dataset metadata")
    write_minari("mujoco/hopper/medium-v0", [episode(0, 3, True, False)])
    data = load_dataset("mujoco/hopper/medium-v0")
    assert data.ref_max_score == 3234.3 and "D4RL-referenced" in data.score_label
    assert "D4RL-referenced" in str(data)
    write_minari("test/hopper-v0", [episode(0, 3, True, False)])
    data = load_dataset("test/hopper-v0")
    assert data.ref_max_score is None and data.score_label is None


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"sb3-diffusion\[minari\]"):
        load_dataset("test/toy-v0")
    path = write_d4rl(tmp_path / "toy.hdf5", **toy_arrays())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"sb3-diffusion\[minari\]"):
        load_dataset(path)


def test_import_needs_neither_torch_nor_extras():
    folder = Path(sb3_diffusion.__file__).parent
    code = (
        "import sys, types\n"
        "for name in ('torch', 'stable_baselines3', 'minari', 'h5py', 'matplotlib', 'mujoco', 'gymnasium_robotics'):\n"
        "    sys.modules[name] = None\n"
        "package = types.ModuleType('sb3_diffusion')\n"  # the package itself, without its algorithms
        f"package.__path__ = [{str(folder)!r}]\n"
        "sys.modules['sb3_diffusion'] = package\n"
        "import numpy as np\n"
        "from sb3_diffusion.datasets import load_dataset\n"
        "n = np.zeros(4)\n"
        "print(len(load_dataset(dict(observations=np.zeros((4, 2)), actions=np.zeros((4, 1)), rewards=n, terminals=n, "
        "next_observations=np.zeros((4, 2))))))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "4"


# D4RL -----------------------------------------------------------------------------------------------------------------


def test_d4rl_without_next_observations(tmp_path: Path):
    timeouts = np.zeros(12, bool)
    timeouts[5] = True
    data = load_d4rl(write_d4rl(tmp_path / "arm.hdf5", **toy_arrays(), timeouts=timeouts))
    # rows 0-3 terminate, 4-5 time out, 6-7 terminate, 8-11 dangle
    assert data.observations[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert data.next_observations[:, 0].tolist() == [1, 2, 3, 3, 5, 7, 7, 9, 10, 11]
    assert np.flatnonzero(data.terminations).tolist() == [3, 6]
    assert np.flatnonzero(data.truncations).tolist() == [4, 9]
    assert data.rewards.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert data.env_spec is None and data.ref_max_score is None


@pytest.mark.parametrize("keep", [True, False])
def test_flat_arrays_overwrite_their_source_only_if_allowed(keep: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sb3_diffusion.datasets.arrays.CHUNK_ROWS", 3)
    arrays = toy_arrays(40, (3, 20))
    timeouts = np.zeros(40, bool)
    timeouts[[0, 7, 8, 15, 30]] = True
    before = {key: array.copy() for key, array in arrays.items()}
    data = from_flat_arrays(**arrays, timeouts=timeouts, copy=keep)
    kept = [i for i in range(40) if i not in (0, 7, 8, 15, 30, 39)]
    assert data.observations[:, 0].tolist() == kept and data.rewards.tolist() == kept
    assert data.next_observations[:, 0].tolist() == [i if i in (3, 20) else i + 1 for i in kept]
    assert keep == all((arrays[key] == before[key]).all() for key in arrays)


def test_d4rl_with_next_observations_and_dangling_end(tmp_path: Path):
    arrays = toy_arrays()
    arrays["next_observations"] = arrays["observations"] + 1
    timeouts = np.zeros(12, bool)
    timeouts[5] = True
    data = load_d4rl(write_d4rl(tmp_path / "arm.hdf5", **arrays, timeouts=timeouts))
    assert len(data) == 12
    np.testing.assert_array_equal(data.next_observations, data.observations + 1)
    assert np.flatnonzero(data.terminations).tolist() == [3, 7]
    assert np.flatnonzero(data.truncations).tolist() == [5, 11]


def test_d4rl_terminals_and_timeouts_both_set(tmp_path: Path):
    arrays = toy_arrays()
    timeouts = arrays["terminals"].copy()
    data = load_d4rl(write_d4rl(tmp_path / "arm.hdf5", **arrays, timeouts=timeouts))
    assert np.flatnonzero(data.terminations).tolist() == [3, 7]
    assert np.flatnonzero(data.truncations).tolist() == [10]
    assert not (data.terminations & data.truncations).any()


def test_d4rl_without_timeouts_is_cut_by_the_horizon(tmp_path: Path):
    arrays = toy_arrays(700, ends=(99, 450))
    arrays["next_observations"] = arrays["observations"] + 1
    # maze2d-umaze: 300 steps, counted anew after each end
    data = load_d4rl(write_d4rl(tmp_path / "maze2d-umaze-v1.hdf5", **arrays))
    assert data.episode_ends.tolist() == [99, 399, 450, 699]
    assert np.flatnonzero(data.terminations).tolist() == [99, 450]
    # nobody knows the horizon of this one
    data = load_d4rl(write_d4rl(tmp_path / "arm.hdf5", **arrays))
    assert data.episode_ends.tolist() == [99, 450, 699]
    # an env spec tells: 200 steps
    arrays["observations"] = arrays["next_observations"] = np.zeros((700, 3))
    data = load_dataset(write_d4rl(tmp_path / "pendulum.hdf5", **arrays), env_spec="Pendulum-v1")
    assert data.episode_lengths.tolist() == [100, 200, 151, 200, 49]
    # a terminal exactly at the horizon is a terminal
    data = from_flat_arrays(**toy_arrays(8, ends=(3,)), horizon=4)
    assert np.flatnonzero(data.terminations).tolist() == [3] and np.flatnonzero(data.truncations).tolist() == [6]


def test_d4rl_columns_and_float64(tmp_path: Path):
    arrays = toy_arrays()
    expected = load_d4rl(write_d4rl(tmp_path / "flat.hdf5", **arrays))
    columns = {
        "observations": arrays["observations"].astype(np.float64),
        "actions": arrays["actions"].astype(np.float64),
        "rewards": arrays["rewards"].astype(np.float64)[:, None],
        "terminals": arrays["terminals"].astype(np.uint8)[:, None],
        "timeouts": np.zeros((12, 1), bool),
    }
    data = load_d4rl(write_d4rl(tmp_path / "columns.hdf5", **columns))
    for field in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations"):
        ours, theirs = getattr(data, field), getattr(expected, field)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)


def test_d4rl_names_scores_and_environment(tmp_path: Path):
    arrays = toy_arrays()
    arrays["observations"] = np.zeros((12, 11), np.float32)
    arrays["actions"] = np.zeros((12, 3), np.float32)
    write_d4rl(tmp_path / "d4rl" / "hopper_medium_expert-v2.hdf5", **arrays)
    for source in ("hopper-medium-expert-v2", "hopper_medium_expert-v2", tmp_path / "d4rl" / "hopper_medium_expert-v2.hdf5"):
        data = load_dataset(source)
        assert data.env_spec.id == "Hopper-v5"
        assert (data.ref_min_score, data.ref_max_score) == (-20.272305, 3234.3)
        assert data.score_label == "D4RL reference scores"
    # other dimensions: not that environment
    write_d4rl(tmp_path / "d4rl" / "hopper-medium-v2.hdf5", **toy_arrays())
    data = load_dataset("hopper-medium-v2")
    assert data.env_spec is None and data.ref_max_score == 3234.3
    write_d4rl(tmp_path / "d4rl" / "maze2d-umaze-sparse-v1.hdf5", **toy_arrays())
    assert load_dataset("maze2d-umaze-v1").ref_max_score == 161.86


@pytest.mark.parametrize("name", ["buffer.pkl", "model.zip", "log"])
def test_files_of_another_kind(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"0")
    for source in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(
            ValueError, match=rf"Expected .hdf5, .h5, .npz, .mmap: got '.*{name}'.*model.load_replay_buffer\(path\)"
        ):
            load_dataset(source)


def test_d4rl_bad_files(tmp_path: Path):
    arrays = toy_arrays()
    del arrays["terminals"]
    with pytest.raises(ValueError, match="terminals missing"):
        load_d4rl(write_d4rl(tmp_path / "a.hdf5", **arrays))
    (tmp_path / "b.hdf5").write_text("text")
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        load_dataset(str(tmp_path / "b.hdf5"))
    with pytest.raises(FileNotFoundError, match="No file"):
        load_dataset(tmp_path / "c.hdf5")
    recorded = write_minari("test/toy-v0", [episode(0, 3, True, False)])
    with pytest.raises(ValueError, match="holds Minari episodes"):
        load_dataset(recorded.storage.data_path / "main_data.hdf5")


# Arrays ---------------------------------------------------------------------------------------------------------------


def test_arrays_without_spaces():
    data = load_dataset(toy_arrays())
    assert data.action_space == spaces.Box(-1, 1, (1,)) and data.observation_space.shape == (2,)
    arrays = toy_arrays()
    arrays["observations"] = {"image": np.zeros((12, 6, 6, 1), np.uint8), "joint": np.zeros((12, 3))}
    data = load_dataset(arrays)
    assert data.observation_space["image"] == spaces.Box(0, 255, (6, 6, 1), np.uint8)
    assert data.observations["joint"].dtype == np.float32 and len(data) == 11


def test_arrays_action_range():
    arrays = toy_arrays()
    arrays["actions"] = arrays["actions"] * 2
    with pytest.raises(ValueError, match=r"from -2.0 to 2.0.*Give `action_space`"):
        load_dataset(arrays)
    assert load_dataset(arrays, action_space=spaces.Box(-2, 2, (1,))).actions.min() == -2.0
    with pytest.raises(ValueError, match="lie outside of the action space"):
        load_dataset(arrays, action_space=spaces.Box(-1, 1, (1,)))
    with pytest.warns(UserWarning, match="they are clipped"):
        assert load_dataset(arrays, action_space=spaces.Box(-1, 1, (1,)), clip_actions=True).actions.min() == -1.0
    arrays["actions"] = np.zeros(12, int)
    with pytest.raises(TypeError, match="looks like discrete"):
        load_dataset(arrays)
    with pytest.raises(TypeError, match="must be continuous"):
        load_dataset(arrays, action_space=spaces.Discrete(2))


def test_arrays_with_the_names_of_gymnasium():
    arrays = {**toy_arrays(), "timeouts": np.arange(12) == 10}
    expected = load_dataset(arrays)
    terminations, truncations = arrays.pop("terminals"), arrays.pop("timeouts")
    data = load_dataset({**arrays, "terminations": terminations, "truncations": truncations, "infos": None})
    assert data.terminations.sum() == 2 and data.truncations.sum() == 1
    for field in ("observations", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(data, field), getattr(expected, field))
    for both in (
        {"terminals": terminations},
        {"terminals": terminations, "truncations": truncations, "timeouts": truncations},
    ):
        with pytest.raises(ValueError, match="names of the same flags: got both"):
            load_dataset({**arrays, "terminations": terminations, **both})


def test_arrays_bad():
    arrays = toy_arrays()
    with pytest.raises(ValueError, match="rewards missing"):
        load_dataset({key: value for key, value in arrays.items() if key != "rewards"})
    with pytest.raises(ValueError, match=r"lengths .*rewards 3"):
        load_dataset({**arrays, "rewards": np.zeros(3)})
    with pytest.raises(ValueError, match="is empty"):
        load_dataset({key: value[:0] for key, value in arrays.items()})
    for field in ("rewards", "terminals", "timeouts"):
        with pytest.raises(ValueError, match=rf"`{field}` must have shape \(N,\) or \(N, 1\): got \(12, 2\)"):
            load_dataset({**arrays, field: np.zeros((12, 2))})
    bad = arrays["observations"].copy()
    bad[6] = np.nan
    with pytest.raises(ValueError, match=r"`observations` must be finite.*nan at episode 1, step 2"):
        load_dataset({**arrays, "observations": bad})
    terminals = arrays["terminals"].astype(float)
    terminals[5] = np.nan
    for field in ("terminals", "timeouts"):
        with pytest.raises(ValueError, match=rf"`{field}` must hold 0 or 1.*nan at episode 1, step 1"):
            load_dataset({**arrays, field: terminals})
    actions = arrays["actions"].copy()
    actions[4] = np.inf
    with pytest.raises(ValueError, match=r"`actions` must be finite.*inf at episode 1, step 0"):
        load_dataset({**arrays, "actions": actions})
    with pytest.raises(ValueError, match="No step has a successor"):
        load_dataset({key: value[:1] for key, value in arrays.items()})
    with pytest.raises(TypeError, match="got int"):
        load_dataset(3)
    with pytest.raises(FileNotFoundError, match="No file"):
        load_dataset(Path("nowhere"))


def test_given_spaces_and_spec_override():
    data = load_dataset(toy_arrays())
    assert load_dataset(data) is data
    narrow = spaces.Box(-100, 100, (2,), np.float64)
    other = load_dataset(data, env_spec="Pendulum-v1", observation_space=narrow, action_space=spaces.Box(-2, 2, (1,)))
    assert other.env_spec.id == "Pendulum-v1" and other.observation_space == narrow and other.action_space.high == 2.0
    assert other.observations is data.observations and data.env_spec is None
    with pytest.raises(ValueError, match="given `observation_space` does not match"):
        load_dataset(data, observation_space=spaces.Box(-1, 1, (3,)))
    # images keep their own side
    images = {**toy_arrays(), "observations": np.zeros((12, 8, 8, 3), np.uint8)}
    data = load_dataset(load_dataset(images), observation_space=spaces.Box(0, 255, (3, 8, 8), np.uint8))
    assert data.observation_space.shape == (8, 8, 3)


def test_arrays_take_their_spaces_from_the_environment():
    arrays = {**toy_arrays(), "observations": np.zeros((12, 3)), "actions": np.full((12, 1), 1.7)}
    data = load_dataset(arrays, env_spec="Pendulum-v1")
    assert data.action_space == spaces.Box(-2, 2, (1,)) and data.observation_space.high.tolist() == [1, 1, 8]


def slow_episodes(arrays: dict[str, Any], horizon: int | None) -> list[list[tuple[float, float, bool, bool]]]:
    """The rules of D4RL's layout, one row at a time: lists of (observation, next observation, terminated, truncated)."""
    n, episodes, current, steps = len(arrays["rewards"]), [], [], 0
    successor = arrays.get("next_observations")
    for i in range(n):
        steps += 1
        terminal = bool(arrays["terminals"][i])
        if "timeouts" in arrays:
            timeout = bool(arrays["timeouts"][i]) and not terminal
        else:
            timeout = steps == horizon and not terminal
        timeout = timeout or (i == n - 1 and not terminal)
        here = float(arrays["observations"][i, 0])
        if successor is not None:
            current.append((here, float(successor[i, 0]), terminal, timeout))
        elif terminal:
            current.append((here, here, True, False))
        elif not timeout:
            current.append((here, float(arrays["observations"][i + 1, 0]), False, False))
        elif current:
            current[-1] = (*current[-1][:3], True)
        if terminal or timeout:
            if current:
                episodes.append(current)
            current, steps = [], 0
    return episodes


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_flat_arrays_against_a_slow_reader(data: st.DataObject):
    n = data.draw(st.integers(2, 30))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    arrays: dict[str, Any] = toy_arrays(n, ())
    arrays["terminals"] = np.array(data.draw(flags))
    horizon = data.draw(st.none() | st.integers(1, 8))
    if data.draw(st.booleans()):
        arrays["timeouts"] = np.array(data.draw(flags))
    if data.draw(st.booleans()):
        arrays["next_observations"] = arrays["observations"] + 0.5
    expected = slow_episodes(arrays, horizon)
    if not expected:
        with pytest.raises(ValueError, match="No step has a successor"):
            from_flat_arrays(**arrays, horizon=horizon)
        return
    dataset = from_flat_arrays(**arrays, horizon=horizon)
    got = [
        list(zip(dataset.observations[s : e + 1, 0], dataset.next_observations[s : e + 1, 0],
                 dataset.terminations[s : e + 1], dataset.truncations[s : e + 1], strict=True))
        for s, e in zip(dataset.episode_starts, dataset.episode_ends, strict=True)
    ]  # fmt: skip
    assert got == expected


# Replay buffers -------------------------------------------------------------------------------------------------------

WIDE = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))


def fill(buffer: ReplayBuffer, n_steps: int, n_envs: int, episode_length: int = 5, as_dict: bool = False) -> list[list[Any]]:
    """Add steps of counting envs; every second episode is truncated. Returns what each env did."""
    log: list[list[Any]] = [[] for _ in range(n_envs)]
    steps, episodes = np.arange(n_envs), np.zeros(n_envs, int)
    value = 100.0 * np.arange(n_envs)
    for t in range(n_steps):
        successor = value + 1
        steps += 1
        dones = steps % episode_length == 0
        infos = [{"TimeLimit.truncated": bool(d and e % 2)} for d, e in zip(dones, episodes, strict=True)]
        actions = np.stack([np.full(n_envs, np.sin(t)), np.full(n_envs, np.cos(t))], axis=1).astype(np.float32)
        pack = (lambda x: {"a": x[:, None] * np.ones(2), "b": x[:, None]}) if as_dict else (lambda x: x[:, None] * np.ones(2))
        buffer.add(pack(value), pack(successor), actions, np.full(n_envs, float(t)), dones.astype(float), infos)
        for i in range(n_envs):
            log[i].append((value[i], successor[i], bool(dones[i]), infos[i]["TimeLimit.truncated"], t))
        # a reset observation is one further
        value = successor + dones
        episodes += dones
    return log


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [7, 20, 33])
def test_replay_buffer(n_steps: int, n_envs: int, as_dict: bool):
    kept = 20
    space: spaces.Space = spaces.Dict({"a": OBS_SPACE, "b": spaces.Box(-1e3, 1e3, (1,))}) if as_dict else OBS_SPACE
    cls = DictReplayBuffer if as_dict else ReplayBuffer
    buffer = cls(kept * n_envs, space, WIDE, n_envs=n_envs)
    log = fill(buffer, n_steps, n_envs, as_dict=as_dict)
    data = load_dataset(buffer)
    rows = [row for column in log for row in column[-kept:]]
    value = data.observations["a"] if as_dict else data.observations
    successor = data.next_observations["a"] if as_dict else data.next_observations
    assert value[:, 0].tolist() == [row[0] for row in rows]
    assert successor[:, 0].tolist() == [row[1] for row in rows]
    assert data.terminations.tolist() == [row[2] and not row[3] for row in rows]
    length = min(n_steps, kept)
    ends = [bool(row[3]) for row in rows]
    for last in range(length - 1, len(rows), length):
        ends[last] = ends[last] or not rows[last][2]
    assert data.truncations.tolist() == ends
    times = np.array([row[4] for row in rows])
    np.testing.assert_allclose(data.actions, np.stack([2 * np.sin(times), 5 + 5 * np.cos(times)], axis=1), atol=1e-5)
    np.testing.assert_array_equal(data.rewards, times)
    assert data.action_space == WIDE and data.env_spec is None


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [7, 20, 33])
def test_replay_buffer_with_optimized_memory(n_steps: int, n_envs: int, as_dict: bool):
    space: spaces.Space = spaces.Dict({"a": OBS_SPACE, "b": spaces.Box(-1e3, 1e3, (1,))}) if as_dict else OBS_SPACE
    cls = EpisodeReplayBuffer if as_dict else ReplayBuffer  # SB3's own for Dict observations has no such option
    settings = dict(n_envs=n_envs, optimize_memory_usage=True, handle_timeout_termination=False)
    buffer = cls(20 * n_envs, space, WIDE, device="cpu", **settings)
    log = fill(buffer, n_steps, n_envs, as_dict=as_dict)
    data = load_dataset(buffer)
    # the oldest step of a full ring has lost its observation; the newest next observation is still there
    rows = [row for column in log for row in column[-20:][1 if n_steps >= 20 else 0 :]]
    for key in ("a", "b") if as_dict else [...]:
        assert data.observations[key][:, 0].tolist() == [row[0] for row in rows]
        assert data.next_observations[key][:, 0].tolist() == [row[0] if row[2] else row[1] for row in rows]
    assert data.terminations.tolist() == [row[2] for row in rows]
    assert data.rewards.tolist() == [row[4] for row in rows]


def test_replay_buffer_refuses():
    with pytest.raises(ValueError, match="is empty"):
        load_dataset(ReplayBuffer(10, OBS_SPACE, WIDE))
    with pytest.raises(TypeError, match="must be continuous"):
        load_dataset(ReplayBuffer(10, OBS_SPACE, spaces.Discrete(2)))
    buffer = ReplayBuffer(10, OBS_SPACE, WIDE)
    fill(buffer, 6, 1)
    buffer.actions *= 3
    with pytest.raises(ValueError, match=r"scaled to \[-1, 1\]"):
        load_dataset(buffer)


def test_replay_buffer_of_a_discrete_observation_and_of_her():
    buffer = ReplayBuffer(10, spaces.Discrete(7), ACTION_SPACE)
    for i in range(4):
        buffer.add(np.array([i]), np.array([i + 1]), np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    data = load_dataset(buffer)
    assert data.observations.tolist() == [0, 1, 2, 3] and data.observations.dtype.kind == "i"

    from stable_baselines3.common.envs import BitFlippingEnv

    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=3, continuous=True, max_steps=4)])
    her = HerReplayBuffer(50, env.observation_space, env.action_space, env)
    observation = env.reset()
    for _ in range(13):
        action = np.array([env.action_space.sample()])
        successor, rewards, dones, infos = env.step(action)
        real = {k: v.copy() for k, v in successor.items()}
        if dones[0]:
            real = {k: v[None] for k, v in infos[0]["terminal_observation"].items()}
        her.add(observation, real, action, rewards, dones, infos)
        observation = successor
    data = load_dataset(her)
    assert len(data) == 13 and set(data.observations) == {"observation", "achieved_goal", "desired_goal"}
    assert data.episode_lengths.max() <= 4 and data.observations["observation"].dtype.kind == "i"


# Environments ---------------------------------------------------------------------------------------------------------


def write_pendulum(name: str = "test/pendulum-v0", n_episodes: int = 2, length: int = 200) -> Any:
    env = gym.make("Pendulum-v1")
    env.action_space.seed(0)
    episodes = []
    for i in range(n_episodes):
        observation, _ = env.reset(seed=i)
        log: dict[str, list[Any]] = {
            "observations": [observation],
            "actions": [],
            "rewards": [],
            "terminations": [],
            "truncations": [],
        }
        for _ in range(length):
            action = env.action_space.sample()
            observation, *values, _ = env.step(action)
            for key, value in zip(log, [observation, action, *values], strict=True):
                log[key].append(value)
        episodes.append(log)
    return write_minari(name, episodes, None, env=env, action_space=None)


def test_make_env_brings_its_dataset():
    write_pendulum()
    env = make_env("test/pendulum-v0", max_episode_steps=7)
    assert env.spec.id == "Pendulum-v1" and env.spec.max_episode_steps == 7
    data = env.get_dataset()
    assert len(data) == 400 and env.get_dataset() is data
    for wrapped in (
        env,
        gym.wrappers.RescaleAction(env, -1.0, 1.0),
        DummyVecEnv([lambda: env]),
        VecNormalize(DummyVecEnv([lambda: gym.wrappers.TransformReward(env, float)])),
    ):
        assert find_dataset(wrapped) is data
    stacked = VecFrameStack(VecFrameStack(DummyVecEnv([lambda: env]), 2), 3)
    found = find_dataset(stacked)
    assert found is not None and found.n_stack == 6
    found.check_spaces(stacked.observation_space, stacked.action_space)
    np.testing.assert_array_equal(found.observations, data.stack(6).observations)
    assert find_dataset(gym.make("Pendulum-v1")) is None
    assert find_dataset(VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))) is None
    env.reset(seed=0)
    assert not env.step(env.action_space.sample())[3]


def make_recorded_pendulum() -> gym.Env:
    return make_env("test/pendulum-v0")


def make_plain_pendulum() -> gym.Env:
    return gym.make("Pendulum-v1")


def test_find_dataset_in_another_process():
    write_pendulum()
    env = SubprocVecEnv([make_recorded_pendulum] * 2, start_method="fork")
    try:
        assert len(find_dataset(env)) == 400
    finally:
        env.close()
    env = SubprocVecEnv([make_plain_pendulum], start_method="fork")
    try:
        assert find_dataset(env) is None
        env.reset()  # still alive
    finally:
        env.close()


def test_find_dataset_of_a_d4rl_environment():
    class D4RLEnv(gym.Wrapper):
        def get_dataset(self) -> dict[str, np.ndarray]:
            return {**toy_arrays(), "observations": np.zeros((12, 3)), "actions": np.full((12, 1), 1.5)}

    data = find_dataset(DummyVecEnv([lambda: D4RLEnv(gym.make("Pendulum-v1"))]))
    assert data.action_space.high == 2.0 and data.env_spec.id == "Pendulum-v1"


def test_make_env_from_other_sources():
    with pytest.raises(ValueError, match="does not name its environment"):
        make_env(toy_arrays())
    data = load_dataset({**toy_arrays(), "observations": np.zeros((12, 3))}, env_spec="Pendulum-v1")
    env = make_env(data)
    assert env.get_dataset() is data and env.render_mode == "rgb_array"
    write_minari("test/noenv-v0", [episode(0, 3, True, False)])
    with pytest.raises(ValueError, match="does not name its environment"):
        make_env("test/noenv-v0")


def test_make_dataset_env():
    recorded = write_pendulum()
    env = make_dataset_env(load_dataset(recorded), max_episode_steps=5)
    assert env.render_mode == "rgb_array" and env.spec.max_episode_steps == 5
    data = load_dataset(toy_arrays(), env_spec=None)
    env = make_dataset_env(data)
    assert isinstance(env, SpacesEnv) and env.observation_space == data.observation_space
    with pytest.raises(RuntimeError, match="No environment is known for the dataset 'arrays'"):
        env.reset()
    with pytest.raises(RuntimeError, match="No environment is known"):
        env.step(env.action_space.sample())
    assert DummyVecEnv([lambda: env]).action_space == data.action_space
    wrong = load_dataset(data, env_spec="Pendulum-v1")
    with pytest.raises(ValueError, match=r"observation space does not match.*\(2,\) against \(3,\)"):
        make_dataset_env(wrong)


def test_tasks_without_an_end_are_cut_as_in_the_data():
    spec = copy.deepcopy(gym.spec("Pendulum-v1"))
    spec.max_episode_steps = 1_000_000
    arrays = {**toy_arrays(12, ()), "observations": np.zeros((12, 3)), "next_observations": np.zeros((12, 3))}
    data = load_dataset(arrays, env_spec=spec)
    with pytest.warns(
        UserWarning, match=r"cut after 12 steps.*give the model `make_env\(dataset, max_episode_steps=\.\.\.\)`"
    ):
        assert make_dataset_env(data).spec.max_episode_steps == 12
    with pytest.warns(UserWarning, match="cut after 12 steps"):
        assert make_env(data).spec.max_episode_steps == 12
    assert make_dataset_env(data, max_episode_steps=50).spec.max_episode_steps == 50
    arrays["terminals"][5] = True
    assert make_dataset_env(load_dataset(arrays, env_spec=spec)).spec.max_episode_steps == 1_000_000


class NestedEnv(gym.Env):
    """Goal observations in a Dict of Dicts."""

    observation_space = spaces.Dict(
        {"state": OBS_SPACE, "goal": spaces.Dict({"kettle": spaces.Box(-1, 1, (1,)), "light": spaces.Box(-1, 1, (2,))})}
    )
    action_space = ACTION_SPACE

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, True, {}


def test_nested_dict_environment_fits_its_data():
    if "SB3DiffusionNested-v0" not in gym.registry:
        gym.register("SB3DiffusionNested-v0", entry_point=NestedEnv, max_episode_steps=10)
    env = gym.make("SB3DiffusionNested-v0")
    goal = {"kettle": np.zeros((4, 1)), "light": np.zeros((4, 2))}
    arrays: dict[str, Any] = {**toy_arrays(4, ()), "observations": {"state": np.zeros((4, 2)), "goal": goal}}
    data = load_dataset(arrays, env_spec=env.spec)
    assert set(data.observations) == {"state", "goal.kettle", "goal.light"}
    env = make_dataset_env(data)
    assert isinstance(env, FlattenNestedDictObservation)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation) and set(observation) == set(data.observations)
    assert env.observation_space.contains(env.step(env.action_space.sample())[0])
    assert isinstance(find_dataset(make_env(data)), OfflineDataset)
    DummyVecEnv([lambda: make_env(data)]).reset()


# Reference scores -----------------------------------------------------------------------------------------------------


def test_reference_scores():
    assert d4rl_scores("hopper-medium-v2") == (-20.272305, 3234.3)
    assert d4rl_scores("hopper_medium_expert-v0") == d4rl_scores("hopper-random-v2")
    assert d4rl_scores("halfcheetah-medium-v2") == (-280.178953, 12135.0)
    assert d4rl_scores("ant-medium-v2") == (-325.6, 3879.7) and d4rl_scores("antmaze-umaze-v2") == (0.0, 1.0)
    assert d4rl_scores("maze2d-umaze-dense-v1") == (68.537689, 193.66285642381482)
    assert d4rl_scores("maze2d-umaze-v0") == (0.94, 62.6) and d4rl_scores("maze2d-umaze-v1") == (23.85, 161.86)
    assert d4rl_scores("maze2d-large-dense-v0") == (27.38831, 215.09965671563742)
    assert d4rl_scores("pen-human-v1") == (96.262799, 3076.8331017826877)
    assert d4rl_scores("maze2d-eval-umaze-v1") is None and d4rl_scores("arm") is None
    assert d4rl_horizon("antmaze-umaze-diverse-v0") == 700 and d4rl_horizon("antmaze-large-play-v0") == 1000
    assert d4rl_horizon("kitchen-mixed-v0") == 280 and d4rl_horizon("pen_human-v1") == 100 and d4rl_horizon("arm") is None
    assert d4rl_env_id("walker2d_medium-v2", 17, 6) == "Walker2d-v5" and d4rl_env_id("walker2d_medium-v2", 11, 3) is None
    assert minari_scores("mujoco/walker2d/expert-v0") == (1.629008, 4592.3)
    assert minari_scores("D4RL/kitchen/complete-v2") == (0.0, 4.0)
    assert minari_scores("mujoco/reacher/expert-v0") is None and minari_scores("D4RL/pointmaze/umaze-v2") is None
    assert minari_scores("bench/hopper/medium-v0") is None


# A dataset brings no code ---------------------------------------------------------------------------------------------


def hostile_minari(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """A dataset of Pendulum whose recorded environment has become another, and whose metadata lack what is None."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    env = gym.make("Pendulum-v1")
    buffer = EpisodeBuffer(
        observations=np.zeros((4, 3), np.float32),
        actions=np.zeros((3, 1), np.float32),
        rewards=np.zeros(3),
        terminations=np.zeros(3, bool),
        truncations=np.arange(3) == 2,
        infos={},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("hostile/log-v0", [buffer], env=env)
    file = folder / "hostile/log-v0/data/metadata.json"
    metadata = json.loads(file.read_text())
    spec = json.loads(metadata["env_spec"])
    spec.update({key: value for key, value in changes.items() if key in spec})
    metadata["env_spec"] = json.dumps(spec)
    for key in changes:
        if key in metadata and key not in spec:
            del metadata[key]
    file.write_text(json.dumps(metadata))
    return "hostile/log-v0"


EVIL = "sb3_diffusion_tests_evil"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported."""
    mark = tmp_path / "mark"
    (tmp_path / f"{EVIL}.py").write_text(f"open({str(mark)!r}, 'w')\n\n\ndef make(**kwargs):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return mark


def test_an_environment_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point = "gymnasium_robotics.envs.maze.point_maze:PointMazeEnv"
    source = hostile_minari(tmp_path, monkeypatch, id="PointMaze_Tiny-v9", entry_point=entry_point)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.warns(UserWarning, match=r"sb3-diffusion\[robotics\]"):
        assert load_dataset(source).env_spec is None
    with pytest.raises(ImportError, match=r"PointMaze_Tiny-v9 .*sb3-diffusion\[robotics\]"):
        make_env(source)


def test_environments_of_datasets_bring_no_code(tmp_path: Path, evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hostile_minari(tmp_path / "a", monkeypatch, id="Evil-v0", entry_point=f"{EVIL}:make")
    with pytest.warns(UserWarning, match=r"Evil-v0 \(.*\), which is not registered here"):
        dataset = load_dataset(source)
    assert dataset.env_spec is None
    with (
        pytest.warns(UserWarning, match="not registered"),
        pytest.raises(ValueError, match="does not name its environment"),
    ):
        make_env(source)
    # Under a registered id the code is that of the registry, whatever the data say; foreign wrappers are left out
    wrapper = {"name": "Evil", "entry_point": f"{EVIL}:make", "kwargs": {}}
    clip = {"name": "ClipAction", "entry_point": "gymnasium.wrappers.transform_action:ClipAction", "kwargs": {}}
    video = {"name": "V", "entry_point": "gymnasium.wrappers.rendering:RecordVideo", "kwargs": {"video_folder": str(evil)}}
    changes = dict(entry_point=f"{EVIL}:make", additional_wrappers=[wrapper, clip, video], kwargs={"g": 5.0})
    source = hostile_minari(tmp_path / "b", monkeypatch, **changes)
    with pytest.warns(UserWarning, match=f"wrappers that a file may not bring: {EVIL}:make, .*RecordVideo. They are left out"):
        env = make_env(source)
    assert env.unwrapped.g == 5.0 and type(env.unwrapped).__name__ == "PendulumEnv"
    assert isinstance(env.env, gym.wrappers.ClipAction)
    assert not evil.exists() and EVIL not in sys.modules


@pytest.mark.parametrize("lacking", ["observation_space", "action_space"])
def test_environments_are_not_made_to_learn_the_spaces(
    lacking: str, tmp_path: Path, evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hostile_minari(tmp_path / "a", monkeypatch, **{lacking: None, "entry_point": f"{EVIL}:make"})
    with pytest.raises(ValueError, match="metadata tell no spaces"):
        load_dataset(source)
    assert not evil.exists()
    good = hostile_minari(tmp_path / "b", monkeypatch, **{lacking: None})
    assert load_dataset(good).observation_space == gym.make("Pendulum-v1").observation_space
