"""
The command ``sb3-diffusion``: each function in ``COMMANDS`` is one command, its arguments are the options.

Exit status: 0 success; 1 a mistake in what was asked for, told in one line; 2 options that cannot be read; 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Annotated, Any, Union, get_type_hints

from tqdm import TqdmExperimentalWarning

from sb3_diffusion import __version__
from sb3_diffusion.cli.benchmark import benchmark
from sb3_diffusion.cli.dataset import dataset_convert, dataset_make, dataset_plot, dataset_summary
from sb3_diffusion.cli.evaluation import evaluate, package, record
from sb3_diffusion.cli.shared import INTERRUPTED, SUCCESS, USER_ERROR, USER_MISTAKES, in_one_line
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
    args = sys.argv[1:] if args is None else list(args)
    if args == ["--version"]:
        print(__version__)
        return SUCCESS
    try:
        import tyro
    except ImportError:
        print("The command line needs tyro: pip install 'sb3-diffusion[cli]'.", file=sys.stderr)
        return USER_ERROR

    def without_empty_defaults(command: Callable[..., int]) -> Any:
        """The command; its help shows no default that is None, False or nothing, as the texts say what that means."""

        def run(*args: Any, **kwargs: Any) -> int:
            return command(*args, **kwargs)

        hint = tyro.conf.arg(help_behavior_hint=lambda value: "" if value in ("", "None", "False") else f"(default: {value})")
        run.__annotations__ = {name: Annotated[kind, hint] for name, kind in get_type_hints(command).items()}
        run.__doc__, run.__signature__ = command.__doc__, signature(command)  # type: ignore[attr-defined]
        return run

    def group(commands: dict[str, Any]) -> Any:
        members = []
        for name, command in commands.items():
            if isinstance(command, dict):
                about = f"Commands on datasets: {', '.join(command)}."
                members.append(Annotated[group(command), tyro.conf.subcommand(name, description=about)])
            else:
                members.append(Annotated[Any, tyro.conf.subcommand(name, constructor=without_empty_defaults(command))])
        return Union[tuple(members)]  # noqa: UP007

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmExperimentalWarning)  # about tqdm's rich bar, which SB3 uses
            return tyro.cli(
                group(COMMANDS),
                prog="sb3-diffusion",
                description="Diffusion-model reinforcement learning on logged data and live. --version prints the version.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except USER_MISTAKES as error:
        print(in_one_line(error), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
