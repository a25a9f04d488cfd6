"""Replay storage against a plain list of episodes, against SB3's buffers, and inside SB3's algorithms."""

import copy
import pickle
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffusion.buffers import EpisodeReplayBuffer, concat_samples, storage
from sb3_diffusion.buffers.device_mirror import DeviceMirror
from sb3_diffusion.datasets.offline_dataset import OfflineDataset

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = spaces.Box(-1.0, 1.0, (2,), np.float32)
DICT = spaces.Dict({"a": OBS, "n": spaces.Discrete(1000), "bits": spaces.MultiBinary(2)})
GOES_ON, TERMINATES, TRUNCATES = range(3)


class CopyingBuffer(EpisodeReplayBuffer):
    """Keeps a second copy of all arrays, as on a GPU."""

    def _make_mirror(self, arrays: dict[str, np.ndarray], n_rows: int) -> DeviceMirror:
        return DeviceMirror(arrays, self.device, n_rows, copy=True)


class Step(NamedTuple):
    episode: int
    terminated: bool
    truncated: bool


class Oracle:
    """Drives a buffer and remembers each environment's steps in a list."""

    def __init__(self, buffer: EpisodeReplayBuffer) -> None:
        self.buffer = buffer
        self.steps: list[list[Step]] = [[] for _ in range(buffer.n_envs)]
        self.episode = [0] * buffer.n_envs

    def observation(self, env: int, t: int, offset: float = 0.0) -> Any:
        values = np.array([env, t + offset, t + offset], np.float32)
        if isinstance(self.buffer.observation_space, spaces.Dict):
            n, bits = int(2 * (t + offset)) % 1000, [env % 2, int(2 * (t + offset)) % 2]
            return {"a": values, "n": np.int64(n), "bits": np.int8(bits)}
        return values

    def add(self, outcomes: list[int]) -> None:
        n_envs, t = self.buffer.n_envs, len(self.steps[0])
        for env, outcome in enumerate(outcomes):
            truncated = outcome == TRUNCATES and self.buffer.handle_timeout_termination
            self.steps[env].append(Step(self.episode[env], outcome != GOES_ON and not truncated, truncated))
            self.episode[env] += outcome != GOES_ON

        def batch(offset: float) -> Any:
            rows = [self.observation(env, t, offset) for env in range(n_envs)]
            if isinstance(rows[0], dict):
                return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
            return np.stack(rows)

        self.buffer.add(
            batch(0.0),
            batch(0.5),
            np.stack([self.action(env, t) for env in range(n_envs)]),
            np.array([self.reward(env, t) for env in range(n_envs)]),
            np.array([outcome != GOES_ON for outcome in outcomes]),
            [{"TimeLimit.truncated": outcome == TRUNCATES} for outcome in outcomes],
        )

    def truncate(self) -> None:
        """What `truncate_last_trajectory` does, said of the list."""
        for env, steps in enumerate(self.steps):
            if steps and not (steps[-1].terminated or steps[-1].truncated):
                handled = self.buffer.handle_timeout_termination
                steps[-1] = steps[-1]._replace(truncated=handled, terminated=not handled)
                self.episode[env] += 1

    @staticmethod
    def action(env: int, t: int) -> np.ndarray:
        return np.array([t % 100 / 100, -env / 10], np.float32)

    @staticmethod
    def reward(env: int, t: int) -> float:
        return float((7 * t + 3 * env) % 11) - 4.0

    def stored(self) -> list[tuple[int, int]]:
        """All (env, t) that the buffer must hold."""
        n_steps = len(self.steps[0])
        first = max(0, n_steps - self.buffer.buffer_size)
        if self.buffer.optimize_memory_usage and n_steps >= self.buffer.buffer_size:
            first += 1
        return [(env, t) for t in range(first, n_steps) for env in range(self.buffer.n_envs)]

    def flat(self, pairs: list[tuple[int, int]]) -> np.ndarray:
        rows = [t % self.buffer.buffer_size * self.buffer.n_envs + env for env, t in pairs]
        return np.array(rows, dtype=np.int64)

    def same_episode(self, env: int, t: int, step: int) -> int:
        """Number of stored steps of the episode of (env, t) on one side of it."""
        oldest, count = max(0, len(self.steps[env]) - self.buffer.buffer_size), 0
        while oldest <= t + (count + 1) * step < len(self.steps[env]):
            if self.steps[env][t + (count + 1) * step].episode != self.steps[env][t].episode:
                break
            count += 1
        return count

    def check_index(self) -> None:
        pairs, buffer = self.stored(), self.buffer
        flat = self.flat(pairs)
        assert buffer.steps_remaining(flat).tolist() == [self.same_episode(env, t, 1) for env, t in pairs]
        assert buffer.steps_elapsed(flat).tolist() == [self.same_episode(env, t, -1) for env, t in pairs]
        assert buffer.is_complete(flat).tolist() == [self.steps[env][t].episode < self.episode[env] for env, t in pairs]
        assert buffer.terminated(flat).tolist() == [float(self.steps[env][t].terminated) for env, t in pairs]

    def check_rows(self, samples: Any, pairs: list[tuple[int, int]]) -> None:
        """Compare a batch with the transitions, or n-step transitions, that start at the pairs."""
        n_steps, gamma = self.buffer.n_steps, self.buffer.gamma
        for row, (env, t) in enumerate(pairs):
            length = min(n_steps, self.same_episode(env, t, 1) + 1)
            last = t + length - 1
            step = self.steps[env][last]
            self.check_observation(samples.observations, row, self.observation(env, t))
            if not self.buffer.optimize_memory_usage:
                self.check_observation(samples.next_observations, row, self.observation(env, last, 0.5))
            elif not (step.terminated or step.truncated):
                # the value in between is overwritten by the next step's own observation, unless there is none
                offset = 0.5 if last + 1 == len(self.steps[env]) else 1.0
                self.check_observation(samples.next_observations, row, self.observation(env, last, offset))
            np.testing.assert_array_equal(samples.actions[row].numpy(), self.action(env, t))
            assert samples.dones[row].tolist() == [float(step.terminated)]
            expected = sum(gamma**k * self.reward(env, t + k) for k in range(length))
            assert samples.rewards[row].item() == pytest.approx(expected, abs=1e-4)
            if n_steps > 1:
                assert samples.discounts[row].item() == pytest.approx(gamma**length, rel=1e-6)
        assert samples.rewards.shape == samples.dones.shape == (len(pairs), 1)
        assert (samples.discounts is None) == (n_steps == 1)

    @staticmethod
    def check_observation(got: Any, row: int, expected: Any) -> None:
        if isinstance(expected, dict):
            for key, value in expected.items():
                np.testing.assert_array_equal(got[key][row].numpy().reshape(-1), np.atleast_1d(value))
        else:
            np.testing.assert_array_equal(got[row].numpy(), expected)


@st.composite
def scripts(draw: st.DrawFn) -> tuple[int, int, list[Any]]:
    """Capacity, number of environments, and what happens: outcomes per environment, "look", "cut"."""
    n_envs, capacity, length = draw(st.integers(1, 3)), draw(st.integers(1, 10)), draw(st.integers(0, 25))
    outcome = st.sampled_from([GOES_ON, GOES_ON, GOES_ON, TERMINATES, TRUNCATES])
    outcomes = st.tuples(*[outcome] * n_envs).map(list)
    event = st.one_of(outcomes, outcomes, outcomes, outcomes, st.sampled_from(["look", "cut"]))
    return capacity, n_envs, [draw(event) for _ in range(length)]


def play(buffer: EpisodeReplayBuffer, events: list[Any]) -> Oracle:
    oracle = Oracle(buffer)
    for event in events:
        if event == "cut":
            buffer.truncate_last_trajectory()
            oracle.truncate()
        elif event != "look":
            oracle.add(event)
        elif oracle.steps[0]:
            oracle.check_index()
    return oracle


@pytest.mark.parametrize("buffer_class", [EpisodeReplayBuffer, CopyingBuffer])
@pytest.mark.parametrize("space", [OBS, DICT], ids=["box", "dict"])
@pytest.mark.parametrize("optimize", [False, True], ids=["", "optimized"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(script=scripts(), n_steps=st.integers(1, 4))
def test_against_lists_of_episodes(buffer_class, space, optimize, script, n_steps):
    """The index, all stored rows and n-step returns, at any time, with wrap-around and several environments."""
    capacity, n_envs, events = script
    buffer = buffer_class(
        capacity * n_envs + n_envs - 1,
        space,
        ACT,
        device="cpu",
        n_envs=n_envs,
        optimize_memory_usage=optimize,
        handle_timeout_termination=not optimize,
        n_steps=n_steps,
        gamma=0.9,
    )
    assert buffer.buffer_size == capacity
    oracle = play(buffer, events)
    assert buffer.size() == min(len(oracle.steps[0]), capacity)
    pairs = oracle.stored()
    if not pairs:
        with pytest.raises(RuntimeError, match="no transition to sample"):
            buffer.sample(4)
        return
    oracle.check_index()
    oracle.check_rows(buffer._get_samples(oracle.flat(pairs)), pairs)


@pytest.mark.parametrize("optimize", [False, True])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(script=scripts(), seed=st.integers(0, 2**32))
def test_sampling_reaches_exactly_the_valid_steps(optimize, script, seed):
    capacity, n_envs, events = script
    buffer = EpisodeReplayBuffer(
        capacity * n_envs,
        OBS,
        ACT,
        device="cpu",
        n_envs=n_envs,
        optimize_memory_usage=optimize,
        handle_timeout_termination=not optimize,
        generator=th.Generator().manual_seed(seed),
    )
    oracle = play(buffer, events)
    pairs = oracle.stored()
    if pairs:
        batch = buffer.sample(40 * len(pairs)).observations.numpy()
        assert {(env, t) for env, t, _ in batch.tolist()} == set(pairs)


def test_sampling_is_uniform():
    buffer = EpisodeReplayBuffer(20, OBS, ACT, device="cpu", n_envs=2, generator=th.Generator().manual_seed(0))
    play(buffer, [[GOES_ON, GOES_ON]] * 13)
    counts = th.bincount(buffer.draw_indices(20_000), minlength=20)
    # 19 degrees of freedom: 43.8 is the 99.9 % quantile of chi square
    assert (((counts - 1000.0) ** 2) / 1000.0).sum() < 43.8


def test_long_gaps_between_looks():
    """More steps than the capacity since the index was last used; then in small portions again."""
    oracle = Oracle(EpisodeReplayBuffer(14, OBS, ACT, device="cpu", n_envs=2))
    rng = np.random.default_rng(0)
    for portion in (1, 30, 7, 6, 8, 1, 2, 50):
        for _ in range(portion):
            oracle.add(rng.choice(3, size=2, p=[0.8, 0.1, 0.1]).tolist())
        oracle.check_index()


def test_episode_longer_than_the_buffer():
    oracle = play(EpisodeReplayBuffer(5, OBS, ACT, device="cpu"), [[GOES_ON]] * 12)
    oracle.check_index()
    oracle.add([TERMINATES])
    oracle.check_index()
    oracle.add([GOES_ON])
    oracle.check_index()


def test_done_flag_set_from_outside_ends_the_episode():
    """SB3's ``learn`` sets ``dones[pos - 1]``, with ``optimize_memory_usage``, before the environment is reset."""
    for look in (False, True):
        buffer = EpisodeReplayBuffer(
            8, OBS, ACT, device="cpu", n_steps=3, gamma=0.5, optimize_memory_usage=True, handle_timeout_termination=False
        )
        oracle = play(buffer, [[GOES_ON]] * 4)
        if look:
            oracle.check_index()
        buffer.dones[buffer.pos - 1] = True
        assert buffer.is_complete(np.arange(4)).all()
        oracle.truncate()
        for _ in range(3):
            oracle.add([GOES_ON])
        oracle.check_index()
        assert buffer.steps_remaining(np.arange(7)).tolist() == [3, 2, 1, 0, 2, 1, 0]
        oracle.check_rows(buffer._get_samples(np.arange(7)), [(0, t) for t in range(7)])


def test_truncate_last_trajectory_keeps_the_bootstrap():
    buffer = EpisodeReplayBuffer(10, OBS, ACT, device="cpu", n_envs=2)
    oracle = play(buffer, [[GOES_ON, GOES_ON], [GOES_ON, TERMINATES]])
    buffer.truncate_last_trajectory()
    assert buffer.dones[1].tolist() == [1, 1]
    assert buffer.timeouts[1].tolist() == [1, 0]
    oracle.truncate()
    oracle.check_index()
    buffer.truncate_last_trajectory()  # nothing runs any more
    oracle.check_index()
    EpisodeReplayBuffer(10, OBS, ACT, device="cpu").truncate_last_trajectory()


def fill_both(ours: EpisodeReplayBuffer, theirs: ReplayBuffer, n_steps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(n_steps):
        done, truncated = bool(rng.random() < 0.25), bool(rng.random() < 0.5)
        step = (
            rng.normal(size=(1, *OBS.shape)).astype(np.float32),
            rng.normal(size=(1, *OBS.shape)).astype(np.float32),
            rng.uniform(-1, 1, size=(1, *ACT.shape)).astype(np.float32),
            rng.normal(size=1),
            np.array([done]),
            [{"TimeLimit.truncated": done and truncated}],
        )
        ours.add(*step)
        theirs.add(*step)


@pytest.mark.parametrize("n_added", [7, 10, 26])
@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_same_as_sb3(n_added, n_steps):
    theirs: ReplayBuffer = ReplayBuffer(10, OBS, ACT, device="cpu")
    if n_steps > 1:
        theirs = NStepReplayBuffer(10, OBS, ACT, device="cpu", n_steps=n_steps, gamma=0.97)
    ours = EpisodeReplayBuffer(10, OBS, ACT, device="cpu", n_steps=n_steps, gamma=0.97)
    fill_both(ours, theirs, n_added)
    assert isinstance(ours, ReplayBuffer)
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        array = getattr(ours, name)
        np.testing.assert_array_equal(array, getattr(theirs, name))
        assert array.dtype == getattr(theirs, name).dtype
    index = np.arange(ours.size())
    for got, expected in zip(ours._get_samples(index), theirs._get_samples(index), strict=True):
        if expected is None:
            assert got is None
        else:
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
            th.testing.assert_close(got, expected)


def test_truncation_flag_without_done_ends_the_episode():
    """Environments that are not vectorized by SB3 may report a timeout without ``done``; SB3's n-step buffer stops there."""
    buffer = EpisodeReplayBuffer(10, OBS, ACT, device="cpu")
    for t in range(5):
        zeros = np.zeros((1, 3), np.float32)
        buffer.add(zeros, zeros, np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{"TimeLimit.truncated": t == 2}])
    assert buffer.steps_remaining(np.arange(5)).tolist() == [2, 1, 0, 1, 0]
    assert buffer.terminated(np.arange(5)).tolist() == [0.0] * 5


def test_capacity_one():
    oracle = Oracle(EpisodeReplayBuffer(1, OBS, ACT, device="cpu"))
    for outcome in (GOES_ON, TERMINATES, GOES_ON, TRUNCATES):
        oracle.add([outcome])
        oracle.check_index()
        oracle.check_rows(oracle.buffer.sample(2), [(0, len(oracle.steps[0]) - 1)] * 2)
    optimized = EpisodeReplayBuffer(1, OBS, ACT, optimize_memory_usage=True, handle_timeout_termination=False)
    Oracle(optimized).add([GOES_ON])
    with pytest.raises(RuntimeError, match="capacity of 1"):
        optimized.sample(1)


def test_extend_and_reset():
    buffer = EpisodeReplayBuffer(8, OBS, ACT, device="cpu", n_envs=2)
    source = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    infos = [[{}, {}]] * 5
    done = np.zeros((5, 2))
    done[3, 1] = 1
    buffer.extend(source, source + 1, np.zeros((5, 2, 2)), np.ones((5, 2)), done, infos)
    assert buffer.full and buffer.pos == 1 and buffer.size() == buffer.buffer_size == 4
    assert buffer.steps_remaining(np.array([[2, 3], [0, 1]])).tolist() == [[3, 2], [0, 0]]
    buffer.reset()
    assert buffer.size() == 0
    with pytest.raises(RuntimeError, match="empty"):
        buffer.sample(1)
    oracle = play(buffer, [[GOES_ON, GOES_ON]] * 3)
    oracle.check_index()
    oracle.check_rows(buffer._get_samples(oracle.flat(oracle.stored())), oracle.stored())


@pytest.mark.parametrize(
    "space, stored",
    [
        (spaces.Box(-1, 1, (2,), np.float64), np.float32),
        (spaces.Box(-1, 1, (2,), np.float16), np.float32),
        (spaces.Box(0, 255, (3, 8, 8), np.uint8), np.uint8),
        (spaces.Box(-5, 5, (2, 2), np.int16), np.int16),
        (spaces.Discrete(7), np.int64),
        (spaces.MultiDiscrete([3, 4]), np.int64),
        (spaces.MultiBinary(3), np.int8),
    ],
    ids=str,
)
def test_types_of_observations(space, stored):
    """Floating point is kept as float32, all else as it is; Dict entries the same."""
    space.seed(0)
    first, second = (np.stack([np.asarray(space.sample()) for _ in range(2)]) for _ in range(2))
    rest = (np.zeros((2, 2)), np.zeros(2), np.zeros(2), [{}, {}])
    buffer = EpisodeReplayBuffer(6, space, ACT, device="cpu", n_envs=2)
    buffer.add(first, second, *rest)
    dicts = EpisodeReplayBuffer(6, spaces.Dict({"x": space}), ACT, device="cpu", n_envs=2)
    dicts.add({"x": first}, {"x": second}, *rest)
    assert buffer.observations.dtype == dicts.observations["x"].dtype == stored
    shape = space.shape or (1,)
    assert buffer.observations.shape == dicts.next_observations["x"].shape == (3, 2, *shape)
    for env in range(2):
        sample, as_dict = (b._get_samples(np.array([env])) for b in (buffer, dicts))
        assert isinstance(sample, ReplayBufferSamples) and isinstance(as_dict, DictReplayBufferSamples)
        for tensor, expected in (
            (sample.observations, first),
            (as_dict.observations["x"], first),
            (sample.next_observations, second),
            (as_dict.next_observations["x"], second),
        ):
            assert tensor.numpy().dtype == stored
            np.testing.assert_array_equal(tensor[0].numpy(), expected[env].astype(stored).reshape(shape))


def test_types_of_actions():
    """Boxes of several dimensions are flattened, float64 becomes float32, Discrete actions stay integers."""
    buffer = EpisodeReplayBuffer(4, OBS, spaces.Box(-1, 1, (2, 3), np.float64), device="cpu")
    action = np.linspace(-1, 1, 6).reshape(1, 2, 3)
    zeros = np.zeros((1, 3))
    buffer.add(zeros, zeros, action, np.zeros(1), np.zeros(1), [{}])
    sample = buffer.sample(3)
    assert sample.actions.dtype == th.float32
    np.testing.assert_array_equal(sample.actions.numpy(), np.repeat(action.reshape(1, 6).astype(np.float32), 3, axis=0))
    assert EpisodeReplayBuffer(4, OBS, spaces.Discrete(3), device="cpu").actions.dtype == np.int64


def test_samples_are_copies():
    oracle = play(EpisodeReplayBuffer(4, OBS, ACT, device="cpu"), [[GOES_ON]] * 3)
    batch = oracle.buffer.sample(8)
    batch.observations.zero_()
    batch.actions.zero_()
    oracle.check_rows(oracle.buffer._get_samples(np.arange(3)), [(0, t) for t in range(3)])


class DictEnv(gym.Env):
    observation_space = spaces.Dict({"a": spaces.Box(-9, 9, (2,), np.float64), "b": spaces.Box(-9, 9, (1,), np.float32)})
    action_space = ACT

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_vec_normalize(as_dict, n_steps):
    venv: Any = DummyVecEnv([DictEnv if as_dict else (lambda: gym.make("Pendulum-v1"))])
    env = VecNormalize(venv, clip_obs=1.0, clip_reward=0.5, norm_obs_keys=["a"] if as_dict else None)
    env.reset()
    for _ in range(20):
        env.step(np.stack([env.action_space.sample()]))
    buffer = EpisodeReplayBuffer(5, env.observation_space, env.action_space, device="cpu", n_steps=n_steps, gamma=0.5)
    env.training = False
    raw = []
    for _ in range(4):
        before = env.get_original_obs()
        env.step(np.stack([env.action_space.sample()]))
        raw.append((before, env.get_original_obs(), env.get_original_reward()))
        buffer.add(raw[-1][0], raw[-1][1], np.zeros((1, *env.action_space.shape)), raw[-1][2], np.zeros(1), [{}])
    normalized, plain = buffer._get_samples(np.arange(4), env=env), buffer._get_samples(np.arange(4))
    for t in range(4):
        length = min(n_steps, 4 - t)
        rewards = [env.normalize_reward(raw[t + k][2])[0] for k in range(length)]
        assert normalized.rewards[t].item() == pytest.approx(sum(0.5**k * r for k, r in enumerate(rewards)), rel=1e-5)
        for got, unscaled, expected in (
            (normalized.observations, plain.observations, raw[t][0]),
            (normalized.next_observations, plain.next_observations, raw[t + length - 1][1]),
        ):
            for key in expected if as_dict else [None]:
                pick = (lambda x, key=key: x) if key is None else (lambda x, key=key: x[key])
                np.testing.assert_allclose(pick(got)[t].numpy(), pick(env.normalize_obs(expected))[0], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(pick(unscaled)[t].numpy(), pick(expected)[0], rtol=1e-6)
                assert pick(got).dtype == th.float32
    # the window of a subclass is normalized in the same way
    window = buffer.gather("observations", np.array([[0, 1], [2, 3]]), env)
    got = window["a"] if as_dict else window
    th.testing.assert_close(got.flatten(0, 1), normalized.observations["a"] if as_dict else normalized.observations)


def test_generator_decides():
    def make(generator: th.Generator | None = None) -> EpisodeReplayBuffer:
        return play(EpisodeReplayBuffer(50, OBS, ACT, device="cpu", generator=generator), [[GOES_ON]] * 40).buffer

    def draws(buffer: EpisodeReplayBuffer) -> list[int]:
        return buffer.draw_indices(20).tolist()

    assert draws(make(th.Generator().manual_seed(1))) == draws(make(th.Generator().manual_seed(1)))
    assert draws(make(th.Generator().manual_seed(1))) != draws(make(th.Generator().manual_seed(2)))
    th.manual_seed(3)
    buffer = make()
    first = draws(buffer)
    state = th.get_rng_state()
    assert draws(buffer) != first
    assert th.equal(state, th.get_rng_state())  # sampling leaves torch's own generator alone
    th.manual_seed(3)
    assert draws(make()) == first
    assert draws(make()) != first  # a second buffer of one process draws something else
    buffer.generator = th.Generator().manual_seed(1)
    assert draws(buffer) == draws(make(th.Generator().manual_seed(1)))


def assert_same_buffer(one: EpisodeReplayBuffer, other: EpisodeReplayBuffer) -> None:
    assert (one.pos, one.full, one.size(), one.n_envs) == (other.pos, other.full, other.size(), other.n_envs)
    flat = np.arange(one.size() * one.n_envs)
    for name in ("steps_remaining", "steps_elapsed", "is_complete", "terminated"):
        assert getattr(one, name)(flat).tolist() == getattr(other, name)(flat).tolist()
    for mine, its in zip(one.sample(30), other.sample(30), strict=True):
        if isinstance(mine, dict):
            assert all(th.equal(mine[key], its[key]) for key in its)
        else:
            assert mine is its or th.equal(mine, its)


@pytest.mark.parametrize("how", ["state", "copy", "pickle"])
@pytest.mark.parametrize("optimize", [False, True], ids=["", "optimized"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    script=scripts(), more=st.lists(st.sampled_from([GOES_ON, GOES_ON, TERMINATES]), max_size=12), n_steps=st.integers(1, 3)
)
def test_state_round_trip(how, optimize, script, more, n_steps):
    """The copy is the same buffer, and stays so when both go on."""
    capacity, n_envs, events = script
    options: dict[str, Any] = dict(optimize_memory_usage=optimize, handle_timeout_termination=not optimize)
    buffer = EpisodeReplayBuffer(capacity * n_envs, DICT, ACT, device="cpu", n_envs=n_envs, n_steps=n_steps, **options)
    oracle = play(buffer, [*events, [GOES_ON] * n_envs])
    if buffer.size() > 1:
        buffer.sample(3)
    if how == "state":
        state = buffer.get_state()
        assert all(isinstance(value, np.ndarray | int | float | str) for value in state.values())
        assert len(state["rewards"]) == buffer.size()
        process_state = th.get_rng_state()
        other = EpisodeReplayBuffer(3, DICT, ACT, device="cpu")
        other.set_state(copy.deepcopy(state))
        assert th.equal(process_state, th.get_rng_state())
    else:
        other = copy.deepcopy(buffer) if how == "copy" else pickle.loads(pickle.dumps(buffer))
    twin = copy.deepcopy(oracle)
    twin.buffer = other
    for step in range(len(more) + 1):
        if len(oracle.stored()):
            assert_same_buffer(buffer, other)
            twin.check_index()
        if step < len(more):
            oracle.add([more[step]] * n_envs)
            twin.add([more[step]] * n_envs)


def test_state_that_does_not_fit_is_refused():
    oracle = play(EpisodeReplayBuffer(5, OBS, ACT, device="cpu"), [[GOES_ON]] * 3)
    state = oracle.buffer.get_state()
    pairs = [(0, t) for t in range(3)]
    for change, message in [
        ({"rewards": state["rewards"][:2]}, r"`rewards` of the saved replay buffer must be float32 of shape \(3, 1\)"),
        ({"actions": state["actions"].astype(np.float64)}, "`actions`.*got float64"),
        ({"observations": None}, "`observations`.*got NoneType"),
        ({"pos": 9}, "do not fit each other"),
        ({"generator_state": np.zeros(3, np.uint8)}, "generator_state"),
    ]:
        with pytest.raises(ValueError, match=message):
            oracle.buffer.set_state({**state, **change})
        oracle.check_rows(oracle.buffer._get_samples(np.arange(3)), pairs)
    with pytest.raises(ValueError, match="'pos'"):
        oracle.buffer.set_state({name: value for name, value in state.items() if name != "pos"})
    with pytest.raises(ValueError, match="same observation and action spaces"):
        EpisodeReplayBuffer(5, spaces.Box(0, 1, (4,)), ACT, device="cpu").set_state(state)


def test_bad_arguments():
    for kwargs, message in [
        (dict(n_envs=0), "n_envs"),
        (dict(n_steps=0), "n_steps"),
        (dict(gamma=1.5), "gamma"),
        (dict(optimize_memory_usage=True), "handle_timeout_termination"),
    ]:
        with pytest.raises(ValueError, match=message):
            EpisodeReplayBuffer(5, OBS, ACT, **kwargs)


def test_warns_about_memory(monkeypatch):
    """As SB3's does; the memory itself is not touched before it is written to."""
    one_gigabyte = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=10**9))
    monkeypatch.setattr(storage, "psutil", one_gigabyte)
    space = spaces.Box(0, 255, (3, 100, 100), np.uint8)
    with pytest.warns(UserWarning, match=r"enough memory to store the complete replay buffer 6\.00GB > 1\.00GB"):
        EpisodeReplayBuffer(100_000, space, ACT, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EpisodeReplayBuffer(10_000, space, ACT, device="cpu")


# Copies on a device ---------------------------------------------------------------------------------------------------


def test_mirror_takes_what_fits_and_no_images():
    arrays = {
        "small": np.arange(8, dtype=np.float32).reshape(4, 2),
        "large": np.arange(80, dtype=np.float32).reshape(4, 2, 10),
        "image": np.arange(96, dtype=np.uint8).reshape(4, 2, 3, 2, 2),
    }
    index = th.tensor([[0, 7], [3, 1]])
    for budget, copied in [(0, set()), (100, {"small"}), (10_000, {"small", "large"})]:
        mirror = DeviceMirror(arrays, th.device("cpu"), 4, copy=True, budget=budget)
        assert mirror.copied == copied
        for name, array in arrays.items():
            expected = array.reshape(8, *array.shape[2:])[index.numpy()]
            np.testing.assert_array_equal(mirror.gather(name, index).numpy(), expected)
    assert DeviceMirror(arrays, th.device("cpu"), 4).copied == set()


def test_mirror_refreshes_only_what_it_is_told():
    array = np.zeros((5, 2), np.float32)
    mirror = DeviceMirror({"x": array}, th.device("cpu"), 5, copy=True)
    array[:] = 1
    mirror.refresh("x", 4, 2)
    assert mirror.gather("x", th.arange(10)).view(5, 2)[:, 0].tolist() == [1, 0, 0, 0, 1]
    mirror.refresh("x", -2, 1)
    assert mirror.gather("x", th.arange(10)).view(5, 2)[:, 0].tolist() == [1, 0, 0, 1, 1]
    mirror.refresh("x", 3, 99)
    assert mirror.gather("x", th.arange(10)).tolist() == [1] * 10


def test_mirror_copies_new_rows_only(monkeypatch):
    """One step between two samples costs the copy of a few rows, whatever the size of the buffer."""
    buffer = CopyingBuffer(100, OBS, ACT, device="cpu")
    oracle = play(buffer, [[GOES_ON]] * 50)
    buffer.sample(1)
    copied: dict[str, int] = {}
    refresh = DeviceMirror.refresh

    def counting(self: DeviceMirror, name: str, first: int, n_rows: int) -> None:
        copied[name] = copied.get(name, 0) + n_rows
        refresh(self, name, first, n_rows)

    monkeypatch.setattr(DeviceMirror, "refresh", counting)
    buffer.sample(1)
    assert copied == {}
    oracle.add([GOES_ON])
    buffer.sample(1)
    assert set(copied) == buffer._mirror.copied and max(copied.values()) <= 2
    oracle.add([TERMINATES])
    copied.clear()
    buffer.sample(1)
    assert copied["remaining"] == 52 and copied["observations"] <= 2  # the index of the whole episode is new
    oracle.check_index()


def test_device_may_change():
    """The mirror follows ``device``, which SB3 sets after loading."""
    oracle = play(EpisodeReplayBuffer(5, OBS, ACT, device="cpu"), [[GOES_ON]] * 3)
    mirror = oracle.buffer._store()
    oracle.buffer.device = th.device("cpu", 0)
    assert oracle.buffer._store() is not mirror
    oracle.buffer.device = th.device("cpu")
    oracle.check_rows(oracle.buffer._get_samples(np.arange(3)), [(0, t) for t in range(3)])


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("space", [OBS, DICT], ids=["box", "dict"])
@pytest.mark.parametrize("optimize", [False, True], ids=["", "optimized"])
def test_cuda_gives_the_same(space, optimize):
    options: dict[str, Any] = dict(
        n_envs=2, n_steps=2, optimize_memory_usage=optimize, handle_timeout_termination=not optimize
    )
    host, device = (EpisodeReplayBuffer(14, space, ACT, device=name, **options) for name in ("cpu", "cuda"))
    assert device.generator.device.type == "cuda"
    rng = np.random.default_rng(0)
    oracle, twin = Oracle(host), Oracle(device)
    for portion in (3, 1, 9, 2):
        for _ in range(portion):
            outcomes = rng.choice(2, size=2, p=[0.8, 0.2]).tolist()
            oracle.add(outcomes)
            twin.add(outcomes)
        twin.check_index()
        flat = oracle.flat(oracle.stored())
        for expected, got in zip(host._get_samples(flat), device._get_samples(flat), strict=True):
            for key in expected if isinstance(expected, dict) else [None]:
                e, g = (expected, got) if key is None else (expected[key], got[key])
                assert g.device.type == "cuda"
                th.testing.assert_close(g.cpu(), e)
        assert device.sample(16).rewards.device.type == "cuda"


# Datasets -------------------------------------------------------------------------------------------------------------


def make_dataset(obs_space: spaces.Space = OBS, action_space: spaces.Box = ACT, n_steps: int = 30) -> OfflineDataset:
    obs_space.seed(0)
    action_space.seed(0)
    rng = np.random.default_rng(0)

    def observations() -> Any:
        rows = [obs_space.sample() for _ in range(n_steps)]
        if isinstance(obs_space, spaces.Dict):
            return {key: np.stack([row[key] for row in rows]) for key in obs_space.spaces}
        return np.stack([np.asarray(row) for row in rows])

    ends = rng.choice(3, size=n_steps, p=[0.8, 0.1, 0.1])
    actions = np.stack([action_space.sample() for _ in range(n_steps)])
    rewards = rng.normal(size=n_steps).astype(np.float32)
    flags = (ends == TERMINATES, ends == TRUNCATES)
    return OfflineDataset(
        observations(), actions, rewards, observations(), *flags, observation_space=obs_space, action_space=action_space
    )


def test_dataset_shares_memory():
    dataset = make_dataset()
    buffer = EpisodeReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu")
    for name in ("observations", "next_observations", "actions", "rewards"):
        assert np.shares_memory(getattr(buffer, name), getattr(dataset, name))
    assert (buffer.n_envs, buffer.buffer_size, buffer.size(), buffer.full) == (1, 30, 30, True)
    assert buffer._store()._tables["observations"].data_ptr() == dataset.observations.ctypes.data
    sample = buffer._get_samples(np.arange(30))
    np.testing.assert_array_equal(sample.observations.numpy(), dataset.observations)
    np.testing.assert_array_equal(sample.next_observations.numpy(), dataset.next_observations)
    np.testing.assert_array_equal(sample.actions.numpy(), dataset.actions)
    np.testing.assert_array_equal(sample.rewards[:, 0].numpy(), dataset.rewards)
    np.testing.assert_array_equal(sample.dones[:, 0].numpy(), dataset.terminations.astype(np.float32))


def test_dataset_episodes():
    dataset = make_dataset(n_steps=80)
    buffer = EpisodeReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu", n_steps=3, gamma=0.8)
    remaining = np.concatenate([np.arange(n)[::-1] for n in dataset.episode_lengths])
    elapsed = np.concatenate([np.arange(n) for n in dataset.episode_lengths])
    flat = np.arange(80)
    assert len(dataset.episode_lengths) > 5
    np.testing.assert_array_equal(buffer.steps_remaining(flat), remaining)
    np.testing.assert_array_equal(buffer.steps_elapsed(flat), elapsed)
    assert buffer.is_complete(flat).all()
    np.testing.assert_array_equal(buffer.terminated(flat).numpy(), dataset.terminations)
    sample = buffer._get_samples(flat)
    for t in range(80):
        length = min(3, remaining[t] + 1)
        expected = sum(0.8**k * dataset.rewards[t + k] for k in range(length))
        assert sample.rewards[t].item() == pytest.approx(expected, abs=1e-5)
        assert sample.discounts[t].item() == pytest.approx(0.8**length)
        np.testing.assert_array_equal(sample.next_observations[t], dataset.next_observations[t + length - 1])
        assert sample.dones[t].item() == dataset.terminations[t + length - 1]


def test_dataset_is_read_only():
    dataset = make_dataset()
    before = dataset.truncations.copy()
    buffer = EpisodeReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu")
    with pytest.raises(RuntimeError, match="read-only"):
        Oracle(buffer).add([GOES_ON])
    with pytest.raises(RuntimeError, match="read-only"):
        buffer.reset()
    buffer.truncate_last_trajectory()
    np.testing.assert_array_equal(dataset.truncations, before)
    assert buffer.size() == 30


def test_dataset_of_read_only_arrays():
    """Arrays that may not be written to (memory maps, say) are used without a copy and without a warning."""
    dataset = make_dataset()
    dataset.observations.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = EpisodeReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu")
        batch = buffer.sample(4)
    assert np.shares_memory(buffer.observations, dataset.observations)
    batch.observations.zero_()
    assert dataset.observations.any()


def test_dataset_actions_are_scaled():
    space = spaces.Box(np.array([[-2.0, 0.0], [1.0, -1.0]]), np.array([[2.0, 1.0], [5.0, 1.0]]), dtype=np.float64)
    dataset = make_dataset(action_space=space)
    buffer = EpisodeReplayBuffer.from_dataset(dataset, OBS, space, device="cpu")
    actions = buffer._get_samples(np.arange(30)).actions
    assert actions.shape == (30, 4) and actions.dtype == th.float32 and actions.abs().max() <= 1
    expected = 2 * (dataset.actions - space.low) / (space.high - space.low) - 1
    np.testing.assert_allclose(actions.numpy(), expected.reshape(30, 4), atol=1e-6)
    # in Box [-1, 1] of several dimensions: a view
    space = spaces.Box(-1, 1, (2, 2), np.float32)
    dataset = make_dataset(action_space=space)
    assert np.shares_memory(EpisodeReplayBuffer.from_dataset(dataset, OBS, space).actions, dataset.actions)


def test_dataset_actions_with_infinite_bounds():
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    with pytest.raises(ValueError, match="finite bounds"):
        EpisodeReplayBuffer.from_dataset(make_dataset(action_space=space), OBS, space)


@pytest.mark.parametrize("as_dict", [False, True])
def test_dataset_images(as_dict):
    """Channels last in the data, first in the environment: no copy, right values."""
    last, first = (spaces.Box(0, 255, shape, np.uint8) for shape in ((8, 6, 3), (3, 8, 6)))
    vector = spaces.Box(-1, 1, (2,), np.float64)
    if as_dict:
        dataset = make_dataset(spaces.Dict({"image": last, "v": vector}))
        buffer = EpisodeReplayBuffer.from_dataset(dataset, spaces.Dict({"image": first, "v": vector}), ACT, device="cpu")
        stored, source = buffer.observations["image"], dataset.observations["image"]
        sample = buffer._get_samples(np.arange(30)).observations
        np.testing.assert_array_equal(sample["v"].numpy(), dataset.observations["v"])
        images = sample["image"]
    else:
        dataset = make_dataset(last)
        buffer = EpisodeReplayBuffer.from_dataset(dataset, first, ACT, device="cpu")
        stored, source = buffer.observations, dataset.observations
        images = buffer._get_samples(np.arange(30)).observations
    assert stored.shape == (30, 1, 3, 8, 6) and np.shares_memory(stored, source)
    assert images.dtype == th.uint8 and images.shape == (30, 3, 8, 6)
    np.testing.assert_array_equal(images.numpy(), np.moveaxis(source, 3, 1))
    window = buffer.gather("observations", np.array([[0, 1], [5, 6]]))
    window = window["image"] if as_dict else window
    np.testing.assert_array_equal(window.numpy(), np.moveaxis(source, 3, 1)[[[0, 1], [5, 6]]])


def test_dataset_of_integers():
    buffer = EpisodeReplayBuffer.from_dataset(make_dataset(spaces.Discrete(5)), spaces.Discrete(5), ACT, device="cpu")
    sample = buffer.sample(4)
    assert sample.observations.shape == (4, 1) and sample.observations.dtype == th.int64


def test_dataset_spaces_must_fit():
    with pytest.raises(ValueError, match="observation space does not match"):
        EpisodeReplayBuffer.from_dataset(make_dataset(), spaces.Box(-1, 1, (4,)), ACT)
    with pytest.raises(ValueError, match="action space does not match"):
        EpisodeReplayBuffer.from_dataset(make_dataset(), OBS, spaces.Box(-2, 2, (2,)))
    with pytest.raises(ValueError, match="`n_envs` 1"):
        EpisodeReplayBuffer.from_dataset(make_dataset(), OBS, ACT, n_envs=2)


def test_dataset_state_round_trip():
    buffer = EpisodeReplayBuffer.from_dataset(make_dataset(DICT), DICT, ACT, device="cpu", n_steps=2)
    other = EpisodeReplayBuffer(1, DICT, ACT, device="cpu")
    other.set_state(buffer.get_state())
    assert other.read_only
    assert_same_buffer(buffer, other)


# Subclasses -----------------------------------------------------------------------------------------------------------


class WindowBuffer(EpisodeReplayBuffer):
    """The example of the class docstring."""

    horizon = 3

    def _get_samples(self, batch_inds, env=None):
        start = self.as_index(batch_inds)
        offsets = th.arange(self.horizon, device=self.device)
        left = self.steps_remaining(start).unsqueeze(1)
        slots = self.advance(start.unsqueeze(1), th.minimum(offsets, left))
        return self.gather("observations", slots, env), self.gather("actions", slots), offsets <= left


@settings(max_examples=40, deadline=None, derandomize=True)
@given(script=scripts())
def test_windows_as_a_subclass(script):
    capacity, n_envs, events = script
    buffer = WindowBuffer(capacity * n_envs, OBS, ACT, device="cpu", n_envs=n_envs)
    oracle = play(buffer, events)
    pairs = oracle.stored()
    if not pairs:
        return
    observations, actions, mask = buffer._get_samples(oracle.flat(pairs))
    assert observations.shape == (len(pairs), 3, 3) and actions.shape == (len(pairs), 3, 2) and mask.shape == (len(pairs), 3)
    for row, (env, t) in enumerate(pairs):
        length = min(3, oracle.same_episode(env, t, 1) + 1)
        assert mask[row].tolist() == [k < length for k in range(3)]
        for k in range(3):
            np.testing.assert_array_equal(observations[row, k].numpy(), oracle.observation(env, t + min(k, length - 1)))
    assert buffer.sample(5)[0].shape == (5, 3, 3)


def test_subclass_of_a_dataset():
    buffer = WindowBuffer.from_dataset(make_dataset(), OBS, ACT, device="cpu")
    assert type(buffer) is WindowBuffer
    assert buffer.sample(5)[0].shape == (5, 3, 3)


# Batches --------------------------------------------------------------------------------------------------------------


def test_concat_samples():
    def make(space: spaces.Space, **kwargs: Any) -> EpisodeReplayBuffer:
        return play(EpisodeReplayBuffer(9, space, ACT, device="cpu", **kwargs), [[GOES_ON]] * 5).buffer

    first, second = make(OBS).sample(2), make(OBS).sample(3)
    both = concat_samples(first, second)
    assert type(both) is ReplayBufferSamples and both.discounts is None
    for name in ("observations", "actions", "next_observations", "dones", "rewards"):
        assert th.equal(getattr(both, name), th.cat([getattr(first, name), getattr(second, name)]))
    mixed = concat_samples(first, second._replace(observations=second.observations.double()))
    assert mixed.observations.dtype == th.float32

    first, second = make(DICT, n_steps=2).sample(2), make(DICT, n_steps=2).sample(3)
    both = concat_samples(first, second)
    assert type(both) is DictReplayBufferSamples
    assert th.equal(both.discounts, th.cat([first.discounts, second.discounts]))
    for key in DICT.spaces:
        assert th.equal(both.next_observations[key], th.cat([first.next_observations[key], second.next_observations[key]]))

    with pytest.raises(ValueError, match=r"`discounts`.*same `n_steps`"):
        concat_samples(first, second._replace(discounts=None))
    with pytest.raises(ValueError, match="same keys"):
        concat_samples(first, second._replace(observations={"a": second.observations["a"]}))
    with pytest.raises(ValueError, match=r"`actions`.*same shape"):
        concat_samples(first, second._replace(actions=second.actions[:, :1]))
    with pytest.raises(TypeError, match="one class"):
        concat_samples(first, make(OBS).sample(1))


# Inside SB3's algorithms ----------------------------------------------------------------------------------------------


def small(**kwargs: Any) -> dict[str, Any]:
    kwargs = {"replay_buffer_class": EpisodeReplayBuffer, "buffer_size": 60, **kwargs}
    return dict(learning_starts=20, batch_size=16, policy_kwargs=dict(net_arch=[8]), device="cpu", seed=0, **kwargs)


@pytest.mark.parametrize("n_envs, n_steps, normalize", [(1, 1, False), (2, 1, False), (1, 3, False), (2, 2, True)])
def test_sac_runs(n_envs, n_steps, normalize):
    env: Any = make_vec_env("Pendulum-v1", n_envs=n_envs)
    env = VecNormalize(env) if normalize else env
    model = SAC("MlpPolicy", env, train_freq=4, **small(replay_buffer_kwargs=dict(n_steps=n_steps)))
    model.learn(150)
    assert isinstance(model.replay_buffer, EpisodeReplayBuffer)
    assert model.replay_buffer.full and model.num_timesteps >= 150
    assert all(bool(param.isfinite().all()) for param in model.policy.parameters())


def test_sac_restarts_with_optimized_memory():
    options: dict[str, Any] = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    model = SAC("MlpPolicy", "Pendulum-v1", **small(buffer_size=200, **options))
    model.learn(40)
    with pytest.warns(UserWarning, match="last trajectory in the replay buffer will be truncated"):
        model.learn(40)
    assert model.replay_buffer.steps_remaining(np.array([0, 39, 40])).tolist() == [39, 0, 39]


def test_dqn_and_dict_observations_run():
    model = DQN("MlpPolicy", "CartPole-v1", **small())
    model.learn(80)
    env = BitFlippingEnv(n_bits=3, continuous=True, max_steps=4)
    sac = SAC("MultiInputPolicy", env, train_freq=4, **small())
    sac.learn(80)
    assert sac.replay_buffer.is_complete(sac.replay_buffer.draw_indices(50)).float().mean() > 0.8


def test_equal_seeds_give_equal_runs():
    def run() -> th.Tensor:
        model = SAC("MlpPolicy", "Pendulum-v1", **small()).learn(60)
        return th.cat([param.flatten() for param in model.policy.parameters()])

    assert th.equal(run(), run())
