"""Matrices as integer codes and scales, and how torch's kernels for them hold both.

  Int8   a code of 8 bits per number and a scale per row
  Int4   a code of 4 bits per number and a scale per group of 128, 64 or 32 columns

A number is its code times its scale.

Shapes: N rows of input, O and I output and input width of a matrix, G groups of c columns, Q rows
of a matrix in a block of Int4 codes, h half of them, b such blocks; o rows of a piece of a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 2**21  # numbers of a matrix that are expanded at a time: 4 MiB in bfloat16
ROUNDED = 2**19  # numbers that are rounded at a time: these fit into a CPU's cache
ROW_UNIT = 32  # torch's kernels read rows in units of this many numbers
GROUP_SIZES = (128, 64, 32)
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range, of which the best is taken


class Codes(NamedTuple):
    """A quantised matrix: signed codes and a scale per row and group, value = code * scale."""

    codes_OI: Tensor  # int8
    scale_OG: Tensor


@dataclass(frozen=True)
class Int8:
    """Codes from -127 to 127; held as they are, with the scales (O,)."""

    bits: ClassVar[int] = 8
    max_code: ClassVar[int] = 127
    shrinks: ClassVar[tuple[float, ...]] = (1.0,)
    kernel_rows: ClassVar[int] = 8  # of input, up to which torch's kernel is faster
    group_size: ClassVar[int | None] = None  # a whole row

    @property
    def numbers(self) -> list[int]:
        """What `Int8` and `Int4` are made from again by `format_of`."""
        return [self.bits]

    def shapes(self, O: int, I: int) -> tuple[tuple[int, ...], tuple[int, ...]]:  # noqa: E741
        """Of the tensors that hold a matrix: codes and scales."""
        return (O, I), (O,)

    def pack(self, codes: Codes) -> tuple[Tensor, Tensor]:
        return codes.codes_OI, codes.scale_OG[:, 0]

    def unpack(self, held: Tensor, scale: Tensor) -> Codes:
        return Codes(held, scale[:, None])

    def run_kernel(self, x_NI: Tensor, held: Tensor, scale: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x_NI, held, scale)

    def can_run(self, x_NI: Tensor) -> bool:
        """Whether torch's kernel takes such rows. In bfloat16 it reads beyond rows of others."""
        return x_NI.shape[1] % ROW_UNIT == 0

    def expand(self, held: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """The matrix in pieces (I, o) of consecutive rows."""
        for held_oI, scale_o in split_rows((held, scale), held.shape[1]):
            yield (held_oI.to(dtype) * scale_o[:, None].to(dtype)).T

    def multiply_many(self, x_NI: Tensor, held: Tensor, scale: Tensor) -> Iterator[Tensor]:
        """The product in pieces (N, o). Scaling last is faster, and no dtype rounds the codes;
        float16 cannot hold the sums of their products, though."""
        if x_NI.dtype == torch.float16:
            yield from multiply_pieces(x_NI, self.expand(held, scale, x_NI.dtype))
            return
        for held_oI, scale_o in split_rows((held, scale), held.shape[1]):
            yield F.linear(x_NI, held_oI.to(x_NI.dtype)).mul_(scale_o)


class Layout(NamedTuple):
    """How torch packs Int4 codes: blocks of rows, and of each block its columns one after another.

    The two codes in a byte are of neighbouring rows, or of rows half a block apart.
    """

    block_rows: int
    neighbours: bool


LAYOUTS = [Layout(rows, neighbours) for rows in (64, 32) for neighbours in (False, True)]
BLOCK_ROWS = 64  # the largest block: matrices are padded to whole ones


@dataclass(frozen=True)
class Int4:
    """Codes from -8 to 7, packed for this CPU; scales (G, O, 2) with zero points of 0."""

    group_size: int
    layout: Layout
    bits: ClassVar[int] = 4
    max_code: ClassVar[int] = 7
    shrinks: ClassVar[tuple[float, ...]] = SHRINKS
    kernel_rows: ClassVar[int] = 32

    @property
    def numbers(self) -> list[int]:
        return [self.bits, self.group_size, *map(int, self.layout)]

    def shapes(self, O: int, I: int) -> tuple[tuple[int, ...], tuple[int, ...]]:  # noqa: E741
        padded = O + -O % BLOCK_ROWS
        return (padded, I // 2), (I // self.group_size, padded, 2)

    def pack(self, codes: Codes) -> tuple[Tensor, Tensor]:
        rows = (0, 0, 0, -len(codes.codes_OI) % BLOCK_ROWS)
        held = pack_int4(F.pad(codes.codes_OI, rows), self.layout)
        scale_GO = F.pad(codes.scale_OG, rows).T
        return held, torch.stack([scale_GO, torch.zeros_like(scale_GO)], dim=-1)

    def unpack(self, held: Tensor, scale: Tensor) -> Codes:
        return Codes(unpack_int4(held, self.layout).T.contiguous(), scale[..., 0].T.contiguous())

    def run_kernel(self, x_NI: Tensor, held: Tensor, scale: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(x_NI, held, self.group_size, scale)

    def can_run(self, x_NI: Tensor) -> bool:
        """Whether torch's kernel reads this layout here: a copy may come from another CPU."""
        return self.layout == find_layout()

    def expand(self, held: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """The matrix in pieces (I, o) of consecutive rows."""
        scale_OG = scale[..., 0].T
        for held_oj, scale_oG in split_rows((held, scale_OG), 2 * held.shape[1], BLOCK_ROWS):
            codes_Io = unpack_int4(held_oj, self.layout).to(dtype)
            scale_G1o = scale_oG.T.to(dtype).contiguous()[:, None]
            codes_Io.unflatten(0, (-1, self.group_size)).mul_(scale_G1o)
            yield codes_Io

    def multiply_many(self, x_NI: Tensor, held: Tensor, scale: Tensor) -> Iterator[Tensor]:
        """The product in pieces (N, o)."""
        yield from multiply_pieces(x_NI, self.expand(held, scale, x_NI.dtype))


Format = Int8 | Int4


def format_of(numbers: list[int]) -> Format:
    """The format with these `numbers`: operations of torch take no other description of it."""
    if numbers == Int8().numbers:
        return Int8()
    _, group_size, rows, neighbours = numbers
    return Int4(group_size, Layout(rows, bool(neighbours)))


def split_rows(
    tensors: tuple[Tensor, ...], row_numbers: int, unit: int = 1
) -> Iterator[tuple[Tensor, ...]]:
    """Split along the first axis into pieces of about PIECE numbers, in units of so many rows."""
    rows = max(unit, PIECE // row_numbers // unit * unit)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def multiply_pieces(x_NI: Tensor, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """The products (N, o) with pieces (I, o); torch is slow at float16 unless rows are adjacent."""
    for weight_Io in pieces:
        if x_NI.dtype == torch.float16:
            yield F.linear(x_NI, weight_Io.T.contiguous())
        else:
            yield x_NI @ weight_Io


def pack_int4(codes_OI: Tensor, layout: Layout) -> Tensor:
    """Codes from -8 to 7, two in a byte, as torch's kernel reads them: uint8 (O, I / 2)."""
    codes_bQI = (codes_OI + 8).view(torch.uint8).unflatten(0, (-1, layout.block_rows))
    pair = (-1, 2) if layout.neighbours else (2, -1)
    low_bhI, high_bhI = codes_bQI.unflatten(1, pair).unbind(2 if layout.neighbours else 1)
    return (high_bhI << 4).add_(low_bhI).mT.reshape(len(codes_OI), -1)


def unpack_int4(held: Tensor, layout: Layout) -> Tensor:
    """Undo `pack_int4`: int8 (I, O)."""
    I, half = 2 * held.shape[1], layout.block_rows // 2  # noqa: E741
    bytes_bIh = held.view(-1, I, half)
    codes = torch.stack([bytes_bIh & 15, bytes_bIh >> 4], dim=3 if layout.neighbours else 2)
    codes_bIQ = codes.view(torch.int8).sub_(8).flatten(2)
    return codes_bIQ.transpose(0, 1).reshape(I, -1)


@cache
def find_layout() -> Layout:
    """The layout of this CPU, which depends on the width of its vectors.

    Raises ValueError if it is none that is known here.
    """
    codes_OI = torch.randint(16, (2 * BLOCK_ROWS, 6), generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)
    for layout in LAYOUTS:
        if pack_int4(codes_OI.to(torch.int8) - 8, layout).equal(packed):
            return layout
    raise ValueError(
        "quantize = 'int4': torch packs codes for this CPU in an unknown layout; use int8"
    )


def choose_format(kind: str, row_numbers: int) -> Format | None:
    """The format of matrices with rows of so many numbers; None: they cannot be quantised.

    kind: "int8" or "int4". The largest group that divides a row is taken. With `find_layout`, it
    raises ValueError where codes of 4 bits cannot be read.
    """
    if row_numbers % ROW_UNIT:
        return None
    if kind == "int8":
        return Int8()
    size = next(size for size in GROUP_SIZES if row_numbers % size == 0)
    return Int4(size, find_layout())


def quantize_matrix(matrix_OI: Tensor, form: Format, scale_dtype: torch.dtype) -> Codes:
    """Round a matrix to codes times scales, the scales in the dtype that they are held in.

    Int8 spreads a row's largest magnitude over 127 codes. Int4 shrinks the range of a group to the
    one of SHRINKS with the least squared error, because a few large numbers may cost the others
    more than they gain.
    """
    size = form.group_size or matrix_OI.shape[1]
    pieces = [
        quantize_piece(piece.float().unflatten(1, (-1, size)), form, scale_dtype)
        for piece in matrix_OI.split(max(1, ROUNDED // matrix_OI.shape[1]))
    ]
    return Codes(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def quantize_piece(x_oGc: Tensor, form: Format, scale_dtype: torch.dtype) -> Codes:
    """`quantize_matrix` for some rows in groups of c columns."""
    scale_oG = choose_scale(x_oGc, form, scale_dtype)
    return Codes(round_to_codes(x_oGc, scale_oG, form).flatten(1).to(torch.int8), scale_oG)


def choose_scale(x_oGc: Tensor, form: Format, scale_dtype: torch.dtype) -> Tensor:
    """The scale of each group, (o, G), with the least squared error."""
    largest_oG = x_oGc.abs().amax(dim=-1)
    scales = [(largest_oG * (s / form.max_code)).to(scale_dtype) for s in form.shrinks]
    if len(scales) == 1:
        return scales[0]
    errors = [
        round_to_codes(x_oGc, scale_oG, form)
        .mul_(scale_oG[..., None])
        .sub_(x_oGc)
        .square_()
        .sum(-1)
        for scale_oG in scales
    ]
    best_1oG = torch.stack(errors).argmin(dim=0, keepdim=True)
    return torch.stack(scales).gather(0, best_1oG).squeeze(0)


def round_to_codes(x_oGc: Tensor, scale_oG: Tensor, form: Format) -> Tensor:
    """The codes nearest to x / scale, in float32; 0 where the scale is 0."""
    divisor_oG1 = scale_oG.float().where(scale_oG != 0, 1)[..., None]
    return (x_oGc / divisor_oG1).round_().clamp_(-form.max_code - 1, form.max_code)
