"""Logged data: where it comes from, and the one flat form in which the algorithms see it. Imports no torch."""

from sb3_diffusion.datasets.d4rl_hdf5 import from_flat_arrays, load_arrays, load_d4rl
from sb3_diffusion.datasets.environments import (
    DatasetEnv,
    FlattenNestedDictObservation,
    SpacesEnv,
    find_dataset,
    make_dataset_env,
    make_env,
    time_limit,
)
from sb3_diffusion.datasets.loading import load_dataset, load_dataset_for
from sb3_diffusion.datasets.memory_mapped import MemoryMappedWriter, load_memory_mapped
from sb3_diffusion.datasets.minari_dataset import load_minari, load_minari_parts
from sb3_diffusion.datasets.offline_dataset import Episode, OfflineDataset
from sb3_diffusion.datasets.replay_buffer import from_replay_buffer
from sb3_diffusion.datasets.scripted import DEFAULT_DATASET_ID, EMBEDDED_DATASETS, embedded_dataset
from sb3_diffusion.datasets.writing import write_arrays, write_d4rl, write_dataset, write_minari

__all__ = [
    "DEFAULT_DATASET_ID",
    "EMBEDDED_DATASETS",
    "DatasetEnv",
    "Episode",
    "FlattenNestedDictObservation",
    "MemoryMappedWriter",
    "OfflineDataset",
    "SpacesEnv",
    "embedded_dataset",
    "find_dataset",
    "from_flat_arrays",
    "from_replay_buffer",
    "load_arrays",
    "load_d4rl",
    "load_dataset",
    "load_dataset_for",
    "load_memory_mapped",
    "load_minari",
    "load_minari_parts",
    "make_dataset_env",
    "make_env",
    "time_limit",
    "write_arrays",
    "write_d4rl",
    "write_dataset",
    "write_minari",
]
