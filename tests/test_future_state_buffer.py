"""Future states, offsets and ends of episodes against plain lists of episodes, and inside SB3's algorithms."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffusion import DTQL, EpisodeReplayBuffer, FutureStateReplayBuffer
from sb3_diffusion.buffers import FutureStateSamples, concat_samples
from sb3_diffusion.common.serialization import (
    FileFormatError,
    load_replay_buffer,
    read_archive,
    save_replay_buffer,
    write_archive,
)

DISTRIBUTIONS = ["truncated_geometric", "geometric", "uniform", "n_step"]


class CopyingBuffer(Copies, FutureStateReplayBuffer):
    pass


def check(buffer: FutureStateReplayBuffer, steps: dict[int, Rest]) -> None:
    """Batches over all steps, whatever the offsets."""
    index, rests = np.array(list(steps)), list(steps.values())
    lengths = [len(rest.rewards) for rest in rests]
    samples = buffer._get_samples(index)
    offsets = samples.offsets[:, 0].tolist()
    assert min(offsets) >= 1 and samples.offsets.dtype == samples.steps_remaining.dtype == th.int64
    assert samples.steps_remaining[:, 0].tolist() == lengths
    ended = [rest.ending == TERMINATES for rest in rests]
    most = lengths
    if buffer.offset_distribution == "n_step":
        most = [min(n, buffer.n_steps) for n in lengths]
    if buffer.horizon is not None:
        most = [buffer.horizon if for_good else min(n, buffer.horizon) for n, for_good in zip(lengths, ended, strict=True)]
    assert ((samples.n_future >= 1) & (samples.n_future <= th.tensor(most).unsqueeze(1))).all()
    if buffer.horizon is None:
        assert samples.n_future[:, 0].tolist() == most
    assert_equal(
        samples.future_observations,
        [rest.observations[: n + 1][min(k, n)] for rest, k, n in zip(rests, offsets, lengths, strict=True)],
    )
    beyond = [k > n for k, n in zip(offsets, lengths, strict=True)]
    assert samples.absorbed[:, 0].tolist() == [float(b and e) for b, e in zip(beyond, ended, strict=True)]
    assert samples.unknown[:, 0].tolist() == [float(b and not e) for b, e in zip(beyond, ended, strict=True)]
    if buffer.offset_distribution != "geometric":
        assert (samples.offsets <= samples.n_future).all()
    assert th.equal(samples.step_rewards, EpisodeReplayBuffer.gather(buffer, "rewards", index).unsqueeze(1))
    if buffer.n_steps == 1:
        assert th.equal(samples.step_rewards, samples.rewards)
    has_next = [n > buffer.n_steps for n in lengths]
    assert samples.has_next_actions[:, 0].tolist() == [float(has) for has in has_next]
    for row, rest in enumerate(rests):
        expected = rest.actions[buffer.n_steps] if has_next[row] else 0 * rest.actions[0]
        np.testing.assert_array_equal(samples.next_actions[row].numpy(), expected)
    plain = EpisodeReplayBuffer._get_samples(buffer, index)
    for name, value in plain._asdict().items():
        got = getattr(samples, name)
        if isinstance(value, dict):
            assert all(th.equal(got[key], value[key]) for key in value)
        else:
            assert got is value if value is None else th.equal(got, value)
    assert_equal(samples.next_observations, [rest.observations[: buffer.n_steps + 1][-1] for rest in rests])
    several = th.arange(1, 5).expand(len(index), 4)
    states = buffer.future_observations(th.as_tensor(index).unsqueeze(1).expand(-1, 4), several)
    for k in range(1, 5):
        column = {key: value[:, k - 1] for key, value in states.items()} if isinstance(states, dict) else states[:, k - 1]
        assert_equal(column, [rest.observations[: k + 1][-1] for rest in rests])


def play(buffer: FutureStateReplayBuffer, events: list[Any]) -> Recorder:
    recorder = Recorder(buffer)
    for event in events:
        if event == "cut":
            recorder.cut()
        elif event != "look":
            recorder.add(event)
        elif recorder.stored():
            check(buffer, recorder.stored())
    return recorder


@pytest.mark.parametrize("cls, space", [(FutureStateReplayBuffer, OBS), (FutureStateReplayBuffer, DICT), (CopyingBuffer, OBS)])
@pytest.mark.parametrize("handle_timeouts", [True, False], ids=["", "all_terminate"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    script=scripts(),
    distribution=st.sampled_from(DISTRIBUTIONS),
    gamma=st.sampled_from([0.0, 0.5, 0.9]),
    n_steps=st.integers(1, 3),
    horizon=st.sampled_from([None, 1, 4]),
)
def test_against_lists_of_episodes(cls, space, handle_timeouts, script, distribution, gamma, n_steps, horizon):
    """At any time, with wrap-around and several environments."""
    capacity, n_envs, events = script
    buffer = cls(
        capacity * n_envs,
        space,
        ACT,
        device="cpu",
        n_envs=n_envs,
        handle_timeout_termination=handle_timeouts,
        n_steps=n_steps,
        gamma=gamma,
        offset_distribution=distribution,
        horizon=horizon if distribution == "uniform" else None,
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
    distribution=st.sampled_from(DISTRIBUTIONS),
    n_steps=st.integers(1, 3),
)
def test_datasets(space, episodes, distribution, n_steps):
    lengths, endings = (list(column) for column in zip(*episodes, strict=True))
    dataset, steps = make_dataset(lengths, endings, space)
    buffer = FutureStateReplayBuffer.from_dataset(
        dataset,
        space,
        ACT,
        device="cpu",
        n_steps=n_steps,
        gamma=0.8,
        generator=th.Generator().manual_seed(0),
        offset_distribution=distribution,
    )
    assert np.shares_memory(buffer.actions, dataset.actions)
    check(buffer, steps)


def test_fields_shapes_and_types():
    dataset, _ = make_dataset([30, 4], [TRUNCATES, TERMINATES])
    buffer = FutureStateReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu")
    samples = buffer.sample(5)
    assert FutureStateSamples._fields[: len(ReplayBufferSamples._fields)] == ReplayBufferSamples._fields
    shapes = {name: tuple(value.shape) for name, value in samples._asdict().items() if value is not None}
    states = dict.fromkeys(("observations", "next_observations", "future_observations"), (5, 3))
    numbers = "dones rewards offsets steps_remaining has_next_actions absorbed unknown step_rewards n_future".split()
    assert shapes == {**states, "actions": (5, 2), "next_actions": (5, 2), **dict.fromkeys(numbers, (5, 1))}
    both = concat_samples(samples, buffer.sample(2))
    assert both.offsets.shape == (7, 1) and both.offsets.dtype == th.int64 and both.discounts is None


# Distributions --------------------------------------------------------------------------------------------------------


def draws(
    distribution: str,
    gamma: float,
    n: int,
    ending: int = TERMINATES,
    n_draws: int = 20_000,
    n_steps: int = 1,
    horizon: int | None = None,
) -> FutureStateSamples:
    """Samples that all start at the first step of an episode of n steps."""
    dataset, _ = make_dataset([2, n, 3], [TRUNCATES, ending, TERMINATES])
    buffer = FutureStateReplayBuffer.from_dataset(
        dataset,
        OBS,
        ACT,
        device="cpu",
        gamma=gamma,
        n_steps=n_steps,
        offset_distribution=distribution,
        horizon=horizon,
        generator=th.Generator().manual_seed(n),
    )
    return buffer._get_samples(np.full(n_draws, 2))


def assert_distributed(values: th.Tensor, probabilities: np.ndarray) -> None:
    """Chi-square test of integers 1, 2, ... against their probabilities; rare ones and all further ones are put together."""
    expected = probabilities * values.numel()
    n = int((expected >= 5).sum())
    counts = np.bincount(values.flatten().numpy(), minlength=n + 1)[1:]
    expected = np.append(expected[:n], max(values.numel() - expected[:n].sum(), 0.0))
    observed = np.append(counts[:n], counts[n:].sum())
    if expected[-1] < 1e-6:
        assert observed[-1] == 0
        expected, observed = expected[:-1], observed[:-1]
    assert len(expected) == 1 or chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("gamma", [0.0, 0.6, 0.9, 1.0])
def test_law_of_the_offsets(gamma, n):
    k = np.arange(1, n + 1)
    assert_distributed(draws("uniform", gamma, n).offsets, np.full(n, 1 / n))
    truncated = np.full(n, 1 / n) if gamma == 1 else (1 - gamma) * gamma ** (k - 1) / (1 - gamma**n)
    assert_distributed(draws("truncated_geometric", gamma, n).offsets, truncated)
    if gamma < 1:
        offsets = draws("geometric", gamma, n).offsets
        assert_distributed(offsets, (1 - gamma) * gamma ** (np.arange(1, 31) - 1))


@pytest.mark.parametrize("n, n_steps", [(2, 5), (7, 3), (7, 1)])
def test_law_of_n_steps(n, n_steps):
    """Geometric up to the state that is bootstrapped from; with the weights of both parts, the discounted measure."""
    samples, gamma, length = draws("n_step", 0.8, n, n_steps=n_steps), 0.8, min(n, n_steps)
    assert_distributed(samples.offsets, (1 - gamma) * gamma ** np.arange(length) / (1 - gamma**length))
    assert th.equal(samples.future_observations[:, 2:] - samples.observations[:, 2:], samples.offsets.float())
    if n_steps > 1:
        th.testing.assert_close(samples.discounts, th.full_like(samples.discounts, gamma**length))


@pytest.mark.parametrize("n, ending, most", [(40, TRUNCATES, 6), (4, TRUNCATES, 4), (4, TERMINATES, 6)])
def test_law_up_to_a_horizon(n, ending, most):
    """All numbers of future states alike, and given one all offsets; after a termination they go on."""
    samples = draws("uniform", 0.8, n, ending, horizon=6)
    assert_distributed(samples.n_future, np.full(most, 1 / most))
    for k in range(1, most + 1):
        assert_distributed(samples.offsets[samples.n_future == k], np.full(k, 1 / k))
    assert samples.absorbed.any().item() is (most > n) and not samples.unknown.any()


def test_law_with_a_discount_close_to_one():
    offsets = draws("truncated_geometric", 1 - 1e-12, 8).offsets
    assert_distributed(offsets, np.full(8, 1 / 8))
    mean = draws("geometric", 0.999, 8, n_draws=100_000).offsets.double().mean().item()
    assert mean == pytest.approx(1000, rel=0.02)


@pytest.mark.parametrize("distribution, first", [("uniform", 1 / 6), ("geometric", 0.2)])
def test_branches(distribution, first):
    """
    ``offsets == 1`` has the weight of the first branch; else the state is one of the future of the next step, drawn as if
    that step had been sampled.
    """
    samples, n, gamma = draws(distribution, 0.8, 6), 6, 0.8
    is_next = samples.offsets == 1
    share, sd = is_next.float().mean().item(), (first * (1 - first) / 20_000) ** 0.5
    assert abs(share - first) < 4 * sd
    later = samples.offsets[~is_next] - 1
    assert_distributed(
        later, np.full(n - 1, 1 / (n - 1)) if distribution == "uniform" else (1 - gamma) * gamma ** (np.arange(1, 31) - 1)
    )
    inside = samples.offsets <= samples.steps_remaining
    steps = samples.future_observations[:, 2:] - samples.observations[:, 2:]
    assert th.equal(steps[inside], samples.offsets[inside].float())
    assert (samples.future_observations[:, 1] == samples.observations[:, 1]).all()  # of the same episode


@pytest.mark.parametrize("ending", [TERMINATES, TRUNCATES])
def test_beyond_the_end(ending):
    """Past the end of the episode lies its last state, for good (absorbed) or for want of knowledge (unknown)."""
    samples, gamma, n = draws("geometric", 0.8, 5, ending), 0.8, 5
    beyond = samples.offsets > n
    share, sd = beyond.float().mean().item(), (gamma**n * (1 - gamma**n) / 20_000) ** 0.5
    assert abs(share - gamma**n) < 4 * sd
    yes, no = (samples.absorbed, samples.unknown) if ending == TERMINATES else (samples.unknown, samples.absorbed)
    assert th.equal(yes.bool(), beyond) and not no.any()
    assert (samples.future_observations[beyond[:, 0], 2] == n).all()
    at_end = samples.offsets[:, 0] == n
    assert at_end.any() and (samples.future_observations[at_end, 2] == n).all()  # reached, and still alive


def test_steps_are_uniform():
    dataset, _ = make_dataset([3, 9, 1], [TERMINATES, TRUNCATES, TERMINATES])
    buffer = FutureStateReplayBuffer.from_dataset(
        dataset, OBS, ACT, device="cpu", generator=th.Generator().manual_seed(0), offset_distribution="uniform"
    )
    samples = buffer.sample(20_000)
    start = {(number, t): i for i, (number, t) in enumerate([(e, t) for e, n in enumerate([3, 9, 1]) for t in range(n)])}
    drawn = [start[int(number), int(t)] for _, number, t in samples.observations.tolist()]
    assert chisquare(np.bincount(drawn, minlength=13)).pvalue > 1e-3


def test_several_future_states_per_step():
    """The example of the class docstring."""
    recorder = play(FutureStateReplayBuffer(60, OBS, ACT, device="cpu", n_envs=2, gamma=0.9), [[GOES_ON, GOES_ON]] * 25)
    buffer = recorder.buffer
    index = buffer.draw_indices(256).unsqueeze(1).expand(-1, 16)
    offsets = buffer.draw_offsets(index)
    states = buffer.future_observations(index, offsets)
    assert states.shape == (256, 16, 3) and offsets.shape == (256, 16)
    steps = states[..., 2] - buffer.gather("observations", index)[..., 2]
    assert th.equal(steps, offsets.float()) and len(offsets.unique()) > 10


def test_vec_normalize():
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    env.seed(0)
    env.reset()
    for _ in range(30):
        env.step(np.ones((1, 1), np.float32))
    dataset, _ = make_dataset([12, 5], [TERMINATES, TRUNCATES])
    buffer = FutureStateReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu")
    buffer.generator.manual_seed(0)
    raw = buffer.sample(50)
    buffer.generator.manual_seed(0)
    normalized = buffer.sample(50, env)
    for name in ("observations", "next_observations", "future_observations"):
        before, after = getattr(raw, name), getattr(normalized, name)
        np.testing.assert_allclose(after.numpy(), env.normalize_obs(before.numpy()), rtol=1e-6)
        assert not th.allclose(before, after)
    for name in ("actions", "next_actions", "offsets", "steps_remaining"):
        assert th.equal(getattr(raw, name), getattr(normalized, name))


# Files and errors -----------------------------------------------------------------------------------------------------


def assert_same(one: FutureStateReplayBuffer, other: FutureStateReplayBuffer) -> None:
    for name in FutureStateReplayBuffer.state_options:
        assert getattr(one, name) == getattr(other, name)
    for mine, its in zip(one.sample(40), other.sample(40), strict=True):
        for key in mine if isinstance(mine, dict) else [None]:
            m, i = (mine, its) if key is None else (mine[key], its[key])
            assert m is i if m is None else th.equal(m, i)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_files(tmp_path: Path, distribution):
    """The same buffer comes back, and stays the same when both go on."""
    buffer = FutureStateReplayBuffer(
        40, DICT, ACT, device="cpu", n_envs=2, n_steps=2, gamma=0.8, offset_distribution=distribution
    )
    recorder = Recorder(buffer)
    for outcomes in np.random.default_rng(0).choice(3, size=(35, 2), p=[0.9, 0.05, 0.05]).tolist():
        recorder.add(outcomes)
    buffer.sample(3)
    save_replay_buffer(buffer, tmp_path / "buffer.pkl")
    loaded = load_replay_buffer(tmp_path / "buffer.pkl", device="cpu")
    assert type(loaded) is FutureStateReplayBuffer
    assert_same(loaded, buffer)
    twin = copy.deepcopy(recorder)
    twin.buffer = loaded
    for outcomes in [[GOES_ON, TERMINATES], [GOES_ON, GOES_ON], [TRUNCATES, GOES_ON]] * 3:
        recorder.add(outcomes)
        twin.add(outcomes)
    assert_same(loaded, buffer)
    check(loaded, twin.stored())
    archive = read_archive(tmp_path / "buffer.pkl", "replay_buffer")
    archive.config["state"]["offset_distribution"] = "poisson"
    write_archive(tmp_path / "bad", "replay_buffer", archive.config, archive.tensors)
    with pytest.raises(FileFormatError, match="offset_distribution"):
        load_replay_buffer(tmp_path / "bad")


def test_file_of_a_dataset(tmp_path: Path):
    dataset, steps = make_dataset([5, 9], [TERMINATES, TRUNCATES])
    buffer = FutureStateReplayBuffer.from_dataset(dataset, OBS, ACT, device="cpu", offset_distribution="uniform", horizon=3)
    save_replay_buffer(buffer, tmp_path / "buffer")
    loaded = load_replay_buffer(tmp_path / "buffer", device="cpu")
    assert isinstance(loaded, FutureStateReplayBuffer) and loaded.read_only and loaded.horizon == 3
    assert_same(loaded, buffer)
    check(loaded, steps)


def test_bad_arguments():
    for kwargs, message in [
        (dict(offset_distribution="poisson"), "`offset_distribution` must be one of .*got 'poisson'"),
        (dict(offset_distribution="geometric", gamma=1.0), "`gamma` must be below 1 for geometric offsets: got 1"),
        (dict(optimize_memory_usage=True, handle_timeout_termination=False), "last state of each episode"),
        (dict(n_steps=0), "`n_steps`"),
        (dict(offset_distribution="uniform", horizon=0), "`horizon` must lie in"),
        (dict(horizon=5), "`horizon` is for .*got 'truncated_geometric'"),
    ]:
        with pytest.raises(ValueError, match=message):
            FutureStateReplayBuffer(5, OBS, ACT, device="cpu", **kwargs)


# Inside algorithms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo, n_steps", [(TD3, 1), (TD3, 3), (SAC, 1), (DDPG, 1)])
def test_sb3_algorithms_learn(algo, n_steps):
    model = algo(
        "MlpPolicy",
        "Pendulum-v1",
        buffer_size=100,
        learning_starts=20,
        batch_size=16,
        policy_kwargs=dict(net_arch=[8]),
        replay_buffer_class=FutureStateReplayBuffer,
        replay_buffer_kwargs=dict(n_steps=n_steps, offset_distribution="geometric"),
        device="cpu",
        seed=0,
    )
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(250)
    assert isinstance(model.replay_buffer, FutureStateReplayBuffer) and model.replay_buffer.full
    after = model.policy.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(not th.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    samples = model.replay_buffer.sample(200)
    assert samples.unknown.sum() > 0 and samples.absorbed.sum() == 0  # Pendulum never terminates


def test_dict_observations_and_our_own_algorithms_learn():
    options: dict[str, Any] = dict(buffer_size=100, learning_starts=20, batch_size=16, device="cpu", seed=0)
    options.update(replay_buffer_class=FutureStateReplayBuffer)
    sac = SAC("MultiInputPolicy", BitFlippingEnv(n_bits=3, continuous=True, max_steps=4), **options)
    sac.learn(60)
    samples = sac.replay_buffer.sample(200)
    assert set(samples.future_observations) == {"observation", "achieved_goal", "desired_goal"}
    assert samples.steps_remaining.max() <= 4
    dtql = DTQL("MlpPolicy", "Pendulum-v1", **options)
    dtql.learn(40)
    assert isinstance(dtql.replay_buffer, FutureStateReplayBuffer) and dtql.replay_buffer.gamma == dtql.gamma


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_cuda(distribution):
    """Offsets differ, as the generators do; all else must be the same for the same offsets."""
    recorders = [
        Recorder(FutureStateReplayBuffer(40, OBS, ACT, device=name, n_envs=2, offset_distribution=distribution))
        for name in ("cpu", "cuda")
    ]
    for outcomes in np.random.default_rng(0).choice(3, size=(50, 2), p=[0.9, 0.05, 0.05]).tolist():
        for recorder in recorders:
            recorder.add(outcomes)
    host, device = (recorder.buffer for recorder in recorders)
    samples = device.sample(64)
    assert all(value is None or value.device.type == "cuda" for value in samples)
    index = np.arange(40)
    offsets = device.draw_offsets(index)
    assert offsets.min() >= 1
    th.testing.assert_close(device.future_observations(index, offsets).cpu(), host.future_observations(index, offsets.cpu()))
