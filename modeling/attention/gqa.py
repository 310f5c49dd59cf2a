"""Scaled dot-product attention with a causal mask, and grouped-query attention on top of it.

Shapes: B batch, T new tokens, S keys to attend to, D model width, H heads, J key-value heads,
P head width, M value width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..cache import LayerCache, WindowCache
from ..config import GQAConfig
from ..norm import RMSNorm
from ..rope import Positions, rotate


def visible(positions: Positions, keys_BS: Tensor | None, window: int | None = None) -> Tensor:
    """Which keys, of these positions, each query may see; bool (B, 1, T, S).

    Those at its own position and before, of which a window counts the last so many, itself
    included. A key of a negative position is none. keys_BS None: the keys are the queries' own.
    """
    keys_BS = positions.indices_BT if keys_BS is None else keys_BS
    query_B1T1, key_B11S = positions.indices_BT[:, None, :, None], keys_BS[:, None, None]
    seen = (key_B11S >= 0) & (key_B11S <= query_B1T1)
    return seen if window is None else seen & (key_B11S > query_B1T1 - window)


def attend(
    q_BHTP: Tensor,
    k_BJSP: Tensor,
    v_BJSM: Tensor,
    positions: Positions,
    keys_BS: Tensor | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v, (B, H, T, M); J divides H.

    Among the queries' own keys, without a window, the mask is the plain triangle. Values narrower
    than the keys are padded with zeros: torch's kernels that never write the (T, S) scores want
    one width for both.
    """
    P, M = q_BHTP.shape[3], v_BJSM.shape[3]
    triangle = keys_BS is None and window is None
    y_BHTm = F.scaled_dot_product_attention(
        q_BHTP,
        k_BJSP,
        F.pad(v_BJSM, (0, P - M)) if M < P else v_BJSM,
        attn_mask=None if triangle else visible(positions, keys_BS, window),
        is_causal=triangle,
        scale=scale,
        enable_gqa=q_BHTP.shape[1] != k_BJSP.shape[1],
    )
    return y_BHTm[..., :M]


def attend_with_sinks(
    q_BHTP: Tensor,
    k_BJSP: Tensor,
    v_BJSM: Tensor,
    positions: Positions,
    keys_BS: Tensor | None,
    scale: float,
    window: int | None,
    sinks_H: Tensor,
) -> Tensor:
    """`attend` with one more score per head in each softmax, `sinks_H`, which has no value.

    So a head may attend to nothing (Xiao et al. 2023, section 3.3; gpt-oss). Computed as one more
    key: every query gets a dimension that holds its head's sink, which only that key has too;
    it stands at position 0 and has a value of zeros. That leaves the softmax to torch's kernels.
    """
    sink_BHT1 = (sinks_H / scale)[:, None, None].expand(*q_BHTP.shape[:3], 1)
    q_BHTp = torch.cat([q_BHTP, sink_BHT1.to(q_BHTP.dtype)], dim=-1)
    k_BJsp = F.pad(k_BJSP, (0, 1, 1, 0))
    k_BJsp[:, :, 0, -1] = 1.0
    P, M = q_BHTp.shape[3], v_BJSM.shape[3]
    y_BHTm = F.scaled_dot_product_attention(
        q_BHTp,
        k_BJsp,
        F.pad(v_BJSM, (0, max(0, P - M), 1, 0)),
        attn_mask=F.pad(visible(positions, keys_BS, window), (1, 0), value=True),
        scale=scale,
        enable_gqa=q_BHTP.shape[1] != k_BJSP.shape[1],
    )
    return y_BHTm[..., :M]


class AllHeadsNorm(RMSNorm):
    """RMS norm over all heads of a token as one vector, (..., H, P) -> (..., H, P)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class GroupedQueryAttention(nn.Module):
    """Attention whose H query heads share J key-value heads; caches keys (rotated) and values."""

    def __init__(self, d_model: int, config: GQAConfig) -> None:
        super().__init__()
        self.config = config
        H, J, P = config.num_heads, config.kv_heads, config.head_width
        self.q = nn.Linear(d_model, H * P, bias=config.qkv_bias)
        self.k = nn.Linear(d_model, J * P, bias=config.qkv_bias)
        self.v = nn.Linear(d_model, J * P, bias=config.qkv_bias)
        self.o = nn.Linear(H * P, d_model, bias=config.output_bias)
        self.q_norm, self.k_norm = qk_norm(config, H), qk_norm(config, J)
        self.sinks = nn.Parameter(torch.empty(H)) if config.sinks else None
        scale = P**-0.5 if config.scale is None else config.scale
        self.scale = scale * config.rope.softmax_multiplier

    def make_cache(self, batch_size: int, max_length: int, rollback: int = 0) -> LayerCache:
        widths, window = [self.config.kv_heads * self.config.head_width] * 2, self.config.window
        if window is None:
            return LayerCache(batch_size, max_length, widths, like=self.k.weight)
        return WindowCache(batch_size, max_length, widths, self.k.weight, window, rollback)

    def forward(self, x_BTD: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        P, window = self.config.head_width, self.config.window
        q_BTHP = rearrange(self.q(x_BTD), "B T (H P) -> B T H P", P=P)
        k_BTJP = rearrange(self.k(x_BTD), "B T (J P) -> B T J P", P=P)
        q_BTHP = self.placed(q_BTHP, self.q_norm, positions)
        k, v = self.placed(k_BTJP, self.k_norm, positions).flatten(2), self.v(x_BTD)
        keys_BS = None
        if cache is not None:
            (k, v), keys_BS = cache.append(k, v, counts=positions.counts)
        k_BJSP = rearrange(k, "B S (J P) -> B J S P", P=P)
        v_BJSP = rearrange(v, "B S (J P) -> B J S P", P=P)
        qkv = q_BTHP.transpose(1, 2), k_BJSP, v_BJSP
        if self.sinks is None:
            y_BHTP = attend(*qkv, positions, keys_BS, self.scale, window)
        else:
            y_BHTP = attend_with_sinks(*qkv, positions, keys_BS, self.scale, window, self.sinks)
        return self.o(rearrange(y_BHTP, "B H T P -> B T (H P)"))

    def placed(self, x_BTHP: Tensor, norm: nn.Module, positions: Positions) -> Tensor:
        """Queries or keys normalised and rotated to their positions, in the config's order."""
        if self.config.qk_norm is not None and self.config.qk_norm.after_rope:
            return norm(rotate(x_BTHP, self.config.rope, positions))
        return rotate(norm(x_BTHP), self.config.rope, positions)


def qk_norm(config: GQAConfig, num_heads: int) -> nn.Module:
    """The norm of queries or keys of so many heads."""
    if config.qk_norm is None:
        return nn.Identity()
    if config.qk_norm.over == "all":
        return AllHeadsNorm(num_heads * config.head_width, config.qk_norm.epsilon)
    return RMSNorm(config.head_width, config.qk_norm.epsilon)
