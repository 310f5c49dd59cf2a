"""How many tokens to draft in a round: a fixed number, or the one that has proved fastest.

With a_j the share of drafts at position j that are kept when those before them were, k drafts gain
1 + a_1 + a_1 a_2 + ... + a_1 ... a_k tokens a round (Leviathan et al. 2023, equation 1, with an
acceptance for each position), which takes k times a draft and one forward over 1 + k tokens. All of
these are measured while text is generated, because all depend on the text and on the machine.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from statistics import median


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

    It begins with most and no drafts in turn, which gives the times. Of acceptance it expects the
    best until it has seen otherwise, and forgets slowly: so it tries more drafts again after a
    while, and goes back if the text is still as hard to guess.
    """

    def __init__(self, most: int = 8) -> None:
        self.most = most
        self.rounds = 0
        self.reached = [0.0] * most  # times that all drafts before this position were kept
        self.accepted = [0.0] * most
        self.forward_seconds: dict[int, deque[float]] = {}
        self.draft_seconds: deque[float] = deque(maxlen=KEPT)

    def next(self) -> int:
        if self.rounds < BEGINNING:
            return self.most if self.rounds % 2 == 0 else 0
        if self.rounds % AGAIN == 0:
            return 0  # as the text grows, so does the time of a plain step
        return fastest_count(self.acceptance(), self.seconds(), median(self.draft_seconds))

    def observe(self, seen: Round) -> None:
        """Learn from a round that was drafted as `next` said; fewer drafts near a text's end."""
        self.rounds += 1
        count = max(seen.drafted)
        self.forward_seconds.setdefault(count, deque(maxlen=KEPT)).append(seen.forward_seconds)
        if count and self.rounds > 1:  # in the first round the modules read the prompt
            self.draft_seconds.append(seen.drafting_seconds / count)
        for counts in (self.reached, self.accepted):
            counts[:] = [FORGETTING * number for number in counts]
        for drafted, accepted in zip(seen.drafted, seen.accepted, strict=True):
            for position in range(min(drafted, accepted + 1)):
                self.reached[position] += 1
                self.accepted[position] += position < accepted

    def acceptance(self) -> list[float]:
        """Of each position, as if one more draft had been kept than was."""
        pairs = zip(self.accepted, self.reached, strict=True)
        return [(accepted + 1) / (reached + 1) for accepted, reached in pairs]

    def seconds(self) -> list[float]:
        """Of a forward with 0, 1, ... drafts; what was not tried lies between what was."""
        known = {count: median(seconds) for count, seconds in self.forward_seconds.items()}
        found = []
        for count in range(self.most + 1):
            below = max(k for k in known if k <= count)
            above = min((k for k in known if k >= count), default=below)
            share = (count - below) / max(1, above - below)
            found.append(known[below] + share * (known[above] - known[below]))
        return found


KEPT = 9  # measurements of one time
BEGINNING = 6  # rounds
AGAIN = 64  # rounds
FORGETTING = 0.98  # a round


def fastest_count(
    acceptance: Sequence[float], forward_seconds: Sequence[float], draft_seconds: float
) -> int:
    """The number of drafts that gives most tokens a second; the smaller one of equals.

    acceptance: of positions 1, 2, ...; forward_seconds: with 0, 1, ... drafts.
    """
    gains = accumulate(acceptance, mul, initial=1.0)
    speeds = [
        tokens / (forward + count * draft_seconds)
        for count, (tokens, forward) in enumerate(
            zip(accumulate(gains), forward_seconds, strict=True)
        )
    ]
    return speeds.index(max(speeds))
