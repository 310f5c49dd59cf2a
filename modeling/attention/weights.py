"""Attention weights as data, for `record_attention`: what the fast kernels never write out.

Shapes: B batch, T new tokens, S keys to attend to (in what is recorded: positions), H heads, J
key-value heads, P head width, s = S + 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..step import Step


@dataclass(frozen=True)
class AttentionWeights:
    """How much each query attends to each key; with the sink, the weights of a query sum to 1."""

    weights_BHTS: Tensor  # float32 at least
    sinks_BHT: Tensor | None = None  # the share of each head's sink; None: there are none
    positions_BT: Tensor | None = None  # of the queries, -1 for padding; set in what is recorded


def is_recorded(step: Step) -> bool:
    """Whether `record_attention` records the attention that this step was handed to."""
    return AttentionWeights in step.shared


def report_weights(step: Step, weights: AttentionWeights, keys_BS: Tensor | None = None) -> None:
    """Hand an attention's weights to `record_attention`; nothing happens where none records.

    A head that combines several softmaxes reports each as a head of its own, before they are
    combined. keys_BS: the positions of the keys, as in `mask_keys`. The record has a column for
    each position, in order, and zeros for queries that are padding.
    """
    if not is_recorded(step):
        return
    B, H, T, _ = weights.weights_BHTS.shape
    positions_BT, real_BT = step.positions_BT.expand(B, T), step.real_mask(T)
    real_BT = torch.ones_like(positions_BT, dtype=torch.bool) if real_BT is None else real_BT
    num_positions = int(positions_BT[real_BT].max()) + 1 if real_BT.any() else 0
    keys_BS = step.positions_BT if keys_BS is None else keys_BS
    real_B1T, used_B1S = real_BT[:, None], (keys_BS >= 0) & (keys_BS < num_positions)
    wide = torch.promote_types(weights.weights_BHTS.dtype, torch.float32)
    shown_BHTS = weights.weights_BHTS.to(wide).where(
        real_B1T[..., None] & used_B1S[:, None, None], 0
    )
    index_BHTS = keys_BS.clamp(0, max(0, num_positions - 1))[:, None, None].expand_as(shown_BHTS)
    placed_BHTS = shown_BHTS.new_zeros(B, H, T, num_positions)
    if num_positions:
        placed_BHTS = placed_BHTS.scatter_add(-1, index_BHTS, shown_BHTS)
    sinks_BHT = None if weights.sinks_BHT is None else weights.sinks_BHT.where(real_B1T, 0)
    shown_BT = positions_BT.where(real_BT, -1)
    step.shared[AttentionWeights].append(AttentionWeights(placed_BHTS, sinks_BHT, shown_BT))
