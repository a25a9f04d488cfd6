"""What a model's file holds: configuration, parameters, optimiser states, generators, statistics of ``VecNormalize``."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch as th
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
ESSENTIAL = ("policy_class", "observation_space", "action_space", "verbose")
"""Attributes that loading begins with."""


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
    return ModelFile(data, **decoder.decode_all(rest))


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
    return Decoder(archive.tensors).decode(archive.config.get("parameters"), "parameters")


def _print_system_info(archive: Archive) -> None:
    print("== CURRENT SYSTEM INFO ==")
    get_system_info()
    print("== SAVED MODEL SYSTEM INFO ==")
    for library, version in archive.versions.items():
        print(f"- {library}: {version}")
