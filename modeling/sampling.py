"""Choosing a token from logits: greedy, or drawn after temperature, top-k, top-p and min-p.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits. temperature 0 is greedy and draws no random numbers."""

    temperature: float = 0.0
    top_k: int | None = None  # keep the k likeliest
    top_p: float | None = None  # keep the likeliest that together reach this probability
    min_p: float | None = None  # keep those at least this share as likely as the likeliest

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "be >= 0"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "be >= 1"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "be in (0, 1]"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "be in [0, 1]"),
        )
        for name, value, holds, rule in checks:
            if not holds:
                raise ValueError(f"{name} = {value}: must {rule}")

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The distribution to draw from, (V,): temperature, then top-k, top-p and min-p in turn."""
        logits_V = logits_V / self.temperature
        if self.top_k is not None and self.top_k < len(logits_V):
            logits_V = logits_V.where(logits_V >= logits_V.topk(self.top_k).values[-1], -torch.inf)
        probability_V = logits_V.softmax(dim=-1)
        if self.top_p is not None:
            sorted_V, order_V = probability_V.sort(descending=True, stable=True)
            before_V = sorted_V.cumsum(dim=-1) - sorted_V
            probability_V = probability_V.index_fill(0, order_V[before_V >= self.top_p], 0)
        if self.min_p is not None:
            likely_V = probability_V >= self.min_p * probability_V.max()
            probability_V = probability_V.where(likely_V, 0)
        return probability_V / probability_V.sum()

    def choose(self, logits_V: Tensor, random: torch.Generator) -> int:
        if logits_V.isnan().any():
            raise ValueError("the model's logits are not numbers (NaN): its weights are damaged")
        if self.temperature == 0:
            return int(logits_V.argmax())
        return int(self.probabilities(logits_V.cpu()).multinomial(1, generator=random))


def random_stream(seed: int | None) -> torch.Generator:
    """A stream of random numbers begun at `seed`, or anywhere without one."""
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    return random
