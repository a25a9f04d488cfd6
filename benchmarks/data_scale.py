"""
Learning from datasets that stay on the disk: memory, and the time of a draw, by number of steps.

    python benchmarks/data_scale.py
    python benchmarks/data_scale.py --steps 10000 10000000

Random walks of 17 dimensions with 6 actions are written part by part as memory-mapped arrays into a temporary folder, 10
million steps take 1.6 GB. Each set is then loaded, drawn from and learned from in a process of its own. What counts as its
memory is anonymous: pages of the mapped files belong to the disk cache, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PART = 1_000  # episodes that are made and written together
N_STEPS = 1_000  # of an episode


def main() -> None:
    """Write the data, measure, store the result; this process stays small."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--updates", type=int, default=200, help="of DTQL")
    parser.add_argument("--folder", type=Path, help="for the data, in the place of the system's temporary one")
    parser.add_argument("--out", type=Path, default=None, help="result file (default: benchmarks/results)")
    parser.add_argument("--write", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.folder, options.write)
    elif options.measure:
        print(json.dumps(measure(options.folder, options.updates)))
    else:
        run(options)


def run(options: argparse.Namespace) -> None:
    """
    :param options: of the command line
    """
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for n_steps in options.steps:
            target = Path(folder) / f"{n_steps}.mmap"
            call = [sys.executable, __file__, "--folder", target, "--updates", options.updates]
            subprocess.run([*map(str, call), "--write", str(n_steps)], check=True)
            printed = subprocess.run([*map(str, call), "--measure"], check=True, stdout=subprocess.PIPE).stdout
            rows.append([n_steps, *json.loads(printed)])
            print(*rows[-1], sep=" | ", flush=True)
    from harness import RESULTS, write_table

    write_table(
        options.out or RESULTS / "data_scale.json",
        "Datasets on the disk",
        [
            "steps",
            "arrays, MB",
            "seconds to load",
            "memory of data and index, MB",
            "peak memory while it learns, MB",
            "ms to draw 256 transitions",
            "ms to draw 256 future states",
            "ms to draw 32 windows of 32 steps",
        ],
        rows,
        text=(
            "Random walks of 17 dimensions with 6 actions, episodes of 1,000 steps, as memory-mapped arrays in the disk "
            "cache. Memory is anonymous memory of the process less what it had after its imports: what the disk cache cannot "
            f"take back. It learns {options.updates} updates of DTQL at batch 256; draws are medians of 500, after 100 others."
        ),
    )


def write(folder: Path, n_steps: int) -> None:
    """
    :param folder: to write
    :param n_steps: number of steps
    """
    from window_sampling import random_walks

    from sb3_diffusion.datasets import MemoryMappedWriter

    part = random_walks(min(PART, n_steps // N_STEPS), N_STEPS)
    with MemoryMappedWriter(folder) as writer:
        while writer.n_steps < n_steps:
            writer.add(part)


def measure(folder: Path, n_updates: int) -> list[float]:
    """
    :param folder: of the data
    :param n_updates: of DTQL
    :return: the row of the table, without the number of steps
    """
    import torch as th
    from window_sampling import make, milliseconds

    from sb3_diffusion import DTQL, EpisodeReplayBuffer, FutureStateReplayBuffer, TrajectoryReplayBuffer, load_dataset

    th.set_num_threads(1)
    warm_up = DTQL("MlpPolicy", None, dataset=random_data(), device="cpu", seed=0)
    warm_up.learn(5)
    before = anonymous_megabytes()
    start = time.perf_counter()
    data = load_dataset(folder)
    seconds = time.perf_counter() - start
    model = DTQL("MlpPolicy", None, dataset=data, device="cpu", seed=0, buffer_size=1)
    model.sample_batch(1)
    kept = anonymous_megabytes() - before
    with Peak() as peak:
        model.learn(n_updates)
    draws = []
    for cls, n, arguments in (
        (EpisodeReplayBuffer, 256, {}),
        (FutureStateReplayBuffer, 256, {}),
        (TrajectoryReplayBuffer, 32, {"horizon": 32}),
    ):
        buffer = make(data, cls, arguments)
        milliseconds(lambda: buffer.sample(n), 100)  # noqa: B023
        draws.append(round(milliseconds(lambda: buffer.sample(n), 500)[0], 3))  # noqa: B023
    return [round(data.nbytes / 1e6), round(seconds, 2), round(kept), round(peak.megabytes - before), *draws]


def random_data() -> Any:
    """:return: a small dataset like those that are measured"""
    from window_sampling import random_walks

    return random_walks(2, N_STEPS)


def anonymous_megabytes() -> float:
    """:return: memory of this process that lies in no file"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


class Peak:
    """Context in which the anonymous memory of the process is looked at all the time; ``megabytes`` is the largest."""

    def __enter__(self) -> Peak:
        self.megabytes = anonymous_megabytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.megabytes = max(self.megabytes, anonymous_megabytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
