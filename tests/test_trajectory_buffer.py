"""Windows, masks and returns against plain lists of episodes, and the numbers of arXiv 2205.09991's authors' code."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from episodes import (
    ACT,
    DICT,
    GOES_ON,
    OBS,
    TERMINATES,
    TRUNCATES,
    Copies,
    Recorder,
    Rest,
    assert_equal,
    make_dataset,
    scripts,
)
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffusion import OfflineDataset, TrajectoryReplayBuffer
from sb3_diffusion.buffers import TrajectorySamples, concat_samples
from sb3_diffusion.buffers.trajectory import discounted_returns
from sb3_diffusion.common.serialization import (
    FileFormatError,
    load_replay_buffer,
    read_archive,
    save_replay_buffer,
    write_archive,
)


class CopyingBuffer(Copies, TrajectoryReplayBuffer):
    pass


def expected_window(rest: Rest, buffer: TrajectoryReplayBuffer) -> tuple[list[Any], ...]:
    """Observations, actions, rewards and mask of the window from the first of these steps."""
    zeros, length = buffer.padding == "zeros", len(rest.rewards)
    last = rest.observations[-1]
    if buffer.optimize_memory_usage:
        last = rest.observations[-2]
    if zeros:
        last = {key: 0 * value for key, value in last.items()} if isinstance(last, dict) else 0 * last
    columns: tuple[list[Any], ...] = ([], [], [], [])
    for row in range(buffer.horizon):
        steps = range(row * buffer.stride, (row + 1) * buffer.stride)
        inside = [k for k in steps if k < length]
        actions = [rest.actions[k] for k in inside]
        actions += [0 * rest.actions[-1] if zeros else rest.actions[-1]] * (buffer.stride - len(inside))
        columns[0].append(rest.observations[inside[0]] if inside else last)
        columns[1].append(np.concatenate(actions))
        columns[2].append(sum(rest.rewards[k] for k in inside))
        columns[3].append(1.0 if inside else 0.0)
    return columns


def expected_return(rest: Rest, gamma: float, penalty: float) -> float:
    rewards = [*rest.rewards[:-1], rest.rewards[-1] + penalty * (rest.ending == TERMINATES)]
    return sum(gamma**k * reward for k, reward in enumerate(rewards))


def check(buffer: TrajectoryReplayBuffer, steps: dict[int, Rest]) -> None:
    """All windows that there are, and no others."""
    span = buffer.horizon * buffer.stride
    if buffer.padding is None:
        longest = max(len(rest.rewards) for rest in steps.values())
        steps = {index: rest for index, rest in steps.items() if len(rest.rewards) >= span}
        if not steps:
            for refused in (buffer.all_starts, lambda: buffer.sample(1)):
                with pytest.raises(RuntimeError, match=f"the {span} steps of a window .* longest has {longest}\\."):
                    refused()
            return
    assert sorted(buffer.all_starts().tolist()) == sorted(steps)
    samples, rests = buffer._get_samples(np.array(list(steps))), list(steps.values())
    for row, rest in enumerate(rests):
        observations, *others = expected_window(rest, buffer)
        got = samples.observations
        assert_equal({key: value[row] for key, value in got.items()} if isinstance(got, dict) else got[row], observations)
        for values, column in zip((samples.actions, samples.rewards, samples.mask), others, strict=True):
            assert_equal(values[row], np.asarray(column, np.float32))
    returns = [expected_return(rest, buffer.gamma, buffer.termination_penalty) for rest in rests]
    np.testing.assert_allclose(samples.returns[:, 0].numpy(), returns, rtol=1e-6, atol=1e-6)
    assert samples.terminated.tolist() == [[float(rest.ending == TERMINATES)] for rest in rests]
    assert samples.returns.shape == (len(rests), 1)
    drawn = set(buffer.draw_indices(30 * len(steps)).tolist())
    assert drawn <= set(steps) and (len(drawn) > 0.8 * len(steps))


def play(buffer: TrajectoryReplayBuffer, events: list[Any]) -> Recorder:
    recorder = Recorder(buffer)
    for event in events:
        if event == "cut":
            recorder.cut()
        elif event != "look":
            recorder.add(event)
        elif recorder.stored():
            check(buffer, recorder.stored())
    return recorder


@pytest.mark.parametrize("cls, space", [(TrajectoryReplayBuffer, OBS), (TrajectoryReplayBuffer, DICT), (CopyingBuffer, OBS)])
@pytest.mark.parametrize("optimize", [False, True], ids=["", "optimized"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    script=scripts(),
    horizon=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.sampled_from(["repeat", "zeros", None]),
    gamma=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    penalty=st.sampled_from([0.0, -10.0]),
)
def test_against_lists_of_episodes(cls, space, optimize, script, horizon, stride, padding, gamma, penalty):
    """All windows at any time, with wrap-around and several environments."""
    capacity, n_envs, events = script
    buffer = cls(
        capacity * n_envs,
        space,
        ACT,
        device="cpu",
        n_envs=n_envs,
        optimize_memory_usage=optimize,
        handle_timeout_termination=not optimize,
        horizon=horizon,
        stride=stride,
        padding=padding,
        gamma=gamma,
        termination_penalty=penalty,
        generator=th.Generator().manual_seed(0),
    )
    recorder = play(buffer, events)
    if recorder.stored():
        check(buffer, recorder.stored())
    else:
        with pytest.raises(RuntimeError, match="no transition to sample"):
            buffer.sample(1)


@pytest.mark.parametrize("space", [OBS, DICT], ids=["box", "dict"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    episodes=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([TERMINATES, TRUNCATES])), min_size=1, max_size=6),
    horizon=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.sampled_from(["repeat", "zeros", None]),
)
def test_datasets(space, episodes, horizon, stride, padding):
    lengths, endings = (list(column) for column in zip(*episodes, strict=True))
    dataset, steps = make_dataset(lengths, endings, space)
    buffer = TrajectoryReplayBuffer.from_dataset(
        dataset,
        space,
        ACT,
        device="cpu",
        gamma=0.9,
        generator=th.Generator().manual_seed(0),
        horizon=horizon,
        stride=stride,
        padding=padding,
        termination_penalty=-3.0,
    )
    assert np.shares_memory(buffer.actions, dataset.actions)
    check(buffer, steps)


def test_shapes_and_types():
    dataset, _ = make_dataset([30, 4], [TRUNCATES, TERMINATES])
    buffer = TrajectoryReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu", horizon=8)
    samples = buffer.sample(5)
    assert isinstance(samples, TrajectorySamples)
    assert [tuple(field.shape) for field in samples] == [(5, 8, 3), (5, 8, 2), (5, 8), (5, 8), (5, 1), (5, 1)]
    assert all(field.dtype == th.float32 and field.is_contiguous() for field in samples)
    both = concat_samples(samples, buffer.sample(2))
    assert both.observations.shape == (7, 8, 3) and both.returns.shape == (7, 1)
    strided = TrajectoryReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu", horizon=4, stride=3).sample(5)
    assert [tuple(field.shape) for field in strided] == [(5, 4, 3), (5, 4, 6), (5, 4), (5, 4), (5, 1), (5, 1)]


def test_example_of_the_class():
    """The table of the class docstring: the terminal observation stands in the padding."""
    buffer = TrajectoryReplayBuffer(9, OBS, ACT, device="cpu", horizon=3, stride=2)
    recorder = play(buffer, [[GOES_ON]] * 4 + [[TERMINATES], [GOES_ON]])
    samples, rest = buffer._get_samples(np.array([0, 3])), recorder.stored()[0]
    s, a, r = rest.observations, rest.actions, rest.rewards
    for row, states in enumerate([(0, 2, 4), (3, 5, 5)]):
        assert_equal(samples.observations[row], [s[k] for k in states])
    for row, pairs in enumerate([[(0, 1), (2, 3), (4, 4)], [(3, 4), (4, 4), (4, 4)]]):
        assert_equal(samples.actions[row], [np.concatenate([a[i], a[j]]) for i, j in pairs])
    assert samples.rewards.tolist() == [[r[0] + r[1], r[2] + r[3], r[4]], [r[3] + r[4], 0, 0]]
    assert samples.mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# Numbers --------------------------------------------------------------------------------------------------------------


def constant_reward(length: int, ending: int) -> OfflineDataset:
    flags = np.zeros((2, length), bool)
    flags[0 if ending == TERMINATES else 1, -1] = True
    observations = np.arange(length + 1, dtype=np.float32)[:, None].repeat(3, axis=1)
    return OfflineDataset(
        observations[:-1],
        np.zeros((length, 2), np.float32),
        np.ones(length, np.float32),
        observations[1:],
        *flags,
        observation_space=OBS,
        action_space=ACT,
    )


@pytest.mark.parametrize("gamma, expected", [(0.997, 316.812), (0.99, 99.996)])
def test_return_of_constant_reward(gamma, expected):
    dataset = constant_reward(1000, TRUNCATES)
    buffer = TrajectoryReplayBuffer.from_dataset(
        dataset, OBS, ACT, device="cpu", gamma=gamma, horizon=32, termination_penalty=-100.0
    )
    assert buffer.returns_to_go(np.array([0])).item() == pytest.approx(expected, abs=5e-4)
    exact = (1 - gamma ** np.arange(1000, 0, -1.0)) / (1 - gamma)  # nothing is added for the truncation
    np.testing.assert_allclose(buffer.returns_to_go(buffer.all_starts()).numpy(), exact, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.99, 0.997])
def test_termination_penalty(gamma):
    with_penalty, without = (
        TrajectoryReplayBuffer.from_dataset(
            constant_reward(10, TERMINATES), OBS, ACT, device="cpu", gamma=gamma, horizon=4, termination_penalty=penalty
        )._get_samples(np.arange(10))
        for penalty in (-100.0, 0.0)
    )
    difference = (with_penalty.returns - without.returns)[:, 0].tolist()
    assert difference == pytest.approx([-100 * gamma ** (9 - t) for t in range(10)], abs=1e-4)
    assert th.equal(with_penalty.rewards, without.rewards)


@pytest.mark.parametrize("length, padding, n_starts", [(1000, None, 969), (1000, "repeat", 1000), (20, "repeat", 20)])
def test_number_of_starts(length, padding, n_starts):
    """The last start counts; the authors' code has 968 of these 969, and 19 of the 20."""
    dataset = constant_reward(length, TERMINATES)
    buffer = TrajectoryReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu", horizon=32, padding=padding)
    assert buffer.all_starts().tolist() == list(range(n_starts))


def test_no_episode_is_long_enough():
    dataset = constant_reward(20, TERMINATES)
    buffer = TrajectoryReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu", horizon=8, stride=4, padding=None)
    with pytest.raises(RuntimeError, match=r"the 32 steps of a window.*the longest has 20\. Lower `horizon`"):
        buffer.sample(2)


@pytest.mark.parametrize("padding, n_starts", [(None, [0, 9, 1, 5]), ("repeat", [3, 12, 4, 8])])
def test_starts_are_uniform(padding, n_starts):
    dataset, _ = make_dataset([3, 12, 4, 8], [TERMINATES, TRUNCATES, TRUNCATES, TERMINATES])
    buffer = TrajectoryReplayBuffer.from_dataset(
        dataset, OBS, ACT, device="cpu", horizon=4, padding=padding, generator=th.Generator().manual_seed(0)
    )
    first = np.cumsum([0, 3, 12, 4])
    starts = np.concatenate([np.arange(n) + offset for n, offset in zip(n_starts, first, strict=True)])
    assert buffer.all_starts().tolist() == starts.tolist()
    counts = np.bincount(buffer.draw_indices(20_000).numpy(), minlength=27)
    assert counts[starts].sum() == 20_000
    assert chisquare(counts[starts]).pvalue > 1e-3


def test_starts_are_uniform_after_wrap_around():
    buffer = TrajectoryReplayBuffer(
        40, OBS, ACT, device="cpu", n_envs=2, horizon=3, padding=None, generator=th.Generator().manual_seed(0)
    )
    recorder = Recorder(buffer)
    rng = np.random.default_rng(0)
    for _ in range(50):
        recorder.add(rng.choice(3, size=2, p=[0.8, 0.1, 0.1]).tolist())
        if recorder.n_added > 10:
            buffer.sample(1)  # the list of starts has to follow
    starts = sorted(index for index, rest in recorder.stored().items() if len(rest.rewards) >= 3)
    assert 10 < len(starts) < 40
    counts = np.bincount(buffer.draw_indices(20_000).numpy(), minlength=40)
    assert counts[starts].sum() == 20_000
    assert chisquare(counts[starts]).pvalue > 1e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rewards=st.lists(st.floats(-100, 100), min_size=1, max_size=40), gamma=st.floats(0, 1), data=st.data())
def test_discounted_returns(rewards, gamma, data):
    """Against the recursion from the end."""
    ends = data.draw(st.sets(st.integers(0, len(rewards) - 1))) | {len(rewards) - 1}
    expected, remaining = np.zeros(len(rewards)), np.zeros(len(rewards), int)
    for t in reversed(range(len(rewards))):
        expected[t] = rewards[t] + (0 if t in ends else gamma * expected[t + 1])
        remaining[t] = 0 if t in ends else remaining[t + 1] + 1
    np.testing.assert_allclose(discounted_returns(np.array(rewards), remaining, gamma), expected, rtol=1e-12, atol=1e-9)


def test_returns_are_summed_in_double_precision():
    """A million small rewards on a large one: float32 would lose them."""
    rewards = np.full(1_000_000, 0.001)
    rewards[-1] = 1e6
    returns = discounted_returns(rewards, np.arange(999_999, -1, -1), 1.0)
    assert returns[0] == pytest.approx(1e6 + 999.999, abs=1e-6)


def test_each_step_is_computed_once(monkeypatch):
    """When an episode has ended; the running one anew only at a sample after a step."""
    lengths: list[int] = []

    def counted(rewards: np.ndarray, *args: Any) -> np.ndarray:
        lengths.append(len(rewards))
        return discounted_returns(rewards, *args)

    monkeypatch.setattr("sb3_diffusion.buffers.trajectory.discounted_returns", counted)
    recorder = Recorder(TrajectoryReplayBuffer(1000, OBS, ACT, device="cpu", horizon=4))
    for _ in range(20):
        for outcome in [GOES_ON] * 9 + [TERMINATES]:
            recorder.add([outcome])
    assert lengths == []
    recorder.buffer.sample(4)
    assert lengths == [10] * 20
    recorder.buffer.sample(4)
    recorder.add([GOES_ON])
    recorder.add([GOES_ON])
    assert lengths == [10] * 20
    recorder.buffer.sample(4)
    recorder.buffer.sample(4)
    assert lengths == [10] * 20 + [2]


# Normalisation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [OBS, DICT], ids=["box", "dict"])
@pytest.mark.parametrize("padding", ["repeat", "zeros"])
def test_vec_normalize(space, padding):
    """Observations and rewards are normalised, padding of zeros and returns are not."""

    class Env(gym.Env):
        observation_space, action_space = space, ACT

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return space.sample(), {}

        def step(self, action):
            return space.sample(), 2.0 * float(self.np_random.normal()), False, False, {}

    space.seed(0)
    keys = ["vector"] if isinstance(space, spaces.Dict) else None
    env = VecNormalize(DummyVecEnv([Env]), norm_obs_keys=keys)
    env.seed(0)
    env.reset()
    for _ in range(50):
        env.step(np.zeros((1, 2), np.float32))
    env.training = False
    dataset, _ = make_dataset([12, 5], [TERMINATES, TRUNCATES], space)
    buffer = TrajectoryReplayBuffer.from_dataset(
        dataset, space, ACT, device="cpu", horizon=4, stride=2, padding=padding, gamma=0.9
    )
    index = np.arange(17)
    raw, normalized = buffer._get_samples(index), buffer._get_samples(index, env)
    assert th.equal(normalized.actions, raw.actions) and th.equal(normalized.returns, raw.returns)
    real = raw.mask.bool() if padding == "zeros" else th.ones_like(raw.mask, dtype=th.bool)
    got, before = normalized.observations, raw.observations
    if isinstance(space, spaces.Dict):
        assert th.equal(got["number"], before["number"])
        expected = env.normalize_obs({key: value.numpy() for key, value in before.items()})["vector"]
        got, before = got["vector"], before["vector"]
    else:
        expected = env.normalize_obs(before.numpy())
    np.testing.assert_allclose(got[real].numpy(), expected[real.numpy()], rtol=1e-6)
    assert not th.allclose(got[real], before[real]) and (got[~real] == 0).all()
    single = TrajectoryReplayBuffer.from_dataset(dataset, space, ACT, device="cpu", horizon=8)._get_samples(index, env)
    np.testing.assert_allclose(normalized.rewards, single.rewards.reshape(17, 4, 2).sum(dim=2), rtol=1e-5, atol=1e-6)
    first = env.normalize_reward(dataset.rewards)
    np.testing.assert_allclose(single.rewards[:, 0], first, rtol=1e-6)
    assert np.abs(first - dataset.rewards).max() > 0.1


# Files and errors -----------------------------------------------------------------------------------------------------


def assert_same(one: TrajectoryReplayBuffer, other: TrajectoryReplayBuffer) -> None:
    for name in (*TrajectoryReplayBuffer.state_options, "n_envs"):
        assert getattr(one, name) == getattr(other, name)
    for mine, its in zip(one.sample(40), other.sample(40), strict=True):
        for key in mine if isinstance(mine, dict) else [None]:
            assert th.equal(mine if key is None else mine[key], its if key is None else its[key])


@pytest.mark.parametrize("padding", ["repeat", None])
@pytest.mark.parametrize("n_steps", [9, 35])
def test_files(tmp_path: Path, padding, n_steps):
    """The same buffer comes back, and stays the same when both go on."""
    options: dict[str, Any] = dict(horizon=3, stride=2, padding=padding, gamma=0.8, termination_penalty=-7.0)
    buffer = TrajectoryReplayBuffer(40, DICT, ACT, device="cpu", n_envs=2, **options)
    recorder = Recorder(buffer)
    rng = np.random.default_rng(0)
    for outcomes in [[GOES_ON, GOES_ON]] * 7 + rng.choice(3, size=(n_steps, 2), p=[0.9, 0.05, 0.05]).tolist():
        recorder.add(outcomes)
    buffer.sample(3)
    save_replay_buffer(buffer, tmp_path / "buffer.pkl")
    loaded = load_replay_buffer(tmp_path / "buffer.pkl", device="cpu")
    assert type(loaded) is TrajectoryReplayBuffer
    assert_same(loaded, buffer)
    twin = copy.deepcopy(recorder)
    twin.buffer = loaded
    for outcomes in [[GOES_ON, TERMINATES], [GOES_ON, GOES_ON], [TRUNCATES, GOES_ON]] * 3:
        recorder.add(outcomes)
        twin.add(outcomes)
    assert_same(loaded, buffer)
    check(loaded, twin.stored())
    for change, message in [(dict(horizon=0), "horizon"), (dict(padding="mirror"), "padding"), (dict(n_steps=2), "n_steps")]:
        archive = read_archive(tmp_path / "buffer.pkl", "replay_buffer")
        archive.config["state"].update(change)
        write_archive(tmp_path / "bad", "replay_buffer", archive.config, archive.tensors)
        with pytest.raises(FileFormatError, match=message):
            load_replay_buffer(tmp_path / "bad")
    del archive.config["state"]["horizon"]
    write_archive(tmp_path / "bad", "replay_buffer", archive.config, archive.tensors)
    with pytest.raises(FileFormatError, match="horizon"):
        load_replay_buffer(tmp_path / "bad")


def test_file_of_a_dataset(tmp_path: Path):
    dataset, steps = make_dataset([5, 9], [TERMINATES, TRUNCATES])
    buffer = TrajectoryReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu", horizon=4, padding="zeros")
    save_replay_buffer(buffer, tmp_path / "buffer")
    loaded = load_replay_buffer(tmp_path / "buffer", device="cpu")
    assert isinstance(loaded, TrajectoryReplayBuffer) and loaded.read_only
    assert_same(loaded, buffer)
    check(loaded, steps)


def test_deep_copies_are_independent():
    recorder = play(TrajectoryReplayBuffer(9, OBS, ACT, device="cpu", horizon=2, padding=None), [[GOES_ON]] * 5 + ["look"])
    twin = copy.deepcopy(recorder)
    for outcome in (TERMINATES, GOES_ON, GOES_ON):
        recorder.add([outcome])
    check(recorder.buffer, recorder.stored())
    check(twin.buffer, twin.stored())


def test_bad_arguments():
    for kwargs, message in [
        (dict(horizon=0), "`horizon` must be at least 1: got 0"),
        (dict(horizon=2, stride=0), "`stride` must be at least 1: got 0"),
        (dict(horizon=2, padding="edge"), "`padding` must be one of .*got 'edge'"),
        (dict(horizon=2, gamma=1.1), "`gamma`"),
        (dict(horizon=2, termination_penalty=-np.inf), "`termination_penalty` must be finite"),
        (dict(horizon=2, n_steps=3), "`n_steps` must be 1"),
        (dict(horizon=2, optimize_memory_usage=True), "handle_timeout_termination"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrajectoryReplayBuffer(5, OBS, ACT, device="cpu", **kwargs)
    with pytest.raises(TypeError, match="horizon"):
        TrajectoryReplayBuffer(5, OBS, ACT, device="cpu")  # type: ignore[call-arg]


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padding", ["repeat", "zeros", None])
def test_cuda_gives_the_same(padding):
    options: dict[str, Any] = dict(n_envs=2, horizon=3, stride=2, padding=padding)
    recorders = [Recorder(TrajectoryReplayBuffer(40, DICT, ACT, device=name, **options)) for name in ("cpu", "cuda")]
    rng = np.random.default_rng(0)
    for portion in (12, 1, 25, 3):
        for outcomes in rng.choice(3, size=(portion, 2), p=[0.9, 0.05, 0.05]).tolist():
            for recorder in recorders:
                recorder.add(outcomes)
        host, device = (recorder.buffer for recorder in recorders)
        starts = host.all_starts()
        assert th.equal(device.all_starts().cpu(), starts)
        for expected, got in zip(host._get_samples(starts), device._get_samples(starts), strict=True):
            for key in expected if isinstance(expected, dict) else [None]:
                e, g = (expected, got) if key is None else (expected[key], got[key])
                assert g.device.type == "cuda"
                th.testing.assert_close(g.cpu(), e)
        assert device.sample(16).returns.device.type == "cuda"
