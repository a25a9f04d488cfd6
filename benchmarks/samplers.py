"""
What a trained Diffusion-QL policy scores, and what an action costs, by sampler and number of steps.

    python benchmarks/learning_curves.py hopper-medium --algo diffusion_ql   # trains it
    python benchmarks/samplers.py

The weights stay as they are: only how the reverse chain is run changes.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch as th
from harness import RESULTS, WORK, write_table

from sb3_diffusion import DiffusionQL, load_dataset
from sb3_diffusion.evaluation import evaluate

DATASET, ENV = "bench/hopper/medium-v0", "Hopper-v5"
CHAINS = [
    ("ddpm", 5),
    ("ddpm", 3),
    ("ddpm", 2),
    ("ddpm", 1),
    ("ddim", 5),
    ("ddim", 3),
    ("ddim", 2),
    ("dpm_solver", 5),
    ("dpm_solver", 3),
    ("heun", 5),
    ("heun", 3),
]
"""Of one step, all samplers are the same: the denoised action."""


def milliseconds_per_action(model: DiffusionQL, observations: np.ndarray, n: int = 200) -> float:
    """
    :param model: trained model
    :param observations: one batch
    :param n: how often it is timed
    :return: median time of ``predict``
    """
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        model.predict(observations)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


def main() -> None:
    """Measure and write ``benchmarks/results/samplers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="DiffusionQL-seed0", help="folder of the run below benchmarks/work/hopper_medium")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    dataset = load_dataset(DATASET)
    checkpoint: Path = WORK / "hopper_medium" / options.run / "checkpoint.zip"
    model = DiffusionQL.load(checkpoint, env=ENV, dataset=dataset)
    assert isinstance(dataset.observations, np.ndarray)
    one, many = dataset.observations[0], dataset.observations[:64]
    rows: list[list[str | float | int | None]] = []
    for sampler, n_steps in CHAINS:
        model.set_sampler(sampler, n_steps)
        calls = 2 * n_steps - 1 if sampler == "heun" else n_steps
        means = []
        for deterministic in (True, False):
            result = evaluate(model, ENV, options.episodes, seed=1, deterministic=deterministic, dataset=dataset)
            assert result.normalized_scores is not None
            means.append(round(float(np.mean(result.normalized_scores)), 1))
        cost = [round(milliseconds_per_action(model, batch), 3) for batch in (one, many)]
        rows.append([sampler, n_steps, calls, *means, *cost])
        print(*rows[-1], sep="\t", flush=True)
    write_table(
        RESULTS / "samplers.json",
        "Diffusion-QL: samplers when acting",
        [
            "sampler",
            "steps",
            "network passes",
            "score, deterministic",
            "score, drawn",
            "ms per action, 1 observation",
            "ms, 64 observations",
        ],
        rows,
        text=(
            f"One model, trained with the whole chain of 5 steps (`ddpm`) on {DATASET} for {model.num_timesteps:,} updates, "
            f"run `{options.run}`; mean normalised score of {options.episodes} episodes, with latents of 0 and drawn "
            "ones. "
            f"{th.get_num_threads()} thread."
        ),
    )


if __name__ == "__main__":
    main()
