"""Quantised matrices: how far codes are from numbers, and products that are those of the codes."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from modeling import (
    Codes,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedWeight,
    choose_format,
    quantize_matrix,
)
from modeling.codes import LAYOUTS, find_layout, pack_int4, unpack_int4
from moe import Clamp, Experts, Routing
from moe.testing import close, noise, random_routing, randomize, reweigh

KINDS = ("int8", "int4")
kinds = st.sampled_from(KINDS)
rows = st.integers(1, 150)
widths = st.sampled_from([32, 64, 96, 128, 160, 256, 384])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def matrix_of(O: int, I: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:  # noqa: E741
    """Numbers of every size: a few rows are of zeros or a hundred times as large."""
    w_OI = noise(O, I, seed=seed)
    w_OI[::7] *= 100
    w_OI[3::11] = 0
    return w_OI.to(dtype)


def held(w_OI: torch.Tensor, kind: str, dtype=None) -> QuantizedWeight:
    dtype = dtype or w_OI.dtype
    form = choose_format(kind, w_OI.shape[-1])
    weight = QuantizedWeight(form, tuple(w_OI.shape), dtype)
    for expert, matrix in enumerate(w_OI) if w_OI.dim() == 3 else [(None, w_OI)]:
        weight.put(quantize_matrix(matrix, form, dtype), expert)
    return weight


def plain(codes: Codes) -> torch.Tensor:
    """Codes times scales, number by number, in float64."""
    codes_OI, scale_OG = codes
    size = codes_OI.shape[1] // scale_OG.shape[1]
    group_I = torch.arange(codes_OI.shape[1]) // size
    return codes_OI.double() * scale_OG.double()[:, group_I]


# --- codes


@given(O=rows, I=widths, seed=st.integers(0, 99), dtype=dtypes)
def test_int8_is_at_most_half_a_step_away(O, I, seed, dtype):  # noqa: E741
    w_OI = matrix_of(O, I, seed)
    codes = held(w_OI, "int8", dtype).matrix.codes
    step_O1 = w_OI.double().abs().amax(1, keepdim=True) / 127
    slack = 0.01 if dtype != torch.float16 else 0.1  # of rounding the scale
    assert ((plain(codes) - w_OI.double()).abs() <= step_O1 * (0.5 + slack) + 1e-6).all()


@given(O=rows, I=widths, seed=st.integers(0, 99))
def test_int4_is_at_least_as_near_as_spreading_the_whole_range(O, I, seed):  # noqa: E741
    w_OI = matrix_of(O, I, seed)
    codes = held(w_OI, "int4").matrix.codes
    size = I // codes.scale_OG.shape[1]
    assert size == max(s for s in (32, 64, 128) if I % s == 0)
    groups = w_OI.double().unflatten(1, (-1, size))
    step = groups.abs().amax(-1, keepdim=True) / 7
    whole = (groups / step.where(step != 0, 1)).round() * step
    error, limit = (
        (x.unflatten(1, (-1, size)) - groups).square().sum(-1)
        for x in (plain(codes), whole.flatten(1))
    )
    assert (error <= limit * (1 + 1e-5)).all()
    assert codes.codes_OI.min() >= -8
    assert codes.codes_OI.max() <= 7


def test_shrinking_the_range_pays_on_normal_numbers():
    w_OI = noise(64, 256, dtype=torch.float32)
    error = (plain(held(w_OI, "int4").matrix.codes) - w_OI).square().mean()
    groups = w_OI.unflatten(1, (-1, 128))
    step = groups.abs().amax(-1, keepdim=True) / 7
    assert error < 0.95 * ((groups / step).round() * step - groups).square().mean()


@given(kind=kinds, O=rows, I=widths, seed=st.integers(0, 99), dtype=dtypes)
def test_what_is_put_comes_back(kind, O, I, seed, dtype):  # noqa: E741
    form = choose_format(kind, I)
    generator = torch.Generator().manual_seed(seed)
    low, high = (-127, 128) if kind == "int8" else (-8, 8)
    codes_OI = torch.randint(low, high, (O, I), generator=generator, dtype=torch.int8)
    scale_OG = torch.rand(O, I // (form.group_size or I), generator=generator).to(dtype)
    weight = QuantizedWeight(form, (O, I), dtype)
    weight.put(Codes(codes_OI, scale_OG))
    found = weight.matrix
    assert found.codes.codes_OI.equal(codes_OI)
    assert found.codes.scale_OG.equal(scale_OG)
    expected_OI = plain(found.codes)
    error_OI = (found.dequantize(dtype).double() - expected_OI).abs()
    assert (error_OI <= expected_OI.abs() * torch.finfo(dtype).eps + 1e-7).all()


@pytest.mark.parametrize("width", [1, 31, 33, 48, 100])
def test_rows_that_no_kernel_reads_have_no_format(width):
    assert [choose_format(kind, width) for kind in KINDS] == [None, None]


# --- products


@given(kind=kinds, N=st.integers(0, 100), O=rows, I=widths, seed=st.integers(0, 99), dtype=dtypes)
def test_products_are_those_of_codes_times_scales(kind, N, O, I, seed, dtype):  # noqa: E741
    weight = held(matrix_of(O, I, seed, dtype), kind)
    x_NI = noise(N, I, seed=seed + 1).to(dtype)
    y_NO = F.linear(x_NI, weight.matrix)
    expected_NO = x_NI.double() @ plain(weight.matrix.codes).T
    assert y_NO.dtype == dtype
    assert y_NO.shape == (N, O)
    size_O = x_NI.double().norm(dim=1)[:, None] * plain(weight.matrix.codes).norm(dim=1)
    assert ((y_NO.double() - expected_NO).abs() <= TOLERANCE[dtype] * size_O + 1e-9).all()


@pytest.mark.parametrize("N", [1, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_float16_holds_products_that_it_can_hold(kind, N):
    weight = held(torch.full((64, 256), 0.01, dtype=torch.float16), kind)
    y_NO = F.linear(torch.full((N, 256), 30.0, dtype=torch.float16), weight.matrix)
    assert torch.allclose(y_NO.float(), torch.tensor(76.8), atol=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_several_pieces_is_multiplied_whole(kind, monkeypatch):
    monkeypatch.setattr("modeling.codes.PIECE", 32 * 70)
    weight = held(matrix_of(300, 32), kind)
    x_NI = noise(40, 32, dtype=torch.float32)
    expected_NO = x_NI.double() @ plain(weight.matrix.codes).T
    assert torch.allclose(F.linear(x_NI, weight.matrix).double(), expected_NO, 1e-4, 1e-3)
    assert weight.matrix.dequantize(torch.float64).equal(plain(weight.matrix.codes))
    again = held(matrix_of(300, 32), kind)
    assert all(a.equal(b) for a, b in zip(again.buffers(), weight.buffers(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_codes_packed_on_another_cpu_are_read_as_they_lie(layout):
    codes_OI = torch.randint(16, (128, 32), generator=torch.Generator().manual_seed(0))
    rows, (low, high) = layout.block_rows, (0, 1)
    packed = torch.empty(128 // rows, 32, rows // 2, dtype=torch.uint8)
    for b, k, d in torch.cartesian_prod(*(torch.arange(size) for size in packed.shape)):
        first, second = (2 * d, 2 * d + 1) if layout.neighbours else (d, d + rows // 2)
        pair = codes_OI[b * rows + first, k], codes_OI[b * rows + second, k]
        packed[b, k, d] = pair[low] + 16 * pair[high]
    assert unpack_int4(packed.view(128, 16), layout).T.equal(codes_OI - 8)
    codes_OI = codes_OI.to(torch.int8) - 8
    assert pack_int4(codes_OI, layout).equal(packed.view(128, 16))
    weight = QuantizedWeight(
        replace(choose_format("int4", 32), layout=layout), (128, 32), torch.bfloat16
    )
    weight.codes.copy_(packed.view(128, 16))
    weight.scale.copy_(torch.tensor([0.5, 0]))
    x_NI = noise(3, 32, dtype=torch.bfloat16)
    expected_NO = x_NI.float() @ codes_OI.float().T / 2
    assert torch.allclose(F.linear(x_NI, weight.matrix).float(), expected_NO, atol=0.3)


def test_a_cpu_with_an_unknown_layout_is_told(monkeypatch):
    find_layout.cache_clear()
    monkeypatch.setattr("modeling.codes.LAYOUTS", [])
    with pytest.raises(ValueError, match="int4.*unknown layout; use int8"):
        choose_format("int4", 64)
    find_layout.cache_clear()


# --- modules


def quantised_linear(kind, bias=True) -> QuantizedLinear:
    linear = nn.Linear(64, 70, bias=bias).requires_grad_(False)
    return QuantizedLinear(held(linear.weight, kind), linear.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_keeps_its_bias_and_shapes(kind):
    layer = quantised_linear(kind)
    x_BTI = noise(2, 3, 64, dtype=torch.float32)
    expected = F.linear(x_BTI, layer.weight.matrix.dequantize(torch.float32), layer.bias)
    assert torch.allclose(layer(x_BTI), expected, atol=1e-5)
    assert layer(x_BTI[:0]).shape == (0, 3, 70)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_files_and_states_hold_the_codes(kind):
    layer, x_NI = quantised_linear(kind), noise(3, 64, dtype=torch.float32)
    other = quantised_linear(kind)
    assert not other(x_NI).equal(layer(x_NI))
    other.load_state_dict(layer.state_dict())
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert again(x_NI).equal(layer(x_NI))


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_multiplies_in_that_dtype(kind):
    layer, x_NI = quantised_linear(kind), noise(3, 64, dtype=torch.float32)
    expected = layer(x_NI)
    assert torch.allclose(layer.double()(x_NI.double()), expected.double(), atol=1e-5)
    assert torch.allclose(layer.bfloat16()(x_NI.bfloat16()).float(), expected, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_drawing_are_refused(kind):
    layer = quantised_linear(kind)
    with pytest.raises(ValueError, match="no gradients: load the model without quantize"):
        layer(noise(3, 64, dtype=torch.float32).requires_grad_())
    with pytest.raises(ValueError, match="load the model without quantize"):
        layer.reset_parameters()


def quantised_experts(kind, dtype=torch.float32):
    """Experts held as codes, and the plain ones that they were made from."""
    experts = randomize(Experts(64, 5, 96, biases=True, clamp=Clamp(limit=0.7, alpha=1.3)))
    experts = experts.to(dtype).requires_grad_(False)
    stacks = [held(getattr(experts, name), kind) for name in ("gate", "up", "down")]
    return QuantizedExperts(experts, *stacks), experts


@pytest.mark.parametrize("N", [1, 40, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_those_with_the_dequantised_matrices(kind, N):
    quantised, experts = quantised_experts(kind)
    for name in ("gate", "up", "down"):
        stack = getattr(quantised, name)
        matrices = [stack[e].dequantize(torch.float32) for e in range(5)]
        setattr(experts, name, nn.Parameter(torch.stack(matrices), requires_grad=False))
    x_ND, routing = noise(N, 64, dtype=torch.float32), random_routing(N, 5)
    routing = reweigh(routing, routing.weights_NK.float())
    expected_ND = experts(x_ND, routing)
    assert torch.allclose(quantised(x_ND, routing), expected_ND, atol=1e-4)
    assert expected_ND.norm() > 1


@given(kind=kinds, N=st.integers(0, 40), seed=st.integers(0, 99))
def test_products_of_all_slots_are_the_loop_over_experts(kind, N, seed):
    quantised, _ = quantised_experts(kind, torch.float64)
    x_ND, routing = noise(N, 64, seed=seed), random_routing(N, 5, seed=seed)
    close(quantised.multiply_slots(x_ND, routing), quantised(x_ND, routing), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_module_is_one_graph(kind):
    quantised, _ = quantised_experts(kind)
    layer = quantised_linear(kind)

    def run(x_ND, weights_NK, experts_NK):
        chosen = Routing(weights_NK, experts_NK, routing.scores_NE, routing.logits_NE)
        return layer(quantised(x_ND, chosen)[:, :64])

    x_ND, routing = noise(3, 64, dtype=torch.float32), random_routing(3, 5)
    given = x_ND, routing.weights_NK.float(), routing.experts_NK
    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(*given), run(*given), atol=1e-5)
    torch.compiler.reset()
