"""Scaled dot-product attention with a causal mask, windows and sinks.

Shapes: B batch, T new tokens, S keys to attend to, H heads, J key-value heads, P head width, M
value width, p and m padded widths, s = S + 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe import exact_products

from ..step import Step
from .weights import AttentionWeights, is_recorded, report_weights


def mask_keys(step: Step, keys_BS: Tensor | None, window: int | None = None) -> Tensor:
    """True where a query may see a key, bool (B, 1, T, S).

    A query sees keys at its own position and earlier ones, with a window the last `window` of
    them, its own included. keys_BS: the positions of the keys, negative for an empty slot; None:
    the keys are the queries' own.
    """
    keys_BS = step.positions_BT if keys_BS is None else keys_BS
    query_B1T1, key_B11S = step.positions_BT[:, None, :, None], keys_BS[:, None, None]
    seen = (key_B11S >= 0) & (key_B11S <= query_B1T1)
    return seen if window is None else seen & (key_B11S > query_B1T1 - window)


def attention_weights(
    q_BHTP: Tensor,
    k_BJSP: Tensor,
    step: Step,
    keys_BS: Tensor | None,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> AttentionWeights:
    """softmax(scale * q k^T + causal mask), with the sinks as one more score; J divides H.

    The plain twin of every attention function here: its weights times the values are their result.
    """
    (B, H, T, _), J = q_BHTP.shape, k_BJSP.shape[1]
    wide = torch.promote_types(q_BHTP.dtype, torch.float32)
    k_BHSP = k_BJSP.repeat_interleave(H // J, dim=1)
    with exact_products(q_BHTP.device.type):
        scores_BHTS = scale * (q_BHTP.to(wide) @ k_BHSP.to(wide).transpose(-1, -2))
    scores_BHTS = scores_BHTS.where(mask_keys(step, keys_BS, window), -torch.inf)
    if sinks_H is None:
        return AttentionWeights(scores_BHTS.softmax(dim=-1))
    sink_BHT1 = sinks_H.to(wide)[:, None, None].expand(B, H, T, 1)
    weights_BHTs = torch.cat([scores_BHTS, sink_BHT1], dim=-1).softmax(dim=-1)
    return AttentionWeights(weights_BHTs[..., :-1], weights_BHTs[..., -1])


def attend(
    q_BHTP: Tensor,
    k_BJSP: Tensor,
    v_BJSM: Tensor,
    step: Step,
    keys_BS: Tensor | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v, (B, H, T, M); J divides H.

    Among the queries' own keys, without a window, the mask is the plain triangle. Values narrower
    than the keys are padded with zeros: torch's kernels that never write the (T, S) scores want
    one width for both.
    """
    if is_recorded(step):
        weights = attention_weights(q_BHTP, k_BJSP, step, keys_BS, scale, window)
        report_weights(step, weights, keys_BS)
    P, M = q_BHTP.shape[3], v_BJSM.shape[3]
    triangle = keys_BS is None and window is None
    y_BHTm = F.scaled_dot_product_attention(
        q_BHTP,
        k_BJSP,
        F.pad(v_BJSM, (0, P - M)) if M < P else v_BJSM,
        attn_mask=None if triangle else mask_keys(step, keys_BS, window),
        is_causal=triangle,
        scale=scale,
        enable_gqa=q_BHTP.shape[1] != k_BJSP.shape[1],
    )
    return y_BHTm[..., :M]


def attend_with_sinks(
    q_BHTP: Tensor,
    k_BJSP: Tensor,
    v_BJSM: Tensor,
    step: Step,
    keys_BS: Tensor | None,
    scale: float,
    window: int | None,
    sinks_H: Tensor,
) -> Tensor:
    """`attend` with one more score per head in each softmax, `sinks_H`, which has no value.

    So a head may attend to nothing (Xiao et al. 2023, section 3.3; gpt-oss). The sink becomes a key
    before all others, with a value of zeros. A new dimension holds the head's sink in every query,
    1 in this key and 0 in the others, so torch's kernels compute the whole softmax.
    """
    if is_recorded(step):
        weights = attention_weights(q_BHTP, k_BJSP, step, keys_BS, scale, window, sinks_H)
        report_weights(step, weights, keys_BS)
    sink_BHT1 = (sinks_H / scale)[:, None, None].expand(*q_BHTP.shape[:3], 1)
    q_BHTp = torch.cat([q_BHTP, sink_BHT1.to(q_BHTP.dtype)], dim=-1)
    k_BJsp = F.pad(k_BJSP, (0, 1, 1, 0))
    k_BJsp[:, :, 0, -1] = 1.0
    P, M = q_BHTp.shape[3], v_BJSM.shape[3]
    y_BHTm = F.scaled_dot_product_attention(
        q_BHTp,
        k_BJsp,
        F.pad(v_BJSM, (0, max(0, P - M), 1, 0)),
        attn_mask=F.pad(mask_keys(step, keys_BS, window), (1, 0), value=True),
        scale=scale,
        enable_gqa=q_BHTP.shape[1] != k_BJSP.shape[1],
    )
    return y_BHTm[..., :M]
