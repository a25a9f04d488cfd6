"""HDF5 files, read with care: data of this file alone, and no more than it can hold, or an error says why not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

MAX_RATIO, SLACK = 1_100, 64 * 2**20
"""DEFLATE packs 1,032 bytes into one at best: what claims more than that, and these bytes, is false."""
MAX_DEPTH = 16


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """
    Open a file for reading.

    :param path: of the file
    :return: context of an ``h5py.File``
    :raises ValueError: if the file is damaged, wherever in the block this is found
    :raises ImportError: without h5py
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('HDF5 files need the package h5py: pip install "sb3-diffusion[minari]"') from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, MemoryError, OverflowError, TypeError) as error:  # as h5py finds damage
        raise ValueError(
            f"{path} is not a readable HDF5 file, or is damaged ({type(error).__name__}: {error}): download or write it again."
        ) from error


def child(group: Any, name: str) -> Any:
    """
    :param group: HDF5 group or file
    :param name: of one of its members
    :return: the member
    :raises ValueError: if it lies in another file
    """
    import h5py

    if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
        raise ValueError(f"{group.file.filename} takes {name!r} from another file: refused. Copy the data into one file.")
    return group[name]


def read_tree(node: Any, depth: int = 0) -> Any:
    """
    Read an HDF5 dataset, or a group of them; floats become float32 on the way in, without a second copy.

    :param node: dataset or group
    :param depth: of the group in others
    :return: array, or nested dict of arrays
    :raises ValueError: if the data are elsewhere, cannot be in the file, or lie in groups without end
    """
    if not hasattr(node, "shape"):
        if depth == MAX_DEPTH:
            raise ValueError(f"{node.file.filename} has groups in groups, more than {MAX_DEPTH} deep: refused.")
        return {key: read_tree(child(node, key), depth + 1) for key in node}
    if node.external or node.is_virtual:
        raise ValueError(f"{node.file.filename} has {node.name!r} in another file: refused. Copy the data into one file.")
    if node.dtype.kind not in "fiubO" or node.shape is None:
        raise ValueError(f"{node.file.filename} must hold numbers: {node.name!r} is of type {node.dtype}.")
    if node.nbytes > MAX_RATIO * node.id.get_storage_size() + SLACK:
        raise ValueError(
            f"{node.file.filename} claims {node.nbytes / 2**30:.1f} GiB for {node.name!r}, of shape {node.shape}, and holds "
            f"{node.id.get_storage_size()} bytes of it: the file was cut short, or is no honest file."
        )
    if node.dtype.kind != "f" or node.dtype == np.float32 or not node.size:
        return node[()]
    array = np.empty(node.shape, np.float32)
    node.read_direct(array)
    return array
