"""
BellmanDiffusion against measures that are known in closed form, and as a controller of a point.

    python benchmarks/bellman_checks.py
    python benchmarks/bellman_checks.py --only "chain" "ring" --updates 3000

A five-state chain in the plane, a ring of eight states, a linear Gaussian system, and a point that is steered to a goal.
Finished rows are kept in ``benchmarks/work`` and not computed again.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from harness import RESULTS, WORK, write_json, write_table
from known_measures import N_DATA, Law, as_dataset, chain_data, chain_law, linear_data, linear_law, ring_data, ring_law
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr, wasserstein_distance
from stable_baselines3.common.utils import LinearSchedule

from sb3_diffusion import BellmanDiffusion, OfflineDataset
from sb3_diffusion.evaluation import bootstrap_interval

N_SAMPLES, N_DIRECTIONS = 2_048, 128
NAMES = ("shares", "distance", "noise", "energy", "sliced", "mean", "std", "value", "ranks")
BOUNDS = dict(shares=0.06, distance=0.1, noise=0.05, energy=0.012, mean=0.05, std=0.1, value=0.1)
"""Largest values that pass; the value of the linear Gaussian system has half of its bound."""


# Measures of error ----------------------------------------------------------------------------------------------------


def noise_error(model: BellmanDiffusion, law: Law, steps: int | None, n: int = 200) -> float:
    r"""
    :param model: trained model
    :param law: exact measure
    :param steps: remaining states, for the finite-horizon form
    :param n: noisy states per level and row
    :return: mean over levels with $\bar\alpha \le 0.95$ of the squared error of the told noise, in shares of the exact noise
    """
    target, rng, errors = model.measure.target, np.random.default_rng(1), []
    coder, rows = target.coder, len(law.states)
    std = coder.std.numpy().astype(np.float64)
    means = np.concatenate([(law.means - coder.mean.numpy()) / std, np.ones((*law.masses.shape, 1))], axis=2)
    variances = np.concatenate([law.variances[:, :, None] / std**2, np.zeros((*law.masses.shape, 1))], axis=2)
    clean = np.concatenate([(law.sample(n, rng) - coder.mean.numpy()) / std, np.ones((rows, n, 1))], axis=2)
    observations = th.as_tensor(law.states, dtype=th.float32).repeat_interleave(n, dim=0)
    actions = th.as_tensor(law.actions, dtype=th.float32).repeat_interleave(n, dim=0)
    remaining = None if steps is None else th.full((len(actions), 1), steps)
    condition = target.condition(observations, actions, remaining)
    for level in target.sampling_levels[target.denoiser.alphas[target.sampling_levels] ** 2 <= 0.95].tolist():
        alpha, sigma = float(target.denoiser.alphas[level]), float(target.denoiser.sigmas[level])
        noisy = alpha * clean + sigma * rng.normal(size=clean.shape)
        spread = alpha**2 * variances[:, None] + sigma**2  # (rows, 1, n_components, dim)
        offsets = noisy[:, :, None] - alpha * means[:, None]
        logits = np.log(np.maximum(law.masses, 1e-300))[:, None] - 0.5 * (offsets**2 / spread + np.log(spread)).sum(axis=3)
        weights = np.exp(logits - logits.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        exact = sigma * (weights[..., None] * offsets / spread).sum(axis=2)
        x = th.as_tensor(noisy.reshape(rows * n, -1), dtype=th.float32)
        denoised = target.denoiser(x, th.full((len(x),), level), condition)
        told = ((x - alpha * denoised) / sigma).numpy().reshape(exact.shape)
        errors.append(np.square(told - exact).sum() / np.square(exact).sum())
    return float(np.mean(errors))


def energy_distance(first: np.ndarray, second: np.ndarray) -> float:
    """:return: $2 E|X - Y| - E|X - X'| - E|Y - Y'|$ of two samples"""
    return float(2.0 * cdist(first, second).mean() - cdist(first, first).mean() - cdist(second, second).mean())


def sliced_distance(first: np.ndarray, second: np.ndarray) -> float:
    """:return: mean over directions of the Wasserstein distance of the two samples' projections"""
    directions = np.random.default_rng(2).normal(size=(N_DIRECTIONS, first.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return float(np.mean([wasserstein_distance(first @ d, second @ d) for d in directions]))


def errors_of(model: BellmanDiffusion, law: Law, steps: int | None = None) -> dict[str, float | None]:
    """
    :param model: trained model
    :param law: exact measure
    :param steps: remaining states, for the finite-horizon form
    :return: by ``NAMES``; None where it does not apply
    """
    rng = np.random.default_rng(0)
    found = model.sample_future(law.states, law.actions, N_SAMPLES, seed=0, horizon=steps)
    errors: dict[str, float | None] = dict.fromkeys(NAMES)
    with th.no_grad():
        errors["noise"] = noise_error(model, law, steps)
    n_futures = 4_096 if law.variances.any() else 1_024
    total = 1.0 / (1.0 - model.gamma) if steps is None else float(steps)
    if law.variances.any():
        exact = law.sample(N_SAMPLES, rng)
        errors["energy"] = float(np.mean([energy_distance(*pair) for pair in zip(found, exact, strict=True)]))
        errors["sliced"] = float(np.mean([sliced_distance(*pair) for pair in zip(found, exact, strict=True)]))
        masses = law.masses[:, :, None]
        means = (masses * law.means).sum(axis=1)
        second = (masses * (law.means**2 + law.variances[:, :, None])).sum(axis=1)
        gaps = np.linalg.norm(found.mean(axis=1) - means, axis=1)
        errors["mean"] = float((gaps / np.linalg.norm(law.states, axis=1)).max())
        errors["std"] = float(np.abs(found.std(axis=1) / np.sqrt(second - means**2) - 1.0).max())
        rewards: list[Callable[[np.ndarray], np.ndarray]] = [lambda x: np.square(x).sum(axis=1)]
        expected = [second.sum(axis=1)]
    else:
        atoms = law.means[0]
        distances = np.linalg.norm(found[:, :, None] - atoms, axis=3)
        nearest = distances.argmin(axis=2)
        shares = np.stack([(nearest == j).mean(axis=1) for j in range(len(atoms))], axis=1)
        errors["shares"] = float(0.5 * np.abs(shares - law.masses).sum(axis=1).mean())
        errors["distance"] = float(distances.min(axis=2).mean())

        def at(goal: int) -> Callable[[np.ndarray], np.ndarray]:
            return lambda x: np.linalg.norm(x[:, None] - atoms, axis=2).argmin(axis=1) == goal

        goals = (0, 2, 3)
        rewards, expected = [at(goal) for goal in goals], [law.masses[:, goal] for goal in goals]
    values = [model.value(law.states, law.actions, reward, n_samples=n_futures, horizon=steps) / total for reward in rewards]
    relative = [np.abs(value - exact).mean() / exact.mean() for value, exact in zip(values, expected, strict=True)]
    errors["value"] = float(np.mean(relative))
    if all(np.ptp(exact) > 1e-9 for exact in expected):  # else there is no order to find
        ranks = [spearmanr(value, exact).statistic for value, exact in zip(values, expected, strict=True)]
        errors["ranks"] = float(np.min(ranks))
    return errors


class Mostly:
    """
    A policy with SB3's ``predict`` that goes left with some probability.

    :param left: that probability
    """

    def __init__(self, left: float) -> None:
        self.left, self.rng = left, np.random.default_rng(0)

    def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        return np.where(self.rng.uniform(size=(len(observation), 1)) < self.left, -1.0, 1.0).astype(np.float32), None


# Control --------------------------------------------------------------------------------------------------------------

GOALS = (np.array([0.7, 0.7]), np.array([-0.7, 0.2]), np.array([0.0, -0.8]))
POINT_STEPS, N_POINTS, N_CANDIDATES, N_FUTURES = 25, 16, 16, 16


def move(points: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """:return: where the actions take the points of the square"""
    return np.clip(points + 0.15 * actions, -1.0, 1.0)


def point_data() -> OfflineDataset:
    """:return: episodes of mixed quality: each steers towards a point of its own, with much noise"""
    rng = np.random.default_rng(0)
    n = N_DATA // POINT_STEPS
    points, own, noise = rng.uniform(-1.0, 1.0, (n, 2)), rng.uniform(-1.0, 1.0, (n, 2)), rng.uniform(0.3, 1.5, (n, 1))
    states, actions = [points], []
    for _ in range(POINT_STEPS):
        wanted = 2.0 * (own - states[-1]) + noise * rng.normal(size=(n, 2))
        actions.append(np.clip(wanted, -1.0, 1.0))
        states.append(move(states[-1], actions[-1]))
    path, taken = np.stack(states, axis=1), np.stack(actions, axis=1).reshape(-1, 2)
    return as_dataset(path[:, :-1].reshape(-1, 2), taken, path[:, 1:].reshape(-1, 2), POINT_STEPS)


def control(model: BellmanDiffusion) -> dict[str, Any]:
    """
    :param model: trained on ``point_data``
    :return: for each goal the share of return that is won over behaviour cloning, and the speed of acting
    """
    won, where, seconds = [], [], []
    for goal in GOALS:

        def reward(states: np.ndarray, goal: np.ndarray = goal) -> np.ndarray:
            return np.exp(-4.0 * np.square(states - goal).sum(axis=1))

        model.set_reward_fn(reward)
        returns = []
        for n_candidates in (N_CANDIDATES, 1):  # with one, the actor, which imitates all the time: behaviour cloning
            model.set_acting(n_candidates, N_FUTURES)
            points = np.random.default_rng(1).uniform(-1.0, 1.0, (N_POINTS, 2)).astype(np.float32)
            total = np.zeros(N_POINTS)
            for _ in range(POINT_STEPS):
                start = time.perf_counter()
                actions, _ = model.predict(points, deterministic=False)
                seconds += [time.perf_counter() - start] if n_candidates > 1 else []
                points = move(points, actions).astype(np.float32)
                total += reward(points)
            returns.append(total)
            if n_candidates > 1:
                where.append(points)
        won.append(returns[0].mean() / returns[1].mean() - 1.0)
    nearest = [[np.linalg.norm(points - goal, axis=1).mean() for goal in GOALS] for points in where]
    return {
        "won": [round(float(share), 3) for share in won],
        "goes_to_its_goal": bool(np.all(np.argmin(nearest, axis=1) == np.arange(len(GOALS)))),
        "actions_per_second": round(N_POINTS / float(np.median(seconds)), 1),
    }


# Runs -----------------------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """
    One row.

    :ivar data: makes what is learned from
    :ivar law: exact measure
    :ivar settings: constructor arguments
    :ivar measured: another policy whose measure is learned
    :ivar laws: exact measures by number of remaining states, in the place of ``law``
    """

    data: Callable[[], OfflineDataset]
    law: Law | None
    settings: dict[str, Any]
    measured: Mostly | None = None
    laws: dict[int, Law] | None = None


SCHEMES: dict[str, dict[str, Any]] = {
    "stopped": {},
    "renoised": dict(scheme="renoised"),
    "logged": dict(scheme="logged"),
    "4 steps of the log": dict(n_steps=4),
}
FALLING: dict[str, Any] = dict(learning_rate=LinearSchedule(1e-3, 0.0, 1.0))
CHECKS: dict[str, Check] = {
    **{
        f"chain, gamma {gamma}, {name}": Check(lambda: chain_data(0.5), chain_law(gamma, 0.5), dict(gamma=gamma, **scheme))
        for gamma in (0.8, 0.9)
        for name, scheme in SCHEMES.items()
    },
    "chain, gamma 0.0": Check(lambda: chain_data(0.5), chain_law(0.0, 0.5), dict(gamma=0.0)),
    "chain, gamma 0.8, DDPM's weights": Check(
        lambda: chain_data(0.5), chain_law(0.8, 0.5), dict(gamma=0.8, level_weighting="ddpm")
    ),
    "chain, gamma 0.8, no layer normalisation": Check(
        lambda: chain_data(0.5), chain_law(0.8, 0.5), dict(gamma=0.8, policy_kwargs=dict(layer_norm=False))
    ),
    "chain, horizon 6": Check(
        lambda: chain_data(0.5), None, dict(horizon=6), laws={n: chain_law(0.0, 0.5, n) for n in range(1, 7)}
    ),
    "chain, data 90 % right, policy 90 % left": Check(
        lambda: chain_data(0.9), chain_law(0.8, 0.1), dict(gamma=0.8), measured=Mostly(0.9)
    ),
    "chain, data 90 % right, logged": Check(lambda: chain_data(0.9), chain_law(0.8, 0.9), dict(gamma=0.8, scheme="logged")),
    **{
        f"ring, gamma 0.9, {name}": Check(ring_data, ring_law(0.9), dict(gamma=0.9, **scheme))
        for name, scheme in SCHEMES.items()
    },
    "ring, horizon 8": Check(ring_data, None, dict(horizon=8), laws={n: ring_law(0.0, n) for n in (2, 5, 8)}),
    "linear Gaussian, gamma 0.9": Check(linear_data, linear_law(0.9), dict(gamma=0.9)),
    "linear Gaussian, gamma 0.95": Check(linear_data, linear_law(0.95), dict(gamma=0.95)),
    "chain, gamma 0.9, rate to 0": Check(lambda: chain_data(0.5), chain_law(0.9, 0.5), dict(gamma=0.9, **FALLING)),
    "ring, gamma 0.9, rate to 0": Check(ring_data, ring_law(0.9), dict(gamma=0.9, **FALLING)),
    "linear Gaussian, gamma 0.9, rate to 0": Check(linear_data, linear_law(0.9), dict(gamma=0.9, **FALLING)),
}
POINT = "point, gamma 0.9"


def learn(
    data: OfflineDataset, settings: dict[str, Any], options: argparse.Namespace, measured: Any = None
) -> BellmanDiffusion:
    """
    :param data: to learn from
    :param settings: constructor arguments
    :param options: of the command line
    :param measured: another policy whose measure is learned
    :return: trained model
    """
    arguments: dict[str, Any] = dict(train_agent=False, seed=options.seed, device="cpu")
    model = BellmanDiffusion("MlpPolicy", None, dataset=data, **{**arguments, **settings})
    if measured is not None:
        model.set_measured_policy(measured)
    return model.learn(options.updates, log_interval=None)


def measure(check: Check, options: argparse.Namespace) -> dict[str, Any]:
    """
    :param check: to run
    :param options: of the command line
    :return: errors by ``NAMES``
    """
    model = learn(check.data(), check.settings, options, check.measured)
    if check.law is not None:
        return dict(errors_of(model, check.law))
    assert check.laws is not None
    parts = [errors_of(model, law, steps) for steps, law in check.laws.items()]
    return {name: _mean_or_none([part[name] for part in parts]) for name in NAMES}


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if len(present) == len(values) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Do what is missing, then write the table.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=None, help='rows that begin so, such as "ring"; the table waits for all')
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    folder = WORK / "bellman_checks" / f"{options.updates}-{options.seed}"
    results: dict[str, dict[str, Any]] = {}
    for name in (*CHECKS, POINT):
        file = folder / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        if not file.is_file():
            if options.only is not None and not name.startswith(tuple(options.only)):
                continue
            start = time.process_time()
            if name == POINT:
                found = control(
                    learn(point_data(), dict(gamma=0.9, train_agent=True, n_pretrain_steps=options.updates), options)
                )
            else:
                found = measure(CHECKS[name], options)
            write_json(file, {**found, "cpu_seconds": round(time.process_time() - start, 1)})
        results[name] = json.loads(file.read_text(encoding="utf-8"))
        print(name, results[name], flush=True)
    if len(results) < len(CHECKS) + 1:
        return
    point = results.pop(POINT)
    rows: list[list[str | float | int | None]] = []
    for name, found in results.items():
        bounds = dict(BOUNDS, value=0.05) if name.startswith("linear") else BOUNDS
        missed = [key for key, bound in bounds.items() if found[key] is not None and found[key] > bound]
        missed += ["ranks"] if name.startswith("chain") and found["ranks"] < 0.95 else []
        rows.append([name, *(found[key] for key in NAMES), ", ".join(missed) or "none", found["cpu_seconds"]])
    won = ", ".join(f"{100 * share:.0f} %" for share in point["won"])
    low, high = bootstrap_interval(point["won"], statistic="mean")
    write_table(
        RESULTS / "bellman_checks.json",
        "Measures that are known",
        [
            "check",
            "shares (TV)",
            "distance from states",
            "noise error",
            "energy distance",
            "sliced W1",
            "mean",
            "spread",
            "value",
            "rank correlation",
            "bounds missed",
            "CPU seconds",
        ],
        rows,
        text=(
            f"BellmanDiffusion, {options.updates:,} updates, defaults but for what the name says, seed {options.seed}; "
            "*rate to 0* falls linearly from 0.001. "
            f"*Shares*: total variation of {N_SAMPLES:,} samples, each counted for the nearest state; *distance* from it; "
            "*noise error*: of the told noise against the exact one, squared, in shares of the exact one, over levels with "
            r"$\bar\alpha \le 0.95$; *mean* in shares of the present state, *spread* per axis, the worst of five states; "
            "*value*: relative error of values for three rewards that came after training (being at a state), or a quadratic "
            "one; *rank correlation* over states and actions, the worst reward. Rows with a horizon are means over numbers "
            f"of remaining states. Bounds: {', '.join(f'{key} {bound}' for key, bound in BOUNDS.items())} (linear Gaussian: "
            "value 0.05), ranks 0.95 (chain).\n\n"
            f"A point in a square is steered by {N_CANDIDATES} candidates of {N_FUTURES} futures to three goals, after one "
            f"training: {won} more "
            f"return than behaviour cloning (the mean's 95 % bootstrap interval: {100 * low:.0f} to {100 * high:.0f} %), "
            f"{'always' if point['goes_to_its_goal'] else 'not always'} nearest to the goal that was set, "
            f"{point['actions_per_second']:.0f} actions / s in batches of {N_POINTS}."
        ),
    )


if __name__ == "__main__":
    main()
