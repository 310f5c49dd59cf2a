"""How many tokens to draft in a round: a fixed number, or the one that has proved fastest.

With a_j the share of drafts at position j that are kept when those before them were, k drafts gain
1 + a_1 + a_1 a_2 + ... + a_1 ... a_k tokens a round (Leviathan et al. 2023, equation 1, with an
acceptance for each position), which takes the time of k drafts and of one forward over 1 + k
tokens. All of these are measured while text is generated: all depend on the text and the machine.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from statistics import median

KEPT = 9  # measurements of one time
BEGINNING = 6  # rounds: in the first the modules read the prompt, which the median passes over
AGAIN = 64  # rounds
EXPECTED = 0.8  # of acceptance: in the middle of what is reported of trained modules
NEWER = 0.96  # the weight of what was seen, with each draft seen since
UNTRIED = 0.996  # and with each round


@dataclass(frozen=True)
class Round:
    """What one forward of the main model and the drafting before it gave and took."""

    drafted: Sequence[int]  # of each row that was still going
    accepted: Sequence[int]
    drafting_seconds: float
    forward_seconds: float  # with choosing the tokens


class FixedCount:
    """The same number in every round."""

    def __init__(self, count: int) -> None:
        self.most = count

    def next(self) -> int:
        return self.most

    def observe(self, seen: Round) -> None:
        pass


class MeasuredCount:
    """The number with which tokens have come fastest, 0 if that is without drafts.

    It begins with two drafts and none in turn, for the times; those of other numbers it takes to
    lie on a line until it has tried them. Of acceptance it expects a good deal until it has seen
    otherwise. Newer drafts count for more, and what is not tried again is slowly forgotten: so
    after a while it tries more drafts once more, and goes back if the text is still as hard.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.rounds = 0
        self.reached = [0.0] * most  # times that all drafts before this position were kept
        self.accepted = [0.0] * most
        self.drafting_seconds: dict[int, deque[float]] = {}  # by the number of drafts
        self.forward_seconds: dict[int, deque[float]] = {}

    def next(self) -> int:
        if self.rounds < BEGINNING:
            return min(2, self.most) if self.rounds % 2 == 0 else 0
        if self.rounds % AGAIN == 0:
            return 0  # as the text grows, so does the time of a plain step
        drafting, forward = self.drafting_seconds, self.forward_seconds
        seconds = [typical(drafting, k) + typical(forward, k) for k in range(self.most + 1)]
        return fastest_count(self.acceptance(), seconds)

    def observe(self, seen: Round) -> None:
        """Learn from a round that was drafted as `next` said; fewer drafts near a text's end."""
        self.rounds += 1
        count = max(seen.drafted)
        for measured, seconds in (
            (self.drafting_seconds, seen.drafting_seconds),
            (self.forward_seconds, seen.forward_seconds),
        ):
            measured.setdefault(count, deque(maxlen=KEPT)).append(seconds)
        for position in range(self.most):
            pairs = zip(seen.drafted, seen.accepted, strict=True)
            kept = [n > position for made, n in pairs if min(made, n + 1) > position]
            remembered = UNTRIED * NEWER ** len(kept)
            self.reached[position] = remembered * self.reached[position] + len(kept)
            self.accepted[position] = remembered * self.accepted[position] + sum(kept)

    def acceptance(self) -> list[float]:
        """Of each position; what is expected counts as much as one draft that was seen."""
        pairs = zip(self.accepted, self.reached, strict=True)
        return [(accepted + EXPECTED) / (reached + 1) for accepted, reached in pairs]


def typical(measured: Mapping[int, Sequence[float]], count: int) -> float:
    """The median for this number of drafts; if it was not tried, on the line through neighbours."""
    known = {tried: median(seconds) for tried, seconds in measured.items()}
    if count in known or len(known) == 1:
        return known.get(count, known[min(known)])
    above = min((tried for tried in known if tried > count), default=max(known))
    below = max(tried for tried in known if tried < above)
    share = (count - below) / (above - below)
    return known[below] + share * max(0.0, known[above] - known[below])


def fastest_count(acceptance: Sequence[float], seconds: Sequence[float]) -> int:
    """The number of drafts that gives most tokens a second; the smaller one of equals.

    acceptance: of positions 1, 2, ...; seconds: of a whole round with 0, 1, 2, ... drafts.
    """
    tokens = accumulate(accumulate(acceptance, mul, initial=1.0))
    speeds = [gained / taken for gained, taken in zip(tokens, seconds, strict=True)]
    return speeds.index(max(speeds))
