"""What training minimises: cross-entropy of tokens ahead, from the states that the head reads.

Shapes: B batch, T positions, D model width, V vocabulary, n targets that count.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PIECE = 512  # targets whose logits exist at once


def next_token_loss(
    states_BtD: Tensor,
    head: nn.Module | Tensor,
    tokens_BT: Tensor,
    ahead: int = 1,
    mask_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in nats when position i predicts token i + `ahead`.

    states_BtD: of `Transformer.hidden_states`, or of an MTP depth, which has fewer positions than
    there are tokens; positions whose target lies after the last token are left out.
    head: `Transformer.head`, or whatever took its place; a (V, D) weight stands for the plain one.
    mask_BT: True where a token counts as a target. documents_BT: the number of each token's
    document; a target then counts only at positions of its own document.
    Returns 0 if no target counts. The result has the dtype of the states. The logits of all
    positions never exist together.
    """
    target_Bt = tokens_BT[:, ahead:]
    states_BtD = states_BtD[:, : target_Bt.shape[1]]
    if mask_BT is None and documents_BT is None:
        states_nD, target_n = states_BtD.flatten(0, 1), target_Bt.flatten()
    else:
        counted_Bt = mask_targets(target_Bt, ahead, mask_BT, documents_BT)
        states_nD, target_n = states_BtD[counted_Bt], target_Bt[counted_Bt]
    if len(target_n) == 0:
        return states_nD.sum()
    return loss_in_pieces(states_nD, head, target_n)


def loss_in_pieces(states_nD: Tensor, head: nn.Module | Tensor, target_n: Tensor) -> Tensor:
    """Mean cross-entropy, piece by piece; the backward computes each piece's logits again.

    (F.linear_cross_entropy of torch 2.13 bounds memory as well, and takes two to six times as
    long on a CPU.)
    """

    def summed_loss(states_nD: Tensor, target_n: Tensor) -> Tensor:
        logits_nV = head(states_nD) if isinstance(head, nn.Module) else F.linear(states_nD, head)
        wide_dtype = torch.promote_types(logits_nV.dtype, torch.float32)
        return F.cross_entropy(logits_nV.to(wide_dtype), target_n, reduction="sum")

    sum_of_piece = partial(checkpoint, summed_loss, use_reentrant=False)
    pieces = zip(states_nD.split(PIECE), target_n.split(PIECE), strict=True)
    total = torch.stack([sum_of_piece(*piece) for piece in pieces]).sum()
    return (total / len(target_n)).to(states_nD.dtype)


def mask_targets(
    target_Bt: Tensor, ahead: int, mask_BT: Tensor | None, documents_BT: Tensor | None
) -> Tensor:
    """Which targets count, (B, t), as `next_token_loss` says."""
    counted_Bt = torch.ones_like(target_Bt, dtype=torch.bool)
    if mask_BT is not None:
        counted_Bt &= mask_BT[:, ahead:]
    if documents_BT is not None:
        counted_Bt &= documents_BT[:, ahead:] == documents_BT[:, :-ahead]
    return counted_Bt


def mtp_loss(
    depth_states: Sequence[Tensor],
    heads: Sequence[nn.Module | Tensor],
    tokens_BT: Tensor,
    depth_weights: Sequence[float],
    mask_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """sum_k weight_k * cross-entropy of depth k (DeepSeek-V3, equations 24 and 25).

    depth_states: `model.mtp_hidden_states(states, tokens_BT)`, where states are those of
    `model.hidden_states(tokens_BT)`; heads: `model.mtp_heads`.
    The paper's lambda / D is depth_weights = [lambda / D] * D. mask_BT, documents_BT: as in
    `next_token_loss`.
    0 without depths. Raises ValueError unless there is one weight per depth.
    """
    if len(depth_weights) != len(depth_states):
        raise ValueError(
            f"{len(depth_weights)} depth weights for {len(depth_states)} MTP depths: give one each"
        )
    losses = [
        weight * next_token_loss(states_BtD, head, tokens_BT, 1 + depth, mask_BT, documents_BT)
        for depth, (weight, states_BtD, head) in enumerate(
            zip(depth_weights, depth_states, heads, strict=True), start=1
        )
    ]
    return torch.stack(losses).sum() if losses else torch.zeros((), device=tokens_BT.device)
