"""A checkpoint directory -> another one: dequantised, in another dtype, in other shards, in our own
format.

Unless it is our own format, tensor names stay what they are, so everything stays: MTP modules,
copies, tensors that no model of ours has. Streams: a shard of the result is the most that is in
memory.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config_file import CheckpointError
from .contents import Contents, compare
from .families import native
from .load import differing, kept_dtypes, untied
from .mapping import Entry, Shape
from .precision import Precision
from .published_config import family_of, read_config
from .save import native_json, with_dtype
from .storage.shards import READABLE, Shards, open_shards, raise_any
from .storage.weights import Weight
from .storage.writing import FP8, Planned, write_checkpoint

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    to: str | None = None,
    classes: Sequence[type] = (),
    progress: bool = True,
) -> None:
    """Write the checkpoint at `source` into the new directory `target`.

    dtype, to: as of `save_model`, but a dtype of None makes bfloat16 of what is quantised. classes:
    as of `load_model`. The source is checked as for loading; every other file in it, like the
    tokenizer's, is copied.
    Raises CheckpointError, and writes nothing, if the source is damaged or the target exists.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if to not in (None, native.MODEL_TYPE):
        raise ValueError(f"to = {to!r}: expected None or {native.MODEL_TYPE!r}")
    config = read_config(source, classes)
    if source == target:
        raise CheckpointError(f"{target}: is the source itself; choose another path")
    with open_shards(source) as shards:
        contents = compare(source, config, shards)
        raise_any(contents.errors)
        stacks = family_of(config, source).rules is None
        if to and not stacks:
            config_json, tensors = plan_in_our_format(contents, shards, dtype)
        else:
            config_json = dict(config.published)
            tensors = plan_as_stored(contents, shards, dtype, stacks)
        config_json = with_dtype(config_json, main_dtype(contents, shards), dtype)
        write_checkpoint(
            target, config_json, tensors, max_shard_bytes, companions(source), progress
        )


def plan_as_stored(
    contents: Contents, shards: Shards, dtype: torch.dtype | None, stacks: bool
) -> list[Planned]:
    """Every weight under its name. stacks: a file's stack of matrices may be in FP8."""
    ours = {entry.published: entry.ours[0] for entry in contents.entries}
    precision = Precision(contents.model, dtype, stacks)
    tensors = []
    for name, weight in contents.weights.items():
        kept = precision.of(ours.get(name), name, weight.shape, dtype_of(weight, shards))
        make = partial(weight.read, shards, exact_for(kept) if weight.quantized else None, "cpu")
        tensors.append(Planned(name, weight.shape, kept, make))
    return tensors


def plan_in_our_format(
    contents: Contents, shards: Shards, dtype: torch.dtype | None
) -> tuple[dict[str, Any], list[Planned]]:
    """Every tensor of the model by our name, and the config spelled out."""
    config, entries = contents.config, list(contents.entries)
    for head in contents.heads:
        if differing(head, contents, shards, None) is not None:
            config = untied(config)
            entries.append(Entry(head.published, head.shape, ("head.weight",)))
    sources: dict[str, list[Entry]] = {}
    for entry in entries:
        for name in entry.ours:
            sources.setdefault(name, []).append(entry)
    precision, own = Precision(contents.model, dtype, stacks=True), kept_dtypes(contents, shards)
    shapes = contents.shapes | {"head.weight": (config.vocab_size, config.d_model)}
    tensors = []
    for name, filled_from in sources.items():
        kept = precision.of(name, name, shapes[name], own.get(name, own["embed.weight"]))
        make = partial(assemble, name, filled_from, contents, shards, shapes, exact_for(kept))
        tensors.append(Planned(name, shapes[name], kept, make))
    return native_json(config), tensors


def assemble(
    name: str,
    entries: Sequence[Entry],
    contents: Contents,
    shards: Shards,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
) -> Tensor:
    """One of our tensors from the published ones that make it up."""
    state = {
        ours: torch.empty(shapes[ours], dtype=dtype) for entry in entries for ours in entry.ours
    }
    for entry in entries:
        weight = contents.weights[entry.published]
        entry.put(weight.read(shards, dtype if weight.quantized else None, "cpu"), state)
    return state[name]


def exact_for(kept: torch.dtype) -> torch.dtype:
    """What is to be made of a weight that is then written as `kept`, so that it is rounded once."""
    return torch.float32 if kept == FP8 else kept


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
