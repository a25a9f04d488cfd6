"""
Trust region beside KL distillation on two planar toys, as one picture and a table.

    python benchmarks/toy_regularizers.py

Bandits with one state: 25 Gaussians on a grid and a swiss roll, with rewards by distance from the origin (arXiv 2405.19690
and its authors' toy scripts). Finished panels are kept in ``benchmarks/work`` and not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from harness import RESULTS, ROOT, WORK, write_json, write_table

from sb3_diffusion import DTQL, load_dataset
from sb3_diffusion.common.utils import CosineSchedule

N_POINTS, N_SAMPLES = 10_000, 1_000
GRID = (-10.0, -5.0, 0.0, 5.0, 10.0)
MODES = np.array([(x, y) for x in GRID for y in GRID])
GRID_STD, ROLL_STD = 0.3, 0.1
RADIUS = {"grid": 1.0, "roll": 0.5}
"""A sample this close to a mode (about three standard deviations) or to a point of the roll counts as in the data."""
SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = {"trust region": 0.5, "KL": 7.0}, 0.002, 80.0
"""
Noise levels in units of the plane. 0.5 is that of the authors' toy: about the width of a mode, so that the trust region sees
single modes. KL compares distributions and needs noise that bridges the modes, the standard deviation of all the data: with
0.5 its actor meets no force that leads back once it is off the data, and ends in a corner of the box even without a reward.
"""
GAMMA = 0.9
"""A discount adds the same to all action values here: with the authors' 0.99 so much that the critic takes long to find it."""
BOX = 1.4
"""Half the side of the box of actions, in units of the largest coordinate in the data."""


@dataclass(frozen=True)
class Column:
    """
    One toy.

    :param title: head of the column
    :param points: ``"grid"`` or ``"roll"``
    :param reward: from points ``(n, 2)`` to rewards ``(n,)``
    :param q_coef: weight of the action value beside the trust region
    """

    title: str
    points: str
    reward: Callable[[np.ndarray], np.ndarray]
    q_coef: float = 1.0


def far(points: np.ndarray) -> np.ndarray:
    """:return: the distance from the origin"""
    return np.linalg.norm(points, axis=1)


def near(points: np.ndarray, largest: float) -> np.ndarray:
    """:return: how much less the distance from the origin is than the largest in the data"""
    return largest - far(points)


def hard(points: np.ndarray) -> np.ndarray:
    """:return: the distance from the origin, doubled around the upper left mode"""
    return far(points) * np.where((points[:, 0] < -7.5) & (points[:, 1] > 7.5), 2.0, 1.0)


def nothing(points: np.ndarray) -> np.ndarray:
    """:return: zeros"""
    return np.zeros(len(points))


def grid_points(rng: np.random.Generator) -> np.ndarray:
    """:return: ``N_POINTS`` points, equally many around each of the 25 modes"""
    return np.repeat(MODES, N_POINTS // len(MODES), axis=0) + GRID_STD * rng.standard_normal((N_POINTS, 2))


def roll_points(rng: np.random.Generator) -> np.ndarray:
    """:return: ``N_POINTS`` points on the spiral (t cos t, t sin t), t from 1.5 pi to 4.5 pi"""
    t = 1.5 * np.pi * (1.0 + 2.0 * rng.random(N_POINTS))
    return np.stack([t * np.cos(t), t * np.sin(t)], axis=1) + ROLL_STD * rng.standard_normal((N_POINTS, 2))


POINTS = {"grid": grid_points(np.random.default_rng(0)), "roll": roll_points(np.random.default_rng(0))}
LARGEST = {name: float(far(points).max()) for name, points in POINTS.items()}
COLUMNS = (
    Column("grid, far", "grid", far),
    Column("grid, hard", "grid", hard),
    Column("grid, near", "grid", lambda points: near(points, LARGEST["grid"])),
    Column("roll, far", "roll", far, q_coef=5.0),
    Column("roll, near", "roll", lambda points: near(points, LARGEST["roll"])),
    Column("grid, no reward", "grid", nothing, q_coef=0.0),
)
ROWS = {"trust region": "gaussian", "KL": "implicit"}
"""Regularisers and the actors that they come with."""


def half_side(points: np.ndarray) -> float:
    """:return: half the side of the box of actions"""
    return BOX * float(np.abs(points).max())


def train(row: str, column: Column, n_pretrain_steps: int, n_steps: int, seed: int) -> np.ndarray:
    """
    Train one panel.

    The package scales actions to [-1, 1]. With the noise levels scaled by the same factor, the trust-region loss has the
    value that it has in units of the plane, so that rewards and weights stay those of the authors. The KL loss has a
    gradient of size one in whatever units; its weight takes the factor instead. Nor does it grow with the distance from the
    data: an action value with a slope well above one wins over it everywhere, so that its weight stays at 1 in this row.

    :param row: a key of ``ROWS``
    :param column: the toy
    :param n_pretrain_steps: steps of pretraining, in which the Gaussian actor clones the data; the implicit one then starts
        from the diffusion model
    :param n_steps: steps of everything
    :param seed: of the run
    :return: actions of the trained policy, ``(N_SAMPLES, 2)``
    """
    points = POINTS[column.points]
    side = half_side(points)
    # Not 0: the actor's biases start at 0, so that of its layers only the last could learn from a state of 0
    states = np.ones((N_POINTS, 1), dtype=np.float32)
    # Truncated after one step, not terminated: the critic goes on from the same state, as in the authors' toy
    dataset = load_dataset(
        {
            "observations": states,
            "actions": points.astype(np.float32),
            "rewards": column.reward(points),
            "terminals": np.zeros(N_POINTS, dtype=bool),
            "timeouts": np.ones(N_POINTS, dtype=bool),
            "next_observations": states,
        },
        observation_space=spaces.Box(0.0, 1.0, (1,)),
        action_space=spaces.Box(-side, side, (2,)),
    )
    model = DTQL(
        "MlpPolicy",
        None,
        learning_rate=CosineSchedule(3e-3),
        critic_learning_rate=CosineSchedule(3e-3),
        batch_size=256,
        gamma=GAMMA,
        dataset=dataset,
        regularizer="kl" if row == "KL" else "trust_region",
        actor_type=ROWS[row],
        trust_region_coef=side if row == "KL" else 1.0,
        q_coef=min(column.q_coef, 1.0) if row == "KL" else column.q_coef,
        q_normalization=None,
        expectile=0.95,
        n_pretrain_steps=n_pretrain_steps,
        n_imitation_steps=0,
        ema_decay=0.0,
        normalize_observations=False,
        sigma_data=SIGMA_DATA[row] / side,
        sigma_min=SIGMA_MIN / side,
        sigma_max=SIGMA_MAX / side,
        policy_kwargs={
            "net_arch": {"pi": [128] * 3, "qf": [128] * 3, "behavior": [128] * 4},
            "time_embedding_dim": 4,
            "clip_denoised": False,
        },
        seed=seed,
        device="cpu",
    )
    model.learn(n_pretrain_steps + n_steps, log_interval=None)
    return model.predict(states[:N_SAMPLES], deterministic=False)[0]


def measure(column: Column, samples: np.ndarray) -> dict[str, float | str]:
    """
    :param column: the toy
    :param samples: actions of a policy, ``(N_SAMPLES, 2)``
    :return: shares of the samples and rewards
    """
    points = POINTS[column.points]
    rewards = column.reward(points)
    if column.points == "grid":
        distances = np.linalg.norm(samples[:, None] - MODES, axis=2)
        inside = distances.min(axis=1) < RADIUS["grid"]
        counts = np.bincount(distances.argmin(axis=1)[inside], minlength=len(MODES))
        mode = str(tuple(int(x) for x in MODES[counts.argmax()])) if inside.any() else "none"
        top: dict[str, float | str] = {"top_mode": mode, "in_top_mode": float(counts.max() / len(samples))}
        best = max(float(rewards[i : i + 400].mean()) for i in range(0, N_POINTS, 400))
    else:
        nearest = [float(np.linalg.norm(points - sample, axis=1).min()) for sample in samples]
        inside = np.array(nearest) < RADIUS["roll"]
        top = {"top_mode": "", "in_top_mode": ""}
        best = float(rewards.max())
    return {
        "in_data": float(inside.mean()),
        **top,
        "mean_reward": float(column.reward(samples).mean()),
        "best_reward": best,
        "largest_std": float(samples.std(axis=0).max()),
    }


def draw(panels: dict[tuple[str, str], dict[str, Any]]) -> None:
    """
    Draw the picture.

    :param panels: by row and title
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(COLUMNS), 3.25 * len(ROWS)), layout="constrained")
    axes = figure.subplots(len(ROWS), len(COLUMNS), squeeze=False)
    for axes_row, row in zip(axes, ROWS, strict=True):
        for ax, column in zip(axes_row, COLUMNS, strict=True):
            points, panel = POINTS[column.points], panels[row, column.title]
            samples, numbers = np.array(panel["samples"]), panel["numbers"]
            ax.scatter(*points.T, c=column.reward(points), s=2, cmap="viridis", linewidths=0, rasterized=True)
            ax.scatter(*samples.T, c="red", s=5, alpha=0.5, linewidths=0, rasterized=True)
            side = 1.03 * half_side(points)
            ax.set(xlim=(-side, side), ylim=(-side, side), aspect="equal", xticks=[], yticks=[])
            text = f"in the data {100 * numbers['in_data']:.0f} %"
            if numbers["top_mode"]:
                text += f", one mode {100 * numbers['in_top_mode']:.0f} %"
            ax.set_xlabel(text, fontsize=9)
            if row == next(iter(ROWS)):
                ax.set_title(column.title)
        axes_row[0].set_ylabel(f"{row} ({ROWS[row]} actor)")
    (ROOT / "docs" / "assets").mkdir(parents=True, exist_ok=True)
    figure.savefig(ROOT / "docs" / "assets" / "toy_regularizers.png", dpi=100)


def main() -> None:
    """Train the panels that are missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--pretrain-steps", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=None, help='train only these panels, such as "KL, grid, far"')
    options = parser.parse_args()
    th.set_num_threads(1)
    folder = WORK / "toy_regularizers" / f"{options.pretrain_steps}-{options.steps}-{options.seed}"
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    for row in ROWS:
        for column in COLUMNS:
            name = f"{row}, {column.title}"
            file = folder / f"{name.replace(', ', '-').replace(' ', '_')}.json"
            if not file.is_file():
                if options.only is not None and name not in options.only:
                    continue
                start = time.process_time()
                samples = train(row, column, options.pretrain_steps, options.steps, options.seed)
                write_json(file, {"samples": samples.tolist(), "cpu_seconds": time.process_time() - start})
            panel = panels[row, column.title] = json.loads(file.read_text(encoding="utf-8"))
            panel["numbers"] = measure(column, np.array(panel["samples"]))
            print(name, panel["numbers"], f"{panel['cpu_seconds']:.0f} s", flush=True)
    if len(panels) < len(ROWS) * len(COLUMNS):
        return
    draw(panels)
    keys = ("in_data", "top_mode", "in_top_mode", "mean_reward", "best_reward", "largest_std")
    write_table(
        RESULTS / "toy_regularizers.json",
        "Toys: trust region beside KL distillation",
        [
            "regulariser",
            "toy",
            "share in the data",
            "most used mode",
            "share in it",
            "mean reward",
            "best reward in the data",
            "largest std",
            "CPU seconds",
        ],
        [
            [row, column.title, *(panel["numbers"][key] for key in keys), round(panel["cpu_seconds"], 1)]
            for row in ROWS
            for column in COLUMNS
            for panel in [panels[row, column.title]]
        ],
        text=(
            f"{N_SAMPLES:,} actions of each policy. *In the data*: within {RADIUS['grid']} of a mode (grid, standard "
            f"deviation {GRID_STD}) or {RADIUS['roll']} of a data point (roll, noise {ROLL_STD}). The best reward is the mean "
            "of the best mode (grid) or that of the best point (roll). Where samples leave the data, mean rewards "
            f"extrapolate the reward's formula. {options.pretrain_steps:,} updates of pretraining, then {options.steps:,} of "
            f"everything, batch 256, seed {options.seed}; learning rates 3e-3 with cosine decay. One box bounds both actors, "
            f"{BOX} times as large as the data. `sigma_data` in units of the plane: {SIGMA_DATA['trust region']} (trust "
            f"region), {SIGMA_DATA['KL']} (KL)."
        ),
        pictures=[
            (
                "assets/toy_regularizers.png",
                "Data coloured by reward, 1,000 actions of the policy in red; the frame is the box of actions.",
            )
        ],
    )


if __name__ == "__main__":
    main()
