"""verify: everything that is wrong in a checkpoint directory, all of it at once."""

import argparse
from pathlib import Path

from checkpoints import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="checkpoint directory")
    parser.add_argument(
        "--values",
        action="store_true",
        help="read every tensor too: NaN, infinities, experts never written, shut-out experts",
    )


def run(args: argparse.Namespace) -> int:
    errors, notes = verify(args.path, args.values, progress=True)
    for kind, lines in (("error", errors), ("note", notes)):
        for line in lines:
            print(f"{kind}: {line}")
    print(f"{args.path}: " + (f"{len(errors)} errors" if errors else "nothing wrong found"))
    return 1 if errors else 0
