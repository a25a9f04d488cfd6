"""
Damaged and hostile files: model files, replay files and all kinds of datasets, changed at random, are read or refused.

    python benchmarks/fuzz.py                        # 100,000 inputs in all; adds to what was done before
    python benchmarks/fuzz.py --kinds model --inputs 2000 --seed 7

Inputs are made from valid files by changes of bytes and of structure (JSON, safetensors headers, HDF5 groups, members of the
zip), and an input that was answered in a new way becomes a start of further ones. Each is read in a process with limits on
memory, size of files and time. An answer is a loaded object or an error that the documentation names; anything else is a
finding: another exception, a killed process, a started program, an opened connection, an import that the file asked for, a
file written outside the folder. Findings are kept in ``benchmarks/work/fuzz``.
"""

import argparse
import copy
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import torch as th
from harness import RESULTS, WORK, write_json, write_table
from safetensors.torch import save as safetensors_save

from sb3_diffusion import DTQL, OfflineDataset, load_dataset
from sb3_diffusion.common.serialization import load_replay_buffer
from sb3_diffusion.datasets import DEFAULT_DATASET_ID, write_dataset

FOLDER = WORK / "fuzz"
DOCUMENTED = (ValueError, OSError, TypeError, ImportError)
"""What the documentation of the readers names; ``FileFormatError`` is a ``ValueError``."""
BATCH, ROUND = 250, 1_000
"""Inputs per process, and of one kind before the next one has its turn."""
SECONDS = 20
"""Longest time for one input."""
MEMORY, FILE_SIZE = 4 * 2**30, 2**30
"""Bytes that a process may take on top of what it has, and that a file of it may have."""
MODULE = "sb3_diffusion_fuzz_canary"
"""A module on the path that no file may bring to be imported."""
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
    "ctypes.dlopen",
)
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    10**30,
    1e308,
    "",
    "\x00",
    "../../../../tmp/outside",
    [],
    {},
    [[[[[[]]]]]],
    "x" * 100_000,
    {"$class": f"{MODULE}:Boom"},
    {"$class": "os:system"},
    {"$class": "builtins:eval"},
    {"$class": "torch.nn.modules.activation:Mish"},
    {"$tuple": [1, 2]},
    {"$float": "nan"},
    {"$tensor": "nowhere"},
    {"$array": "nowhere", "shape": [10**9, 10**9], "dtype": "float32"},
]


# Changes --------------------------------------------------------------------------------------------------------------


def change_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """
    :param data: of a file
    :param rng: of the change
    :return: with bytes flipped, cut out, repeated, or the end cut off
    """
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        if not changed:
            return b""
        at, kind = int(rng.integers(len(changed))), rng.integers(5)
        length = int(rng.integers(1, 65))
        if kind <= 1:
            changed[at] = int(rng.integers(256))
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        else:
            changed[at : at + 8] = int(rng.choice([0, 2**31, 2**32 - 1, 2**63])).to_bytes(8, "little")
    return bytes(changed[: int(rng.integers(len(changed) + 1))] if rng.random() < 0.1 else changed)


def change_json(value: Any, rng: np.random.Generator) -> Any:
    """
    :param value: of a JSON text
    :param rng: of the change
    :return: with some part replaced, removed, renamed or repeated
    """
    value = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 4))):
        holder: Any = None
        key: Any = None
        node = value
        while isinstance(node, (dict, list)) and node and (holder is None or rng.random() < 0.8):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            holder, key = node, keys[int(rng.integers(len(keys)))]
            node = holder[key]
        if holder is None:
            return HOSTILE[int(rng.integers(len(HOSTILE)))]
        kind = rng.integers(5)
        if kind <= 1:
            holder[key] = copy.deepcopy(HOSTILE[int(rng.integers(len(HOSTILE)))])
        elif kind == 2:
            del holder[key]
        elif isinstance(holder, dict):
            holder[f"{key}_" if kind == 3 else "$class"] = holder.pop(key)
        else:
            holder.extend(copy.deepcopy(holder[:8]))
    return value


def change_zip(data: bytes, rng: np.random.Generator) -> bytes:
    """
    :param data: of a zip of JSON and safetensors
    :param rng: of the change
    :return: with one member changed, lost, renamed, compressed or added
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind, compression = rng.integers(8), zipfile.ZIP_STORED
    if kind <= 3:
        members["config.json"] = json.dumps(change_json(json.loads(members["config.json"]), rng)).encode()
    elif kind == 4:
        members["tensors.safetensors"] = change_tensors(members["tensors.safetensors"], rng)
    elif kind == 5:
        name = str(rng.choice(list(members)))
        members[name] = change_bytes(members[name], rng)
    elif kind == 6:
        name = str(rng.choice(["../outside", "/tmp/outside", "data.pkl", "data", "a/../../b", "config.json "]))
        members[name] = pickle.dumps({"a": 1})
    else:
        compression = zipfile.ZIP_DEFLATED
        members["config.json"] += b" " * int(rng.choice([0, 2**20, 2**27]))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def change_tensors(data: bytes, rng: np.random.Generator) -> bytes:
    """
    :param data: of a safetensors file
    :param rng: of the change
    :return: with another header: shapes, types, offsets, its own length
    """
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return int(rng.choice([0, 1, 2**20, 2**62])).to_bytes(8, "little") + data[8:]
    if rng.random() < 0.2:
        return safetensors_save({"w": th.zeros(int(rng.integers(0, 9)))})
    header = change_json(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def change_hdf5(path: Path, rng: np.random.Generator) -> None:
    """
    Change an HDF5 file in place: by its bytes, or by what is in it.

    :param path: of the file
    :param rng: of the change
    """
    if rng.random() < 0.5:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
        return
    with h5py.File(path, "a") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(int(rng.integers(1, 3))):
            name = str(rng.choice(names))
            if name not in file:
                continue
            node, kind = file[name], rng.integers(7)
            values = node[()] if isinstance(node, h5py.Dataset) else None
            del file[name]
            if kind == 0 or values is None:
                continue
            if kind == 1:
                file.create_dataset(name, shape=(10**11, 3), dtype="f4", chunks=(1024, 3))  # takes no room
            elif kind == 2:
                file[name] = np.asarray(values)[: len(values) // 2] if np.ndim(values) else np.asarray([values])
            elif kind == 3:
                file[name] = np.asarray([b"text"] * 3)
            elif kind == 4:
                file[name] = h5py.SoftLink(str(rng.choice(names)))
            elif kind == 5:
                file[name] = h5py.ExternalLink("../../../../etc/hostname", "/")
            else:
                file[name] = np.full(np.shape(values), rng.choice([np.nan, np.inf, -1e300, 2.0]))


# Kinds of files -------------------------------------------------------------------------------------------------------


def small_dataset() -> OfflineDataset:
    """:return: some episodes of the embedded data"""
    data = load_dataset(DEFAULT_DATASET_ID)
    n = int(data.episode_ends[1]) + 1
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return OfflineDataset(
        *(getattr(data, name)[:n] for name in names),
        observation_space=data.observation_space,
        action_space=data.action_space,
        env_spec=data.env_spec,
        name="small",
    )


class Kind:
    """
    A kind of file.

    :param make: writes a valid one under a path and returns what was written
    :param change: changes it in place
    :param read: what is tested
    """

    def __init__(
        self, make: Callable[[Path], Path], change: Callable[[Path, np.random.Generator], None], read: Callable[[Path], object]
    ) -> None:
        self.make, self.change, self.read = make, change, read


def make_model(folder: Path) -> Path:
    """:return: path of a model file"""
    arguments: dict[str, Any] = dict(batch_size=8, buffer_size=50, learning_starts=5, device="cpu", seed=0)
    model = DTQL("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), **arguments).learn(20)
    model.save(folder / "file")
    return folder / "file.zip"


def make_replay(folder: Path) -> Path:
    """:return: path of a replay file"""
    arguments: dict[str, Any] = dict(batch_size=8, buffer_size=50, learning_starts=5, device="cpu", seed=0)
    model = DTQL("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), **arguments).learn(20)
    model.save_replay_buffer(folder / "file.zip")
    return folder / "file.zip"


def make_hdf5(folder: Path) -> Path:
    """:return: path of a file in D4RL's layout"""
    write_dataset(small_dataset(), str(folder / "file.hdf5"))
    return folder / "file.hdf5"


def make_minari(folder: Path) -> Path:
    """:return: folder of a Minari dataset"""
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    write_dataset(small_dataset(), "fuzz/small-v0")
    return folder


def make_npz(folder: Path) -> Path:
    """:return: path of a NumPy archive"""
    write_dataset(small_dataset(), str(folder / "file.npz"))
    return folder / "file.npz"


def change_npz(path: Path, rng: np.random.Generator) -> None:
    """Change a NumPy archive: its bytes, or one of its arrays."""
    if rng.random() < 0.3:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            name = str(rng.choice(sorted(members)))
            member = Path(folder) / "member.npy"
            member.write_bytes(members[name])
            change_array(member, rng)
            members[name] = member.read_bytes()
            if rng.random() < 0.1:
                members[str(rng.choice(["../outside.npy", "a.pkl", name]))] = pickle.dumps({"a": 1})
            with zipfile.ZipFile(path, "w", int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
                for key, content in members.items():
                    archive.writestr(key, content)
        except Exception:  # a start that is no zip any more
            path.write_bytes(change_bytes(path.read_bytes(), rng))


def make_mapped(folder: Path) -> Path:
    """:return: folder of memory-mapped arrays"""
    write_dataset(small_dataset(), str(folder / "file.mmap"))
    return folder / "file.mmap"


def change_array(path: Path, rng: np.random.Generator) -> None:
    """Change a ``.npy`` file: its bytes, its header, or what it holds."""
    kind = rng.integers(4)
    if kind == 0:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    elif kind == 1:
        header = {
            "descr": str(rng.choice(["<f4", "|O", "<f8", "|b1", "<U9", "<M8[s]"])),
            "fortran_order": bool(rng.integers(2)),
            "shape": (int(rng.choice([0, -1, 3, 10**3, 10**12])), *[3] * int(rng.integers(3))),
        }
        data = path.read_bytes()
        with path.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            file.write(data[int(rng.integers(64, 200)) :])
    elif kind == 2:
        np.save(path, np.array([{"a": 1}] * 3, dtype=object), allow_pickle=True)
    else:
        np.save(path, np.full(int(rng.integers(9)), rng.choice([np.nan, np.inf, -1e300, 2.0])))


def change_folder(path: Path, rng: np.random.Generator, change: Callable[[Path, np.random.Generator], None]) -> None:
    """
    Change one file of a folder.

    :param path: of the folder
    :param rng: of the change
    :param change: of a file that is not JSON
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = files[int(rng.integers(len(files)))]
    if file.suffix != ".json":
        change(file, rng)
        return
    try:
        file.write_text(json.dumps(change_json(json.loads(file.read_text("utf-8")), rng)), encoding="utf-8")
    except ValueError:
        file.write_bytes(change_bytes(file.read_bytes(), rng))


def change_archive(path: Path, rng: np.random.Generator) -> None:
    """Change a zip by its bytes or by what is in it."""
    data = path.read_bytes()
    try:
        changed = change_bytes(data, rng) if rng.random() < 0.25 else change_zip(data, rng)
    except Exception:  # a start that is no zip any more
        changed = change_bytes(data, rng)
    path.write_bytes(changed)


def change_quietly(path: Path, rng: np.random.Generator) -> None:
    """Change an HDF5 file; by its bytes where it cannot be opened any more."""
    try:
        change_hdf5(path, rng)
    except Exception:
        path.write_bytes(change_bytes(path.read_bytes(), rng))


def change_minari_file(path: Path, rng: np.random.Generator) -> None:
    """Change the data of a Minari folder, or another file in it."""
    if path.suffix == ".hdf5":
        change_quietly(path, rng)
    else:
        path.write_bytes(change_bytes(path.read_bytes(), rng))


def read_minari(path: Path) -> object:
    """Read the dataset of a Minari folder."""
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    return load_dataset("fuzz/small-v0")


KINDS: dict[str, Kind] = {
    "model": Kind(make_model, change_archive, lambda path: DTQL.load(path, device="cpu")),
    "replay buffer": Kind(make_replay, change_archive, lambda path: load_replay_buffer(path)),
    "D4RL file": Kind(make_hdf5, change_quietly, lambda path: load_dataset(str(path))),
    "Minari folder": Kind(make_minari, lambda path, rng: change_folder(path, rng, change_minari_file), read_minari),
    "NumPy file": Kind(make_npz, change_npz, lambda path: load_dataset(str(path))),
    "memory-mapped folder": Kind(
        make_mapped, lambda path, rng: change_folder(path, rng, change_array), lambda path: load_dataset(str(path))
    ),
}


# Reading under watch --------------------------------------------------------------------------------------------------


class Watch:
    """What a process does while it reads a file."""

    def __init__(self) -> None:
        self.inside: str | None = None  # folder that may be written to, while a file is read
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments[:1]}")
        elif event == "import" and arguments[0].startswith(MODULE):
            self.seen.append(f"import {arguments[0]}")
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            path = os.path.realpath(arguments[0])
            if writes and not path.startswith((self.inside, "/dev/", "/proc/")):
                self.seen.append(f"writes {path}")


def signature(error: BaseException) -> str:
    """:return: kind and words of an error, without what changes from input to input"""
    words = re.sub(r"\S*[^A-Za-z ,.:]\S*", " ", str(error)[:500])[:80]
    return f"{type(error).__name__}: {words}"


def too_slow(*_: Any) -> None:
    """What an alarm calls."""
    raise TimeoutError(f"more than {SECONDS} s")


def read_batch(kind: Kind, starts: list[Path], seeds: Sequence[int], report: Path) -> None:
    """
    Change and read a batch of inputs, in a process of its own; the report has a line before and behind each.

    :param kind: of the files
    :param starts: valid files, and others that gave a new answer
    :param seeds: one per input
    :param report: JSON lines
    """
    warnings.simplefilter("ignore")
    spec = load_dataset(DEFAULT_DATASET_ID).env_spec
    assert spec is not None
    gym.make(spec).close()  # may be made for its spaces, and loads libraries then
    watch = Watch()
    signal.signal(signal.SIGALRM, too_slow)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    with open(report, "a", encoding="utf-8") as lines:
        for seed in seeds:
            print(json.dumps({"seed": seed}), file=lines, flush=True)
            rng = np.random.default_rng(seed)
            with tempfile.TemporaryDirectory() as name:
                start = starts[int(rng.integers(len(starts)))]
                path = Path(name) / f"input{start.suffix}"
                (shutil.copytree if start.is_dir() else shutil.copy)(start, path)
                kind.change(path, rng)
                finding, answer = None, "loaded"
                watch.inside, watch.seen = os.path.realpath(name), []
                signal.alarm(SECONDS)
                try:
                    kind.read(path)
                except DOCUMENTED as error:
                    answer = signature(error)
                    if isinstance(error, TimeoutError):
                        finding = "too slow"
                except BaseException as error:
                    answer = signature(error)
                    finding = "".join(traceback.format_exception(error))
                finally:
                    signal.alarm(0)
                    watch.inside = None
                if watch.seen:
                    finding = "; ".join(watch.seen)
                line = {"seed": seed, "answer": answer, "finding": finding, "start": str(start)}
                print(json.dumps(line), file=lines, flush=True)


def run_batch(kind: Kind, starts: list[Path], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """
    :param kind: of the files
    :param starts: to change
    :param seeds: one per input
    :return: lines of the report; an input that killed its process has a finding that says so
    """
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.jsonl"
        report.touch()
        lines: dict[int, dict[str, Any]] = {}
        left = list(seeds)
        while left:
            process = os.fork()
            if process == 0:
                status = 1
                try:
                    sys.path.insert(0, name)
                    Path(name, f"{MODULE}.py").write_text("class Boom: pass\n", encoding="utf-8")
                    read_batch(kind, starts, left, report)
                    status = 0
                finally:
                    os._exit(status)
            _, status = os.waitpid(process, 0)
            for text in report.read_text("utf-8").splitlines():
                line = json.loads(text)
                if "answer" in line or line["seed"] not in lines:
                    lines[line["seed"]] = line
            for line in lines.values():
                if "answer" not in line:  # begun and not ended
                    line.update(answer=f"killed by {status}", finding=f"the process ended with status {status}", start="")
            left = [seed for seed in left if seed not in lines]
    return [lines[seed] for seed in seeds]


def fuzz(name: str, n_inputs: int, seed: int) -> dict[str, Any]:
    """
    Make and read inputs of one kind; adds to the numbers of earlier calls.

    :param name: key of ``KINDS``
    :param n_inputs: in all, earlier ones included
    :param seed: of everything random
    :return: counts, answers, findings
    """
    kind, folder = KINDS[name], FOLDER / name.replace(" ", "_")
    state_file = folder / f"state-{seed}.json"
    if state_file.is_file():
        state = json.loads(state_file.read_text(encoding="utf-8"))
    else:
        shutil.rmtree(folder / f"starts-{seed}", ignore_errors=True)
        (folder / f"starts-{seed}" / "valid").mkdir(parents=True)
        state = {"inputs": 0, "answers": {}, "findings": [], "starts": []}
        state["starts"].append(str(kind.make(folder / f"starts-{seed}" / "valid")))
    answers = Counter(state["answers"])
    while state["inputs"] < n_inputs:
        seeds = [seed * 10**9 + state["inputs"] + i for i in range(min(BATCH, n_inputs - state["inputs"]))]
        n_starts = len(state["starts"])
        lines = run_batch(kind, [Path(start) for start in state["starts"]], seeds)
        for line in lines:
            is_new = line["answer"] not in answers
            answers[line["answer"]] += 1
            if line["finding"] is not None:
                state["findings"].append(line)
                print(name, line["seed"], line["finding"][-300:], flush=True)
            elif is_new and line["answer"] != "loaded" and len(state["starts"]) < 200:
                state["starts"].append(str(_again(kind, line, n_starts, folder / f"starts-{seed}" / str(line["seed"]))))
        state["inputs"] += len(seeds)
        state["answers"] = dict(answers)
        write_json(state_file, state)
    return state


def _again(kind: Kind, line: dict[str, Any], n_starts: int, folder: Path) -> Path:
    """Make the input of a line once more, to keep it: what is drawn is what was drawn, the choice of the start included."""
    folder.mkdir(parents=True, exist_ok=True)
    start, rng = Path(line["start"]), np.random.default_rng(line["seed"])
    rng.integers(n_starts)
    path = folder / ("input" if start.is_dir() else f"input{start.suffix}")
    (shutil.copytree if start.is_dir() else shutil.copy)(start, path)
    kind.change(path, rng)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Read what is left to read, write the table.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--inputs", type=int, default=16_700, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    th.set_num_threads(1)  # also because processes are forked
    for target in range(ROUND, options.inputs + ROUND, ROUND):  # all kinds in turn, so that each has its share at any time
        rows = [row_of(name, fuzz(name, min(target, options.inputs), options.seed)) for name in options.kinds]
        if set(options.kinds) == set(KINDS):
            write_table(
                RESULTS / "fuzz.json",
                "Damaged and hostile files",
                ["kind", "inputs", "of these loaded", "different answers", "findings"],
                rows,
                text=(
                    "Valid files with changed bytes, JSON, headers, members, groups, read in processes with limits on "
                    "memory, size of files and time. *Answers*: kinds of documented errors, told apart by their words; an "
                    "input with a new one becomes a start of further inputs. *Findings*: any other exception, a killed "
                    "process, a started program, a connection, an import that the file asked for, a file outside the folder."
                ),
            )
    for row in rows:
        print(*row, sep="\t")


def row_of(name: str, state: dict[str, Any]) -> list[str | float | int | None]:
    """
    :param name: key of ``KINDS``
    :param state: counts, answers, findings
    :return: row of the table
    """
    return [name, state["inputs"], state["answers"].get("loaded", 0), len(state["answers"]), len(state["findings"])]


if __name__ == "__main__":
    main()
