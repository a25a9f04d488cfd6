"""
Diffuser on walking data: how many planned actions are executed before the next plan, and how far plans hold.

    python benchmarks/diffuser_walker2d.py
    python benchmarks/diffuser_walker2d.py --horizon 32

One model without guidance, one plan per decision, executes 1 to ``horizon`` actions of each plan; guided by its value it does
so at the last of these. Then it plans with fewer denoising steps. Training goes on where it was stopped; points that were
measured are kept in ``benchmarks/work``.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from harness import RESULTS, ROOT, WORK, describe, run, write_json, write_table
from stable_baselines3.common.env_util import make_vec_env

from sb3_diffusion import Diffuser, OfflineDataset, VecPlanningWrapper, load_dataset
from sb3_diffusion.evaluation import EvaluationResult, bootstrap_interval, evaluate
from sb3_diffusion.evaluation.timing import median_milliseconds

DATA, ENV_ID, MAX_STEPS = "bench/walker2d/expert-v0", "Walker2d-v5", 1_000
SETTINGS: dict[str, Any] = dict(
    learning_rate=4e-4,
    batch_size=64,
    n_candidates=1,
    guidance_scale=0.0,
    train_value=True,
    policy_kwargs=dict(net_kwargs=dict(multipliers=[1, 2, 4])),
)
"""In the place of the defaults: a U-Net of three levels, 1.0 million weights, that one core trains in minutes."""
REPORT: dict[tuple[int, float], tuple[float, float, int]] = {
    (2, 0.0): (90.3, 0.975, 1),
    (3, 0.0): (74.1, 0.966, 3),
    (4, 0.0): (76.2, 0.968, 3),
    (5, 0.0): (82.7, 0.975, 2),
    (6, 0.0): (86.9, 0.977, 2),
    (7, 0.0): (64.6, 0.948, 6),
    (8, 0.0): (75.7, 0.962, 3),
    (8, 0.1): (84.1, 0.971, 3),
}
"""
yibhu/Generative-RL, horizon 8, ten episodes each, by executed actions and size of the guidance: return in percent of
the data's mean, value rate, and falls as read off its scatter plot. What it calls window k executes k + 1 actions.
"""
CHAINS: dict[tuple[str, int], tuple[int, ...]] = {
    ("ddpm", 20): (1, 4, 8),
    ("ddim", 10): (1,),
    ("ddim", 5): (1,),
    ("ddim", 3): (1, 4, 8),
    ("ddim", 2): (1, 4, 8),
    ("ddim", 1): (1,),
    ("dpm_solver", 5): (1,),
    ("dpm_solver", 3): (1,),
}
"""Actions executed per plan, by sampler and its steps."""
DRAWN = (1, 4, 8)
"""Executed actions in the picture."""
N_DRAWN_ENVS, N_DRAWN_STEPS = 10, 400
HEIGHT = 0
"""Index of the height of the torso in the observation."""


def make_model(dataset: OfflineDataset, horizon: int, n_value_steps: int, seed: int) -> Diffuser:
    """
    :param dataset: to learn from
    :param horizon: rows of a window
    :param n_value_steps: updates of the value
    :param seed: of the run
    :return: a new model
    """
    return Diffuser(
        "MlpPolicy",
        ENV_ID,
        dataset=dataset,
        horizon=horizon,
        n_value_steps=n_value_steps,
        seed=seed,
        device="cpu",
        **SETTINGS,
    )


def measure(result: EvaluationResult, dataset: OfflineDataset) -> dict[str, float]:
    """
    :param result: of whole episodes
    :param dataset: the model's
    :return: mean return with a 95 % bootstrap interval, share of falls, value rate, and both normalisations in percent
    """
    low, high = bootstrap_interval(result.returns, statistic="mean")
    return {
        "return": result.mean,
        "low": low,
        "high": high,
        "fall_rate": float(np.mean(result.lengths < MAX_STEPS)),
        "value_rate": float(result.returns.sum() / result.lengths.sum() / dataset.rewards.mean()),
        "percent_of_data": float(100.0 * result.mean / dataset.episode_returns.mean()),
        "d4rl_score": float(dataset.normalized_score(result.mean)),
    }


def measured(
    folder: Path,
    name: str,
    model: Diffuser,
    dataset: OfflineDataset,
    settings: dict[str, Any],
    n_episodes: int,
    seed: int,
    deterministic: bool = False,
) -> dict[str, float]:
    """
    A point of a table: from the folder, or measured now and put there.

    :param folder: of the points
    :param name: of the point
    :param model: trained model
    :param dataset: its data, whose env the episodes are played in
    :param settings: of planning, as ``set_planning`` takes them
    :param n_episodes: all at once, one env each
    :param seed: of envs and plans
    :param deterministic: draw nothing when planning
    :return: what ``measure`` returns, and seconds
    """
    file = folder / f"{name}-{n_episodes}-seed{seed}.json"
    if not file.is_file():
        assert dataset.env_spec is not None
        model.set_planning(**settings)
        model.set_random_seed(seed)
        start = time.perf_counter()
        result = evaluate(
            model, dataset.env_spec.id, n_episodes, n_envs=n_episodes, deterministic=deterministic, seed=1_000 * seed
        )
        seconds = time.perf_counter() - start
        write_json(file, {**measure(result, dataset), "seconds": seconds, **result.to_dict()})
    return json.loads(file.read_text(encoding="utf-8"))


def follow(model: Diffuser, n_action_steps: int, seed: int) -> dict[str, np.ndarray]:
    """
    Act by plans and compare each state that comes out of an action with the planned one.

    :param model: trained model
    :param n_action_steps: actions executed per plan
    :param seed: of envs and plans
    :return: ``deviation`` in units of the env, NaN behind the first episode of an env and where a plan has no further row;
        ``step`` of the plan that was executed; ``planned`` and ``realised`` height; all ``(n_steps, n_envs)``
    """
    model.set_planning(guidance_scale=0.0)
    env = VecPlanningWrapper(make_vec_env(ENV_ID, N_DRAWN_ENVS, seed), model, n_action_steps)
    env.seed(seed)
    env.reset()
    shape = (N_DRAWN_STEPS, N_DRAWN_ENVS)
    traces = {name: np.full(shape, np.nan) for name in ("deviation", "step", "planned", "realised")}
    step, alive = np.zeros(N_DRAWN_ENVS, dtype=int), np.ones(N_DRAWN_ENVS, dtype=bool)
    for t in range(N_DRAWN_STEPS):
        observations, _, dones, infos = env.step()
        assert isinstance(observations, np.ndarray)
        step = np.where([info["replanned"] for info in infos], 0, step + 1)
        alive &= ~dones
        for i in np.flatnonzero(alive & (step + 1 < model.horizon)):
            planned = infos[i]["plan_observations"][step[i] + 1]
            traces["deviation"][t, i] = np.linalg.norm(observations[i] - planned)
            traces["planned"][t, i] = planned[HEIGHT]
        traces["step"][t] = step
        traces["realised"][t] = np.where(alive, observations[:, HEIGHT], np.nan)
    env.close()
    return traces


def draw(traces: dict[int, dict[str, np.ndarray]], path: Path) -> None:
    """
    Draw the picture: deviation over time, deviation by step of the plan, and the height of the torso.

    :param traces: what ``follow`` returned, by executed actions
    :param path: to write
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, len(traces))
    over_time, by_step = figure.add_subplot(grid[0, :-1]), figure.add_subplot(grid[0, -1])
    window = 25
    for index, (n_action_steps, trace) in enumerate(traces.items()):
        color, deviation = f"C{index}", trace["deviation"]
        blocks = deviation[: len(deviation) // window * window].reshape(-1, window * deviation.shape[1])
        filled = np.flatnonzero(np.isfinite(blocks).any(axis=1))
        times = window * (filled + 0.5)
        medians, tops = (np.array([np.nanpercentile(blocks[i], q) for i in filled]) for q in (50, 90))
        over_time.plot(times, medians, color=color, label=f"{n_action_steps} executed")
        over_time.plot(times, tops, color=color, linestyle=":")
        steps = [step for step in range(n_action_steps) if np.isfinite(deviation[trace["step"] == step]).any()]
        of_step = [float(np.nanmean(deviation[trace["step"] == step])) for step in steps]
        by_step.plot(np.array(steps) + 1, of_step, "o-", color=color)
        ax = figure.add_subplot(grid[1, index])
        ax.plot(trace["realised"][:150, 0], color="0.4", label="realised")
        ax.plot(trace["planned"][:150, 0], ".", color=color, markersize=3, label="planned")
        ax.set(xlabel="step of the first episode", title=f"{n_action_steps} executed", ylim=(0.75, 1.6))
        ax.legend(fontsize="small")
        if index == 0:
            ax.set_ylabel("height of the torso (m)")
    over_time.set(xlabel="step of the episode", ylabel="deviation from the plan", ylim=(0.0, None))
    over_time.set_title("median (line) and 90th percentile (dotted) over envs", fontsize=10)
    over_time.legend(fontsize="small")
    by_step.set(xlabel="steps since the plan was made", ylabel="mean deviation", ylim=(0.0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def make_rows(
    points: dict[tuple[int, float], dict[str, float]],
    dataset: OfflineDataset,
    report: dict[tuple[int, float], tuple[float, float, int]],
) -> list[list[str | float | None]]:
    """
    :param points: by executed actions and ``guidance_scale``
    :param dataset: the model's
    :param report: what to show beside them, likewise
    :return: of the table: the data first
    """
    behavior = measure(EvaluationResult(dataset.episode_returns, np.diff(dataset.episode_ends, prepend=-1)), dataset)
    rows = []
    for label, numbers, reported in [
        ("the data", behavior, None),
        *(
            (f"{n}{f', guided by {scale:g}' if scale else ''}", point, report.get((n, scale)))
            for (n, scale), point in points.items()
        ),
    ]:
        rows.append(
            [
                label,
                f"{numbers['return']:.0f} [{numbers['low']:.0f}, {numbers['high']:.0f}]",
                f"{100 * numbers['fall_rate']:.0f} %",
                numbers["value_rate"],
                numbers["percent_of_data"],
                numbers["d4rl_score"],
                *((None, None, None) if reported is None else (reported[0], reported[1], f"{reported[2]} of 10")),
            ]
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train what is not trained, measure what is not measured, then write table and picture.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizon", type=int, default=8)
    parser.add_argument("--updates", type=int, default=200_000, help="of the planner")
    parser.add_argument("--value-updates", type=int, help="of the value, the first ones; a quarter by default")
    parser.add_argument("--evaluations", type=int, default=5, help="on the way")
    parser.add_argument("--episodes", type=int, default=50, help="of each point")
    parser.add_argument("--executed", type=int, nargs="+", default=list(range(1, 9)), help="actions executed per plan")
    parser.add_argument(
        "--guidance-scales", type=float, nargs="*", default=[0.1, 0.01, 0.001], help="with the most executed actions"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    dataset = load_dataset(DATA)
    n_value_steps = options.updates // 4 if options.value_updates is None else options.value_updates
    name, curves = f"Diffuser, horizon {options.horizon}", RESULTS / "walker2d_expert.json"
    describe(
        curves,
        f"Diffuser: {dataset.name}",
        "Unguided, one plan per decision, every action from a new plan; deterministic. The U-Net has three levels, batch 64.",
    )
    run(
        name,
        options.seed,
        lambda: make_model(dataset, options.horizon, n_value_steps, options.seed),
        lambda path: Diffuser.load(path, env=ENV_ID, dataset=dataset, device="cpu"),
        options.updates,
        ENV_ID,
        curves,
        n_evaluations=options.evaluations,
        dataset=dataset,
    )
    folder = WORK / curves.stem / f"{name}-seed{options.seed}".replace(" ", "_")
    model = Diffuser.load(folder / "checkpoint.zip", device="cpu")
    points: dict[tuple[int, float], dict[str, float]] = {}

    def point(name: str, deterministic: bool = False, **settings: Any) -> dict[str, float]:
        return measured(
            folder / "points", name, model, dataset, settings, options.episodes, options.seed, deterministic=deterministic
        )

    last = max(options.executed)
    for n, scale in [*((n, 0.0) for n in options.executed), *((last, scale) for scale in options.guidance_scales)]:
        words = f"{n}-guided-{scale:g}" if scale else f"{n}"
        points[n, scale] = point(words, n_action_steps=n, guidance_scale=scale)
        print(words, points[n, scale]["return"], points[n, scale]["fall_rate"], flush=True)
    still = point("1-deterministic", deterministic=True, n_action_steps=1, guidance_scale=0.0)
    assert isinstance(dataset.observations, np.ndarray)
    one, many = dataset.observations[:1], dataset.observations[:64]
    chain_rows: list[list[str | float | int | None]] = []
    for (sampler, n_steps), executed in CHAINS.items():
        model.set_sampler(sampler, n_steps)
        model.set_planning(n_action_steps=1, guidance_scale=0.0)
        times = median_milliseconds({"1": lambda: model.predict(one), "64": lambda: model.predict(many)}, 30)
        for n in (n for n in executed if n <= options.horizon):
            name = f"{n}" if sampler == "ddpm" else f"{n}-{sampler}-{n_steps}"  # the whole chain is in the other table too
            numbers = point(name, n_action_steps=n, guidance_scale=0.0)
            interval = f"{numbers['return']:.0f} [{numbers['low']:.0f}, {numbers['high']:.0f}]"
            falls = f"{100 * numbers['fall_rate']:.0f} %"
            chain_rows.append([sampler, n_steps, n, interval, falls, *times.values()])
            print(*chain_rows[-1], sep="\t", flush=True)
    model.set_sampler("ddpm")
    slowest: Any = chain_rows[0][-1]
    chain_rows = [[*row, slowest / row[-1]] for row in chain_rows]  # type: ignore[operator]
    write_table(
        RESULTS / f"diffuser_walker2d_{options.horizon}_samplers.json",
        f"Diffuser: samplers when planning, horizon {options.horizon}",
        [
            "sampler",
            "steps",
            "executed actions",
            "return",
            "falls",
            "ms per plan, 1 env",
            "ms, 64 envs",
            "times cheaper, 64 envs",
        ],
        chain_rows,
        text=(
            f"The same run on {dataset.name}, one plan per decision, unguided; {options.episodes} "
            f"episodes a row, the mean with its 95 % bootstrap interval over episodes. {th.get_num_threads()} thread."
        ),
    )
    drawn = [n for n in DRAWN if n <= options.horizon]
    picture = f"assets/diffuser_walker2d_{options.horizon}.png"
    draw({n: follow(model, n, options.seed) for n in drawn}, ROOT / "docs" / picture)
    write_table(
        RESULTS / f"diffuser_walker2d_{options.horizon}.json",
        f"Diffuser: executed actions, horizon {options.horizon}",
        [
            "executed actions",
            "return",
            "falls",
            "value rate",
            "% of the data's mean return",
            "D4RL score",
            "report: % of its data",
            "report: value rate",
            "report: falls",
        ],
        make_rows(points, dataset, REPORT if options.horizon == 8 else {}),
        text=(
            f"{dataset.name}, horizon {options.horizon}, {options.updates:,} updates of the planner and {n_value_steps:,} of "
            f"the value (batch {SETTINGS['batch_size']}, learning rate {SETTINGS['learning_rate']:g}, U-Net of three levels), "
            f"one run; {options.episodes} episodes a row, plans drawn at random, one per decision, the mean with its 95 % "
            "bootstrap interval over episodes. *Falls*: episodes that ended before 1,000 steps. *Value rate*: mean reward "
            "per step over that of the data. *Guided by*: `guidance_scale`, scaled by the posterior variance; the report "
            "guides by 0.1, unscaled and after each step. Without random draws, one executed action gives a return of "
            f"{still['return']:.0f} with {100 * still['fall_rate']:.0f} % falls. *Report*: the numbers of "
            "yibhu/Generative-RL, horizon 8, on other data (its mean return is 4940), ten episodes a row; its window k "
            "executes k + 1 actions, and falls are read off its scatter plot."
        ),
        pictures=[
            (
                picture,
                f"How far the state after each action is from the planned one, unguided, {N_DRAWN_ENVS} envs, in units of the "
                "environment (17 dimensions, most of them velocities). Below: planned and realised height in one episode.",
            )
        ],
    )


if __name__ == "__main__":
    main()
