"""How router logits become scores, and how a group of experts is scored. One entry per rule.

Shapes: N tokens, E experts, G groups of e = E / G experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SCORING: dict[str, Callable[[Tensor], Tensor]] = {  # (N, E) -> (N, E)
    "softmax": lambda logits_NE: logits_NE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
}

GROUP_SCORES: dict[str, Callable[[Tensor], Tensor]] = {  # (N, G, e) -> (N, G)
    "max": lambda choice_NGe: choice_NGe.amax(dim=-1),  # DeepSeek-V2, section 2.2.2
    "top2_sum": lambda choice_NGe: choice_NGe.topk(2, dim=-1).values.sum(dim=-1),  # V3, 2.1.2
}
