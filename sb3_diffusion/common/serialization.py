"""
Networks and replay buffers as files without pickle, and the names that the rest of the package needs for it.

A file is an archive (`archive.py`) of encoded values (`codec.py`); what it may name is in `allowlist.py`.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.utils import get_device

from sb3_diffusion.common.allowlist import (
    SLOT_BASES,
    FileFormatError,
    MissingObject,
    MissingObjectError,
    path_of,
    register_function,
    register_value_class,
)
from sb3_diffusion.common.archive import (
    SCHEMA_VERSION,
    Archive,
    PathOrFile,
    existing_path,
    library_versions,
    read_archive,
    with_suffix,
    write_archive,
)
from sb3_diffusion.common.codec import Decoder, Encoder, set_attributes

__all__ = [
    "SCHEMA_VERSION",
    "SLOT_BASES",
    "WRONG_VALUES",
    "Archive",
    "Decoder",
    "Encoder",
    "FileFormatError",
    "MissingObject",
    "MissingObjectError",
    "PathOrFile",
    "PickleFreeModule",
    "existing_path",
    "library_versions",
    "load_replay_buffer",
    "read_archive",
    "register_function",
    "register_value_class",
    "save_replay_buffer",
    "with_suffix",
    "write_archive",
]

ModuleT = TypeVar("ModuleT", bound="PickleFreeModule")

WRONG_VALUES = (TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError, MemoryError)
"""Errors, beside ``ValueError``, of building something from the values of a damaged file."""


# ---- Networks -----------------------------------------------------------------------------------------------------------


class PickleFreeModule(BaseModel):
    """
    Mixin of policies and networks: ``save`` and ``load`` without pickle. Put it before SB3's base class; the constructor
    arguments come from ``_get_constructor_parameters()``, the weights from ``state_dict()``.
    """

    def save(self, path: PathOrFile) -> None:  # type: ignore[override]
        """
        Save constructor arguments and weights.

        :param path: exact path, or a binary file object
        :raises TypeError: if a constructor argument is a network, which cannot be described by arguments
        :raises OSError: if the file cannot be written
        """
        arguments = self._get_constructor_parameters()
        for name, value in arguments.items():
            if isinstance(value, th.nn.Module):
                raise TypeError(
                    f"{type(self).__name__} cannot be saved: its constructor argument {name!r} is a network "
                    f"({type(value).__name__}), not a description of one; use a class and its arguments instead."
                )
        encoder = Encoder()
        config = {
            "class": path_of(type(self)),
            "has_lr_schedule": "lr_schedule" in arguments,
            "arguments": encoder.encode_all({name: value for name, value in arguments.items() if name != "lr_schedule"}),
            "state_dict": encoder.encode_all(dict(self.state_dict()), prefix="state_dict"),
        }
        encoder.warn_missing(stacklevel=3)
        write_archive(path, "policy", config, encoder.tensors)

    @classmethod
    def load(  # type: ignore[override]
        cls: type[ModuleT],
        path: PathOrFile,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
    ) -> ModuleT:
        """
        Load what `save` wrote. A file of a subclass gives an object of that subclass.

        :param path: exact path, or a binary file object
        :param device: device of the weights
        :param custom_objects: replacements of constructor arguments and of objects that the file only names
        :return: new object
        :raises FileFormatError: if the file is not a policy file, or one of another class
        """
        archive = read_archive(path, "policy")
        recorded = archive.config.get("class")
        found = next((known for known in _with_subclasses(cls) if path_of(known) == recorded), None)
        if found is None:
            raise FileFormatError(
                f"The file holds a {recorded!r}, which is neither {path_of(cls)!r} nor a subclass of it that is imported: "
                "load it with its own class."
            )
        decoder = Decoder(archive.tensors, custom_objects)
        arguments = decoder.decode_all(archive.config.get("arguments", {}))
        if archive.config.get("has_lr_schedule"):
            arguments["lr_schedule"] = BasePolicy._dummy_schedule  # only a policy inside an algorithm has a learning rate
        state_dict = decoder.decode_all(archive.config.get("state_dict", {}), prefix="state_dict")
        try:
            model = found(**arguments)
            model.load_state_dict(state_dict)
        except (ValueError, *WRONG_VALUES) as error:
            raise FileFormatError(
                f"No {found.__name__} can be made from what the file holds ({type(error).__name__}: {error})."
            ) from error
        return model.to(get_device(device))


def _with_subclasses(cls: type[ModuleT]) -> Iterator[type[ModuleT]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


# ---- Replay buffers -----------------------------------------------------------------------------------------------------


def save_replay_buffer(buffer: ReplayBuffer, path: PathOrFile) -> None:
    """
    Save a replay buffer with all it holds: by its ``get_state()`` if it has one, else by its attributes. The training
    environment that `HerReplayBuffer` refers to is left out. Rows that were never written to take no space.

    :param buffer: any replay buffer
    :param path: exact path, whatever its suffix, or a binary file object
    :raises OSError: if the file cannot be written
    """
    if hasattr(buffer, "get_state"):
        encoder = Encoder()
        values = {"observation_space": buffer.observation_space, "action_space": buffer.action_space}
        config = {"values": encoder.encode_all(values), "state": encoder.encode_all(buffer.get_state(), prefix="state")}
    else:
        encoder = Encoder(n_rows=buffer.buffer_size, n_filled=buffer.size())
        values = {name: value for name, value in vars(buffer).items() if name != "env"}
        config = {"values": encoder.encode_all(values)}
    config["replay_buffer_class"] = encoder.encode(type(buffer), "replay_buffer_class")
    encoder.warn_missing(stacklevel=3)
    write_archive(path, "replay_buffer", config, encoder.tensors)


def load_replay_buffer(
    path: PathOrFile, device: th.device | str = "auto", custom_objects: dict[str, Any] | None = None
) -> ReplayBuffer:
    """
    Load what `save_replay_buffer` wrote. A `HerReplayBuffer` needs ``set_env`` afterwards, as SB3's does.

    :param path: exact path, or a binary file object
    :param device: device of the batches that the buffer will return
    :param custom_objects: ``{"replay_buffer_class": MyBuffer}`` for a class of your own, and replacements of attributes
    :return: new buffer
    :raises FileFormatError: if the file is not a replay-buffer file or its contents do not fit together
    """
    archive = read_archive(path, "replay_buffer")
    decoder = Decoder(archive.tensors, custom_objects)
    named = {name: obj for name, obj in archive.config.items() if name == "replay_buffer_class"}
    cls = decoder.decode_all(named).get("replay_buffer_class")
    if not (isinstance(cls, type) and issubclass(cls, ReplayBuffer)):
        raise FileFormatError(f"The file does not name the class of its replay buffer, it holds {cls!r} in its place.")
    values = decoder.decode_all(archive.config.get("values", {}))
    if "state" in archive.config:
        state = decoder.decode_all(archive.config["state"], prefix="state")
        archive.tensors.clear()
        return _buffer_from_state(cls, values, state, device)
    archive.tensors.clear()
    buffer = cls.__new__(cls)
    set_attributes(buffer, {**values, "device": get_device(device)})
    if hasattr(cls, "set_env"):
        buffer.env = None  # type: ignore[attr-defined]
    _check_buffer(buffer)
    return buffer


def _buffer_from_state(
    cls: type[ReplayBuffer], values: dict[str, Any], state: dict[str, Any], device: th.device | str
) -> ReplayBuffer:
    if not hasattr(cls, "set_state"):
        raise FileFormatError(f"The file describes a buffer with `set_state`, which {cls.__name__} does not have.")
    try:
        arguments = {name: state[name] for name in getattr(cls, "required_arguments", ())}
        buffer = cls(1, values["observation_space"], values["action_space"], device=device, **arguments)
        buffer.set_state(state)  # type: ignore[attr-defined]
    except (ValueError, *WRONG_VALUES) as error:
        raise FileFormatError(f"The file's state does not fit a {cls.__name__}: {error}") from error
    return buffer


def _check_buffer(buffer: ReplayBuffer) -> None:
    """Sizes and kinds of the attributes that every replay buffer of SB3 relies on."""
    values = vars(buffer)
    for name, kinds in (
        ("buffer_size", int),
        ("pos", int),
        ("full", bool),
        ("n_envs", int),
        ("action_dim", int),
        ("observation_space", spaces.Space),
        ("action_space", spaces.Space),
    ):
        if not isinstance(values.get(name), kinds):
            raise FileFormatError(f"The buffer's `{name}` must be a {kinds.__name__}, the file has {values.get(name)!r}.")
    if buffer.buffer_size < 1 or buffer.n_envs < 1 or not 0 <= buffer.pos < buffer.buffer_size:
        raise FileFormatError(
            f"The buffer's sizes are inconsistent: buffer_size={buffer.buffer_size}, n_envs={buffer.n_envs}, pos={buffer.pos}."
        )
    names = ["observations", "actions", "rewards", "dones", "timeouts"]
    names += [] if values.get("optimize_memory_usage") else ["next_observations"]
    for name in names:
        value = values.get(name)
        arrays = value.values() if isinstance(value, dict) else [value]
        for array in arrays:
            if not isinstance(array, np.ndarray) or array.shape[:2] != (buffer.buffer_size, buffer.n_envs):
                shape = getattr(array, "shape", type(array).__name__)
                raise FileFormatError(
                    f"The buffer's `{name}` must have the shape ({buffer.buffer_size}, {buffer.n_envs}, ...), "
                    f"the file has {shape}."
                )
