"""
What a decision and an update of Diffuser cost, in units of one 1024 x 1024 x 1024 float32 matrix product in the same process.

    python benchmarks/planning_cost.py --threads 2

Medians over interleaved repetitions, so that a machine that changes its speed changes all of them.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from harness import RESULTS, write_table
from speed import ACTION_DIM, OBSERVATION_DIM, random_data

from sb3_diffusion import Diffuser
from sb3_diffusion.evaluation.timing import median_milliseconds

HORIZON, BATCH_SIZE, GUIDANCE_SCALE = 32, 32, 0.1


class Decision(NamedTuple):
    """
    How plans are made.

    :ivar sampler: of the chain of 20 steps
    :ivar n_sampling_steps: steps of the sampler
    :ivar n_candidates: plans per decision
    :ivar guided: by the value
    :ivar warm_start: share of the chain that refines the previous plan; 0 plans from noise
    """

    sampler: str = "ddpm"
    n_sampling_steps: int = 20
    n_candidates: int = 1
    guided: bool = False
    warm_start: float = 0.0


DECISIONS = [
    Decision(n_candidates=64, guided=True),
    Decision(n_candidates=64),
    Decision(),
    Decision("ddim", 10),
    Decision("ddim", 5),
    Decision("ddim", 5, n_candidates=64),
    Decision("ddim", 5, n_candidates=64, guided=True),
    Decision("dpm_solver", 5),
    Decision("heun", 5),
    Decision(warm_start=0.25),
    Decision(n_candidates=64, guided=True, warm_start=0.25),
]


def decide(model: Diffuser, decision: Decision, observations: np.ndarray) -> Callable[[], object]:
    """
    :param model: planner that executes one action per plan
    :param decision: how it plans
    :param observations: one per env
    :return: makes one decision for each env; a previous plan is at hand for a warm start
    """

    def prepare() -> None:
        model.set_sampler(decision.sampler, decision.n_sampling_steps)
        model.set_planning(
            n_candidates=decision.n_candidates,
            guidance_scale=GUIDANCE_SCALE if decision.guided else 0.0,
            warm_start=decision.warm_start,
        )

    prepare()
    state = model.predict(observations)[1] if decision.warm_start > 0.0 else None

    def part() -> None:
        prepare()
        model.predict(observations, state)

    return part


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, and write ``benchmarks/results/planning_cost.json``.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--max-windows", type=int, default=64, help="leave out decisions with more plans at once, in all envs")
    parser.add_argument("--n-envs", type=int, nargs="+", default=[1, 64])
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)

    data = random_data()
    model = Diffuser("MlpPolicy", "Walker2d-v5", dataset=data, horizon=HORIZON, batch_size=BATCH_SIZE, seed=0, device="cpu")
    model.learn(1, log_interval=None)
    planner = Diffuser(
        "MlpPolicy",
        "Walker2d-v5",
        dataset=data,
        horizon=HORIZON,
        batch_size=BATCH_SIZE,
        train_value=False,
        seed=0,
        device="cpu",
    )
    planner.learn(1, log_interval=None)
    left, right = th.randn(1024, 1024), th.randn(1024, 1024)
    parts: dict[Any, Callable[[], object]] = {
        "matrix product": lambda: left @ right,
        "update of planner and value": lambda: model.train(gradient_steps=1),
        "update of the planner": lambda: planner.train(gradient_steps=1),
    }
    for n_envs in options.n_envs:
        for decision in DECISIONS:
            if n_envs * decision.n_candidates <= options.max_windows:
                parts[n_envs, decision] = decide(model, decision, data["observations"][:n_envs])
    milliseconds = median_milliseconds(parts, options.repetitions, n_warm_up=1)
    unit = milliseconds["matrix product"]
    rows: list[list[str | float | int | None]] = []
    for part, value in milliseconds.items():
        cells: list[str | float | int | None] = [part, *[None] * 6]
        if not isinstance(part, str):
            n_envs, decision = part
            share = f"{decision.warm_start:.2f} of the chain" if decision.warm_start > 0.0 else "no"
            cells = ["decision", n_envs, decision.sampler, decision.n_sampling_steps, decision.n_candidates]
            cells += ["yes" if decision.guided else "no", share]
        rows.append([*cells, value, value / unit])
        print(*rows[-1], sep="\t", flush=True)
    write_table(
        RESULTS / "planning_cost.json",
        "Cost of planning",
        [
            "what",
            "envs",
            "sampler",
            "steps",
            "plans per env",
            "guided",
            "warm start",
            "milliseconds (median)",
            "matrix products",
        ],
        rows,
        text=(
            f"Diffuser with networks of the published sizes, horizon {HORIZON}, {OBSERVATION_DIM} observation and "
            f"{ACTION_DIM} action dimensions, a chain of 20 steps, {th.get_num_threads()} "
            f"thread{'s' if th.get_num_threads() > 1 else ''}; updates at batch {BATCH_SIZE}. Milliseconds are of one call "
            f"that decides for all envs, medians of {options.repetitions} repetitions. Left out: more than "
            f"{options.max_windows} plans at once. Guidance takes two gradient steps before each denoising step. The unit is "
            "one 1024 x 1024 by 1024 x 1024 float32 product in the same process."
        ),
    )


if __name__ == "__main__":
    main()
