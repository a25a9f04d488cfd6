"""
Evaluation in the environment, statistics over runs, pictures and reports of them.

``episodes`` plays them, ``video`` films them, ``statistics`` averages runs, ``protocol`` trains and evaluates by a schedule,
``plots`` and ``report`` show the results.
"""

from sb3_diffusion.evaluation.episodes import EvaluationEnv, EvaluationResult, evaluate
from sb3_diffusion.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    estimate,
    interquartile_mean,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
)

__all__ = [
    "Estimate",
    "EvaluationEnv",
    "EvaluationResult",
    "bootstrap_interval",
    "estimate",
    "evaluate",
    "interquartile_mean",
    "optimality_gap",
    "performance_profile",
    "probability_of_improvement",
]
