"""
What updates, actions, plans and batches cost, against what the machine can do.

    python benchmarks/speed.py --threads 1
    python benchmarks/speed.py --threads 1 --methods DTQL --variants eager --again
    python benchmarks/speed.py --profile DTQL Diffuser

The unit is one 1024 x 1024 by 1024 x 1024 product in float32. It runs just before each thing that is timed, and the table
has the median of these ratios: other work on the machine slows both. On one thread time is that of the processor, without
turns of other processes. What is in the table is not measured again without ``--again``.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from harness import RESULTS, write_table
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CallbackList

from sb3_diffusion import DTQL, BellmanDiffusion, DiffSR, Diffuser, DiffusionQL, OfflineDataset, load_dataset
from sb3_diffusion.evaluation.timing import UNIT_OPERATIONS, count_operations, paired_timing

N_STEPS = 20_000
OBSERVATION_DIM, ACTION_DIM = 17, 6
N_PLANS = 64
ENV_ID = "Walker2d-v5"

Part = Callable[[], object]
Row = list[str | float | int | None]

METHODS: dict[str, tuple[Any, str | None, dict[str, Any]]] = {
    "DTQL": (DTQL, None, dict(n_imitation_steps=0)),
    "DiffusionQL": (DiffusionQL, None, dict(n_imitation_steps=0)),
    "DiffusionQL, 2 steps": (DiffusionQL, None, dict(n_imitation_steps=0, n_sampling_steps=2)),
    "Diffuser": (Diffuser, None, dict(horizon=32, batch_size=32, train_value=False)),
    "BellmanDiffusion": (BellmanDiffusion, None, {}),
    "DiffSR": (DiffSR, "small", {}),
}
"""Class, preset and constructor arguments."""

VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compile": dict(compile=True),
    "bfloat16": dict(precision="bfloat16"),
    "compile, bfloat16": dict(compile=True, precision="bfloat16"),
}

COLUMNS = ["method", "variant", "what", "milliseconds (median)", "units", "operations in units", "share of the ceiling"]


@cache
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


@cache
def dataset() -> OfflineDataset:
    """:return: the random data, loaded once"""
    return load()


def load() -> OfflineDataset:
    """:return: the random data, loaded"""
    bounds = spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,)), spaces.Box(-1.0, 1.0, (ACTION_DIM,))
    return load_dataset(random_data(), observation_space=bounds[0], action_space=bounds[1])


def make(name: str, variant: str) -> Any:
    """
    :param name: key of ``METHODS``
    :param variant: key of ``VARIANTS``
    :return: a model that has made three updates
    """
    algorithm, preset, changes = METHODS[name]
    arguments = dict(changes, dataset=dataset(), seed=0, device="cpu", **VARIANTS[variant])
    model = (
        algorithm("MlpPolicy", ENV_ID, **arguments) if preset is None else algorithm.from_preset(preset, ENV_ID, **arguments)
    )
    return model.learn(3, log_interval=None)


def part_names(name: str, variant: str) -> list[str]:
    """
    :param name: key of ``METHODS``
    :param variant: key of ``VARIANTS``; of acting plans alone are compiled, and batches are the same in all
    :return: what is measured of it
    """
    plans = METHODS[name][0] is Diffuser
    acting = [f"{N_PLANS} plans, 20 steps"] if plans else ["1 action", f"{N_PLANS} actions"]
    return [
        "update",
        *(["20 steps of learn", "batch"] if variant == "eager" else []),
        *(acting if plans or "compile" not in variant else []),
    ]


def parts_of(model: Any, name: str, variant: str) -> Iterator[tuple[str, Part]]:
    """
    :param model: an algorithm
    :param name: key of ``METHODS``
    :param variant: key of ``VARIANTS``
    :return: names, and what runs
    """
    runs: dict[str, Part] = {
        "update": lambda: model.train(gradient_steps=1, batch_size=model.batch_size),
        "20 steps of learn": lambda: model.learn(20, CallbackList([]), log_interval=None, reset_num_timesteps=False),
        "batch": lambda: model.sample_batch(model.batch_size),
        **acting(model),
    }
    return ((part, runs[part]) for part in part_names(name, variant))


def acting(model: Any) -> dict[str, Part]:
    """
    :param model: an algorithm, also of SB3
    :return: what runs, by name
    """
    one, many = random_data()["observations"][0], random_data()["observations"][:N_PLANS]
    if isinstance(model, Diffuser):
        return {f"{N_PLANS} plans, 20 steps": lambda: model.plan(many, n_candidates=1)}
    return {"1 action": lambda: model.predict(one), f"{N_PLANS} actions": lambda: model.predict(many)}


def machine() -> Iterator[tuple[str, str, Part, int]]:
    """:return: what the machine can do: variant, name, what runs, operations"""
    for variant, dtype in (("eager", th.float32), ("bfloat16", th.bfloat16)):
        for n, n_rows, width in ((1, 1024, 1024), (64, 256, 256), (64, 1024, 128)):
            left, right = th.randn(n_rows, width, dtype=dtype), th.randn(width, width, dtype=dtype)
            name = f"{n} product{'s' * (n > 1)} {n_rows} x {width} by {width} x {width}"
            yield variant, name, repeat(partial(th.mm, left, right), n), 2 * n * n_rows * width**2
    source, target = th.ones(2**24), th.empty(2**24)
    yield "eager", "copy of 64 MiB", lambda: target.copy_(source), 0


def repeat(part: Part, n: int) -> Part:
    """
    :param part: what runs
    :param n: how often
    :return: all of it
    """

    def run() -> None:
        for _ in range(n):
            part()

    return run


class Table:
    """
    A result file that rows are added to; each is written when it is there.

    :param path: the file
    :param again: measure what it holds again
    :param repetitions: of each measurement
    """

    def __init__(self, path: Path, again: bool, repetitions: int) -> None:
        self.path, self.again, self.repetitions = path, again, repetitions
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.rows: dict[tuple[Any, ...], Row] = {tuple(row[:3]): row for row in content.get("rows", [])}

    def lacks(self, *key: str) -> bool:
        """
        :param key: method, variant and part
        :return: whether to measure it
        """
        return self.again or key not in self.rows

    def measure(self, key: tuple[str, str, str], part: Part, operations: int) -> None:
        """
        :param key: method, variant and part
        :param part: what runs
        :param operations: floating-point operations in it
        """
        left, right = th.randn(1024, 1024), th.randn(1024, 1024)
        clock = time.process_time if th.get_num_threads() == 1 else time.perf_counter
        timing = paired_timing(part, lambda: left @ right, self.repetitions, clock=clock)
        work = operations / UNIT_OPERATIONS
        self.rows[key] = [*key, timing.milliseconds, timing.ratio, work or None, work / timing.ratio or None]
        print(*self.rows[key], sep="\t", flush=True)
        threads = th.get_num_threads()
        write_table(
            self.path,
            f"Speed on {threads} thread{'s' * (threads > 1)}",
            COLUMNS,
            list(self.rows.values()),
            text=(
                f"{OBSERVATION_DIM} observation and {ACTION_DIM} action dimensions, networks and batches of the default "
                "sizes, DiffSR its preset `small`, Diffuser horizon 32 and batch 32 without a value. The unit is one "
                "1024 x 1024 by 1024 x 1024 product in float32, which ran just before each measurement; units are "
                "medians of these ratios: other work on the machine slows both. Time is "
                f"that {'of the processor' if threads == 1 else 'on the wall'}. Operations are those of matrix products, "
                "counted from their sizes by `torch.utils.flop_counter`; the share of the ceiling is operations over units. "
                "Small products, and those of bfloat16, may be faster than the unit, and their share above 1. "
                f"Medians of {self.repetitions} repetitions."
            ),
        )


def profile(name: str, variant: str, n_operators: int = 10) -> str:
    """
    :param name: key of ``METHODS``
    :param variant: key of ``VARIANTS``
    :param n_operators: rows
    :return: a Markdown table of the operators that an update spends its time in
    """
    model = make(name, variant)
    n_updates = 5
    with th.profiler.profile(activities=[th.profiler.ProfilerActivity.CPU]) as profiler:
        model.train(gradient_steps=n_updates, batch_size=model.batch_size)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [f"| {name}, {variant} | share | calls per update |", "|---|---:|---:|"]
    for event in events[:n_operators]:
        share = 100.0 * event.self_cpu_time_total / total
        lines.append(f"| `{event.key[:48]}` | {share:.1f} % | {event.count / n_updates:g} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure what is asked for, and add it to ``benchmarks/results/speed_<threads>.json``.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--again", action="store_true", help="measure what is in the table again")
    parser.add_argument("--profile", nargs="+", choices=list(METHODS), help="print where the time of an update goes instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    if options.profile:
        for name in options.profile:
            for variant in options.variants:
                print(profile(name, variant), end="\n\n", flush=True)
        return

    table = Table(options.results / f"speed_{options.threads}.json", options.again, options.repetitions)
    for variant, name, part, operations in machine():
        if table.lacks("machine", variant, name):
            table.measure(("machine", variant, name), part, operations)
    if table.lacks("data", "eager", "loading"):
        table.measure(("data", "eager", "loading"), load, 0)
    if table.lacks("SB3's SAC", "eager", "1 action"):
        sac = SAC("MlpPolicy", ENV_ID, buffer_size=1, seed=0, device="cpu")
        for name, part in acting(sac).items():
            table.measure(("SB3's SAC", "eager", name), part, count_operations(part))
    for name in options.methods:
        operations_of: dict[str, int] = {}
        for variant in options.variants:
            if not any(table.lacks(name, variant, what) for what in part_names(name, variant)):
                continue
            if not operations_of:
                operations_of = {what: count_operations(run) for what, run in parts_of(make(name, "eager"), name, "eager")}
            for what, run in parts_of(make(name, variant), name, variant):
                if table.lacks(name, variant, what):
                    table.measure((name, variant, what), run, operations_of[what])


if __name__ == "__main__":
    main()
