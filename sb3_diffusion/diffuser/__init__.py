"""Diffuser: planning as denoising of trajectories."""

from sb3_diffusion.diffuser.diffuser import Diffuser
from sb3_diffusion.diffuser.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, Plan
from sb3_diffusion.diffuser.tracking import PDTracker

__all__ = ["CnnPolicy", "Diffuser", "MlpPolicy", "MultiInputPolicy", "PDTracker", "Plan"]
