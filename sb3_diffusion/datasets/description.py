"""What the arrays of a file do not tell of the data, as JSON: spaces, environment, reference scores, name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_diffusion.datasets.offline_dataset import OfflineDataset

HDF5_KEY = "metadata/sb3_diffusion"
"""Where a file in D4RL's layout holds it."""
ARRAYS_KEY = "metadata"
"""Where a ``.npz`` file holds it."""


def describe(dataset: OfflineDataset) -> str:
    """
    :param dataset: to describe
    :return: JSON, for ``read_description``
    """
    plain = {
        "name": dataset.name,
        "env_id": None if dataset.env_spec is None else dataset.env_spec.id,
        "observation_space": _to_plain(dataset.observation_space),
        "action_space": _to_plain(dataset.action_space),
        "ref_min_score": dataset.ref_min_score,
        "ref_max_score": dataset.ref_max_score,
        "score_label": dataset.score_label,
    }
    return json.dumps(plain)


def read_description(text: str, source: str | PathLike[str]) -> dict[str, Any]:
    """
    Read what ``describe`` wrote.

    :param text: JSON
    :param source: file, for the message
    :return: ``observation_space``, ``action_space``, ``env_spec`` (None for an id that is not registered here),
        ``ref_min_score``, ``ref_max_score``, ``score_label`` and ``name``
    :raises ValueError: if it is malformed
    """
    try:
        plain = json.loads(text)
        env_id = plain["env_id"]
        known = {key: plain[key] for key in ("ref_min_score", "ref_max_score", "score_label", "name")}
        return {
            **known,
            "observation_space": _to_space(plain["observation_space"]),
            "action_space": _to_space(plain["action_space"]),
            "env_spec": gym.spec(env_id) if env_id in gym.registry else None,
        }
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"The description of the data in {source} is malformed ({error!r}): write the file again.") from error


def _to_plain(space: spaces.Space) -> dict[str, Any]:
    """:return: the space as JSON knows it; of the kinds that an ``OfflineDataset`` holds"""
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": {key: _to_plain(part) for key, part in space.spaces.items()}}
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound(space.low), "high": _bound(space.high)}
        return {"kind": "Box", **bounds, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        arrays = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"kind": "MultiDiscrete", **arrays, "dtype": str(space.dtype)}
    assert isinstance(space, spaces.MultiBinary)
    return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.n)}


def _to_space(plain: Mapping[str, Any]) -> spaces.Space:
    makers: dict[str, Callable[[], spaces.Space]] = {
        "Dict": lambda: spaces.Dict({key: _to_space(part) for key, part in plain["spaces"].items()}),
        "Box": lambda: spaces.Box(
            np.full(plain["shape"], plain["low"], plain["dtype"]),
            np.full(plain["shape"], plain["high"], plain["dtype"]),
            dtype=np.dtype(plain["dtype"]).type,
        ),
        "Discrete": lambda: spaces.Discrete(plain["n"], start=plain["start"], **_dtype(plain)),
        "MultiDiscrete": lambda: spaces.MultiDiscrete(plain["nvec"], start=plain.get("start"), **_dtype(plain)),
        "MultiBinary": lambda: spaces.MultiBinary(plain["n"]),
    }
    return makers[plain["kind"]]()


def _dtype(plain: Mapping[str, Any]) -> dict[str, Any]:
    """:return: what says the type of a space; nothing for int64, as older versions of Gymnasium have no argument for it"""
    dtype = np.dtype(plain.get("dtype", "int64"))
    return {} if dtype == np.int64 else {"dtype": dtype.type}


def _bound(array: np.ndarray) -> Any:
    """:return: one number if all are equal, as those of pictures are, else nested lists"""
    return array.reshape(-1)[0].item() if array.size and (array == array.reshape(-1)[0]).all() else array.tolist()
