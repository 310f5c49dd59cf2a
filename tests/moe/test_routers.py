"""Router kinds beside top-k: as many experts as a mass needs, and experts that choose tokens.

Shapes: N tokens, D model width, E experts, K slots of a token.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import ExpertChoice, MoEConfig, TopK, TopP, expert_load
from moe.testing import check_router, noise

D = 6
KINDS = {
    "top-k": TopK(num_experts=5, top_k=2, scoring="softmax", router_bias=True),
    "top-p": TopP(num_experts=5, mass=0.7, max_experts=4),
    "expert choice": ExpertChoice(num_experts=5, capacity=1.5, router_precision="weights"),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def random_logits(N, E, seed):
    return 2 * noise(N, E, seed=seed)


def chosen(routing, token):
    """{expert: weight} of one token, empty slots left out."""
    E = routing.scores_NE.shape[-1]
    pairs = zip(routing.experts_NK[token].tolist(), routing.weights_NK[token].tolist(), strict=True)
    return {expert: weight for expert, weight in pairs if expert != E}


@st.composite
def mass_cases(draw):
    E = draw(st.integers(1, 7))
    config = TopP(
        num_experts=E,
        mass=draw(st.sampled_from([1e-3, 0.3, 0.5, 0.9, 0.999, 1.0])),
        max_experts=draw(st.integers(1, E)),
    )
    return random_logits(draw(st.integers(0, 6)), E, draw(st.integers(0, 2**32))), config


@given(mass_cases())
def test_a_token_uses_the_fewest_likeliest_experts_that_reach_the_mass(case):
    logits_NE, config = case
    routing = config.route(logits_NE)
    assert routing.experts_NK.shape == (len(logits_NE), config.max_experts)
    for token, logits in enumerate(logits_NE.tolist()):
        powers = [math.exp(logit) for logit in logits]
        p = [power / sum(powers) for power in powers]
        ranked = sorted(range(len(p)), key=lambda e: -p[e])
        expected, total = {}, 0.0
        for expert in ranked[: config.max_experts]:
            if total < config.mass - 1e-12:
                expected[expert] = p[expert]
                total += p[expert]
        assert chosen(routing, token) == pytest.approx(expected, rel=1e-9)
    empty_NK = routing.experts_NK == config.num_experts
    assert (routing.weights_NK[empty_NK] == 0).all()


def test_a_sure_token_uses_one_expert_and_an_unsure_one_all_it_may():
    config = TopP(num_experts=4, mass=0.75, max_experts=4)
    routing = config.route(torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert [len(chosen(routing, token)) for token in (0, 1)] == [1, 3]


def test_logits_that_are_no_numbers_are_not_hidden_in_empty_slots():
    logits_NE = torch.full((2, 4), float("nan"))
    for config in (
        TopP(num_experts=4, mass=0.5, max_experts=2),
        ExpertChoice(num_experts=4, capacity=1),
        TopK(num_experts=4, top_k=2, scoring="softmax"),
    ):
        assert config.route(logits_NE).weights_NK.isnan().any()


@st.composite
def choice_cases(draw):
    E, N = draw(st.integers(2, 6)), draw(st.integers(0, 9))
    config = ExpertChoice(num_experts=E, capacity=draw(st.sampled_from([0.3, 0.5, 1, 1.5, 2])))
    return random_logits(N, E, draw(st.integers(0, 2**32))), config


@given(choice_cases())
def test_every_expert_takes_its_best_tokens_and_all_take_equally_many(case):
    logits_NE, config = case
    (N, E), routing = logits_NE.shape, config.route(logits_NE)
    taken = min(N, math.ceil(N * config.capacity / E))
    scores = logits_NE.softmax(dim=-1).tolist()
    wanted: list[dict[int, float]] = [{} for _ in range(N)]
    for expert in range(E):
        best = sorted(range(N), key=lambda n: -scores[n][expert])[:taken]
        for token in best:
            wanted[token][expert] = scores[token][expert]
    for token in range(N):
        assert chosen(routing, token) == pytest.approx(wanted[token], rel=1e-9)
    if N:
        torch.testing.assert_close(expert_load(routing), torch.ones(E))


def test_what_a_token_gets_depends_on_the_others_and_the_router_says_so():
    config = ExpertChoice(num_experts=4, capacity=1)
    logits_NE = random_logits(8, 4, 3)
    whole, part = config.route(logits_NE), config.route(logits_NE[:4])
    assert any(chosen(whole, n) != chosen(part, n) for n in range(4))
    assert config.build(D).sees_other_tokens
    assert not KINDS["top-p"].build(D).sees_other_tokens


def test_the_gradients_of_a_layer_with_empty_slots_are_those_of_finite_differences():
    torch.manual_seed(2)
    config = TopP(num_experts=4, mass=0.6, max_experts=3)
    layer = MoEConfig(router=config, expert_width=3, expert_biases=True).build(D).double()
    layer.router.reset_parameters(std=1.0)
    x_ND = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    assert (layer.router(x_ND).experts_NK == 4).any()
    assert torch.autograd.gradcheck(layer, (x_ND,))


@every_kind
def test_every_kind_keeps_the_contract(config):
    check_router(config)
