"""Commands on datasets: describe, draw, convert, make."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from sb3_diffusion.cli.shared import SUCCESS, load_data, require, to_plain
from sb3_diffusion.datasets import DEFAULT_DATASET_ID, EMBEDDED_DATASETS, write_dataset


def dataset_summary(source: str, /, *, json: bool = False) -> int:
    """
    Describe a dataset: returns, lengths, flags, ranges, saturation.

    Examples:

        sb3-diffusion dataset summary mujoco/hopper/medium-v0
        sb3-diffusion dataset summary logs.hdf5 --json

    :param source: Minari id, path of an HDF5 file in D4RL's layout or of a .npz file, or D4RL name
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

    :param source: Minari id, path of an HDF5 file in D4RL's layout or of a .npz file, or D4RL name
    :param out: picture to write; its suffix decides the format
    :return: exit status
    """
    require("plots", "matplotlib")
    load_data(source).plot(out)
    print(out)
    return SUCCESS


def dataset_convert(source: str, target: str, /, *, env: str | None = None) -> int:
    """
    Write a dataset in another format: D4RL's HDF5, Minari, or NumPy arrays. Everything comes back equal.

    Examples:

        sb3-diffusion dataset convert mujoco/hopper/medium-v0 hopper.hdf5
        sb3-diffusion dataset convert hopper.hdf5 my/hopper/medium-v0
        sb3-diffusion dataset convert hopper-medium-v2 hopper.npz

    :param source: Minari id, path of an HDF5 file in D4RL's layout or of a .npz file, or D4RL name
    :param target: a path that ends in .hdf5, .h5 or .npz, or a Minari id that ends in a version; must not exist yet
    :param env: Gymnasium id that decides over the spaces that the source leaves open
    :return: exit status
    """
    data = load_data(source, env)
    print(f"{data.n_episodes} episodes, {len(data)} steps: {write_dataset(data, target)}")
    return SUCCESS


def dataset_make(name: str | None = None, /) -> int:
    """
    Write an embedded dataset, if it is not there yet, and describe it.

    Examples:

        sb3-diffusion dataset make

    :param name: id of an embedded dataset; the default one if left out
    :return: exit status
    """
    if name is not None and name not in EMBEDDED_DATASETS:
        raise ValueError(f"There is no embedded dataset {name!r}; there are: {', '.join(sorted(EMBEDDED_DATASETS))}.")
    print(load_data(name or DEFAULT_DATASET_ID))
    return SUCCESS
