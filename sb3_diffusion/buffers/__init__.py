"""Replay storage that knows episodes, for logged data and for live environments."""

from sb3_diffusion.buffers.samples import concat_samples
from sb3_diffusion.buffers.storage import EpisodeReplayBuffer

__all__ = ["EpisodeReplayBuffer", "concat_samples"]
