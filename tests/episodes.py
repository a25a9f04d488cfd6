"""Drives a replay buffer with scripted episodes and remembers them as plain lists, as an oracle for its samplers."""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from hypothesis import strategies as st

from sb3_diffusion.buffers import EpisodeReplayBuffer
from sb3_diffusion.buffers.device_mirror import DeviceMirror
from sb3_diffusion.datasets.offline_dataset import OfflineDataset

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = spaces.Box(-1.0, 1.0, (2,), np.float32)
DICT = spaces.Dict({"vector": OBS, "number": spaces.Discrete(1000)})
GOES_ON, TERMINATES, TRUNCATES = range(3)


class Copies:
    """Mixin: keeps a second copy of all arrays, as on a GPU."""

    def _make_mirror(self, arrays: dict[str, np.ndarray], n_rows: int) -> DeviceMirror:
        return DeviceMirror(arrays, self.device, n_rows, copy=True)  # type: ignore[attr-defined]


class Rest(NamedTuple):
    """What is left of an episode of L more steps."""

    observations: list[Any]  # L + 1 of them
    actions: list[np.ndarray]
    rewards: list[float]
    ending: int  # GOES_ON: it runs, or was still running when the steps were stored


def observation(env: int, number: int, t: int, space: spaces.Space = OBS) -> Any:
    """What an environment shows at time t in its episode of this number; the last one differs from the next first one."""
    vector = np.array([env, number, t], np.float32)
    return {"vector": vector, "number": np.int64((7 * t + number) % 1000)} if isinstance(space, spaces.Dict) else vector


def action(env: int, t: int) -> np.ndarray:
    return np.array([(t % 50 + 1) / 100, -(env + 1) / 10], np.float32)


def reward(env: int, t: int) -> float:
    return float((5 * t + 3 * env) % 7) - 2.5


class Recorder:
    """
    Adds to a buffer, and to a list of episodes per environment: ``[first time, rewards, ending]``.

    Times count the steps of an environment since the beginning.
    """

    def __init__(self, buffer: EpisodeReplayBuffer) -> None:
        self.buffer = buffer
        self.n_added = 0
        self.episodes: list[list[list[Any]]] = [[] for _ in range(buffer.n_envs)]

    def add(self, outcomes: list[int]) -> None:
        t, space, rows = self.n_added, self.buffer.observation_space, []
        for env, outcome in enumerate(outcomes):
            episodes = self.episodes[env]
            if not episodes or episodes[-1][2] != GOES_ON:
                episodes.append([t, [], GOES_ON])
            number = len(episodes)
            episodes[-1][1].append(reward(env, t))
            episodes[-1][2] = self._ending(outcome)
            rows.append((observation(env, number, t, space), observation(env, number, t + 1, space), action(env, t)))
        observations, next_observations, actions = zip(*rows, strict=True)
        self.buffer.add(
            stacked(observations),
            stacked(next_observations),
            np.stack(actions),
            np.array([reward(env, t) for env in range(len(outcomes))]),
            np.array([outcome != GOES_ON for outcome in outcomes]),
            [{"TimeLimit.truncated": outcome == TRUNCATES} for outcome in outcomes],
        )
        self.n_added += 1

    def _ending(self, outcome: int) -> int:
        return TERMINATES if outcome == TRUNCATES and not self.buffer.handle_timeout_termination else outcome

    def cut(self) -> None:
        self.buffer.truncate_last_trajectory()
        for episodes in self.episodes:
            if episodes and episodes[-1][2] == GOES_ON:
                episodes[-1][2] = self._ending(TRUNCATES)

    def stored(self) -> dict[int, Rest]:
        """All steps that may be drawn, by their index in the buffer, each with what follows."""
        capacity, space = self.buffer.buffer_size, self.buffer.observation_space
        oldest = max(0, self.n_added - capacity + int(self.buffer.optimize_memory_usage))
        steps = {}
        for env, episodes in enumerate(self.episodes):
            for number, (first, rewards, ending) in enumerate(episodes, start=1):
                end = first + len(rewards)
                for t in range(max(first, oldest), end):
                    steps[t % capacity * self.buffer.n_envs + env] = Rest(
                        [observation(env, number, time, space) for time in range(t, end + 1)],
                        [action(env, time) for time in range(t, end)],
                        rewards[t - first :],
                        ending,
                    )
        return steps


@st.composite
def scripts(draw: st.DrawFn) -> tuple[int, int, list[Any]]:
    """Capacity, number of environments, and what happens: outcomes per environment, "look", "cut"."""
    n_envs, capacity, length = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 30))
    outcome = st.sampled_from([GOES_ON, GOES_ON, GOES_ON, GOES_ON, TERMINATES, TRUNCATES])
    outcomes = st.tuples(*[outcome] * n_envs).map(list)
    event = st.one_of(outcomes, outcomes, outcomes, outcomes, st.sampled_from(["look", "cut"]))
    return capacity, n_envs, [draw(event) for _ in range(length)]


def make_dataset(lengths: list[int], endings: list[int], space: spaces.Space = OBS) -> tuple[OfflineDataset, dict[int, Rest]]:
    """A dataset of episodes, and what follows each of its steps."""
    columns: list[list[Any]] = [[] for _ in range(6)]
    steps = {}
    for number, (length, ending) in enumerate(zip(lengths, endings, strict=True)):
        observations = [observation(0, number, t, space) for t in range(length + 1)]
        actions, rewards = [action(0, t) for t in range(length)], [reward(number, t) for t in range(length)]
        for t in range(length):
            steps[len(columns[0])] = Rest(observations[t:], actions[t:], rewards[t:], ending)
            is_last = t == length - 1
            flags = is_last and ending == TERMINATES, is_last and ending == TRUNCATES
            row = (observations[t], actions[t], rewards[t], observations[t + 1], *flags)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    data = [stacked(column) for column in columns]
    return OfflineDataset(*data, observation_space=space, action_space=ACT), steps


def stacked(rows: Any) -> Any:
    """One array of several, or a dict of arrays of several dicts."""
    if isinstance(rows[0], dict):
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


def assert_equal(got: Any, expected: Any) -> None:
    """A tensor, or a dict of tensors, and rows of a list."""
    expected = stacked(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_array_equal(got[key].numpy().reshape(values.shape), values)
    else:
        np.testing.assert_array_equal(got.numpy(), expected)
