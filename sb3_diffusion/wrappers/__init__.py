"""Environments whose steps follow plans."""

from sb3_diffusion.wrappers.planning import PlanningWrapper, VecPlanningWrapper

__all__ = ["PlanningWrapper", "VecPlanningWrapper"]
