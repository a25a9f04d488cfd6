"""Evaluation in the environment: returns, lengths, normalised scores, and how sure one can be of their average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import is_wrapped, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize, unwrap_vec_wrapper

from sb3_diffusion.datasets.env_specs import register_robotics
from sb3_diffusion.evaluation.statistics import Statistic, bootstrap_interval, interquartile_mean

if TYPE_CHECKING:
    from sb3_diffusion.datasets import OfflineDataset

EvaluationEnv = str | EnvSpec | gym.Env | VecEnv | Callable[[], gym.Env]

_OBSERVATION_STATISTICS = ("norm_obs", "norm_obs_keys", "obs_rms", "clip_obs", "epsilon")
"""Attributes of a ``VecNormalize`` that decide what becomes of an observation."""
# Envs that step together by default when this module makes them: one call of `predict` serves all of them.
DEFAULT_N_ENVS = 10


@dataclass(frozen=True)
class EvaluationResult:
    """
    What [evaluate][sb3_diffusion.evaluation.evaluate] measured; one entry per episode, in the order in which they ended.

    :param returns: undiscounted sums of rewards in env units, ``(n_episodes,)``
    :param lengths: numbers of env steps, ``(n_episodes,)``
    :param normalized_scores: returns in percent of the way from a random policy (0) to an expert (100), ``(n_episodes,)``;
        None if no reference scores are known
    """

    returns: np.ndarray
    lengths: np.ndarray
    normalized_scores: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes (divisor n, as ``evaluate_policy`` reports it)."""
        return float(np.std(self.returns))

    @property
    def iqm(self) -> float:
        """Interquartile mean of the returns."""
        return interquartile_mean(self.returns)

    def confidence_interval(
        self, level: float = 0.95, statistic: Statistic = "iqm", *, normalized: bool = False, seed: int = 0
    ) -> tuple[float, float]:
        """
        Percentile bootstrap interval over episodes: how far the average would move with other episodes of the same policy.

        It says nothing about training again with another seed; for that see
        [bootstrap_interval][sb3_diffusion.evaluation.bootstrap_interval] over the scores of several runs.

        :param level: coverage, between 0 and 1
        :param statistic: ``"iqm"``, ``"mean"``, ``"median"`` or, of normalised scores, ``"optimality_gap"``
        :param normalized: of the normalised scores (percent) instead of the returns
        :param seed: of the resampling
        :return: lower and upper end; both NaN with fewer than two episodes
        :raises ValueError: if ``normalized`` and there are no normalised scores
        :raises ImportError: if scipy is not installed
        """
        scores = self.returns
        if normalized:
            if self.normalized_scores is None:
                raise ValueError(
                    "There are no normalised scores: expected reference scores from the dataset or from `ref_min_score` and "
                    "`ref_max_score`, got none; pass them to `evaluate`."
                )
            scores = self.normalized_scores
        return bootstrap_interval(scores, statistic=statistic, level=level, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """
        The measurement as plain Python numbers and lists, ready for JSON.

        :return: ``returns``, ``lengths``, ``normalized_scores`` (None if unknown), ``mean`` and ``std``
        """
        scores = self.normalized_scores
        return {
            "returns": [float(value) for value in self.returns],
            "lengths": [int(value) for value in self.lengths],
            "normalized_scores": None if scores is None else [float(value) for value in scores],
            "mean": self.mean,
            "std": self.std,
        }


def evaluate(
    model: PolicyPredictor,
    env: EvaluationEnv,
    n_episodes: int = 10,
    *,
    n_envs: int | None = None,
    deterministic: bool = True,
    seed: int | None = None,
    dataset: OfflineDataset | None = None,
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    progress_bar: bool = False,
) -> EvaluationResult:
    """
    Run whole episodes with a policy, several envs at once, and collect what came out of each.

    The episodes are played by SB3's ``evaluate_policy``: each env gets its share of them beforehand, so that short episodes
    are not preferred, and a stateful controller gets back its ``state`` with ``episode_start``. Envs that are made here are
    closed again; an env that is passed in is reset and stays open. A model that was trained with ``VecNormalize`` sees
    observations normalised by its own frozen statistics, whatever env it is evaluated in, also one with another
    ``VecNormalize``; returns are always those of the env itself. The model's own training env may be passed, but a training
    run that goes on starts a new episode then.

    Normalised scores come from ``ref_min_score`` and ``ref_max_score`` if given, else from ``dataset``, else from the
    dataset that is attached to the model.

    :param model: anything with SB3's ``predict``
    :param env: Gymnasium id, ``EnvSpec``, function that makes an env, Gymnasium env, or VecEnv
    :param n_episodes: number of episodes in total, at least 1
    :param n_envs: envs that step together, for an id, spec or function; None: ``min(n_episodes, 10)``.
        An env or a VecEnv brings its own number.
    :param deterministic: passed to ``predict``
    :param seed: seeds the envs (env i gets ``seed + i``); the policy's own noise is seeded by the model
    :param dataset: whose reference scores to use
    :param ref_min_score: return that counts as 0 %
    :param ref_max_score: return that counts as 100 %
    :param progress_bar: show how many episodes have ended
    :return: returns, lengths and normalised scores, one per episode
    :raises ValueError: if ``n_episodes`` or ``n_envs`` is out of range, or only one reference score is given
    :raises TypeError: if ``env`` is none of the kinds above
    """
    if n_episodes < 1:
        raise ValueError(f"`n_episodes` must be at least 1: got {n_episodes}.")
    if (ref_min_score is None) != (ref_max_score is None):
        raise ValueError(
            f"Expected both `ref_min_score` and `ref_max_score`, or neither: got {ref_min_score} and {ref_max_score}."
        )
    vec_env, made_here = _to_vec_env(env, n_episodes, n_envs, seed)
    try:
        if seed is not None:
            vec_env.seed(seed)
        with frozen_normalization(model, vec_env) as normalized_env, _episode_bar(n_episodes, progress_bar) as callback:
            returns, lengths = evaluate_policy(
                model,
                normalized_env,
                n_episodes,
                deterministic=deterministic,
                callback=callback,
                return_episode_rewards=True,
            )
    finally:
        if made_here:
            vec_env.close()
        elif isinstance(model, BaseAlgorithm) and _same_env(vec_env, model.get_env()):
            model._last_obs = None  # where its training stood is gone: the next rollout begins with a reset
    episode_returns = np.asarray(returns, dtype=np.float64)
    return EvaluationResult(
        returns=episode_returns,
        lengths=np.asarray(lengths, dtype=np.int64),
        normalized_scores=_normalized_scores(model, episode_returns, dataset, ref_min_score, ref_max_score),
    )


def _to_vec_env(env: EvaluationEnv, n_episodes: int, n_envs: int | None, seed: int | None) -> tuple[VecEnv, bool]:
    """The env as a VecEnv, and whether it was made here (and has to be closed here)."""
    if isinstance(env, VecEnv | gym.Env):
        own_n_envs = env.num_envs if isinstance(env, VecEnv) else 1
        if n_envs not in (None, own_n_envs):
            raise ValueError(
                f"`n_envs` must be {own_n_envs} or None for the env that was passed in: got {n_envs}; "
                "pass an id or a function that makes an env to choose it."
            )
        if isinstance(env, VecEnv):
            return env, False
        # Under a Monitor the returns are those of the env, not of wrappers around it.
        monitored = env if is_wrapped(env, Monitor) else Monitor(env)
        return DummyVecEnv([lambda: monitored]), False
    if n_envs is None:
        n_envs = min(n_episodes, DEFAULT_N_ENVS)
    if n_envs < 1:
        raise ValueError(f"`n_envs` must be at least 1: got {n_envs}.")
    if isinstance(env, EnvSpec):
        spec = env
        return make_vec_env(lambda: gym.make(spec), n_envs, seed), True
    if isinstance(env, str) or callable(env):
        if isinstance(env, str):
            register_robotics(env)
        return make_vec_env(env, n_envs, seed), True
    raise TypeError(
        f"Expected an env id, an EnvSpec, a function that makes an env, a Gymnasium env or a VecEnv: got {type(env).__name__}."
    )


def _same_env(first: VecEnv, second: VecEnv | None) -> bool:
    """Whether the innermost environment of both is the same object, whatever is around it."""

    def innermost(env: Any) -> Any:
        while isinstance(env, VecEnvWrapper):
            env = env.venv
        return env.envs[0].unwrapped if isinstance(env, DummyVecEnv) else env

    return second is not None and innermost(first) is innermost(second)


@contextmanager
def _episode_bar(n_episodes: int, shown: bool) -> Iterator[Callable[[dict[str, Any], dict[str, Any]], None] | None]:
    """A callback of ``evaluate_policy`` that moves a progress bar, or None."""
    if not shown:
        yield None
        return
    from tqdm.rich import tqdm

    with tqdm(total=n_episodes, unit="episode") as bar:

        def show(variables: dict[str, Any], _: dict[str, Any]) -> None:
            bar.update(int(np.sum(variables["episode_counts"])) - bar.n)

        yield show
        bar.update(n_episodes - bar.n)


@contextmanager
def frozen_normalization(model: PolicyPredictor, vec_env: VecEnv) -> Iterator[VecEnv]:
    """
    The env as the model expects it, with statistics that do not move and rewards as they are.

    An env that has its own ``VecNormalize`` gets the statistics of the model's for as long as the context lasts, or keeps its
    own if the model was trained without; another one is put under a copy of the model's.

    :param model: which may have been trained under a ``VecNormalize``
    :param vec_env: where it shall act
    :return: context that gives the env to step
    """
    get_vec_normalize_env = getattr(model, "get_vec_normalize_env", lambda: None)
    trained_with = get_vec_normalize_env()
    own = unwrap_vec_wrapper(vec_env, VecNormalize)
    if isinstance(own, VecNormalize):
        taken = {} if trained_with is None else _attributes(trained_with, *_OBSERVATION_STATISTICS)
        kept = _attributes(own, *_OBSERVATION_STATISTICS, "training", "norm_reward")
        vars(own).update(taken, training=False, norm_reward=False)
        try:
            yield vec_env
        finally:
            for name in taken.keys() - kept.keys():  # without `norm_obs` there is no `obs_rms`
                delattr(own, name)
            vars(own).update(kept)
        return
    if trained_with is None:
        yield vec_env
        return
    frozen = deepcopy(trained_with)  # without its envs, as `VecNormalize` defines it
    frozen.set_venv(vec_env)
    frozen.training, frozen.norm_reward = False, False
    yield frozen


def _attributes(owner: object, *names: str) -> dict[str, Any]:
    """:return: those of its own attributes that are there"""
    return {name: value for name, value in vars(owner).items() if name in names}


def _normalized_scores(
    model: PolicyPredictor,
    returns: np.ndarray,
    dataset: OfflineDataset | None,
    ref_min_score: float | None,
    ref_max_score: float | None,
) -> np.ndarray | None:
    if ref_min_score is not None and ref_max_score is not None:
        if ref_max_score == ref_min_score:
            raise ValueError(f"`ref_min_score` and `ref_max_score` must differ: got {ref_min_score} twice.")
        return 100.0 * (returns - ref_min_score) / (ref_max_score - ref_min_score)
    if dataset is None:
        dataset = getattr(model, "dataset", None)
    if dataset is None or not dataset.has_reference_scores:
        return None
    return np.asarray(dataset.normalized_score(returns), dtype=np.float64)
