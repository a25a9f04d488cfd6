"""Diffusion-model reinforcement learning as Stable-Baselines3 algorithm classes."""

from sb3_diffusion.buffers import EpisodeReplayBuffer
from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.utils import CosineSchedule
from sb3_diffusion.datasets import OfflineDataset, load_dataset, make_env
from sb3_diffusion.diffusion_ql import DiffusionQL
from sb3_diffusion.dtql import DTQL

__version__ = "0.1.0"

ALGORITHMS: dict[str, type[OfflineAlgorithm]] = {"dtql": DTQL, "diffusion_ql": DiffusionQL}
"""The algorithms by the name that the command line knows them by."""

__all__ = [
    "ALGORITHMS",
    "DTQL",
    "CosineSchedule",
    "DiffusionQL",
    "EpisodeReplayBuffer",
    "OfflineAlgorithm",
    "OfflineDataset",
    "__version__",
    "load_dataset",
    "make_env",
]
