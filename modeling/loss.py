"""What training minimises: cross-entropy of tokens ahead, from the states that the head reads.

Shapes: B batch, T positions, D model width, V vocabulary, n targets that count.
"""

from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy


def next_token_loss(
    states_BTD: Tensor,
    head_VD: Tensor,
    tokens_BT: Tensor,
    ahead: int = 1,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in nats when position i predicts token i + `ahead`.

    states_BTD: of `Transformer.hidden_states`, or of an MTP depth, which has fewer positions than
    there are tokens; positions whose target lies behind the last token are left out.
    mask_BT: True where a token counts as a target. head_VD: the head's weight.
    The logits of all positions together never exist: torch runs head and loss chunk by chunk.
    """
    target_BT = tokens_BT[:, ahead:]
    states_BTD = states_BTD[:, : target_BT.shape[1]]
    if mask_BT is None:
        states_nD, target_n = states_BTD.flatten(0, 1), target_BT.flatten()
    else:
        counted_BT = mask_BT[:, ahead:]
        states_nD, target_n = states_BTD[counted_BT], target_BT[counted_BT]
    return linear_cross_entropy(states_nD, head_VD, target_n, options=LinearCrossEntropyOptions())
