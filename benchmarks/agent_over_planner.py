"""
SAC over a planner: it corrects planned actions, and is charged for leaving the plan. Does it fall less?

    python benchmarks/diffuser_walker2d.py       # trains the planner
    python benchmarks/agent_over_planner.py

The planner executes whole windows, which is where plans go wrong. Rows that were measured are kept in ``benchmarks/work``.
"""

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
import torch as th
from diffuser_walker2d import DATA, ENV_ID, measure
from harness import RESULTS, WORK, write_json, write_table
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecMonitor

from sb3_diffusion import Diffuser, OfflineDataset, VecPlanningWrapper, load_dataset
from sb3_diffusion.evaluation import EvaluationResult

RESIDUAL_SCALE = 0.2
N_ENVS = 8


def follow(
    agent: SAC | None, planner: Diffuser, n_action_steps: int, n_episodes: int, seed: int
) -> tuple[EvaluationResult, float]:
    """
    Play whole episodes, one in each env.

    :param agent: over the planner; None leaves plans as they are
    :param planner: trained model
    :param n_action_steps: executed per plan
    :param n_episodes: number of envs
    :param seed: of envs and plans
    :return: returns and lengths, and the mean deviation from the plan
    """
    venv = VecPlanningWrapper(
        make_vec_env(ENV_ID, n_episodes, seed), planner, n_action_steps, mode="residual", residual_scale=RESIDUAL_SCALE
    )
    venv.seed(seed)
    observations, actions = venv.reset(), np.zeros((n_episodes, *venv.action_space.shape))  # type: ignore[misc]
    returns, lengths, alive, deviations = np.zeros(n_episodes), np.zeros(n_episodes), np.ones(n_episodes, dtype=bool), []
    while alive.any():
        assert isinstance(observations, np.ndarray)
        if agent is not None:
            actions, _ = agent.predict(observations, deterministic=True)
        observations, rewards, dones, infos = venv.step(actions)
        returns += alive * rewards
        lengths += alive
        deviations.append(np.mean([info["plan_deviation"] for i, info in enumerate(infos) if alive[i]]))
        alive &= ~dones
    venv.close()
    return EvaluationResult(returns, lengths), float(np.mean(deviations))


def train(planner: Diffuser, n_action_steps: int, deviation_coef: float, steps: int, seed: int) -> SAC:
    """
    :param planner: trained model
    :param n_action_steps: executed per plan
    :param deviation_coef: what a unit of deviation costs
    :param steps: env steps
    :param seed: of the run
    :return: agent that corrects the plans
    """
    venv = make_vec_env(ENV_ID, N_ENVS, seed)
    over = VecPlanningWrapper(
        venv, planner, n_action_steps, mode="residual", residual_scale=RESIDUAL_SCALE, deviation_coef=deviation_coef
    )
    agent = SAC("MlpPolicy", VecMonitor(over), gradient_steps=-1, learning_starts=2_000, seed=seed, device="cpu")
    return agent.learn(steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train and measure what is not there yet, then write the table.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="Diffuser,_horizon_8-seed0", help="folder of the planner below walker2d_expert")
    parser.add_argument("--executed", type=int, default=8, help="actions per plan")
    parser.add_argument("--deviation-coefs", type=float, nargs="+", default=[0.0, 0.1, 0.5])
    parser.add_argument("--steps", type=int, default=30_000, help="env steps of the agent")
    parser.add_argument("--episodes", type=int, default=50, help="of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    dataset: OfflineDataset = load_dataset(DATA)
    planner = Diffuser.load(WORK / "walker2d_expert" / options.run / "checkpoint.zip", device="cpu")
    planner.set_planning(guidance_scale=0.0, n_candidates=1)
    rows: list[list[str | float | int | None]] = []
    for coef in (None, *options.deviation_coefs):
        name = f"{options.executed}-{coef}-{options.steps}-{options.episodes}-seed{options.seed}"
        file = WORK / "agent_over_planner" / options.run / f"{name}.json"
        if not file.is_file():
            start = time.perf_counter()
            planner.set_random_seed(options.seed)
            agent = None if coef is None else train(planner, options.executed, coef, options.steps, options.seed)
            seconds = time.perf_counter() - start
            result, deviation = follow(agent, planner, options.executed, options.episodes, 1_000 + options.seed)
            write_json(file, {**measure(result, dataset), "deviation": deviation, "seconds": seconds, **result.to_dict()})
        numbers = json.loads(file.read_text(encoding="utf-8"))
        rows.append(
            [
                "the planner alone" if coef is None else "SAC over it",
                coef,
                f"{numbers['return']:.0f} [{numbers['low']:.0f}, {numbers['high']:.0f}]",
                f"{100 * numbers['fall_rate']:.0f} %",
                numbers["value_rate"],
                numbers["deviation"],
                None if coef is None else numbers["seconds"],
            ]
        )
        print(*rows[-1], sep="\t", flush=True)
    write_table(
        RESULTS / "agent_over_planner.json",
        "SAC over a planner",
        ["who acts", "`deviation_coef`", "return", "falls", "value rate", "mean deviation", "seconds of training"],
        rows,
        text=(
            f"{ENV_ID}, a Diffuser trained on {dataset.name} (`{options.run}`) that executes {options.executed} actions of "
            f"each plan, unguided, one plan per decision; SB3's SAC with its defaults adds up to {RESIDUAL_SCALE} to each "
            f"planned action, {options.steps:,} env steps in {N_ENVS} envs, one run each. {options.episodes} episodes a row, "
            "without the charge, deterministic corrections; the mean with its 95 % bootstrap interval over episodes. *Falls*: "
            "episodes that ended before 1,000 steps. *Deviation*: distance of the state acted in from the planned one."
        ),
    )


if __name__ == "__main__":
    main()
