"""
Values to JSON and tensors and back, without pickle.

An `Encoder` turns a Python value into plain JSON plus a dictionary of tensors, a `Decoder` turns these back. What JSON knows
(None, booleans, numbers, strings, lists, dictionaries with string keys) stands for itself; anything else is a dictionary
with one key that begins with ``$`` and says what it is. Reading such a value never runs code that the file chose: classes
come from an allow-list and only into places ("slots") that expect a subclass of a known base, and instances exist only of the
few classes that were registered by `register_value_class`.
"""

import base64
import copy
import inspect
import math
import pathlib
import re
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from sb3_diffusion.common.allowlist import (
    INSTANCE_BASES,
    SLOT_BASES,
    FileFormatError,
    MissingObject,
    MissingObjectError,
    class_path,
    full_name,
    functions,
    path_of,
    resolve_class,
    simple_name,
    slot_name,
    value_classes,
)
from sb3_diffusion.datasets.env_specs import SETTINGS, plain_wrappers

#: Deepest nesting of containers that is written or read.
MAX_DEPTH = 64
#: Arrays of at most this many bytes are written into the JSON itself (base64) instead of as a tensor of their own.
INLINE_BYTES = 128
#: Largest array of Python objects that may be rebuilt from one repeated element.
MAX_FILLED_OBJECTS = 2**25

_NATIVE_DTYPES = frozenset(np.dtype(name) for name in ("?", *"bBhHiIlLqQ", *"efdF"))  # those that safetensors stores as such
_TENSOR_DTYPES = frozenset(
    {th.bool, th.uint8, th.int8, th.uint16, th.int16, th.uint32, th.int32, th.uint64, th.int64}
    | {th.float16, th.bfloat16, th.float32, th.float64, th.complex64}
)
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_DTYPE_STRING = re.compile(r"[<>|=]?([?biufcSU]\d*|[mM]\d*(\[\d*[A-Za-z]+\])?)")
_JSON_INT_LIMIT = 2**63


class _CustomObjectTypeError(TypeError):
    """An entry of ``custom_objects`` that does not fit its slot (a mistake of the caller, not of the file)."""


def _join(slot: str, key: Any) -> str:
    """Slot of an element, by its key; keys that are not plain values take part by their type."""
    name = str(key) if isinstance(key, (str, int, float)) else type(key).__name__
    return f"{slot}.{name}" if slot else name


# ---- Encoding -----------------------------------------------------------------------------------------------------------


class Encoder:
    """
    Turn values into JSON and tensors. Encoding never fails: what cannot be written (a lambda, a class outside the allow-list,
    an object of an unknown class) is recorded by name and listed in ``missing``.

    Tensors and arrays are kept by reference until they are written, so write before they change.

    :param n_rows: arrays with this first axis longer than ``n_filled`` are written without their trailing rows when these are
        all zero (object arrays: all ``{}``), as replay buffers that are not full have many; None writes everything
    :param n_filled: number of leading rows that are always written
    """

    def __init__(self, n_rows: int | None = None, n_filled: int = 0) -> None:
        self.n_rows = n_rows
        self.n_filled = n_filled
        self.tensors: dict[str, th.Tensor] = {}
        self.missing: list[MissingObject] = []
        self._open: set[int] = set()  # containers being encoded, to notice one that contains itself

    def encode(self, value: Any, slot: str = "") -> Any:
        """
        Encode one value.

        :param value: anything
        :param slot: where it belongs: attribute names and keys joined by dots; names its tensors, too
        :return: a value that ``json.dumps(..., allow_nan=False)`` accepts
        """
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return value if -_JSON_INT_LIMIT <= value < _JSON_INT_LIMIT else {"$int": hex(value)}
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if id(value) in self._open or len(self._open) >= MAX_DEPTH:
            return self._by_name(value, slot)
        self._open.add(id(value))
        try:
            return self._encode_object(value, slot)
        finally:
            self._open.discard(id(value))

    def encode_all(self, data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """
        Encode the entries of a dictionary, each with its key as the slot.

        :param data: named values
        :param prefix: put before each slot, with a dot, if not empty
        :return: the same keys with encoded values
        """
        return {name: self.encode(value, _join(prefix, name)) for name, value in data.items()}

    def warn_missing(self, stacklevel: int = 2) -> None:
        """
        Emit one warning that lists everything recorded by name only; none if there is nothing.

        :param stacklevel: as for `warnings.warn`; 2 points at the caller of this method
        """
        if self.missing:
            listing = ", ".join(f"{name} (at {slot!r})" for slot, name in self.missing)
            warnings.warn(
                f"Recorded by name only: {listing}. Loading this file will ask for them through `custom_objects`.",
                stacklevel=stacklevel,
            )

    def _by_name(self, value: Any, slot: str) -> dict[str, Any]:
        entry = MissingObject(slot, full_name(value))
        self.missing.append(entry)
        return {"$missing": entry.name, "slot": slot}

    def _encode_items(self, values: Iterable[Any], slot: str) -> list[Any]:
        return [self.encode(value, f"{slot}.{i}") for i, value in enumerate(values)]

    def _encode_object(self, value: Any, slot: str) -> Any:
        cls = type(value)
        path = path_of(cls)
        if isinstance(value, (type, np.dtype)) or inspect.isroutine(value):
            return self._encode_named(value, slot)
        if value_classes.get(path) is cls:
            if isinstance(value, Enum):
                return {"$enum": path, "name": value.name}
            if isinstance(value, tuple):
                return {"$namedtuple": path, "values": self._encode_items(value, slot)}
            return {"$object": path, "state": self.encode_all(vars(value), slot)}
        if cls is list:
            return self._encode_items(value, slot)
        if cls in (dict, OrderedDict):
            return self._encode_dict(value, slot)
        if cls in (tuple, th.Size):
            return {"$tuple" if cls is tuple else "$size": self._encode_items(value, slot)}
        if cls in (set, frozenset):
            return {f"${cls.__name__}": self._encode_items(sorted(value, key=repr), slot)}
        if cls is deque:
            return {"$deque": self._encode_items(value, slot), "maxlen": value.maxlen}
        if cls in (bytes, bytearray):
            return {f"${cls.__name__}": base64.b64encode(value).decode()}
        if cls is complex:
            return {"$complex": [self.encode(value.real), self.encode(value.imag)]}
        if cls is range:
            return {"$range": [self.encode(number) for number in (value.start, value.stop, value.step)]}
        if isinstance(value, pathlib.PurePath):
            return {"$path": str(value)}
        if isinstance(value, th.Tensor):
            return self._encode_tensor(value, slot)
        if cls in (np.ndarray, np.memmap):
            return self._encode_array(value, slot)
        if isinstance(value, np.generic) and _storable(value.dtype):
            return {"$scalar": value.dtype.str, "data": base64.b64encode(value.tobytes()).decode()}
        if isinstance(value, th.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, th.device):
            return {"$device": str(value)}
        if isinstance(value, th.Generator):
            state = self._encode_tensor(value.get_state(), slot)
            return {"$torch_generator": state, "device": str(value.device), "seed": self.encode(value.initial_seed())}
        if cls is np.random.Generator and type(value.bit_generator).__name__ in _BIT_GENERATORS:
            return {"$numpy_generator": self.encode(value.bit_generator.state, slot)}
        if isinstance(value, spaces.Space):
            return self._encode_space(value, slot)
        if isinstance(value, EnvSpec):
            return self._encode_env_spec(value, slot)
        return self._by_name(value, slot)

    def _encode_named(self, value: Any, slot: str) -> Any:
        """Classes, functions and numpy dtypes."""
        if isinstance(value, np.dtype):
            return {"$numpy_dtype": value.str} if _storable(value) else self._by_name(value, slot)
        if isinstance(value, type):
            name = value.__name__
            if issubclass(value, np.generic) and getattr(np, name, None) is value:
                return {"$numpy_type": name}
            base = SLOT_BASES.get(slot_name(slot))
            path = class_path(value, base) if base is not None and issubclass(value, base) else None
            return self._by_name(value, slot) if path is None else {"$class": path}
        if functions.get(path_of(value)) is value:
            return {"$function": path_of(value)}
        return self._by_name(value, slot)

    def _encode_dict(self, value: dict, slot: str) -> dict[str, Any]:
        items = [(key, _join(slot, key), element) for key, element in value.items()]
        plain = all(type(key) is str and not key.startswith("$") for key in value)
        if plain and type(value) is dict:
            return {key: self.encode(element, path) for key, path, element in items}
        pairs = [[self.encode(key, f"{slot}.key"), self.encode(element, path)] for key, path, element in items]
        return {"$dict" if type(value) is dict else "$ordered_dict": pairs}

    def _store(self, tensor: th.Tensor, slot: str) -> str:
        name = key = slot.encode("utf-8", "replace").decode() or "value"
        n = 1
        while key in self.tensors or key == "__metadata__":
            n += 1
            key = f"{name}#{n}"
        self.tensors[key] = tensor
        return key

    def _encode_tensor(self, tensor: th.Tensor, slot: str) -> dict[str, Any]:
        known = type(tensor) in (th.Tensor, th.nn.Parameter, th.nn.Buffer) and tensor.layout == th.strided
        if not known or tensor.device.type == "meta" or tensor.dtype not in (*_TENSOR_DTYPES, th.complex128):
            return self._by_name(tensor, slot)
        entry: dict[str, Any] = {}
        if tensor.requires_grad:
            entry["requires_grad"] = True
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if tensor.dtype == th.complex128:  # safetensors has no such type: two float64 in its place
            entry["complex"] = True
            tensor = th.view_as_real(tensor)
        return {"$tensor": self._store(tensor, slot), **entry}

    def _encode_array(self, array: np.ndarray, slot: str) -> dict[str, Any]:
        shape = list(array.shape)
        trimmable = self.n_rows is not None and array.ndim > 0 and len(array) == self.n_rows > self.n_filled
        if array.dtype == object:
            return self._encode_object_array(array, slot, trimmable)
        if not _storable(array.dtype):
            return self._by_name(array, slot)
        entry: dict[str, Any] = {"dtype": array.dtype.str, "shape": shape}
        if trimmable and array.nbytes > INLINE_BYTES and _is_zero(array[self.n_filled :]):
            entry["rows"] = self.n_filled
            array = array[: self.n_filled]
        if array.nbytes <= INLINE_BYTES and "rows" not in entry:
            return {"$array": None, **entry, "data": base64.b64encode(array.tobytes()).decode()}
        array = np.asarray(array, order="C")
        if not array.flags.writeable:
            array = array.copy()  # torch has no read-only tensors
        stored_as_such = array.dtype in _NATIVE_DTYPES and array.dtype.isnative
        array = array.view(np.dtype(array.dtype.str)) if stored_as_such else array.reshape(-1).view(np.uint8)
        return {"$array": self._store(th.from_numpy(array), slot), **entry}

    def _encode_object_array(self, array: np.ndarray, slot: str, trimmable: bool) -> dict[str, Any]:
        def is_blank(part: np.ndarray) -> bool:
            return all(type(element) is dict and not element for element in part.flat)

        rows = self.n_filled if trimmable and is_blank(array[self.n_filled :]) else None
        kept = array if rows is None else array[:rows]
        if array.ndim > 0 and kept.size > 0 and array.size <= MAX_FILLED_OBJECTS and is_blank(kept):
            rows, kept = 0, array[:0]
        elif array.size > MAX_FILLED_OBJECTS:
            rows, kept = None, array
        items = self._encode_items(kept.flat, slot)
        return {"$object_array": list(array.shape), "items": items, **({} if rows is None else {"rows": rows})}

    def _encode_space(self, space: spaces.Space, slot: str) -> dict[str, Any]:
        """The space as one of Gymnasium's own kinds (an instance of a subclass is described as what it inherits from)."""
        state: dict[str, Any]
        if isinstance(space, spaces.Box):
            state = {"dtype": space.dtype, "low": space.low, "high": space.high}
            if space.dtype.kind in "iu" and not space.is_bounded():  # an integer bound alone does not say that it is infinite
                state.update(bounded_below=space.bounded_below, bounded_above=space.bounded_above)
        elif isinstance(space, spaces.Discrete):
            state = {"dtype": space.dtype, "n": int(space.n), "start": int(space.start)}
        elif isinstance(space, spaces.MultiDiscrete):
            state = {"dtype": space.dtype, "nvec": space.nvec, "start": space.start}
        elif isinstance(space, spaces.MultiBinary):
            state = {"n": space.n}
        elif isinstance(space, spaces.Text):
            state = {"min_length": space.min_length, "max_length": space.max_length}
            state["charset"] = "".join(space.character_list)
        elif isinstance(space, spaces.Dict):
            state = {"spaces": OrderedDict(space.spaces)}
        elif isinstance(space, spaces.Tuple):
            state = {"spaces": list(space.spaces)}
        else:
            return self._by_name(space, slot)
        kind = next(name for name, cls in _SPACES.items() if isinstance(space, cls))
        state["np_random"] = space._np_random
        return {"$space": kind, "state": self.encode_all(state, slot)}

    def _encode_env_spec(self, spec: EnvSpec, slot: str) -> dict[str, Any]:
        wrappers = [
            {"name": wrapper.name, "entry_point": wrapper.entry_point, "kwargs": wrapper.kwargs}
            for wrapper in spec.additional_wrappers
            if not wrapper.entry_point.startswith("stable_baselines3.common.monitor")  # put around every env anyway
        ]
        state = {name: getattr(spec, name) for name in SETTINGS}
        return {"$env_spec": spec.id, "state": self.encode_all(state, slot), "wrappers": self.encode(wrappers, slot)}


_SPACES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        spaces.Box,
        spaces.Discrete,
        spaces.MultiDiscrete,
        spaces.MultiBinary,
        spaces.Text,
        spaces.Dict,
        spaces.Tuple,
    )
}


def _storable(dtype: np.dtype) -> bool:
    return dtype.kind in "biufcSUmM" and _DTYPE_STRING.fullmatch(dtype.str) is not None


def _is_zero(array: np.ndarray) -> bool:
    """Whether every byte-wise zero test passes: done in pieces, so that a large array needs no large temporary."""
    if array.dtype.kind not in "biufc":
        return False
    return not any(array[i : i + 4096].any() for i in range(0, len(array), 4096))


# ---- Decoding -----------------------------------------------------------------------------------------------------------


class Decoder:
    """
    Turn what an `Encoder` made back into values.

    :param tensors: the tensors of the file; used without a copy, so decode each value once
    :param custom_objects: replacements by slot path (``"policy_kwargs.features_extractor_class"``; what the file holds
        there is then not looked at) and, for objects that the file only names, also by the last part of the slot, the
        recorded name or its last part. A class is checked against the base class of its slot.
    :raises ValueError: if ``custom_objects`` is neither a dictionary nor None
    """

    def __init__(self, tensors: dict[str, th.Tensor], custom_objects: dict[str, Any] | None = None) -> None:
        if custom_objects is not None and not isinstance(custom_objects, dict):
            raise ValueError(f"`custom_objects` must be a dict or None, got {type(custom_objects).__name__}.")
        self.tensors = tensors
        self.custom_objects = custom_objects or {}
        self._missing: list[MissingObject] = []
        self._depth = 0

    def decode(self, obj: Any, slot: str = "") -> Any:
        """
        Decode one value.

        :param obj: what `Encoder.encode` returned, after its way through JSON
        :param slot: where it belongs, as given to the encoder
        :return: the value
        :raises MissingObjectError: if objects recorded by name were not given; lists all that this value needs
        :raises FileFormatError: if the value is malformed or refused
        :raises TypeError: if a custom object does not fit its slot
        """
        return self.decode_all({slot: obj})[slot]

    def decode_all(self, data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """
        Decode the entries of a dictionary, each with its key as the slot. An entry that ``custom_objects`` names by its key
        is replaced without being decoded.

        :param data: what `Encoder.encode_all` returned
        :param prefix: put before each slot, with a dot, if not empty
        :return: the same keys with values
        :raises MissingObjectError: if objects recorded by name were not given; lists all of them
        :raises FileFormatError: if a value is malformed or refused
        :raises TypeError: if a custom object does not fit its slot
        """
        if not isinstance(data, dict):
            raise FileFormatError(f"A dictionary of named values was expected, the file holds a {type(data).__name__}.")
        self._missing, self._depth = [], 0
        values = {name: self._decode(obj, _join(prefix, name)) for name, obj in data.items()}
        if self._missing:
            raise MissingObjectError(self._missing)
        return values

    def _custom(self, key: str, slot: str) -> Any:
        """An entry of ``custom_objects``, checked against the base class of the slot."""
        value = self.custom_objects[key]
        base = SLOT_BASES.get(slot_name(slot))
        if base is not None and value is not None and not (isinstance(value, type) and issubclass(value, base)):
            raise _CustomObjectTypeError(
                f"custom_objects[{key!r}] must be a subclass of {base.__module__}.{base.__qualname__}, got {value!r}."
            )
        instance_of = INSTANCE_BASES.get(slot_name(slot))
        if instance_of is not None and value is not None and not isinstance(value, instance_of):
            raise _CustomObjectTypeError(f"custom_objects[{key!r}] must be an {instance_of.__name__} object, got {value!r}.")
        return value

    def _decode(self, obj: Any, slot: str) -> Any:
        if slot in self.custom_objects:
            return self._custom(slot, slot)
        if obj is None or isinstance(obj, (bool, int, float, str)):
            return obj
        self._depth += 1
        n_missing = len(self._missing)
        try:
            if self._depth > MAX_DEPTH + 2:
                raise FileFormatError(f"The value at {slot!r} is nested more than {MAX_DEPTH} levels deep.")
            if isinstance(obj, list):
                return self._decode_items(obj, slot)
            if not isinstance(obj, dict):
                raise FileFormatError(f"The value at {slot!r} is a {type(obj).__name__}, which JSON does not have.")
            tag = next(iter(obj), "")
            if not tag.startswith("$"):
                return {key: self._decode(value, _join(slot, key)) for key, value in obj.items()}
            if tag == "$missing":
                return self._decode_missing(obj, slot)
            reader = _READERS.get(tag)
            if reader is None:
                raise FileFormatError(f"The value at {slot!r} is of unknown kind {tag!r}; a newer version may know it.")
            return reader(self, obj, slot)
        except (FileFormatError, _CustomObjectTypeError):
            raise
        except Exception as error:  # a malformed value fails in as many ways as there are constructors
            if len(self._missing) > n_missing:
                return None  # it failed for want of a custom object, which is reported at the end
            raise FileFormatError(f"The value at {slot!r} is malformed ({type(error).__name__}: {error}).") from error
        finally:
            self._depth -= 1

    def _decode_missing(self, obj: dict[str, Any], slot: str) -> Any:
        return self._by_name(str(obj["$missing"]), slot)

    def _by_name(self, name: str, slot: str) -> Any:
        """The custom object for something that the file only names; None, and a note of it, if it was not given."""
        for key in (slot_name(slot), name, simple_name(name)):
            if key in self.custom_objects:
                return self._custom(key, slot)
        self._missing.append(MissingObject(slot, name))
        return None

    def _decode_items(self, values: Any, slot: str) -> list[Any]:
        if not isinstance(values, list):
            raise FileFormatError(f"The value at {slot!r} must be a list, the file holds a {type(values).__name__}.")
        return [self._decode(value, f"{slot}.{i}") for i, value in enumerate(values)]

    def _decode_pairs(self, pairs: Any, slot: str) -> list[tuple[Any, Any]]:
        items = []
        for key, value in pairs:
            key = self._decode(key, f"{slot}.key")
            items.append((key, self._decode(value, _join(slot, key))))
        return items

    def _decode_tensor(self, obj: dict[str, Any], slot: str) -> th.Tensor:
        tensor = self._tensor(obj["$tensor"], slot)
        if obj.get("complex"):
            tensor = th.view_as_complex(tensor)
        return tensor.requires_grad_() if obj.get("requires_grad") else tensor

    def _tensor(self, key: str, slot: str) -> th.Tensor:
        if key not in self.tensors:
            raise FileFormatError(f"The value at {slot!r} needs the tensor {key!r}, which the file does not hold.")
        return self.tensors[key]

    def _decode_array(self, obj: dict[str, Any], slot: str) -> np.ndarray:
        dtype, shape = _read_dtype(obj["dtype"]), _read_shape(obj["shape"])
        rows = obj.get("rows")
        stored_shape = shape if rows is None else (rows, *shape[1:])
        if obj["$array"] is None:
            array = np.frombuffer(base64.b64decode(obj["data"], validate=True), dtype).copy()
        else:
            array = self._tensor(obj["$array"], slot).numpy()
            if rows is not None:
                del self.tensors[obj["$array"]]  # it is about to be copied; a full replay buffer should not be in memory twice
            if array.dtype == np.uint8 and dtype != np.uint8:
                array = array.reshape(-1).view(dtype) if dtype.itemsize else np.zeros(stored_shape, dtype)
        if array.dtype != dtype:
            raise FileFormatError(f"The array at {slot!r} should be of {dtype}, its tensor is of {array.dtype}.")
        array = array.reshape(stored_shape)
        if rows is None:
            return array
        if not 0 <= rows <= shape[0]:
            raise FileFormatError(f"The array at {slot!r} has {shape[0]} rows, but {rows} of them are said to be in the file.")
        try:
            full = np.zeros(shape, dtype)
        except MemoryError as error:
            raise FileFormatError(f"The array at {slot!r} of shape {shape} does not fit into memory.") from error
        full[:rows] = array
        return full

    def _decode_object_array(self, obj: dict[str, Any], slot: str) -> np.ndarray:
        shape = _read_shape(obj["$object_array"])
        items = self._decode_items(obj["items"], slot)
        if "rows" not in obj and math.prod(shape) != len(items):
            raise FileFormatError(f"The array at {slot!r} of shape {shape} has {len(items)} elements in the file.")
        if "rows" in obj and math.prod(shape) > MAX_FILLED_OBJECTS:
            raise FileFormatError(f"The array at {slot!r} of shape {shape} is larger than {MAX_FILLED_OBJECTS} elements.")
        items.extend({} for _ in range(math.prod(shape) - len(items)))
        array = np.empty(len(items), dtype=object)
        for i, item in enumerate(items):
            array[i] = item
        return array.reshape(shape)

    def _decode_object(self, obj: dict[str, Any], slot: str) -> Any:
        cls = value_classes.get(obj["$object"])
        if cls is None:
            return self._by_name(obj["$object"], slot)
        if issubclass(cls, (Enum, tuple)):
            raise FileFormatError(f"The value at {slot!r} of class {cls.__name__} is not described by attributes.")
        instance = cls.__new__(cls)
        set_attributes(instance, {key: self._decode(value, f"{slot}.{key}") for key, value in obj["state"].items()})
        return instance

    def _decode_class(self, obj: dict[str, Any], slot: str) -> type:
        base = SLOT_BASES.get(slot_name(slot))
        if base is None:
            raise FileFormatError(f"The file names the class {obj['$class']!r} at {slot!r}, where none is expected: refused.")
        try:
            return resolve_class(obj["$class"], base)
        except FileFormatError:
            path = str(obj["$class"])
            if any(key in self.custom_objects for key in (slot_name(slot), path, simple_name(path))):
                return self._by_name(path, slot)
            raise

    def _decode_space(self, obj: dict[str, Any], slot: str) -> spaces.Space:
        state = {key: self._decode(value, f"{slot}.{key}") for key, value in obj["state"].items()}
        np_random = state.pop("np_random", None)
        bounded = {key: state.pop(key) for key in ("bounded_below", "bounded_above") if key in state}
        if obj["$space"] == "Discrete" and state["dtype"] == np.int64:
            del state["dtype"]  # the default; older versions of Gymnasium lack the argument
        space = _SPACES[obj["$space"]](**state)
        for key, value in bounded.items():
            setattr(space, key, np.asarray(value, dtype=bool).reshape(space.shape))
        if np_random is not None and not isinstance(np_random, np.random.Generator):
            raise FileFormatError(f"The random generator of the space at {slot!r} is a {type(np_random).__name__}.")
        space._np_random = np_random
        return space

    def _decode_numpy_generator(self, obj: dict[str, Any], slot: str) -> np.random.Generator:
        state = self._decode(obj["$numpy_generator"], slot)
        if state["bit_generator"] not in _BIT_GENERATORS:
            raise FileFormatError(f"The generator at {slot!r} is of unknown kind {state['bit_generator']!r}.")
        bit_generator = getattr(np.random, state["bit_generator"])(0)
        bit_generator.state = state
        return np.random.Generator(bit_generator)

    def _decode_torch_generator(self, obj: dict[str, Any], slot: str) -> th.Generator:
        state = self._decode(obj["$torch_generator"], slot)
        device = th.device(obj["device"])
        if device.type != "cpu" and not (device.type == "cuda" and (device.index or 0) < th.cuda.device_count()):
            warnings.warn(
                f"The generator at {slot!r} lived on {device}, which is not here; it starts anew from its seed.", stacklevel=2
            )
            return th.Generator().manual_seed(self._decode(obj["seed"], slot))
        return th.Generator(device).set_state(state)

    def _decode_env_spec(self, obj: dict[str, Any], slot: str) -> EnvSpec:
        """The registered environment of that id with the settings of the file; its code comes from the registry alone."""
        spec_id = obj["$env_spec"]
        if ":" in spec_id:
            raise FileFormatError(f"The environment id {spec_id!r} at {slot!r} asks to import a module: refused.")
        registered = gym.registry.get(spec_id)
        spec = EnvSpec(spec_id) if registered is None else copy.copy(registered)
        state = {key: self._decode(value, f"{slot}.{key}") for key, value in obj["state"].items()}
        for name in SETTINGS:
            setattr(spec, name, state[name])
        if not isinstance(spec.kwargs, dict):
            raise FileFormatError(f"The arguments of the environment {spec_id!r} are a {type(spec.kwargs).__name__}.")
        wrappers = [WrapperSpec(**wrapper) for wrapper in self._decode(obj["wrappers"], slot)]
        spec.additional_wrappers = plain_wrappers(spec_id, wrappers)
        return spec


def set_attributes(instance: Any, state: dict[str, Any]) -> None:
    """
    Set attributes read from a file, none of which may hide a method or property of the class.

    :param instance: object with a ``__dict__``
    :param state: its attributes
    :raises FileFormatError: if a name is not allowed
    """
    for name in state:
        inherited = inspect.getattr_static(type(instance), name, None)
        if not name.isidentifier() or name.startswith("__") or callable(inherited) or hasattr(inherited, "__get__"):
            raise FileFormatError(f"{type(instance).__name__} cannot have an attribute {name!r} from a file.")
    instance.__dict__.update(state)


def _read_dtype(text: Any) -> np.dtype:
    if not isinstance(text, str) or not _DTYPE_STRING.fullmatch(text):
        raise FileFormatError(f"{text!r} is not a numeric or text data type.")
    return np.dtype(text)


def _read_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise FileFormatError(f"{shape!r} is not the shape of an array.")
    return tuple(shape)


def _read_float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise FileFormatError(f"{text!r} is not a special floating-point number.")
    return float(text)


def _read_scalar(obj: dict[str, Any]) -> Any:
    dtype = _read_dtype(obj["$scalar"])
    data = base64.b64decode(obj["data"], validate=True)
    return np.frombuffer(data, dtype)[0] if dtype.itemsize else np.zeros((), dtype)[()]


def _read_numpy_type(name: str) -> type:
    found = getattr(np, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, np.generic)):
        raise FileFormatError(f"{name!r} is not a scalar type of numpy.")
    return found


def _read_torch_dtype(name: str) -> th.dtype:
    found = getattr(th, name, None) if name.isidentifier() else None
    if not isinstance(found, th.dtype):
        raise FileFormatError(f"{name!r} is not a data type of torch.")
    return found


def _read_named_tuple(decoder: Decoder, obj: dict[str, Any], slot: str) -> Any:
    cls = value_classes.get(obj["$namedtuple"])
    if cls is None:
        return decoder._by_name(obj["$namedtuple"], slot)
    if not (issubclass(cls, tuple) and hasattr(cls, "_fields")):
        raise FileFormatError(f"The value at {slot!r} of class {cls.__name__} is not a named tuple.")
    return cls(*decoder._decode_items(obj["values"], slot))


def _read_enum(decoder: Decoder, obj: dict[str, Any], slot: str) -> Any:
    cls = value_classes.get(obj["$enum"])
    if cls is None:
        return decoder._by_name(obj["$enum"], slot)
    if not issubclass(cls, Enum):
        raise FileFormatError(f"The value at {slot!r} of class {cls.__name__} is not an enumeration.")
    return cls[obj["name"]]


def _read_function(decoder: Decoder, obj: dict[str, Any], slot: str) -> Any:
    found = functions.get(obj["$function"])
    return decoder._by_name(obj["$function"], slot) if found is None else found


_READERS: dict[str, Callable[[Decoder, dict[str, Any], str], Any]] = {
    "$int": lambda decoder, obj, slot: int(obj["$int"], 16),
    "$float": lambda decoder, obj, slot: _read_float(obj["$float"]),
    "$complex": lambda decoder, obj, slot: complex(*decoder._decode_items(obj["$complex"], slot)),
    "$range": lambda decoder, obj, slot: range(*decoder._decode_items(obj["$range"], slot)),
    "$bytes": lambda decoder, obj, slot: base64.b64decode(obj["$bytes"], validate=True),
    "$bytearray": lambda decoder, obj, slot: bytearray(base64.b64decode(obj["$bytearray"], validate=True)),
    "$path": lambda decoder, obj, slot: pathlib.Path(obj["$path"]),
    "$tuple": lambda decoder, obj, slot: tuple(decoder._decode_items(obj["$tuple"], slot)),
    "$size": lambda decoder, obj, slot: th.Size(decoder._decode_items(obj["$size"], slot)),
    "$set": lambda decoder, obj, slot: set(decoder._decode_items(obj["$set"], slot)),
    "$frozenset": lambda decoder, obj, slot: frozenset(decoder._decode_items(obj["$frozenset"], slot)),
    "$deque": lambda decoder, obj, slot: deque(decoder._decode_items(obj["$deque"], slot), obj["maxlen"]),
    "$dict": lambda decoder, obj, slot: dict(decoder._decode_pairs(obj["$dict"], slot)),
    "$ordered_dict": lambda decoder, obj, slot: OrderedDict(decoder._decode_pairs(obj["$ordered_dict"], slot)),
    "$scalar": lambda decoder, obj, slot: _read_scalar(obj),
    "$array": Decoder._decode_array,
    "$object_array": Decoder._decode_object_array,
    "$numpy_dtype": lambda decoder, obj, slot: _read_dtype(obj["$numpy_dtype"]),
    "$numpy_type": lambda decoder, obj, slot: _read_numpy_type(obj["$numpy_type"]),
    "$numpy_generator": Decoder._decode_numpy_generator,
    "$tensor": Decoder._decode_tensor,
    "$dtype": lambda decoder, obj, slot: _read_torch_dtype(obj["$dtype"]),
    "$device": lambda decoder, obj, slot: th.device(obj["$device"]),
    "$torch_generator": Decoder._decode_torch_generator,
    "$class": Decoder._decode_class,
    "$function": _read_function,
    "$enum": _read_enum,
    "$namedtuple": _read_named_tuple,
    "$object": Decoder._decode_object,
    "$space": Decoder._decode_space,
    "$env_spec": Decoder._decode_env_spec,
}
