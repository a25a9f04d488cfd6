"""Diffusion-QL: a diffusion model of actions that follows the action value through its whole reverse chain."""

from sb3_diffusion.diffusion_ql.diffusion_ql import DiffusionQL
from sb3_diffusion.diffusion_ql.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "DiffusionQL", "MlpPolicy", "MultiInputPolicy"]
