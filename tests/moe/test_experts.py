"""Routed experts: the loop against plain Python, the grouped twin against the loop.

Shapes: N tokens, D model width, E experts, K experts a token uses, F expert width.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import plain_activation

import moe.experts
from moe import Biases, Clamp, Experts, Routing, experts_grouped, experts_loop
from moe.experts import grouping_pays
from moe.feed_forward import clamped_swiglu, swiglu

quick = settings(deadline=None, max_examples=40)
TWINS = [experts_loop, experts_grouped]
CLAMP = Clamp(limit=1.5, alpha=1.7)
clamps = st.sampled_from([None, CLAMP])


def activation(clamp):
    return swiglu if clamp is None else partial(clamped_swiglu, clamp=clamp)


def make_inputs(N, E, K, D=8, F=4, seed=0, dtype=torch.float32):
    """(x_ND, weights_NK, experts_NK, gate_EFD, up_EFD, down_EDF), a token's experts distinct."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    experts_NK = torch.rand(N, E, generator=generator).argsort(dim=-1)[:, :K]
    stacks = normal(E, F, D), normal(E, F, D), normal(E, D, F)
    return normal(N, D), normal(N, K), experts_NK, *stacks


def make_biases(biased, gate_EFD, seed=0):
    """Biases for stacks of these sizes, or none."""
    E, F, D = gate_EFD.shape
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = [(E, F), (E, F), (E, D)] if biased else []
    return Biases(*(torch.randn(s, generator=generator, dtype=gate_EFD.dtype) for s in shapes))


def reference_experts(
    x_ND, weights_NK, experts_NK, gate_EFD, up_EFD, down_EDF, biases=(None,) * 3, clamp=None
):
    """y_n = sum_k weight * down(silu(gate x) * up x) on nested lists, one number at a time."""

    def multiply(matrix, vector, bias):
        sums = [sum(w * v for w, v in zip(row, vector, strict=True)) for row in matrix]
        return [total + b for total, b in zip(sums, bias or [0.0] * len(sums), strict=True)]

    tensors = x_ND, weights_NK, experts_NK, gate_EFD, up_EFD, down_EDF
    x_N, weights_N, experts_N, *stacks = (tensor.tolist() for tensor in tensors)
    bias_of = [[None] * len(gate_EFD) if bias is None else bias.tolist() for bias in biases]
    y = []
    for x, weights, experts in zip(x_N, weights_N, experts_N, strict=True):
        total = [0.0] * len(x)
        for weight, e in zip(weights, experts, strict=True):
            gate, up = (multiply(stacks[i][e], x, bias_of[i][e]) for i in (0, 1))
            hidden = [plain_activation(g, u, clamp) for g, u in zip(gate, up, strict=True)]
            output = multiply(stacks[2][e], hidden, bias_of[2][e])
            total = [t + weight * o for t, o in zip(total, output, strict=True)]
        y.append(total)
    return torch.tensor(y, dtype=torch.float64).reshape(x_ND.shape)


@st.composite
def sizes(draw, widths):
    N, E = draw(st.integers(0, 20)), draw(st.integers(1, 8))
    D, F = draw(st.sampled_from(widths)), draw(st.sampled_from(widths))
    K, seed = draw(st.integers(1, E)), draw(st.integers(0, 2**32))
    return {"N": N, "E": E, "K": K, "D": D, "F": F, "seed": seed}


@given(sizes(widths=[1, 2, 3, 5]), st.booleans(), clamps)
@quick
def test_the_loop_computes_the_plain_per_token_sum(size, biased, clamp):
    inputs = make_inputs(**size, dtype=torch.float64)
    biases = make_biases(biased, inputs[3], size["seed"])
    expected_ND = reference_experts(*inputs, biases, clamp)
    torch.testing.assert_close(experts_loop(*inputs, biases, activation(clamp)), expected_ND)


@given(sizes(widths=[4, 8, 12]), st.booleans(), clamps)
@quick
def test_grouped_equals_the_loop_in_values_and_in_every_gradient(size, biased, clamp):
    inputs = make_inputs(**size)
    biases = make_biases(biased, inputs[3], size["seed"])
    floats = [tensor for i, tensor in enumerate(inputs) if i != 2]
    learned = [tensor.requires_grad_() for tensor in (*floats, *biases) if tensor is not None]
    cotangent_ND = torch.randn(size["N"], size["D"])
    results = []
    for run in TWINS:
        y_ND = run(*inputs, biases, activation(clamp))
        # The loop does not touch the weights of an expert without tokens; grouped gives zeros.
        gradients = torch.autograd.grad(
            y_ND, learned, cotangent_ND, allow_unused=True, materialize_grads=True
        )
        results.append((y_ND, *gradients))
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", TWINS)
@pytest.mark.parametrize("N", [0, 1, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_both_twins_compute_the_plain_sum_with_experts_that_no_token_chose(run, N, biased):
    x_ND, weights_NK, _, *stacks = make_inputs(N, E=6, K=2)
    experts_NK, biases = torch.tensor([[4, 1]]).expand(N, 2), make_biases(biased, stacks[0])
    y_ND = run(x_ND, weights_NK, experts_NK, *stacks, biases)
    expected_ND = reference_experts(x_ND, weights_NK, experts_NK, *stacks, biases)
    assert y_ND.shape == (N, 8)
    torch.testing.assert_close(y_ND.double(), expected_ND, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", TWINS)
def test_an_expert_that_no_token_chose_gets_no_gradient(run):
    inputs = make_inputs(N=3, E=4, K=1)
    biases = make_biases(True, inputs[3])
    inputs[2][:] = 2
    learned = [tensor.requires_grad_() for tensor in (*inputs[3:], *biases)]
    run(*inputs, biases).square().sum().backward()
    for tensor in learned:
        assert [bool(g.any()) for g in tensor.grad] == [False, False, True, False]


@pytest.mark.parametrize("run", TWINS)
def test_all_experts_equally_weighted_are_the_mean_of_dense_experts(run):
    x_ND, _, _, gate_EFD, up_EFD, down_EDF = make_inputs(N=5, E=4, K=4)
    experts_NK = torch.stack([torch.randperm(4) for _ in range(5)])
    weights_NK = torch.full((5, 4), 0.25)
    gate_ENF, up_ENF = (x_ND @ stack_EFD.mT for stack_EFD in (gate_EFD, up_EFD))
    dense_END = (gate_ENF * gate_ENF.sigmoid() * up_ENF) @ down_EDF.mT
    y_ND = run(x_ND, weights_NK, experts_NK, gate_EFD, up_EFD, down_EDF)
    torch.testing.assert_close(y_ND, dense_END.mean(dim=0))


@pytest.mark.parametrize("run", TWINS)
def test_gate_goes_through_silu_and_up_does_not(run):
    x_ND, one_N1, experts_N1 = torch.eye(4)[:1], torch.ones(1, 1), torch.zeros(1, 1, dtype=int)
    gate_EFD, up_EFD, down_EDF = 2 * torch.eye(4)[None], 3 * torch.eye(4)[None], torch.eye(4)[None]
    y_ND = run(x_ND, one_N1, experts_N1, gate_EFD, up_EFD, down_EDF)
    # silu(2) * 3 = 2 / (1 + e^-2) * 3; the other way round it would be silu(3) * 2 = 5.7154
    torch.testing.assert_close(y_ND, torch.tensor([[5.284782, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("clamp", [None, CLAMP])
def test_the_loop_has_the_gradients_of_finite_differences(clamp):
    x_ND, weights_NK, experts_NK, *stacks = make_inputs(4, 3, 2, D=2, F=3, dtype=torch.float64)
    biases = make_biases(True, stacks[0])
    learned = [t.requires_grad_() for t in (x_ND, weights_NK, *stacks, *biases)]

    def run(x_ND, weights_NK, gate_EFD, up_EFD, down_EDF, *biases):
        stacks = gate_EFD, up_EFD, down_EDF
        return experts_loop(
            x_ND, weights_NK, experts_NK, *stacks, Biases(*biases), activation(clamp)
        )

    assert torch.autograd.gradcheck(run, learned)


@given(
    gate=st.floats(-30, 30),
    up=st.floats(-30, 30),
    limit=st.floats(0.1, 10),
    alpha=st.floats(0.01, 3),
)
def test_the_clamped_activation_is_its_formula(gate, up, limit, alpha):
    clamp, numbers = Clamp(limit=limit, alpha=alpha), torch.tensor([gate, up]).double()
    expected = plain_activation(*numbers.tolist(), clamp)
    assert clamped_swiglu(*numbers, clamp).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [
        (1.0, 0.5, 1 / (1 + 2**-1) * 1.5),
        (5.0, 0.5, 2 / (1 + 2**-2) * 1.5),  # gate counts as 2 at most
        (-8.0, 0.5, -8 / (1 + 2**8) * 1.5),  # and may be as negative as it is
        (1.0, 9.0, 1 / (1 + 2**-1) * 3),  # up lies between -2
        (1.0, -9.0, 1 / (1 + 2**-1) * -1),  # and 2
    ],
)
def test_a_limit_of_two_bounds_gate_from_above_and_up_from_both_sides(gate, up, expected):
    clamp = Clamp(limit=2.0, alpha=math.log(2))  # sigmoid(alpha x) is 1 / (1 + 2^-x)
    actual = clamped_swiglu(torch.tensor(gate), torch.tensor(up), clamp)
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_grouped_stays_close_to_the_loop_in_bfloat16_and_returns_bfloat16():
    x_ND, weights_NK, experts_NK, *stacks = make_inputs(N=20, E=5, K=3, D=16, F=8)
    low = [tensor.bfloat16() for tensor in (x_ND, *stacks)]
    loop_ND, grouped_ND = (run(low[0], weights_NK, experts_NK, *low[1:]) for run in TWINS)
    assert loop_ND.dtype == grouped_ND.dtype == torch.bfloat16
    torch.testing.assert_close(grouped_ND, loop_ND, rtol=0.02, atol=0.02 * loop_ND.std().item())
    exact_ND = reference_experts(low[0], weights_NK, experts_NK, *low[1:])
    error_ND = (loop_ND.double() - exact_ND).abs()
    assert error_ND.max() < 0.02 * exact_ND.abs().max()


@pytest.mark.parametrize("run", TWINS)
def test_a_tokens_experts_are_summed_in_the_weights_precision_and_rounded_once(run):
    # In bfloat16 256 + 1 is 256, so rounding after every expert would lose both ones.
    outputs_E = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)
    copy_EFD = torch.eye(8, dtype=torch.bfloat16).expand(3, 8, 8).contiguous()
    down_EDF = outputs_E[:, None, None] * copy_EFD
    x_ND, experts_NK = torch.ones(1, 8, dtype=torch.bfloat16), torch.tensor([[0, 2, 1]])
    stacks = copy_EFD, copy_EFD, down_EDF
    y_ND = run(x_ND, torch.ones(1, 3), experts_NK, *stacks, activation=lambda gate, up: up)
    assert y_ND.tolist() == [[258.0] * 8]


@pytest.mark.parametrize(
    ("pays", "because", "dtype", "N", "D", "F"),
    [
        (True, "there are several tokens", torch.float32, 2, 8, 4),
        (True, "there are several tokens", torch.bfloat16, 3, 16, 8),
        (False, "there is one token", torch.float32, 1, 8, 4),
        (False, "there is no token", torch.float32, 0, 8, 4),
        (False, "float64 has no grouped product", torch.float64, 3, 8, 4),
        (False, "this rule names no float16", torch.float16, 3, 16, 8),
        (False, "rows of x are no whole 16 bytes", torch.float32, 3, 6, 4),
        (False, "hidden rows are no whole 16 bytes", torch.float32, 3, 8, 5),
        (False, "rows of x are no whole 16 bytes", torch.bfloat16, 3, 12, 8),
        (False, "hidden rows are no whole 16 bytes", torch.bfloat16, 3, 16, 4),
    ],
)
def test_grouping_pays_where_it_can_run_and_has_several_tokens(pays, because, dtype, N, D, F):
    x_ND, weights_NK, experts_NK, *stacks = make_inputs(N, 6, 2, D, F)
    x_ND, *stacks = (tensor.to(dtype) for tensor in (x_ND, *stacks))
    assert not grouping_pays(x_ND, stacks[0]), "nothing has a gradient"
    for trained in (x_ND, stacks[0]):
        trained.requires_grad_()
        assert grouping_pays(x_ND, stacks[0]) is pays, because
        with torch.no_grad():
            assert not grouping_pays(x_ND, stacks[0]), "no gradient is wanted"
        trained.requires_grad_(False)
    if pays:
        assert experts_grouped(x_ND, weights_NK, experts_NK, *stacks).shape == (N, D)


def make_experts(dtype=torch.float32, biased=False, clamp=None):
    """(experts, x_ND, routing, what they give) with 5 tokens, 4 experts and 2 chosen."""
    x_ND, weights_NK, experts_NK, *stacks = make_inputs(N=5, E=4, K=2)
    biases = make_biases(biased, stacks[0])
    experts = Experts(8, num_experts=4, width=4, biases=biased, clamp=clamp)
    experts.gate.data, experts.up.data, experts.down.data = stacks
    if biased:
        parameters = experts.gate_bias, experts.up_bias, experts.down_bias
        for parameter, bias in zip(parameters, biases, strict=True):
            parameter.data = bias
    nothing_NE = torch.zeros(5, 4)
    wide = torch.promote_types(dtype, torch.float32)
    routing = Routing(weights_NK.to(wide), experts_NK, nothing_NE, nothing_NE)
    expected_ND = reference_experts(x_ND, weights_NK, experts_NK, *stacks, biases, clamp)
    return experts.to(dtype), x_ND.to(dtype), routing, expected_ND


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6), (torch.float16, 2e-2)]
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("clamp", [None, CLAMP])
def test_experts_compute_the_plain_sum_in_every_dtype(dtype, tolerance, biased, clamp):
    experts, x_ND, routing, expected_ND = make_experts(dtype, biased, clamp)
    y_ND = experts(x_ND, routing)
    assert y_ND.dtype == dtype
    torch.testing.assert_close(y_ND.double(), expected_ND, rtol=tolerance, atol=tolerance)


def test_experts_have_biases_only_if_asked():
    plain, biased = (set(make_experts(biased=b)[0].state_dict()) for b in (False, True))
    assert plain == {"gate", "up", "down"}
    assert biased == plain | {"gate_bias", "up_bias", "down_bias"}


@pytest.mark.parametrize(
    ("dtype", "twin"), [(torch.float32, "experts_grouped"), (torch.float64, "experts_loop")]
)
def test_experts_run_the_twin_that_the_rule_picks(dtype, twin, monkeypatch):
    experts, x_ND, routing, _ = make_experts(dtype)
    ran = []
    for name in ("experts_loop", "experts_grouped"):
        monkeypatch.setattr(moe.experts, name, lambda *inputs, name=name: ran.append(name))
    experts(x_ND, routing)
    with torch.no_grad():
        experts(x_ND, routing)
    assert ran == [twin, "experts_loop"]


@st.composite
def with_empty_slots(draw):
    """Inputs of the twins of which some slots, a token's all among them, hold no expert."""
    case = draw(sizes(widths=[4, 8]))
    x_ND, weights_NK, experts_NK, *stacks = make_inputs(**case)
    E, generator = case["E"], torch.Generator().manual_seed(case["seed"] + 1)
    share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    empty_NK = torch.rand(experts_NK.shape, generator=generator) < share
    experts_NK, weights_NK = (
        experts_NK.masked_fill(empty_NK, E),
        weights_NK.masked_fill(empty_NK, 0),
    )
    return x_ND, weights_NK, experts_NK, *stacks


def leave_memory_full_of_nan():
    """What is then left unwritten in new tensors is NaN, as far as memory is handed out again."""
    del [torch.full((64, 8), float("nan")) for _ in range(50)][:]


@pytest.mark.parametrize("biased", [False, True])
@given(case=with_empty_slots(), clamp=clamps)
@quick
def test_an_empty_slot_computes_nothing_and_adds_nothing_in_either_twin(biased, case, clamp):
    x_ND, weights_NK, experts_NK, *stacks = case
    E, biases = len(stacks[0]), make_biases(biased, stacks[0])
    expected = [torch.zeros(x_ND.shape[1]) for _ in x_ND]
    for n, (experts, weights) in enumerate(zip(experts_NK, weights_NK, strict=True)):
        kept = experts < E
        if kept.any():
            row = x_ND[n : n + 1], weights[kept][None], experts[kept][None]
            expected[n] = experts_loop(*row, *stacks, biases, activation(clamp))[0]
    for twin in TWINS:
        leave_memory_full_of_nan()
        y_ND = twin(x_ND, weights_NK, experts_NK, *stacks, biases, activation(clamp))
        assert y_ND.shape == x_ND.shape
        for y_D, wanted_D in zip(y_ND, expected, strict=True):
            torch.testing.assert_close(y_D, wanted_D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
@given(case=with_empty_slots())
@quick
def test_with_empty_slots_the_twins_have_the_same_gradients_and_none_is_nan(biased, case):
    found = []
    for twin in TWINS:
        tensors = [t.clone().requires_grad_(t.is_floating_point()) for t in case]
        biases = Biases(
            *(b.requires_grad_() for b in make_biases(biased, case[3]) if b is not None)
        )
        leave_memory_full_of_nan()
        twin(*tensors, biases).square().sum().backward()
        leaves = [t for t in (*tensors, *biases) if t is not None and t.requires_grad]
        found.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_infinite_input_of_a_token_without_experts_shows_in_no_other_token():
    """What comes out of an empty slot is replaced: 0 times infinity would be NaN."""
    x_ND, weights_NK, experts_NK, *stacks = make_inputs(N=4, E=3, K=2)
    x_ND[1], experts_NK[1], weights_NK[1] = float("inf"), 3, 0
    for twin in TWINS:
        y_ND = twin(x_ND, weights_NK, experts_NK, *stacks)
        assert y_ND.isfinite().all()
        assert not y_ND[1].any()
