"""
Time to draw windows, and transitions with future states, from a million logged steps.

    OMP_NUM_THREADS=1 python benchmarks/window_sampling.py

The data are 1000 episodes of 1000 steps with 17-dimensional observations and 6-dimensional actions. Wall time is what a user
waits for; the CPU time of the process is the same on a busy machine. Only the median of many draws is kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from harness import RESULTS, write_table

from sb3_diffusion import EpisodeReplayBuffer, FutureStateReplayBuffer, OfflineDataset, TrajectoryReplayBuffer

N_OBSERVATIONS, N_ACTIONS = 17, 6
N_WINDOWS, N_TRANSITIONS = 10_000, 256
OBSERVATION_SPACE = spaces.Box(-np.inf, np.inf, (N_OBSERVATIONS,), np.float32)
ACTION_SPACE = spaces.Box(-1.0, 1.0, (N_ACTIONS,), np.float32)
CASES: list[tuple[str, int, type[EpisodeReplayBuffer], dict[str, Any]]] = [
    ("windows of 32 steps, the last row repeated", N_WINDOWS, TrajectoryReplayBuffer, dict(horizon=32)),
    ("windows of 32 steps, zeros", N_WINDOWS, TrajectoryReplayBuffer, dict(horizon=32, padding="zeros")),
    ("windows of 32 steps, no padding", N_WINDOWS, TrajectoryReplayBuffer, dict(horizon=32, padding=None)),
    ("windows of 32 rows, every 4th step", N_WINDOWS, TrajectoryReplayBuffer, dict(horizon=32, stride=4)),
    ("windows of 32 steps, the last row repeated", 64, TrajectoryReplayBuffer, dict(horizon=32)),
    ("transitions alone", N_TRANSITIONS, EpisodeReplayBuffer, {}),
    *(
        (f"future states, {name}", N_TRANSITIONS, FutureStateReplayBuffer, dict(offset_distribution=name))
        for name in ("truncated_geometric", "geometric", "uniform")
    ),
]


def main() -> None:
    """Measure and write ``benchmarks/results/window_sampling.json``."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000, help="per episode")
    parser.add_argument("--repeats", type=int, default=50, help="draws, of which the median is kept")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=RESULTS / "window_sampling.json")
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    dataset = random_walks(options.episodes, options.steps)
    rows: list[list[Any]] = []
    for label, batch_size, cls, arguments in CASES:
        start = time.perf_counter()
        buffer = make(dataset, cls, arguments)
        buffer.sample(1)
        seconds = time.perf_counter() - start
        wall, cpu = milliseconds(lambda: buffer.sample(batch_size), options.repeats)  # noqa: B023
        assert np.shares_memory(buffer.observations, dataset.observations)
        rows.append([label, batch_size, round(seconds, 2), round(wall, 2), round(cpu, 2)])
        print(*rows[-1], sep=" | ", flush=True)
    write_table(
        options.out,
        "Drawing windows and future states",
        ["what", "batch", "seconds to make the buffer", "ms per batch", "CPU ms per batch"],
        rows,
        text=(
            f"{options.episodes} episodes of {options.steps} steps, {N_OBSERVATIONS} observations and {N_ACTIONS} actions, "
            f"{options.threads} thread(s), medians of {options.repeats} batches. To make a buffer includes its first sample; "
            "it reads the dataset's own arrays. Windows hold their returns-to-go."
        ),
    )


def random_walks(n_episodes: int, n_steps: int) -> OfflineDataset:
    """
    :param n_episodes: number of episodes, of which each second one terminates
    :param n_steps: of each
    :return: the data
    """
    rng, total = np.random.default_rng(0), n_episodes * n_steps
    walks = rng.standard_normal((n_episodes, n_steps + 1, N_OBSERVATIONS), dtype=np.float32).cumsum(axis=1)
    flags = np.zeros((2, n_episodes, n_steps), bool)
    flags[0, ::2, -1] = flags[1, 1::2, -1] = True
    return OfflineDataset(
        walks[:, :-1].reshape(total, N_OBSERVATIONS),
        rng.uniform(-1, 1, (total, N_ACTIONS)).astype(np.float32),
        rng.standard_normal(total, dtype=np.float32),
        walks[:, 1:].reshape(total, N_OBSERVATIONS),
        *flags.reshape(2, total),
        observation_space=OBSERVATION_SPACE,
        action_space=ACTION_SPACE,
    )


def make(dataset: OfflineDataset, cls: type[EpisodeReplayBuffer], arguments: dict[str, Any]) -> EpisodeReplayBuffer:
    """
    :param dataset: the data
    :param cls: class of the buffer
    :param arguments: its further arguments
    :return: buffer of the data on the CPU, with a seeded generator
    """
    generator = th.Generator().manual_seed(0)
    return cls.from_dataset(dataset, OBSERVATION_SPACE, ACTION_SPACE, device="cpu", generator=generator, **arguments)


def milliseconds(function: Callable[[], object], n: int) -> tuple[float, float]:
    """
    :param function: is called with nothing
    :param n: how often
    :return: median wall and CPU time
    """
    times = []
    for _ in range(n):
        start, start_cpu = time.perf_counter(), time.process_time()
        function()
        times.append((time.perf_counter() - start, time.process_time() - start_cpu))
    wall, cpu = 1e3 * np.median(times, axis=0)
    return float(wall), float(cpu)


if __name__ == "__main__":
    main()
