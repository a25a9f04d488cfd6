"""
Diffuser in a maze: plans that end at a goal, tracked by feedback control or followed by their own actions.

    python benchmarks/diffuser_maze.py

The goal moves when it is reached, and the next plan is made then. A plan ends at its goal in its last row and is followed to
the end: planning anew on the way would postpone the arrival each time. Training goes on where it was stopped.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from harness import RESULTS, ROOT, WORK, describe, run, write_table
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_diffusion import Diffuser, OfflineDataset, PDTracker, VecPlanningWrapper, load_dataset
from sb3_diffusion.evaluation import bootstrap_interval

DATA = "bench/pointmaze/umaze-v0"
DATA_STEPS, EPISODE_STEPS = 1_000, 300
TRACKERS: dict[str, PDTracker | None] = {
    "PD tracking": PDTracker(),
    "PD tracking, kp 10": PDTracker(kp=10.0),
    "planned actions": None,
}
SETTINGS: dict[str, Any] = dict(
    learning_rate=4e-4,
    batch_size=32,
    n_diffusion_steps=64,
    goal_conditioned=True,
    normalization="limits",
    clip_denoised=1.0,
    padding=None,
    action_weight=1.0,
    tracker=TRACKERS["PD tracking"],
    policy_kwargs=dict(net_kwargs=dict(base_width=16, multipliers=[1, 2, 4])),
)
"""Those of the preset ``maze2d-umaze``, but for a network and a batch that one core trains in minutes."""
N_DRAWN = 5
"""Episodes in the picture."""
Act = Callable[[Any], np.ndarray]


def make_maze(dataset: OfflineDataset, n_steps: int) -> gym.Env:
    """
    :param dataset: whose env it is
    :param n_steps: of an episode
    :return: env in which a goal that is reached moves
    """
    assert dataset.env_spec is not None
    return gym.make(dataset.env_spec, max_episode_steps=n_steps)


def walls_hit(paths: np.ndarray, maze: Any, n_between: int = 4) -> np.ndarray:
    """
    :param paths: ``(n, n_steps, 2)``
    :param maze: of the env
    :param n_between: points per segment that are looked at
    :return: which paths enter a wall or leave the maze, ``(n,)``
    """
    shares = np.arange(n_between) / n_between
    points = paths[:, :-1, None] + shares[:, None] * np.diff(paths, axis=1)[:, :, None]
    x, y = points.reshape(len(paths), -1, 2).transpose(2, 0, 1)
    walls = np.array(maze.maze_map) == 1
    rows = np.floor((maze.y_map_center - y) / maze.maze_size_scaling).astype(int).clip(0, walls.shape[0] - 1)
    columns = np.floor((x + maze.x_map_center) / maze.maze_size_scaling).astype(int).clip(0, walls.shape[1] - 1)
    return walls[rows, columns].any(axis=1)


def reach_goals(env: VecEnv, act: Act, n_steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    :param env: of mazes, one episode each
    :param act: makes actions from observations
    :param n_steps: of an episode
    :return: goals reached in each env, and the observations at which there was a new goal
    """
    observations = env.reset()
    assert isinstance(observations, dict)
    n_goals, fresh, asked = np.zeros(env.num_envs), np.ones(env.num_envs, dtype=bool), []
    for _ in range(n_steps):
        asked.append({key: value[fresh] for key, value in observations.items()})
        before = observations["desired_goal"].copy()
        observations, rewards, _, _ = env.step(act(observations))
        assert isinstance(observations, dict)
        fresh = np.any(observations["desired_goal"] != before, axis=1)
        n_goals += rewards
    return n_goals, {key: np.concatenate([part[key] for part in asked]) for key in asked[0]}


def follower(model: Diffuser) -> Act:
    """
    :param model: planner
    :return: follows plans; a goal that moved, or a plan that is used up, makes a new one
    """
    state = None

    def act(observations: Any) -> np.ndarray:
        nonlocal state
        actions, state = model.predict(observations, state)
        return actions

    return act


def follow(model: Diffuser, tracker: PDTracker | None, env: VecEnv, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """
    Follow the first plan of each env to its end, or to the goal.

    :param model: planner
    :param tracker: feedback control, or None for the planned actions
    :param env: of mazes
    :param seed: of mazes and plans
    :return: planned positions ``(n_envs, horizon, 2)``, and for each env the realised ones ``(n_steps, 2)``
    """
    model.set_planning(tracker=tracker)
    wrapped = VecPlanningWrapper(env, model, model.n_action_steps)
    wrapped.seed(seed)
    observations = wrapped.reset()
    assert isinstance(observations, dict)
    realised = [[position] for position in observations["achieved_goal"].copy()]
    on_the_way = np.ones(env.num_envs, dtype=bool)
    planned = np.empty(0)
    for t in range(model.n_action_steps):
        observations, _, _, infos = wrapped.step()
        assert isinstance(observations, dict)
        if t == 0:
            planned = np.stack([info["plan_observations"]["achieved_goal"] for info in infos])
        for i in np.flatnonzero(on_the_way):
            realised[i].append(observations["achieved_goal"][i].copy())
        on_the_way &= ~np.array([info["success"] for info in infos])
    return planned, [np.array(path) for path in realised]


def draw(model: Diffuser, dataset: OfflineDataset, seed: int, path: Path) -> None:
    """
    Draw planned and realised paths over the walls.

    :param model: planner
    :param dataset: whose maze it is
    :param seed: of mazes and plans
    :param path: to write
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    maze = make_maze(dataset, EPISODE_STEPS).unwrapped.maze  # type: ignore[attr-defined]
    shown = {name: tracker for name, tracker in TRACKERS.items() if name != "PD tracking, kp 10"}
    figure = Figure(figsize=(2.2 * N_DRAWN, 2.4 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), N_DRAWN)
    for axes_row, (name, tracker) in zip(axes, shown.items(), strict=True):
        env = make_vec_env(lambda: make_maze(dataset, EPISODE_STEPS), N_DRAWN, seed)
        planned, realised = follow(model, tracker, env, seed)
        goals = planned[:, -1]
        env.close()
        for ax, plan, way, goal in zip(axes_row, planned, realised, goals, strict=True):
            for i, j in np.argwhere(np.array(maze.maze_map) == 1):
                x, y = maze.cell_rowcol_to_xy(np.array([i, j])) - 0.5 * maze.maze_size_scaling
                ax.add_patch(Rectangle((x, y), maze.maze_size_scaling, maze.maze_size_scaling, color="0.8", linewidth=0))
            ax.plot(*plan.T, ".", color="C0", markersize=3, label="planned")
            ax.plot(*way.T, color="C1", linewidth=1.5, label="realised")
            ax.plot(*plan[0], "o", color="black", markersize=5)
            ax.plot(*goal, "*", color="C3", markersize=11)
            half = 0.5 * maze.maze_size_scaling * np.array(maze.maze_map).shape[0]
            ax.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])
        axes_row[0].set_ylabel(name)
    axes[0, 0].legend(fontsize="x-small", loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train what is not trained, then measure, and write table and picture.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizon", type=int, default=128)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--evaluations", type=int, default=5, help="on the way")
    parser.add_argument("--episodes", type=int, default=100, help="of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    dataset = load_dataset(DATA)
    name, curves = f"Diffuser, horizon {options.horizon}", RESULTS / "pointmaze_umaze.json"
    describe(
        curves,
        f"Offline: {dataset.name}",
        f"Goals reached in {DATA_STEPS:,} steps; PD tracking of plans that are followed to their end, also where the goal was "
        "reached on the way. A small U-Net of three levels, batch 32.",
    )
    run(
        name,
        options.seed,
        lambda: Diffuser(
            "MultiInputPolicy",
            None,
            dataset=dataset,
            horizon=options.horizon,
            n_action_steps=options.horizon - 1,
            seed=options.seed,
            device="cpu",
            **SETTINGS,
        ),
        lambda path: Diffuser.load(path, dataset=dataset, device="cpu"),
        options.updates,
        lambda: make_maze(dataset, DATA_STEPS),
        curves,
        n_evaluations=options.evaluations,
        dataset=dataset,
    )
    folder = WORK / curves.stem / f"{name}-seed{options.seed}".replace(" ", "_")
    model = Diffuser.load(folder / "checkpoint.zip", device="cpu")
    env = make_vec_env(lambda: make_maze(dataset, EPISODE_STEPS), options.episodes, options.seed)
    longest = float(np.linalg.norm(np.diff(dataset.observations["achieved_goal"][:DATA_STEPS], axis=0), axis=1).max())
    maze = make_maze(dataset, EPISODE_STEPS).unwrapped.maze  # type: ignore[attr-defined]

    def row(label: str, act: Act) -> tuple[list[str | float | None], dict[str, np.ndarray]]:
        env.seed(options.seed)
        n_goals, asked = reach_goals(env, act, EPISODE_STEPS)
        low, high = bootstrap_interval(n_goals, statistic="mean")
        cells: list[str | float | None] = [
            label,
            f"{n_goals.mean():.2f} [{low:.2f}, {high:.2f}]",
            float(n_goals.mean() / EPISODE_STEPS),
        ]
        print(*cells, flush=True)
        return cells, asked

    begun = dataset.rewards.reshape(-1, DATA_STEPS)[:, :EPISODE_STEPS].sum(axis=1)
    low, high = bootstrap_interval(begun, statistic="mean")
    of_data: list[str | float | None] = [f"{begun.mean():.2f} [{low:.2f}, {high:.2f}]", float(begun.mean() / EPISODE_STEPS)]
    rows: list[list[str | float | None]] = [["waypoint controller (the data)", *of_data, None, None]]
    generator = np.random.default_rng(options.seed)
    cells, _ = row("random actions", lambda observations: generator.uniform(-1.0, 1.0, (options.episodes, 2)))
    rows.append([*cells, None, None])
    for label, tracker in TRACKERS.items():
        model.set_planning(tracker=tracker)
        model.set_random_seed(options.seed)
        cells, asked = row(label, follower(model))
        paths = model.plan(asked, seed=options.seed).observations["achieved_goal"]
        jumps = np.linalg.norm(np.diff(paths, axis=1), axis=2).max(axis=1) > 2.0 * longest
        hits = walls_hit(paths, maze)
        rows.append([*cells, f"{100 * hits.mean():.1f} % of {len(hits)}", f"{100 * jumps.mean():.1f} %"])
        print(rows[-1], flush=True)
    env.close()
    picture = f"assets/diffuser_maze_{options.horizon}.png"
    draw(model, dataset, options.seed, ROOT / "docs" / picture)
    write_table(
        RESULTS / f"diffuser_maze_{options.horizon}.json",
        f"Diffuser in a maze: tracked plans and executed plans, horizon {options.horizon}",
        ["controller", f"goals in {EPISODE_STEPS} steps", "goals per step", "plans through walls", "plans that jump"],
        rows,
        text=(
            f"{dataset.name}, horizon {options.horizon}, {options.updates:,} updates (batch {SETTINGS['batch_size']}, U-Net "
            f"of three levels, base width 16, {SETTINGS['n_diffusion_steps']} diffusion steps), one run; {options.episodes} "
            "episodes a row from starts at random and at rest, goals at random, which move when they are reached; the mean "
            "with its 95 % bootstrap interval over episodes. A plan ends at the goal in its last row; a new one is made when "
            "the goal moves or the plan is used up. *Through walls*: a planned position, or one of four between two of them, "
            "lies in a wall. *Jump*: two planned positions in a row are more than twice as far apart as ever in the data. "
            f"Both are of plans from the states at which a goal was new in that row. In the data {dataset.rewards.mean():.4f} "
            f"goals per step are reached in episodes of {DATA_STEPS:,} steps."
        ),
        pictures=[
            (
                picture,
                "First plans of five episodes and what came of them, up to the goal or the end of the plan: tracked above, by "
                "their own actions below.",
            )
        ],
    )


if __name__ == "__main__":
    main()
