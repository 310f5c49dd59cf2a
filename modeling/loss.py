"""What training minimises: cross-entropy of tokens ahead, from the states that the head reads.

Shapes: B batch, T positions, D model width, V vocabulary, n targets that count.
"""

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy


def next_token_loss(
    states_BtD: Tensor,
    head_VD: Tensor,
    tokens_BT: Tensor,
    ahead: int = 1,
    mask_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in nats when position i predicts token i + `ahead`.

    states_BtD: of `Transformer.hidden_states`, or of an MTP depth, which has fewer positions than
    there are tokens; positions whose target lies behind the last token are left out.
    mask_BT: True where a token counts as a target. documents_BT: the number of the document that
    a token belongs to; no position then answers for a token of another one. head_VD: the head's
    weight. Without any target left the loss is zero. The result has the dtype of the states. The
    logits of all positions never exist together: torch runs head and loss chunk by chunk.
    """
    target_Bt = tokens_BT[:, ahead:]
    states_BtD = states_BtD[:, : target_Bt.shape[1]]
    if mask_BT is None and documents_BT is None:
        states_nD, target_n = states_BtD.flatten(0, 1), target_Bt.flatten()
    else:
        counted_Bt = counted(target_Bt, ahead, mask_BT, documents_BT)
        states_nD, target_n = states_BtD[counted_Bt], target_Bt[counted_Bt]
    if len(target_n) == 0:
        return states_nD.sum()
    return linear_cross_entropy(states_nD, head_VD, target_n, options=LinearCrossEntropyOptions())


def counted(
    target_Bt: Tensor, ahead: int, mask_BT: Tensor | None, documents_BT: Tensor | None
) -> Tensor:
    """Which targets count, (B, t), as `next_token_loss` says."""
    counted_Bt = torch.ones_like(target_Bt, dtype=torch.bool)
    if mask_BT is not None:
        counted_Bt &= mask_BT[:, ahead:]
    if documents_BT is not None:
        counted_Bt &= documents_BT[:, ahead:] == documents_BT[:, :-ahead]
    return counted_Bt
