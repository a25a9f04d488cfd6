"""Diff-SR: spectral features of the transition, learned as a diffusion model that is never sampled."""

from sb3_diffusion.diffsr.diffsr import DiffSR
from sb3_diffusion.diffsr.linear import LinearFit, fit_linear
from sb3_diffusion.diffsr.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "DiffSR", "LinearFit", "MlpPolicy", "MultiInputPolicy", "fit_linear"]
