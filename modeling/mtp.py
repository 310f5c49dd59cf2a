"""Multi-token prediction (DeepSeek-V3, section 2.2): small modules that guess further ahead.

Module k reads, at position i, the previous module's state there (the main model's for k = 1) and
the embedding of token i + k, and predicts token i + 1 + k. What implementations disagree about is
in `MTPConfig`. Positions are those of the state; transformers counts from the embedded token, which
rotary attention cannot tell apart.

Shapes: B batch, T positions, D model width.
"""

import torch
from torch import Tensor, nn

from .cache import LayerCache
from .config import ModelConfig, MTPConfig
from .norm import RMSNorm
from .step import Step


class MTPModule(nn.Module):
    """One prediction depth: (state, next token's embedding) -> a state, before its norm.

    `embed`, `norm` and `head` are None where the main model's take their place.
    """

    def __init__(
        self, config: ModelConfig, block: nn.Module, embed: nn.Module | None, head: nn.Module | None
    ) -> None:
        super().__init__()
        D, epsilon = config.d_model, config.norm_epsilon
        self.state_first = config.mtp.first == "state"
        self.embed = embed
        self.embedding_norm = RMSNorm(D, epsilon)
        self.state_norm = RMSNorm(D, epsilon)
        self.projection = nn.Linear(2 * D, D, bias=False)
        self.block = block
        own_norm = RMSNorm(D, epsilon) if config.mtp.final_norm == "own" else nn.Identity()
        self.norm = None if config.mtp.final_norm == "main" else own_norm
        self.head = head

    def forward(
        self, state_BTD: Tensor, embedding_BTD: Tensor, step: Step, cache: LayerCache | None
    ) -> Tensor:
        normed = [self.embedding_norm(embedding_BTD), self.state_norm(state_BTD)]
        if self.state_first:
            normed.reverse()
        return self.block(self.projection(torch.cat(normed, dim=-1)), step, cache)


def first_state(config: MTPConfig, states: tuple[Tensor, Tensor]) -> Tensor:
    """The main model's state, of (raw, normed), that the first module reads."""
    raw_BTD, normed_BTD = states
    return normed_BTD if config.input == "normed" else raw_BTD


def next_state(config: MTPConfig, read_BTD: Tensor, states: tuple[Tensor, Tensor]) -> Tensor:
    """What the next depth reads, after a module has read `read_BTD` and returned `states`."""
    raw_BTD, normed_BTD = states
    return {"normed": normed_BTD, "raw": raw_BTD, "main": read_BTD}[config.carry]
