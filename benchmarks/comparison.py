"""
All methods and baselines on the same data, at one budget that a CPU can pay.

    python benchmarks/comparison.py                                          # every cell not finished in `benchmarks/work`
    python benchmarks/comparison.py walker2d-expert --methods DTQL TD3BC --seeds 0    # single cells

Each method has one setting for all data, but for what ``CHANGES`` holds. A run that was interrupted goes on where it stopped;
finished runs are kept, so that the tables grow.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch as th
from diffuser_maze import SETTINGS as MAZE_PLANNER
from harness import RESULTS, describe, run
from learning_curves import CLASSES, actions_per_second
from stable_baselines3.common.utils import LinearSchedule

from sb3_diffusion import OfflineAlgorithm, OfflineDataset, load_dataset
from sb3_diffusion.common.utils import policy_alias
from sb3_diffusion.datasets import make_dataset_env

TASKS = {
    "hopper-medium-expert": ("hopper-medium-expert-v2", "Hopper-v5"),
    "walker2d-expert": ("bench/walker2d/expert-v0", "Walker2d-v5"),
    "pointmaze-umaze": ("bench/pointmaze/umaze-v0", None),
    "hopper-medium": ("bench/hopper/medium-v0", "Hopper-v5"),
}
"""Data of each task, and its environment where the data does not know better."""
N_UPDATES, N_EVALUATIONS, N_EPISODES = 20_000, 5, 10


class Method(NamedTuple):
    """
    A line of the tables.

    :ivar algo: key of ``CLASSES``
    :ivar preset: name of a preset, in the place of the defaults
    :ivar settings: constructor arguments that win over both
    """

    algo: str
    preset: str | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012  never changed


# As many updates with a learning rate above 0 as the presets have in their 50,000
RATES_THAT_END: dict[str, Any] = dict(learning_rate=LinearSchedule(3e-4, 0.0, 1.0))
DIFFUSION_QL: dict[str, Any] = dict(learning_rate=LinearSchedule(3e-4, 0.0, 0.625))
METHODS = {
    "BehaviorCloning": Method("bc"),
    "BehaviorCloning, rates that end": Method("bc", None, RATES_THAT_END),
    "TD3BC": Method("td3_bc"),
    "TD3BC, rates that end": Method("td3_bc", None, RATES_THAT_END),
    "DTQL": Method("dtql", "locomotion", RATES_THAT_END),
    "DiffusionQL": Method("diffusion_ql", "locomotion", DIFFUSION_QL),
    "DiffusionQL, 2 sampling steps": Method("diffusion_ql", "locomotion", dict(DIFFUSION_QL, n_sampling_steps=2)),
    "DiffSR": Method("diffsr", "small"),
    "DiffSR, rates that end": Method("diffsr", "locomotion"),
    "BellmanDiffusion": Method("bellman_diffusion", "locomotion", RATES_THAT_END),
    "BellmanDiffusion, temperature 0.3": Method("bellman_diffusion", "locomotion", dict(RATES_THAT_END, temperature=0.3)),
    "BellmanDiffusion, temperature 1": Method("bellman_diffusion", "locomotion", dict(RATES_THAT_END, temperature=1.0)),
    "Diffuser": Method(
        "diffuser",
        None,
        dict(
            horizon=8,
            learning_rate=4e-4,
            sampler="ddim",
            n_sampling_steps=2,
            n_candidates=1,
            guidance_scale=0.0,
            train_value=False,
            policy_kwargs=dict(net_kwargs=dict(multipliers=[1, 2, 4])),
        ),
    ),
}
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    # Four times that of hopper-medium, as in the authors' settings (`PRESETS` of DTQL)
    ("hopper-medium-expert", "DTQL"): dict(trust_region_coef=4.0),
    ("pointmaze-umaze", "Diffuser"): dict(
        MAZE_PLANNER, horizon=128, n_action_steps=127, sampler="ddpm", n_sampling_steps=None
    ),
}
TEXT = (
    f"{N_UPDATES:,} gradient steps, {N_EVALUATIONS} evaluations of {N_EPISODES} episodes each, deterministic actions. Each "
    "method has one setting for all data (`benchmarks/comparison.py`), and some have a second one for comparison. DTQL, "
    "DiffusionQL, BellmanDiffusion and DiffSR (*rates that end*) have their presets `locomotion`, with learning rates that "
    "fall to 0 over 20,000 updates (DiffusionQL 12,500); rows of BellmanDiffusion with a *temperature* differ in it from the "
    "preset, which has 3. DiffSR without that addition is the preset `small`, with constant rates. Cloning and TD3+BC "
    "have constant rates, as published (with *rates that end*, falling ones). Diffuser has a constant rate, a U-Net of "
    "three levels, horizon 8, no guidance, and makes a new plan of two DDIM steps for every action. Published runs "
    "take 1,000,000 updates or more. Steps / s and times come from machines of several kinds that did other work too, and "
    "from runs with and without `--compile`: the tables on speed are the ones to quote."
)
MORE: dict[str, str] = {
    "hopper-medium-expert": (
        " DTQL's trust region weighs 4 here instead of 1: the published settings differ by that factor from Hopper medium's."
    ),
    "pointmaze-umaze": (
        " Returns are goals reached in 1,000 steps. Diffuser is given the goal, plans 128 steps by the whole chain, and "
        "follows each plan to its end by PD control; its actions / s are plans / s, and it needs one plan in 127 steps."
    ),
}


def make(task: str, name: str, dataset: OfflineDataset, seed: int, compiled: bool = False) -> OfflineAlgorithm:
    """
    :param task: key of ``TASKS``
    :param name: key of ``METHODS``
    :param dataset: to learn from
    :param seed: of the run
    :param compiled: use ``torch.compile``: other rounding, sooner at the end
    :return: a new model
    """
    algo, preset, settings = METHODS[name]
    cls = CLASSES[algo]
    published = {} if preset is None else dict(cls.preset(preset))
    published.pop("default_total_timesteps", None)
    settings = {**published, **settings, **CHANGES.get((task, name), {})}
    alias = policy_alias(dataset.observation_space)
    return cls(alias, TASKS[task][1], dataset=dataset, seed=seed, device="cpu", compile=compiled, **settings)  # type: ignore[arg-type]


def compare(task: str, name: str, seed: int, compiled: bool = False) -> None:
    """
    Fill one cell, with one seed.

    :param task: key of ``TASKS``
    :param name: key of ``METHODS``
    :param seed: of the run
    :param compiled: see `make`
    """
    cls, (source, env_id) = CLASSES[METHODS[name].algo], TASKS[task]
    dataset = load_dataset(source)
    result_file = RESULTS / f"comparison_{task.replace('-', '_')}.json"
    describe(result_file, f"All methods: {dataset.name}", TEXT + MORE.get(task, ""))

    def make_eval_env() -> gym.Env:
        return make_dataset_env(dataset)

    def load(path: Path) -> OfflineAlgorithm:
        policy_class = cls.policy_aliases[policy_alias(dataset.observation_space)]  # a file brings no code of its own
        return cls.load(
            path, env=env_id, dataset=dataset, device="cpu", compile=compiled, custom_objects={"policy_class": policy_class}
        )

    run(
        name,
        seed,
        lambda: make(task, name, dataset, seed, compiled),
        load,
        N_UPDATES,
        env_id or make_eval_env,
        result_file,
        n_evaluations=N_EVALUATIONS,
        n_eval_episodes=N_EPISODES,
        dataset=dataset,
        about=lambda model: {"actions_per_second": actions_per_second(model)},
    )


def make_parser(description: str | None, tasks: list[str]) -> argparse.ArgumentParser:
    """
    :param description: of the script
    :param tasks: keys of ``TASKS`` to choose from, all by default
    :return: parser of ``tasks``, ``--seeds``, ``--threads`` and ``--compile``
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=tasks, default=tasks, metavar="task", help=", ".join(tasks))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: pays for runs of ten minutes and more")
    return parser


def main() -> None:
    """Fill the cells that the command line asks for."""
    parser = make_parser(__doc__, list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    for seed in options.seeds:
        for task in options.tasks:
            for name in options.methods:
                compare(task, name, seed, options.compile)


if __name__ == "__main__":
    main()
