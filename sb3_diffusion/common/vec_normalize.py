"""Statistics of SB3's ``VecNormalize``: fitted to logged data, carried in a model's file."""

from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_diffusion.datasets import OfflineDataset
from sb3_diffusion.datasets.arrays import column_moments


def _observation_statistics(env: VecNormalize) -> dict[str | None, RunningMeanStd]:
    """The running statistics by observation key; the key of a space that is no ``Dict`` is None."""
    if not env.norm_obs:
        return {}
    return dict(env.obs_rms) if isinstance(env.obs_rms, dict) else {None: env.obs_rms}


def is_unused(env: VecNormalize) -> bool:
    """
    :param env: normalising wrapper
    :return: whether it has seen no observation yet and was not loaded from a file
    """
    counts = [statistics.count for statistics in (*_observation_statistics(env).values(), env.ret_rms)]
    return max(counts) < 1.0  # a new one counts 1e-4


def fit_vec_normalize(env: VecNormalize, dataset: OfflineDataset) -> None:
    """
    Take the statistics of observations and of discounted returns from logged data, as if the wrapper had seen it.

    :param env: normalising wrapper
    :param dataset: logged data in env units
    :raises ValueError: if the wrapper sees observations of another shape than the data has, and is then left as it was
    """
    observations: Any = dataset.observations
    pairs = [
        (statistics, observations if key is None else observations[key])
        for key, statistics in _observation_statistics(env).items()
    ]
    for statistics, values in pairs:
        if statistics.mean.shape != values.shape[1:]:
            raise ValueError(
                f"The `VecNormalize` must see observations as the data has them, of shape {values.shape[1:]}: got "
                f"{statistics.mean.shape}. Let it stand outside of wrappers that change their shape: "
                "VecNormalize(VecFrameStack(env)), not VecFrameStack(VecNormalize(env))."
            )
    for statistics, values in pairs:
        _set_statistics(statistics, values)
    if env.norm_reward:
        _set_statistics(env.ret_rms, _running_returns(dataset, env.gamma))


def _set_statistics(statistics: RunningMeanStd, values: np.ndarray) -> None:
    statistics.mean, statistics.var = column_moments(values)
    statistics.count = float(len(values))


def _running_returns(dataset: OfflineDataset, gamma: float) -> np.ndarray:
    """$R_t = \\gamma R_{t-1} + r_t$ within each episode, what ``VecNormalize`` scales rewards by; shape ``(n_steps,)``."""
    returns = np.asarray(dataset.rewards, dtype=np.float64).copy()
    steps, ends = dataset.episode_starts + 1, dataset.episode_ends
    while True:  # one step of all episodes at a time
        inside = steps <= ends
        steps, ends = steps[inside], ends[inside]
        if len(steps) == 0:
            return returns
        returns[steps] += gamma * returns[steps - 1]
        steps = steps + 1


def vec_normalize_state(env: VecNormalize) -> dict[str, Any]:
    """
    :param env: normalising wrapper
    :return: its settings and statistics, in plain values and ``RunningMeanStd``
    """
    names = ["norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys", "training", "ret_rms"]
    state = {name: getattr(env, name) for name in names}
    return dict(state, obs_rms=env.obs_rms if env.norm_obs else None)


def wrap_vec_normalize(env: VecEnv, state: dict[str, Any]) -> VecEnv:
    """
    Carry a saved ``VecNormalize`` to an environment: settings and statistics into a new one around it, or the statistics
    alone into one that it has and that has seen no step, which keeps its own settings. One with statistics of its own is
    left as it is.

    :param env: vectorised env with the same spaces
    :param state: what [vec_normalize_state][sb3_diffusion.common.vec_normalize.vec_normalize_state] returned
    :return: the normalised env
    """
    own = unwrap_vec_normalize(env)
    if own is not None and not is_unused(own):
        return env
    if own is None:
        env = own = VecNormalize(env, norm_obs=state["norm_obs"], norm_obs_keys=state["norm_obs_keys"])
        for name, value in state.items():
            if name not in ("obs_rms", "ret_rms"):
                setattr(own, name, value)
    own.ret_rms = state["ret_rms"]
    if own.norm_obs and state["obs_rms"] is not None:
        own.obs_rms = state["obs_rms"]
    return env
