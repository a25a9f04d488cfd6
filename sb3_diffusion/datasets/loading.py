"""One door for every source of logged data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_diffusion.datasets.arrays import Observations
from sb3_diffusion.datasets.d4rl_hdf5 import (
    ARRAYS_SUFFIX,
    HDF5_SUFFIXES,
    AskEnvironment,
    EnvironmentFacts,
    d4rl_folder,
    find_d4rl_file,
    from_flat_arrays,
    load_arrays,
    load_d4rl,
)
from sb3_diffusion.datasets.memory_mapped import MEMORY_MAPPED_SUFFIX, load_memory_mapped
from sb3_diffusion.datasets.minari_dataset import load_minari, minari_root, open_minari
from sb3_diffusion.datasets.offline_dataset import OfflineDataset
from sb3_diffusion.datasets.replay_buffer import from_replay_buffer
from sb3_diffusion.datasets.scripted import DEFAULT_DATASET_ID, EMBEDDED_DATASETS, NAMESPACE, embedded_dataset
from sb3_diffusion.datasets.spaces import flatten_observation_space, space_mismatch

_REQUIRED_KEYS = {"observations", "actions", "rewards", "terminals"}
_OPTIONAL_KEYS = {"timeouts", "next_observations"}
_SYNONYMS = {"terminations": "terminals", "truncations": "timeouts"}
"""Gymnasium's names of what D4RL calls otherwise."""


def _load_memory_mapped(folder: Path, *, ask_environment: AskEnvironment | None, **given: Any) -> OfflineDataset:
    """
    :param folder: ends in ``.mmap``
    :param ask_environment: not asked, since the folder tells all itself
    :param given: the other arguments of ``load_memory_mapped``
    :return: the flat dataset
    """
    return load_memory_mapped(folder, **given)


_READERS: dict[str, Callable[..., OfflineDataset]] = {
    **dict.fromkeys(HDF5_SUFFIXES, load_d4rl),
    ARRAYS_SUFFIX: load_arrays,
    MEMORY_MAPPED_SUFFIX: _load_memory_mapped,
}
"""By suffix of the file."""


def load_dataset(
    source: Any,
    env_spec: EnvSpec | str | None = None,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    *,
    clip_actions: bool = False,
) -> OfflineDataset:
    """
    Load logged data into flat arrays with an episode index.

    | source | example |
    |---|---|
    | id of a Minari dataset on this machine | `"mujoco/hopper/medium-v0"` |
    | id of an embedded dataset, made on first use | `"sb3-diffusion/inverteddoublependulum/mixed-v0"` |
    | `minari.MinariDataset`, filtered or combined too | `minari.load_dataset(...).filter_episodes(...)` |
    | path to an HDF5 file in D4RL's layout | `"logs/arm.hdf5"` |
    | path to a `.npz` file of arrays with D4RL's names | `"logs/arm.npz"` |
    | path to a folder of memory-mapped arrays, written by `MemoryMappedWriter` | `"logs/arm.mmap"` |
    | name of a D4RL task, its file in `D4RL_DATASET_DIR` | `"hopper-medium-v2"` |
    | dict of arrays `observations, actions, rewards, terminals` and, if known, `timeouts, next_observations` | |
    | replay buffer of Stable-Baselines3 | `model.replay_buffer` |
    | `OfflineDataset` | returned as it is |

    :param source: one of the above; the flags in a dict may have Gymnasium's names, `terminations` and `truncations`
    :param env_spec: environment of the data (a Gymnasium spec or id) where the source does not tell, or another one
    :param observation_space: space of the observations where the source does not tell; checked against the data
    :param action_space: space of the actions, a Box, where the source does not tell; checked against the data
    :param clip_actions: clip actions outside of the action space instead of refusing them
    :return: the flat dataset
    :raises FileNotFoundError: if an id, name or file is not there; says where it was looked for and how to get it
    :raises ValueError: on bad data, naming field, episode and step, if given spaces do not fit, or for a file of another kind
    :raises TypeError: for another kind of source, discrete actions, or observations that are not supported
    :raises ImportError: if minari or h5py is needed and missing; names the extra to install
    """
    spec = gym.spec(env_spec) if isinstance(env_spec, str) else env_spec
    ask = None if spec is None else partial(_facts_of_spec, spec)
    return _load(source, spec, observation_space, action_space, clip_actions, ask)


def load_dataset_for(
    source: Any, observation_space: spaces.Space, action_space: spaces.Space, max_episode_steps: int | None = None
) -> OfflineDataset:
    """
    Load logged data for an environment that is at hand: what bare arrays and files do not tell is taken from it. Images may
    have their channels on either side, and observations that do not fit at all are left for the comparison of spaces.

    :param source: as for [load_dataset][sb3_diffusion.load_dataset]
    :param observation_space: of the environment
    :param action_space: of the environment
    :param max_episode_steps: its time limit, for arrays without ``timeouts``
    :return: the flat dataset
    """

    def ask(observations: Observations) -> EnvironmentFacts:
        shape = None if isinstance(observations, dict) else observations.shape[1:]
        fits = isinstance(observation_space, spaces.Dict) or shape == observation_space.shape
        fits = fits or (isinstance(observation_space, spaces.Discrete) and shape == (1,))
        return EnvironmentFacts(observation_space if fits else None, action_space, max_episode_steps)

    return _load(source, None, None, None, False, ask)


def _facts_of_spec(spec: EnvSpec, _: Observations) -> EnvironmentFacts:
    """What the environment of a spec knows; its observation space has to fit the data."""
    from sb3_diffusion.datasets.environments import make_from_spec

    env = make_from_spec(spec)
    env.close()
    return EnvironmentFacts(env.observation_space, env.action_space, spec.max_episode_steps)


def _load(
    source: Any,
    spec: EnvSpec | None,
    observation_space: spaces.Space | None,
    action_space: spaces.Space | None,
    clip_actions: bool,
    ask_environment: AskEnvironment | None,
) -> OfflineDataset:
    """
    :param source: see ``load_dataset``
    :param spec: see ``load_dataset``
    :param observation_space: see ``load_dataset``
    :param action_space: see ``load_dataset``
    :param clip_actions: see ``load_dataset``
    :param ask_environment: what bare arrays and files do not tell, see ``from_flat_arrays``
    :return: the flat dataset
    """
    if isinstance(source, OfflineDataset):
        return _overridden(source, spec, observation_space, action_space, clip_actions)
    if isinstance(source, Mapping):
        return _from_mapping(source, spec, observation_space, action_space, clip_actions, ask_environment)
    if isinstance(source, str | PathLike):
        file = _file(source)
        if file is not None:
            reader = _READERS.get(file.suffix.lower())
            if reader is None:
                raise ValueError(
                    f"Expected {', '.join(_READERS)}: got {str(file)!r}. Give other data as a dict of arrays. A replay buffer "
                    "is loaded by its model, `model.load_replay_buffer(path)`, and given as `model.replay_buffer`."
                )
            return reader(
                file,
                env_spec=spec,
                observation_space=observation_space,
                action_space=action_space,
                clip_actions=clip_actions,
                ask_environment=ask_environment,
            )
    if _is_replay_buffer(source):
        dataset = from_replay_buffer(source)
    elif (recorded := open_minari_source(source)) is not None:
        dataset = load_minari(recorded, clip_actions=clip_actions)
    else:
        raise TypeError(
            "The dataset must be a Minari id, the path of an .hdf5, .npz or .mmap file, the name of a D4RL task, a "
            f"MinariDataset, an OfflineDataset, a dict of arrays or an SB3 ReplayBuffer: got {type(source).__name__}."
        )
    return _overridden(dataset, spec, observation_space, action_space, clip_actions)


def open_minari_source(source: Any) -> Any:
    """
    Open a source that is a Minari dataset, without reading its episodes.

    :param source: anything that ``load_dataset`` takes
    :return: a ``MinariDataset`` (an embedded one is made if it is not there yet), or None for sources of another kind
    :raises FileNotFoundError: for an id that is not on this machine
    """
    if not isinstance(source, str):
        return source if hasattr(source, "iterate_episodes") and hasattr(source, "storage") else None
    if source in EMBEDDED_DATASETS:
        return embedded_dataset(source)
    if _file(source) is not None:
        return None
    if not (minari_root() / source).is_dir():
        if source in gym.registry:
            raise FileNotFoundError(
                f"{source!r} is the id of an environment: expected that of a dataset, such as {DEFAULT_DATASET_ID!r}."
            )
        if source.startswith(f"{NAMESPACE}/"):
            raise FileNotFoundError(f"No embedded dataset {source!r}: there are {', '.join(EMBEDDED_DATASETS)}.")
        if "/" not in source:
            raise FileNotFoundError(
                f"No dataset {source!r}: no Minari dataset of that id in {minari_root()}, no D4RL file of that name in "
                f"{d4rl_folder()} (set D4RL_DATASET_DIR), no such file."
            )
    return open_minari(source)


def _file(source: str | PathLike[str]) -> Path | None:
    """
    :param source: what the user gave
    :return: the file that it means, or None if it must be a Minari id
    """
    path = Path(source)
    if path.suffix.lower() in _READERS or path.is_file():
        return path
    if isinstance(source, str) and "/" not in source and not (minari_root() / source).is_dir():
        return find_d4rl_file(source)
    if not isinstance(source, str):
        raise FileNotFoundError(
            f"No file {path}: a path must lead to an .hdf5 file in D4RL's layout, a .npz file or a .mmap folder of arrays."
        )
    return None


def _is_replay_buffer(source: Any) -> bool:
    """
    :param source: what the user gave
    :return: whether it is a replay buffer of SB3; who has one has imported its module
    """
    buffers = sys.modules.get("stable_baselines3.common.buffers")
    return buffers is not None and isinstance(source, buffers.ReplayBuffer)


def _from_mapping(
    source: Mapping[str, Any],
    env_spec: EnvSpec | None,
    observation_space: spaces.Space | None,
    action_space: spaces.Space | None,
    clip_actions: bool,
    ask_environment: AskEnvironment | None,
) -> OfflineDataset:
    """
    :param source: dict of arrays
    :param env_spec: see ``load_dataset``
    :param observation_space: see ``load_dataset``
    :param action_space: see ``load_dataset``
    :param clip_actions: see ``load_dataset``
    :param ask_environment: see ``from_flat_arrays``
    :return: the flat dataset
    """
    for other, name in _SYNONYMS.items():
        if {other, name} <= set(source):
            raise ValueError(f"`{name}` and `{other}` are names of the same flags: got both, give one of them.")
    named = {_SYNONYMS.get(key, key): values for key, values in source.items()}
    arrays = {key: values for key, values in named.items() if key in _REQUIRED_KEYS | _OPTIONAL_KEYS}
    missing = _REQUIRED_KEYS - set(arrays)
    if missing:
        raise ValueError(
            f"A dict of arrays must have the keys {', '.join(sorted(_REQUIRED_KEYS))} and may have "
            f"{', '.join(sorted(_OPTIONAL_KEYS))}: {', '.join(sorted(missing))} missing, got {sorted(map(str, source))}."
        )
    return from_flat_arrays(
        **arrays,
        env_spec=env_spec,
        observation_space=observation_space,
        action_space=action_space,
        name="arrays",
        clip_actions=clip_actions,
        ask_environment=ask_environment,
    )


def _overridden(
    dataset: OfflineDataset,
    env_spec: EnvSpec | None,
    observation_space: spaces.Space | None,
    action_space: spaces.Space | None,
    clip_actions: bool,
) -> OfflineDataset:
    """
    :param dataset: as its source tells
    :param env_spec: replaces that of the dataset
    :param observation_space: replaces that of the dataset
    :param action_space: replaces that of the dataset
    :param clip_actions: see ``load_dataset``
    :return: the dataset itself if nothing is replaced, else one that shares its arrays
    """
    if env_spec is None and observation_space is None and action_space is None:
        return dataset
    if observation_space is not None:
        observation_space = flatten_observation_space(observation_space)
        problem = space_mismatch(dataset.observation_space, observation_space)
        if problem:
            raise ValueError(
                f"The given `observation_space` does not match the dataset {dataset.name!r}: {problem}. Dataset: "
                f"{dataset.observation_space}; given: {observation_space}."
            )
        # the data keeps the side on which its images have their channels
        if _shapes(observation_space) != _shapes(dataset.observation_space):
            observation_space = None
    changed = OfflineDataset(
        dataset.observations,
        dataset.actions,
        dataset.rewards,
        dataset.next_observations,
        dataset.terminations,
        dataset.truncations,
        observation_space=dataset.observation_space if observation_space is None else observation_space,
        action_space=dataset.action_space if action_space is None else action_space,
        env_spec=dataset.env_spec if env_spec is None else env_spec,
        ref_min_score=dataset.ref_min_score,
        ref_max_score=dataset.ref_max_score,
        score_label=dataset.score_label,
        name=dataset.name,
        clip_actions=clip_actions,
    )
    changed.n_stack = dataset.n_stack
    return changed


def _shapes(space: spaces.Space) -> Any:
    """
    :param space: flat observation space
    :return: its shape, or a dict of shapes
    """
    return {key: part.shape for key, part in space.spaces.items()} if isinstance(space, spaces.Dict) else space.shape
