"""The formats in which files store a weight: one plain tensor, or several of a quantised format.

The format of each weight is recognised by the names and dtypes of its tensors, because the lists of
exceptions in published configs do not always fit the files.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config_file import CheckpointError
from ..mapping import Shape
from .quantization_config import CONVERT, find_scheme
from .quantized import (
    Block,
    block_grid,
    dequantize_blocks,
    dequantize_groups,
    dequantize_mxfp4,
    scale_fits,
)
from .shards import INTEGERS, READABLE, Shards, StoredTensor

DType = torch.dtype | None  # None: as it is stored, or bfloat16 if it is quantised
Device = torch.device | str


class Weight(Protocol):
    """A stored weight; `shape` is that of the plain weight, which `read` returns."""

    @property
    def names(self) -> tuple[str, ...]: ...  # of its tensors, the weight first
    @property
    def file(self) -> Path: ...  # of the first of them
    @property
    def shape(self) -> Shape: ...
    @property
    def stored_as(self) -> str: ...  # the format, for reports
    @property
    def quantized(self) -> bool: ...
    def read(self, shards: Shards, dtype: DType, device: Device) -> Tensor:
        """Read and dequantise the weight on the device."""


@dataclass(frozen=True)
class PlainWeight:
    """One tensor that is the weight."""

    names: tuple[str, ...]
    file: Path
    shape: Shape
    stored_as: str
    quantized = False

    def read(self, shards: Shards, dtype: DType, device: Device) -> Tensor:
        return shards.read(self.names[0]).to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Fp8Weight:
    """float8_e4m3fn, and a scale per block, channel or tensor."""

    names: tuple[str, ...]
    file: Path
    shape: Shape
    stored_as: str
    block: Block
    quantized = True

    def read(self, shards: Shards, dtype: DType, device: Device) -> Tensor:
        weight, scale = (shards.read(name).to(device) for name in self.names)
        return dequantize_blocks(weight, scale, self.block, dtype or torch.bfloat16)


@dataclass(frozen=True)
class Mxfp4Weight:
    """Groups along the rows of (..., out, in), returned as (..., in, out) like plain gpt-oss."""

    names: tuple[str, ...]
    file: Path
    shape: Shape
    stored_as = "MXFP4"
    quantized = True

    def read(self, shards: Shards, dtype: DType, device: Device) -> Tensor:
        blocks, scale = (shards.read(name).to(device) for name in self.names)
        return dequantize_mxfp4(blocks, scale, dtype or torch.bfloat16).transpose(-2, -1)


@dataclass(frozen=True)
class PackedWeight:
    """Integers packed into words, a scale per group of columns, and the shape in a tensor."""

    names: tuple[str, ...]
    file: Path
    bits: int
    group_size: int | None  # None: a whole row
    shards: Shards
    quantized = True

    @property
    def stored_as(self) -> str:
        size = self.group_size
        return f"INT{self.bits} {'per channel' if size is None else f'in groups of {size}'}"

    @cached_property
    def shape(self) -> Shape:
        """Stored as a tensor, and so read only when it is needed."""
        packed, _, name = self.names
        (N, W), in_word = self.shards.tensors[packed].shape, 32 // self.bits
        shape = tuple(self.shards.read(name).tolist())
        if shape[0] != N or -(-shape[1] // in_word) != W:
            found = f"{name} holds {list(shape)}, expected {N} and a number that fills {W} words"
            raise make_error(self.shards.tensors[name], f"{found} of {in_word}", AGAIN)
        return shape

    def read(self, shards: Shards, dtype: DType, device: Device) -> Tensor:
        packed, scale = (shards.read(name).to(device) for name in self.names[:2])
        size, dtype = self.group_size or self.shape[-1], dtype or torch.bfloat16
        return dequantize_groups(packed, scale, self.shape, self.bits, size, dtype)


FP8 = "F8_E4M3"
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
SUFFIXES = (  # of the tensors that a weight may come with
    *("_scale", "_scale_inv", "_scales", "_blocks"),
    *("_packed", "_shape", "_zero_point", "_g_idx", "_global_scale"),
)
AGAIN = "download or convert it again"
Parts = dict[str, StoredTensor]  # the tensors of a weight by their suffix; "": the weight


def find_weights(
    shards: Shards, quantization: Mapping[str, Any] | None, integers: Collection[str] = ()
) -> tuple[dict[str, Weight], list[str]]:
    """Every weight by the name of its plain tensor, and a problem for each damaged one.

    Reads headers only. quantization: a quantization_config that `check_method` has accepted.
    integers: names of tensors that hold whole numbers or flags.
    """
    found: dict[str, Parts] = {}
    for name, stored in shards.tensors.items():
        if not name.endswith((".input_scale", ".activation_scale")):  # of activations
            weight = name if name in integers else find_weight_name(name, shards.tensors)
            found.setdefault(weight, {})[name.removeprefix(weight)] = stored
    weights: dict[str, Weight] = {}
    problems = []
    for weight, parts in found.items():
        try:
            if weight in integers:
                weights[weight] = make_integers(weight, parts[""])
            else:
                weights[weight] = make_weight(weight, parts, quantization or {}, shards)
        except CheckpointError as error:
            problems.append(str(error))
    return weights, problems


def find_weight_name(name: str, tensors: Mapping[str, StoredTensor]) -> str:
    """The name of the weight that a tensor belongs to; a plain weight may end like a scale."""
    for suffix in SUFFIXES if name.endswith(SUFFIXES) else ():
        weight = name.removesuffix(suffix)
        sure = weight.endswith(".weight") or suffix == "_scale_inv" or tensors[name].dtype == "U8"
        fp8 = weight in tensors and tensors[weight].dtype == FP8
        if weight != name and (sure or fp8 or weight + "_blocks" in tensors):
            return weight
    return name


def make_weight(
    weight: str, parts: Parts, quantization: Mapping[str, Any], shards: Shards
) -> Weight:
    """Make the weight that the parts store; CheckpointError if they do not fit together."""
    made: Weight
    suffix, stored = next(iter(parts.items()))
    if "_blocks" in parts:
        made = make_mxfp4_weight(weight, parts)
    elif "_packed" in parts:
        made = make_packed_weight(weight, parts, find_scheme(weight, quantization), shards)
    elif "" not in parts:
        raise make_error(stored, f"{weight}{suffix} is present without {weight}", AGAIN)
    elif (stored := parts[""]).dtype == FP8:
        made = make_fp8_weight(weight, parts, quantization)
    elif stored.dtype in READABLE:
        made = PlainWeight((weight,), stored.file, stored.shape, stored.dtype)
    else:
        readable = ", ".join((*READABLE, FP8))
        raise make_error(stored, f"{weight} is {stored.dtype}, expected {readable}", CONVERT)
    for suffix, stored in parts.items():
        if weight + suffix not in made.names:
            context = f"with {made.names[0]} stored as {made.stored_as}"
            raise make_error(stored, f"{weight}{suffix} is not supported {context}", CONVERT)
    return made


def make_integers(name: str, stored: StoredTensor) -> PlainWeight:
    if stored.dtype not in INTEGERS:
        found = f"{name} is {stored.dtype}, expected {', '.join(INTEGERS)}"
        raise make_error(stored, found, AGAIN)
    return PlainWeight((name,), stored.file, stored.shape, stored.dtype)


def make_mxfp4_weight(weight: str, parts: Parts) -> Mxfp4Weight:
    blocks = require_part(weight, parts, "_blocks", ("U8",), (None, None, None, 16))
    E, N, G, _ = blocks.shape
    require_part(weight, parts, "_scales", ("U8",), (E, N, G))
    return Mxfp4Weight((weight + "_blocks", weight + "_scales"), blocks.file, (E, 32 * G, N))


def make_packed_weight(
    weight: str, parts: Parts, scheme: Mapping[str, Any], shards: Shards
) -> PackedWeight:
    names = weight + "_packed", weight + "_scale", weight + "_shape"
    if parts["_packed"].dtype == "U8":
        found = f"{names[0]} is U8, as in NVFP4, which is not supported"
        raise make_error(parts["_packed"], found, CONVERT)
    packed = require_part(weight, parts, "_packed", ("I32",), (None, None))
    if scheme.get("type") != "int":
        module = weight.removesuffix(".weight")
        found = f"{names[0]}: no config group of integers in config.json targets {module}"
        raise make_error(packed, found, "add the group that the weight was quantised with")
    bits, size = scheme["num_bits"], scheme["group_size"] if scheme["strategy"] == "group" else None
    N, K = packed.shape[0], packed.shape[1] * 32 // bits
    require_part(weight, parts, "_scale", SCALES, block_grid((N, K), (1, size or K)))
    require_part(weight, parts, "_shape", ("I64", "I32"), (2,))
    return PackedWeight(names, packed.file, bits, size, shards)


def make_fp8_weight(weight: str, parts: Parts, quantization: Mapping[str, Any]) -> Fp8Weight:
    """The block size decides: declared, or 128 x 128 for `_scale_inv`; else the scale's shape."""
    stored, suffix = parts[""], "_scale_inv" if "_scale_inv" in parts else "_scale"
    if suffix not in parts:
        found = f"{weight} is {FP8} and no file holds {weight}_scale_inv or {weight}_scale"
        raise make_error(stored, found, "download the file that holds its scale")
    if len(stored.shape) < 2 or 0 in stored.shape:
        raise make_error(
            stored, f"{weight} is {FP8} {list(stored.shape)}, expected a matrix", CONVERT
        )
    N, K = stored.shape[-2:]
    ways = {"per tensor": (N, K), "per channel": (1, K)}
    if suffix == "_scale_inv":
        block = quantization.get("weight_block_size", (128, 128))
    else:
        block = find_scheme(weight, quantization).get("block_structure")
    if block:
        ways = {f"in blocks of {block[0]} x {block[1]}": (block[0], block[1])}
    for words, size in ways.items():
        if parts[suffix].dtype in SCALES and scale_fits(
            parts[suffix].shape, block_grid(stored.shape, size)
        ):
            names = weight, weight + suffix
            return Fp8Weight(names, stored.file, stored.shape, f"FP8 {words}", size)
    found = f"{weight}{suffix} is {parts[suffix].dtype} {list(parts[suffix].shape)}"
    shapes = (f"{list(block_grid(stored.shape, size))} {words}" for words, size in ways.items())
    expected = f"{', '.join(SCALES)}: {' or '.join(shapes)} of {weight} {list(stored.shape)}"
    advice = AGAIN if block else f"add its block size to config.json or {AGAIN}"
    raise make_error(parts[suffix], f"{found}, expected {expected}", advice)


def require_part(
    weight: str, parts: Parts, suffix: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
) -> StoredTensor:
    """A part that must have one of these dtypes and this shape; a size of None: any but 0."""
    if suffix not in parts:
        first, stored = next(iter(parts.items()))
        raise make_error(
            stored, f"{weight}{first} needs {weight}{suffix}, which is in no file", AGAIN
        )
    stored = parts[suffix]
    sizes = zip(stored.shape, shape, strict=False)
    whole = all(size > 0 if wanted is None else size == wanted for size, wanted in sizes)
    if stored.dtype not in dtypes or len(stored.shape) != len(shape) or not whole:
        found = f"{weight}{suffix} is {stored.dtype} {list(stored.shape)}"
        expected = f"{' or '.join(dtypes)} {str(list(shape)).replace('None', 'any')}"
        raise make_error(stored, f"{found}, expected {expected}", AGAIN)
    return stored


def make_error(stored: StoredTensor, found: str, advice: str) -> CheckpointError:
    return CheckpointError(f"{stored.file}: {found}; {advice}")
