"""NumPy's own files, read without pickle; whatever is wrong with one is a ``ValueError`` that names it."""

from __future__ import annotations

import tokenize
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

# What NumPy, zip and the parser of an array's header raise on damaged files
_DAMAGED = (
    ValueError,
    TypeError,
    OSError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    BadZipFile,
    tokenize.TokenError,
    zlib.error,
)


def read_npz(path: Path) -> dict[str, Any]:
    """
    :param path: of a ``.npz`` file
    :return: its arrays by name
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is damaged, or holds Python objects
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (*_DAMAGED, AttributeError) as error:  # a lone array has no names
        raise ValueError(f"{path} is not a .npz file of plain arrays ({error!r}).") from error


def map_npy(path: Path) -> np.ndarray:
    """
    :param path: of a ``.npy`` file
    :return: its array, read-only, mapped from the disk
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is damaged, cut, or holds Python objects
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGED as error:
        raise ValueError(f"{path} is not a .npy file of a plain array, or was cut ({error!r}).") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is not a .npy file of a plain array.")
    return array
