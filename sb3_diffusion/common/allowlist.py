"""
What a file may name: classes of a few libraries in the places that expect them, and registered classes and functions.

Nothing here reads a file; `codec.py` asks it before it turns a name from a file into an object.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

#: Name of a slot (the last attribute name or dictionary key on the way to a value) -> base class that a class stored there
#: must have. A class in any other slot is written by name only and must be given back through ``custom_objects``.
SLOT_BASES: dict[str, type] = {
    "policy_class": BasePolicy,
    "features_extractor_class": BaseFeaturesExtractor,
    "activation_fn": th.nn.Module,
    "normalization_class": th.nn.Module,
    "optimizer_class": th.optim.Optimizer,
    "replay_buffer_class": ReplayBuffer,
    "noise_class": ActionNoise,
}

#: Slot -> base class of the object, and not of a class, that belongs there.
INSTANCE_BASES: dict[str, type] = {"action_noise": ActionNoise}

#: Packages whose modules may be imported because a file names a class in them.
IMPORTABLE_PACKAGES = ("torch.nn", "torch.optim", "stable_baselines3")
#: Packages whose modules are looked up among those already imported, never imported because of a file.
LOADED_PACKAGES = ("sb3_diffusion", "sb3_contrib")

T = TypeVar("T")


class MissingObject(NamedTuple):
    """
    An object that was written by name only.

    :ivar slot: where it belongs, for instance ``"policy_kwargs.features_extractor_class"``
    :ivar name: its module and qualified name, for instance ``"my_nets.MyExtractor"``
    """

    slot: str
    name: str


class FileFormatError(ValueError):
    """A file, or a value in it, is not what it should be, or is refused. The message says which, why and what to do."""


class MissingObjectError(FileFormatError):
    """
    Objects that were written by name only were not given through ``custom_objects``.

    :ivar missing: the slot and the recorded name of each of them
    """

    def __init__(self, missing: "list[MissingObject]") -> None:
        self.missing = missing
        listing = ", ".join(f"{name} (at {slot!r})" for slot, name in missing)
        example = ", ".join(f"{slot!r}: {_given_back(slot, name)}" for slot, name in missing)
        super().__init__(
            f"The file names objects without holding them, because a file brings no code of its own: {listing}. "
            f"Pass them to the loading call: custom_objects={{{example}}}."
        )


# ---- What may be named by a file ----------------------------------------------------------------------------------------

value_classes: dict[str, type] = {}
functions: dict[str, Callable] = {}


def path_of(obj: Any) -> str:
    return f"{getattr(obj, '__module__', '?')}:{getattr(obj, '__qualname__', type(obj).__qualname__)}"


def simple_name(name: str) -> str:
    return re.split(r"[.:]", name)[-1]


def _given_back(slot: str, name: str) -> str:
    """:return: Python for the object that belongs there, ``...`` for what has no name"""
    python = simple_name(name)
    if not python.isidentifier():
        return "..."
    return f"{python}(...)" if slot_name(slot) in INSTANCE_BASES else python


def register_value_class(cls: type[T]) -> type[T]:
    """
    Allow instances of ``cls`` in files; use it as a decorator. The class may be an `Enum`, a `NamedTuple` or a plain class
    whose instances are described by their ``__dict__`` (no ``__slots__``); of the latter, reading creates an instance without
    calling ``__init__`` and sets the attributes, so it must be harmless with any attributes at all.

    :param cls: the class; an instance of a subclass needs its own registration
    :return: ``cls`` itself
    """
    if not isinstance(cls, type):
        raise TypeError(f"A class was expected, got {cls!r}; functions go to register_function().")
    if not issubclass(cls, (Enum, tuple)) and "__dict__" not in dir(cls):
        raise TypeError(f"{cls.__qualname__} has no `__dict__`; a class with `__slots__` cannot be written by its attributes.")
    value_classes[path_of(cls)] = cls
    return cls


def register_function(function: Callable) -> Callable:
    """
    Allow a function to be named by files, in any slot; use it as a decorator. The file holds the name only.

    :param function: a function that is harmless wherever a file may put it
    :return: ``function`` itself
    """
    if not inspect.isfunction(function):
        raise TypeError(f"A Python function was expected, got {function!r}.")
    functions[path_of(function)] = function
    return function


for _cls in (
    TrainFrequencyUnit,
    GoalSelectionStrategy,
    TrainFreq,
    FloatSchedule,
    ConstantSchedule,
    LinearSchedule,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
    RunningMeanStd,
):
    register_value_class(_cls)


def slot_name(slot: str) -> str:
    """The last part of a slot path that is a name: ``"policy_kwargs.activation_fn.0"`` -> ``"activation_fn"``."""
    names = [part for part in slot.split(".") if not part.isdigit()]
    return names[-1] if names else ""


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def resolve_class(path: str, base: type, packages: tuple[str, ...] = IMPORTABLE_PACKAGES) -> type:
    """
    Find the class that a file names, importing nothing outside the allow-list and evaluating nothing on the way to it.

    :param path: ``"module:qualified.Name"``
    :param base: the class must be this one or a subclass
    :param packages: where a module may be imported from; modules of ``sb3_diffusion`` and ``sb3_contrib`` are found as well
        when they are already imported
    :return: the class
    :raises FileFormatError: if the path is malformed, private, outside the allow-list, not a class or not a ``base``
    """

    def refused(why: str) -> FileFormatError:
        return FileFormatError(
            f"The file names {path!r} where a {base.__name__} class belongs: refused, {why}. "
            "Give the class through `custom_objects` if you trust it."
        )

    module_name, colon, qualname = path.partition(":")
    parts = [*module_name.split("."), *qualname.split(".")]
    if not colon or not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise refused("the path must read 'module:Class' with public names only")
    if _within(module_name, packages):
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:  # whatever an optional part of the library raises when it cannot be imported
            raise refused(f"its module cannot be imported here ({error})") from error
    elif _within(module_name, LOADED_PACKAGES) and module_name in sys.modules:
        found = sys.modules[module_name]
    else:
        raise refused(f"the module is not one of {', '.join((*packages, *LOADED_PACKAGES))}")
    for name in qualname.split("."):
        found = vars(found).get(name)  # not getattr: no descriptor and no module-level __getattr__ runs
        if not isinstance(found, type):
            raise refused(f"{name!r} is not a class there")
    if not _within(found.__module__, (*packages, *LOADED_PACKAGES)):
        raise refused(f"the class comes from {found.__module__!r}, which is only imported there")
    if not issubclass(found, base):
        raise refused(f"it is no subclass of {base.__module__}.{base.__qualname__}")
    return found


def class_path(cls: type, base: type) -> str | None:
    """
    The path under which `resolve_class` finds a class again.

    :param cls: a class
    :param base: the base class that its slot asks for
    :return: ``"module:qualified.Name"``, by the public package for a class of a private module; None if there is none
    """
    module = re.split(r"\._", cls.__module__)[0]
    path = f"{module}:{cls.__qualname__}"
    try:
        return path if resolve_class(path, base) is cls else None
    except FileFormatError:
        return None


def full_name(obj: Any) -> str:
    named = obj if isinstance(obj, type) or inspect.isroutine(obj) else type(obj)
    return f"{getattr(named, '__module__', None) or '?'}.{getattr(named, '__qualname__', repr(type(obj)))}"
