"""Multi-token prediction (DeepSeek-V3, section 2.2): small modules that guess further ahead.

Module k reads, at position i, the previous module's state there (the main model's for k = 1) and
the embedding of token i + k, and predicts token i + 1 + k. Embedding and head are the main
model's.

Where implementations disagree, this is what transformers 5.23 computes: the concatenation is
[embedding ; state], though the paper's equation 21 prints the state first (every public
implementation puts the embedding first for these weights); the state handed to a module is the
one after the norm before the head (some engines hand on the un-normed one). Positions are those of
the state; transformers counts from the embedded token, which rotary attention cannot tell apart.

Shapes: B batch, T positions, D model width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .cache import LayerCache
from .loss import next_token_loss
from .norm import RMSNorm
from .rope import Positions


class MTPModule(nn.Module):
    """One prediction depth: (state, next token's embedding) -> state for the head and the next."""

    def __init__(self, d_model: int, norm_epsilon: float, block: nn.Module) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(d_model, norm_epsilon)
        self.state_norm = RMSNorm(d_model, norm_epsilon)
        self.projection = nn.Linear(2 * d_model, d_model, bias=False)
        self.block = block
        self.norm = RMSNorm(d_model, norm_epsilon)

    def forward(
        self,
        state_BTD: Tensor,
        embedding_BTD: Tensor,
        positions: Positions,
        cache: LayerCache | None,
    ) -> Tensor:
        normed = self.embedding_norm(embedding_BTD), self.state_norm(state_BTD)
        x_BTD = self.projection(torch.cat(normed, dim=-1))
        return self.norm(self.block(x_BTD, positions, cache))


def mtp_loss(
    depth_states: Sequence[Tensor],
    head_VD: Tensor,
    tokens_BT: Tensor,
    depth_weights: Sequence[float],
    mask_BT: Tensor | None = None,
) -> Tensor:
    """sum_k weight_k * cross-entropy of depth k (DeepSeek-V3, equations 24 and 25).

    depth_states: of `Transformer.mtp_hidden_states` for tokens_BT. The paper's lambda / D is
    depth_weights = [lambda / D] * D. mask_BT: True where a token counts as a target.
    Raises ValueError unless there is one weight per depth.
    """
    if len(depth_weights) != len(depth_states):
        raise ValueError(
            f"{len(depth_weights)} depth weights for {len(depth_states)} MTP depths: give one each"
        )
    losses = [
        weight * next_token_loss(states_BtD, head_VD, tokens_BT, 1 + depth, mask_BT)
        for depth, (weight, states_BtD) in enumerate(
            zip(depth_weights, depth_states, strict=True), start=1
        )
    ]
    return sum(losses, start=head_VD.new_zeros(()))
