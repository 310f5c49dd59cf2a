"""Writes a checkpoint directory, with config.json, safetensors files and an index, or nothing.

All files are written into PATH.partial, the index last, and that directory is then renamed to PATH.
An interruption leaves no PATH, and at most PATH.partial, which the next write to PATH deletes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from modeling import QuantizedMatrix

from ..config_file import CheckpointError
from .quantized import block_grid, pack_integers, quantize_blocks
from .shards import INDEX, SINGLE

ALIGNED = 16  # bytes: no dtype is wider
BLOCK = (128, 128)
FP8 = torch.float8_e4m3fn
FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": list(BLOCK),
    "activation_scheme": "dynamic",
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write; its size is known before it is made."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]  # of any dtype, contiguous or not

    @property
    def nbytes(self) -> int:
        scales = prod(block_grid(self.shape, BLOCK)) * 4 if self.dtype == FP8 else 0
        return prod(self.shape) * self.dtype.itemsize + scales

    def encode(self, made: Tensor) -> list[Tensor]:
        """The stored tensors: one of the wanted dtype, or FP8 and its scale."""
        if self.dtype != FP8:
            return [made.to(self.dtype).contiguous()]
        return list(quantize_blocks(made, BLOCK))

    def make_tensors(self) -> dict[str, Tensor]:
        names = [self.name, self.name + "_scale_inv"]
        return dict(zip(names, self.encode(self.make()), strict=False))


def plan_packed(name: str, matrix: QuantizedMatrix) -> list[PlannedTensor]:
    """The packed integers, scales and shape of a quantised weight (compressed-tensors)."""
    (O, I), bits = matrix.shape, matrix.form.bits  # noqa: E741
    groups, scale_dtype = I // (matrix.form.group_size or I), matrix.scale.dtype

    def pack() -> Tensor:
        return pack_integers(matrix.codes.codes_OI, bits)

    def take_scale() -> Tensor:
        return matrix.codes.scale_OG

    def take_shape() -> Tensor:
        return torch.tensor([O, I])

    return [
        PlannedTensor(name + "_packed", (O, I * bits // 32), torch.int32, pack),
        PlannedTensor(name + "_scale", (O, groups), scale_dtype, take_scale),
        PlannedTensor(name + "_shape", (2,), torch.int64, take_shape),
    ]


def write_checkpoint(
    directory: Path,
    config_json: Mapping[str, Any],
    planned: Sequence[PlannedTensor],
    max_shard_bytes: int,
    extra_files: Sequence[Path] = (),
    progress: bool = False,
) -> None:
    """Write all `planned` tensors, and copies of `extra_files`, into a new directory.

    At most the tensors of one shard, and the sources of one tensor, are in memory. Raises
    CheckpointError if `directory` exists and is not empty, or if the disk is too small.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists already; remove it or choose another path")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        check_space(partial, sum(tensor.nbytes for tensor in planned))
        (partial / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
        write_shards(planned, partial, max_shard_bytes, progress)
        for file in partial.iterdir():
            shutil.copymode(
                partial / "config.json", file
            )  # safetensors lets only the owner read them
            with file.open("rb") as written:
                os.fsync(written.fileno())
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(f"{directory}: {needed:,} bytes are needed, {free:,} are free")


def write_shards(
    planned: Sequence[PlannedTensor], directory: Path, max_shard_bytes: int, progress: bool
) -> None:
    """Write one file if all tensors fit into it, otherwise numbered shards and their index."""
    shards = list(split_into_shards(planned, max_shard_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    weight_map: dict[str, str] = {}
    total = 0
    arena = torch.empty(max(map(count_arena_bytes, shards)), dtype=torch.uint8)
    with tqdm(
        total=len(planned), desc="writing", unit="tensor", disable=None if progress else True
    ) as bar:
        for name, shard in zip(names, shards, strict=True):
            tensors: dict[str, Tensor] = {}
            end = 0
            for tensor in shard:
                copies, end = copy_into_arena(tensor.make_tensors(), arena, end)
                tensors |= copies
                bar.update()
            save_file(tensors, directory / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


# The tensors of a shard are in one block of memory, the arena, which is used for every shard. If
# each had its own memory, freeing them between larger intermediate results would leave gaps.


def count_arena_bytes(shard: Sequence[PlannedTensor]) -> int:
    return sum(tensor.nbytes + 2 * ALIGNED for tensor in shard)


def copy_into_arena(
    tensors: Mapping[str, Tensor], arena: Tensor, start: int
) -> tuple[dict[str, Tensor], int]:
    """Copy the tensors into the arena, one after the other; return them and the next free byte."""
    copies = {}
    for name, tensor in tensors.items():
        place = arena[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies[name] = place.copy_(tensor)
        start += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return copies, start


def split_into_shards(
    planned: Sequence[PlannedTensor], max_shard_bytes: int
) -> Iterator[list[PlannedTensor]]:
    """Yield consecutive tensors that fit into one shard; a larger one gets its own shard."""
    shard: list[PlannedTensor] = []
    size = 0
    for tensor in planned:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard
