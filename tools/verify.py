"""verify: list every error in a checkpoint directory."""

import argparse
from pathlib import Path

from checkpoints import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="checkpoint directory")
    parser.add_argument(
        "--values",
        action="store_true",
        help="also read every tensor, to find NaN, infinities, and experts that were never written "
        "or can never be chosen",
    )


def run(args: argparse.Namespace) -> int:
    errors, notes = verify(args.path, args.values, progress=True)
    for kind, lines in (("error", errors), ("note", notes)):
        for line in lines:
            print(f"{kind}: {line}")
    print(f"{args.path}: " + (f"{len(errors)} errors" if errors else "nothing wrong found"))
    return 1 if errors else 0
