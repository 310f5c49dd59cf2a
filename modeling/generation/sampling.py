"""Choosing a token from logits: greedy, or drawn after temperature, top-k, top-p and min-p.

Speculative sampling judges a drafted token (Leviathan et al. 2023, algorithm 1). The draft was
drawn from q, and the model's own distribution is p. The draft is accepted with probability
min(1, p / q); if rejected, it is replaced by a draw from max(0, p - q), normalised. The result is
distributed as p. Both p and q are the distributions after all filters.

Shapes: V vocabulary, n tokens to choose at most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor


class Draft(NamedTuple):
    """A drafted token and the distribution it was drawn from, (V,); None: it is the argmax."""

    token: int
    probability_V: Tensor | None


class RandomStream:
    """A source of random numbers: repeatable with a `seed`, different each time without one."""

    def __init__(self, seed: int | None) -> None:
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def draw(self, probability_V: Tensor) -> int:
        return int(probability_V.multinomial(1, generator=self.generator))

    def draw_bool(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64)) < probability


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits. Raises ValueError for a value outside its range."""

    temperature: float = 0.0  # 0 is greedy and draws no random numbers
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float | None = None  # keep the most likely tokens until their sum reaches this
    min_p: float | None = None  # keep tokens of at least this share of the highest probability

    def __post_init__(self) -> None:
        k = self.top_k
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < inf, "be finite and >= 0"),
            (
                "top_k",
                k,
                k is None or (hasattr(k, "__index__") and k >= 1),
                "be a whole number >= 1",
            ),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "be in (0, 1]"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "be in [0, 1]"),
        )
        for name, value, holds, rule in checks:
            if not holds:
                raise ValueError(f"{name} = {value}: must {rule}")

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The distribution to draw from, (V,): after temperature, top-k, top-p and min-p, in turn.

        Computed in float64 on the CPU, so that rounding does not dominate p / q and p - q.
        """
        logits_V = check_not_nan(logits_V).cpu().double()
        logits_V = (logits_V - logits_V.max()) / self.temperature
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

    def choose(self, logits_V: Tensor, random: RandomStream) -> int:
        return self.draft(logits_V, random).token

    def draft(self, logits_V: Tensor, random: RandomStream) -> Draft:
        """Choose a token and keep the distribution it was drawn from, for `judge_draft`."""
        if self.temperature == 0:
            return Draft(int(check_not_nan(logits_V).argmax()), None)
        probability_V = self.probabilities(logits_V)
        return Draft(random.draw(probability_V), probability_V)

    def choose_tokens(
        self, drafts: Sequence[Draft], logits_nV: Tensor, random: RandomStream
    ) -> Iterator[int]:
        """Yield the accepted drafts, then one more token.

        logits_nV: at the newest token and at each of the n - 1 drafts.
        """
        for draft, logits_V in zip(drafts, logits_nV, strict=False):
            token = self.judge_draft(draft, logits_V, random)
            yield token
            if token != draft.token:
                return
        yield self.choose(logits_nV[-1], random)

    def judge_draft(self, draft: Draft, logits_V: Tensor, random: RandomStream) -> int:
        """Return the draft or another token, distributed like a choice from the logits."""
        q_V = draft.probability_V
        if q_V is None:
            return self.choose(logits_V, random)
        p_V = self.probabilities(logits_V)
        if random.draw_bool(acceptance_probability(p_V, q_V, draft.token)):
            return draft.token
        return random.draw(residual_distribution(p_V, q_V))


def check_not_nan(logits_V: Tensor) -> Tensor:
    if logits_V.isnan().any():
        raise ValueError("the logits contain NaN: verify the weights, or load them in float32")
    return logits_V


def acceptance_probability(p_V: Tensor, q_V: Tensor, token: int) -> float:
    """The probability with which a token drawn from q is accepted, so that p results."""
    return min(1.0, float(p_V[token] / q_V[token]))


def residual_distribution(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The distribution to draw from after a draw from q was rejected: max(0, p - q), normalised."""
    excess_V = (p_V - q_V).clamp(min=0)
    total = excess_V.sum()
    # a sum of 0 means p = q: then only rounding can have rejected the draft
    return excess_V / total if total > 0 else p_V
