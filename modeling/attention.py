"""Scaled dot-product attention with a causal mask, and grouped-query attention on top of it.

Shapes: B batch, T new tokens, S positions so far, D model width, H heads, J key-value heads,
P head width, M value width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import LayerCache
from .config import GQAConfig
from .rope import Positions, rotate


def visible(positions: Positions, num_keys: int) -> Tensor:
    """Which keys each query may see: those at its own position and before; bool (B, 1, T, S)."""
    keys_S = torch.arange(num_keys, device=positions.indices_BT.device)
    return keys_S <= positions.indices_BT[:, None, :, None]


def attend(
    q_BHTP: Tensor, k_BJSP: Tensor, v_BJSM: Tensor, positions: Positions, scale: float
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v, (B, H, T, M); J divides H.

    When there are as many keys as queries nothing was cached and the mask is the plain triangle.
    Values narrower than the keys are padded with zeros: torch's kernels that never write the
    (T, S) scores want one width for both.
    """
    T, S, P, M = q_BHTP.shape[2], k_BJSP.shape[2], q_BHTP.shape[3], v_BJSM.shape[3]
    y_BHTm = F.scaled_dot_product_attention(
        q_BHTP,
        k_BJSP,
        F.pad(v_BJSM, (0, P - M)) if M < P else v_BJSM,
        attn_mask=None if S == T else visible(positions, S),
        is_causal=S == T,
        scale=scale,
        enable_gqa=q_BHTP.shape[1] != k_BJSP.shape[1],
    )
    return y_BHTm[..., :M]


class GroupedQueryAttention(nn.Module):
    """Attention whose H query heads share J key-value heads; caches keys (rotated) and values."""

    def __init__(self, d_model: int, config: GQAConfig) -> None:
        super().__init__()
        self.config = config
        H, J, P = config.num_heads, config.kv_heads, config.head_width
        self.q = nn.Linear(d_model, H * P, bias=False)
        self.k = nn.Linear(d_model, J * P, bias=False)
        self.v = nn.Linear(d_model, J * P, bias=False)
        self.o = nn.Linear(H * P, d_model, bias=False)
        self.scale = P**-0.5 * config.rope.softmax_multiplier

    def make_cache(self, batch_size: int, max_length: int) -> LayerCache:
        width = self.config.kv_heads * self.config.head_width
        return LayerCache(batch_size, max_length, [width, width], like=self.k.weight)

    def forward(self, x_BTD: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        P, rope = self.config.head_width, self.config.rope
        q_BTHP = rotate(rearrange(self.q(x_BTD), "B T (H P) -> B T H P", P=P), rope, positions)
        k_BTJP = rotate(rearrange(self.k(x_BTD), "B T (J P) -> B T J P", P=P), rope, positions)
        k, v = k_BTJP.flatten(2), self.v(x_BTD)
        if cache is not None:
            k, v = cache.append(k, v)
        k_BJSP = rearrange(k, "B S (J P) -> B J S P", P=P)
        v_BJSP = rearrange(v, "B S (J P) -> B J S P", P=P)
        y_BHTP = attend(q_BTHP.transpose(1, 2), k_BJSP, v_BJSP, positions, self.scale)
        return self.o(rearrange(y_BHTP, "B H T P -> B T (H P)"))
