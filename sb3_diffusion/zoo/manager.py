"""RL Zoo's experiment manager, for presets by name, our schedules, and hyperparameter files of this package."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from pprint import pprint
from typing import Any

import optuna
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import sample_her_params
from stable_baselines3.common.vec_env import VecEnv

from sb3_diffusion import ALGORITHMS, search_spaces
from sb3_diffusion.common.utils import policy_alias
from sb3_diffusion.zoo import presets

HYPERPARAMS_FILE = Path(__file__).with_name("hyperparams.yml")
HER_ARGUMENTS = ("n_sampled_goal", "goal_selection_strategy")


class DiffusionExperimentManager(ExperimentManager):
    """
    RL Zoo's manager; with algorithms of other packages it is RL Zoo's own.

    In a hyperparameter file, and on the command line, ``preset`` names published settings of the algorithm; what is written
    beside it wins. Learning rates may be schedules. Without ``policy`` the observations decide, without ``n_timesteps`` the
    preset or the algorithm.

    :param args: options of the command
    :param algo: name of the algorithm
    :param more: as RL Zoo's
    :param kwargs: as RL Zoo's; without ``config``, a hyperparameter file, that of this package is read
    """

    def __init__(self, args: argparse.Namespace, algo: str, *more: Any, **kwargs: Any) -> None:
        if algo in ALGORITHMS and kwargs.get("config") is None:
            kwargs["config"] = str(HYPERPARAMS_FILE)
        super().__init__(args, algo, *more, **kwargs)

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        hyperparams, saved = super().read_hyperparameters()
        if self.algo not in ALGORITHMS:
            return hyperparams, saved
        expanded = presets.expand(ALGORITHMS[self.algo], hyperparams)
        if "preset" in hyperparams:
            print(f"With the settings of the preset {hyperparams['preset']!r}:")
            pprint(expanded)
        return expanded, OrderedDict(sorted(expanded.items()))

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        if self.algo not in ALGORITHMS:
            return super()._preprocess_hyperparams(hyperparams)
        parsed = presets.parse_texts(hyperparams)
        # RL Zoo takes a text for a schedule of its own and refuses schedules that are ready.
        schedules = {key: value for key, value in parsed.items() if isinstance(hyperparams[key], str) and callable(value)}
        rest = {key: value for key, value in parsed.items() if key not in schedules}
        processed, *others = super()._preprocess_hyperparams(rest)
        return {**processed, **schedules}, *others

    def _preprocess_action_noise(self, hyperparams: dict[str, Any], saved_hyperparams: dict[str, Any], env: VecEnv) -> Any:
        if self.algo in ALGORITHMS:  # this is where the environment is first at hand
            for settings in (hyperparams, saved_hyperparams):
                settings.setdefault("policy", policy_alias(env.observation_space))
        return super()._preprocess_action_noise(hyperparams, saved_hyperparams, env)


def make_sampler(algo: str) -> Callable[..., dict[str, Any]]:
    """
    :param algo: name of the algorithm
    :return: what RL Zoo calls to draw its hyperparameters
    """

    def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        arguments = search_spaces.suggest(algo, trial)
        if additional_args["using_her_replay_buffer"]:
            arguments = sample_her_params(trial, arguments, additional_args["her_kwargs"])
        return arguments

    return sample


def to_arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """
    What RL Zoo calls to take over the hyperparameters of a stored trial.

    :param params: values by the names that were suggested
    :return: constructor arguments
    """
    arguments = search_spaces.to_arguments(params)
    her_arguments = {name: arguments.pop(name) for name in HER_ARGUMENTS if name in arguments}
    return {**arguments, "replay_buffer_kwargs": her_arguments} if her_arguments else arguments
