"""
DTQL on real data: offline on two Hopper datasets, offline to online on Hopper-v5, online alone on Pendulum-v1.

Run from the root of the repository, for instance

    python benchmarks/dtql.py hopper-medium --seeds 0 1 2
    python benchmarks/dtql.py hopper-medium --preset hopper-medium   # the published settings instead of the defaults
    python benchmarks/dtql.py fine-tune --seeds 0                    # goes on from the checkpoint of hopper-medium
    python benchmarks/dtql.py pendulum

A run that was interrupted goes on where it stopped; finished runs are kept, so that the table grows.
"""

import argparse
from pathlib import Path
from typing import Any

import torch as th
from harness import RESULTS, WORK, describe, run

from sb3_diffusion import DTQL, load_dataset

DATASETS = {"hopper-medium": "bench/hopper/medium-v0", "hopper-medium-expert": "hopper-medium-expert-v2"}
OFFLINE_STEPS = 50_000
FINE_TUNING_STEPS = 20_000
PENDULUM_STEPS = 30_000
# Small networks for a small task; online, an average over fewer updates follows the policy more closely
PENDULUM_SETTINGS: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[64, 64]), ema_decay=0.99)
PROTOCOL = "10 evaluations of 10 episodes each, deterministic actions"


def run_name(preset: str | None) -> str:
    """
    :param preset: name of a preset or None
    :return: name of the line in the table
    """
    return "DTQL" if preset is None else f"DTQL, preset {preset}"


def offline(task: str, seed: int, steps: int, preset: str | None) -> None:
    """
    Learn from a dataset alone.

    :param task: key of ``DATASETS``
    :param seed: seed of the run
    :param steps: gradient steps
    :param preset: name of a preset, in the place of the defaults
    """
    dataset = load_dataset(DATASETS[task])
    result_file = RESULTS / f"dtql_{task.replace('-', '_')}.json"
    describe(result_file, f"Offline: {dataset.name}", f"{steps:,} gradient steps; {PROTOCOL}.")

    def make() -> DTQL:
        if preset is not None:
            return DTQL.from_preset(preset, "Hopper-v5", dataset=dataset, seed=seed)
        return DTQL("MlpPolicy", "Hopper-v5", dataset=dataset, seed=seed)

    run(
        run_name(preset),
        seed,
        make,
        lambda path: DTQL.load(path, env="Hopper-v5", dataset=dataset),
        steps,
        "Hopper-v5",
        result_file,
        dataset=dataset,
    )


def fine_tune(seed: int, steps: int, preset: str | None) -> None:
    """
    Go on online from the last checkpoint of ``hopper-medium``.

    :param seed: seed of the offline run
    :param steps: env steps
    :param preset: of the offline run
    """
    dataset = load_dataset(DATASETS["hopper-medium"])
    result_file = RESULTS / "dtql_fine_tune.json"
    text = f"{OFFLINE_STEPS:,} gradient steps on {dataset.name} before, then {steps:,} env steps on Hopper-v5; {PROTOCOL}."
    describe(result_file, "Offline to online: Hopper-v5", text)
    name = run_name(preset)

    def load(path: Path) -> DTQL:
        return DTQL.load(path, env="Hopper-v5", dataset=dataset)

    def start() -> DTQL:
        folder = f"{name}-seed{seed}".replace(" ", "_")
        return load(WORK / "dtql_hopper_medium" / folder / "checkpoint.zip")

    run(
        name,
        seed,
        start,
        load,
        steps,
        "Hopper-v5",
        result_file,
        dataset=dataset,
        evaluate_first=True,
        replay_buffer=True,
        learn_kwargs=dict(offline=False),
    )


def pendulum(seed: int, steps: int) -> None:
    """
    Learn online alone.

    :param seed: seed of the run
    :param steps: env steps
    """
    result_file = RESULTS / "dtql_pendulum.json"
    describe(result_file, "Online: Pendulum-v1", f"{steps:,} env steps, one update each; two hidden layers of 64; {PROTOCOL}.")
    run(
        "DTQL",
        seed,
        lambda: DTQL("MlpPolicy", "Pendulum-v1", seed=seed, **PENDULUM_SETTINGS),
        lambda path: DTQL.load(path, env="Pendulum-v1"),
        steps,
        "Pendulum-v1",
        result_file,
        replay_buffer=True,
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*DATASETS, "fine-tune", "pendulum"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="in the place of the protocol's")
    parser.add_argument("--preset", help="name of a preset, in the place of the defaults")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    th.set_num_threads(arguments.threads)
    for seed in arguments.seeds:
        if arguments.task == "fine-tune":
            fine_tune(seed, arguments.steps or FINE_TUNING_STEPS, arguments.preset)
        elif arguments.task == "pendulum":
            pendulum(seed, arguments.steps or PENDULUM_STEPS)
        else:
            offline(arguments.task, seed, arguments.steps or OFFLINE_STEPS, arguments.preset)


if __name__ == "__main__":
    main()
