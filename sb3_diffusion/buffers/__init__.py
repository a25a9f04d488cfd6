"""Replay storage that knows episodes, for logged data and for live environments."""

from sb3_diffusion.buffers.future_state import FutureStateReplayBuffer
from sb3_diffusion.buffers.samples import Batch, FutureStateSamples, TrajectorySamples, concat_samples
from sb3_diffusion.buffers.storage import EpisodeReplayBuffer
from sb3_diffusion.buffers.trajectory import TrajectoryReplayBuffer

__all__ = [
    "Batch",
    "EpisodeReplayBuffer",
    "FutureStateReplayBuffer",
    "FutureStateSamples",
    "TrajectoryReplayBuffer",
    "TrajectorySamples",
    "concat_samples",
]
