"""Multi-token prediction (DeepSeek-V3, section 2.2): small modules that guess further ahead.

Module k reads, at position i, the previous module's state there (the main model's for k = 1) and
the embedding of token i + k, and predicts token i + 1 + k. What implementations disagree about is
in `MTPConfig`. Positions are those of the state; transformers counts from the embedded token, which
rotary attention cannot tell apart.

Shapes: B batch, T positions, D model width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cache import LayerCache
from .config import ModelConfig, MTPConfig
from .loss import next_token_loss
from .norm import RMSNorm
from .rope import Positions


class States(NamedTuple):
    """What the last block leaves at every position, before and after the norm before the head."""

    raw_BTD: Tensor
    normed_BTD: Tensor


class MTPModule(nn.Module):
    """One prediction depth: (state, next token's embedding) -> a state, before its norm.

    `embed`, `norm` and `head` are None where the main model's take their place.
    """

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        D, V, epsilon = config.d_model, config.vocab_size, config.norm_epsilon
        self.state_first = config.mtp.first == "state"
        self.embed = embedding(V, D) if config.mtp.own_embedding else None
        self.embedding_norm = RMSNorm(D, epsilon)
        self.state_norm = RMSNorm(D, epsilon)
        self.projection = nn.Linear(2 * D, D, bias=False)
        self.block = block
        own_norm = RMSNorm(D, epsilon) if config.mtp.final_norm == "own" else nn.Identity()
        self.norm = None if config.mtp.final_norm == "main" else own_norm
        self.head = nn.Linear(D, V, bias=False) if config.mtp.own_head else None

    def forward(
        self,
        state_BTD: Tensor,
        embedding_BTD: Tensor,
        positions: Positions,
        cache: LayerCache | None,
    ) -> Tensor:
        normed = [self.embedding_norm(embedding_BTD), self.state_norm(state_BTD)]
        if self.state_first:
            normed.reverse()
        return self.block(self.projection(torch.cat(normed, dim=-1)), positions, cache)


def embedding(vocab_size: int, d_model: int) -> nn.Embedding:
    """An embedding to be filled: not nn.Embedding(V, D), which draws numbers that nobody uses."""
    return nn.Embedding.from_pretrained(torch.empty(vocab_size, d_model), freeze=False)


def first_state(config: MTPConfig, states: States) -> Tensor:
    """What the first module reads of the main model's states."""
    return states.normed_BTD if config.input == "normed" else states.raw_BTD


def next_state(config: MTPConfig, read_BTD: Tensor, left: States) -> Tensor:
    """What the next draft is made from, after a module read `read_BTD` and left these states."""
    return {"normed": left.normed_BTD, "raw": left.raw_BTD, "main": read_BTD}[config.carry]


def mtp_loss(
    depth_states: Sequence[Tensor],
    heads: Sequence[Tensor],
    tokens_BT: Tensor,
    depth_weights: Sequence[float],
    mask_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """sum_k weight_k * cross-entropy of depth k (DeepSeek-V3, equations 24 and 25).

    depth_states: of `Transformer.mtp_hidden_states` for tokens_BT; heads: the (V, D) weight that
    each depth is read with, of `Transformer.mtp_heads`. The paper's lambda / D is
    depth_weights = [lambda / D] * D. mask_BT, documents_BT: as in `next_token_loss`.
    Raises ValueError unless there is one weight per depth.
    """
    if len(depth_weights) != len(depth_states):
        raise ValueError(
            f"{len(depth_weights)} depth weights for {len(depth_states)} MTP depths: give one each"
        )
    losses = [
        weight * next_token_loss(states_BtD, head_VD, tokens_BT, 1 + depth, mask_BT, documents_BT)
        for depth, (weight, states_BtD, head_VD) in enumerate(
            zip(depth_weights, depth_states, heads, strict=True), start=1
        )
    ]
    return torch.stack(losses).sum()
