"""
How greedy the distilled actor of BellmanDiffusion should be: one training, several actors, and what the advantages are worth.

Measure, rewards and values do not depend on the actor where the measure is that of the data's policy. One training therefore
serves an actor for each pair of a temperature and a largest weight, all with the weights and the batches that a training of
their own would give them.

    python benchmarks/bellman_actor_weights.py hopper-medium walker2d-expert --seeds 3 4 --compile

Needs the data of ``benchmarks/comparison.py``, whose seeds are others: what is chosen here is measured there. The data of
``pendulum``, of all qualities from falls to expert, come with the package. Trainings resume from checkpoints in
``benchmarks/work``; the tables in ``benchmarks/results`` grow over several runs.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from bellman_hopper import distilled_values, monte_carlo
from comparison import METHODS, N_UPDATES, make_parser
from comparison import TASKS as ALL_TASKS
from harness import RESULTS, WORK, run, write_table
from stable_baselines3.common.type_aliases import Schedule

from sb3_diffusion import BellmanDiffusion, OfflineDataset, load_dataset
from sb3_diffusion.bellman_diffusion import MlpPolicy
from sb3_diffusion.bellman_diffusion.networks import ClippedGaussianActor
from sb3_diffusion.buffers import FutureStateSamples
from sb3_diffusion.evaluation import evaluate


class Weighting(NamedTuple):
    """
    Arguments of BellmanDiffusion.

    :ivar temperature: of the actor
    :ivar max_weight: largest weight of an action
    """

    temperature: float
    max_weight: float

    def __str__(self) -> str:
        return f"{self.temperature:g}, {self.max_weight:g}"


WEIGHTINGS = [Weighting(*pair) for pair in ((0.5, 3), (1, 2), (1, 5), (1, 20), (1, 100), (2, 5), (2, 100), (3, 100))]
TASKS = {task: ids for task, ids in ALL_TASKS.items() if ids[1] is not None}
TASKS["pendulum"] = ("sb3-diffusion/pendulum/mixed-v0", "Pendulum-v1")
CHANGES: dict[str, dict[str, Any]] = {"pendulum": dict(gamma=0.95, policy_kwargs=dict(net_arch=[64, 64]))}
SEEDS = [3, 4]
N_EPISODES = 20
TABLE = RESULTS / "bellman_actor_weights.json"
ADVANTAGES = RESULTS / "bellman_advantages.json"
TAIL = 5
"""Percent of the actions whose advantages are the lowest, or the highest."""


class SeveralActorsPolicy(MlpPolicy):
    """One more actor for each weighting after the first; all begin with the same weights."""

    def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Schedule, *args: Any, **kwargs: Any) -> None:
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self.other_actors: dict[str, Weighting] = {}
        for i, weighting in enumerate(WEIGHTINGS[1:], start=1):
            actor = deepcopy(self.actor)
            actor.optimizer = self.make_optimizer(actor, lr_schedule(1.0))
            self.add_module(f"actor_{i}", actor)
            self.other_actors[f"actor_{i}"] = weighting

    @property
    def trained_networks(self) -> dict[str, Any]:
        """All networks that have an optimiser, by name."""
        others = {name: getattr(self, name) for name in getattr(self, "other_actors", {})}
        return {**super().trained_networks, **others}

    @property
    def actors(self) -> dict[Weighting, ClippedGaussianActor]:
        """All actors, by weighting."""
        others = {weighting: getattr(self, name) for name, weighting in self.other_actors.items()}
        return {WEIGHTINGS[0]: self.actor, **others}


class SeveralActors(BellmanDiffusion):
    """BellmanDiffusion that distils an actor for each weighting."""

    policy: SeveralActorsPolicy

    def _actor_loss(self, batch: FutureStateSamples) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        for name, weighting in self.policy.other_actors.items():
            loss, _ = self._loss_of(getattr(self.policy, name), weighting, batch)
            self._step(name, loss)
        return self._loss_of(self.policy.actor, WEIGHTINGS[0], batch)

    def _loss_of(
        self, actor: ClippedGaussianActor, weighting: Weighting, batch: FutureStateSamples
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        self.actor, (self.temperature, self.max_weight) = actor, weighting
        try:
            return super()._actor_loss(batch)
        finally:
            self.actor, (self.temperature, self.max_weight) = self.policy.actor, WEIGHTINGS[0]


def scores(model: SeveralActors, env_id: str, seed: int) -> dict[str, float]:
    """
    :param model: trained model
    :param env_id: of the environment to act in
    :param seed: of the run
    :return: normalised score of each actor, by weighting
    """
    found = {}
    for weighting, actor in model.policy.actors.items():
        result = evaluate(actor, env_id, N_EPISODES, deterministic=True, seed=1_000_000 * (seed + 1), dataset=model.dataset)
        assert result.normalized_scores is not None
        found[str(weighting)] = float(np.mean(result.normalized_scores))
        print(f"temperature and largest weight {weighting}: {found[str(weighting)]:.1f}", flush=True)
    return found


def advantages_against_returns(model: SeveralActors, dataset: OfflineDataset) -> dict[str, float]:
    """
    What the rewards that followed an action have beyond what its state explains, beside its advantage.

    :param model: trained model
    :param dataset: that it was trained on
    :return: ``slope`` of the first over the second, and the means of both over the lowest and the highest advantages
    """
    returns, whole = monte_carlo(dataset, model.gamma)
    assert isinstance(dataset.observations, np.ndarray)
    q, v = distilled_values(model, dataset.observations[whole], dataset.actions[whole])
    told, ones = q - v, np.ones_like(v)
    came = returns[whole]
    slope = np.linalg.lstsq(np.stack([ones, v, told], axis=1), came, rcond=None)[0][2]
    explained = np.stack([ones, v], axis=1)
    came = came - explained @ np.linalg.lstsq(explained, came, rcond=None)[0]
    lowest, highest = told <= np.percentile(told, TAIL), told >= np.percentile(told, 100 - TAIL)
    result = {"slope": float(slope)}
    for name, rows in {"lowest": lowest, "highest": highest}.items():
        result |= {f"{name}, told": float(told[rows].mean()), f"{name}, came": float(came[rows].mean())}
    return result


def train(task: str, dataset: OfflineDataset, seed: int, compiled: bool) -> tuple[dict[str, Any], Callable[[], SeveralActors]]:
    """
    :param task: key of ``TASKS``
    :param dataset: to learn from
    :param seed: of the run
    :param compiled: run the losses by ``torch.compile``
    :return: the record of the run, with ``scores`` by weighting, and a function that loads the trained model
    """
    env_id, method = TASKS[task][1], METHODS["BellmanDiffusion"]
    preset = method.preset
    assert env_id is not None and preset is not None
    settings: dict[str, Any] = dict(env=env_id, dataset=dataset, device="cpu", compile=compiled)

    def make() -> SeveralActors:
        arguments = dict(method.settings, **CHANGES.get(task, {}), **WEIGHTINGS[0]._asdict(), seed=seed)
        return SeveralActors.from_preset(preset, policy=SeveralActorsPolicy, **settings, **arguments)

    def load(path: Path) -> SeveralActors:
        return SeveralActors.load(path, custom_objects={"policy_class": SeveralActorsPolicy}, **settings)

    results = WORK / f"bellman_actor_weights_{task.replace('-', '_')}.json"
    record = run(
        "BellmanDiffusion",
        seed,
        make,
        load,
        N_UPDATES,
        env_id,
        results,
        n_evaluations=2,
        n_eval_episodes=N_EPISODES,
        dataset=dataset,
        about=lambda model: {"scores": scores(model, env_id, seed)},
    )
    assert record is not None
    return record, lambda: load(WORK / results.stem / f"BellmanDiffusion-seed{seed}" / "checkpoint.zip")


def rows_with(table: Path, row: list[Any]) -> list[list[Any]]:
    """
    :param table: file of a table
    :param row: of a run on some data with some seed, its first entries
    :return: the rows of the table, with this one in the place of an earlier one on the same data with the same seed
    """
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"] if table.is_file() else []
    return sorted([other for other in rows if other[:2] != row[:2]] + [row])


def add_scores(dataset: OfflineDataset, record: dict[str, Any]) -> None:
    """
    Put the scores of a run into their table.

    :param dataset: that was learned from
    :param record: of the run
    """
    row = [dataset.name, record["seed"], round(record["behavior"]["normalized_mean"], 1)]
    row += [round(record["scores"][str(weighting)], 1) for weighting in WEIGHTINGS]
    rows = rows_with(TABLE, row)
    write_table(
        TABLE,
        "BellmanDiffusion: weights of the actor's regression",
        ["data", "seed", "data's score", *map(str, WEIGHTINGS)],
        rows,
        text=(
            f"Normalised scores by `temperature, max_weight` after {N_UPDATES:,} updates, {N_EPISODES} episodes each, "
            "deterministic actions; preset `locomotion` with learning rates that fall to 0 over all updates (Pendulum: gamma "
            "0.95, layers of 64). The actors of a row share measure and values. Each row is made by "
            "`python benchmarks/bellman_actor_weights.py TASK --seeds SEED --compile`; where the last one comes from stands "
            "below."
        ),
    )


def add_advantages(dataset: OfflineDataset, seed: int, model: SeveralActors) -> None:
    """
    Put the advantages of a trained model into their table.

    :param dataset: that was learned from
    :param seed: of the run
    :param model: trained model
    """
    found = advantages_against_returns(model, dataset)
    row = [dataset.name, seed, *(round(value, 2) for value in found.values())]
    rows = rows_with(ADVANTAGES, row)
    write_table(
        ADVANTAGES,
        "BellmanDiffusion: advantages of logged actions against what followed",
        ["data", "seed", *found],
        rows,
        text=(
            "Advantages that the distilled values give to the actions of the data (*told*), and the discounted rewards that "
            "followed, less their linear regression on the value of the state (*came*), both in units of the rewards: means "
            f"over the {TAIL} % of the actions with the lowest advantages and over the {TAIL} % with the highest. *Slope* is "
            "the coefficient of the advantage in a regression of these rewards on both. Values without errors have slope 1, "
            "and come as they are told. Trained as for [the actors](#bellman_actor_weights), by the same command."
        ),
    )


def main() -> None:
    """Train what the command line asks for."""
    parser = make_parser(__doc__, list(TASKS))
    parser.set_defaults(seeds=SEEDS)
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    for seed in options.seeds:
        for task in options.tasks:
            dataset = load_dataset(TASKS[task][0])
            record, load = train(task, dataset, seed, options.compile)
            add_scores(dataset, record)
            add_advantages(dataset, seed, load())


if __name__ == "__main__":
    main()
