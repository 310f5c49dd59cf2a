"""Root-mean-square normalisation (Zhang and Sennrich 2019).

Shapes: ... any leading dimensions, D width.
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, (..., D) -> (..., D). Weights begin at 1.

    The quotient is computed in float32 at least and rounded to the input's dtype before the
    weight multiplies it, as in Llama and DeepSeek.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x_D: Tensor) -> Tensor:
        wide_D = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
        wide_D = wide_D * torch.rsqrt(wide_D.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return self.weight * wide_D.to(x_D.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, epsilon={self.epsilon}"
