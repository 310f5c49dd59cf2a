"""Keeping the experts busy: losses, the loss-free bias update and statistics of a `Routing`.

Every function is pure. A loss comes without its coefficient: multiply by yours. `mask_N` is True
for real tokens and False for padding; None: all are real. Empty slots never count.

Shapes: N tokens, E experts, K slots of a token, B sequences of T tokens (N = B * T) and s slots.
"""

import torch
from torch import Tensor

from .routing import Routing


def count_tokens(routing: Routing, mask_N: Tensor | None = None, num_sequences: int = 1) -> Tensor:
    """How many tokens of each sequence use each expert: (B, E), int64."""
    E, experts_NK = routing.scores_NE.shape[-1], routing.experts_NK
    if mask_N is not None:
        experts_NK = experts_NK.where(mask_N[:, None], E)
    chosen_Bs = experts_NK.unflatten(0, (num_sequences, -1)).flatten(1)
    counts_Be = chosen_Bs.new_zeros(num_sequences, E + 1)  # the last of them: empty slots
    return counts_Be.scatter_add(1, chosen_Bs, torch.ones_like(chosen_Bs))[:, :E]


def expert_load(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """How often each expert was chosen, relative to its fair share: (E,), mean 1, float32.

    0 for an expert that no token chose; zeros throughout when there are no tokens.
    """
    return relative_load(count_tokens(routing, mask_N)).float()[0]


def relative_load(counts_BE: Tensor) -> Tensor:
    return counts_BE * (counts_BE.shape[-1] / counts_BE.sum(dim=-1, keepdim=True).clamp(min=1))


def expert_balance_loss(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """Expert-level auxiliary loss over all tokens together: sum_e load_e * mean_n p_ne.

    1 when choices and scores are uniform; up to E / (slots used) when all agree on experts.
    DeepSeek-V2, section 2.2.3, equations 23 to 25; p is the score normalised to sum 1 per token,
    which changes nothing for softmax scores and is what DeepSeek-V3 does for sigmoid ones.
    """
    return sequence_balance_loss(routing, 1, mask_N)


def sequence_balance_loss(
    routing: Routing, num_sequences: int, mask_N: Tensor | None = None
) -> Tensor:
    """The same within each sequence, averaged over the sequences, which have equal length.

    DeepSeek-V3, section 2.1.2, equations 17 to 20. A sequence without real tokens adds 0.
    """
    shares_NE = routing.scores_NE / routing.scores_NE.sum(dim=-1, keepdim=True)
    if mask_N is None:
        mask_N = torch.ones_like(shares_NE[:, 0], dtype=torch.bool)
    shares_BTE = shares_NE.where(mask_N[:, None], 0).unflatten(0, (num_sequences, -1))
    tokens_B = mask_N.unflatten(0, (num_sequences, -1)).sum(dim=1)
    mean_BE = shares_BTE.sum(dim=1) / tokens_B.clamp(min=1)[:, None]
    load_BE = relative_load(count_tokens(routing, mask_N, num_sequences)).to(mean_BE.dtype)
    return (load_BE * mean_BE).sum(dim=-1).mean()


def router_z_loss(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits, against drift (ST-MoE, section 3.3, equation 5)."""
    squared_N = routing.logits_NE.logsumexp(dim=-1).square()
    if mask_N is None:
        return squared_N.mean()
    return squared_N.where(mask_N, 0).sum() / mask_N.sum().clamp(min=1)


def updated_selection_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The bias after a step: up by `rate` for each underloaded expert, down for each overloaded.

    Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2; Wang et al. 2024). `load_E` is
    `expert_load` over all tokens of the step.
    """
    return bias_E + rate * torch.sign(load_E.mean() - load_E)
