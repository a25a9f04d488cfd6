"""
What updates, actions and plans cost: milliseconds, units of one matrix product, shares of what the machine can do.

    python benchmarks/speed.py --threads 2
    python benchmarks/speed.py --only DTQL --variants eager bfloat16
    python benchmarks/speed.py --profile DiffusionQL    # operators of an update, slowest first

The unit is one 1024 x 1024 x 1024 float32 product, made in turn with what is measured, so that a machine that changes its
speed changes both. Rows that were measured are kept in ``benchmarks/work``, by the number of threads.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from harness import RESULTS, WORK, write_json, write_table
from stable_baselines3 import SAC
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sb3_diffusion import DTQL, BellmanDiffusion, DiffSR, Diffuser, DiffusionQL
from sb3_diffusion.evaluation.timing import median_milliseconds

N_STEPS = 20_000
OBSERVATION_DIM, ACTION_DIM = 17, 6
SIDE = 1024
UNIT_FLOPS = 2 * SIDE**3
PRODUCT = "matrix product"
VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": dict(compile=True),
    "bfloat16": dict(precision="bfloat16"),
    "compiled, bfloat16": dict(compile=True, precision="bfloat16"),
}


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


class Subject(NamedTuple):
    """
    What is measured.

    :ivar build: makes a model
    :ivar settings: constructor arguments
    :ivar acts: whether actions are measured as well
    :ivar plans: whether a decision by 64 unguided plans is measured
    """

    build: Callable[..., Any]
    settings: dict[str, Any]
    acts: bool = True
    plans: bool = False


SUBJECTS: dict[str, Subject] = {
    "DTQL": Subject(DTQL, dict(n_imitation_steps=0)),
    "DiffusionQL, 5 steps": Subject(DiffusionQL, dict(n_imitation_steps=0)),
    "DiffusionQL, 2 of 5 steps": Subject(DiffusionQL, dict(n_imitation_steps=0, n_sampling_steps=2)),
    "Diffuser, planner alone": Subject(
        Diffuser, dict(horizon=32, batch_size=32, train_value=False, n_candidates=1), acts=False
    ),
    "Diffuser": Subject(Diffuser, dict(horizon=32, batch_size=32, guidance_scale=0.0), acts=False, plans=True),
    "BellmanDiffusion": Subject(BellmanDiffusion, {}),
    "DiffSR, preset small": Subject(partial(DiffSR.from_preset, "small"), {}),
}


def make(subject: Subject, variant: str, data: dict[str, Any]) -> Any:
    """
    :param subject: what is measured
    :param variant: key of ``VARIANTS``
    :param data: to learn from
    :return: a model that has made an update
    """
    arguments: dict[str, Any] = dict(dataset=data, seed=0, device="cpu", **subject.settings, **VARIANTS[variant])
    return subject.build(policy="MlpPolicy", env="Walker2d-v5", **arguments).learn(1, log_interval=None)


def flops_of(part: Callable[[], object]) -> int:
    """
    :param part: what is counted
    :return: floating-point operations of its matrix products, forward and backward
    """

    def addmm(_self: Sequence[int], left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={th.ops.aten.addmm_: addmm}) as counter:
        part()
    return int(counter.get_total_flops())


def parts_of(subject: Subject, model: Any, data: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """
    :param subject: what is measured
    :param model: of it
    :param data: of its observations
    :return: calls to time, by name
    """
    one, many = data["observations"][0], data["observations"][:64]
    parts: dict[str, Callable[[], object]] = {"update": lambda: model.train(gradient_steps=1)}
    if subject.acts:
        parts |= {"action, 1 observation": lambda: model.predict(one), "action, 64 observations": lambda: model.predict(many)}
    if subject.plans:
        parts["decision by 64 plans of 20 steps"] = lambda: model.predict(one)
    return parts


def measure(name: str, variant: str, data: dict[str, Any], repetitions: int) -> list[dict[str, Any]]:
    """
    :param name: key of ``SUBJECTS``
    :param variant: key of ``VARIANTS``
    :param data: to learn from
    :param repetitions: of each part
    :return: one row per part
    """
    subject = SUBJECTS[name]
    model = make(subject, variant, data)
    parts = parts_of(subject, model, data)
    left, right = th.randn(SIDE, SIDE), th.randn(SIDE, SIDE)
    milliseconds = median_milliseconds({PRODUCT: lambda: left @ right, **parts}, repetitions)
    unit = milliseconds.pop(PRODUCT)
    counted = parts_of(subject, make(subject, "eager", data), data)
    return [
        {
            "what": f"{name}: {part}",
            "variant": variant,
            "milliseconds": value,
            "units": value / unit,
            "flops": flops_of(counted[part]),
            "unit_milliseconds": unit,
        }
        for part, value in milliseconds.items()
    ]


def others(data: dict[str, Any], repetitions: int) -> list[dict[str, Any]]:
    """
    :param data: of the observations
    :param repetitions: of each part
    :return: rows of what the machine can do, of drawing batches, and of SB3's SAC
    """
    sac = SAC("MlpPolicy", "Walker2d-v5", buffer_size=1, seed=0, device="cpu")
    dtql = make(SUBJECTS["DTQL"], "eager", data)
    diffuser = make(SUBJECTS["Diffuser, planner alone"], "eager", data)
    one, many = data["observations"][0], data["observations"][:64]
    left, right = th.randn(SIDE, SIDE), th.randn(SIDE, SIDE)
    low, right_low = left.bfloat16(), right.bfloat16()
    rows, layer = th.randn(256, 256), th.randn(256, 256)
    memory, target = th.randn(2**24), th.empty(2**24)
    parts: dict[str, Callable[[], object]] = {
        PRODUCT: lambda: left @ right,
        "the same of bfloat16": lambda: low @ right_low,
        "product of a layer, 256 x 256 x 256": lambda: rows @ layer,
        "copy of 64 MiB": lambda: target.copy_(memory),
        "batch of 256 transitions": lambda: dtql.sample_batch(256),
        "batch of 32 windows of 32 steps": lambda: diffuser.sample_batch(32),
        "SB3's SAC: action, 1 observation": lambda: sac.predict(one),
        "SB3's SAC: action, 64 observations": lambda: sac.predict(many),
    }
    milliseconds = median_milliseconds(parts, repetitions)
    flops = {PRODUCT: UNIT_FLOPS, "the same of bfloat16": UNIT_FLOPS, "product of a layer, 256 x 256 x 256": 2 * 256**3}
    unit = milliseconds[PRODUCT]
    return [
        {
            "what": name,
            "variant": "",
            "milliseconds": value,
            "units": value / unit,
            "flops": flops.get(name),
            "unit_milliseconds": unit,
        }
        for name, value in milliseconds.items()
    ]


def show_profile(name: str, data: dict[str, Any], n: int = 20) -> None:
    """
    Print the operators of updates, slowest first.

    :param name: beginning of a key of ``SUBJECTS``
    :param data: to learn from
    :param n: updates
    """
    model = make(next(subject for key, subject in SUBJECTS.items() if key.startswith(name)), "eager", data)
    model.train(gradient_steps=5)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.train(gradient_steps=n)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure what is not measured, and write ``benchmarks/results/speed.json``.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--profile", metavar="NAME", help="show the operators of an update instead")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    data = random_data()
    if options.profile is not None:
        show_profile(options.profile, data)
        return
    folder = WORK / "speed" / f"{options.threads}_threads"
    wanted = [("", "others"), *((variant, name) for name in options.only for variant in options.variants)]
    for variant, name in wanted:
        file = folder / f"{name}-{variant}.json".replace(" ", "_").replace(",", "")
        if options.again or not file.is_file():
            rows = others(data, options.repetitions) if not variant else measure(name, variant, data, options.repetitions)
            write_json(file, rows)
            for row in rows:
                print(
                    row["what"], row["variant"], f"{row['milliseconds']:.3f} ms", f"{row['units']:.3f}", sep="\t", flush=True
                )
    names, variants = list(SUBJECTS), ["", *VARIANTS]
    rows = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text(encoding="utf-8"))]

    def place(row: dict[str, Any]) -> tuple[int, int]:
        name = row["what"].partition(":")[0]
        return names.index(name) if name in names else -1, variants.index(row["variant"])

    table: list[list[str | float | int | None]] = []
    for row in sorted(rows, key=place):
        flops, units = row["flops"], row["units"]
        share = None if flops is None else round(100.0 * flops / UNIT_FLOPS / units, 1)
        gflop = None if flops is None else round(flops / 1e9, 4)
        table.append([row["what"], row["variant"], round(row["milliseconds"], 3), round(units, 3), gflop, share])
    write_table(
        RESULTS / "speed.json",
        "Cost of updates, actions and plans",
        ["what", "variant", "milliseconds (median)", "matrix products", "GFLOP", "% of the product's speed"],
        table,
        text=(
            f"Networks of the published sizes unless a name says otherwise, {OBSERVATION_DIM} observation and {ACTION_DIM} "
            f"action dimensions, updates at batch 256 (Diffuser: 32 windows of 32 steps), {options.threads} threads. The unit "
            f"is one float32 product of {SIDE} x {SIDE} matrices, made in turn with what is measured. *GFLOP*: of the matrix "
            "products, forward and backward, counted by torch. *% of the product's speed*: these operations per second, in "
            "shares of those of the unit."
        ),
    )


if __name__ == "__main__":
    main()
