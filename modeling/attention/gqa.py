"""Grouped-query attention (Ainslie et al. 2023), with windows, sinks and query-key norms.

Shapes: B batch, T new tokens, S keys to attend to, D model width, H heads, J key-value heads,
P head width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from moe import Config, Count, Positive

from ..cache import LayerCache
from ..norm import RMSNorm
from ..rope import RopeConfig, rotate
from ..step import Step
from .caches import EntryCache, WindowCache
from .dot_product import attend


@dataclass(frozen=True, kw_only=True)
class QKNormConfig(Config):
    """RMS norms on queries and keys (Dehghani et al. 2023, section 2, with RMS for layer norms)."""

    over: Literal["head", "all"] = "head"  # each head by itself, or all heads as one vector
    after_rope: bool = False  # else before; they differ because the norms' weights do not rotate
    epsilon: Positive


@dataclass(frozen=True, kw_only=True)
class GQAConfig(Config):
    """Grouped-query attention; multi-head where kv_heads = num_heads."""

    num_heads: Count
    kv_heads: Count
    head_width: Count
    rope: RopeConfig  # its width may be less than head_width: the first dimensions are rotated
    scale: Positive | None = None  # of the scores; None: head_width ** -0.5
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNormConfig | None = None
    window: Count | None = None  # how many positions a query sees, its own included; None: all
    sinks: bool = False  # a learned score per head that takes part in the softmax and has no value

    def check(self) -> None:
        self.require(self.num_heads % self.kv_heads == 0, "kv_heads", "divide {num_heads}")
        fits = self.rope.width <= self.head_width
        self.require(fits, "head_width", f"be >= the {self.rope.width} rotated dimensions")

    @property
    def uncompressed_width(self) -> int:
        """Numbers that plain multi-head attention with these heads keeps of a token."""
        return self.num_heads * 2 * self.head_width

    def build(self, d_model: int) -> "GroupedQueryAttention":
        return GroupedQueryAttention(d_model, self)


class AllHeadsNorm(RMSNorm):
    """RMS norm over all heads of a token as one vector, (..., H, P) -> (..., H, P)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class GroupedQueryAttention(nn.Module):
    """Attention whose H query heads share J key-value heads; caches keys (rotated) and values.

    Sinks begin at 0.
    """

    residual_outputs = ("o.weight",)

    def __init__(self, d_model: int, config: GQAConfig) -> None:
        super().__init__()
        self.config = config
        H, J, P = config.num_heads, config.kv_heads, config.head_width
        self.q = nn.Linear(d_model, H * P, bias=config.qkv_bias)
        self.k = nn.Linear(d_model, J * P, bias=config.qkv_bias)
        self.v = nn.Linear(d_model, J * P, bias=config.qkv_bias)
        self.o = nn.Linear(H * P, d_model, bias=config.output_bias)
        self.q_norm, self.k_norm = make_qk_norm(config, H), make_qk_norm(config, J)
        self.sinks = nn.Parameter(torch.empty(H)) if config.sinks else None
        scale = P**-0.5 if config.scale is None else config.scale
        self.scale = scale * config.rope.softmax_multiplier
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def make_cache(self, batch_size: int, max_length: int, rollback: int = 0) -> LayerCache:
        widths, window = [self.config.kv_heads * self.config.head_width] * 2, self.config.window
        if window is None:
            return EntryCache(batch_size, max_length, widths)
        return WindowCache(batch_size, max_length, widths, window, rollback)

    def forward(self, x_BTD: Tensor, step: Step, cache: EntryCache | WindowCache | None) -> Tensor:
        P, window = self.config.head_width, self.config.window
        q_BTHP = rearrange(self.q(x_BTD), "B T (H P) -> B T H P", P=P)
        k_BTJP = rearrange(self.k(x_BTD), "B T (J P) -> B T J P", P=P)
        q_BTHP = self.norm_and_rotate(q_BTHP, self.q_norm, step)
        k, v = self.norm_and_rotate(k_BTJP, self.k_norm, step).flatten(2), self.v(x_BTD)
        keys_BS = None
        if cache is not None:
            (k, v), keys_BS = cache.append(k, v, counts=step.counts)
        k_BJSP = rearrange(k, "B S (J P) -> B J S P", P=P)
        v_BJSP = rearrange(v, "B S (J P) -> B J S P", P=P)
        qkv = q_BTHP.transpose(1, 2), k_BJSP, v_BJSP
        y_BHTP = attend(*qkv, step, keys_BS, self.scale, window, self.sinks)
        return self.o(rearrange(y_BHTP, "B H T P -> B T (H P)"))

    def norm_and_rotate(self, x_BTHP: Tensor, norm: nn.Module, step: Step) -> Tensor:
        """Queries or keys normalised and rotated to their positions, in the config's order."""
        if self.config.qk_norm is not None and self.config.qk_norm.after_rope:
            return norm(rotate(x_BTHP, self.config.rope, step))
        return rotate(norm(x_BTHP), self.config.rope, step)

    def extra_repr(self) -> str:
        c = self.config
        sinks = ", sinks" if c.sinks else ""
        return f"{c.num_heads} heads of {c.head_width} over {c.kv_heads}, window={c.window}{sinks}"


def make_qk_norm(config: GQAConfig, num_heads: int) -> nn.Module:
    """The norm of queries or keys of so many heads."""
    if config.qk_norm is None:
        return nn.Identity()
    if config.qk_norm.over == "all":
        return AllHeadsNorm(num_heads * config.head_width, config.qk_norm.epsilon)
    return RMSNorm(config.head_width, config.qk_norm.epsilon)
