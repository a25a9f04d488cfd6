"""
What an env step with its update costs DiffSR by the size of its features, in units of the same with SB3's SAC.

    python benchmarks/diffsr_cost.py --threads 1

Medians over interleaved repetitions, so that a machine that changes its speed changes all of them. Peak memory is that of a
process of its own for each size, libraries included.
"""

import argparse
import resource
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch as th
from harness import RESULTS, write_table
from stable_baselines3 import SAC

from sb3_diffusion import DiffSR
from sb3_diffusion.evaluation.timing import median_milliseconds

ENV_ID = "HalfCheetah-v5"
SMALL = "preset small"
SETTINGS: dict[str, Any] = {
    "SB3's SAC": None,
    SMALL: ("small", {}),
    f"{SMALL}, actor of SAC": ("small", dict(actor_type="sac")),
    f"{SMALL}, d = 128": ("small", dict(feature_dim=128)),
    f"{SMALL}, d = 256": ("small", dict(feature_dim=256)),
    "preset mujoco": ("mujoco", {}),
    "preset dmcontrol": ("dmcontrol", {}),
}
"""SAC, and presets of DiffSR with constructor arguments in their place."""


def make(name: str, learning_starts: int) -> Any:
    """
    :param name: key of ``SETTINGS``
    :param learning_starts: random steps before the first update
    :return: a model that has made one update
    """
    arguments: dict[str, Any] = dict(learning_starts=learning_starts, buffer_size=10_000, seed=0, device="cpu")
    setting = SETTINGS[name]
    model: Any
    if setting is None:
        model = SAC("MlpPolicy", ENV_ID, **arguments)
    else:
        preset, changes = setting
        model = DiffSR.from_preset(preset, ENV_ID, **{**changes, **arguments})
    return model.learn(learning_starts + 1, log_interval=None)


def peak_memory(name: str, n_threads: int) -> float:
    """
    :param name: key of ``SETTINGS``
    :param n_threads: of torch
    :return: largest resident memory of this process after 20 updates, in MiB
    """
    th.set_num_threads(n_threads)
    make(name, 600).learn(20, log_interval=None, reset_num_timesteps=False)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def main(arguments: list[str] | None = None) -> None:
    """
    Measure, and write ``benchmarks/results/diffsr_cost.json``.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="env steps of a repetition")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS)[1:], default=list(SETTINGS)[1:])
    options = parser.parse_args(arguments)
    names = [next(iter(SETTINGS)), *options.settings]

    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.starmap(peak_memory, [(name, options.threads) for name in names], chunksize=1)
    memory = dict(zip(names, peaks, strict=True))

    th.set_num_threads(options.threads)
    models = {name: make(name, 600) for name in names}

    def part(model: Any) -> Callable[[], object]:
        return lambda: model.learn(options.steps, log_interval=None, reset_num_timesteps=False)

    milliseconds = median_milliseconds({name: part(model) for name, model in models.items()}, options.repetitions, n_warm_up=2)
    rows: list[list[str | float | int | None]] = []
    for name, model in models.items():
        is_sac = isinstance(model, SAC)
        weights = sum(p.numel() for name, p in model.policy.named_parameters() if "_target." not in name)
        rows.append(
            [
                name,
                None if is_sac else model.feature_dim,
                model.batch_size,
                f"{weights:,}",
                round(milliseconds[name] / options.steps, 2),
                round(milliseconds[name] / milliseconds[names[0]], 2),
                round(memory[name]),
            ]
        )
    write_table(
        RESULTS / "diffsr_cost.json",
        "DiffSR: cost of an env step",
        ["", "features d", "batch", "trained weights", "ms per env step", "ratio to SAC", "peak memory (MiB)"],
        rows,
        text=f"{ENV_ID}, one update after each env step, {options.threads} thread{'s' * (options.threads > 1)}. Medians of "
        f"{options.repetitions} interleaved repetitions of {options.steps} steps; the ratio is to SAC in the same process.",
    )
    for row in rows:
        print(*row, sep="\t")


if __name__ == "__main__":
    main()
