"""
Files without pickle: one zip of ``config.json`` (what and how) and ``tensors.safetensors`` (numbers).

This module knows the container; `codec.py` knows the values in it. Writing to a path is atomic. Reading checks before it
believes, and runs nothing.
"""

import contextlib
import errno
import functools
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch as th
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from safetensors.torch import save_file as safetensors_save_file

from sb3_diffusion.common.allowlist import FileFormatError

#: Version of the layout of a file. A reader refuses files of a newer one.
SCHEMA_VERSION = 1
FORMAT = "sb3_diffusion"
CONFIG_NAME = "config.json"
TENSORS_NAME = "tensors.safetensors"
#: Largest ``config.json`` that is written compressed; a compressed one that unpacks to more is refused.
MAX_CONFIG_BYTES = 64 * 2**20
#: Up to this many bytes of tensors pass through memory; more pass through a temporary file.
MAX_MEMORY_BYTES = 64 * 2**20
MAX_MEMBERS = 64
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # a fixed date: equal contents give equal files
_LIBRARIES = ("stable-baselines3", "torch", "gymnasium", "numpy", "safetensors")

PathOrFile = str | os.PathLike | io.BufferedIOBase | BinaryIO


class Archive(NamedTuple):
    """
    What a file holds.

    :ivar config: the encoded values, as given to `write_archive`
    :ivar tensors: the tensors by name, on the CPU
    :ivar versions: versions of the libraries that wrote the file
    """

    config: dict[str, Any]
    tensors: dict[str, th.Tensor]
    versions: dict[str, str]


# ---- Paths --------------------------------------------------------------------------------------------------------------


def with_suffix(path: PathOrFile, suffix: str = ".zip") -> PathOrFile:
    """
    Where to write: the path with the suffix if it has none at all, as SB3 does it.

    :param path: path or open file
    :param suffix: with its dot
    :return: a `pathlib.Path`, or the open file itself
    """
    if not isinstance(path, (str, os.PathLike)):
        return path
    path = pathlib.Path(path)
    return path if path.suffix else path.with_name(path.name + suffix)


def existing_path(path: PathOrFile, suffix: str = ".zip") -> PathOrFile:
    """
    Where to read from: the path itself if there is such a file, else with the suffix added if there is that one.

    :param path: path or open file
    :param suffix: with its dot
    :return: a `pathlib.Path`, or the open file itself
    :raises FileNotFoundError: if there is neither
    """
    if not isinstance(path, (str, os.PathLike)):
        return path
    path = pathlib.Path(path)
    longer = path.with_name(path.name + suffix) if path.name else path
    if path.is_file() or (path.exists() and not longer.is_file()):
        return path
    if longer.is_file():
        return longer
    raise FileNotFoundError(errno.ENOENT, f"No such file, nor one with {suffix!r} added", str(path))


def _is_path(path: PathOrFile, method: str) -> bool:
    if isinstance(path, (str, os.PathLike)):
        return True
    if not hasattr(path, method) or isinstance(path, io.TextIOBase):
        raise TypeError(f"A path or a binary file object with `{method}` was expected, got {type(path).__name__}.")
    return False


# ---- Writing ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well and vanishes when it does not."""
    target = pathlib.Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "A file was expected, this is a folder", str(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # a device or a pipe is written to, not replaced
            with open(target, "wb") as file:
                yield file
            return
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"Cannot write the file ({error.strerror})", str(path)) from error


def _sync_folder(folder: pathlib.Path) -> None:
    """Make a renaming durable where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _writable(tensors: Mapping[str, th.Tensor | np.ndarray]) -> dict[str, th.Tensor]:
    """The tensors as safetensors wants them: on the CPU, dense, contiguous, none sharing memory with another."""
    ready: dict[str, th.Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            array = np.asarray(value, order="C")
            value = th.from_numpy(array if array.flags.writeable else array.copy())
        if not isinstance(name, str) or not isinstance(value, th.Tensor) or value.layout != th.strided:
            raise TypeError(f"A name and a dense tensor or array were expected, got {name!r}: {type(value).__name__}.")
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return ready


def _write_tensors(archive: zipfile.ZipFile, tensors: dict[str, th.Tensor], scratch: str | None) -> None:
    info = _member(TENSORS_NAME, zipfile.ZIP_STORED)
    if sum(tensor.nbytes for tensor in tensors.values()) <= MAX_MEMORY_BYTES:
        archive.writestr(info, safetensors_save(tensors))
        return
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=scratch) as folder:
        spool = os.path.join(folder, TENSORS_NAME)
        try:
            safetensors_save_file(tensors, spool)
        except SafetensorError as error:  # a full disk reads "... (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            code = int(number.group(1)) if number else errno.EIO
            raise OSError(code, os.strerror(code), spool) from error
        with open(spool, "rb") as source, archive.open(info, "w", force_zip64=True) as member:
            shutil.copyfileobj(source, member, 2**20)


def _member(name: str, compression: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _ZIP_DATE)
    info.compress_type = compression
    info.external_attr = 0o644 << 16
    return info


def _write(file: BinaryIO, config: bytes, tensors: dict[str, th.Tensor], scratch: str | None) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        compression = zipfile.ZIP_DEFLATED if len(config) <= MAX_CONFIG_BYTES else zipfile.ZIP_STORED
        archive.writestr(_member(CONFIG_NAME, compression), config)
        _write_tensors(archive, tensors, scratch)


@functools.cache
def library_versions() -> dict[str, str]:
    """:return: versions of Python, of this package and of the libraries that files depend on; do not change it"""
    import sb3_diffusion

    versions = {"python": platform.python_version(), FORMAT: str(getattr(sb3_diffusion, "__version__", "unknown"))}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:  # a source tree on the path instead of an installed package
            versions[library] = "unknown"
    return versions


def write_archive(path: PathOrFile, kind: str, config: dict[str, Any], tensors: Mapping[str, th.Tensor | np.ndarray]) -> None:
    """
    Write one file. A path is written atomically: until everything is on the disk an older file of that name stays as it is,
    and nothing is left behind on failure. Missing folders are made.

    :param path: exact path (see `with_suffix`), or a binary file object, which is written at its position and not closed
    :param kind: what the file is: ``"model"``, ``"policy"``, ``"replay_buffer"``
    :param config: JSON values, as an `Encoder` makes them
    :param tensors: tensors or numeric arrays, of any device
    :raises OSError: if the file cannot be written; names the path
    :raises TypeError: if ``path``, ``config`` or ``tensors`` are not what is expected
    """
    header = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "kind": kind, "versions": library_versions()}
    text = json.dumps({**header, "config": config}, allow_nan=False).encode()
    ready = _writable(tensors)
    if _is_path(path, "write"):
        scratch = pathlib.Path(os.path.realpath(path)).parent  # type: ignore[arg-type]
        with _replacing(path) as file:  # type: ignore[arg-type]
            _write(file, text, ready, str(scratch) if os.access(scratch, os.W_OK) else None)
        return
    size = len(text) + sum(tensor.nbytes for tensor in ready.values())
    with io.BytesIO() if size <= MAX_MEMORY_BYTES else tempfile.TemporaryFile() as whole:  # before the first byte goes out
        _write(whole, text, ready, None)
        whole.seek(0)
        shutil.copyfileobj(whole, path, 2**20)  # type: ignore[arg-type]


# ---- Reading ------------------------------------------------------------------------------------------------------------


def read_archive(path: PathOrFile, kind: str) -> Archive:
    """
    Read one file and check that it is what it should be. Nothing in it is executed and nothing is imported.

    :param path: exact path (see `existing_path`), or a binary file object, which is not closed
    :param kind: what the file must be, as given to `write_archive`
    :return: contents
    :raises FileNotFoundError: if there is no such file
    :raises FileFormatError: if the file is damaged, foreign, of another kind or of a newer schema; says which
    """
    if _is_path(path, "read"):
        with open(path, "rb") as file:  # type: ignore[arg-type]
            return _read(file, repr(os.fspath(path)), kind)  # type: ignore[arg-type]
    if not getattr(path, "seekable", lambda: True)():
        path = io.BytesIO(path.read())  # type: ignore[union-attr]
    return _read(path, f"The {type(path).__name__} object", kind)  # type: ignore[arg-type]


def _read(file: BinaryIO, label: str, kind: str) -> Archive:
    try:
        if not zipfile.is_zipfile(file):
            raise FileFormatError(_describe_foreign(file, label))
        with zipfile.ZipFile(file) as archive:
            members = _check_members(archive, label)
            config, versions = _read_config(archive, members[CONFIG_NAME], label, kind)
            return Archive(config, _read_tensors(archive, members[TENSORS_NAME], label), versions)
    except FileFormatError:
        raise
    except Exception as error:  # a damaged zip fails in a dozen ways: BadZipFile, zlib.error, EOFError, struct.error, ...
        raise FileFormatError(
            f"{label} is damaged or was cut short ({type(error).__name__}: {error}). Fetch or save it again."
        ) from error


def _describe_foreign(file: BinaryIO, label: str) -> str:
    """What a file that is no zip looks like."""
    file.seek(0)
    start = file.read(16)
    if not isinstance(start, bytes):
        return f"{label} was opened as text; open it in mode 'rb'."
    if not start:
        return f"{label} is empty."
    if start.startswith(b"PK\x03\x04"):
        return f"{label} begins like a zip file but its end is missing: it was cut short. Fetch or save it again."
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return (
            f"{label} is a pickle file (as SB3's `save_replay_buffer` or an old `th.save` write them). Pickle can run any "
            "code, so it is not read; load it with the library that wrote it and save it again from here."
        )
    if start.startswith(b"\x89HDF"):
        return f"{label} is an HDF5 file: a dataset, not a saved {FORMAT} object. Pass it to `load_dataset`."
    return f"{label} is not a file written by {FORMAT}: those are zip files with {CONFIG_NAME} and {TENSORS_NAME}."


def _check_members(archive: zipfile.ZipFile, label: str) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    for name in names[: MAX_MEMBERS + 1]:
        if name.endswith("data.pkl"):
            raise FileFormatError(
                f"{label} is a file of `th.save`, which holds a pickle ({name!r}). Pickle can run any code, so it is not "
                "read; load it with the library that wrote it and save it again from here."
            )
    if CONFIG_NAME not in names and ("data" in names or "_stable_baselines3_version" in names):
        raise FileFormatError(
            f"{label} is a model file of Stable-Baselines3 ('data', '*.pth'), whose values are pickled. Pickle can run any "
            f"code, so it is not read; load it with SB3's own class and train or save a model of {FORMAT} instead."
        )
    if len(names) > MAX_MEMBERS or len(set(names)) != len(names):
        raise FileFormatError(f"{label} holds {len(names)} members, some of them twice or too many: refused.")
    for name in names:
        if "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise FileFormatError(f"{label} has a member {name!r} that points outside the file's own folder: refused.")
    missing = [name for name in (CONFIG_NAME, TENSORS_NAME) if name not in names]
    if missing:
        raise FileFormatError(f"{label} is not a file written by {FORMAT}: it lacks {' and '.join(missing)}.")
    return {info.filename: info for info in infos}


def _stored_within(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    """Whether a member is uncompressed and no larger than the file that claims to hold it."""
    assert archive.fp is not None
    archive.fp.seek(0, os.SEEK_END)
    stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    return stored and info.file_size <= archive.fp.tell()


def _read_config(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str, kind: str
) -> tuple[dict[str, Any], dict[str, str]]:
    limit = info.file_size if _stored_within(archive, info) else MAX_CONFIG_BYTES
    with archive.open(info) as member:
        text = member.read(limit + 1)
    if len(text) > limit or info.file_size > limit:
        raise FileFormatError(f"{label} has a {CONFIG_NAME} that unpacks to more than {limit} bytes: refused.")
    try:
        content = json.loads(text.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{label} has a {CONFIG_NAME} that is not valid JSON ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FileFormatError(f"{label} has a {CONFIG_NAME} that was not written by {FORMAT}: its 'format' is not {FORMAT!r}.")
    version = content.get("schema_version")
    if type(version) is not int or version < 1:
        raise FileFormatError(f"{label} has the schema version {version!r}; a positive integer was expected.")
    versions = content.get("versions")
    versions = {str(key): str(value) for key, value in versions.items()} if isinstance(versions, dict) else {}
    if version > SCHEMA_VERSION:
        raise FileFormatError(
            f"{label} has schema version {version}, this installation reads up to {SCHEMA_VERSION}: upgrade {FORMAT} "
            f"(the file was written by {versions.get(FORMAT, 'an unknown version')})."
        )
    if content.get("kind") != kind:
        raise FileFormatError(f"{label} holds a {content.get('kind')!r}, a {kind!r} was expected: check which file to load.")
    if not isinstance(content.get("config"), dict):
        raise FileFormatError(f"{label} has a {CONFIG_NAME} without the dictionary 'config'.")
    return content["config"], versions


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _read_tensors(archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str) -> dict[str, th.Tensor]:
    if not _stored_within(archive, info):
        raise FileFormatError(
            f"{label} has a {TENSORS_NAME} that is compressed or larger than the file itself: refused. "
            "It must be stored uncompressed."
        )
    try:
        if info.file_size <= MAX_MEMORY_BYTES:
            return safetensors_load(archive.read(info))
        with tempfile.TemporaryDirectory() as folder:
            spool = os.path.join(folder, TENSORS_NAME)
            with archive.open(info) as member, open(spool, "wb") as target:
                shutil.copyfileobj(member, target, 2**20)
            with safe_open(spool, framework="pt") as tensors:  # mapped, so only what is cloned takes memory
                return {name: tensors.get_tensor(name).clone() for name in tensors.keys()}
    except SafetensorError as error:
        raise FileFormatError(f"{label} has a {TENSORS_NAME} that is not valid ({error}).") from error
