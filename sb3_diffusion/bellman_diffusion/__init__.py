"""Bellman diffusion: the successor measure of a policy as a diffusion model, and an agent that uses it."""

from sb3_diffusion.bellman_diffusion.bellman_diffusion import BellmanDiffusion
from sb3_diffusion.bellman_diffusion.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["BellmanDiffusion", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
