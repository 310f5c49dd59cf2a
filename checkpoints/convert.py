"""A checkpoint directory -> another one: dequantised, in another dtype, in other shards.

Tensor names stay what they are, so everything stays: MTP modules, copies, tensors that no model of
ours has. Streams: a shard of the result is the most that is in memory.
"""

from pathlib import Path

import torch

from .config_file import CheckpointError
from .contents import Contents, compare
from .published_config import read_config
from .save import stored_dtype, with_dtype
from .storage.shards import READABLE, Shards, open_shards, raise_any
from .storage.weights import Weight
from .storage.writing import FP8, Planned, write_checkpoint

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = True,
) -> None:
    """Write the checkpoint at `source` into the new directory `target`.

    dtype: as of `save_model`; None makes bfloat16 of what is quantised and leaves the rest. The
    source is checked as for loading; every other file in it, like the tokenizer's, is copied.
    Raises CheckpointError, and writes nothing, if the source is damaged or the target exists.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    config = read_config(source)
    if source == target:
        raise CheckpointError(f"{target}: is the source itself; choose another path")
    with open_shards(source) as shards:
        contents = compare(source, config, shards)
        raise_any(contents.errors)
        ours = {entry.published: entry.ours[0] for entry in contents.entries}
        tensors = [
            planned(name, weight, ours.get(name), shards, dtype)
            for name, weight in contents.weights.items()
        ]
        own = main_dtype(contents, shards)
        config_json = with_dtype(config.published, own, dtype)
        beside = companions(source)
        write_checkpoint(target, config_json, tensors, max_shard_bytes, beside, progress)


def planned(
    name: str, weight: Weight, ours: str | None, shards: Shards, dtype: torch.dtype | None
) -> Planned:
    own = dtype_of(weight, shards)
    kept = stored_dtype(ours, name, weight.shape, own, dtype)
    exact = torch.float32 if kept == FP8 else kept  # what is quantised is rounded once
    read_as = exact if weight.quantized else None
    return Planned(name, weight.shape, kept, lambda: weight.read(shards, read_as, "cpu"))


def dtype_of(weight: Weight, shards: Shards) -> torch.dtype:
    """What a weight is read as if nothing else is asked for."""
    return torch.bfloat16 if weight.quantized else READABLE[shards.tensors[weight.names[0]].dtype]


def main_dtype(contents: Contents, shards: Shards) -> torch.dtype:
    """That of the embedding, which nobody quantises."""
    names = [entry.published for entry in contents.entries if entry.ours == ("embed.weight",)]
    return dtype_of(contents.weights[names[0]], shards)


def companions(directory: Path) -> list[Path]:
    """The files of a checkpoint that neither hold weights nor describe their files."""
    return [file for file in sorted(directory.iterdir()) if is_companion(file)]


def is_companion(file: Path) -> bool:
    describes = file.name == "config.json" or file.name.endswith(".safetensors.index.json")
    return file.is_file() and not describes and file.suffix not in WEIGHTS
