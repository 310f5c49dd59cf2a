"""The sparse layer: route, run the chosen experts, add the shared one.

Shapes: B batch, T positions, N = B * T tokens, D model width.
"""

from torch import Tensor, nn

from .config import MoEConfig
from .experts import Experts
from .feed_forward import FeedForward, GatedFeedForward
from .routing import Router


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer, (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(d_model, config)
        self.experts = Experts(d_model, config)
        kind = GatedFeedForward if config.shared_gate else FeedForward
        self.shared = kind(d_model, config.shared_width) if config.shared_width else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        y_ND = self.experts(x_ND, self.router(x_ND))
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD)
