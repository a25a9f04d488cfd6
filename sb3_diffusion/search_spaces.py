"""
Which hyperparameters to search for each algorithm, and where: for Optuna in RL Zoo and in sweeps.

Ranges lie around the published settings. Not searched are what belongs to the budget (length of a run, updates per env
step), to the data (reward transforms), and what some settings of the user exclude (n-step returns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

NET_ARCHS: dict[str, list[int]] = {
    "small": [64, 64],
    "medium": [256, 256],
    "large": [256, 256, 256],
    "verybig": [512, 512, 512],
}
"""Hidden layers by the name that a trial knows them by."""


def suggest(algo: str, trial: optuna.Trial) -> dict[str, Any]:
    """
    Draw hyperparameters of an algorithm.

    :param algo: name of the algorithm, a key of ``ALGORITHMS``
    :param trial: Optuna's trial, which afterwards holds the drawn values as ``trial.params``
    :return: constructor arguments
    :raises ValueError: if there is no search space of that name
    """
    if algo not in SEARCH_SPACES:
        raise ValueError(f"There is no search space for {algo!r}; there are: {', '.join(SEARCH_SPACES)}.")
    trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True)
    trial.suggest_int("batch_size_pow", 5, 10)
    SEARCH_SPACES[algo](trial)
    return to_arguments(trial.params)


def to_arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """
    Turn the values that a trial holds into constructor arguments.

    ``x_pow`` is the exponent of two of ``x``, ``one_minus_gamma`` lies on a logarithmic scale where ``gamma`` does not, and
    ``net_arch`` names an entry of ``NET_ARCHS``.

    :param params: values by the names that were suggested
    :return: constructor arguments
    """
    arguments: dict[str, Any] = {}
    for name, value in params.items():
        if name.endswith("_pow"):
            arguments[name.removesuffix("_pow")] = 2**value
        elif name == "one_minus_gamma":
            arguments["gamma"] = 1.0 - value
        elif name == "net_arch":
            arguments["policy_kwargs"] = {"net_arch": list(NET_ARCHS[value])}
        else:
            arguments[name] = value
    return arguments


def _suggest_value_learning(trial: optuna.Trial) -> None:
    trial.suggest_float("one_minus_gamma", 1e-3, 3e-2, log=True)
    trial.suggest_float("tau", 1e-3, 5e-2, log=True)
    trial.suggest_categorical("net_arch", list(NET_ARCHS))


def _dtql(trial: optuna.Trial) -> None:
    _suggest_value_learning(trial)
    trial.suggest_float("trust_region_coef", 0.05, 50.0, log=True)
    trial.suggest_float("q_coef", 0.05, 5.0, log=True)
    trial.suggest_categorical("expectile", [0.5, 0.7, 0.9])
    trial.suggest_categorical("ema_decay", [0.0, 0.995, 0.999, 0.9995])


def _diffusion_ql(trial: optuna.Trial) -> None:
    _suggest_value_learning(trial)
    trial.suggest_float("q_coef", 5e-3, 5.0, log=True)
    trial.suggest_float("max_grad_norm", 1.0, 10.0)
    trial.suggest_int("n_diffusion_steps", 3, 10)
    trial.suggest_categorical("max_q_backup", [False, True])
    trial.suggest_categorical("ema_decay", [0.995, 0.999, 0.9995])


def _diffuser(trial: optuna.Trial) -> None:
    trial.suggest_int("horizon_pow", 3, 7)
    trial.suggest_int("n_diffusion_steps", 10, 100, log=True)
    trial.suggest_float("one_minus_gamma", 1e-3, 3e-2, log=True)
    trial.suggest_float("tau", 5e-4, 5e-3, log=True)
    trial.suggest_float("guidance_scale", 1e-4, 1.0, log=True)
    trial.suggest_int("n_guidance_steps", 1, 4)
    trial.suggest_int("t_stopgrad", 0, 4)
    trial.suggest_int("n_candidates_pow", 0, 6)
    trial.suggest_categorical("action_weight", [1.0, 10.0])


def _diffsr(trial: optuna.Trial) -> None:
    _suggest_value_learning(trial)
    trial.suggest_categorical("actor_type", ["td3", "sac"])
    trial.suggest_int("feature_dim_pow", 6, 9)
    trial.suggest_int("n_frequencies_pow", 6, 9)
    trial.suggest_float("feature_learning_rate", 3e-5, 3e-3, log=True)
    trial.suggest_float("reward_coef", 0.01, 1.0, log=True)
    trial.suggest_float("bc_coef", 0.05, 2.0, log=True)


def _bellman_diffusion(trial: optuna.Trial) -> None:
    trial.suggest_float("one_minus_gamma", 3e-3, 1e-1, log=True)
    trial.suggest_float("tau", 5e-3, 1e-1, log=True)
    trial.suggest_categorical("net_arch", list(NET_ARCHS))
    trial.suggest_int("n_diffusion_steps", 10, 50, log=True)
    trial.suggest_categorical("level_weighting", ["uniform", "ddpm"])
    trial.suggest_float("temperature", 0.1, 10.0, log=True)
    trial.suggest_float("max_weight", 1.0, 1e3, log=True)


SEARCH_SPACES: dict[str, Callable[[optuna.Trial], None]] = {
    "dtql": _dtql,
    "diffusion_ql": _diffusion_ql,
    "diffuser": _diffuser,
    "diffsr": _diffsr,
    "bellman_diffusion": _bellman_diffusion,
}
"""What an algorithm has beyond learning rate and batch size, by its name in ``ALGORITHMS``."""
