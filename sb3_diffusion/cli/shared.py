"""What the commands share: exit status, names to objects, models from settings, signals, tables."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.callbacks import BaseCallback

from sb3_diffusion import ALGORITHMS
from sb3_diffusion.common.model_file import saved_class_name
from sb3_diffusion.common.utils import policy_alias
from sb3_diffusion.datasets.env_specs import register_robotics
from sb3_diffusion.evaluation import EvaluationResult, bootstrap_interval
from sb3_diffusion.sweep.arguments import algorithm_name, check_names, is_name, read_value, with_changes
from sb3_diffusion.zoo.presets import parse_texts

if TYPE_CHECKING:
    from sb3_diffusion.common.base_class import OfflineAlgorithm
    from sb3_diffusion.datasets import OfflineDataset

SUCCESS, USER_ERROR, INTERRUPTED = 0, 1, 130
USER_MISTAKES = (ValueError, OSError, ImportError, BadZipFile, gym.error.Error)
"""Errors that tell of a mistake in what was asked for, and end in one line instead of a traceback."""
SETTINGS_FILE = "train.json"
"""What ``train`` writes beside a model: the settings that it was trained with."""


class StopOnSignal(BaseCallback):
    """
    Ends ``learn`` after the running step when the process gets SIGINT (Ctrl-C) or SIGTERM, so that the model can be saved.

    A second signal acts as it would have without this callback.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False
        self._handlers: dict[int, Any] = {}

    def _on_training_start(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_step(self) -> bool:
        return not self.stopped

    def _on_training_end(self) -> None:
        self._restore()


# Names to objects -------------------------------------------------------------------------------------------------------


def find_algorithm(name: str | None) -> type[OfflineAlgorithm]:
    """
    :param name: in any spelling: dtql, DiffusionQL, diffusion-ql; None for dtql
    :return: the class
    :raises ValueError: if there is none of that name
    """
    return ALGORITHMS[algorithm_name(name or "dtql")]


def load_data(source: str, env_id: str | None = None) -> OfflineDataset:
    """
    :param source: anything with a name that ``load_dataset`` takes
    :param env_id: an environment that the user names decides over the spaces that a file leaves open
    :return: the dataset
    :raises ValueError: also on data of a kind that is not supported, which is not a fault of the program here
    """
    from sb3_diffusion.datasets import load_dataset

    known: dict[str, Any] = {}
    if env_id is not None:
        register_robotics(env_id)
        env = gym.make(env_id)
        known = {"env_spec": env.spec, "observation_space": env.observation_space, "action_space": env.action_space}
        env.close()
    try:
        return load_dataset(source, **known)
    except TypeError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class RecordedEnv:
    """
    Makes the environment that a dataset names, with the settings and the length of episodes that it was recorded with.

    :param data: the dataset
    :param spec: of its environment
    """

    data: OfflineDataset
    spec: EnvSpec

    def __call__(self, **kwargs: Any) -> gym.Env:
        from sb3_diffusion.datasets import make_dataset_env

        return make_dataset_env(self.data, **kwargs)


def env_of(env: str | None, data: OfflineDataset | None) -> str | RecordedEnv | None:
    """
    :param env: as the user said
    :param data: which may know its own
    :return: what to play in: the id that the user said, or what makes the environment of the data; None if neither is known
    """
    if env is not None or data is None or data.env_spec is None:
        return env
    return RecordedEnv(data, data.env_spec)


def id_of(env: str | RecordedEnv) -> str:
    """:return: the id alone"""
    return env if isinstance(env, str) else env.spec.id


def policy_for(data: OfflineDataset | None, env_id: str | None) -> str:
    """:return: the policy alias that the observations ask for"""
    if data is not None:
        return policy_alias(data.observation_space)
    assert env_id is not None
    register_robotics(env_id)
    env = gym.make(env_id)
    env.close()
    return policy_alias(env.observation_space)


# Models -----------------------------------------------------------------------------------------------------------------


def read_changes(changes: Sequence[str]) -> dict[str, Any]:
    """
    :param changes: ``name=value`` each, the value a Python literal or else a string; learning rates also as RL Zoo writes them
    :return: values by name
    :raises ValueError: if there is no ``=``, or the value cannot be read
    """
    values: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not is_name(name):
            raise ValueError(f"Expected settings as name=value, such as batch_size=64: got {change!r}.")
        values[name] = read_value(name, value)
    return parse_texts(values)


def make_model(
    algorithm: type[OfflineAlgorithm], policy: str, env: str | None, preset: str | None, changes: dict[str, Any], **kwargs: Any
) -> OfflineAlgorithm:
    """
    :param algorithm: class
    :param policy: alias
    :param env: id or None
    :param preset: name of published settings, or None for the defaults
    :param changes: constructor arguments that win over both; ``policy_kwargs.net_arch`` means an entry of ``policy_kwargs``
    :param kwargs: further constructor arguments
    :return: a new model
    :raises ValueError: also if there is no such policy, or the constructor does not take the changes
    """
    check_names(algorithm, changes)
    known = {} if preset is None else algorithm.preset(preset)
    try:
        arguments = {"policy": policy, "env": env, **kwargs, **with_changes(known, changes)}
        if arguments["policy"] not in algorithm.policy_aliases:
            names = ", ".join(algorithm.policy_aliases)
            raise ValueError(f"{algorithm.__name__} has no policy {arguments['policy']!r}; there are: {names}.")
        return algorithm(**arguments) if preset is None else algorithm.from_preset(preset, **arguments)
    except TypeError as error:
        if changes:
            raise ValueError(f"{algorithm.__name__} does not take what --set says: {str(error).rstrip('.')}.") from error
        raise


def read_settings(model_file: Path) -> dict[str, Any]:
    """
    :param model_file: of a model
    :return: the settings beside it; empty if there are none
    """
    file = model_file.parent / SETTINGS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def load_model(path: Path, algo: str | None, **kwargs: Any) -> OfflineAlgorithm:
    """
    :param path: model file
    :param algo: name of the algorithm; None: the file tells
    :param kwargs: of ``load``
    :return: the model
    :raises FileNotFoundError: if there is no such file
    """
    path = model_path(path)
    return find_algorithm(algo or saved_class_name(path)).load(path, **kwargs)


def model_path(path: Path) -> Path:
    """
    :param path: of a model file, with or without ``.zip``
    :return: the file
    :raises FileNotFoundError: if there is no such file
    """
    for candidate in (path, path.with_name(f"{path.name}.zip")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"There is no model file {path}.")


def headless() -> None:
    """MuJoCo renders without a display by EGL, unless ``MUJOCO_GL`` says otherwise; to be called before it is imported."""
    if "DISPLAY" not in os.environ and "WAYLAND_DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")


def require(extra: str, *modules: str) -> None:
    """
    :param extra: that brings them
    :param modules: that a command needs
    :raises ImportError: before anything is done
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"This command needs {', '.join(missing)}: pip install 'sb3-diffusion[{extra}]'.")


# What is shown ----------------------------------------------------------------------------------------------------------


def print_comparison(data: OfflineDataset | None, result: EvaluationResult, label: str) -> None:
    """
    Print a table of the returns of a model and of the behaviour that made the data.

    :param data: whose episodes to compare with
    :param result: of the model
    :param label: of the model
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Return per episode")
    for column in ("", "episodes", "mean", "95 % interval of the mean", "normalised"):
        table.add_column(column, justify="left" if column == "" else "right")

    def add(name: str, returns: np.ndarray, scores: np.ndarray | None) -> None:
        low, high = bootstrap_interval(returns, statistic="mean")
        interval = "" if np.isnan(low) else f"{low:.1f} to {high:.1f}"
        score = "" if scores is None else f"{np.mean(scores):.1f} %"
        table.add_row(name, str(len(returns)), f"{np.mean(returns):.1f}", interval, score)

    if data is not None:
        returns = data.episode_returns
        scores = np.asarray(data.normalized_score(returns)) if data.has_reference_scores else None
        add("behaviour (the data)", returns, scores)
        best = int(np.argmax(returns))
        add("its best episode", returns[best : best + 1], None if scores is None else scores[best : best + 1])
    add(label, result.returns, result.normalized_scores)
    Console().print(table)


def in_one_line(error: BaseException) -> str:
    """:return: its message"""
    return " ".join(str(error).split())


def to_plain(value: Any) -> Any:
    """NumPy numbers and arrays as JSON knows them."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
