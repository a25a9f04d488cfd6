"""
Time and memory that it takes to load a large dataset.

    python benchmarks/dataset_loading.py

Writes 2 million steps (2000 episodes of 1000) of 17-dimensional float64 observations and 6-dimensional actions as a Minari
dataset and in D4RL's layout (gzip, with and without ``next_observations``) into a temporary folder. Each is then loaded in a
process of its own; the memory is the peak of that process less what it needed after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

N_OBSERVATIONS, N_ACTIONS = 17, 6
MINARI_ID = "benchmark/large-v0"
# With `resource.getrusage`, Linux counts in kilobytes and macOS in bytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    """Write the data, measure, store the result."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1000, help="per episode")
    parser.add_argument("--repeats", type=int, default=3, help="loads per source, the fastest counts")
    parser.add_argument("--out", type=Path, default=None, help="result file (default: benchmarks/results)")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write, options.episodes, options.steps)
    elif options.measure:
        print(json.dumps(measure(options.measure)))
    else:
        run(options)


def run(options: argparse.Namespace) -> None:
    """
    Do the whole benchmark; the parent process stays small, since a child's peak memory starts at that of its parent.

    :param options: of the command line
    """
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        sources = {
            "Minari, HDF5": MINARI_ID,
            "D4RL layout, `next_observations` stored": f"{folder}/with.hdf5",
            "D4RL layout, without": f"{folder}/without.hdf5",
        }
        for label, source in sources.items():
            size = f"--episodes={options.episodes}", f"--steps={options.steps}"
            subprocess.run([sys.executable, __file__, "--write", source, *size], check=True)
            results = [
                json.loads(
                    subprocess.run([sys.executable, __file__, "--measure", source], check=True, stdout=subprocess.PIPE).stdout
                )
                for _ in range(options.repeats)
            ]
            result = results[0]
            peak = max(result["peak_bytes"] for result in results)
            rows.append(
                [
                    label,
                    result["n_steps"],
                    round(min(result["seconds"] for result in results), 2),
                    round(min(result["cpu_seconds"] for result in results), 2),
                    round(result["kept_bytes"] / 1e6),
                    round(peak / 1e6),
                    round(peak / result["kept_bytes"], 2),
                    round(peak / result["kept_bytes_without_next"], 2),
                ]
            )
            print(*rows[-1], sep=" | ", flush=True)
    # not before: it would make this process large
    from harness import RESULTS, write_table

    write_table(
        options.out or RESULTS / "dataset_loading.json",
        "Loading a large dataset",
        [
            "source",
            "steps kept",
            "seconds",
            "CPU seconds",
            "arrays kept, MB",
            "peak memory, MB",
            "peak / kept",
            "peak / kept without next observations",
        ],
        rows,
        text=(
            f"{options.episodes} episodes of {options.steps} steps, {N_OBSERVATIONS} observations (float64 on the disk) and "
            f"{N_ACTIONS} actions, files in the disk cache, the fastest of {options.repeats} loads, each in a process of its "
            "own. Peak memory is the largest resident size of the process less that after its imports. *Kept* are all arrays "
            "of the dataset, observations and next observations once each; the last column leaves the next observations out."
        ),
    )


def draw_episodes(n_episodes: int, n_steps: int) -> Iterator[tuple[np.ndarray, ...]]:
    """
    Random walks with random ends.

    :param n_episodes: number of episodes
    :param n_steps: of each
    :return: iterator over observations ``(n_steps + 1, 17)`` float64, actions, rewards, terminations, truncations
    """
    rng = np.random.default_rng(0)
    for _ in range(n_episodes):
        observations = rng.standard_normal((n_steps + 1, N_OBSERVATIONS)).cumsum(axis=0) * 0.1
        actions = rng.uniform(-1, 1, (n_steps, N_ACTIONS)).astype(np.float32)
        flags = np.zeros((2, n_steps), bool)
        flags[int(rng.integers(2)), -1] = True
        yield observations, actions, rng.standard_normal(n_steps), flags[0], flags[1]


def write(target: str, n_episodes: int, n_steps: int) -> None:
    """
    Write one dataset.

    :param target: Minari id or HDF5 file
    :param n_episodes: number of episodes
    :param n_steps: of each
    """
    episodes = draw_episodes(n_episodes, n_steps)
    if target == MINARI_ID:
        import minari
        from gymnasium import spaces
        from minari.data_collector import EpisodeBuffer

        names = ("observations", "actions", "rewards", "terminations", "truncations")
        minari.create_dataset_from_buffers(
            target,
            (EpisodeBuffer(**dict(zip(names, episode, strict=True)), infos={}) for episode in episodes),
            observation_space=spaces.Box(-np.inf, np.inf, (N_OBSERVATIONS,), np.float64),
            action_space=spaces.Box(-1, 1, (N_ACTIONS,)),
            algorithm_name="none",
            author="none",
            author_email="none",
            code_permalink="none",
            description="random walks",
            data_format="hdf5",
        )
        return
    import h5py

    total = n_episodes * n_steps
    with h5py.File(target, "w") as file:
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "observations": ((total, N_OBSERVATIONS), np.float64),
            "actions": ((total, N_ACTIONS), np.float32),
            "rewards": ((total,), np.float64),
            "terminals": ((total,), bool),
            "timeouts": ((total,), bool),
        }
        if target.endswith("with.hdf5"):
            shapes["next_observations"] = shapes["observations"]
        arrays = {
            key: file.create_dataset(key, shape, dtype, compression="gzip", chunks=(n_steps, *shape[1:]))
            for key, (shape, dtype) in shapes.items()
        }
        for i, (observations, *columns) in enumerate(episodes):
            rows = slice(i * n_steps, (i + 1) * n_steps)
            arrays["observations"][rows] = observations[:-1]
            if "next_observations" in arrays:
                arrays["next_observations"][rows] = observations[1:]
            for key, column in zip(("actions", "rewards", "terminals", "timeouts"), columns, strict=True):
                arrays[key][rows] = column


def measure(source: str) -> dict[str, Any]:
    """
    Load a dataset in this process.

    :param source: for ``load_dataset``
    :return: seconds, and bytes
    """
    import h5py  # noqa: F401
    import minari  # noqa: F401

    from sb3_diffusion.datasets import load_dataset

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    dataset = load_dataset(source)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(dataset.next_observations, np.ndarray)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "n_steps": len(dataset),
        "peak_bytes": (peak - before) * RSS_UNIT,
        "kept_bytes": dataset.nbytes,
        "kept_bytes_without_next": dataset.nbytes - dataset.next_observations.nbytes,
    }


if __name__ == "__main__":
    main()
