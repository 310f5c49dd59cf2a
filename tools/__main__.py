"""python -m tools COMMAND: the command line. One file per command; `--help` lists them.

The answer goes to stdout, everything else to stderr. Exit codes: 0; 1: a check found an error;
2: wrong input, with one line that says what is wrong; 130: interrupted.
"""

import argparse
import os
import sys
import warnings
from typing import NoReturn

from . import (
    bench,
    chat,
    convert,
    describe,
    evaluate,
    generate,
    look,
    make_tiny,
    probe_mtp,
    train,
    verify,
)

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "describe": describe,
    "verify": verify,
    "convert": convert,
    "make-tiny": make_tiny,
    "bench": bench,
    "evaluate": evaluate,
    "look": look,
    "probe-mtp": probe_mtp,
    "train": train,
}


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of every option that has one, as it would be typed."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, argparse.SUPPRESS) or default is False:
            return action.help
        values = default if isinstance(default, list) else [default]
        typed = " ".join(map(str, values)).replace("%", "%%")  # argparse formats what is returned
        return f"{action.help} (default: {typed})"


def make_parser() -> Parser:
    parser = Parser(prog="python -m tools", description="Abacus from a terminal.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").split(": ", 1)[1].split("\n")[0]
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=HelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    if sys.stdout is None:
        print("error: stdout is closed, and the answer would be lost", file=sys.stderr)
        return 2
    args = make_parser().parse_args(arguments)
    warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, so that a closed pipe raises BrokenPipeError inside `try`
        return code
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # the reader of stdout has closed it: Python must not flush into it on exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {format_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def format_error(error: Exception) -> str:
    """The message of an error in one line."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
