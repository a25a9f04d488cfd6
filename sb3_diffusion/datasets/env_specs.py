"""Environments that a dataset names: their settings come from the data, their code from the registry of this process."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import io
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, WrapperSpec

SETTINGS = ("kwargs", "reward_threshold", "nondeterministic", "max_episode_steps", "order_enforce", "disable_env_checker")
"""Fields of an ``EnvSpec`` that are no code."""


def register_robotics(env: EnvSpec | str) -> None:
    """
    Register the environments of gymnasium-robotics, if it is installed and the environment is, or may be, one of them.

    :param env: spec of the environment, or its id; an id that is registered is none of them
    """
    env_id = env if isinstance(env, str) else env.id
    wanted = env_id not in gym.registry if isinstance(env, str) else "gymnasium_robotics" in str(env.entry_point)
    if wanted and importlib.util.find_spec("gymnasium_robotics") is not None:
        with contextlib.redirect_stderr(io.StringIO()):  # it tells of versions of other environments
            robotics = importlib.import_module("gymnasium_robotics")
        # registers by itself when imported, depending on its version
        if env_id not in gym.registry and hasattr(gym, "register_envs"):
            gym.register_envs(robotics)


def needs_robotics(recorded: EnvSpec) -> bool:
    """
    :param recorded: spec of an environment, as it stands in the data
    :return: whether it is one of gymnasium-robotics, which is not installed
    """
    return "gymnasium_robotics" in str(recorded.entry_point) and importlib.util.find_spec("gymnasium_robotics") is None


def trusted_spec(recorded: EnvSpec) -> EnvSpec | None:
    """
    The environment registered here under the id of a recorded spec, with the recorded settings. A recorded entry point, which
    could name any function of any module, is never called; of recorded wrappers, those of ``gymnasium.wrappers`` remain.

    :param recorded: as it stands in the data
    :return: a spec that is safe to make, or None if none of that id is registered here
    """
    register_robotics(recorded)
    registered = gym.registry.get(recorded.id)
    if registered is None:
        return None
    spec = copy.copy(registered)
    for name in SETTINGS:
        setattr(spec, name, copy.deepcopy(getattr(recorded, name)))
    spec.additional_wrappers = plain_wrappers(recorded.id, recorded.additional_wrappers)
    return spec


def known_spec(recorded: EnvSpec | str, source: str) -> EnvSpec | None:
    """
    :param recorded: as it stands in the data, or the id alone
    :param source: the data, for the warning
    :return: what ``trusted_spec`` makes of it, None with a warning if none of that id is registered here
    """
    if isinstance(recorded, str):
        register_robotics(recorded)
        spec, name, missing = gym.registry.get(recorded), recorded, False
    else:
        spec, name = trusted_spec(recorded), f"{recorded.id} ({recorded.entry_point})"
        missing = needs_robotics(recorded)
    if spec is None:
        how = 'Install (pip install "sb3-diffusion[robotics]")' if missing else "Import"
        warnings.warn(
            f"{source} was recorded in {name}, which is not registered here, so that its environment is left out: a dataset "
            f"brings no code. {how} the package that registers it before you load the data, or give `env` yourself, on the "
            "command line as module:id.",
            stacklevel=4,
        )
    return spec


def plain_wrappers(env_id: str, wrappers: Sequence[WrapperSpec]) -> tuple[WrapperSpec, ...]:
    """
    Of the wrappers that a file names, those of Gymnasium that write no files; one warning names the others.

    :param env_id: of the environment, for the warning
    :param wrappers: as recorded
    :return: those that may be put around the environment
    """
    foreign = [str(wrapper.entry_point) for wrapper in wrappers if not _is_plain(wrapper)]
    if foreign:
        warnings.warn(
            f"The specification of {env_id!r} names wrappers that a file may not bring: {', '.join(foreign)}. "
            "They are left out; put them around the environment yourself.",
            stacklevel=3,
        )
    return tuple(wrapper for wrapper in wrappers if _is_plain(wrapper))


def _is_plain(wrapper: WrapperSpec) -> bool:
    """:return: whether it is a wrapper of Gymnasium that writes no files"""
    module, _, name = str(wrapper.entry_point).partition(":")
    cls: Any = getattr(gym.wrappers, name, None)
    known = inspect.isclass(cls) and issubclass(cls, gym.Wrapper) and wrapper.kwargs is not None
    return known and cls.__module__ == module and module != "gymnasium.wrappers.rendering"
