"""Diffusion Trusted Q-Learning (arXiv 2405.19690)."""

from sb3_diffusion.dtql.dtql import DTQL
from sb3_diffusion.dtql.policies import CnnPolicy, DTQLPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["DTQL", "CnnPolicy", "DTQLPolicy", "MlpPolicy", "MultiInputPolicy"]
