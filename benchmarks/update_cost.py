"""
What an update and an action cost, in units of one 1024 x 1024 x 1024 float32 matrix product in the same process.

    python benchmarks/update_cost.py --threads 2

Medians over interleaved repetitions, so that a machine that changes its speed changes all of them.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from harness import RESULTS, write_table
from stable_baselines3 import SAC

from sb3_diffusion import DTQL, DiffusionQL
from sb3_diffusion.evaluation.timing import median_milliseconds

N_STEPS = 20_000
OBSERVATION_DIM, ACTION_DIM = 17, 6


def random_data() -> dict[str, Any]:
    """:return: episodes of 1,000 random steps, of Walker2d's sizes"""
    rng = np.random.default_rng(0)
    return dict(
        observations=rng.normal(size=(N_STEPS, OBSERVATION_DIM)).astype(np.float32),
        actions=rng.uniform(-1.0, 1.0, size=(N_STEPS, ACTION_DIM)).astype(np.float32),
        rewards=rng.normal(size=N_STEPS).astype(np.float32),
        terminals=np.zeros(N_STEPS, dtype=bool),
        timeouts=np.arange(1, N_STEPS + 1) % 1_000 == 0,
    )


def best_of(model: Any, n_action_samples: int) -> Any:
    """
    :param model: an algorithm
    :param n_action_samples: candidates
    :return: a policy with its networks that chooses among candidates
    """
    policy = copy.copy(model.policy)
    policy.n_action_samples = n_action_samples
    return policy


def main() -> None:
    """Measure and write ``benchmarks/results/update_cost.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    th.set_num_threads(parser.parse_args().threads)

    data = random_data()
    arguments: dict[str, Any] = dict(policy="MlpPolicy", env="Walker2d-v5", dataset=data, seed=0, device="cpu")
    dtql = DTQL(n_imitation_steps=0, **arguments).learn(1)
    diffusion_ql = DiffusionQL(n_imitation_steps=0, **arguments).learn(1)
    fast = DiffusionQL(n_imitation_steps=0, n_sampling_steps=2, **arguments).learn(1)
    sac = SAC("MlpPolicy", "Walker2d-v5", buffer_size=1, seed=0, device="cpu")
    left, right = th.randn(1024, 1024), th.randn(1024, 1024)
    one, many = data["observations"][0], data["observations"][:64]
    parts: dict[str, Callable[[], object]] = {
        "matrix product": lambda: left @ right,
        "DTQL: update": lambda: dtql.train(gradient_steps=1, batch_size=256),
        "DTQL: action, 1 observation": lambda: dtql.predict(one),
        "DTQL: action, 64 observations": lambda: dtql.predict(many),
        "DTQL: action, 1 observation, best of 1024": lambda: best_of(dtql, 1024).predict(one),
        "DiffusionQL: update": lambda: diffusion_ql.train(gradient_steps=1, batch_size=256),
        "DiffusionQL: update, 2 sampling steps": lambda: fast.train(gradient_steps=1, batch_size=256),
        "DiffusionQL: action, 1 observation": lambda: diffusion_ql.predict(one),
        "DiffusionQL: action, 64 observations": lambda: diffusion_ql.predict(many),
        "DiffusionQL: action, 1 observation, best of 50": lambda: best_of(diffusion_ql, 50).predict(one),
        "DiffusionQL: action, 1 observation, 2 sampling steps": lambda: fast.predict(one),
        "SB3's SAC: action, 1 observation": lambda: sac.predict(one),
    }
    milliseconds = median_milliseconds(parts)
    unit = milliseconds["matrix product"]
    rows: list[list[str | float | int | None]] = [
        [name, round(value, 3), round(value / unit, 3)] for name, value in milliseconds.items()
    ]
    write_table(
        RESULTS / "update_cost.json",
        "Cost of an update and an action",
        ["what", "milliseconds (median)", "matrix products"],
        rows,
        text=(
            f"Batch 256, one update of the main loop, {OBSERVATION_DIM} observation and {ACTION_DIM} action dimensions, "
            f"networks of the published sizes, "
            f"{th.get_num_threads()} threads. The unit is one 1024 x 1024 by 1024 x 1024 float32 product in the same process."
        ),
    )
    for row in rows:
        print(*row, sep="\t")


if __name__ == "__main__":
    main()
