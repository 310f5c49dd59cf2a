"""Quantised formats: one pure function for each turns the stored bytes into the weight.

The arithmetic is in float32 and is rounded once, to the requested dtype. A weight is processed in
pieces, so that no intermediate result is as large as the weight.

Shapes: ... any leading dimensions, N rows and K columns of a weight, R x C blocks of it, G groups
of a row, W words of 32 bits with J numbers each, n rows and r rows of blocks of one piece.
"""

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mapping import Shape

Block = tuple[int, int]  # rows and columns
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ROWS = 128  # of a matrix that are dequantised at a time
SLICE = 2**18  # MXFP4 groups at a time: their indices take 4 times their bytes, the result 8


def block_grid(shape: Shape, block: Block) -> Shape:
    """The numbers of blocks along the last two axes of (..., N, K), with partial blocks."""
    *leading, N, K = shape
    return (*leading, -(-N // block[0]), -(-K // block[1]))


def scale_fits(scale: Shape, blocks: Shape) -> bool:
    """Whether a scale of this shape has one number per block; trailing 1s may be left out."""
    return scale == blocks[: len(scale)] and prod(blocks[len(scale) :]) == 1


def scale_to_float32(scale: Tensor) -> Tensor:
    """The scale in float32. A byte b is E8M0: 2^(b - 127), NaN for 255 (OCP MX 1.0, 5.4.1)."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def dequantize_blocks(
    weight_NK: Tensor, scale: Tensor, block: Block, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Multiply (..., N, K) by a scale per block, (..., R, C); returns (..., N, K).

    weight[i, j] * scale[i // rows, j // columns]: the scale is a factor, although files call it
    `weight_scale_inv` (`weight_dequant` in DeepSeek-V3's inference code). The last blocks of rows
    and columns may be partial. A block of (1, K) is a channel, and one of (N, K) the whole tensor;
    their scales may also have the shapes (N,) and ().
    """
    blocks = block_grid(weight_NK.shape, block)
    assert scale_fits(tuple(scale.shape), blocks), (
        f"scale {list(scale.shape)}, blocks {list(blocks)}"
    )
    scale_RC = scale_to_float32(scale.reshape(blocks))
    if weight_NK.dim() > 2:
        out = torch.empty(weight_NK.shape, dtype=dtype, device=weight_NK.device)
        for matrix, weight, scale in zip(out, weight_NK, scale_RC, strict=True):
            matrix.copy_(dequantize_blocks(weight, scale, block, dtype))
        return out
    (rows, columns), K = block, weight_NK.shape[1]
    block_rows = max(1, ROWS // rows)  # rows of blocks in a piece
    out_NK = torch.empty(weight_NK.shape, dtype=dtype, device=weight_NK.device)
    pieces = out_NK.split(block_rows * rows), weight_NK.split(block_rows * rows)
    for out_nK, weight_nK, scale_rC in zip(*pieces, scale_RC.split(block_rows), strict=True):
        scale_rK = scale_rC.repeat_interleave(columns, dim=1)[:, :K]
        scale_nK = scale_rK.repeat_interleave(rows, dim=0)[: len(out_nK)]
        out_nK.copy_(weight_nK.float() * scale_nK)
    return out_NK


def dequantize_mxfp4(blocks: Tensor, scale_G: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantise bytes (..., G, 16) with scale bytes (..., G); returns (..., 32 G).

    A byte holds two numbers, the first one in its low four bits: bit 3 is the sign, and bits 0 to 2
    are the index into `FP4`. 32 numbers share a scale byte b: 2^(b - 127) (OCP MX 1.0, 5.3.3).
    """
    fp4 = torch.tensor(FP4 + tuple(-value for value in FP4), device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack((fp4[byte & 15], fp4[byte >> 4]), dim=-1)
    out = torch.empty(*scale_G.shape, 32, dtype=dtype, device=blocks.device)
    flat = out.view(-1, 32), blocks.reshape(-1, 16), scale_G.reshape(-1, 1)
    for piece, piece_bytes, scale in zip(*(t.split(SLICE) for t in flat), strict=True):
        piece.copy_(pairs[piece_bytes.int()].flatten(1) * scale_to_float32(scale))
    return out.flatten(-2)


def unpack_integers(packed_NW: Tensor, bits: int) -> Tensor:
    """Unpack int32 words (..., N, W) into int8 (..., N, W * 32 // bits).

    The first number of a word is in its lowest bits; each is stored with 2^(bits - 1) added
    (compressed-tensors, `unpack_from_int32`).
    """
    in_word, mask = 32 // bits, 2**bits - 1
    out_NWJ = packed_NW.new_empty(*packed_NW.shape, in_word, dtype=torch.int8)
    for j in range(in_word):
        out_NWJ[..., j] = ((packed_NW >> (j * bits)) & mask) - 2 ** (bits - 1)
    return out_NWJ.flatten(-2)


def pack_integers(codes_NK: Tensor, bits: int) -> Tensor:
    """Undo `unpack_integers` for rows of whole words: (N, K) int8 -> int32 (N, W)."""
    codes_NWJ = codes_NK.unflatten(-1, (-1, 32 // bits)).int() + 2 ** (bits - 1)
    packed_NW = torch.zeros_like(codes_NWJ[..., 0])
    for j, codes_NW in enumerate(codes_NWJ.unbind(-1)):
        packed_NW |= codes_NW << (j * bits)
    return packed_NW


def dequantize_groups(
    packed_NW: Tensor,
    scale_NG: Tensor,
    shape: Shape,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dequantise words (..., N, W) with a scale per group of columns (..., N, G).

    Returns `shape`, (..., N, K). The last word of a row may hold more numbers than the row has.
    """
    weight_NK = unpack_integers(packed_NW, bits)[..., : shape[-1]]
    return dequantize_blocks(weight_NK, scale_NG, (1, group_size), dtype)


def quantize_blocks(weight_NK: Tensor, block: Block = (128, 128)) -> tuple[Tensor, Tensor]:
    """Quantise (..., N, K) to float8_e4m3fn; returns it with float32 scales (..., R, C).

    The largest magnitude of a block becomes 448, the largest number of float8_e4m3fn.
    """
    (rows, columns), (N, K) = block, weight_NK.shape[-2:]
    padded = F.pad(weight_NK.float(), (0, -K % columns, 0, -N % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # R, rows, C, columns
    largest = blocks.abs().amax(dim=(-3, -1), keepdim=True)
    # a subnormal scale has few bits: if it is rounded down, quotients exceed 464 and become NaN
    scale = (largest / 448).clamp(min=torch.finfo(torch.float32).tiny).where(largest != 0, 1.0)
    quantized = (blocks / scale).to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2)
    return quantized[..., :N, :K].contiguous(), scale.squeeze((-3, -1))
