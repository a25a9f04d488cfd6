"""Environments that belong to logged data, and data that belongs to environments."""

from __future__ import annotations

from typing import Any
from warnings import warn

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator

from sb3_diffusion.datasets.arrays import flatten_observations
from sb3_diffusion.datasets.env_specs import needs_robotics, register_robotics
from sb3_diffusion.datasets.loading import load_dataset, open_minari_source
from sb3_diffusion.datasets.minari_dataset import known_environment
from sb3_diffusion.datasets.offline_dataset import OfflineDataset
from sb3_diffusion.datasets.spaces import flatten_observation_space, stacked_space

# A time limit this many times longer than every recorded episode is none that evaluation could wait for.
_ABSURD_LIMIT = 100


class SpacesEnv(gym.Env):
    """
    Stands in for an environment that nobody knows: it has spaces, but cannot be stepped.

    :param observation_space: of the data
    :param action_space: of the data
    :param name: of the dataset, for messages
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  as in gym.Env

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, name: str = "") -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.name = name

    def _no_environment(self) -> RuntimeError:
        """The error for every attempt to run this environment."""
        return RuntimeError(
            f"No environment is known for the dataset {self.name!r}: it can train a model offline, but not act. Give the "
            "model an environment (`env=` or `set_env`), or the dataset an `env_spec` (`load_dataset(source, env_spec=...)`)."
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        Always fails.

        :param seed: not used
        :param options: not used
        :raises RuntimeError: says how to give an environment
        """
        raise self._no_environment()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        Always fails.

        :param action: not used
        :raises RuntimeError: says how to give an environment
        """
        raise self._no_environment()


class FlattenNestedDictObservation(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """
    Bring observations that are Dicts of Dicts to one level, keys joined by ``"."``, as SB3 needs them.

    The same is done to datasets: ``{"goal": {"position": p}}`` becomes ``{"goal.position": p}`` in both.

    :param env: environment with a Dict of observations
    """

    def __init__(self, env: gym.Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = flatten_observation_space(env.observation_space)

    def observation(self, observation: Any) -> dict[str, np.ndarray]:
        """
        Flatten one observation.

        :param observation: nested dict
        :return: dict of arrays
        """
        return flatten_observations(observation)


class DatasetEnv(gym.Wrapper):
    """
    An environment that brings the data recorded in it, by D4RL's ``get_dataset()`` convention.

    :param env: environment to wrap
    :param source: anything that ``load_dataset`` takes; read when it is first asked for
    """

    def __init__(self, env: gym.Env, source: Any) -> None:
        super().__init__(env)
        self._source = source

    def get_dataset(self) -> OfflineDataset:
        """
        Load the data, the first time; then give the same object.

        :return: the flat dataset
        """
        self._source = load_dataset(self._source)
        return self._source


def make_env(source: Any, **kwargs: Any) -> gym.Env:
    """
    Make the environment in which a dataset was recorded; it brings its data by ``get_dataset()``.

    ```python
    env = make_env("mujoco/hopper/medium-v0")
    model = DTQL("MlpPolicy", env)  # finds the dataset through the env
    ```

    :param source: id of a Minari dataset, or anything else that ``load_dataset`` takes if it knows its environment
    :param kwargs: for ``gymnasium.make``, such as ``render_mode`` or ``max_episode_steps``
    :return: the environment; nested Dict observations are flattened as in the data
    :raises ValueError: if the data names no environment
    :raises ImportError: if a package is missing; names the extra to install
    """
    recorded = open_minari_source(source)
    if recorded is not None and recorded.env_spec is not None and needs_robotics(recorded.env_spec):
        raise ImportError(
            f"The environment {recorded.env_spec.id} needs a package that is missing, gymnasium-robotics: "
            'pip install "sb3-diffusion[robotics]".'
        )
    spec = None if recorded is None else known_environment(recorded)
    if recorded is None or _limit_is_absurd(spec, _recorded_lengths(recorded)):
        source = load_dataset(source if recorded is None else recorded)
        spec, kwargs = source.env_spec, _with_time_limit(source, kwargs)
    if spec is None:
        raise ValueError(
            f"The dataset {getattr(source, 'name', None) or source!r} does not name its environment, or one that is not "
            "registered here. Make one with gymnasium.make and give it to the model together with `dataset=`."
        )
    return DatasetEnv(make_from_spec(spec, **kwargs), source)


def make_dataset_env(dataset: OfflineDataset, **kwargs: Any) -> gym.Env:
    """
    Make the environment of a dataset, for evaluation; frames can be rendered where the environment can do that.

    :param dataset: its spaces must fit its environment; if its observations are stacked, the env gives single ones
    :param kwargs: for ``gymnasium.make``
    :return: the environment, or a ``SpacesEnv`` that cannot be stepped if the dataset names none
    :raises ImportError: if a package is missing; names the extra to install
    :raises ValueError: if the environment does not fit the data
    """
    if dataset.env_spec is None:
        return SpacesEnv(dataset.observation_space, dataset.action_space, dataset.name)
    env = make_from_spec(dataset.env_spec, **_with_time_limit(dataset, kwargs))
    space = env.observation_space
    dataset.check_spaces(space if dataset.n_stack == 1 else stacked_space(space, dataset.n_stack), env.action_space)
    return env


def make_from_spec(spec: EnvSpec, **kwargs: Any) -> gym.Env:
    """
    ``gymnasium.make`` with what datasets need around it.

    Frames are rendered as arrays where the environment can do that, environments of gymnasium-robotics are registered
    first, nested Dict observations are flattened.

    :param spec: of the environment
    :param kwargs: for ``gymnasium.make``
    :return: the environment
    :raises ImportError: if a package is missing; names the extra to install
    """
    register_robotics(spec)
    try:
        if "render_mode" not in {**spec.kwargs, **kwargs}:
            creator = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
            metadata = getattr(creator, "metadata", None)
            if isinstance(metadata, dict) and "rgb_array" in (metadata.get("render_modes") or ()):
                kwargs = {**kwargs, "render_mode": "rgb_array"}
        env = gym.make(spec, **kwargs)
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        extra = "robotics" if "robotics" in str(spec.entry_point) else "mujoco"
        raise ImportError(
            f'The environment {spec.id} needs a package that is missing ({error}): pip install "sb3-diffusion[{extra}]", or '
            "the package that the environment comes from."
        ) from error
    space = env.observation_space
    if isinstance(space, spaces.Dict) and any(isinstance(part, spaces.Dict) for part in space.spaces.values()):
        return FlattenNestedDictObservation(env)
    return env


def find_dataset(env: Any) -> OfflineDataset | None:
    """
    Ask an environment for its data: D4RL's ``get_dataset()``, through all wrappers and vectorised environments. What lies
    below a ``VecFrameStack`` is stacked as it does.

    :param env: a Gymnasium env or an SB3 VecEnv; of several envs the first is asked
    :return: the dataset, or None if the environment brings none
    :raises ValueError: if what it brings is bad data
    """
    node, n_stack = env, 1
    while node is not None:
        if callable(getattr(type(node), "get_dataset", None)) or "get_dataset" in getattr(node, "__dict__", {}):
            return _loaded(node.get_dataset(), node, n_stack)
        children = node.__dict__
        if "venv" in children:  # VecEnvWrapper
            n_stack *= getattr(children.get("stacked_obs"), "n_stack", 1)  # VecFrameStack
            node = children["venv"]
        elif "envs" in children:  # DummyVecEnv
            node = children["envs"][0]
        elif hasattr(type(node), "env_method"):  # SubprocVecEnv: the env lives in another process
            if not node.has_attr("get_dataset"):
                return None
            return _loaded(node.env_method("get_dataset", indices=0)[0], node, n_stack)
        else:
            node = children.get("env")
    return None


def time_limit(env: Any) -> int | None:
    """
    :param env: a Gymnasium env, an SB3 VecEnv or None
    :return: steps after which episodes are cut, None where that is not known
    """
    spec = None if env is None else _spec_of(env)
    return None if spec is None else spec.max_episode_steps


def _spec_of(env: Any) -> EnvSpec | None:
    """
    :param env: a Gymnasium env or an SB3 VecEnv; of several envs the first is asked
    :return: its spec, or None if it has none
    """
    if not hasattr(type(env), "env_method"):
        spec = getattr(env, "spec", None)
    else:
        spec = env.get_attr("spec", indices=[0])[0] if env.has_attr("spec") else None
    return spec if isinstance(spec, EnvSpec) else None


def _loaded(source: Any, owner: Any, n_stack: int) -> OfflineDataset:
    """
    :param source: what an environment's ``get_dataset`` returned
    :param owner: the environment
    :param n_stack: how many observations are stacked around it
    :return: the flat dataset; what the arrays do not tell is taken from the environment
    """
    dataset = source
    if not isinstance(source, OfflineDataset):
        dataset = load_dataset(
            source,
            env_spec=_spec_of(owner),
            observation_space=owner.observation_space,
            action_space=owner.action_space,
        )
    return dataset.stack(n_stack) if n_stack > 1 and dataset.n_stack == 1 else dataset


def _recorded_lengths(dataset: Any) -> np.ndarray:
    """
    :param dataset: a ``MinariDataset``
    :return: steps of each episode, from the metadata alone
    """
    metadata = dataset.storage.get_episode_metadata(dataset.episode_indices)
    return np.asarray([int(episode["total_steps"]) for episode in metadata])


def _limit_is_absurd(spec: EnvSpec | None, lengths: np.ndarray) -> bool:
    """
    :param spec: of the environment
    :param lengths: steps of each recorded episode
    :return: whether there is no time limit, or one far longer than all that was recorded
    """
    if spec is None or not len(lengths):
        return False
    return spec.max_episode_steps is None or spec.max_episode_steps >= _ABSURD_LIMIT * int(lengths.max())


def _with_time_limit(dataset: OfflineDataset, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Cut the episodes of tasks that never end as they were cut when the data was recorded.

    :param dataset: names its environment
    :param kwargs: for ``gymnasium.make``
    :return: these, with ``max_episode_steps`` if no recorded episode terminated and there is no usable time limit
    """
    spec, lengths = dataset.env_spec, dataset.episode_lengths
    if "max_episode_steps" in kwargs or dataset.terminations.any() or not _limit_is_absurd(spec, lengths):
        return kwargs
    assert spec is not None
    limit = int(lengths.max())
    warn(
        f"No episode of {dataset.name!r} terminates and the time limit of {spec.id} is {spec.max_episode_steps}: episodes "
        f"are cut after {limit} steps, as in the data. To choose, give the model `make_env(dataset, max_episode_steps=...)`.",
        stacklevel=3,
    )
    return {**kwargs, "max_episode_steps": limit}
