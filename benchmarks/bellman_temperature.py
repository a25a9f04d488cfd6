"""
How greedy the distilled actor of BellmanDiffusion should be: one training, several actors.

Measure, rewards and values do not depend on the actor where the measure is that of the data's policy. One training therefore
serves an actor for each temperature, all with the weights and the batches that a training of their own would give them.

    python benchmarks/bellman_temperature.py hopper-medium walker2d-expert --seeds 0 1 --compile

Needs the data of ``benchmarks/comparison.py``. Trainings resume from checkpoints in ``benchmarks/work``; the table in
``benchmarks/results`` grows over several runs.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from comparison import METHODS, N_EPISODES, N_EVALUATIONS, N_UPDATES, TASKS, make_parser
from harness import RESULTS, WORK, run, write_table
from stable_baselines3.common.type_aliases import Schedule

from sb3_diffusion import BellmanDiffusion, OfflineDataset, load_dataset
from sb3_diffusion.bellman_diffusion import MlpPolicy
from sb3_diffusion.bellman_diffusion.networks import ClippedGaussianActor
from sb3_diffusion.buffers import FutureStateSamples
from sb3_diffusion.evaluation import evaluate

TEMPERATURES = (0.3, 1.0, 3.0, 10.0)
LOCOMOTION_TASKS = [task for task, (_, env_id) in TASKS.items() if env_id is not None]
TABLE = RESULTS / "bellman_temperature.json"
COLUMNS = ["data", "seed", "data's score", *(f"temperature {temperature:g}" for temperature in TEMPERATURES)]


class SeveralActorsPolicy(MlpPolicy):
    """One more actor for each temperature after the first; all begin with the same weights."""

    def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Schedule, *args: Any, **kwargs: Any) -> None:
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self.other_actors: dict[str, float] = {}
        for i, temperature in enumerate(TEMPERATURES[1:], start=1):
            actor = deepcopy(self.actor)
            actor.optimizer = self.make_optimizer(actor, lr_schedule(1.0))
            self.add_module(f"actor_{i}", actor)
            self.other_actors[f"actor_{i}"] = temperature

    @property
    def trained_networks(self) -> dict[str, Any]:
        """All networks that have an optimiser, by name."""
        others = {name: getattr(self, name) for name in getattr(self, "other_actors", {})}
        return {**super().trained_networks, **others}


class SeveralActors(BellmanDiffusion):
    """BellmanDiffusion that distils an actor for each temperature."""

    policy: SeveralActorsPolicy

    def _actor_loss(self, batch: FutureStateSamples) -> th.Tensor:
        for name, temperature in self.policy.other_actors.items():
            self._step(name, self._loss_of(getattr(self.policy, name), temperature, batch))
        return self._loss_of(self.policy.actor, TEMPERATURES[0], batch)

    def _loss_of(self, actor: ClippedGaussianActor, temperature: float, batch: FutureStateSamples) -> th.Tensor:
        self.actor, self.temperature = actor, temperature
        try:
            return super()._actor_loss(batch)
        finally:
            self.actor, self.temperature = self.policy.actor, TEMPERATURES[0]


def scores(model: SeveralActors, env_id: str, seed: int) -> dict[str, float]:
    """
    :param model: trained model
    :param env_id: of the environment to act in
    :param seed: of the run: episodes are those of the last evaluation in ``comparison.py``
    :return: normalised score of each actor, by temperature
    """
    actors = {TEMPERATURES[0]: model.policy.actor}
    actors |= {temperature: getattr(model.policy, name) for name, temperature in model.policy.other_actors.items()}
    episodes_seed = 1_000_000 * (seed + 1) + 1_000 * (N_EVALUATIONS - 1)
    found = {}
    for temperature, actor in actors.items():
        result = evaluate(actor, env_id, N_EPISODES, deterministic=True, seed=episodes_seed, dataset=model.dataset)
        assert result.normalized_scores is not None
        found[f"{temperature:g}"] = float(np.mean(result.normalized_scores))
        print(f"temperature {temperature:g}: {found[f'{temperature:g}']:.1f}", flush=True)
    return found


def train(task: str, dataset: OfflineDataset, seed: int, compiled: bool) -> dict[str, Any]:
    """
    :param task: key of ``TASKS``
    :param dataset: to learn from
    :param seed: of the run
    :param compiled: run the losses by ``torch.compile``
    :return: the record of the run, with ``scores`` by temperature
    """
    env_id, method = TASKS[task][1], METHODS["BellmanDiffusion"]
    preset = method.preset
    assert env_id is not None and preset is not None
    settings: dict[str, Any] = dict(env=env_id, dataset=dataset, device="cpu", compile=compiled)

    def make() -> SeveralActors:
        arguments = dict(method.settings, temperature=TEMPERATURES[0], seed=seed)
        return SeveralActors.from_preset(preset, policy=SeveralActorsPolicy, **settings, **arguments)

    def load(path: Path) -> SeveralActors:
        return SeveralActors.load(path, custom_objects={"policy_class": SeveralActorsPolicy}, **settings)

    record = run(
        "BellmanDiffusion",
        seed,
        make,
        load,
        N_UPDATES,
        env_id,
        WORK / f"bellman_temperature_{task.replace('-', '_')}.json",
        n_evaluations=N_EVALUATIONS,
        n_eval_episodes=N_EPISODES,
        dataset=dataset,
        about=lambda model: {"scores": scores(model, env_id, seed)},
    )
    assert record is not None
    return record


def add_row(dataset: OfflineDataset, record: dict[str, Any]) -> None:
    """
    Put a run into the table, in the place of an earlier one on the same data with the same seed.

    :param dataset: that was learned from
    :param record: of the run
    """
    row = [dataset.name, record["seed"], round(record["behavior"]["normalized_mean"], 1)]
    row += [round(record["scores"][f"{temperature:g}"], 1) for temperature in TEMPERATURES]
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"] if TABLE.is_file() else []
    rows = sorted([other for other in rows if other[:2] != row[:2]] + [row])
    write_table(
        TABLE,
        "BellmanDiffusion: temperature of the actor",
        COLUMNS,
        rows,
        text=(
            f"Normalised scores after {N_UPDATES:,} updates, {N_EPISODES} episodes each, deterministic actions; preset "
            "`locomotion` with learning rates that fall to 0 over all updates. The actors of a row share measure and values. "
            "Each row is made by `python benchmarks/bellman_temperature.py TASK --seeds SEED --compile`; where the last one "
            "comes from stands below."
        ),
    )


def main() -> None:
    """Train what the command line asks for."""
    options = make_parser(__doc__, LOCOMOTION_TASKS).parse_args()
    th.set_num_threads(options.threads)
    for seed in options.seeds:
        for task in options.tasks:
            dataset = load_dataset(TASKS[task][0])
            add_row(dataset, train(task, dataset, seed, options.compile))


if __name__ == "__main__":
    main()
