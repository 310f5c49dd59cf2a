"""A checkpoint directory -> another one: dequantised, in another dtype, other shards or our format.

In its own format a checkpoint keeps every tensor name, and so every tensor: MTP modules, copies,
and tensors that our model does not have. At most one shard of the result is in memory at a time.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config_file import CheckpointError
from .contents import Contents, compare_files
from .load import choose_dtypes, find_dtype, find_model_dtype, read_if_different, untie_head
from .mapping import Entry, Shape
from .precision import Precision
from .published_config import find_family, read_config
from .save import check_format, make_native_json, update_dtype
from .storage.shards import Shards, open_shards, raise_any
from .storage.writing import FP8, PlannedTensor, write_checkpoint

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

    dtype, to: as in `save_model`, but a dtype of None gives quantised weights the embedding's.
    classes: as in `load_model`. The source is checked as for loading. Its other files, such as the
    tokenizer's, are copied.
    Raises CheckpointError, and writes nothing, if the source is damaged or the target not empty.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    check_format(to)
    config = read_config(source, classes)
    if source == target:
        raise CheckpointError(f"{target}: is the source itself; choose another path")
    with open_shards(source) as shards:
        contents = compare_files(source, config, shards)
        raise_any(contents.errors)
        stacks = find_family(config, source).rules is None
        if to and not stacks:
            config_json, tensors = plan_in_our_format(contents, shards, dtype)
        else:
            config_json = dict(config.published)
            tensors = plan_as_stored(contents, shards, dtype, stacks)
        config_json = update_dtype(config_json, find_model_dtype(contents, shards), dtype)
        write_checkpoint(
            target, config_json, tensors, max_shard_bytes, companions(source), progress
        )


def plan_as_stored(
    contents: Contents, shards: Shards, dtype: torch.dtype | None, stacks: bool
) -> list[PlannedTensor]:
    """Plan every weight under its published name. stacks: as in `Precision`."""
    ours = {entry.published: entry.ours[0] for entry in contents.entries}
    precision = Precision(contents.model, dtype, stacks)
    model_dtype = find_model_dtype(contents, shards)
    tensors = []
    for name, weight in contents.weights.items():
        kept = precision.choose(
            ours.get(name), name, weight.shape, find_dtype(weight, shards, model_dtype)
        )
        make = partial(
            weight.read, shards, choose_read_dtype(kept) if weight.quantized else None, "cpu"
        )
        tensors.append(PlannedTensor(name, weight.shape, kept, make))
    return tensors


def plan_in_our_format(
    contents: Contents, shards: Shards, dtype: torch.dtype | None
) -> tuple[dict[str, Any], list[PlannedTensor]]:
    """Plan config.json and every tensor of the model in our own format."""
    config, entries = contents.config, list(contents.entries)
    for head in contents.heads:
        if read_if_different(head, contents, shards, None) is not None:
            config = untie_head(config)
            entries.append(Entry(head.published, head.shape, ("head.weight",)))
    sources: dict[str, list[Entry]] = {}
    for entry in entries:
        for name in entry.ours:
            sources.setdefault(name, []).append(entry)
    precision, own = Precision(contents.model, dtype, stacks=True), choose_dtypes(contents, shards)
    shapes = contents.shapes | {"head.weight": (config.vocab_size, config.d_model)}
    tensors = []
    for name, parts in sources.items():
        kept = precision.choose(name, name, shapes[name], own.get(name, own["embed.weight"]))
        make = partial(
            assemble_tensor, name, parts, contents, shards, shapes, choose_read_dtype(kept)
        )
        tensors.append(PlannedTensor(name, shapes[name], kept, make))
    return make_native_json(config), tensors


def assemble_tensor(
    name: str,
    entries: Sequence[Entry],
    contents: Contents,
    shards: Shards,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
) -> Tensor:
    """Make one of our tensors from the published tensors that it consists of."""
    state = {
        ours: torch.empty(shapes[ours], dtype=dtype) for entry in entries for ours in entry.ours
    }
    for entry in entries:
        weight = contents.weights[entry.published]
        entry.put(weight.read(shards, dtype if weight.quantized else None, "cpu"), state)
    return state[name]


def choose_read_dtype(kept: torch.dtype) -> torch.dtype:
    """The dtype to read a quantised weight in before it is stored as `kept`: it is rounded once."""
    return torch.float32 if kept == FP8 else kept


def companions(directory: Path) -> list[Path]:
    """The other files of a checkpoint: no weights, config.json or index."""
    return [file for file in sorted(directory.iterdir()) if is_companion(file)]


def is_companion(file: Path) -> bool:
    describes = file.name == "config.json" or file.name.endswith(".safetensors.index.json")
    return file.is_file() and not describes and file.suffix not in WEIGHTS
