"""Replay storage that knows episodes, for logged data and for live environments."""

from sb3_diffusion.buffers.samples import Batch, concat_samples
from sb3_diffusion.buffers.storage import EpisodeReplayBuffer

__all__ = ["Batch", "EpisodeReplayBuffer", "concat_samples"]
