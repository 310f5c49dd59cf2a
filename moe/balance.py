"""Keeping the experts busy: losses, the loss-free bias update and statistics of a `Routing`.

Every function is pure. A loss comes without its coefficient: multiply by yours.

Shapes: N tokens, E experts, K experts a token uses, B sequences of T tokens with N = B * T.
"""

import torch
from torch import Tensor

from .routing import Routing


def expert_load(routing: Routing) -> Tensor:
    """How often each expert was chosen, relative to its fair share: (E,), mean 1, float32.

    0 for an expert that no token chose; zeros throughout when there are no tokens.
    """
    E = routing.scores_NE.shape[-1]
    counts_E = torch.bincount(routing.experts_NK.flatten(), minlength=E)
    return counts_E.float() * E / max(1, routing.experts_NK.numel())


def expert_balance_loss(routing: Routing) -> Tensor:
    """Expert-level auxiliary loss over all tokens together: sum_e load_e * mean_n p_ne.

    1 when choices and scores are uniform, up to E / K when they agree on the same experts.
    DeepSeek-V2, section 2.2.3, equations 23 to 25; p is the score normalised to sum 1 per token,
    which changes nothing for softmax scores and is what DeepSeek-V3 does for sigmoid ones.
    """
    return sequence_balance_loss(routing, num_sequences=1)


def sequence_balance_loss(routing: Routing, num_sequences: int) -> Tensor:
    """The same within each sequence, averaged over the sequences of equal length.

    DeepSeek-V3, section 2.1.2, equations 17 to 20. `num_sequences` must divide the tokens.
    """
    shares_NE = routing.scores_NE / routing.scores_NE.sum(dim=-1, keepdim=True)
    mean_BE = shares_NE.unflatten(0, (num_sequences, -1)).mean(dim=1)
    chosen_BTK = routing.experts_NK.unflatten(0, (num_sequences, -1))
    load_BE = torch.zeros_like(mean_BE)
    load_BE.scatter_add_(
        1, chosen_BTK.flatten(1), torch.ones_like(chosen_BTK.flatten(1), dtype=load_BE.dtype)
    )
    load_BE *= load_BE.shape[-1] / chosen_BTK[0].numel()
    return (load_BE * mean_BE).sum(dim=-1).mean()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the logits, against drift (ST-MoE, section 3.3, equation 5)."""
    return routing.logits_NE.logsumexp(dim=-1).square().mean()


def updated_selection_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The bias after a step: up by `rate` for each underloaded expert, down for each overloaded.

    Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2; Wang et al. 2024). `load_E` is
    `expert_load` over all tokens of the step.
    """
    return bias_E + rate * torch.sign(load_E.mean() - load_E)
