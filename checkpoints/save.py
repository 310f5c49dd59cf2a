"""A Transformer -> the published layout of its family: config.json, safetensors, an index.

Everything is written into a directory beside the final one, which then takes its name: there is
either nothing or a whole checkpoint.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from modeling import Transformer
from moe import ConfigError

from .config_file import CheckpointError, Fields
from .load import copied_entries, family_of, num_blocks, own_state
from .mapping import Entry, correspondences
from .shards import INDEX, SINGLE


def save_model(model: Transformer, path: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write the model, MTP modules included, as its family publishes it.

    The family and every field that the model does not need are those of `config.published`.
    Raises CheckpointError if `path` exists and is not empty, or if `config.published` does not
    describe this model.
    """
    directory = Path(path).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists already; remove it or choose another path")
    config_json = published_config(model)
    state = own_state(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    family = family_of(model.config, directory)
    entries = correspondences(family.rules, shapes, num_blocks(model.config))
    entries += copied_entries(family, model.config, shapes)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
        write_shards(entries, state, partial, max_shard_bytes)
        for file in partial.iterdir():
            shutil.copymode(partial / "config.json", file)  # safetensors makes them private
            with file.open("rb") as written:
                os.fsync(written.fileno())
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def published_config(model: Transformer) -> dict[str, Any]:
    """config.json: what the model was read from, with the dtype that it has now."""
    family = family_of(model.config, "save_model")
    try:
        described = family.read_config(Fields(model.config.published))
    except ConfigError as error:
        raise CheckpointError(f"the model's config.published: {error}") from None
    if described != model.config:
        raise CheckpointError("config.published does not describe this model: make them agree")
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    known = [key for key in ("dtype", "torch_dtype") if key in model.config.published]
    return {**model.config.published, **dict.fromkeys(known or ["torch_dtype"], dtype)}


def write_shards(
    entries: list[Entry], state: dict[str, Tensor], directory: Path, max_shard_bytes: int
) -> None:
    """One file if everything fits, else numbered shards and the index that lists them."""
    shards = list(grouped(entries, state, max_shard_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    weight_map: dict[str, str] = {}
    total = 0
    for name, shard in zip(names, shards, strict=True):
        tensors = {entry.published: entry.take(state) for entry in shard}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def grouped(
    entries: list[Entry], state: dict[str, Tensor], max_shard_bytes: int
) -> Iterator[list[Entry]]:
    """Consecutive entries that fit into one shard; an entry larger than that stands alone."""
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        nbytes = sum(part.nbytes for part in entry.parts(state))
        if shard and size + nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += nbytes
    yield shard
