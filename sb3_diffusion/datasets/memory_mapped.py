"""Datasets larger than memory: a folder of NumPy arrays that are mapped from the disk, not read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_diffusion.datasets.description import describe, read_description
from sb3_diffusion.datasets.numpy_files import map_npy
from sb3_diffusion.datasets.offline_dataset import OfflineDataset

MEMORY_MAPPED_SUFFIX = ".mmap"
"""How the name of such a folder ends."""
_DESCRIPTION = "dataset.json"
_COLUMNS = ("actions", "rewards", "terminations", "truncations")


class MemoryMappedWriter:
    """
    Writes a dataset part by part into a folder, so that no more than one part is ever in memory.

    ```python
    with MemoryMappedWriter("log.mmap") as writer:
        for file in sorted(Path("logs").glob("*.hdf5")):
            writer.add(load_dataset(file))
    dataset = load_dataset("log.mmap")
    ```

    The folder holds one ``.npy`` file per array and ``dataset.json``. It is there whole or not at all: it comes to its place
    when the context ends without an exception.

    :param folder: where to, a name that ends in ``.mmap``
    :raises FileExistsError: if it exists
    :raises ValueError: if the name ends in something else
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.suffix != MEMORY_MAPPED_SUFFIX:
            raise ValueError(f"The folder of a memory-mapped dataset must end in {MEMORY_MAPPED_SUFFIX}: got {self.folder}.")
        if self.folder.exists():
            raise FileExistsError(f"{self.folder} exists: choose another name, or remove it.")
        self.n_steps = 0
        self._spaces: dict[str, spaces.Space] = {}
        self._description = ""
        self._files: dict[str, _GrowingArray] = {}
        self._temporary: Path | None = None

    def __enter__(self) -> MemoryMappedWriter:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.folder.name}.", suffix=".tmp"))
        return self

    def add(self, part: OfflineDataset) -> None:
        """
        Append the episodes of a part; the last one ends with it.

        :param part: with the spaces of the first part, whose name, environment and reference scores are kept
        :raises ValueError: if its spaces are others
        :raises RuntimeError: outside of the context
        """
        if self._temporary is None:
            raise RuntimeError("A writer must be entered before it writes: `with MemoryMappedWriter(folder) as writer:`.")
        if not self._spaces:
            self._spaces = {"observation_space": part.observation_space, "action_space": part.action_space}
            self._description = describe(part)
        for field, expected in self._spaces.items():
            if (got := getattr(part, field)) != expected:
                raise ValueError(f"All parts must have the `{field}` of the first one, {expected}: got {got}.")
        for name, array in _arrays(part):
            if name not in self._files:
                self._files[name] = _GrowingArray(self._temporary / _file_name(name), array)
            self._files[name].append(array)
        self.n_steps += len(part)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._temporary is not None
        temporary, self._temporary = self._temporary, None
        try:
            for file in self._files.values():
                file.close()
            if kind is not None:
                return
            if not self._spaces:
                raise ValueError(f"Nothing was added, so that there is no dataset to write to {self.folder}.")
            (temporary / _DESCRIPTION).write_text(self._description)
            temporary.chmod(0o755)
            if self.folder.exists():
                raise FileExistsError(f"{self.folder} has come into being meanwhile: choose another name, or remove it.")
            temporary.rename(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def load_memory_mapped(
    folder: str | PathLike[str],
    *,
    env_spec: EnvSpec | None = None,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    clip_actions: bool = False,
) -> OfflineDataset:
    """
    Map the arrays of a folder that [MemoryMappedWriter][sb3_diffusion.datasets.MemoryMappedWriter] wrote. They are looked
    through once, as all data is, and stay on the disk: what is sampled is read when it is sampled. In memory are the
    flags and the index of episodes.

    :param folder: ends in ``.mmap``
    :param env_spec: environment of the data, in the place of the recorded one
    :param observation_space: in the place of the recorded one
    :param action_space: in the place of the recorded one
    :param clip_actions: clip actions outside of the action space, into memory, instead of refusing them
    :return: the flat dataset
    :raises FileNotFoundError: if there is no such folder, or a file is missing in it
    :raises ValueError: if a file is no plain array, or the data is bad
    """
    folder = Path(folder)
    if not (folder / _DESCRIPTION).is_file():
        raise FileNotFoundError(f"There is no {_DESCRIPTION} in {folder}: expected a folder that MemoryMappedWriter wrote.")
    known = read_description((folder / _DESCRIPTION).read_text(), folder, env_spec)
    given = {"observation_space": observation_space, "action_space": action_space}
    known |= {name: value for name, value in given.items() if value is not None}
    space = known["observation_space"]
    observations: dict[str, Any] = {}
    for field in ("observations", "next_observations"):
        if isinstance(space, spaces.Dict):
            observations[field] = {key: _map(folder, f"{field}/{key}") for key in space.spaces}
        else:
            observations[field] = _map(folder, field)
    columns: dict[str, Any] = {name: _map(folder, name) for name in _COLUMNS}
    return OfflineDataset(**observations, **columns, **known, clip_actions=clip_actions)


class _GrowingArray:
    """
    A ``.npy`` file that grows along its first axis; NumPy's header has room for the final length.

    :param path: of the file
    :param like: array with the type and the shape of a row
    """

    def __init__(self, path: Path, like: np.ndarray) -> None:
        self._dtype, self._row_shape = like.dtype, like.shape[1:]
        self._n_rows = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()
        self._start = self._file.tell()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._n_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_2_0(self._file, header)

    def append(self, rows: np.ndarray) -> None:
        """
        :param rows: ``(n, ...)``
        """
        np.ascontiguousarray(rows, self._dtype).tofile(self._file)
        self._n_rows += len(rows)

    def close(self) -> None:
        """Write the final length."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _arrays(dataset: OfflineDataset) -> Iterator[tuple[str, np.ndarray]]:
    """:return: pairs of name and array; those of Dict observations are called ``observations/<key>``"""
    for field in ("observations", "next_observations"):
        part = getattr(dataset, field)
        if isinstance(part, dict):
            yield from ((f"{field}/{key}", array) for key, array in part.items())
        else:
            yield field, part
    for field in _COLUMNS:
        yield field, getattr(dataset, field)


def _file_name(name: str) -> str:
    """:return: a file name for an array, whatever its key has in it"""
    field, separator, key = name.partition("/")
    return f"{field}.{quote(key, safe='')}.npy" if separator else f"{field}.npy"


def _map(folder: Path, name: str) -> np.ndarray:
    """
    :param folder: of the dataset
    :param name: of an array
    :return: it, read-only
    """
    path = folder / _file_name(name)
    if not path.is_file():
        raise FileNotFoundError(f"The dataset in {folder} is not complete: {path.name} is missing.")
    return map_npy(path)
