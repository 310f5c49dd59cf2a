"""Rotary position embedding (Su et al. 2021) with YaRN's frequencies (Peng et al. 2023).

Two layouts exist and no checkpoint says which by its names: dimension i is paired with
i + R/2 ("half", GPT-NeoX) or 2i with 2i + 1 ("interleaved", GPT-J). Pairs stay where they are
here; transformers' DeepSeek-V3 returns interleaved pairs in half order, which scores cannot see
because queries and keys are permuted alike.

Tables are computed in float32, as every reference does, and the rotation runs in float32 at
least. (Some references round the tables to bfloat16 first: 1e-3 of drift in bfloat16 models.)

Shapes: B batch (1 where all rows stand at the same positions), T new tokens, H heads, P head
width, R rotated width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import RopeConfig, YarnConfig


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians per position of each pair, float32 (R/2,)."""
    steps_r = torch.arange(0, rope.width, 2, dtype=torch.float32) / rope.width
    inverse_r = 1.0 / (rope.theta**steps_r)
    return inverse_r if rope.yarn is None else stretched(inverse_r, rope, rope.yarn)


def stretched(inverse_r: Tensor, rope: RopeConfig, yarn: YarnConfig) -> Tensor:
    """YaRN: fast pairs keep their frequency, slow ones are divided by factor, a ramp between."""

    def pair_rotating(times: float) -> float:
        """The (fractional) pair that makes this many rotations over the original length."""
        wavelength = yarn.original_length / (times * 2 * math.pi)
        return rope.width * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair_rotating(yarn.beta_fast), pair_rotating(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.width - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp, as in the reference
    pair_r = torch.arange(rope.width // 2, dtype=torch.float32)
    ramp_r = ((pair_r - first) / (last - first)).clamp(0, 1)
    return inverse_r / yarn.factor * ramp_r + inverse_r * (1 - ramp_r)


class Positions:
    """Where the new tokens stand, and each rope's cos and sin there, computed once per forward.

    counts: how many of the T tokens are real, row by row, where rows are padded; None: all.
    """

    def __init__(self, indices_BT: Tensor, counts: Sequence[int] | None = None) -> None:
        self.indices_BT, self.counts = indices_BT, counts
        self._tables: dict[RopeConfig, tuple[Tensor, Tensor]] = {}

    def table(self, rope: RopeConfig) -> tuple[Tensor, Tensor]:
        """(cos, sin), each float32 (B, T, R/2), with the rope's amplitude in both."""
        if rope not in self._tables:
            inverse_r = inverse_frequencies(rope).to(self.indices_BT.device)
            angle_BTr = self.indices_BT[..., None].float() * inverse_r
            self._tables[rope] = angle_BTr.cos() * rope.amplitude, angle_BTr.sin() * rope.amplitude
        return self._tables[rope]


def rotate(x_BTHP: Tensor, rope: RopeConfig, positions: Positions) -> Tensor:
    """Rotate the first `rope.width` dimensions of each head to its position; (B, T, H, P)."""
    wide_dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    turning_BTHR, still = x_BTHP.to(wide_dtype).tensor_split([rope.width], dim=-1)
    cos_BTHr, sin_BTHr = (table_BTr[:, :, None] for table_BTr in positions.table(rope))
    pair_axis = -2 if rope.layout == "half" else -1
    pair_shape = (2, -1) if rope.layout == "half" else (-1, 2)
    first, second = turning_BTHR.unflatten(-1, pair_shape).unbind(pair_axis)
    turned = (first * cos_BTHr - second * sin_BTHr, second * cos_BTHr + first * sin_BTHr)
    turned_BTHR = torch.stack(turned, dim=pair_axis).flatten(-2)
    return torch.cat([turned_BTHR, still], dim=-1).to(x_BTHP.dtype)
