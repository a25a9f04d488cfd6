"""
What an update and an action of DTQL cost, in units of one 1024 x 1024 x 1024 float32 matrix product in the same process.

    python benchmarks/update_cost.py --threads 2

Medians over interleaved repetitions, so that a machine that changes its speed changes all of them.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch as th
from harness import RESULTS, write_table
from stable_baselines3 import SAC

from sb3_diffusion import DTQL

N_REPETITIONS = 60
N_STEPS = 20_000
OBSERVATION_DIM, ACTION_DIM = 17, 6


def measure(parts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """
    :param parts: what to time, by name
    :return: median milliseconds of each
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(N_REPETITIONS + 5):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if repetition >= 5:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


def main() -> None:
    """Measure and write ``benchmarks/results/update_cost.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    th.set_num_threads(parser.parse_args().threads)

    rng = np.random.default_rng(0)
    data = dict(
        observations=rng.normal(size=(N_STEPS, OBSERVATION_DIM)).astype(np.float32),
        actions=rng.uniform(-1.0, 1.0, size=(N_STEPS, ACTION_DIM)).astype(np.float32),
        rewards=rng.normal(size=N_STEPS).astype(np.float32),
        terminals=np.zeros(N_STEPS, dtype=bool),
        timeouts=np.arange(1, N_STEPS + 1) % 1_000 == 0,
    )
    dtql = DTQL("MlpPolicy", "Walker2d-v5", dataset=data, seed=0, device="cpu", n_imitation_steps=0).learn(1)
    candidates = DTQL("MlpPolicy", "Walker2d-v5", dataset=data, seed=0, device="cpu", n_action_samples=1024)
    sac = SAC("MlpPolicy", "Walker2d-v5", buffer_size=1, seed=0, device="cpu")
    left, right = th.randn(1024, 1024), th.randn(1024, 1024)
    one, many = data["observations"][0], data["observations"][:64]
    parts: dict[str, Callable[[], object]] = {
        "matrix product": lambda: left @ right,
        "update": lambda: dtql.train(gradient_steps=1, batch_size=256),
        "action, 1 observation": lambda: dtql.predict(one),
        "action, 64 observations": lambda: dtql.predict(many),
        "action, 1 observation, best of 1024": lambda: candidates.predict(one),
        "action of SB3's SAC, 1 observation": lambda: sac.predict(one),
    }
    milliseconds = measure(parts)
    unit = milliseconds["matrix product"]
    rows: list[list[str | float | int | None]] = [
        [name, round(value, 3), round(value / unit, 3)] for name, value in milliseconds.items()
    ]
    write_table(
        RESULTS / "update_cost.json",
        "Cost of DTQL's update and action",
        ["what", "milliseconds (median)", "matrix products"],
        rows,
        text=(
            f"Batch 256, {OBSERVATION_DIM} observation and {ACTION_DIM} action dimensions, networks of the published sizes, "
            f"{th.get_num_threads()} threads. The unit is one 1024 x 1024 by 1024 x 1024 float32 product in the same process."
        ),
    )
    for row in rows:
        print(*row, sep="\t")


if __name__ == "__main__":
    main()
