"""Routing: choosing experts and weighing them, held to a reference in plain Python.

Shapes: N tokens, E experts, K experts a token uses, G groups.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe import TopK
from moe.scoring import SCORING

quick = settings(deadline=None, max_examples=40)


def reference_softmax(logits):
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def reference_sigmoid(logits):
    return [1 / (1 + math.exp(-logit)) for logit in logits]


REFERENCE_SCORES = {"softmax": reference_softmax, "sigmoid": reference_sigmoid}


def reference_route(logits, bias, config):
    """{expert: weight} of one token (DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2)."""
    scores = REFERENCE_SCORES[config.scoring](logits)
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(logits) // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]

    def group_score(group):
        best = sorted((choice[expert] for expert in group), reverse=True)
        return best[0] if config.group_score == "max" else best[0] + best[1]

    if config.num_groups > 1:
        groups = sorted(groups, key=group_score, reverse=True)[: config.groups_kept]
    candidates = [expert for group in groups for expert in group]
    chosen = sorted(candidates, key=lambda expert: choice[expert], reverse=True)[: config.top_k]
    weights = {expert: scores[expert] for expert in chosen}
    if config.normalize:
        total = max(sum(weights.values()), config.normalize_minimum) + config.normalize_epsilon
        weights = {expert: weight / total for expert, weight in weights.items()}
    return {expert: weight * config.scale for expert, weight in weights.items()}


@st.composite
def configs(draw):
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    group_scores = ["max", "top2_sum"] if groups == 1 or size >= 2 else ["max"]
    return TopK(
        num_experts=groups * size,
        top_k=draw(st.integers(1, kept * size)),
        scoring=draw(st.sampled_from(sorted(SCORING))),
        num_groups=groups,
        groups_kept=kept,
        group_score=draw(st.sampled_from(group_scores)),
        normalize=draw(st.booleans()),
        normalize_epsilon=draw(st.sampled_from([0.0, 1e-20, 1e-2])),
        normalize_minimum=draw(st.sampled_from([0.0, 1e-12, 0.9])),
        scale=draw(st.sampled_from([1.0, 2.5, 16.0])),
    )


@st.composite
def cases(draw, dtype):
    """(logits_NE, bias_E, config): biases of both signs, all below zero, or none."""
    config = draw(configs())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    N, E = draw(st.integers(0, 6)), config.num_experts
    logits_NE = 3 * torch.randn(N, E, generator=generator, dtype=dtype)
    bias_E = draw(st.sampled_from([0.5, 3.0])) * torch.randn(E, generator=generator, dtype=dtype)
    return logits_NE, draw(st.sampled_from([bias_E, bias_E - 12, None])), config


def make_config(**fields):
    return TopK(**{"num_experts": 4, "top_k": 2} | fields)


def route(logits_NE, config, bias_E=None):
    return config.route(logits_NE, bias_E)


def chosen_weights(routing, token=0):
    """{expert: weight} of one token of a `Routing`."""
    experts, weights = routing.experts_NK[token].tolist(), routing.weights_NK[token].tolist()
    return dict(zip(experts, weights, strict=True))


def logit(*scores):
    """One token's logits with these sigmoid scores."""
    return torch.tensor([scores]).logit()


@given(cases(dtype=torch.float64))
@quick
def test_route_chooses_and_weighs_as_the_plain_reference_does(case):
    logits_NE, bias_E, config = case
    routing = route(logits_NE, config, bias_E)
    bias = [0.0] * config.num_experts if bias_E is None else bias_E.tolist()
    for token, logits in enumerate(logits_NE.tolist()):
        expected = reference_route(logits, bias, config)
        assert chosen_weights(routing, token) == pytest.approx(expected, rel=1e-9)
        scores = REFERENCE_SCORES[config.scoring](logits)
        assert routing.scores_NE[token].tolist() == pytest.approx(scores, rel=1e-9)
    assert routing.logits_NE is logits_NE


@given(cases(dtype=torch.float32))
@quick
def test_weights_are_finite_and_sum_to_the_scale_when_normalized(case):
    logits_NE, bias_E, config = case
    weights_NK = route(logits_NE, config, bias_E).weights_NK
    assert weights_NK.isfinite().all()
    assert (weights_NK > 0).all()
    if config.normalize and max(config.normalize_epsilon, config.normalize_minimum) < 1e-6:
        total_N = weights_NK.sum(dim=-1)
        torch.testing.assert_close(total_N, torch.full_like(total_N, config.scale))


@given(cases(dtype=torch.float32))
@quick
def test_a_tokens_experts_are_distinct_and_stay_within_the_kept_groups(case):
    logits_NE, bias_E, config = case
    experts_NK = route(logits_NE, config, bias_E).experts_NK
    assert experts_NK.shape == (len(logits_NE), config.top_k)
    assert experts_NK.dtype == torch.int64
    size = config.num_experts // config.num_groups
    for experts in experts_NK.tolist():
        assert len(set(experts)) == config.top_k
        assert set(experts) <= set(range(config.num_experts))
        assert len({expert // size for expert in experts}) <= config.groups_kept


@given(cases(dtype=torch.float32))
@quick
def test_permuting_tokens_permutes_the_routing(case):
    logits_NE, bias_E, config = case
    whole, back = route(logits_NE, config, bias_E), route(logits_NE.flip(0), config, bias_E)
    for token in range(len(logits_NE)):
        assert chosen_weights(back, -1 - token) == pytest.approx(chosen_weights(whole, token))


def test_a_routing_worked_out_by_hand_is_reproduced():
    # scores        .8   .2   .5  |  .6   .5   .2
    # bias           0    0    0  | .15  -.2   .4
    # choice        .8   .2   .5  | .75   .3   .6
    # two best sum to .8 + .5 = 1.3 | .75 + .6 = 1.35: the second group is kept, experts 3 and 5
    # their unbiased scores .6 and .2 sum to .8: weights 2.5 * .75 and 2.5 * .25
    fields = {"num_groups": 2, "group_score": "top2_sum", "normalize": True, "scale": 2.5}
    config = make_config(num_experts=6, scoring="sigmoid", **fields)
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.15, -0.2, 0.4])
    routing = route(logit(0.8, 0.2, 0.5, 0.6, 0.5, 0.2), config, bias_E)
    assert chosen_weights(routing) == pytest.approx({3: 1.875, 5: 0.625}, rel=1e-6)


def test_an_excluded_group_is_never_chosen_even_when_every_choice_score_is_negative():
    config = make_config(scoring="sigmoid", num_groups=2)
    bias_E = torch.tensor([-3.0, -9.0, -5.0, -5.0])
    routing = route(logit(0.5, 0.5, 0.5, 0.5), config, bias_E)
    assert chosen_weights(routing) == {0: 0.5, 1: 0.5}


def test_weights_keep_the_precision_of_tiny_scores_beside_a_large_bias():
    logits_NE = torch.tensor([[-18.0, -18.5, -19.0, -19.5]])
    bias_E = torch.tensor([11.0, 12.003, 12.002, 11.5])
    routing = route(logits_NE, make_config(scoring="sigmoid"), bias_E)
    expected = {1: 1 / (1 + math.exp(18.5)), 2: 1 / (1 + math.exp(19.0))}
    assert chosen_weights(routing) == pytest.approx(expected, rel=1e-5, abs=0)
    routing = route(logits_NE, make_config(scoring="sigmoid", normalize=True), bias_E)
    share = 1 / (1 + math.exp(-0.5))
    assert chosen_weights(routing) == pytest.approx({1: share, 2: 1 - share}, rel=1e-5)


def test_the_bias_changes_the_choice_and_never_a_chosen_experts_weight():
    config, logits_NE = make_config(scoring="sigmoid"), logit(0.9, 0.8, 0.3, 0.2)
    plain = chosen_weights(route(logits_NE, config))
    moved = chosen_weights(route(logits_NE, config, torch.tensor([0.0, 0.0, 1.0, 0.0])))
    assert set(plain) == {0, 1}
    assert set(moved) == {0, 2}
    assert moved[0] == plain[0]


def test_softmax_runs_over_all_experts_so_only_normalized_weights_forget_the_unchosen():
    logits_NE = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    total = math.exp(2) + math.exp(1) + 2
    plain = chosen_weights(route(logits_NE, make_config(scoring="softmax")))
    assert plain == pytest.approx({0: math.exp(2) / total, 1: math.exp(1) / total})
    normalized = chosen_weights(route(logits_NE, make_config(scoring="softmax", normalize=True)))
    of_chosen = {0: 1 / (1 + math.exp(-1)), 1: 1 / (1 + math.exp(1))}
    assert normalized == pytest.approx(of_chosen)
    assert plain != pytest.approx(of_chosen, rel=0.05)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scoring", sorted(SCORING))
def test_the_scale_multiplies_the_weights_normalized_or_not(scoring, normalize):
    logits_NE = torch.tensor([[0.3, -1.0, 2.0, 0.5]])
    config = make_config(scoring=scoring, normalize=normalize)
    scaled = make_config(scoring=scoring, normalize=normalize, scale=2.5)
    expected = {e: 2.5 * w for e, w in chosen_weights(route(logits_NE, config)).items()}
    assert chosen_weights(route(logits_NE, scaled)) == pytest.approx(expected, rel=1e-6)


def test_the_epsilon_is_added_to_the_sum_that_normalizes():
    config = make_config(scoring="sigmoid", normalize=True, normalize_epsilon=0.5)
    routing = route(logit(0.5, 0.25, 0.1, 0.1), config)
    assert chosen_weights(routing) == pytest.approx({0: 0.4, 1: 0.2}, rel=1e-6)


def test_the_minimum_stands_in_for_a_smaller_sum_and_is_never_added():
    minimum = make_config(scoring="sigmoid", normalize=True, normalize_minimum=0.6)
    large = route(logit(0.5, 0.25, 0.1, 0.1), minimum)
    assert chosen_weights(large) == pytest.approx({0: 2 / 3, 1: 1 / 3}, rel=1e-6)
    small = route(logit(0.2, 0.1, 0.05, 0.05), minimum)
    assert chosen_weights(small) == pytest.approx({0: 1 / 3, 1: 1 / 6}, rel=1e-6)


def test_improbable_experts_that_a_bias_forces_weigh_little_beside_a_minimum_or_an_epsilon():
    """Their scores sum to 3e-18: normalised alone that is 1, beside the minimum next to nothing."""
    logits_NE, bias_E = torch.tensor([[1.0, 1.0, -41.0, -41.0]]), torch.tensor([0.0, 0.0, 9.0, 9.0])
    score = 1 / (1 + math.exp(41))
    for fields, total in (
        ({}, 2 * score),
        ({"normalize_minimum": 1e-12}, 1e-12),
        ({"normalize_epsilon": 1e-12}, 2 * score + 1e-12),
    ):
        config = make_config(scoring="sigmoid", normalize=True, **fields)
        weights = chosen_weights(route(logits_NE, config, bias_E))
        assert weights == pytest.approx({2: score / total, 3: score / total}, rel=1e-5, abs=0)


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=8),
    shift=st.floats(-20, 20),
    top_k=st.integers(1, 8),
)
@quick
def test_normalized_softmax_scores_are_the_softmax_over_the_chosen_logits(logits, shift, top_k):
    E, top_k = len(logits), min(top_k, len(logits))
    config = make_config(num_experts=E, top_k=top_k, scoring="softmax", normalize=True)
    logits_NE = torch.tensor([logits], dtype=torch.float64) + shift
    chosen = chosen_weights(route(logits_NE, config))
    expected = reference_softmax([logits[expert] for expert in chosen])
    assert list(chosen.values()) == pytest.approx(expected, rel=1e-9)
    not_normalized = make_config(num_experts=E, top_k=top_k, scoring="softmax")
    plain = chosen_weights(route(logits_NE, not_normalized))
    assert all(plain[expert] < weight for expert, weight in chosen.items()) or top_k == E


@pytest.mark.parametrize(("group_score", "kept"), [("max", {0, 1}), ("top2_sum", {2, 3})])
def test_the_best_expert_and_the_best_pair_can_lie_in_different_groups(group_score, kept):
    config = make_config(scoring="sigmoid", num_groups=2, group_score=group_score)
    routing = route(logit(0.9, 0.1, 0.6, 0.5), config)
    assert set(chosen_weights(routing)) == kept


def test_groups_are_consecutive_experts_and_their_score_is_the_biased_one():
    config = make_config(scoring="sigmoid", num_groups=2)
    logits_NE = logit(0.9, 0.1, 0.6, 0.5)
    assert set(chosen_weights(route(logits_NE, config))) == {0, 1}
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.6])
    assert set(chosen_weights(route(logits_NE, config, bias_E))) == {2, 3}


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_a_single_group_excludes_nothing_and_may_hold_one_expert(group_score):
    config = make_config(scoring="sigmoid", top_k=4, group_score=group_score)
    routing = route(logit(0.4, 0.3, 0.2, 0.1), config, torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert chosen_weights(routing) == pytest.approx({0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1})
    one = make_config(num_experts=1, top_k=1, scoring="softmax", group_score=group_score)
    assert chosen_weights(route(torch.tensor([[5.0]]), one)) == {0: 1.0}


@pytest.mark.parametrize("num_groups", [1, 2])
def test_ties_give_distinct_experts_of_equal_weight(num_groups):
    config = make_config(scoring="softmax", num_groups=num_groups, normalize=True)
    routing = route(torch.zeros(3, 4), config)
    assert all(len(set(experts)) == 2 for experts in routing.experts_NK.tolist())
    assert routing.weights_NK.tolist() == [[0.5, 0.5]] * 3


def test_zero_tokens_are_routed_to_empty_tensors():
    config = make_config(scoring="sigmoid", num_groups=2, group_score="top2_sum", normalize=True)
    routing = route(torch.zeros(0, 4), config, torch.zeros(4))
    assert (routing.weights_NK.shape, routing.experts_NK.shape) == ((0, 2), (0, 2))
    assert (routing.scores_NE.shape, routing.logits_NE.shape) == ((0, 4), (0, 4))


def make_router(weight_ED, **fields):
    """A router with this weight, and a bias if `fields` ask for one."""
    E, D = len(weight_ED), len(weight_ED[0])
    router = make_config(num_experts=E, top_k=1, **fields).build(D)
    router.weight.data = torch.tensor(weight_ED)
    return router


def test_a_router_scores_each_token_by_the_rows_of_its_weight():
    router = make_router([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]], scoring="softmax")
    routing = router(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    assert routing.logits_NE.tolist() == [[3.0, -1.0, 3.0], [4.0, -2.0, 0.0]]
    assert routing.experts_NK[1].tolist() == [0]
    assert router.selection_bias is None


def test_a_routers_bias_takes_part_in_choosing():
    router = make_router([[1.0], [1.0], [1.0]], scoring="sigmoid", selection_bias=True)
    router.selection_bias.copy_(torch.tensor([0.0, 0.0, 0.1]))
    assert router(torch.ones(2, 1)).experts_NK.tolist() == [[2], [2]]
    router.selection_bias.copy_(torch.tensor([0.1, 0.0, 0.0]))
    assert router(torch.ones(2, 1)).experts_NK.tolist() == [[0], [0]]


def test_a_router_bias_moves_the_logits_and_with_them_choice_and_weights():
    router = make_router([[1.0], [2.0], [0.0]], scoring="softmax", router_bias=True)
    router.bias.data = torch.tensor([0.5, -3.0, 1.0])
    routing = router(torch.tensor([[1.0], [4.0]]))
    assert routing.logits_NE.tolist() == [[1.5, -1.0, 1.0], [4.5, 5.0, 1.0]]
    assert routing.experts_NK.tolist() == [[0], [1]]
    expected = [max(reference_softmax(logits)) for logits in routing.logits_NE.tolist()]
    assert routing.weights_NK.flatten().tolist() == pytest.approx(expected)
    routing.weights_NK.sum().backward()
    assert router.bias.grad.any()


@pytest.mark.parametrize(("precision", "first"), [("float32", 257.0), ("weights", 256.0)])
def test_a_router_bias_is_added_in_the_precision_of_the_product(precision, first):
    fields = {"scoring": "softmax", "router_bias": True, "router_precision": precision}
    router = make_router([[256.0], [256.0]], **fields).bfloat16()
    router.bias.data = torch.tensor([1.0, 0.0]).bfloat16()
    assert router(torch.ones(1, 1).bfloat16()).logits_NE.tolist() == [[first, 256.0]]


def test_a_router_has_a_bias_only_if_asked():
    assert set(make_router([[1.0]], scoring="softmax").state_dict()) == {"weight"}
    biased = make_router([[1.0]], scoring="softmax", router_bias=True)
    assert set(biased.state_dict()) == {"weight", "bias"}


def test_gradient_reaches_the_router_through_the_weights_and_never_the_bias():
    router = make_router([[1.0], [2.0], [0.5]], scoring="sigmoid", selection_bias=True)
    router(torch.ones(2, 1)).weights_NK.sum().backward()
    assert (router.weight.grad != 0).any()
    assert not router.selection_bias.requires_grad


# 257 needs nine significant bits and bfloat16 has eight: a bfloat16 product calls both a tie.
NEAR_TIE_WEIGHT_ED = [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
NEAR_TIE_X_ND = torch.tensor([[256.0, 1.0, 0.0], [256.0, 0.0, 1.0]], dtype=torch.bfloat16)


def test_a_bfloat16_models_router_tells_near_ties_apart_with_a_float32_product():
    router = make_router(NEAR_TIE_WEIGHT_ED, scoring="softmax").bfloat16()
    routing = router(NEAR_TIE_X_ND)
    assert routing.logits_NE.tolist() == [[257.0, 256.0], [256.0, 257.0]]
    assert routing.experts_NK.tolist() == [[0], [1]]


def test_a_router_asked_for_the_weights_precision_multiplies_in_it_and_scores_in_float32():
    fields = {"scoring": "softmax", "router_precision": "weights"}
    router = make_router(NEAR_TIE_WEIGHT_ED, **fields)
    assert router(NEAR_TIE_X_ND.float()).logits_NE.tolist() == [[257.0, 256.0], [256.0, 257.0]]
    assert router.bfloat16()(NEAR_TIE_X_ND).logits_NE.tolist() == [[256.0, 256.0]] * 2
    third = make_router([[1.0], [0.0], [0.0]], **fields).bfloat16()
    scores_NE = third(torch.zeros(1, 1, dtype=torch.bfloat16)).scores_NE
    torch.testing.assert_close(scores_NE, torch.full((1, 3), 1 / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["float32", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_and_weights_are_at_least_float32(dtype, precision):
    router = make_router([[1.0], [2.0]], scoring="sigmoid", router_precision=precision).to(dtype)
    routing = router(torch.ones(1, 1, dtype=dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {routing.logits_NE.dtype, routing.scores_NE.dtype, routing.weights_NK.dtype} == {
        expected
    }


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.half().float(),
        lambda model: model.to("cpu", torch.float16),
    ],
)
def test_the_selection_bias_stays_float32_bit_for_bit_when_the_model_is_cast(cast):
    router = make_router([[1.0], [1.0]], scoring="sigmoid", selection_bias=True)
    bias_E = torch.tensor([10.001, 10.002])
    router.selection_bias.copy_(bias_E)
    model = cast(nn.Sequential(nn.Linear(1, 1), router))
    assert model[1].selection_bias.dtype == torch.float32
    assert torch.equal(model[1].selection_bias, bias_E)
    assert "selection_bias" in dict(model[1].named_buffers())
    assert model[1].weight.dtype == model[0].weight.dtype
    x_ND = torch.zeros(1, 1, dtype=model[0].weight.dtype)
    assert model[1](x_ND).experts_NK.tolist() == [[1]]


def test_the_selection_bias_becomes_float64_with_the_model():
    router = make_router([[1.0], [1.0]], scoring="sigmoid", selection_bias=True)
    router.selection_bias.copy_(torch.tensor([10.001, 10.002]))
    expected_E = torch.tensor([10.001, 10.002]).double()
    bias_E = nn.Sequential(router).double()[0].selection_bias
    assert bias_E.dtype == torch.float64
    assert torch.equal(bias_E, expected_E)
    assert router(torch.zeros(1, 1, dtype=torch.float64)).scores_NE.dtype == torch.float64
