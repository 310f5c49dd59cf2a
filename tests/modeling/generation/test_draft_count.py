"""How many drafts: the arithmetic of the rule, and its choices in worlds with made-up seconds."""

import random
from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.generation.draft_count import (
    WARM_UP_ROUNDS,
    FixedCount,
    MeasuredCount,
    Round,
    estimate_seconds,
    find_fastest_count,
)

shares = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def expected_tokens(acceptance: list[float], count: int) -> float:
    """Tokens of a round: 1 + sum over j of j * P(exactly the first j drafts are accepted)."""
    accepted = [*accumulate(acceptance[:count], mul, initial=1.0), 0.0]
    return 1 + sum(j * (accepted[j] - accepted[j + 1]) for j in range(count + 1))


@given(shares, st.floats(0.01, 5), st.floats(0, 3), st.floats(0, 3))
def test_no_other_number_gives_more_tokens_a_second(acceptance, plain, draft, verify):
    counts = range(len(acceptance) + 1)
    seconds = [plain + k * (draft + verify) for k in counts]
    speeds = [expected_tokens(acceptance, k) / seconds[k] for k in counts]
    chosen = find_fastest_count(acceptance, seconds)
    assert speeds[chosen] == pytest.approx(max(speeds))


def test_the_rule_in_cases_that_can_be_worked_out_by_hand():
    assert find_fastest_count([0.9, 0.9], [1.0, 1.8, 2.8]) == 1  # 1, 1.9 / 1.8, 2.71 / 2.8
    assert find_fastest_count([0.9, 0.9], [1.0, 1.2, 1.4]) == 2  # 1, 1.58, 1.94
    assert find_fastest_count([0.3, 0.9], [1.0, 1.4, 1.8]) == 0  # 1, 0.93, 0.87
    assert find_fastest_count([1.0] * 8, [1.0] * 9) == 8
    assert find_fastest_count([0.0] * 8, [1.0] * 9) == 0  # of equals the smaller


class World:
    """Makes rounds in which drafts are accepted at random, with given times."""

    def __init__(self, acceptance: float, draft: float, verify: float, rows: int = 1) -> None:
        self.acceptance, self.draft, self.verify, self.rows = acceptance, draft, verify, rows
        self.random = random.Random(0)

    def make_round(self, count: int) -> Round:
        accepted = []
        for _ in range(self.rows):
            hits = [self.random.random() < self.acceptance for _ in range(count)]
            accepted.append((*hits, False).index(False))
        jitter = self.random.uniform(0.95, 1.05)
        drafting, forward = count * self.draft, 1 + count * self.verify
        return Round([count] * self.rows, accepted, drafting * jitter, forward * jitter)

    def speed(self, count: int) -> float:
        tokens = expected_tokens([self.acceptance] * 8, count)
        return tokens / (1 + count * (self.draft + self.verify))


def run_rounds(rule, world: World, num_rounds: int) -> tuple[list[int], float]:
    """The numbers of drafts that the rule chose, and the tokens a second of a row."""
    chosen, tokens, seconds = [], 0.0, 0.0
    for _ in range(num_rounds):
        last_round = world.make_round(rule.choose_count())
        rule.observe(last_round)
        chosen.append(last_round.drafted[0])
        tokens += 1 + sum(last_round.accepted) / len(last_round.accepted)
        seconds += last_round.drafting_seconds + last_round.forward_seconds
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
    _, speed = run_rounds(MeasuredCount(8), world, 400)
    assert speed > 0.93 * max(world.speed(count) for count in range(9))


@pytest.mark.parametrize("name", ["hard text", "drafts that cost a step"])
def test_the_rule_stops_drafting_where_drafting_does_not_pay(name):
    chosen, speed = run_rounds(MeasuredCount(8), World(**WORLDS[name]), 400)
    assert chosen[WARM_UP_ROUNDS:].count(0) > 360
    assert speed > 0.93  # plain decoding gives 1


def test_the_number_of_drafts_follows_the_text():
    rule = MeasuredCount(8)
    easy, hard = World(0.95, 0.05, 0.02), World(0.03, 0.05, 0.02)
    first, _ = run_rounds(rule, easy, 150)
    second, _ = run_rounds(rule, hard, 200)
    third, _ = run_rounds(rule, easy, 400)
    middle = [sorted(chosen[-80:])[40] for chosen in (first, second, third)]
    assert middle[0] >= 6
    assert middle[1] == 0
    assert middle[2] >= 6


def test_the_time_in_which_the_modules_read_the_prompt_is_ignored():
    rule = MeasuredCount(8)
    for number in range(WARM_UP_ROUNDS):
        count = rule.choose_count()
        assert count == (2 if number % 2 == 0 else 0)
        rule.observe(Round([count], [count], 1000.0 if number == 0 else 0.01 * count, 1.0))
    assert rule.choose_count() == 8


def test_unmeasured_times_are_estimated_on_a_line():
    measured = {0: [1.0, 1.2, 1.1], 2: [1.5, 9.0, 1.5], 6: [2.5]}
    seconds = [estimate_seconds(measured, count) for count in range(9)]
    assert seconds == pytest.approx([1.1, 1.3, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0])
    assert estimate_seconds({0: [2.0]}, 5) == 2.0
    assert estimate_seconds({0: [2.0], 2: [1.0]}, 8) == 2.0  # more drafts never take less


def test_rounds_with_fewer_drafts_at_the_end_of_a_text_are_observed():
    rule = MeasuredCount(8)
    for count in (8, 0, 8, 0, 3, 0, 2, 1, 0):
        rule.choose_count()
        rule.observe(Round([count, min(count, 1)], [count, 0], 0.1 * count, 1.0))
    assert 0 <= rule.choose_count() <= 8


def test_a_fixed_number_stays():
    rule = FixedCount(3)
    rule.observe(Round([3], [0], 9.0, 1.0))
    assert rule.choose_count() == rule.max_drafts == 3
