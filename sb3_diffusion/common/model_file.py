"""What a model's file holds: configuration, parameters, optimiser states, generators, statistics of ``VecNormalize``."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.utils import get_system_info

from sb3_diffusion.common.allowlist import FileFormatError, path_of, simple_name
from sb3_diffusion.common.codec import Decoder, Encoder
from sb3_diffusion.common.serialization import (
    WRONG_VALUES,
    Archive,
    PathOrFile,
    existing_path,
    read_archive,
    with_suffix,
    write_archive,
)

if TYPE_CHECKING:
    from sb3_diffusion.common.savable import SavableAlgorithm

KIND = "model"
ESSENTIAL = {"policy_class": type, "observation_space": spaces.Space, "action_space": spaces.Box}
"""Attributes that loading begins with, and of which kinds they are."""
KINDS: dict[str, Any] = {
    **dict.fromkeys(
        ("verbose", "num_timesteps", "_total_timesteps", "_episode_num", "_n_updates", "_n_pretrain_updates"), int
    ),
    **dict.fromkeys(("ep_info_buffer", "ep_success_buffer"), (deque, type(None))),
    "action_noise": (ActionNoise, type(None)),
}
"""Of which kinds others are that no argument's check looks at."""
VEC_NORMALIZE: dict[str, Any] = {
    **dict.fromkeys(("norm_obs", "norm_reward", "training"), bool),
    **dict.fromkeys(("clip_obs", "clip_reward", "gamma", "epsilon"), (int, float)),
    "norm_obs_keys": (list, type(None)),
    "obs_rms": (RunningMeanStd, dict, type(None)),
    "ret_rms": RunningMeanStd,
}
"""What is kept of a ``VecNormalize``, and of which kinds it is."""


class ModelFile(NamedTuple):
    """
    Contents of a model's file.

    :ivar data: attributes of the model by name
    :ivar parameters: state dicts of networks and optimisers by name
    :ivar generators: states of the model's random generators by name
    :ivar vec_normalize: settings and statistics of ``VecNormalize``, or None
    """

    data: dict[str, Any]
    parameters: dict[str, TensorDict]
    generators: dict[str, th.Tensor]
    vec_normalize: dict[str, Any] | None


def write_model(
    model: "SavableAlgorithm", path: PathOrFile, excluded: Iterable[str], vec_normalize: dict[str, Any] | None
) -> None:
    """
    Write a model atomically; attributes that cannot be written are recorded by name, with one warning.

    :param model: the model
    :param path: path, ``.zip`` is added to one without suffix, or a binary file object
    :param excluded: names of attributes to leave out
    :param vec_normalize: settings and statistics of ``VecNormalize``, or None
    """
    encoder = Encoder()
    left_out = set(excluded)
    config = {
        "class": path_of(type(model)),
        "data": encoder.encode_all({k: v for k, v in vars(model).items() if k not in left_out}),
        "parameters": encoder.encode(model.get_parameters(), "parameters"),
        "generators": encoder.encode({name: g.get_state() for name, g in model.generators().items()}, "generators"),
        "vec_normalize": encoder.encode(vec_normalize, "vec_normalize"),
    }
    encoder.warn_missing(stacklevel=4)
    write_archive(with_suffix(path), KIND, config, encoder.tensors)


def read_model(
    cls: type, path: PathOrFile, custom_objects: dict[str, Any] | None = None, print_system_info: bool = False
) -> ModelFile:
    """
    Read a model's file; nothing in it is executed.

    :param cls: class to load, the one that the file was saved from or a subclass of it
    :param path: path, with or without ``.zip``, or a binary file object
    :param custom_objects: replacements of attributes, and classes and functions that the file holds by name only
    :param print_system_info: print the versions of the libraries now and then
    :return: its contents
    :raises FileFormatError: if the file is damaged, foreign, of a newer schema, or of another class
    """
    archive = read_archive(existing_path(path), KIND)
    if print_system_info:
        _print_system_info(archive)
    saved_class = archive.config.get("class")
    if saved_class not in [path_of(base) for base in cls.__mro__]:
        name = simple_name(str(saved_class))
        raise FileFormatError(f"The file holds a model of {saved_class}, not of {path_of(cls)}: load it with {name}.load().")
    decoder = Decoder(archive.tensors, custom_objects)
    data = decoder.decode_all(archive.config.get("data", {}))
    missing = [name for name in ESSENTIAL if name not in data]
    if missing:
        raise FileFormatError(f"The file lacks {', '.join(missing)}, so that it does not describe a model: save it again.")
    rest = {name: archive.config.get(name) for name in ("parameters", "generators", "vec_normalize")}
    file = ModelFile(data, **decoder.decode_all(rest))
    _check(cls, file)
    return file


def _check(cls: type, file: ModelFile) -> None:
    """
    :param cls: class to load
    :param file: its decoded contents
    :raises FileFormatError: if a value is of a kind that it cannot be, or would hide a method of the class
    """
    data = file.data
    for name, kinds in {**ESSENTIAL, **KINDS}.items():
        if name in data:
            _require(name, data[name], kinds)
    hidden = [name for name in data if callable(getattr(cls, name, None))]
    if hidden:
        raise FileFormatError(f"The file holds values for {', '.join(sorted(hidden))}, which are methods: refused.")
    _check_parameters(file.parameters)
    _require("generators", file.generators, dict)
    for name, generator in file.generators.items():
        _require(f"generators.{name}", generator, th.Tensor)
    state = file.vec_normalize
    if state is None:
        return
    _require("vec_normalize", state, dict)
    if set(state) != set(VEC_NORMALIZE):
        raise FileFormatError(f"`vec_normalize` must hold {sorted(VEC_NORMALIZE)}: the file has {sorted(map(str, state))}.")
    for name, kinds in VEC_NORMALIZE.items():
        _require(f"vec_normalize.{name}", state[name], kinds)
    observed = state["obs_rms"]
    for statistics in [*(observed.values() if isinstance(observed, dict) else [observed]), state["ret_rms"]]:
        if statistics is None and not state["norm_obs"]:
            continue
        moments = [getattr(statistics, name, None) for name in ("mean", "var")]
        if not isinstance(statistics, RunningMeanStd) or not all(
            np.issubdtype(np.asarray(m).dtype, np.floating) for m in moments
        ):
            raise FileFormatError("`vec_normalize` holds no running mean and variance: the file is damaged or foreign.")


def _require(name: str, value: Any, kinds: Any) -> None:
    if not isinstance(value, kinds):
        raise FileFormatError(f"`{name}` cannot be a {type(value).__name__}, as it is in the file: it is damaged or foreign.")


def _check_parameters(parameters: Any) -> None:
    """Whether these are state dicts by name; a string would be taken for the path of another file."""
    _require("parameters", parameters, dict)
    for name, state in parameters.items():
        _require(f"parameters.{name}", state, dict)


@contextmanager
def described_by() -> Iterator[None]:
    """
    Where a model is built from a file.

    :return: context in which what goes wrong is the file's fault; a ``ValueError`` is that of an argument and passes
    :raises FileFormatError: instead of other errors
    """
    try:
        yield
    except WRONG_VALUES as error:
        raise FileFormatError(
            f"The file holds values that do not make a model ({type(error).__name__}: {error}). It is damaged, or of another "
            "version of the library; fetch or save it again."
        ) from error


def saved_class_name(path: PathOrFile) -> str:
    """
    :param path: of a model file
    :return: name of the class that it was saved from, without its module; what the file says, which need not exist
    :raises FileFormatError: if the file is damaged or foreign
    """
    return simple_name(str(read_archive(existing_path(path), KIND).config.get("class")))


def read_parameters(path: PathOrFile) -> dict[str, TensorDict]:
    """
    Read the state dicts alone out of a model's file.

    :param path: path, with or without ``.zip``, or a binary file object
    :return: state dicts of networks and optimisers by name
    """
    archive = read_archive(existing_path(path), KIND)
    parameters = Decoder(archive.tensors).decode(archive.config.get("parameters"), "parameters")
    _check_parameters(parameters)
    return parameters


def _print_system_info(archive: Archive) -> None:
    print("== CURRENT SYSTEM INFO ==")
    get_system_info()
    print("== SAVED MODEL SYSTEM INFO ==")
    for library, version in archive.versions.items():
        print(f"- {library}: {version}")
