"""
BellmanDiffusion in a maze: where actions lead, drawn beside Monte Carlo, and goals that are set after training.

    python benchmarks/bellman_maze.py

One model per discount is trained on logged rides without their rewards. The picture shows its measure at positions and
actions beside future states of real rides with the same start. Then goals are set as rewards, and candidates ranked by the
measure drive there. Training goes on where it was stopped.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from diffuser_maze import make_maze
from harness import RESULTS, ROOT, WORK, write_table
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_diffusion import BellmanDiffusion, OfflineDataset, load_dataset
from sb3_diffusion.evaluation import bootstrap_interval

DATA = "bench/pointmaze/umaze-v0"
EPISODE_STEPS = 200
GAMMAS = (0.9, 0.97)
N_DRAWN, N_SAMPLES, N_NEIGHBOURS = 3, 2_000, 200
"""Starts in the picture, samples of each, and logged steps nearest to it whose futures stand for Monte Carlo."""
WIDTH = 0.3
"""Of the reward around a goal."""


def positions_only(dataset: OfflineDataset) -> OfflineDataset:
    """
    :param dataset: of the maze
    :return: position and velocity alone: the goals of the log are no part of the state
    """
    return OfflineDataset(
        dataset.observations["observation"],
        dataset.actions,
        dataset.rewards,
        dataset.next_observations["observation"],
        dataset.terminations,
        dataset.truncations,
        observation_space=dataset.observation_space["observation"],  # type: ignore[index]
        action_space=dataset.action_space,
    )


def trained(dataset: OfflineDataset, gamma: float, options: argparse.Namespace) -> BellmanDiffusion:
    """
    :param dataset: to learn from
    :param gamma: discount
    :param options: of the command line
    :return: a model after ``options.updates`` updates, of which those of an earlier call are not made again
    """
    folder = WORK / "bellman_maze" / f"gamma{gamma}-{options.updates}-seed{options.seed}"
    checkpoint = folder / "model.zip"
    if checkpoint.is_file():
        model = BellmanDiffusion.load(checkpoint, dataset=dataset, device="cpu")
    else:
        # The actor imitates to the end: it is the behaviour cloning to compare with
        model = BellmanDiffusion(
            "MlpPolicy",
            None,
            dataset=dataset,
            gamma=gamma,
            n_pretrain_steps=options.updates,
            seed=options.seed,
            device="cpu",
        )
    remaining = options.updates - model.num_timesteps
    every = max(1, options.updates // 20)
    while remaining > 0:
        model.learn(min(every, remaining), log_interval=None, reset_num_timesteps=False)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        model.save(checkpoint)
        remaining = options.updates - model.num_timesteps
        print(f"gamma {gamma}: {model.num_timesteps} of {options.updates} updates", flush=True)
    return model


def states_of(dataset: OfflineDataset) -> np.ndarray:
    """
    :param dataset: of positions and velocities
    :return: its observations, shape ``(n_steps, 4)``
    """
    assert isinstance(dataset.observations, np.ndarray)
    return dataset.observations


def logged_futures(dataset: OfflineDataset, start: np.ndarray, action: np.ndarray, gamma: float, seed: int) -> np.ndarray:
    """
    :param dataset: logged rides
    :param start: position and velocity, shape ``(4,)``
    :param action: taken there, shape ``(2,)``
    :param gamma: discount
    :param seed: of the offsets
    :return: positions a geometric number of steps after the logged steps nearest to start and action, shape ``(n, 2)``
    """
    states, rng = states_of(dataset), np.random.default_rng(seed)
    scale = np.concatenate([states.std(axis=0), 2.0 * dataset.actions.std(axis=0)])
    pairs = np.concatenate([states, dataset.actions], axis=1) / scale
    wanted = np.concatenate([start, action]) / scale
    nearest = np.argsort(np.square(pairs - wanted).sum(axis=1))[:N_NEIGHBOURS]
    ends = dataset.episode_ends[np.searchsorted(dataset.episode_ends, nearest)]
    index = np.repeat(nearest, N_SAMPLES // N_NEIGHBOURS)
    last = np.repeat(ends, N_SAMPLES // N_NEIGHBOURS)
    offsets = rng.geometric(1.0 - gamma, size=len(index))
    inside = index + offsets - 1 <= last
    assert isinstance(dataset.next_observations, np.ndarray)
    return dataset.next_observations[(index + offsets - 1)[inside], :2]


def draw_walls(ax: Any, maze: Any) -> None:
    """
    :param ax: to draw on
    :param maze: of the env
    """
    from matplotlib.patches import Rectangle

    half = 0.5 * maze.maze_size_scaling * np.array(maze.maze_map).shape[0]
    for i, j in np.argwhere(np.array(maze.maze_map) == 1):
        x, y = maze.cell_rowcol_to_xy(np.array([i, j])) - 0.5 * maze.maze_size_scaling
        ax.add_patch(Rectangle((x, y), maze.maze_size_scaling, maze.maze_size_scaling, color="0.8", linewidth=0))
    ax.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])


def contours(ax: Any, points: np.ndarray, color: str) -> None:
    """
    Contours of a smoothed histogram, at shares of its largest value.

    :param ax: to draw on
    :param points: shape ``(n, 2)``
    :param color: colour map
    """
    from scipy.ndimage import gaussian_filter

    edges = np.linspace(-2.5, 2.5, 101)
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=(edges, edges))
    density = gaussian_filter(counts, 1.5)
    middles = 0.5 * (edges[1:] + edges[:-1])
    ax.contourf(middles, middles, density.T / density.max(), levels=[0.03, 0.1, 0.25, 0.5, 0.75, 1.0], cmap=color, alpha=0.85)


def drawn_steps(dataset: OfflineDataset, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    :param dataset: logged rides
    :param seed: of the choice
    :return: logged pairs of a state and an action, two for each of ``N_DRAWN`` regions, with actions as different as there
    """
    states, rng = states_of(dataset), np.random.default_rng(seed)
    rows = []
    for index in rng.integers(len(states), size=N_DRAWN):
        near = np.argsort(np.square((states - states[index]) / states.std(axis=0)).sum(axis=1))[: 2 * N_NEIGHBOURS]
        along = dataset.actions[near].sum(axis=1)
        rows += [(states[k], dataset.actions[k]) for k in (near[along.argmin()], near[along.argmax()])]
    return rows


def draw(models: dict[float, BellmanDiffusion], dataset: OfflineDataset, maze: Any, seed: int, path: Path) -> list[float]:
    """
    Draw measures beside Monte Carlo: a row per start and action, a pair of columns per discount.

    :param models: by discount
    :param dataset: logged rides
    :param maze: of the env
    :param seed: of starts and samples
    :param path: to write
    :return: for each discount the mean sliced distance between both, in units of the maze
    """
    from bellman_checks import sliced_distance
    from matplotlib.figure import Figure

    rows = drawn_steps(dataset, seed)
    figure = Figure(figsize=(2.3 * 2 * len(models), 2.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2 * len(models), squeeze=False)
    distances: list[list[float]] = [[] for _ in models]
    for row, (axes_row, (start, action)) in enumerate(zip(axes, rows, strict=True)):
        for k, (gamma, model) in enumerate(models.items()):
            found = model.sample_future(start, action.astype(np.float32), N_SAMPLES, seed=seed)[:, :2]
            real = logged_futures(dataset, start, action, gamma, seed)
            distances[k].append(sliced_distance(found, real))
            for ax, points, color, label in (
                (axes_row[2 * k], found, "Blues", f"measure, gamma {gamma}"),
                (axes_row[2 * k + 1], real, "Oranges", f"logged futures, gamma {gamma}"),
            ):
                draw_walls(ax, maze)
                contours(ax, points, color)
                ax.plot(*start[:2], "o", color="black", markersize=4)
                ax.arrow(*start[:2], *(0.5 * action), width=0.04, color="black", length_includes_head=True)
                if row == 0:
                    ax.set_title(label, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return [float(np.mean(values)) for values in distances]


def drive(env: VecEnv, act: Callable[[np.ndarray], np.ndarray], n_steps: int) -> np.ndarray:
    """
    :param env: of mazes
    :param act: from positions and velocities to actions
    :param n_steps: to drive
    :return: positions, shape ``(n_envs, n_steps, 2)``
    """
    observations, path = env.reset(), []
    for _ in range(n_steps):
        assert isinstance(observations, dict)
        observations, _, _, _ = env.step(act(observations["observation"].astype(np.float32)))
        assert isinstance(observations, dict)
        path.append(observations["achieved_goal"].copy())
    return np.stack(path, axis=1)


def returns_to(path: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """
    :param path: positions, shape ``(..., 2)``
    :param goal: shape ``(2,)``
    :return: rewards, shape ``(...)``
    """
    return np.exp(-0.5 * np.square((path - goal) / WIDTH).sum(axis=-1))


def free_cells(maze: Any) -> np.ndarray:
    """:return: centres of the cells without walls, shape ``(n, 2)``"""
    return np.array([maze.cell_rowcol_to_xy(cell) for cell in np.argwhere(np.array(maze.maze_map) != 1)])


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train what is not trained, then measure, and write table and picture.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--episodes", type=int, default=10, help="of each row")
    parser.add_argument("--steps", type=int, default=EPISODE_STEPS, help="of an episode")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--futures", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    full = load_dataset(DATA)
    dataset = positions_only(full)

    def make() -> gym.Env:
        return gym.make(full.env_spec, max_episode_steps=options.steps + 1, continuing_task=True)  # type: ignore[arg-type]

    maze = make_maze(full, options.steps).unwrapped.maze  # type: ignore[attr-defined]
    models = {gamma: trained(dataset, gamma, options) for gamma in GAMMAS}
    picture = "assets/bellman_maze.png"
    distances = draw(models, dataset, maze, options.seed, ROOT / "docs" / picture)
    model = models[max(GAMMAS)]
    env = make_vec_env(make, options.episodes, options.seed)
    goals = free_cells(maze)[[0, len(free_cells(maze)) // 2, -1]]
    rows: list[list[str | float | int | None]] = []
    for goal in goals:

        def reward(states: np.ndarray, goal: np.ndarray = goal) -> np.ndarray:
            return returns_to(states[:, :2], goal)

        model.set_reward_fn(reward)
        totals = {}
        for name, n_candidates in (("behaviour cloning", 1), ("candidates", options.candidates)):
            model.set_acting(n_candidates, options.futures)
            model.set_random_seed(options.seed)
            env.seed(options.seed)
            path = drive(env, lambda states: model.predict(states, deterministic=False)[0], options.steps)
            totals[name] = returns_to(path, goal).sum(axis=1)
            low, high = bootstrap_interval(totals[name], statistic="mean")
            near = float((np.linalg.norm(path - goal, axis=2).min(axis=1) < 0.5).mean())
            rows.append(
                [
                    f"({goal[0]:.1f}, {goal[1]:.1f})",
                    name,
                    f"{totals[name].mean():.1f} [{low:.1f}, {high:.1f}]",
                    near,
                    float(np.linalg.norm(path[:, -1] - goal, axis=1).mean()),
                ]
            )
            print(*rows[-1], flush=True)
    env.close()
    write_table(
        RESULTS / "bellman_maze.json",
        f"Measures and goals in a maze: {full.name}",
        ["goal", "acting", f"return over {options.steps} steps", "came within 0.5", "distance at the end"],
        rows,
        text=(
            f"BellmanDiffusion, {options.updates:,} updates on positions and velocities alone, seed {options.seed}; one model "
            f"(gamma {max(GAMMAS)}), trained once, for all goals. The reward is a bell of width {WIDTH} around a goal. "
            f"*Candidates*: the best of {options.candidates} of {options.futures} futures each; *behaviour cloning*: the "
            f"actor, which imitates the data. {options.episodes} episodes each, mean return with 95 % bootstrap interval. In "
            "the picture, mean sliced Wasserstein distance between both sides: "
            + ", ".join(f"{value:.2f} (gamma {gamma})" for gamma, value in zip(models, distances, strict=True))
            + "; a cell is 1 wide."
        ),
        pictures=[
            (
                picture,
                f"Where an action (arrow) leads from a position (dot): samples of the measure, and futures of the "
                f"{N_NEIGHBOURS} nearest logged steps.",
            )
        ],
    )


if __name__ == "__main__":
    main()
