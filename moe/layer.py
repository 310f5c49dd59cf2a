"""The sparse layer: route, run the chosen experts, add the shared one.

Shapes: B batch, T positions, N = B * T tokens, D model width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .config import Config, Count, Size
from .experts import Experts
from .feed_forward import Clamp, FeedForward, GatedFeedForward
from .routing import Router, RouterConfig


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Config):
    """One mixture-of-experts layer. Says what the architecture is, never whose it is."""

    router: RouterConfig  # TopK, TopP, ExpertChoice, or anybody's
    expert_width: Count  # hidden width F of a routed expert
    expert_biases: bool = False  # on all three of a routed expert's products
    clamp: Clamp | None = None  # of the routed experts' activation; None: plain SwiGLU
    # Width of the shared expert, which every token uses (of several: their sum); 0: none.
    shared_width: Size = 0
    shared_gate: bool = False  # multiply its output by the sigmoid of a linear score

    def check(self) -> None:
        gated = self.shared_width > 0 or not self.shared_gate
        self.require(gated, "shared_gate", "be False: there is no shared expert to gate")

    def build(self, d_model: int) -> "MoE":
        return MoE(d_model, self)


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer, (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = config.router.build(d_model)
        if not isinstance(self.router, Router):
            built = f"{type(config.router).__name__} builds a {type(self.router).__name__}"
            raise TypeError(f"{built} without num_experts or selection_bias: see moe.Router")
        experts = config.router.num_experts, config.expert_width, config.expert_biases
        self.experts = Experts(d_model, *experts, config.clamp)
        kind = GatedFeedForward if config.shared_gate else FeedForward
        self.shared = kind(d_model, config.shared_width) if config.shared_width else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        y_ND = self.experts(x_ND, self.router(x_ND))
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD)

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a token does not use."""
        router = self.config.router
        of_one = sum(p.numel() for p in self.experts.parameters()) // router.num_experts
        return round((router.num_experts - router.experts_per_token) * of_one)
