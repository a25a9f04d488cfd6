"""
DiffSR beside Stable-Baselines3's TD3 and SAC, online: same tasks, same seeds, same number of env steps.

    python benchmarks/diffsr_online.py pendulum --algos diffsr td3 sac --seeds 0 1 2
    python benchmarks/diffsr_online.py masked-hopper --algos diffsr-sac sac   # velocities hidden, a history of 3
    python benchmarks/diffsr_online.py half-cheetah --algos diffsr diffsr-frozen   # random features that never learn
    python benchmarks/diffsr_online.py hopper --algos diffsr --set feature_dim=128

DiffSR has its preset for a CPU. TD3 and SAC have SB3's defaults; TD3 explores with noise 0.1, without which it would not at
all. A run that was interrupted goes on where it stopped; finished runs are kept, so that the table grows.
"""

import argparse
import ast
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from harness import RESULTS, describe, run
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from sb3_diffusion import DiffSR
from sb3_diffusion.wrappers import VelocityMask

LEARNING_STARTS = 1_000
N_HISTORY = 3
N_EVAL_EPISODES = 10


class Task(NamedTuple):
    """
    What is learned.

    :ivar env_id: id of the environment
    :ivar steps: env steps of a run
    :ivar masked: velocities are hidden, and a history of observations is shown
    """

    env_id: str
    steps: int
    masked: bool = False

    def make_env(self, n_envs: int = 1) -> VecEnv:
        """
        :param n_envs: number of environments
        :return: environments to learn or to be evaluated in
        """
        if not self.masked:
            return make_vec_env(self.env_id, n_envs)
        envs = make_vec_env(lambda: VelocityMask(gym.make(self.env_id)), n_envs)
        return VecFrameStack(envs, N_HISTORY)


TASKS = {
    "pendulum": Task("Pendulum-v1", 20_000),
    "double-pendulum": Task("InvertedDoublePendulum-v5", 30_000),
    "hopper": Task("Hopper-v5", 50_000),
    "half-cheetah": Task("HalfCheetah-v5", 50_000),
    "masked-hopper": Task("Hopper-v5", 50_000, masked=True),
}


class Setting(NamedTuple):
    """
    An algorithm with its arguments.

    :ivar name: its line in the table
    :ivar cls: its class
    :ivar make: makes a model from an environment and further constructor arguments
    """

    name: str
    cls: type[Any]
    make: Callable[..., Any]


def diffsr(name: str, **settings: Any) -> Setting:
    """
    :param name: line in the table
    :param settings: constructor arguments beside the preset's
    :return: DiffSR with small networks
    """
    return Setting(name, DiffSR, lambda env, **kwargs: DiffSR.from_preset("small", env, **{**settings, **kwargs}))


def make_td3(env: VecEnv, **kwargs: Any) -> TD3:
    """
    :param env: environment to learn in
    :param kwargs: constructor arguments
    :return: SB3's TD3 that explores
    """
    assert env.action_space.shape is not None
    noise = NormalActionNoise(np.zeros(env.action_space.shape), np.full(env.action_space.shape, 0.1))
    return TD3("MlpPolicy", env, **{"action_noise": noise, **kwargs})


SETTINGS = {
    "diffsr": diffsr("DiffSR (TD3)"),
    "diffsr-sac": diffsr("DiffSR (SAC)", actor_type="sac"),
    "diffsr-frozen": diffsr("DiffSR (TD3), features frozen", feature_learning_rate=0.0),
    "td3": Setting("SB3's TD3", TD3, make_td3),
    "sac": Setting("SB3's SAC", SAC, lambda env, **kwargs: SAC("MlpPolicy", env, **kwargs)),
}


def learn(
    task_name: str,
    setting: Setting,
    seed: int,
    steps: int | None = None,
    changes: dict[str, Any] | None = None,
    n_evaluations: int = 10,
) -> dict[str, Any] | None:
    """
    One run, or what is left of it.

    :param task_name: key of ``TASKS``
    :param setting: what learns
    :param seed: seed of the run
    :param steps: env steps, in the place of the task's
    :param changes: constructor arguments that win over the setting's; they stand in the name
    :param n_evaluations: at equal distances
    :return: its record
    """
    task, changes = TASKS[task_name], changes or {}
    result_file = RESULTS / f"diffsr_{task_name.replace('-', '_')}.json"
    shown = f", of which an agent sees positions, the last {N_HISTORY}" if task.masked else ""
    describe(
        result_file,
        f"DiffSR online: {task.env_id}{' without velocities' if task.masked else ''}",
        f"{steps or task.steps:,} env steps{shown}, the first {LEARNING_STARTS:,} at random, one update after each of the "
        f"others; {n_evaluations} evaluations of {N_EVAL_EPISODES} episodes each, deterministic actions. DiffSR has its small "
        "preset, TD3 and SAC are SB3's with their defaults (TD3 with exploration noise 0.1).",
    )
    arguments: dict[str, Any] = dict(learning_starts=LEARNING_STARTS, seed=seed, device="cpu", **changes)
    if task.masked and setting.cls is DiffSR:
        arguments["n_stack"] = N_HISTORY
    return run(
        ", ".join([setting.name, *(f"{name}={value}" for name, value in changes.items())]),
        seed,
        lambda: setting.make(task.make_env(), **arguments),
        lambda path: setting.cls.load(path, env=task.make_env(), device="cpu"),
        steps or task.steps,
        task.make_env(N_EVAL_EPISODES),
        result_file,
        n_evaluations=n_evaluations,
        n_eval_episodes=N_EVAL_EPISODES,
        replay_buffer=True,
    )


def main(arguments: list[str] | None = None) -> None:
    """
    Run what the command line asks for.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--algos", nargs="+", choices=list(SETTINGS), default=["diffsr", "td3", "sac"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="in the place of the task's")
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="constructor arguments")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    pairs = [change.split("=", maxsplit=1) for change in options.set]
    changes = {name: ast.literal_eval(value) for name, value in pairs}
    for seed in options.seeds:
        for algo in options.algos:
            learn(options.task, SETTINGS[algo], seed, options.steps, changes, options.evaluations)


if __name__ == "__main__":
    main()
