"""Choosing a token from logits: greedy, or drawn after temperature, top-k, top-p and min-p.

And judging a token that was drafted (Leviathan et al. 2023, algorithm 1): one drawn from q is kept
with probability min(1, p / q), and otherwise replaced by a draw from what p has above q, which
together is a draw from p. Both distributions are those after all filters.

Shapes: V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Draft(NamedTuple):
    """A token that somebody guessed, and what it was drawn from; None: nothing was drawn."""

    token: int
    probability_V: Tensor | None


class RandomStream:
    """Where chance comes from: numbers begun at `seed`, or anywhere without one."""

    def __init__(self, seed: int | None) -> None:
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def draw(self, probability_V: Tensor) -> int:
        return int(probability_V.multinomial(1, generator=self.generator))

    def happens(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64)) < probability


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
        """The distribution to draw from, (V,): temperature, then top-k, top-p and min-p in turn.

        In float64 on the CPU, so that p / q and p - q below are not made of rounding errors.
        """
        logits_V = check_numbers(logits_V).cpu().double()
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
        """A choice with what `judge` needs to know of how it was made."""
        if self.temperature == 0:
            return Draft(int(check_numbers(logits_V).argmax()), None)
        probability_V = self.probabilities(logits_V)
        return Draft(random.draw(probability_V), probability_V)

    def choose_after(
        self, drafts: Sequence[Draft], logits_nV: Tensor, random: RandomStream
    ) -> Iterator[int]:
        """Tokens that n logits choose: drafts while they are kept, then one that was not drafted.

        logits_nV: of the newest token, and of each draft.
        """
        for draft, logits_V in zip(drafts, logits_nV, strict=False):
            token = self.judge(draft, logits_V, random)
            yield token
            if token != draft.token:
                return
        yield self.choose(logits_nV[-1], random)

    def judge(self, draft: Draft, logits_V: Tensor, random: RandomStream) -> int:
        """The draft or another token, so that it is distributed like a choice from the logits."""
        q_V = draft.probability_V
        if q_V is None:
            return self.choose(logits_V, random)
        p_V = self.probabilities(logits_V)
        if random.happens(acceptance(p_V, q_V, draft.token)):
            return draft.token
        return random.draw(residual(p_V, q_V))


def check_numbers(logits_V: Tensor) -> Tensor:
    if logits_V.isnan().any():
        raise ValueError("the model's logits are not numbers (NaN): its weights are damaged")
    return logits_V


def acceptance(p_V: Tensor, q_V: Tensor, token: int) -> float:
    """With what probability a token drawn from q is kept where p is wanted."""
    return min(1.0, float(p_V[token] / q_V[token]))


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The distribution to draw from where a draw from q was not kept: p's excess over q."""
    excess_V = (p_V - q_V).clamp(min=0)
    total = excess_V.sum()
    # without any excess the two are equal, and only rounding can have refused the draft
    return excess_V / total if total > 0 else p_V
