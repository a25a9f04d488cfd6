"""
The command ``sb3-diffusion``: each function in ``COMMANDS`` is one command, its arguments are the options.

Exit status: 0 success; 1 a mistake in what was asked for, told in one line; 2 options that cannot be read; 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Union
from zipfile import BadZipFile

import gymnasium as gym
from tqdm import TqdmExperimentalWarning

from sb3_diffusion.cli.benchmark import benchmark
from sb3_diffusion.cli.dataset import dataset_convert, dataset_make, dataset_plot, dataset_summary
from sb3_diffusion.cli.evaluation import evaluate, package, record
from sb3_diffusion.cli.shared import INTERRUPTED, USER_ERROR
from sb3_diffusion.cli.training import demo, train
from sb3_diffusion.sweep import sweep

COMMANDS: dict[str, Any] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "record": record,
    "package": package,
    "benchmark": benchmark,
    "sweep": sweep,
    "dataset": {"summary": dataset_summary, "plot": dataset_plot, "convert": dataset_convert, "make": dataset_make},
}


def main(args: Sequence[str] | None = None) -> int:
    """
    Read the options, run the command, tell what went wrong in one line.

    :param args: command line after the program's name; that of the process by default
    :return: exit status
    """
    try:
        import tyro
    except ImportError:
        print("The command line needs tyro: pip install 'sb3-diffusion[cli]'.", file=sys.stderr)
        return USER_ERROR

    def group(commands: dict[str, Any]) -> Any:
        members = []
        for name, command in commands.items():
            if isinstance(command, dict):
                about = f"Commands on datasets: {', '.join(command)}."
                members.append(Annotated[group(command), tyro.conf.subcommand(name, description=about)])
            else:
                members.append(Annotated[Any, tyro.conf.subcommand(name, constructor=command)])
        return Union[tuple(members)]  # noqa: UP007

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmExperimentalWarning)  # about tqdm's rich bar, which SB3 uses
            return tyro.cli(
                group(COMMANDS),
                prog="sb3-diffusion",
                description="Diffusion-model reinforcement learning on logged data and live.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except (ValueError, OSError, ImportError, BadZipFile, gym.error.Error) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
