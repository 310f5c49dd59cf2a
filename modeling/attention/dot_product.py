"""Scaled dot-product attention with a causal mask, windows and sinks: the plain form, the choice.

Shapes: B batch, T new tokens, S keys to attend to, H heads, J key-value heads, P head width, M
value width, s = S + 1.
"""

import torch
from torch import Tensor

from moe import exact_products

from ..step import Step
from .kernels import (
    attend_by_kernel,
    attend_in_blocks,
    attend_in_pieces,
    blocks_pay,
    mask_keys,
    pieces_pay,
)
from .weights import AttentionWeights, is_recorded, report_weights


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
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v, (B, H, T, M); J divides H.

    keys_BS: as in `mask_keys`. sinks_H: one more score per head in each softmax, which has no
    value, so a head may attend to nothing (Xiao et al. 2023, section 3.3; gpt-oss).
    """
    given = step, keys_BS, scale, window
    if is_recorded(step):
        report_weights(step, attention_weights(q_BHTP, k_BJSP, *given, sinks_H), keys_BS)
    if sinks_H is not None or blocks_pay(q_BHTP, k_BJSP):
        return attend_in_blocks(q_BHTP, k_BJSP, v_BJSM, *given, sinks_H)
    if pieces_pay(q_BHTP, k_BJSP, window):
        return attend_in_pieces(q_BHTP, k_BJSP, v_BJSM, scale)
    return attend_by_kernel(q_BHTP, k_BJSP, v_BJSM, *given)
