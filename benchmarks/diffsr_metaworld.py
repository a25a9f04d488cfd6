"""
DiffSR beside Stable-Baselines3's SAC on one task of Meta-World (arXiv 1910.10897), from states.

Meta-World pins an older MuJoCo and wants an environment of its own:

    python -m venv metaworld-env
    metaworld-env/bin/pip install -e ".[dev]" metaworld
    metaworld-env/bin/python benchmarks/diffsr_metaworld.py --task reach-v3 --steps 50000 --seeds 0

A run that was interrupted goes on where it stopped; finished runs are kept, so that the table grows.
"""

import argparse
import importlib
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from diffsr_online import LEARNING_STARTS, SETTINGS, Setting
from gymnasium.wrappers import TransformObservation
from harness import RESULTS, describe, run

N_EVALUATIONS, N_EVAL_EPISODES = 10, 10


def make_env(task: str) -> gym.Env:
    """
    :param task: name of a Meta-World task, such as ``"reach-v3"``
    :return: it, with goals that change from episode to episode and are shown, and observations in float32
    """
    env = gym.make("Meta-World/MT1", env_name=task, disable_env_checker=True)
    space: Any = env.observation_space
    shown = gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32)  # what is seen leaves the bounds that it states
    return TransformObservation(env, lambda observation: observation.astype(np.float32), shown)


def success_rate(model: Any, task: str, n_episodes: int) -> float:
    """
    :param model: trained model
    :param task: name of a task
    :param n_episodes: number of episodes
    :return: share of the episodes in which the task was solved at some step
    """
    env = make_env(task)
    solved = 0
    for episode in range(n_episodes):
        observation, _ = env.reset(seed=episode)
        success = ended = False
        while not ended and not success:
            action = model.predict(observation, deterministic=True)[0]
            observation, _, terminated, truncated, info = env.step(action)
            success = bool(info["success"])
            ended = terminated or truncated
        solved += success
    env.close()
    return solved / n_episodes


def learn(
    task: str, setting: Setting, seed: int, steps: int, n_evaluations: int, n_eval_episodes: int
) -> dict[str, Any] | None:
    """
    One run, or what is left of it.

    :param task: name of a task
    :param setting: what learns
    :param seed: seed of the run
    :param steps: env steps
    :param n_evaluations: at equal distances
    :param n_eval_episodes: episodes of each
    :return: its record
    """
    result_file = RESULTS / f"diffsr_metaworld_{task.replace('-', '_')}.json"
    describe(
        result_file,
        f"DiffSR online: Meta-World {task}",
        f"{steps:,} env steps from states, the first {LEARNING_STARTS:,} at random, one update after each of the others; "
        f"{n_evaluations} evaluations of {n_eval_episodes} episodes each, deterministic actions. DiffSR has its small preset, "
        "SAC is SB3's with its defaults.",
    )
    return run(
        setting.name,
        seed,
        lambda: setting.make(make_env(task), learning_starts=LEARNING_STARTS, seed=seed, device="cpu"),
        lambda path: setting.cls.load(path, env=make_env(task), device="cpu"),
        steps,
        lambda: make_env(task),
        result_file,
        n_evaluations=n_evaluations,
        n_eval_episodes=n_eval_episodes,
        replay_buffer=True,
        about=lambda model: {"success_rate": success_rate(model, task, n_eval_episodes)},
    )


def main(arguments: list[str] | None = None) -> None:
    """
    Run what the command line asks for.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="reach-v3")
    parser.add_argument("--algos", nargs="+", choices=list(SETTINGS), default=["diffsr-sac", "sac"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--evaluations", type=int, default=N_EVALUATIONS)
    parser.add_argument("--episodes", type=int, default=N_EVAL_EPISODES, help="of each evaluation")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    try:
        importlib.import_module("metaworld")  # registers its tasks
    except ImportError as error:
        raise ImportError("Meta-World is missing: make its environment as the docstring of this script says.") from error
    th.set_num_threads(options.threads)
    for seed in options.seeds:
        for algo in options.algos:
            record = learn(options.task, SETTINGS[algo], seed, options.steps, options.evaluations, options.episodes)
            assert record is not None
            print(f"{record['name']}, seed {seed}: success {record['success_rate']:.0%}", flush=True)


if __name__ == "__main__":
    main()
