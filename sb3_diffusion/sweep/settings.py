"""What a sweep runs, as a value that JSON can hold."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sb3_diffusion import ALGORITHMS
from sb3_diffusion.common.utils import check_range
from sb3_diffusion.sweep.arguments import algorithm_name, check_names
from sb3_diffusion.zoo.presets import parse_texts


@dataclass(frozen=True)
class SweepSettings:
    """
    What to run: a grid, or with ``samples`` a search.

    A grid has one trial for each algorithm, dataset, seed and combination of ``params``. A search has ``samples`` trials for
    each algorithm and dataset, whose hyperparameters Optuna chooses, a study for each pair; the seeds go round, so that
    a good setting is not one that a single seed liked. Confirm what it found by a grid over seeds.

    :param algos: names of algorithms, in any spelling
    :param datasets: sources of data (Minari ids, HDF5 files, D4RL names); None for learning online
    :param env: Gymnasium id, also as ``"module:id"``; by default the environment of each dataset
    :param seeds: seeds of the runs
    :param steps: timesteps of each run: gradient steps offline, env steps online
    :param params: values of constructor arguments by name; ``policy_kwargs.net_arch`` means an entry of ``policy_kwargs``,
        ``preset`` published settings by name; learning rates may be ``"lin_3e-4"`` or ``"cosine_3e-4"``. With ``samples`` one
        value each, which is then not searched
    :param samples: trials of the search for each algorithm and dataset; 0 for a grid
    :param evaluations: evaluations, and checkpoints, during a run, at equal distances
    :param episodes: episodes of each evaluation
    :param early_stopping: stop trials that are not among the best third at a ninth and at a third of their steps (ASHA, arXiv
        1810.05934); trials compete with those of the same algorithm and dataset only
    :param retries: how often a trial whose process died, or that raised, goes on from its last checkpoint
    :param workers: trials that run at once; None for as many as the CPUs (and GPUs) allow
    :param cpus: CPUs of a trial, which are also its threads
    :param gpus: GPUs of a trial, which may be a share of one
    :param device: device of the networks
    :param storage: folder or URI for checkpoints and states, which all machines of a cluster see; by default the folder of
        the results
    """

    algos: Sequence[str]
    datasets: Sequence[str | None] = (None,)
    env: str | None = None
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 100_000
    params: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    samples: int = 0
    evaluations: int = 10
    episodes: int = 10
    early_stopping: bool = False
    retries: int = 2
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    device: str = "auto"
    storage: str | None = None

    def check(self) -> None:
        """:raises ValueError: if a setting is out of range, or cannot go with another"""
        for algo in self.algos:
            algorithm = ALGORITHMS[algorithm_name(algo)]
            check_names(algorithm, [name for name in self.params if name != "preset"])
            for preset in self.params.get("preset", ()):
                if preset is not None:
                    algorithm.preset(preset)
        for name in ("algos", "datasets", "seeds"):
            if len(getattr(self, name)) == 0:
                raise ValueError(f"`{name}` must hold at least one: got none.")
        check_range("steps", self.steps, 1)
        check_range("evaluations", self.evaluations, 1, self.steps)
        check_range("episodes", self.episodes, 1)
        check_range("samples", self.samples, 0)
        check_range("retries", self.retries, 0)
        for name, values in self.params.items():
            for value in values:
                parse_texts({name: value})
        several = [name for name, values in self.params.items() if len(values) != 1]
        if self.samples > 0 and several:
            raise ValueError(
                "With `samples` Optuna chooses the hyperparameters, and `params` hold one value of what it shall leave alone: "
                f"got several for {', '.join(several)}."
            )

    def grid(self) -> list[dict[str, Any]]:
        """:return: algorithm, dataset, seed and hyperparameters of each trial"""
        combinations = [dict(zip(self.params, values, strict=True)) for values in itertools.product(*self.params.values())]
        return [
            {"algo": algo, "dataset": dataset, "seed": seed, "params": params}
            for algo, dataset, params, seed in itertools.product(self.algos, self.datasets, combinations, self.seeds)
        ]
