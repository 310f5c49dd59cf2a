"""Balance: losses held to the papers' sums in plain Python, and the loss-free bias at work.

Shapes: N tokens, E experts, K experts a token uses.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import (
    Routing,
    TopK,
    expert_balance_loss,
    expert_load,
    router_z_loss,
    sequence_balance_loss,
    updated_selection_bias,
)

quick = settings(deadline=None, max_examples=40)


def make_routing(scores, experts):
    """A `Routing` with these (N, E) scores and (N, K) experts."""
    scores_NE, experts_NK = torch.as_tensor(scores), torch.as_tensor(experts)
    return Routing(scores_NE.gather(1, experts_NK), experts_NK, scores_NE, scores_NE.logit())


@st.composite
def routings(draw):
    """(routing, number of sequences): scores that need not sum to one, random choices."""
    E, sequences = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    N, K = sequences * draw(st.integers(1, 5)), draw(st.integers(1, E))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores_NE = 0.01 + 0.9 * torch.rand(N, E, generator=generator, dtype=torch.float64)
    experts_NK = torch.rand(N, E, generator=generator).argsort(dim=-1)[:, :K]
    return make_routing(scores_NE, experts_NK), sequences


def reference_loss(scores, experts):
    """sum_i f_i P_i of one sequence (DeepSeek-V3, equations 17 to 20)."""
    T, E, K = len(scores), len(scores[0]), len(experts[0])
    total = 0.0
    for i in range(E):
        f = E / (K * T) * sum(i in chosen for chosen in experts)
        P = sum(token[i] / sum(token) for token in scores) / T
        total += f * P
    return total


@given(routings())
@quick
def test_the_balance_losses_are_the_papers_sums(case):
    routing, sequences = case
    scores, experts = routing.scores_NE.tolist(), routing.experts_NK.tolist()
    assert expert_balance_loss(routing).item() == pytest.approx(reference_loss(scores, experts))
    T = len(scores) // sequences
    parts = [slice(b * T, (b + 1) * T) for b in range(sequences)]
    expected = sum(reference_loss(scores[part], experts[part]) for part in parts) / sequences
    assert sequence_balance_loss(routing, sequences).item() == pytest.approx(expected)


@given(routings())
@quick
def test_the_sequence_loss_of_one_sequence_is_the_expert_loss(case):
    routing, _ = case
    torch.testing.assert_close(sequence_balance_loss(routing, 1), expert_balance_loss(routing))


@given(routings())
@quick
def test_expert_load_counts_choices_relative_to_the_fair_share_and_sums_to_the_experts(case):
    routing, _ = case
    (N, K), E = routing.experts_NK.shape, routing.scores_NE.shape[1]
    load_E = expert_load(routing)
    flat = routing.experts_NK.flatten().tolist()
    assert load_E.tolist() == pytest.approx([flat.count(e) * E / (N * K) for e in range(E)])
    assert load_E.sum().item() == pytest.approx(E)
    assert load_E.dtype == torch.float32


def test_zero_tokens_load_no_expert():
    routing = make_routing(torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.int64))
    assert expert_load(routing).tolist() == [0.0, 0.0, 0.0]


def test_the_expert_loss_of_an_example_worked_out_by_hand():
    # both tokens choose experts 0 and 1: loads 2 2 0 0; mean scores .375 .375 .125 .125
    routing = make_routing([[0.5, 0.25, 0.25, 0.0], [0.25, 0.5, 0.0, 0.25]], [[0, 1], [1, 0]])
    assert expert_load(routing).tolist() == [2.0, 2.0, 0.0, 0.0]
    assert expert_balance_loss(routing).item() == 1.5


def test_scores_are_normalized_per_token_before_their_mean():
    # shares .75 .25 and .5 .5; raw scores would weigh the first token more
    routing = make_routing([[0.75, 0.25], [0.125, 0.125]], [[0], [0]])
    assert expert_balance_loss(routing).item() == 2 * 0.625


def test_balance_over_the_batch_can_hide_imbalance_within_each_sequence():
    # sequence 0 uses expert 0 alone and sequence 1 expert 1 alone
    routing = make_routing([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [[0], [0], [1], [1]])
    assert expert_balance_loss(routing).item() == 1.0
    assert sequence_balance_loss(routing, num_sequences=2).item() == 2.0


@pytest.mark.parametrize("score", [0.25, 0.9])
def test_uniform_routing_has_loss_one(score):
    routing = make_routing(torch.full((4, 4), score), [[0, 1], [2, 3], [1, 2], [3, 0]])
    assert expert_balance_loss(routing).item() == pytest.approx(1.0)
    assert sequence_balance_loss(routing, num_sequences=2).item() == pytest.approx(1.0)


def test_agreement_on_the_same_experts_has_loss_experts_over_chosen():
    routing = make_routing([[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]] * 3, [[0, 1]] * 3)
    assert expert_balance_loss(routing).item() == 6 / 2


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_gradient_of_the_expert_loss_lowers_the_overloaded_experts_logits(scoring):
    logits_NE = torch.tensor([[3.0, 0.0, 0.0, 0.1], [3.0, 0.0, 0.1, 0.0]], requires_grad=True)
    config = TopK(num_experts=4, top_k=1, scoring=scoring)
    expert_balance_loss(config.route(logits_NE)).backward()
    assert (logits_NE.grad[:, 0] > 0).all()
    assert (logits_NE.grad[:, 1:] < 0).all()


def test_the_z_loss_is_the_mean_squared_log_of_the_summed_exponentials():
    # exponentials sum to 4 and to e: log(4)^2 and 1
    logits_NE = torch.tensor([[math.log(1), math.log(3)], [1 - math.log(2)] * 2])
    logits_NE.requires_grad_()
    routing = Routing(logits_NE, torch.zeros(2, 2, dtype=torch.int64), logits_NE, logits_NE)
    loss = router_z_loss(routing)
    assert loss.item() == pytest.approx((math.log(4) ** 2 + 1) / 2)
    loss.backward()
    assert (logits_NE.grad > 0).all()


def test_the_bias_moves_by_the_rate_up_for_idle_and_down_for_busy_experts():
    bias_E, load_E = torch.tensor([10.0, 0.0, -1.0, 0.5]), torch.tensor([1.75, 0.0, 1.0, 1.25])
    moved_E = updated_selection_bias(bias_E, load_E, rate=0.25)
    assert moved_E.tolist() == [9.75, 0.25, -1.0, 0.25]
    assert bias_E.tolist() == [10.0, 0.0, -1.0, 0.5]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_repeated_bias_updates_bring_a_skewed_router_to_its_fair_share(scoring):
    config = TopK(num_experts=8, top_k=2, scoring=scoring)
    generator = torch.Generator().manual_seed(0)
    logits_NE = torch.randn(2000, 8, generator=generator) + torch.linspace(-1.0, 1.0, 8)
    bias_E = torch.zeros(8)
    assert expert_load(config.route(logits_NE, bias_E)).max() > 2
    for _ in range(500):
        load_E = expert_load(config.route(logits_NE, bias_E))
        bias_E = updated_selection_bias(bias_E, load_E, rate=0.001)
    load_E = expert_load(config.route(logits_NE, bias_E))
    assert (load_E - 1).abs().max() < 0.05


@st.composite
def padded_routings(draw):
    """(routing, the same of real tokens alone by sequence, mask_N): with empty slots."""
    routing, sequences = draw(routings())
    N, E = routing.scores_NE.shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    mask_N = torch.rand(N, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    empty_NK = torch.rand(routing.experts_NK.shape, generator=generator) < draw(
        st.sampled_from([0.0, 0.4])
    )
    routing = Routing(
        routing.weights_NK.masked_fill(empty_NK, 0),
        routing.experts_NK.masked_fill(empty_NK, E),
        routing.scores_NE,
        routing.logits_NE,
    )
    return routing, sequences, mask_N


def kept(routing, mask_N):
    return Routing(*(tensor[mask_N] for tensor in vars(routing).values()))


def plain_load(routing):
    """Of each expert, how many slots hold it, by the mean over the experts; empty slots apart."""
    E = routing.scores_NE.shape[1]
    flat = [e for e in routing.experts_NK.flatten().tolist() if e < E]
    return [flat.count(e) * E / max(1, len(flat)) for e in range(E)]


@given(padded_routings())
@quick
def test_loads_count_real_tokens_and_filled_slots_alone(case):
    routing, _, mask_N = case
    load_E = expert_load(routing, mask_N)
    assert load_E.tolist() == pytest.approx(plain_load(kept(routing, mask_N)), rel=1e-6)
    assert expert_load(routing).tolist() == pytest.approx(plain_load(routing), rel=1e-6)


@given(padded_routings())
@quick
def test_losses_are_those_of_the_real_tokens_of_each_sequence(case):
    routing, sequences, mask_N = case
    T = len(mask_N) // sequences
    parts = [slice(b * T, (b + 1) * T) for b in range(sequences)]
    alone = [kept(kept(routing, part), mask_N[part]) for part in parts]
    expected = 0.0
    for part in alone:
        scores = part.scores_NE / part.scores_NE.sum(dim=1, keepdim=True)
        means = scores.mean(dim=0).tolist() if len(scores) else [0.0] * scores.shape[1]
        expected += sum(f * p for f, p in zip(plain_load(part), means, strict=True)) / sequences
    assert sequence_balance_loss(routing, sequences, mask_N).item() == pytest.approx(expected)
    whole, real = sequence_balance_loss(routing, 1), kept(routing, mask_N)
    assert expert_balance_loss(routing).item() == pytest.approx(whole.item())
    if mask_N.any():
        loss = expert_balance_loss(routing, mask_N).item()
        assert loss == pytest.approx(expert_balance_loss(real).item())
        loss = router_z_loss(routing, mask_N).item()
        assert loss == pytest.approx(router_z_loss(real).item())
    else:
        assert expert_balance_loss(routing, mask_N) == router_z_loss(routing, mask_N) == 0


def test_padding_that_is_no_number_shows_in_nothing():
    routing, mask_N = make_routing([[0.2, 0.8], [float("nan")] * 2], [[0], [1]]), [True, False]
    mask_N = torch.tensor(mask_N)
    for value in (
        expert_load(routing, mask_N),
        expert_balance_loss(routing, mask_N),
        router_z_loss(routing, mask_N),
    ):
        assert value.isfinite().all()
