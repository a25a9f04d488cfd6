"""Commands on datasets: describe, draw, convert, make."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from sb3_diffusion.cli.shared import SUCCESS, load_data, require, to_plain
from sb3_diffusion.datasets import (
    DEFAULT_DATASET_ID,
    EMBEDDED_DATASETS,
    MemoryMappedWriter,
    load_minari_parts,
    write_dataset,
)
from sb3_diffusion.datasets.loading import open_minari_source
from sb3_diffusion.datasets.memory_mapped import MEMORY_MAPPED_SUFFIX


def dataset_summary(source: str, /, *, json: bool = False) -> int:
    """
    Describe a dataset: returns, lengths, flags, ranges, saturation.

    Examples:

        sb3-diffusion dataset summary mujoco/hopper/medium-v0
        sb3-diffusion dataset summary logs.hdf5 --json

    :param source: Minari id, D4RL name, or path of an .hdf5 (D4RL's layout), .npz or .mmap
    :param json: print one JSON object instead of text
    :return: exit status
    """
    data = load_data(source)
    print(json_format.dumps(data.summary(), default=to_plain) if json else data)
    return SUCCESS


def dataset_plot(source: str, /, *, out: Path = Path("dataset.png")) -> int:
    """
    Draw returns, lengths, rewards and actions of a dataset into one picture.

    Examples:

        sb3-diffusion dataset plot mujoco/hopper/medium-v0 --out hopper.png

    :param source: Minari id, D4RL name, or path of an .hdf5 (D4RL's layout), .npz or .mmap
    :param out: picture to write, in place of an earlier one; its suffix decides the format
    :return: exit status
    """
    require("plots", "matplotlib")
    load_data(source).plot(out)
    print(out)
    return SUCCESS


def dataset_convert(source: str, target: str, /, *, env: str | None = None) -> int:
    """
    Write a dataset in another format: D4RL's HDF5, Minari, NumPy arrays, or arrays that are mapped from the disk. Everything
    comes back equal. From Minari to mapped arrays, no more than a part of the data is in memory at a time.

    Examples:

        sb3-diffusion dataset convert mujoco/hopper/medium-v0 hopper.hdf5
        sb3-diffusion dataset convert hopper.hdf5 my/hopper/medium-v0
        sb3-diffusion dataset convert hopper-medium-v2 hopper.npz
        sb3-diffusion dataset convert my/robot/log-v0 robot.mmap

    :param source: Minari id, D4RL name, or path of an .hdf5 (D4RL's layout), .npz or .mmap
    :param target: path that ends in .hdf5, .h5, .npz or .mmap, or Minari id that ends in a version; must not exist yet
    :param env: Gymnasium id; decides the spaces that the source leaves open
    :return: exit status
    """
    recorded = open_minari_source(source) if target.endswith(MEMORY_MAPPED_SUFFIX) and env is None else None
    if recorded is None:
        data = load_data(source, env)
        write_dataset(data, target)
    else:
        with MemoryMappedWriter(target) as writer:
            for part in load_minari_parts(recorded):
                writer.add(part)
        data = load_data(target)
    print(f"{data.n_episodes} episodes, {len(data)} steps: {target}")
    return SUCCESS


def dataset_make(name: str | None = None, /) -> int:
    """
    Write an embedded dataset, if it is not there yet, and describe it.

    Examples:

        sb3-diffusion dataset make

    :param name: id of an embedded dataset; by default the one of the demo
    :return: exit status
    """
    if name is not None and name not in EMBEDDED_DATASETS:
        raise ValueError(f"There is no embedded dataset {name!r}; there are: {', '.join(sorted(EMBEDDED_DATASETS))}.")
    print(load_data(name or DEFAULT_DATASET_ID))
    return SUCCESS
