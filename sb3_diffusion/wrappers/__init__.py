"""Environments whose steps follow plans, and environments that hide a part of what they are."""

from sb3_diffusion.wrappers.masking import VelocityMask
from sb3_diffusion.wrappers.planning import PlanningWrapper, VecPlanningWrapper

__all__ = ["PlanningWrapper", "VecPlanningWrapper", "VelocityMask"]
