"""make-tiny: write a small, seeded random checkpoint of a family in its published layout.

For tests and for trying the tools. A checkpoint has everything that a published one has, in a few
hundred kilobytes: config.json, several weight shards with their index, MTP modules where the family
has them, and a sentencepiece tokenizer. All values are finite and random, also those of norms,
biases and selection biases, so that a result differs if one of them is left out. `tiny/` holds the
config.json of each family: small sizes, but every mechanism of the family.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from checkpoints import CheckpointError, read_config, save_model
from modeling import Transformer

from .corpus import train_vocabulary

CONFIGS: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text())
    for file in sorted((Path(__file__).parent / "tiny").glob("*.json"))
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", choices=sorted(CONFIGS), help="model_type of the checkpoint")
    parser.add_argument("path", type=Path, help="directory to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")


def run(args: argparse.Namespace) -> int:
    write_tiny(args.family, args.path, args.seed)
    print(args.path)
    return 0


def write_tiny(family: str, path: Path, seed: int = 0, **changes: Any) -> None:
    """Write a tiny checkpoint at `path`; `changes` replace keys of its config.json.

    Raises CheckpointError if `path` exists.
    """
    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it or choose another path")
    config = CONFIGS[family] | changes
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.json"
        file.write_text(json.dumps(config))
        model = Transformer(read_config(file))
    randomize(model, seed)
    partial = path.with_name(path.name + ".new")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, partial, max_shard_bytes=200_000)
    vocabulary = train_vocabulary(SAMPLE_TEXT, model.config.vocab_size)
    (partial / "tokenizer.model").write_bytes(vocabulary)
    partial.rename(path)


@torch.no_grad()
def randomize(model: Transformer, seed: int) -> None:
    """Draw every parameter and selection bias from a seed.

    Matrices are scaled so that activations keep their size. The others are drawn around their
    initial values: norms around 1, biases around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        drawn = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensor.copy_(drawn * tensor.shape[-1] ** -0.5 * 1.5)
        else:
            tensor.copy_(tensor.mean().round() + drawn / 4)


SAMPLE_TEXT = """\
Once upon a time there lived an old king who had three sons and a garden with a golden tree.
Every night one apple was stolen, and every morning the king was sadder than the day before.
So the eldest son said: let me watch tonight, father, and I shall catch the thief.
"""
