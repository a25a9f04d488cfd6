"""What the arrays of a file do not tell of the data, as JSON: spaces, environment, reference scores, name."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_diffusion.datasets.env_specs import known_spec
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
    spec = dataset.env_spec
    plain = {
        "name": dataset.name,
        "env_id": None if spec is None else spec.id,
        "env_spec": None if spec is None else _spec_to_plain(spec),
        "observation_space": _to_plain(dataset.observation_space),
        "action_space": _to_plain(dataset.action_space),
        "ref_min_score": dataset.ref_min_score,
        "ref_max_score": dataset.ref_max_score,
        "score_label": dataset.score_label,
    }
    return json.dumps(plain)


def read_description(text: str, source: str | PathLike[str], env_spec: EnvSpec | None = None) -> dict[str, Any]:
    """
    Read what ``describe`` wrote.

    :param text: JSON
    :param source: file, for the message
    :param env_spec: given by the user; without it, the recorded environment as it is registered here
    :return: ``observation_space``, ``action_space``, ``env_spec`` (None with a warning if it is not registered here),
        ``ref_min_score``, ``ref_max_score``, ``score_label`` and ``name``
    :raises ValueError: if it is malformed
    """
    try:
        plain = json.loads(text)
        recorded = plain["env_id"]  # all that the first files have
        if env_spec is None and plain.get("env_spec") is not None:
            recorded = _to_spec(plain["env_spec"])
        if env_spec is None and recorded is not None:
            env_spec = known_spec(recorded, f"The data in {source}")
        known = {key: plain[key] for key in ("ref_min_score", "ref_max_score", "score_label", "name")}
        return {
            **known,
            "observation_space": _to_space(plain["observation_space"]),
            "action_space": _to_space(plain["action_space"]),
            "env_spec": env_spec,
        }
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ValueError(f"The description of the data in {source} is malformed ({error!r}): write the file again.") from error


def _spec_to_plain(spec: EnvSpec) -> dict[str, Any] | None:
    """:return: the environment with its settings, or None with a warning if JSON does not know them"""
    spec = copy.copy(spec)
    for name in ("entry_point", "vector_entry_point"):
        creator: Any = getattr(spec, name, None)
        if callable(creator):  # never called when it is read
            setattr(spec, name, f"{creator.__module__}:{getattr(creator, '__qualname__', type(creator).__qualname__)}")
    try:
        return json.loads(spec.to_json())
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"Of the environment of the data, {spec.id}, only the id is written, without its settings: {error}.", stacklevel=4
        )
        return None


def _to_spec(plain: Mapping[str, Any]) -> EnvSpec:
    """:return: the environment, of which the fields that another version of Gymnasium wrote are left out"""
    fields = {field.name for field in dataclasses.fields(EnvSpec) if field.init}
    return EnvSpec.from_json(json.dumps({name: value for name, value in plain.items() if name in fields}))


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
