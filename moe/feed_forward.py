"""The gated feed-forward layer: dense layers and shared experts. Routed experts share its formula.

Shapes: ... any leading dimensions, D model width, F hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config, Count, Positive


@dataclass(frozen=True, kw_only=True)
class Clamp(Config):
    """Bounds inside a gated activation: see `clamped_swiglu`."""

    limit: Positive  # of gate (from above) and up (from both sides)
    alpha: Positive  # slope of the sigmoid that gates


def swiglu(gate_F: Tensor, up_F: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, "GLU Variants Improve Transformer")."""
    return F.silu(gate_F) * up_F


def clamped_swiglu(gate_F: Tensor, up_F: Tensor, clamp: Clamp) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), both bounded first (gpt-oss, reference code)."""
    gate_F = gate_F.clamp(max=clamp.limit)
    up_F = up_F.clamp(min=-clamp.limit, max=clamp.limit)
    return gate_F * torch.sigmoid(clamp.alpha * gate_F) * (up_F + 1)


@dataclass(frozen=True, kw_only=True)
class DenseConfig(Config):
    """A dense feed-forward layer of this hidden width."""

    width: Count

    def build(self, d_model: int) -> "FeedForward":
        return FeedForward(d_model, self.width)


class FeedForward(nn.Module):
    """x -> down(silu(gate(x)) * up(x)), (..., D) -> (..., D), without biases."""

    residual_outputs = ("down.weight",)

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, width, bias=False)
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        return self.down(swiglu(self.gate(x_D), self.up(x_D)))


class GatedFeedForward(FeedForward):
    """A `FeedForward` whose output is scaled, token by token, by sigmoid(score(x))."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__(d_model, width)
        self.score = nn.Linear(d_model, 1, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        return torch.sigmoid(self.score(x_D)) * super().forward(x_D)
