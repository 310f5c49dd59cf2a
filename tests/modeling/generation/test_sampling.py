"""Choosing a token: what temperature, top-k, top-p and min-p leave of a distribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling.generation.sampling import (
    Draft,
    RandomStream,
    Sampling,
    acceptance_probability,
    residual_distribution,
)

logit_lists = st.lists(st.floats(-8, 8), min_size=1, max_size=12)


def kept(logits: list[float], **settings) -> set[int]:
    """The tokens with any probability left."""
    sampling = Sampling(temperature=1.0, **settings)
    probability_V = sampling.probabilities(torch.tensor(logits, dtype=torch.float64))
    return set(probability_V.nonzero().flatten().tolist())


def plain_probabilities(logits: list[float], temperature: float) -> list[float]:
    weights = [2.718281828459045 ** ((x - max(logits)) / temperature) for x in logits]
    return [weight / sum(weights) for weight in weights]


@given(logit_lists, st.floats(0.2, 3))
def test_temperature_divides_the_logits(logits, temperature):
    sampling = Sampling(temperature=temperature)
    found_V = sampling.probabilities(torch.tensor(logits, dtype=torch.float64))
    assert found_V.tolist() == pytest.approx(plain_probabilities(logits, temperature), abs=1e-9)


def test_next_to_no_temperature_leaves_the_likeliest():
    for temperature in (1e-300, 1e-310, 5e-324):
        found_V = Sampling(temperature=temperature).probabilities(torch.tensor([0.1, 3.0, -2.0]))
        assert found_V.tolist() == [0, 1, 0]


def test_each_filter_keeps_what_it_says():
    logits = [float(x) for x in torch.tensor([0.5, 0.3, 0.15, 0.05]).log()]
    assert kept(logits, top_k=2) == {0, 1}
    assert kept(logits, top_k=99) == {0, 1, 2, 3}
    assert kept(logits, top_p=0.79) == {0, 1}
    assert kept(logits, top_p=0.81) == {0, 1, 2}
    assert kept(logits, top_p=1.0) == {0, 1, 2, 3}
    assert kept(logits, top_p=1e-6) == {0}
    assert kept(logits, min_p=0.29) == {0, 1, 2}
    assert kept(logits, min_p=0.31) == {0, 1}
    assert kept(logits, min_p=1.0) == {0}
    # each filter sees what the one before it left, renormalised
    assert kept(logits, top_k=2, top_p=0.6) == {0}


@given(logit_lists, st.integers(1, 12), st.floats(0.01, 1), st.floats(0, 1))
def test_filters_only_remove_and_never_the_likeliest(logits, top_k, top_p, min_p):
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    found_V = sampling.probabilities(torch.tensor(logits, dtype=torch.float64))
    assert found_V.sum().item() == pytest.approx(1)
    assert found_V[torch.tensor(logits).argmax()] > 0


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([0.6, 0.3, 0.1]).log()
    random = RandomStream(0)
    draws = [Sampling(temperature=1.0).choose(logits_V, random) for _ in range(3000)]
    shares = [draws.count(token) / 3000 for token in range(3)]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_greedy_takes_the_likeliest_and_draws_nothing():
    random = RandomStream(3)
    before = random.generator.get_state()
    assert Sampling().choose(torch.tensor([0.1, 3.0, 2.0]), random) == 1
    assert random.generator.get_state().equal(before)


@st.composite
def two_distributions(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """What is wanted and what was drafted from, over one vocabulary; zeros in either."""
    size = draw(st.integers(1, 9))
    lists = st.lists(st.floats(0, 1), min_size=size, max_size=size)
    pair = [torch.tensor(draw(lists), dtype=torch.float64) for _ in range(2)]
    for weights_V in pair:
        weights_V[draw(st.integers(0, size - 1))] += 0.01
    return tuple(weights_V / weights_V.sum() for weights_V in pair)


@given(two_distributions())
def test_a_judged_draft_is_distributed_as_it_is_wanted(pair):
    """P(x) = q(x) a(x) + sum_d q(d) (1 - a(d)) r(x), for every token x."""
    p_V, q_V = pair
    result = [0.0] * len(p_V)
    for draft, drafted in enumerate(q_V.tolist()):
        if drafted > 0:
            kept = acceptance_probability(p_V, q_V, draft)
            assert 0 <= kept <= 1
            result[draft] += drafted * kept
            if kept < 1:
                for token, share in enumerate(residual_distribution(p_V, q_V).tolist()):
                    result[token] += drafted * (1 - kept) * share
    assert result == pytest.approx(p_V.tolist(), abs=1e-12)


@given(two_distributions())
def test_as_many_drafts_are_kept_as_the_two_have_in_common(pair):
    p_V, q_V = pair
    drafts = [token for token, share in enumerate(q_V.tolist()) if share > 0]
    kept = sum(float(q_V[token]) * acceptance_probability(p_V, q_V, token) for token in drafts)
    assert kept == pytest.approx(torch.minimum(p_V, q_V).sum().item(), abs=1e-12)


@given(two_distributions())
def test_what_replaces_a_refused_draft_is_never_that_draft(pair):
    p_V, q_V = pair
    for token, share in enumerate(q_V.tolist()):
        if share > 0 and acceptance_probability(p_V, q_V, token) < 1 - 1e-9:
            assert residual_distribution(p_V, q_V)[token] == 0


def test_equal_distributions_leave_something_to_draw_from():
    p_V = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert acceptance_probability(p_V, p_V.clone(), 1) == 1
    assert residual_distribution(p_V, p_V.clone()).equal(p_V)


@given(logit_lists, st.floats(0.3, 2), st.integers(1, 5), st.floats(0.1, 1), st.floats(0, 0.9))
def test_drafts_are_drawn_after_all_filters(logits, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_V = torch.tensor(logits)
    draft = sampling.draft(logits_V, RandomStream(0))
    assert draft.probability_V.equal(sampling.probabilities(logits_V))
    assert draft.probability_V[draft.token] > 0


def test_a_greedy_draft_is_judged_by_the_likeliest_token():
    logits_V = torch.tensor([0.1, 3.0, 2.0])
    assert Sampling().draft(logits_V, RandomStream(0)) == (1, None)
    for token in range(3):
        assert Sampling().judge_draft(Draft(token, None), logits_V, RandomStream(0)) == 1


def test_what_the_filters_exclude_is_refused():
    sampling, certain_V = Sampling(temperature=1.0, top_k=1), torch.tensor([0.0, 1.0]).double()
    for seed in range(20):
        draft = Draft(1, certain_V)
        assert sampling.judge_draft(draft, torch.tensor([2.0, 1.0]), RandomStream(seed)) == 0


def test_streams_repeat_with_a_seed_and_differ_without_one():
    draws = [
        torch.rand(4, generator=RandomStream(seed).generator).tolist() for seed in (5, 5, 6, None)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.5},
    ],
)
def test_settings_that_no_distribution_has_are_refused_by_name(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Sampling(**settings)


def test_logits_that_are_no_numbers_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        Sampling().choose(torch.tensor([0.0, float("nan")]), RandomStream(0))
    damaged_V, draft = torch.tensor([0.0, float("nan")]), Draft(0, torch.tensor([0.5, 0.5]))
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(ValueError, match="NaN"):
            sampling.judge_draft(draft, damaged_V, RandomStream(0))
        with pytest.raises(ValueError, match="NaN"):
            sampling.draft(damaged_V, RandomStream(0))
