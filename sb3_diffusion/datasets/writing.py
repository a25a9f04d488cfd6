"""Logged data into files: D4RL's HDF5 layout, Minari, or NumPy arrays. ``load_dataset`` reads all of them back."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_diffusion.datasets.arrays import Observations, place_of
from sb3_diffusion.datasets.d4rl_hdf5 import ARRAYS_SUFFIX, HDF5_SUFFIXES
from sb3_diffusion.datasets.description import ARRAYS_KEY, HDF5_KEY, describe
from sb3_diffusion.datasets.memory_mapped import MEMORY_MAPPED_SUFFIX, MemoryMappedWriter
from sb3_diffusion.datasets.minari_dataset import MINARI_EXTRA, minari_root
from sb3_diffusion.datasets.offline_dataset import OfflineDataset


def write_dataset(dataset: OfflineDataset, target: str | PathLike[str]) -> str:
    """
    Write a dataset; the target decides how.

    | target | what is written |
    |---|---|
    | a path that ends in `.hdf5` or `.h5` | a file in D4RL's layout |
    | a path that ends in `.npz` | NumPy arrays, without pickle |
    | a path that ends in `.mmap` | a folder of arrays that are mapped from the disk when they are read |
    | an id that ends in a version, such as `my/robot/log-v0` | a Minari dataset in Minari's folder |

    Arrays, ends of episodes, spaces, reference scores and the environment with its settings come back exactly. Nothing that
    exists is overwritten, and a file is there whole or not at all.

    :param dataset: what to write
    :param target: where to
    :return: the target, as ``load_dataset`` takes it
    :raises FileExistsError: if the target exists
    :raises ValueError: on a target of another kind, or data that it cannot hold
    :raises ImportError: without h5py or minari; names the extra to install
    """
    name = os.fspath(target)
    suffix = Path(name).suffix
    if suffix in HDF5_SUFFIXES:
        write_d4rl(dataset, name)
    elif suffix == ARRAYS_SUFFIX:
        write_arrays(dataset, name)
    elif suffix == MEMORY_MAPPED_SUFFIX:
        with MemoryMappedWriter(name) as writer:
            writer.add(dataset)
    elif re.search(r"-v\d+$", name):
        write_minari(dataset, name)
    else:
        raise ValueError(
            f"Expected a path that ends in .hdf5, .h5, {ARRAYS_SUFFIX} or {MEMORY_MAPPED_SUFFIX}, or a Minari id with a "
            f"version such as my/robot/log-v0: got {name!r}."
        )
    return name


def write_d4rl(dataset: OfflineDataset, path: str | PathLike[str]) -> None:
    """
    Write a file in D4RL's layout, compressed; what else is known of the data stands below ``metadata``.

    :param dataset: what to write
    :param path: of the file
    :raises FileExistsError: if it exists
    :raises ImportError: without h5py
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('HDF5 files need the package h5py: pip install "sb3-diffusion[minari]"') from error

    with _new_file(path) as temporary, h5py.File(temporary, "w") as file:
        for name, array in _flat_arrays(dataset).items():
            file.create_dataset(name, data=array, compression="gzip" if array.size else None)
        file[HDF5_KEY] = describe(dataset)


def write_arrays(dataset: OfflineDataset, path: str | PathLike[str]) -> None:
    """
    Write NumPy's ``.npz``, compressed, with D4RL's names; entries of Dict observations are called ``observations/<key>``.

    :param dataset: what to write
    :param path: of the file
    :raises FileExistsError: if it exists
    """
    with _new_file(path) as temporary, open(temporary, "wb") as file:
        arrays: dict[str, Any] = {**_flat_arrays(dataset), ARRAYS_KEY: np.array(describe(dataset))}
        np.savez_compressed(file, **arrays)


def write_minari(dataset: OfflineDataset, dataset_id: str) -> None:
    """
    Let Minari write a dataset into its folder (``MINARI_DATASETS_PATH``, or ``~/.minari/datasets``).

    :param dataset: what to write
    :param dataset_id: such as ``my/robot/log-v0``
    :raises FileExistsError: if there is one of that id
    :raises ValueError: if steps of an episode do not follow each other, which Minari cannot store
    :raises ImportError: without minari
    """
    try:
        from minari import create_dataset_from_buffers
        from minari.data_collector import EpisodeBuffer
    except ImportError as error:
        raise ImportError(MINARI_EXTRA) from error

    if (minari_root() / dataset_id).exists():
        raise FileExistsError(f"There is a Minari dataset {dataset_id!r} in {minari_root()}: choose another version.")
    _check_consecutive(dataset)
    minari_root().mkdir(parents=True, exist_ok=True)
    buffers = []
    for episode in dataset.episodes:
        length = episode.n_steps
        truncations = np.zeros(length, bool)
        terminations = np.zeros(length, bool)
        truncations[-1], terminations[-1] = episode.truncated, episode.terminated
        buffers.append(
            EpisodeBuffer(
                observations=_with_last(dataset.observation_space, episode.observations, episode.next_observations),
                actions=episode.actions.astype(dataset.action_space.dtype),
                rewards=episode.rewards,
                terminations=terminations,
                truncations=truncations,
                infos={},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about an environment that is not known
        written = create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=dataset.env_spec,
            eval_env=dataset.env_spec,
            observation_space=dataset.observation_space,
            action_space=dataset.action_space,
            algorithm_name="unknown",
            author="unknown",
            author_email="unknown",
            code_permalink="unknown",
            description=f"Converted from {dataset.name!r} by sb3_diffusion.",
            data_format="hdf5",
            jpeg_encoding=False,  # pictures stay as they are
        )
    if dataset.has_reference_scores:
        written.storage.update_metadata({"ref_min_score": dataset.ref_min_score, "ref_max_score": dataset.ref_max_score})


# Arrays -----------------------------------------------------------------------------------------------------------------


def _flat_arrays(dataset: OfflineDataset) -> dict[str, np.ndarray]:
    """:return: by D4RL's names; those of Dict observations are paths"""
    arrays: dict[str, np.ndarray] = {}
    for name, part in (("observations", dataset.observations), ("next_observations", dataset.next_observations)):
        arrays |= {f"{name}/{key}": array for key, array in part.items()} if isinstance(part, dict) else {name: part}
    arrays |= {"actions": dataset.actions, "rewards": dataset.rewards}
    return {**arrays, "terminals": dataset.terminations, "timeouts": dataset.truncations}


def _with_last(space: spaces.Space, observations: Observations, next_observations: Observations) -> Any:
    """:return: the T + 1 observations of an episode in the types of its space"""
    if isinstance(space, spaces.Dict):
        assert isinstance(observations, dict) and isinstance(next_observations, dict)
        return {key: _with_last(part, observations[key], next_observations[key]) for key, part in space.spaces.items()}
    assert isinstance(observations, np.ndarray) and isinstance(next_observations, np.ndarray)
    return np.concatenate([observations, next_observations[-1:]]).astype(space.dtype)


def _check_consecutive(dataset: OfflineDataset) -> None:
    """
    :param dataset: whose next observations must be the observations of the following rows
    :raises ValueError: says where they are not
    """
    followed = np.ones(len(dataset), bool)
    followed[dataset.episode_ends] = False
    rows = np.flatnonzero(followed)
    parts = dataset.observations if isinstance(dataset.observations, dict) else {"": dataset.observations}
    for key, array in parts.items():
        following = (
            dataset.next_observations[key] if isinstance(dataset.next_observations, dict) else dataset.next_observations
        )
        same = (following[rows] == array[rows + 1]).reshape(len(rows), -1).all(axis=1)
        if not same.all():
            row = int(rows[np.argmin(same)])
            raise ValueError(
                f"Minari stores one row of observations per episode, so that each next observation must be the following "
                f"observation: they differ at {place_of(row, dataset.episode_ends)} "
                f"({(~same).sum()} steps in all). Write an .hdf5 or {ARRAYS_SUFFIX} file instead."
            )


@contextmanager
def _new_file(path: str | PathLike[str]) -> Iterator[Path]:
    """
    :param path: where a file shall be
    :return: context that gives a temporary path beside it, which takes its place at the end
    :raises FileExistsError: if there is one
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another name, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
