"""``python -m sb3_diffusion.zoo train|enjoy|presets``: RL Zoo's commands with the algorithms of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sb3_diffusion import ALGORITHMS
from sb3_diffusion.zoo import register
from sb3_diffusion.zoo.presets import sections

DESCRIPTION = """\
RL Zoo with the algorithms of sb3_diffusion. All options of RL Zoo work, see `train --help` and `enjoy --help`.

  python -m sb3_diffusion.zoo train --algo dtql --env Pendulum-v1 --dataset sb3-diffusion/pendulum/mixed-v0 -n 20000
  python -m sb3_diffusion.zoo train --algo diffsr --env Pendulum-v1 -n 20000
  python -m sb3_diffusion.zoo enjoy --algo dtql --env Pendulum-v1 -f logs
  python -m sb3_diffusion.zoo presets --algo dtql
"""


def main(args: Sequence[str] | None = None) -> int:
    """
    Run RL Zoo's ``train`` or ``enjoy``.

    :param args: command line after the program's name; that of the process by default
    :return: exit status
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_diffusion.zoo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", add_help=False, allow_abbrev=False, usage="(beside the options of RL Zoo, below)")
    train.add_argument("--dataset", help="dataset to learn from, offline: Minari id, HDF5 file or D4RL name")
    train.add_argument("--preset", help="name of published settings of the algorithm, such as hopper-medium")
    train.add_argument("-params", "--hyperparams", nargs="+", default=[], help="overwrite hyperparameters, as in RL Zoo")
    commands.add_parser("enjoy", add_help=False, allow_abbrev=False)
    presets = commands.add_parser("presets", help="print the published settings of an algorithm as a hyperparameter file")
    presets.add_argument("--algo", choices=list(ALGORITHMS), required=True)
    known, rest = parser.parse_known_args(args)
    try:
        register()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    if known.command == "presets":
        import yaml

        print(yaml.safe_dump(sections(ALGORITHMS[known.algo]), sort_keys=False), end="")
        return 0
    # RL Zoo reads the command line of the process.
    if known.command == "enjoy":
        from rl_zoo3.enjoy import enjoy

        sys.argv = [f"{parser.prog} enjoy", *rest]
        enjoy()
        return 0
    from rl_zoo3.train import train as zoo_train

    hyperparams = list(known.hyperparams)
    hyperparams += [f"{key}:{value!r}" for key in ("dataset", "preset") if (value := getattr(known, key)) is not None]
    if {"-h", "--help"} & set(rest):
        train.print_help()
    sys.argv = [f"{parser.prog} train", *rest, *(["-params", *hyperparams] if hyperparams else [])]
    zoo_train()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
