"""Minari datasets: T + 1 observations against T actions per episode, brought into the flat form."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_diffusion.datasets.arrays import flatten_observations
from sb3_diffusion.datasets.env_specs import known_spec, trusted_spec
from sb3_diffusion.datasets.hdf5 import child, open_hdf5, read_tree
from sb3_diffusion.datasets.offline_dataset import OfflineDataset
from sb3_diffusion.datasets.reference_scores import D4RL_REFERENCED_LABEL, minari_scores
from sb3_diffusion.datasets.spaces import check_action_space, flatten_observation_space

_DATASET_ID = re.compile(r"([\w-]+/)+[\w-]+-v\d+")
MINARI_EXTRA = 'Minari datasets need the package minari: pip install "sb3-diffusion[minari]"'


def minari_root() -> Path:
    """Folder in which Minari keeps its datasets: ``MINARI_DATASETS_PATH``, or ``~/.minari/datasets``."""
    root = os.environ.get("MINARI_DATASETS_PATH")
    return Path(root) if root else Path.home() / ".minari" / "datasets"


def open_minari(dataset_id: str) -> Any:
    """
    Open a local Minari dataset without reading its episodes.

    :param dataset_id: such as ``mujoco/hopper/medium-v0``
    :return: the ``minari.MinariDataset``
    :raises FileNotFoundError: if it is not on this machine; says how to get it
    :raises ValueError: if the id is malformed or the files are damaged
    :raises ImportError: without minari
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError(MINARI_EXTRA) from error

    folder = minari_root() / dataset_id
    if not (folder / "data").is_dir():
        if not _DATASET_ID.fullmatch(dataset_id):
            raise FileNotFoundError(
                f"No Minari dataset {dataset_id!r} in {minari_root()}, and no such file: ids read namespace/name-v0, "
                "`minari list remote` shows them."
            )
        raise FileNotFoundError(
            f"No Minari dataset {dataset_id!r} in {minari_root()}. Download it with `minari download {dataset_id}` "
            "(`minari list remote` shows the ids), or set MINARI_DATASETS_PATH to the folder that holds it. Nothing is "
            "downloaded on its own."
        )
    try:
        _check_metadata(folder)
        return minari.load_dataset(dataset_id)
    except (KeyError, AssertionError, OSError, ValueError) as error:
        raise ValueError(f"The Minari dataset in {folder} cannot be read: {error!r}. Download or record it again.") from error


def _check_metadata(folder: Path) -> None:
    """
    Minari makes the recorded environment, whatever code that is, where the metadata tell no spaces.

    :param folder: of the dataset
    :raises ValueError: if that environment is not one that is registered here
    """
    from minari.dataset.minari_storage import MinariStorage

    metadata = MinariStorage.read_raw_metadata(folder / "data")
    if "observation_space" in metadata and "action_space" in metadata:
        return
    recorded = EnvSpec.from_json(metadata.get("env_spec", "{}"))
    trusted = trusted_spec(recorded)
    if trusted is None or recorded.entry_point != trusted.entry_point or recorded.additional_wrappers:
        raise ValueError(
            "its metadata tell no spaces, and name no environment that is registered here to take them from; got "
            f"{recorded.id!r} with entry point {recorded.entry_point!r}"
        )


def known_environment(dataset: Any) -> EnvSpec | None:
    """
    :param dataset: a ``MinariDataset``
    :return: the environment it was recorded in, None with a warning if that is not registered here
    """
    recorded = dataset.env_spec
    return None if recorded is None else known_spec(recorded, f"The Minari dataset {dataset.id!r}")


def load_minari(dataset: Any, *, clip_actions: bool = False) -> OfflineDataset:
    """
    Read a Minari dataset into flat arrays.

    Each episode of T actions has T + 1 observations: the first T become ``observations``, the last T
    ``next_observations``. An episode that was recorded without a final flag counts as truncated. Reference scores come from
    the dataset's metadata, else from D4RL's table for the tasks in it (see ``score_label``).

    :param dataset: id of a dataset on this machine, or a ``MinariDataset`` (a filtered or combined one too)
    :param clip_actions: clip actions outside of the action space instead of refusing them
    :return: the flat dataset, with the environment that Minari recorded if it is registered here
    :raises FileNotFoundError: if the id is not on this machine
    :raises ValueError: if the data is empty or bad
    :raises TypeError: if actions are discrete, or observations of a kind that is not supported
    :raises ImportError: without minari
    """
    if isinstance(dataset, str):
        dataset = open_minari(dataset)
    check_action_space(dataset.action_space)
    observation_space = flatten_observation_space(dataset.observation_space)
    action_space: spaces.Box = dataset.action_space

    n_steps = int(dataset.total_steps)
    if n_steps == 0:
        raise ValueError(f"The Minari dataset {dataset.id!r} is empty: expected at least one step.")
    reader = _FlatReader(observation_space, action_space, n_steps)
    try:
        for episode in _iterate_episodes(dataset):
            reader.add(*episode)
    except (OSError, KeyError) as error:
        raise ValueError(
            f"The Minari dataset in {dataset.storage.data_path} cannot be read: {error!r}. Download or record it again."
        ) from error
    reader.check_full(dataset.id)

    metadata = dataset.storage.metadata
    scores: tuple[float | None, ...] = (metadata.get("ref_min_score"), metadata.get("ref_max_score"))
    label = None if None in scores else "dataset metadata"
    table = minari_scores(dataset.id)
    if label is None and table is not None:
        scores, label = tuple(table), D4RL_REFERENCED_LABEL
    return OfflineDataset(
        reader.observations,
        reader.actions,
        reader.rewards,
        reader.next_observations,
        reader.terminations,
        reader.truncations,
        observation_space=observation_space,
        action_space=action_space,
        env_spec=known_environment(dataset),
        ref_min_score=scores[0],
        ref_max_score=scores[1],
        score_label=label,
        name=dataset.id,
        clip_actions=clip_actions,
    )


def load_minari_parts(dataset: Any, n_steps: int = 1_000_000, *, clip_actions: bool = False) -> Iterator[OfflineDataset]:
    """
    Read a Minari dataset that is larger than memory, some episodes at a time.

    :param dataset: as for ``load_minari``
    :param n_steps: about how many steps of a part; whole episodes are taken
    :param clip_actions: as for ``load_minari``
    :return: iterator over flat datasets
    """
    if isinstance(dataset, str):
        dataset = open_minari(dataset)
    indices = np.asarray(dataset.episode_indices)
    n_parts = max(1, -(-int(dataset.total_steps) // n_steps))
    size = max(1, -(-len(indices) // n_parts))
    for start in range(0, len(indices), size):
        part = type(dataset)(dataset.storage, episode_indices=indices[start : start + size])
        yield load_minari(part, clip_actions=clip_actions)


class _FlatReader:
    """
    Arrays for all steps, filled episode by episode.

    :param observation_space: flat space of the observations
    :param action_space: a Box
    :param n_steps: total number of steps
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box, n_steps: int) -> None:
        self._is_dict = isinstance(observation_space, spaces.Dict)
        parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        self._observations = {key: _allocate(part, n_steps) for key, part in parts.items()}
        self._next_observations = {key: _allocate(part, n_steps) for key, part in parts.items()}
        self.actions = np.empty((n_steps, *action_space.shape), np.float32)
        self.rewards = np.empty(n_steps, np.float32)
        self.terminations = np.empty(n_steps, bool)
        self.truncations = np.empty(n_steps, bool)
        self._n_steps = n_steps
        self._row = 0
        self._episode = 0

    @property
    def observations(self) -> Any:
        """Array or dict of arrays, ``(n_steps, ...)``."""
        return self._observations if self._is_dict else self._observations[""]

    @property
    def next_observations(self) -> Any:
        """Array or dict of arrays, ``(n_steps, ...)``."""
        return self._next_observations if self._is_dict else self._next_observations[""]

    def add(
        self, observations: Any, actions: np.ndarray, rewards: np.ndarray, terminations: np.ndarray, truncations: np.ndarray
    ) -> None:
        """
        Append one episode of T steps.

        :param observations: ``(T + 1, ...)``, or a (nested) dict of such arrays
        :param actions: ``(T, ...)``
        :param rewards: ``(T,)``
        :param terminations: ``(T,)``
        :param truncations: ``(T,)``
        :raises ValueError: if lengths or shapes do not fit
        """
        length = len(rewards)
        start, end = self._row, self._row + length
        observations = flatten_observations(observations)
        parts = observations if isinstance(observations, dict) else {"": observations}
        if set(parts) != set(self._observations):
            raise ValueError(
                f"Episode {self._episode} must have the observations {sorted(self._observations)}: got {sorted(parts)}."
            )
        lengths = {f"observations {key}".strip(): len(part) - 1 for key, part in parts.items()}
        lengths |= {"actions": len(actions), "terminations": len(terminations), "truncations": len(truncations)}
        wrong = {field: got for field, got in lengths.items() if got != length}
        if wrong:
            raise ValueError(
                f"Episode {self._episode} has {length} rewards, so {length} actions and flags and {length + 1} observations "
                f"were expected: got steps {wrong} (observations less one)."
            )
        if end > self._n_steps:
            raise ValueError(f"The dataset announces {self._n_steps} steps but holds more (at episode {self._episode}).")
        if length == 0:
            self._episode += 1
            return
        for key, part in parts.items():
            _store(self._observations[key], start, end, part[:-1], f"observations {key}".strip(), self._episode)
            _store(self._next_observations[key], start, end, part[1:], f"observations {key}".strip(), self._episode)
        _store(self.actions, start, end, actions, "actions", self._episode)
        _store(self.rewards, start, end, rewards, "rewards", self._episode)
        _store(self.terminations, start, end, terminations, "terminations", self._episode)
        _store(self.truncations, start, end, truncations, "truncations", self._episode)
        if not self.terminations[end - 1]:
            self.truncations[end - 1] = True
        self._row, self._episode = end, self._episode + 1

    def check_full(self, name: str) -> None:
        """
        Make sure that all announced steps came.

        :param name: of the dataset
        :raises ValueError: if there were fewer
        """
        if self._row != self._n_steps:
            raise ValueError(
                f"The Minari dataset {name!r} announces {self._n_steps} steps but its episodes hold {self._row}: its "
                "metadata does not fit its data; download or record it again."
            )


def _allocate(space: spaces.Space, n_steps: int) -> np.ndarray:
    """
    :param space: of one observation
    :param n_steps: number of rows
    :return: uninitialised array, float32 for floats, else of the type of the space
    """
    assert space.shape is not None and space.dtype is not None
    dtype = np.dtype(np.float32) if np.dtype(space.dtype).kind == "f" else np.dtype(space.dtype)
    return np.empty((n_steps, *space.shape), dtype)


def _store(target: np.ndarray, start: int, end: int, values: np.ndarray, field: str, episode: int) -> None:
    """
    :param target: array over all steps
    :param start: first row
    :param end: row after the last
    :param values: one row per step
    :param field: name of the values
    :param episode: number of the episode
    """
    values = np.asarray(values)
    if values.shape[1:] != target.shape[1:]:
        if values.size != target[start:end].size:
            raise ValueError(f"`{field}` of episode {episode} must have shape {target[start:end].shape}: got {values.shape}.")
        values = values.reshape(target[start:end].shape)
    with np.errstate(over="ignore"):
        target[start:end] = values
    if target.dtype.kind in "iu" and values.dtype != target.dtype and not np.array_equal(target[start:end], values):
        raise ValueError(
            f"`{field}` of episode {episode} must be numbers of {target.dtype}, as its space says: got {values.min()} to "
            f"{values.max()}, of {values.dtype}. Record the dataset with the right space."
        )


_EpisodeArrays = tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _iterate_episodes(dataset: Any) -> Iterator[_EpisodeArrays]:
    """
    Give the arrays of each episode, by the quickest way there is for its storage.

    :param dataset: a ``MinariDataset``
    :return: iterator over observations, actions, rewards, terminations, truncations
    """
    storage = dataset.storage
    path = Path(storage.data_path) / "main_data.hdf5"
    encoded_images = getattr(storage, "jpeg_encoding", True) and _has_images(dataset.observation_space)
    if getattr(storage, "FORMAT", "") == "hdf5" and path.is_file() and not encoded_images:
        return _iterate_hdf5(path, dataset.episode_indices)
    episodes: Iterable[Any] = dataset.iterate_episodes()
    return ((e.observations, e.actions, e.rewards, e.terminations, e.truncations) for e in episodes)


def _has_images(space: spaces.Space) -> bool:
    """
    :param space: of the observations
    :return: whether Minari may have stored a part as compressed pictures
    """
    if isinstance(space, spaces.Dict):
        return any(_has_images(subspace) for subspace in space.spaces.values())
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)


def _iterate_hdf5(path: Path, indices: Iterable[int]) -> Iterator[_EpisodeArrays]:
    """
    Read Minari's HDF5 layout directly, leaving the recorded infos on the disk.

    :param path: the file
    :param indices: which episodes
    :return: iterator over observations, actions, rewards, terminations, truncations
    """
    with open_hdf5(path) as file:
        for index in indices:
            group = child(file, f"episode_{index}")
            names = ("observations", "actions", "rewards", "terminations", "truncations")
            yield tuple(read_tree(child(group, name)) for name in names)
