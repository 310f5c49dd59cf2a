"""The gated feed-forward layer: dense layers and shared experts. Routed experts share its formula.

Shapes: ... any leading dimensions, D model width, F hidden width.
"""

from torch import Tensor, nn
from torch.nn import functional as F


def swiglu(gate_F: Tensor, up_F: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, "GLU Variants Improve Transformer")."""
    return F.silu(gate_F) * up_F


class FeedForward(nn.Module):
    """x -> down(silu(gate(x)) * up(x)), (..., D) -> (..., D), without biases."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, width, bias=False)
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        return self.down(swiglu(self.gate(x_D), self.up(x_D)))
