"""D4RL's flat layout, from an HDF5 file or a dict of arrays: one long table of steps, cut into episodes by its flags."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_diffusion.datasets.arrays import Observations, as_column, check_flags, chunks, count_rows, flatten_observations
from sb3_diffusion.datasets.description import ARRAYS_KEY, HDF5_KEY, read_description
from sb3_diffusion.datasets.hdf5 import child, open_hdf5, read_tree
from sb3_diffusion.datasets.numpy_files import read_npz
from sb3_diffusion.datasets.offline_dataset import OfflineDataset
from sb3_diffusion.datasets.reference_scores import D4RL_LABEL, d4rl_env_id, d4rl_horizon, d4rl_scores
from sb3_diffusion.datasets.spaces import flatten_observation_space

_REQUIRED = ("observations", "actions", "rewards", "terminals")
# Suffixes by which a string is taken for a file.
HDF5_SUFFIXES = (".hdf5", ".h5")
ARRAYS_SUFFIX = ".npz"


class EnvironmentFacts(NamedTuple):
    """What an environment knows and bare arrays do not tell; None where it does not know it, or where it does not fit."""

    observation_space: spaces.Space | None
    action_space: spaces.Space | None
    max_episode_steps: int | None


AskEnvironment = Callable[[Observations], EnvironmentFacts]
"""Called with the observations of the data."""


def d4rl_folder() -> Path:
    """Folder of D4RL's files: ``D4RL_DATASET_DIR``, or ``~/.d4rl/datasets``."""
    folder = os.environ.get("D4RL_DATASET_DIR")
    return Path(folder) if folder else Path.home() / ".d4rl" / "datasets"


def find_d4rl_file(name: str) -> Path | None:
    """
    Find the file of a D4RL task; ``hopper-medium-v2`` may be stored as ``hopper_medium-v2.hdf5``.

    :param name: of the task, with or without the suffix ``.hdf5``
    :return: None if there is no such file in ``d4rl_folder()``
    """
    folder = d4rl_folder()
    if not folder.is_dir():
        return None
    wanted = name.removesuffix(".hdf5").replace("_", "-").lower()
    files = {path.stem.replace("_", "-").lower(): path for path in sorted(folder.glob("*.hdf5"))}
    # maze2d-umaze-v1 is stored as maze2d-umaze-sparse-v1.hdf5
    stem, _, version = wanted.rpartition("-")
    return files.get(wanted) or files.get(f"{stem}-sparse-{version}")


def load_d4rl(
    path: str | os.PathLike[str],
    *,
    env_spec: EnvSpec | None = None,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    clip_actions: bool = False,
    ask_environment: AskEnvironment | None = None,
) -> OfflineDataset:
    """
    Read a file in D4RL's layout (see ``from_flat_arrays`` for its fields and how episodes are cut).

    The name of the file gives the reference scores, the time limit for data without ``timeouts``, and for hopper,
    halfcheetah and walker2d the Gymnasium environment. D4RL's own package is not needed.

    :param path: an ``.hdf5`` file, or the name of a task whose file lies in ``D4RL_DATASET_DIR`` (``~/.d4rl/datasets``)
    :param env_spec: environment of the data, if the name of the file does not tell
    :param observation_space: unbounded Box by default
    :param action_space: Box from -1 to 1 by default
    :param clip_actions: clip actions outside of the action space instead of refusing them
    :param ask_environment: see ``from_flat_arrays``
    :return: the flat dataset
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is not in D4RL's layout, or its data is bad
    :raises ImportError: without h5py
    """
    file_path = Path(path)
    if not file_path.is_file():
        found = find_d4rl_file(file_path.name) if file_path.parent == Path(".") else None
        if found is None:
            raise FileNotFoundError(
                f"No file {str(path)!r}, and no D4RL file of that name in {d4rl_folder()}. Give the path of an .hdf5 file, or "
                "set D4RL_DATASET_DIR to the folder that holds files such as hopper_medium-v2.hdf5."
            )
        file_path = found
    name = file_path.stem
    with open_hdf5(file_path) as file:
        if "episode_0" in file:
            raise ValueError(
                f"{file_path} holds Minari episodes, not D4RL's flat arrays: load it by its Minari id (the folders under "
                "MINARI_DATASETS_PATH, such as namespace/name-v0)."
            )
        missing = [key for key in _REQUIRED if key not in file]
        if missing:
            raise ValueError(
                f"{file_path} must hold {', '.join(_REQUIRED)}: {', '.join(missing)} missing, got {sorted(file)}."
            )
        observations = read_tree(child(file, "observations"))
        arrays: dict[str, Any] = {key: read_tree(child(file, key)) for key in _REQUIRED if key != "observations"}
        for key in ("timeouts", "next_observations"):
            arrays[key] = read_tree(child(file, key)) if key in file else None
        groups = [key for key, value in arrays.items() if isinstance(value, dict) and key != "next_observations"]
        if groups:
            raise ValueError(f"{file_path} must hold arrays: {', '.join(groups)} are groups. Only observations may be.")
        description = child(file, HDF5_KEY).asstr()[()] if HDF5_KEY in file else None
    if description is not None:
        known = read_description(description, file_path, env_spec)
        return _described(
            observations, arrays, known, env_spec, observation_space, action_space, clip_actions, ask_environment
        )

    scores = d4rl_scores(name)
    if env_spec is None and isinstance(observations, np.ndarray) and arrays["actions"].ndim == 2:
        env_id = d4rl_env_id(name, observations.shape[-1], arrays["actions"].shape[-1])
        env_spec = None if env_id is None else gym.spec(env_id)
    return from_flat_arrays(
        observations,
        **arrays,
        observation_space=observation_space,
        action_space=action_space,
        env_spec=env_spec,
        horizon=d4rl_horizon(name),
        ref_min_score=None if scores is None else scores.ref_min_score,
        ref_max_score=None if scores is None else scores.ref_max_score,
        score_label=None if scores is None else D4RL_LABEL,
        name=name,
        clip_actions=clip_actions,
        copy=False,
        ask_environment=ask_environment,
    )


def load_arrays(
    path: str | os.PathLike[str],
    *,
    env_spec: EnvSpec | None = None,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    clip_actions: bool = False,
    ask_environment: AskEnvironment | None = None,
) -> OfflineDataset:
    """
    Read a ``.npz`` file with D4RL's names (see ``from_flat_arrays``); entries of Dict observations are called
    ``observations/<key>``. Pickled arrays are refused.

    :param path: the file
    :param env_spec: environment of the data
    :param observation_space: unbounded Box by default, or what the file tells
    :param action_space: Box from -1 to 1 by default, or what the file tells
    :param clip_actions: clip actions outside of the action space instead of refusing them
    :param ask_environment: see ``from_flat_arrays``
    :return: the flat dataset
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is no such file, or its data is bad
    """
    path = Path(path)
    columns = read_npz(path)
    known = read_description(str(columns.pop(ARRAYS_KEY)), path, env_spec) if ARRAYS_KEY in columns else {"name": path.stem}
    for field in ("observations", "next_observations"):
        parts = {name.partition("/")[2]: columns.pop(name) for name in list(columns) if name.startswith(f"{field}/")}
        columns |= {field: parts} if parts else {}
    missing = [key for key in _REQUIRED if key not in columns]
    if missing:
        raise ValueError(f"{path} must hold {', '.join(_REQUIRED)}: {', '.join(missing)} missing, got {sorted(columns)}.")
    arrays = {key: columns.get(key) for key in (*_REQUIRED[1:], "timeouts", "next_observations")}
    observations = columns["observations"]
    return _described(observations, arrays, known, env_spec, observation_space, action_space, clip_actions, ask_environment)


def _described(
    observations: Any,
    arrays: dict[str, Any],
    known: dict[str, Any],
    env_spec: EnvSpec | None,
    observation_space: spaces.Space | None,
    action_space: spaces.Space | None,
    clip_actions: bool,
    ask_environment: AskEnvironment | None,
) -> OfflineDataset:
    """
    :param observations: array or dict of arrays
    :param arrays: the other arguments of ``from_flat_arrays`` that hold rows
    :param known: what the file tells of the data
    :param env_spec: given by the user, who knows better
    :param observation_space: given by the user
    :param action_space: given by the user
    :param clip_actions: see ``from_flat_arrays``
    :param ask_environment: see there
    :return: the flat dataset
    """
    given = {"env_spec": env_spec, "observation_space": observation_space, "action_space": action_space}
    settings = {**known, **{key: value for key, value in given.items() if value is not None}}
    return from_flat_arrays(
        observations, **arrays, **settings, clip_actions=clip_actions, copy=False, ask_environment=ask_environment
    )


def from_flat_arrays(
    observations: Any,
    actions: Any,
    rewards: Any,
    terminals: Any,
    timeouts: Any = None,
    next_observations: Any = None,
    *,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    env_spec: EnvSpec | None = None,
    horizon: int | None = None,
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    score_label: str | None = None,
    name: str = "",
    clip_actions: bool = False,
    copy: bool = True,
    ask_environment: AskEnvironment | None = None,
) -> OfflineDataset:
    """
    Make episodes of D4RL's flat arrays.

    Row i holds the observation, the action taken in it and the reward that came. An episode ends where ``terminals`` or
    ``timeouts`` is set (where both are, it terminated). Without ``timeouts`` it also ends after ``horizon`` steps. Steps
    after the last flag form an episode that counts as truncated. Without ``next_observations`` row i + 1 holds what row i
    led to, so that the last row of a truncated episode has no successor: it is dropped and the one before it becomes the
    end. The last row of a terminated episode stays, with its own observation for the next one: action values do not look at
    it, models of next or future states take the episode to have ended there, one step early.

    :param observations: ``(N, *obs_shape)``, or a dict of such arrays
    :param actions: ``(N, *action_shape)`` in env units
    :param rewards: ``(N,)`` or ``(N, 1)``
    :param terminals: ``(N,)`` or ``(N, 1)``, true where a terminal state was reached
    :param timeouts: ``(N,)`` or ``(N, 1)``, true where an episode was cut, or None if that was not recorded
    :param next_observations: like ``observations``, or None
    :param observation_space: default: unbounded Box of the shape found (0 to 255 for uint8), or a Dict of these
    :param action_space: default: Box from -1 to 1 if all actions lie inside
    :param env_spec: environment of the data
    :param horizon: time limit for data without ``timeouts``; default: that of ``env_spec``
    :param ref_min_score: see [OfflineDataset][sb3_diffusion.OfflineDataset]
    :param ref_max_score: see there
    :param score_label: see there
    :param name: see there
    :param clip_actions: see there
    :param copy: False saves memory where rows must be dropped: the arrays given are then overwritten
    :param ask_environment: tells, of an environment, what nothing above tells: spaces and time limit. It is given the
        observations, and asked only where something is missing
    :return: the flat dataset
    :raises ValueError: on bad data, or if the action space cannot be told from the data
    :raises TypeError: on discrete actions
    """
    observations = flatten_observations(observations)
    next_observations = None if next_observations is None else flatten_observations(next_observations)
    actions, rewards, terminals = np.asarray(actions), as_column(rewards, "rewards"), as_column(terminals, "terminals")
    timeouts = None if timeouts is None else as_column(timeouts, "timeouts")
    fields = {"observations": observations, "next_observations": next_observations, "actions": actions, "rewards": rewards}
    n_rows = count_rows({**fields, "terminals": terminals, "timeouts": timeouts})
    for flags, field in ((terminals, "terminals"), (timeouts, "timeouts")):
        if flags is not None:
            check_flags(flags, field, np.flatnonzero(terminals == 1))

    if horizon is None and env_spec is not None:
        horizon = env_spec.max_episode_steps
    if ask_environment is not None:
        cut_is_known = timeouts is not None or horizon is not None
        if observation_space is None or action_space is None or not cut_is_known:
            facts = ask_environment(observations)
            observation_space = observation_space or facts.observation_space
            action_space = action_space or facts.action_space
            horizon = horizon or facts.max_episode_steps
    if action_space is None:
        action_space = _guess_action_space(actions)
    if observation_space is None:
        observation_space = _guess_observation_space(observations)
    observation_space = flatten_observation_space(observation_space)

    ends = terminals.astype(bool)
    if timeouts is not None:
        cuts = timeouts.astype(bool) & ~ends
    else:
        cuts = _cut_by_horizon(ends, horizon)
    cuts[-1] |= not ends[-1]

    if next_observations is None:
        keep = ~cuts
        keep_next = np.flatnonzero(keep) + 1
        keep_next[ends[keep]] -= 1
        # where the row after was dropped, the cut moves here
        moved = np.zeros(n_rows, bool)
        moved[:-1] = cuts[1:] & keep[:-1] & ~ends[:-1]
        if not keep.any():
            raise ValueError(
                "No step has a successor: without `next_observations` an episode of T rows that does not terminate gives "
                "T - 1 steps; got only episodes of one row."
            )
        next_observations = _rows(observations, keep_next)
        if not keep.all():
            rows = np.flatnonzero(keep)
            observations, actions, rewards = (_rows(array, rows, copy) for array in (observations, actions, rewards))
            ends, cuts = ends[rows], moved[rows]
        else:
            cuts = moved
    return OfflineDataset(
        observations,
        actions,
        rewards,
        next_observations,
        ends,
        cuts,
        observation_space=observation_space,
        action_space=action_space,
        env_spec=env_spec,
        ref_min_score=ref_min_score,
        ref_max_score=ref_max_score,
        score_label=score_label,
        name=name,
        clip_actions=clip_actions,
    )


def _cut_by_horizon(ends: np.ndarray, horizon: int | None) -> np.ndarray:
    """
    :param ends: ``(N,)`` true at terminal steps
    :param horizon: time limit, or None
    :return: ``(N,)`` true where an episode reaches the time limit without a terminal step
    """
    cuts = np.zeros(len(ends), bool)
    if horizon is None:
        return cuts
    starts = np.concatenate([[0], np.flatnonzero(ends) + 1])
    lengths = np.diff(np.append(starts, len(ends)))
    steps = np.arange(len(ends)) - np.repeat(starts, lengths)
    return ((steps + 1) % horizon == 0) & ~ends


def _guess_action_space(actions: np.ndarray) -> spaces.Box:
    """
    :param actions: ``(N, action_dim)``
    :return: Box from -1 to 1
    :raises TypeError: if they are integers
    :raises ValueError: if some lie outside
    """
    if actions.dtype.kind in "iub":
        raise TypeError(
            f"Actions must be continuous: got dtype {actions.dtype}, which looks like discrete actions. If they are real "
            "vectors, convert them to float and give `action_space`."
        )
    finite = actions[np.isfinite(actions)] if actions.dtype.kind == "f" and not np.isfinite(actions.sum()) else actions
    if finite.size and (finite.min() < -1.001 or finite.max() > 1.001):
        raise ValueError(
            f"The range of the actions is not known: got values from {finite.min()} to {finite.max()}, more than the usual "
            "-1 to 1. Give `action_space`, for instance gymnasium.spaces.Box(low, high)."
        )
    return spaces.Box(-1.0, 1.0, actions.shape[1:] or (1,), np.float32)


def _guess_observation_space(observations: Observations) -> spaces.Space:
    """
    :param observations: array or flat dict of arrays
    :return: unbounded Box, or Box of bytes for uint8, or Dict of these
    """
    if isinstance(observations, dict):
        return spaces.Dict({key: _guess_observation_space(array) for key, array in observations.items()})
    shape = observations.shape[1:] or (1,)
    if observations.dtype == np.uint8:
        return spaces.Box(0, 255, shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


def _rows(arrays: Any, rows: np.ndarray, copy: bool = True) -> Any:
    """
    :param arrays: array or dict of arrays
    :param rows: which rows
    :param copy: False moves the rows to the front of the array that is there; they must be ascending and unique
    :return: these rows
    """
    if isinstance(arrays, dict):
        return {key: _rows(array, rows, copy) for key, array in arrays.items()}
    if copy:
        return arrays[rows]
    for start, chunk in chunks(rows):
        arrays[start : start + len(chunk)] = arrays[chunk]
    return arrays[: len(rows)]
