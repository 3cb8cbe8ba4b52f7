"""The command line: `tokenlearner-keras COMMAND` or `python -m tokenlearner_keras`."""

import argparse
import os
import sys
from collections.abc import Sequence


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser; every command sets `run`, a function of the arguments."""
    parser = argparse.ArgumentParser(
        prog="tokenlearner-keras",
        description="Learned tokens for vision models.",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    _add_tables(commands)
    from tokenlearner_keras.export import commands as export_commands

    export_commands.add_commands(commands)
    commands.add_parser(
        "train", help="train a named recipe (`train --help` says more)", add_help=False
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Command line without the program's name; `None` takes `sys.argv`.

    Returns:
        The exit status: 0 for success, 1 if some of the work failed, 2 for bad input.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:
            # Its options are the fields of a configuration, which has its own parser.
            from tokenlearner_keras.training.commands import run_train

            return run_train(arguments[1:])
        parsed = make_parser().parse_args(arguments)
        return parsed.run(parsed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_tables(commands):
    parser = commands.add_parser(
        "tables",
        help="the cost figures of the paper's Tables 1, 4 and 5 beside ours",
        description=(
            "Builds every model of the paper's Tables 1, 4 and 5, counts its "
            "operations and parameters, and prints them beside the paper's. Exits "
            "with 1 if a figure differs that is not explained."
        ),
    )
    parser.add_argument(
        "--table",
        type=int,
        nargs="+",
        choices=(1, 4, 5),
        default=(1, 4, 5),
        help="tables to print (default: all)",
    )
    parser.set_defaults(run=_run_tables)


def _run_tables(arguments):
    from tokenlearner_keras.tables import print_tables

    return 0 if print_tables(tuple(arguments.table)) else 1
