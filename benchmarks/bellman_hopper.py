"""
BellmanDiffusion on Hopper data of middling quality: values against Monte Carlo, agents against behaviour cloning, and cost.

    python benchmarks/bellman_hopper.py --seeds 0 1
    python benchmarks/bellman_hopper.py --cost      # the table of costs alone

Training goes on where it was stopped; rows that were measured are kept in ``benchmarks/work``.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from harness import RESULTS, WORK, describe, run, write_json, write_table
from scipy.stats import bootstrap, spearmanr

from sb3_diffusion import BellmanDiffusion, OfflineDataset, load_dataset
from sb3_diffusion.evaluation import bootstrap_interval, evaluate
from sb3_diffusion.evaluation.timing import median_milliseconds

DATA, ENV_ID = "bench/hopper/medium-v0", "Hopper-v5"
CURVES = RESULTS / "bellman_hopper_training.json"
HELD_OUT = 0.1
"""Share of the episodes, the last ones, that values are compared on and that nothing is trained on."""
CUT_WEIGHT = 0.0066
"""Largest weight of what is missing from a return that a truncation cuts: 500 steps at a discount of 0.99."""
SCHEMES: dict[str, dict[str, Any]] = {
    "stopped": {},
    "renoised": dict(scheme="renoised"),
    "logged": dict(scheme="logged"),
    "5 steps of the log": dict(n_steps=5),
    "ReBRAC, penalty on futures": dict(agent="rebrac"),
    "ReBRAC, penalty on states": dict(agent="rebrac", measure_penalty="states"),
    "measure alone": dict(train_agent=False),
}


class Cloning:
    """
    Behaviour cloning by diffusion: single candidates of a model, whatever their value.

    :param model: trained model
    """

    def __init__(self, model: BellmanDiffusion) -> None:
        self.policy = model.policy

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """As SB3's."""
        observations, _ = self.policy.obs_to_tensor(observation)
        latents = self.policy.actor.latents(len(observation), deterministic)
        with th.no_grad():
            actions = self.policy.candidates(observations, latents)
        return self.policy.unscale_action(actions.cpu().numpy()), state


def split(dataset: OfflineDataset) -> tuple[OfflineDataset, OfflineDataset]:
    """
    :param dataset: of whole episodes
    :return: what is trained on, and what is held out
    """
    cut = int(dataset.episode_ends[round((1.0 - HELD_OUT) * dataset.n_episodes) - 1]) + 1

    def part(rows: slice) -> OfflineDataset:
        names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
        return OfflineDataset(
            *(getattr(dataset, name)[rows] for name in names),
            observation_space=dataset.observation_space,
            action_space=dataset.action_space,
            env_spec=dataset.env_spec,
            ref_min_score=dataset.ref_min_score,
            ref_max_score=dataset.ref_max_score,
            name=dataset.name,
        )

    return part(slice(0, cut)), part(slice(cut, len(dataset)))


def monte_carlo(dataset: OfflineDataset, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """
    :param dataset: logged episodes
    :param gamma: discount
    :return: discounted sum of the rewards from each step on, and which of them are whole, or cut so late that it hardly counts
    """
    returns, ends, total = np.zeros(len(dataset)), dataset.terminations | dataset.truncations, 0.0
    for t in range(len(dataset) - 1, -1, -1):
        total = dataset.rewards[t] + (0.0 if ends[t] else gamma * total)
        returns[t] = total
    end = dataset.episode_ends[np.searchsorted(dataset.episode_ends, np.arange(len(dataset)))]
    whole = dataset.terminations[end] | (gamma ** (end - np.arange(len(dataset))) <= CUT_WEIGHT)
    return returns, whole


def distilled_values(model: BellmanDiffusion, observations: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param model: trained model
    :param observations: shape ``(n, dim)``
    :param actions: shape ``(n, dim)``
    :return: its distilled values of the actions and of the states, in units of the rewards, both ``(n,)``
    """
    network = model.policy.value
    scaled = th.as_tensor(model.policy.scale_action(actions), dtype=th.float32)
    with th.no_grad():
        q, v = network(th.as_tensor(observations, dtype=th.float32), scaled)
    q, v = (((network.mean + network.std * told) / (1.0 - model.gamma)).squeeze(1).numpy() for told in (q, v))
    return q, v


def values_against_returns(model: BellmanDiffusion, held_out: OfflineDataset, n: int, n_samples: int) -> dict[str, float]:
    """
    :param model: trained model
    :param held_out: logged episodes that it has not seen
    :param n: steps to compare on
    :param n_samples: futures of each
    :return: errors and rank correlations of the measure's and the distilled values
    """
    returns, whole = monte_carlo(held_out, model.gamma)
    chosen = np.random.default_rng(0).choice(np.flatnonzero(whole), n, replace=False)
    assert isinstance(held_out.observations, np.ndarray)
    observations, actions, exact = held_out.observations[chosen], held_out.actions[chosen], returns[chosen]
    parts = [slice(i, i + 100) for i in range(0, n, 100)]
    values = np.concatenate([model.value(observations[rows], actions[rows], n_samples=n_samples) for rows in parts])
    distilled, _ = distilled_values(model, observations, actions)
    result = {"variance": float(exact.var())}
    for name, told in {"measure": values, "distilled": distilled}.items():
        result[f"{name} MSE"] = float(np.square(told - exact).mean())
        result[f"{name} mean error"] = float((told - exact).mean())
        result[f"{name} rank correlation"] = float(spearmanr(told, exact).statistic)
    return result


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    :param file: where the result is kept
    :param make: makes it, if it is not there
    :return: the result
    """
    if not file.is_file():
        write_json(file, make())
    return json.loads(file.read_text(encoding="utf-8"))


def cost(dataset: OfflineDataset, options: argparse.Namespace) -> None:
    """
    Write the table of costs.

    :param dataset: to learn from
    :param options: of the command line
    """
    arguments: dict[str, Any] = dict(policy="MlpPolicy", env=None, dataset=dataset, seed=0, device="cpu")
    models = {
        name: BellmanDiffusion(**arguments, **settings).learn(2, log_interval=None) for name, settings in SCHEMES.items()
    }
    assert isinstance(dataset.observations, np.ndarray)
    one, many, model = dataset.observations[0], dataset.observations[:64], models["stopped"]

    def act(n_candidates: int, n_futures: int, observations: np.ndarray) -> Callable[[], object]:
        def part() -> object:
            model.set_acting(n_candidates, n_futures)
            return model.predict(observations)

        return part

    parts: dict[str, Callable[[], object]] = {
        f"update: {name}": (lambda each=each: each.train(1, 256))  # type: ignore[misc]
        for name, each in models.items()
    }
    parts |= {
        "action, distilled actor, 1 observation": act(1, 32, one),
        "action, distilled actor, 64 observations": act(1, 32, many),
        "action, 16 candidates of 16 futures, 1 observation": act(16, 16, one),
        "action, 32 candidates of 32 futures, 1 observation": act(32, 32, one),
        "action, 32 candidates of 64 futures, 1 observation": act(32, 64, one),
    }
    milliseconds = median_milliseconds(parts, options.repetitions)
    rows: list[list[str | float | int | None]] = [
        [name, round(value, 3), round(1e3 / value, 1)] for name, value in milliseconds.items()
    ]
    for row in rows:
        print(*row, sep="\t", flush=True)
    write_table(
        RESULTS / "bellman_cost.json",
        "BellmanDiffusion: cost of updates and actions",
        ["what", "milliseconds (median)", "per second"],
        rows,
        text=(
            f"{dataset.name}, networks of the default size, batch 256, chain of {model.n_diffusion_steps} steps, "
            f"{th.get_num_threads()} thread; medians of {options.repetitions} interleaved repetitions. Updates train "
            "everything that the setting has: measure, rewards, behaviour, value, actor."
        ),
    )


def load(path: Path, dataset: OfflineDataset) -> BellmanDiffusion:
    """
    :param path: of a checkpoint
    :param dataset: that it learns from
    :return: the model
    """
    return BellmanDiffusion.load(path, env=ENV_ID, dataset=dataset, device="cpu")


def train(name: str, dataset: OfflineDataset, seed: int, options: argparse.Namespace) -> Path:
    """
    Train what is not trained.

    :param name: of the line in the figure
    :param dataset: to learn from
    :param seed: of the run
    :param options: of the command line
    :return: folder of the checkpoint
    """
    build: Callable[..., BellmanDiffusion] = (
        BellmanDiffusion if options.preset == "none" else partial(BellmanDiffusion.from_preset, options.preset)
    )
    run(
        name,
        seed,
        lambda: build(
            policy="MlpPolicy",
            env=ENV_ID,
            dataset=dataset,
            gamma=options.gamma,
            temperature=options.temperature,
            seed=seed,
            device="cpu",
        ),
        lambda path: load(path, dataset),
        options.updates,
        ENV_ID,
        CURVES,
        n_evaluations=options.evaluations,
        dataset=dataset,
    )
    return WORK / CURVES.stem / f"{name}-seed{seed}".replace(" ", "_")


def scores_of_agents(
    model: BellmanDiffusion, folder: Path, dataset: OfflineDataset, seed: int, options: argparse.Namespace
) -> list[list[str | float | int | None]]:
    """
    :param model: trained model
    :param folder: where scores are kept
    :param dataset: that it has learned from, for the reference scores
    :param seed: of the run
    :param options: of the command line
    :return: rows of the table: the distilled actor, candidates, cloning
    """
    agents: dict[str, tuple[Any, int, int]] = {
        "distilled actor": (model, 1, options.episodes),
        f"best of {options.candidates} candidates": (model, options.candidates, options.candidate_episodes),
        "behaviour cloning by diffusion": (Cloning(model), 1, options.episodes),
    }
    scores: dict[str, np.ndarray] = {}
    for label, (agent, n_candidates, n_episodes) in agents.items():

        def play(agent: Any = agent, n_candidates: int = n_candidates, n_episodes: int = n_episodes) -> dict[str, Any]:
            model.set_acting(n_candidates, options.futures)
            model.set_random_seed(seed)
            return evaluate(
                agent, ENV_ID, n_episodes, deterministic=agent is model, seed=1_000 * seed, dataset=dataset
            ).to_dict()

        futures = f"-{options.futures}_futures" if n_candidates > 1 else ""
        found = kept(folder / f"{label.replace(' ', '_')}-{n_episodes}{futures}.json", play)
        scores[label] = np.array(found["normalized_scores"])
        print(label, scores[label].mean(), flush=True)
    cloned = scores["behaviour cloning by diffusion"]
    rows: list[list[str | float | int | None]] = []
    for label, score in scores.items():
        low, high = bootstrap_interval(score, statistic="mean")
        gain = None
        if score is not cloned:
            interval = bootstrap(
                (score, cloned), lambda x, y, axis=-1: x.mean(axis=axis) - y.mean(axis=axis), method="percentile", rng=0
            ).confidence_interval
            gain = f"{score.mean() - cloned.mean():.1f} [{interval.low:.1f}, {interval.high:.1f}]"
        rows.append([label, seed, len(score), f"{score.mean():.1f} [{low:.1f}, {high:.1f}]", gain])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train what is not trained, measure what is not measured, then write the tables.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=50_000)
    parser.add_argument("--evaluations", type=int, default=5, help="on the way, with the distilled actor")
    parser.add_argument("--episodes", type=int, default=30, help="of each row, distilled actor and cloning")
    parser.add_argument("--candidate-episodes", type=int, default=5, help="of the row with candidates, which are slow")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--futures", type=int, default=16)
    parser.add_argument("--compared", type=int, default=1_000, help="values that are compared with returns")
    parser.add_argument("--repetitions", type=int, default=30, help="of each cost")
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--temperature", type=float, default=3.0, help="of the distilled actor")
    parser.add_argument("--preset", default="locomotion", help='"none" for the defaults, with a constant learning rate')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--cost", action="store_true", help="measure costs alone")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    trained, held_out = split(load_dataset(DATA))
    if options.cost:
        cost(trained, options)
        return
    constant = options.preset == "none"
    settings = f"gamma {options.gamma:g}, temperature {options.temperature:g}"
    name = f"BellmanDiffusion, {'' if constant else f'{options.preset}, '}{settings}"
    describe(CURVES, f"BellmanDiffusion: {trained.name}", "Distilled actor, deterministic; nine tenths of the episodes.")
    rows: list[list[str | float | int | None]] = []
    errors: list[str] = []
    for seed in options.seeds:
        folder = train(name, trained, seed, options)
        model = load(folder / "checkpoint.zip", trained)
        compared = kept(
            folder / f"values-{options.compared}.json", partial(values_against_returns, model, held_out, options.compared, 128)
        )
        errors.append(
            f"Seed {seed}: returns vary by {compared['variance']:,.0f} (variance); "
            + "; ".join(
                f"{title} has a mean squared error of {compared[f'{name} MSE']:.0f}, a mean error of "
                f"{compared[f'{name} mean error']:.3g}, and a rank correlation of {compared[f'{name} rank correlation']:.3f}"
                for name, title in {"measure": "the measure", "distilled": "the distilled value"}.items()
            )
            + "."
        )
        print(errors[-1], flush=True)
        rows.extend(scores_of_agents(model, folder, trained, seed, options))
    write_table(
        RESULTS / "bellman_hopper.json",
        f"BellmanDiffusion: values and agents, {trained.name}",
        ["acting", "seed", "episodes", "score", "gain over behaviour cloning"],
        rows,
        text=(
            f"{'Defaults' if constant else f'Preset `{options.preset}`'}, "
            f"{options.updates:,} updates on nine tenths of the episodes, {settings}, {options.futures} futures "
            "per candidate; means with 95 % bootstrap intervals over episodes. Cloning draws single candidates of the same "
            "model.\n\n"
            f"Values of {options.compared:,} logged actions of the held-out episodes against the discounted sum of the "
            f"rewards that followed. {' '.join(errors)} A return is one draw, so that even exact values have an error."
        ),
    )


if __name__ == "__main__":
    main()
