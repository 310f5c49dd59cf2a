"""convert: write a checkpoint anew: dequantised, in another dtype, in other shards."""

import argparse
import re
from pathlib import Path

import torch

from checkpoints import convert

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="checkpoint directory")
    parser.add_argument("target", type=Path, help="directory to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights; fp8: blocks of 128 x 128 with a scale each "
        "(default: as stored, and bfloat16 for what is quantised)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=nbytes,
        default="5GB",
        help="of a weight file, and what is in memory at a time: 500MB, 5GB (default), 1TB",
    )
    parser.add_argument(
        "--to",
        choices=("abacus",),
        help="write our own format, in which every model can be saved (default: as it is named)",
    )


def run(args: argparse.Namespace) -> int:
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    convert(args.source, args.target, dtype, args.max_shard_size, args.to)
    print(args.target)
    return 0


def nbytes(text: str) -> int:
    """A size with a unit, as a number of bytes."""
    found = re.fullmatch(r"(\d+) *([KMGT]B)?", text.strip(), re.IGNORECASE)
    size = int(found[1]) * UNITS[(found[2] or "").upper()] if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 5GB")
    return size
