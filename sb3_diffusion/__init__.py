"""Diffusion-model reinforcement learning as Stable-Baselines3 algorithm classes."""

from sb3_diffusion.bellman_diffusion import BellmanDiffusion
from sb3_diffusion.buffers import EpisodeReplayBuffer, FutureStateReplayBuffer, TrajectoryReplayBuffer
from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.utils import CosineSchedule
from sb3_diffusion.datasets import OfflineDataset, load_dataset, make_env
from sb3_diffusion.diffsr import DiffSR
from sb3_diffusion.diffuser import Diffuser, PDTracker, Plan
from sb3_diffusion.diffusion_ql import DiffusionQL
from sb3_diffusion.dtql import DTQL
from sb3_diffusion.wrappers import PlanningWrapper, VecPlanningWrapper

__version__ = "0.1.0"

ALGORITHMS: dict[str, type[OfflineAlgorithm]] = {
    "dtql": DTQL,
    "diffusion_ql": DiffusionQL,
    "diffuser": Diffuser,
    "diffsr": DiffSR,
    "bellman_diffusion": BellmanDiffusion,
}
"""The algorithms by the name that the command line knows them by."""

__all__ = [
    "ALGORITHMS",
    "DTQL",
    "BellmanDiffusion",
    "CosineSchedule",
    "DiffSR",
    "Diffuser",
    "DiffusionQL",
    "EpisodeReplayBuffer",
    "FutureStateReplayBuffer",
    "OfflineAlgorithm",
    "OfflineDataset",
    "PDTracker",
    "Plan",
    "PlanningWrapper",
    "TrajectoryReplayBuffer",
    "VecPlanningWrapper",
    "__version__",
    "load_dataset",
    "make_env",
]
