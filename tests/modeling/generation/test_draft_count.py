"""How many drafts: the arithmetic of the rule, and what it does in worlds with made-up seconds."""

import random
from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.generation.draft_count import (
    BEGINNING,
    FixedCount,
    MeasuredCount,
    Round,
    fastest_count,
    typical,
)

shares = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def expected_tokens(acceptance: list[float], count: int) -> float:
    """Of a round: sum over j of j * P(the first j drafts and no more are kept), plus 1."""
    kept = [*accumulate(acceptance[:count], mul, initial=1.0), 0.0]
    return 1 + sum(j * (kept[j] - kept[j + 1]) for j in range(count + 1))


@given(shares, st.floats(0.01, 5), st.floats(0, 3), st.floats(0, 3))
def test_no_other_number_gives_more_tokens_a_second(acceptance, plain, draft, verify):
    counts = range(len(acceptance) + 1)
    seconds = [plain + k * (draft + verify) for k in counts]
    speeds = [expected_tokens(acceptance, k) / seconds[k] for k in counts]
    chosen = fastest_count(acceptance, seconds)
    assert speeds[chosen] == pytest.approx(max(speeds))


def test_the_rule_in_cases_that_can_be_worked_out_by_hand():
    assert fastest_count([0.9, 0.9], [1.0, 1.8, 2.8]) == 1  # 1, 1.9 / 1.8, 2.71 / 2.8
    assert fastest_count([0.9, 0.9], [1.0, 1.2, 1.4]) == 2  # 1, 1.58, 1.94
    assert fastest_count([0.3, 0.9], [1.0, 1.4, 1.8]) == 0  # 1, 0.93, 0.87
    assert fastest_count([1.0] * 8, [1.0] * 9) == 8
    assert fastest_count([0.0] * 8, [1.0] * 9) == 0  # of equals the smaller


class World:
    """Rounds in which drafts are kept by chance and take their time."""

    def __init__(self, acceptance: float, draft: float, verify: float, rows: int = 1) -> None:
        self.acceptance, self.draft, self.verify, self.rows = acceptance, draft, verify, rows
        self.random = random.Random(0)

    def round(self, count: int) -> Round:
        kept = []
        for _ in range(self.rows):
            hits = [self.random.random() < self.acceptance for _ in range(count)]
            kept.append((*hits, False).index(False))
        jitter = self.random.uniform(0.95, 1.05)
        drafting, forward = count * self.draft, 1 + count * self.verify
        return Round([count] * self.rows, kept, drafting * jitter, forward * jitter)

    def speed(self, count: int) -> float:
        tokens = expected_tokens([self.acceptance] * 8, count)
        return tokens / (1 + count * (self.draft + self.verify))


def drafted_by(rule, world: World, rounds: int) -> tuple[list[int], float]:
    """The numbers that the rule chose, and the tokens a second of each row."""
    chosen, tokens, seconds = [], 0.0, 0.0
    for _ in range(rounds):
        seen = world.round(rule.next())
        rule.observe(seen)
        chosen.append(seen.drafted[0])
        tokens += 1 + sum(seen.accepted) / len(seen.accepted)
        seconds += seen.drafting_seconds + seen.forward_seconds
    return chosen, tokens / seconds


WORLDS = {
    "easy text, cheap drafts": {"acceptance": 0.95, "draft": 0.05, "verify": 0.02},
    "middling": {"acceptance": 0.7, "draft": 0.2, "verify": 0.1},
    "hard text": {"acceptance": 0.2, "draft": 0.2, "verify": 0.1},
    "drafts that cost a step": {"acceptance": 0.8, "draft": 1.0, "verify": 0.1},
    "a batch": {"acceptance": 0.8, "draft": 0.15, "verify": 0.1, "rows": 6},
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_measured_number_comes_near_the_best_one(name):
    world = World(**WORLDS[name])
    _, speed = drafted_by(MeasuredCount(8), world, 400)
    assert speed > 0.93 * max(world.speed(count) for count in range(9))


@pytest.mark.parametrize("name", ["hard text", "drafts that cost a step"])
def test_it_falls_back_to_none_where_drafting_does_not_pay(name):
    chosen, speed = drafted_by(MeasuredCount(8), World(**WORLDS[name]), 400)
    assert chosen[BEGINNING:].count(0) > 360
    assert speed > 0.93  # plain decoding gives 1


def test_it_follows_the_text():
    rule = MeasuredCount(8)
    easy, hard = World(0.95, 0.05, 0.02), World(0.03, 0.05, 0.02)
    first, _ = drafted_by(rule, easy, 150)
    second, _ = drafted_by(rule, hard, 200)
    third, _ = drafted_by(rule, easy, 400)
    middle = [sorted(chosen[-80:])[40] for chosen in (first, second, third)]
    assert middle[0] >= 6
    assert middle[1] == 0
    assert middle[2] >= 6


def test_the_prompt_that_the_modules_read_first_is_passed_over():
    rule = MeasuredCount(8)
    for number in range(BEGINNING):
        count = rule.next()
        assert count == (2 if number % 2 == 0 else 0)
        rule.observe(Round([count], [count], 1000.0 if number == 0 else 0.01 * count, 1.0))
    assert rule.next() == 8


def test_times_that_were_not_measured_lie_on_a_line():
    measured = {0: [1.0, 1.2, 1.1], 2: [1.5, 9.0, 1.5], 6: [2.5]}
    seconds = [typical(measured, count) for count in range(9)]
    assert seconds == pytest.approx([1.1, 1.3, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0])
    assert typical({0: [2.0]}, 5) == 2.0
    assert typical({0: [2.0], 2: [1.0]}, 8) == 2.0  # more drafts never take less


def test_shorter_rounds_at_a_texts_end_are_no_surprise():
    rule = MeasuredCount(8)
    for count in (8, 0, 8, 0, 3, 0, 2, 1, 0):
        rule.next()
        rule.observe(Round([count, min(count, 1)], [count, 0], 0.1 * count, 1.0))
    assert 0 <= rule.next() <= 8


def test_a_fixed_number_stays():
    rule = FixedCount(3)
    rule.observe(Round([3], [0], 9.0, 1.0))
    assert rule.next() == rule.most == 3
