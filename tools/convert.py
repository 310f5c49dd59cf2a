"""convert: write a checkpoint again: dequantised, in another dtype or in other shards."""

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
    parser.add_argument("target", type=Path, help="directory to write; must not exist, or be empty")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights; fp8: one scale for each block of 128 x 128 "
        "(default: as stored; that of the embedding for quantised weights)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="5GB",
        help="largest size of a weight file, such as 500MB or 1TB; one of them is in memory at a "
        "time",
    )
    parser.add_argument(
        "--to",
        choices=("abacus",),
        help="write our own format, which can hold every model (default: the source's format)",
    )


def run(args: argparse.Namespace) -> int:
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    convert(args.source, args.target, dtype, args.max_shard_size, args.to)
    print(args.target)
    return 0


def parse_size(text: str) -> int:
    """The number of bytes of a size with a unit, such as 500MB."""
    match = re.fullmatch(r"(\d+) *([KMGT]B)?", text.strip(), re.IGNORECASE)
    size = int(match[1]) * UNITS[(match[2] or "").upper()] if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 5GB")
    return size
