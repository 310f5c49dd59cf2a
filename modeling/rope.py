"""Rotary position embedding (Su et al. 2021) with YaRN's frequencies (Peng et al. 2023).

Two layouts exist and no checkpoint says which by its names: dimension i is paired with
i + R/2 ("half", GPT-NeoX) or 2i with 2i + 1 ("interleaved", GPT-J). Pairs stay where they are
here; transformers' DeepSeek-V3 returns interleaved pairs in half order, which scores cannot see
because queries and keys are permuted alike.

Tables are computed in float32, as every reference does, and the rotation runs in float32 at
least. (Some references round the tables to bfloat16 first: 1e-3 of drift in bfloat16 models.)

Shapes: B batch (1 where all rows stand at the same positions), T new tokens, H heads, P head
width, R rotated width, r = R / 2.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe import Config, Count, Limit, Positive, one_of

from .step import Step

Even = Annotated[int, Limit("an even number >= 2", lambda width: width >= 2 and width % 2 == 0)]


@dataclass(frozen=True, kw_only=True)
class YarnConfig(Config):
    """YaRN's change of the rotary frequencies (Peng et al. 2023, section 3.2)."""

    factor: Annotated[float, Limit("a number >= 1", lambda factor: factor >= 1)]
    original_length: Count  # positions the model was trained on before the change
    beta_fast: Positive = 32.0  # rotations over original_length above which a frequency is kept
    beta_slow: Positive = 1.0  # rotations below which it is divided by factor
    truncate: bool = True  # round the ramp's first pair down and its last pair up

    def check(self) -> None:
        self.require(self.beta_fast >= self.beta_slow, "beta_fast", "be >= {beta_slow}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Config):
    """Rotary positions. YaRN's two corrections are numbers that the builder of the config sets.

    `amplitude` multiplies cos and sin, so a score by its square; `softmax_multiplier` multiplies
    the softmax scale and therefore the part of a head that is not rotated too.
    """

    width: Even  # how many dimensions are rotated, in pairs
    theta: Annotated[float, Limit("a number > 1", lambda theta: theta > 1)] = 10000.0
    # which dimensions form a pair: (i, i + width/2) or (2i, 2i + 1)
    layout: Annotated[str, one_of(("half", "interleaved"))] = "half"
    yarn: YarnConfig | None = None
    amplitude: Positive = 1.0
    softmax_multiplier: Positive = 1.0


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians per position of each pair, float32 (R/2,)."""
    steps_r = torch.arange(0, rope.width, 2, dtype=torch.float32) / rope.width
    inverse_r = 1.0 / (rope.theta**steps_r)
    return inverse_r if rope.yarn is None else apply_yarn(inverse_r, rope, rope.yarn)


def apply_yarn(inverse_r: Tensor, rope: RopeConfig, yarn: YarnConfig) -> Tensor:
    """Fast pairs keep their frequency, slow ones are divided by `factor`, a ramp lies between."""

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


def rope_table(rope: RopeConfig, step: Step) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 (B, T, R/2), with the rope's amplitude in both; once per forward."""
    table = step.shared.get(rope)
    if table is None:
        inverse_r = inverse_frequencies(rope).to(step.positions_BT.device)
        angle_BTr = step.positions_BT[..., None].float() * inverse_r
        table = angle_BTr.cos() * rope.amplitude, angle_BTr.sin() * rope.amplitude
        step.shared[rope] = table
    return table


def rotate(x_BTHP: Tensor, rope: RopeConfig, step: Step) -> Tensor:
    """Rotate the first `rope.width` dimensions of each head to its position; (B, T, H, P)."""
    wide_dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    rotated_BTHR, rest = x_BTHP.to(wide_dtype).tensor_split([rope.width], dim=-1)
    cos_BTHr, sin_BTHr = (table_BTr[:, :, None] for table_BTr in rope_table(rope, step))
    pair_axis = -2 if rope.layout == "half" else -1
    pair_shape = (2, -1) if rope.layout == "half" else (-1, 2)
    first, second = rotated_BTHR.unflatten(-1, pair_shape).unbind(pair_axis)
    pairs = (first * cos_BTHr - second * sin_BTHr, second * cos_BTHr + first * sin_BTHr)
    rotated_BTHR = torch.stack(pairs, dim=pair_axis).flatten(-2)
    return torch.cat([rotated_BTHR, rest], dim=-1).to(x_BTHP.dtype)
