"""The sparse layer as a whole, and the dense gated layer that serves as its shared expert.

Shapes: B batch, T positions, N = B * T tokens, D model width, F hidden width.
"""

import pytest
import torch
from tiny import plain_moe, sparse
from torch import nn

from moe import Clamp, FeedForward
from moe.feed_forward import GatedFeedForward
from moe.testing import noise

D = 8
CONFIGS = {
    "softmax": {"scoring": "softmax"},
    "groups": {
        "scoring": "sigmoid",
        "num_groups": 2,
        "group_score": "top2_sum",
        "selection_bias": True,
        "normalize": True,
        "scale": 2.5,
    },
    "shared": {"scoring": "softmax", "normalize": True, "shared_width": 12},
    "gated shared": {"scoring": "softmax", "shared_width": 12, "shared_gate": True},
    "biases": {"scoring": "softmax", "router_bias": True, "expert_biases": True},
    "clamped": {
        "scoring": "sigmoid",
        "selection_bias": True,
        "expert_biases": True,
        "clamp": Clamp(limit=1.5, alpha=1.7),
    },
}
each_config = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)


def make_layer(**fields):
    """A float64 layer of six experts, two per token, with every parameter and buffer random."""
    config = sparse(**{"num_experts": 6, "top_k": 2, "expert_width": 4} | fields)
    layer = config.build(D)
    generator = torch.Generator().manual_seed(0)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        nn.init.normal_(tensor, generator=generator)
    return layer.double()


def make_x(*shape):
    return noise(*shape, D, seed=1)


def gated(x_ND, gate_FD, up_FD, down_DF):
    """down(silu(gate x) * up x), spelled out."""
    gate_NF = x_ND @ gate_FD.T
    return (gate_NF / (1 + torch.exp(-gate_NF)) * (x_ND @ up_FD.T)) @ down_DF.T


def test_the_layer_is_the_weighted_sum_of_the_chosen_experts_plus_the_shared_one():
    layer, x_ND = make_layer(scoring="softmax", shared_width=12), make_x(5)
    stacks = layer.experts.gate, layer.experts.up, layer.experts.down
    y_ND = layer(x_ND)
    for x_D, y_D in zip(x_ND, y_ND, strict=True):
        powers_E = torch.exp(layer.router.weight @ x_D)
        shared = (
            linear.weight for linear in (layer.shared.gate, layer.shared.up, layer.shared.down)
        )
        expected_D = gated(x_D, *shared)
        for expert in powers_E.argsort().tolist()[-2:]:
            weight = powers_E[expert] / powers_E.sum()
            expected_D = expected_D + weight * gated(x_D, *(stack[expert] for stack in stacks))
        torch.testing.assert_close(y_D, expected_D)


@each_config
def test_each_token_gets_what_the_plain_equations_give(fields):
    layer, x_ND = make_layer(**fields), make_x(7)
    expected_ND = torch.stack([plain_moe(layer, layer.config, x_D) for x_D in x_ND])
    torch.testing.assert_close(layer(x_ND), expected_ND)


@each_config
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (5,), (0, 3), (2, 0)])
def test_the_output_has_the_shape_of_the_input(fields, shape):
    assert make_layer(**fields)(make_x(*shape)).shape == (*shape, D)


@each_config
def test_leading_dimensions_only_arrange_the_tokens(fields):
    layer, x_BTD = make_layer(**fields), make_x(2, 3)
    y_ND = layer(x_BTD.reshape(6, D))
    torch.testing.assert_close(layer(x_BTD), y_ND.reshape(2, 3, D))


@each_config
def test_permuting_tokens_permutes_the_outputs(fields):
    layer, x_ND, order_N = make_layer(**fields), make_x(7), torch.randperm(7)
    torch.testing.assert_close(layer(x_ND[order_N]), layer(x_ND)[order_N])


@each_config
def test_a_batch_row_does_not_depend_on_its_neighbours(fields):
    layer, x_BTD = make_layer(**fields), make_x(3, 4)
    y_BTD = layer(x_BTD)
    for row in range(3):
        torch.testing.assert_close(layer(x_BTD[row : row + 1]), y_BTD[row : row + 1])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-1), (torch.float16, 2e-2)]
)
def test_the_layer_runs_and_answers_in_the_dtype_it_was_cast_to(dtype, tolerance):
    # All experts, so that rounding cannot change which ones are chosen.
    layer, x_BTD = make_layer(scoring="softmax", top_k=6, shared_width=12), 0.5 * make_x(2, 8)
    expected_BTD = layer(x_BTD)
    y_BTD = layer.to(dtype)(x_BTD.to(dtype))
    assert y_BTD.dtype == dtype
    error = (y_BTD.double() - expected_BTD).abs().max() / expected_BTD.abs().max()
    assert error < tolerance


@each_config
def test_a_small_step_against_the_gradient_lowers_a_loss_through_every_parameter(fields):
    layer, x_BTD = make_layer(**fields), make_x(4, 8)
    for name, parameter in layer.named_parameters():
        loss = layer(x_BTD).square().mean()
        (gradient,) = torch.autograd.grad(loss, parameter)
        with torch.no_grad():
            parameter -= 1e-5 * gradient
            assert layer(x_BTD).square().mean() < loss, name


def test_without_a_shared_width_there_is_no_shared_expert():
    layer = make_layer(scoring="softmax")
    assert layer.shared is None
    assert {name.split(".")[0] for name in layer.state_dict()} == {"router", "experts"}


def test_the_shared_expert_is_added_ungated_to_every_token():
    layer, x_ND = make_layer(scoring="softmax", shared_width=12), make_x(5)
    shared = layer.shared.gate.weight, layer.shared.up.weight, layer.shared.down.weight
    with_both_ND = layer(x_ND)
    layer.shared = None
    torch.testing.assert_close(with_both_ND - layer(x_ND), gated(x_ND, *shared))


def test_a_gated_shared_expert_counts_as_much_as_the_sigmoid_of_its_score():
    layer = make_layer(scoring="softmax", shared_width=12, shared_gate=True)
    x_ND, shared = make_x(5), layer.shared
    weights = shared.gate.weight, shared.up.weight, shared.down.weight
    share_N1 = 1 / (1 + torch.exp(-(x_ND * shared.score.weight).sum(dim=-1, keepdim=True)))
    assert share_N1.std() > 0.1  # so that it matters which token gets which
    torch.testing.assert_close(shared(x_ND), share_N1 * gated(x_ND, *weights))
    with_both_ND = layer(x_ND)
    layer.shared = None
    torch.testing.assert_close(with_both_ND - layer(x_ND), shared(x_ND))


def test_a_gated_layer_is_half_the_layer_at_a_score_of_zero_and_the_layer_at_a_high_one():
    layer, x_BTD = GatedFeedForward(D, 4).double(), make_x(2, 3).abs()
    weights = layer.gate.weight, layer.up.weight, layer.down.weight
    for score, share in ((0.0, 0.5), (1000.0, 1.0), (-1000.0, 0.0)):
        nn.init.constant_(layer.score.weight, score)
        torch.testing.assert_close(layer(x_BTD), share * gated(x_BTD, *weights))


def test_one_wide_shared_expert_is_the_sum_of_several_narrow_ones():
    layer, x_ND = make_layer(scoring="softmax", shared_width=12), make_x(5)
    shared = layer.shared
    narrow = zip(
        shared.gate.weight.split(4),
        shared.up.weight.split(4),
        shared.down.weight.split(4, dim=1),
        strict=True,
    )
    torch.testing.assert_close(shared(x_ND), sum(gated(x_ND, *weights) for weights in narrow))


def test_the_dense_layer_puts_the_gate_through_silu_and_has_no_biases():
    dense = FeedForward(1, 1)
    for linear, value in ((dense.gate, 2.0), (dense.up, 3.0), (dense.down, 1.0)):
        nn.init.constant_(linear.weight, value)
    # silu(2) * 3 = 2 / (1 + e^-2) * 3; the other way round it would be silu(3) * 2 = 5.7154
    torch.testing.assert_close(dense(torch.ones(2, 3, 1)), torch.full((2, 3, 1), 5.284782))
    assert set(dense.state_dict()) == {"gate.weight", "up.weight", "down.weight"}
