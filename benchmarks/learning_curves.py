"""
The algorithms and baselines on real data: offline on Hopper and Walker2d, offline to online on Hopper-v5, online alone on
Pendulum-v1.

Run from the root of the repository, for instance

    python benchmarks/learning_curves.py hopper-medium --algo dtql --seeds 0 1 2
    python benchmarks/learning_curves.py hopper-medium --algo dtql --preset hopper-medium   # the published settings
    python benchmarks/learning_curves.py hopper-medium --algo dtql --set n_steps=5 expectile=0.9
    python benchmarks/learning_curves.py hopper-medium --algo td3_bc --seeds 0 1 2   # a baseline; the other one is bc
    python benchmarks/learning_curves.py fine-tune --algo dtql      # goes on from the checkpoint of hopper-medium
    python benchmarks/learning_curves.py pendulum --algo diffusion_ql

A run that was interrupted goes on where it stopped; finished runs are kept, so that the table grows.
"""

import argparse
import ast
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from baselines import TD3BC, BehaviorCloning, TD3BCPolicy
from harness import RESULTS, WORK, describe, run

from sb3_diffusion import ALGORITHMS, OfflineAlgorithm, load_dataset

DATASETS = {
    "hopper-medium": ("bench/hopper/medium-v0", "Hopper-v5", "hopper_medium"),
    "hopper-medium-expert": ("hopper-medium-expert-v2", "Hopper-v5", "hopper_medium_expert"),
    "walker2d-expert": ("bench/walker2d/expert-v0", "Walker2d-v5", "walker2d_expert_offline"),
}
"""Data, environment and results of each offline task."""
CLASSES: dict[str, type[OfflineAlgorithm]] = {**ALGORITHMS, "td3_bc": TD3BC, "bc": BehaviorCloning}
OFFLINE_STEPS = 50_000
FINE_TUNING_STEPS = 20_000
PENDULUM_STEPS = 30_000
PROTOCOL = "10 evaluations of 10 episodes each, deterministic actions"
PENDULUM_SETTINGS: dict[str, dict[str, Any]] = {
    # Small networks for a small task; online, an average over fewer updates follows the policy more closely
    "dtql": dict(policy_kwargs=dict(net_arch=[64, 64]), ema_decay=0.99),
    "diffusion_ql": dict(policy_kwargs=dict(net_arch=[64, 64])),
}


class Setting:
    """
    What is run: an algorithm with its defaults, or with the settings of a preset.

    :param algo: key of ``CLASSES``
    :param preset: name of a preset, in the place of the defaults
    :param changes: constructor arguments that win over both, as ``name=literal``
    """

    def __init__(self, algo: str, preset: str | None, changes: list[str]) -> None:
        self.algo, self.preset = algo, preset
        self.cls = CLASSES[algo]
        pairs = [change.split("=", maxsplit=1) for change in changes]
        self.changes = {name: ast.literal_eval(value) for name, value in pairs}
        words = [self.cls.__name__, *([] if preset is None else [f"preset {preset}"]), *changes]
        self.name = ", ".join(words)

    def make(self, env: str, **kwargs: Any) -> OfflineAlgorithm:
        """
        :param env: id of the environment
        :param kwargs: further constructor arguments
        :return: a new model
        """
        kwargs = {**kwargs, **self.changes}
        if self.preset is not None:
            return self.cls.from_preset(self.preset, env, **kwargs)
        return self.cls("MlpPolicy", env, **kwargs)  # type: ignore[call-arg]

    def load(self, path: Path, **kwargs: Any) -> OfflineAlgorithm:
        """
        :param path: of a checkpoint
        :param kwargs: further arguments of ``load``
        :return: the model
        """
        if issubclass(self.cls, TD3BC):  # a file brings no code of its own
            kwargs["custom_objects"] = {"policy_class": TD3BCPolicy}
        return self.cls.load(path, **kwargs)


def actions_per_second(model: OfflineAlgorithm, n: int = 300) -> float:
    """
    :param model: trained model
    :param n: actions to time, one observation each
    :return: actions per second, from the median time
    """
    model.observation_space.seed(0)
    observation = np.nan_to_num(model.observation_space.sample())
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        model.predict(observation, deterministic=True)
        seconds.append(time.perf_counter() - start)
    return round(1.0 / float(np.median(seconds)), 1)


def offline(task: str, setting: Setting, seed: int, steps: int) -> None:
    """
    Learn from a dataset alone.

    :param task: key of ``DATASETS``
    :param setting: what is run
    :param seed: seed of the run
    :param steps: gradient steps
    """
    name, env_id, results = DATASETS[task]
    dataset = load_dataset(name)
    result_file = RESULTS / f"{results}.json"
    describe(result_file, f"Offline: {dataset.name}", f"{steps:,} gradient steps; {PROTOCOL}.")
    run(
        setting.name,
        seed,
        lambda: setting.make(env_id, dataset=dataset, seed=seed),
        lambda path: setting.load(path, env=env_id, dataset=dataset),
        steps,
        env_id,
        result_file,
        dataset=dataset,
        about=lambda model: {"actions_per_second": actions_per_second(model)},
    )


def fine_tune(setting: Setting, seed: int, steps: int) -> None:
    """
    Go on online from the last checkpoint of ``hopper-medium``.

    :param setting: what is run
    :param seed: seed of the offline run
    :param steps: env steps
    """
    dataset = load_dataset(DATASETS["hopper-medium"][0])
    result_file = RESULTS / "fine_tune.json"
    text = f"{OFFLINE_STEPS:,} gradient steps on {dataset.name} before, then {steps:,} env steps on Hopper-v5; {PROTOCOL}."
    describe(result_file, "Offline to online: Hopper-v5", text)

    def load(path: Path) -> OfflineAlgorithm:
        return setting.load(path, env="Hopper-v5", dataset=dataset)

    def start() -> OfflineAlgorithm:
        folder = f"{setting.name}-seed{seed}".replace(" ", "_")
        model = load(WORK / "hopper_medium" / folder / "checkpoint.zip")
        model.num_timesteps = 0  # a phase of its own: schedules of the learning rate begin anew
        return model

    run(
        setting.name,
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


def pendulum(setting: Setting, seed: int, steps: int) -> None:
    """
    Learn online alone.

    :param setting: what is run
    :param seed: seed of the run
    :param steps: env steps
    """
    result_file = RESULTS / "pendulum.json"
    describe(result_file, "Online: Pendulum-v1", f"{steps:,} env steps, one update each; two hidden layers of 64; {PROTOCOL}.")
    run(
        setting.name,
        seed,
        lambda: setting.make("Pendulum-v1", seed=seed, **PENDULUM_SETTINGS[setting.algo]),
        lambda path: setting.load(path, env="Pendulum-v1"),
        steps,
        "Pendulum-v1",
        result_file,
        replay_buffer=True,
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*DATASETS, "fine-tune", "pendulum"])
    parser.add_argument("--algo", choices=list(CLASSES), default="dtql")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="in the place of the protocol's")
    parser.add_argument("--preset", help="name of a preset, in the place of the defaults")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="constructor arguments")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    if arguments.task == "pendulum" and arguments.algo not in PENDULUM_SETTINGS:
        parser.error(f"pendulum has settings for {', '.join(PENDULUM_SETTINGS)}: got {arguments.algo}")
    th.set_num_threads(arguments.threads)
    setting = Setting(arguments.algo, arguments.preset, arguments.set)
    for seed in arguments.seeds:
        if arguments.task == "fine-tune":
            fine_tune(setting, seed, arguments.steps or FINE_TUNING_STEPS)
        elif arguments.task == "pendulum":
            pendulum(setting, seed, arguments.steps or PENDULUM_STEPS)
        else:
            offline(arguments.task, setting, seed, arguments.steps or OFFLINE_STEPS)


if __name__ == "__main__":
    main()
