"""Routing: which experts a token uses and how much each counts. Pure functions, then one module.

Choose with one score, weigh with another: a selection bias takes part in choosing the experts,
the weights are gathered from the unbiased scores (DeepSeek-V3, section 2.1.2). Recovering them as
choice minus bias would cancel catastrophically: scores of 1e-8 beside a bias of 12 are real.

Precision: scores and weights are at least float32. The matrix product runs in float32 too, or in
the weights' own precision first, as `MoEConfig.router_precision` says: at near-ties the two choose
different experts, so it is part of the architecture.

Shapes: N tokens, D model width, E experts, K experts a token uses, G groups
of e = E / G experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import MoEConfig
from .scoring import GROUP_SCORES, SCORING


@dataclass(frozen=True)
class Routing:
    """What a router decided for N tokens."""

    weights_NK: Tensor  # what each chosen expert's output is multiplied by
    experts_NK: Tensor  # int64; a token's experts are distinct and in no particular order
    scores_NE: Tensor  # the unbiased scores of all experts
    logits_NE: Tensor  # what the scores were made from


def route(logits_NE: Tensor, config: MoEConfig, bias_E: Tensor | None = None) -> Routing:
    """Turn router logits into a `Routing`; `bias_E` is the selection bias."""
    scores_NE = SCORING[config.scoring](logits_NE)
    choice_NE = scores_NE if bias_E is None else scores_NE + bias_E
    choice_NE = limit_to_groups(choice_NE, config)
    experts_NK = choice_NE.topk(config.top_k, dim=-1, sorted=False).indices
    weights_NK = scores_NE.gather(-1, experts_NK)
    if config.normalize:
        total_N1 = weights_NK.sum(dim=-1, keepdim=True).clamp(min=config.normalize_minimum)
        weights_NK = weights_NK / (total_N1 + config.normalize_epsilon)
    return Routing(weights_NK * config.scale, experts_NK, scores_NE, logits_NE)


def limit_to_groups(choice_NE: Tensor, config: MoEConfig) -> Tensor:
    """Set the choice scores outside each token's `groups_kept` best groups to -inf.

    -inf and not 0: with a negative selection bias every score of a kept group may lie below 0,
    and an expert of an excluded group would win. (transformers' deepseek_v2 fills with 0, which is
    safe for its unbiased probabilities only, and chooses the same there.)
    """
    if config.num_groups == 1:
        return choice_NE
    choice_NGe = choice_NE.unflatten(-1, (config.num_groups, -1))
    group_NG = GROUP_SCORES[config.group_score](choice_NGe)
    kept_Ng = group_NG.topk(config.groups_kept, dim=-1, sorted=False).indices
    excluded_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(-1, kept_Ng, False)
    return choice_NGe.masked_fill(excluded_NG[..., None], float("-inf")).flatten(-2)


class Router(nn.Module):
    """A linear score per expert and the rule that turns the scores into a `Routing`."""

    selection_bias: Tensor | None

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, d_model))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        bias = torch.zeros(config.num_experts) if config.selection_bias else None
        self.register_buffer("selection_bias", bias)

    def forward(self, x_ND: Tensor) -> Routing:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        product_dtype = wide if self.config.router_precision == "float32" else self.weight.dtype
        bias_E = None if self.bias is None else self.bias.to(product_dtype)
        logits_NE = F.linear(x_ND.to(product_dtype), self.weight.to(product_dtype), bias_E)
        return route(logits_NE.to(wide), self.config, self.selection_bias)

    def _apply(self, fn, recurse=True):
        """Keep the selection bias in float32 at least when the module is cast.

        Its values may be around 10 and its differences around 1e-3: bfloat16 would lose them.
        """
        bias = self.selection_bias
        super()._apply(fn, recurse)
        cast = self.selection_bias
        if bias is not None and cast is not None and cast.dtype.itemsize < bias.dtype.itemsize:
            self.selection_bias = bias.to(cast.device)
        return self
