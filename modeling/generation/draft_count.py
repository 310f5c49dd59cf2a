"""How many tokens to draft in a round: a fixed number, or the one measured to be fastest.

Let a_j be the acceptance at position j: the share of drafts there that are accepted when all drafts
before them were. A round with k drafts gains 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k tokens on
average (Leviathan et al. 2023, equation 1, with an acceptance per position). It takes the time of
k drafts and of one forward over 1 + k tokens. Acceptance and times depend on the text and the
machine, so both are measured while text is generated.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import mul
from statistics import median
from typing import Literal

DraftCount = int | Literal["auto"]

MEASUREMENTS_KEPT = 9  # the newest ones, for each number of drafts; their median is used
WARM_UP_ROUNDS = 6  # in the first the modules read the prompt: the median of three ignores it
PLAIN_ROUND_INTERVAL = 64  # rounds from one round without drafts to the next
PRIOR_ACCEPTANCE = 0.8  # assumed before any draft; in the middle of reported values
DECAY_PER_DRAFT = 0.96  # factor on the weight of old observations for each new draft there
DECAY_PER_ROUND = 0.996  # the same for each round, with or without a draft there


@dataclass(frozen=True)
class Round:
    """The counts and times of one main-model forward and of the drafting before it."""

    drafted: Sequence[int]  # number of drafts of each row that was not finished
    accepted: Sequence[int]  # how many of these the text now contains
    drafting_seconds: float
    forward_seconds: float  # includes choosing the tokens


class FixedCount:
    """The same number of drafts in every round."""

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts

    def choose_count(self) -> int:
        return self.max_drafts

    def observe(self, last_round: Round) -> None:
        pass


class MeasuredCount:
    """The number of drafts that gives the most tokens a second; it may be 0.

    The first rounds alternate between two drafts and none, to measure the times of both. The time
    of a number that was not tried yet is estimated from its measured neighbours. Acceptance starts
    at a prior, and returns slowly to it where no new draft is judged, because old observations lose
    weight: so the rule tries more drafts again, and stops if the text is still hard to predict.
    """

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self.num_rounds = 0
        self.judged = [0.0] * max_drafts  # by position: decayed number of judged drafts
        self.accepted = [0.0] * max_drafts  # and of the accepted ones among them
        new_deque = partial(deque[float], maxlen=MEASUREMENTS_KEPT)
        self.drafting_seconds = defaultdict[int, deque[float]](new_deque)  # by number of drafts
        self.forward_seconds = defaultdict[int, deque[float]](new_deque)

    def choose_count(self) -> int:
        if self.num_rounds < WARM_UP_ROUNDS:
            return min(2, self.max_drafts) if self.num_rounds % 2 == 0 else 0
        if self.num_rounds % PLAIN_ROUND_INTERVAL == 0:
            return 0  # the time of a plain step grows with the text: measure it again
        drafting, forward = self.drafting_seconds, self.forward_seconds
        counts = range(self.max_drafts + 1)
        seconds = [estimate_seconds(drafting, k) + estimate_seconds(forward, k) for k in counts]
        return find_fastest_count(self.estimate_acceptance(), seconds)

    def observe(self, last_round: Round) -> None:
        """Learn from a round; near the end of a text it has fewer drafts than were chosen."""
        self.num_rounds += 1
        count = max(last_round.drafted)
        self.drafting_seconds[count].append(last_round.drafting_seconds)
        self.forward_seconds[count].append(last_round.forward_seconds)
        for position in range(self.max_drafts):
            rows = zip(last_round.drafted, last_round.accepted, strict=True)
            outcomes = [  # a draft is judged only if all drafts before it were accepted
                accepted > position
                for drafted, accepted in rows
                if drafted > position and accepted >= position
            ]
            decay = DECAY_PER_ROUND * DECAY_PER_DRAFT ** len(outcomes)
            self.judged[position] = decay * self.judged[position] + len(outcomes)
            self.accepted[position] = decay * self.accepted[position] + sum(outcomes)

    def estimate_acceptance(self) -> list[float]:
        """The acceptance at each position; the prior weighs as much as one judged draft."""
        pairs = zip(self.accepted, self.judged, strict=True)
        return [(accepted + PRIOR_ACCEPTANCE) / (judged + 1) for accepted, judged in pairs]


def estimate_seconds(measured: Mapping[int, Sequence[float]], count: int) -> float:
    """The median of the measured seconds with `count` drafts, or an estimate without any.

    measured: by number of drafts, 0 among these numbers. The estimate lies on the line through the
    nearest number on each side, or through the two largest; a line that falls is taken as flat.
    """
    medians = {tried: median(seconds) for tried, seconds in measured.items()}
    if count in medians or len(medians) == 1:
        return medians.get(count, medians[min(medians)])
    above = min((tried for tried in medians if tried > count), default=max(medians))
    below = max(tried for tried in medians if tried < above)
    share = (count - below) / (above - below)
    return medians[below] + share * max(0.0, medians[above] - medians[below])


def find_fastest_count(acceptance: Sequence[float], seconds: Sequence[float]) -> int:
    """The number of drafts with the most tokens a second; the smallest such number.

    acceptance: at positions 1, 2, ...; seconds: of a whole round with 0, 1, 2, ... drafts.
    """
    tokens = accumulate(accumulate(acceptance, mul, initial=1.0))
    speeds = [gained / taken for gained, taken in zip(tokens, seconds, strict=True)]
    return speeds.index(max(speeds))
