"""Products of segments against a loop over rows, their gradients, and what torch does with them.

Shapes: S rows sorted by segment, E segments, I and O input and output width, B batch of vmap.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.segments import (
    ProductOfSegments,
    SumOverSegments,
    can_group,
    is_traced,
    multiply_segments,
    product_of_segments,
    sum_over_segments,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# `grouped_mm` takes the first in float32 and bfloat16, the second in float32, the others never
WIDTHS = [(8, 16), (4, 8), (8, 5), (3, 8), (1, 1)]
every_width = pytest.mark.parametrize("widths", WIDTHS, ids=str)


def make_case(sizes, widths=(3, 5), rest=0, dtype=torch.float64, seed=0):
    """(x_SI, weight_EOI, ends_E) of segments of these sizes, and `rest` rows after the last."""
    generator, (I_, O_) = torch.Generator().manual_seed(seed), widths
    ends_E = torch.tensor(sizes, dtype=torch.int64).cumsum(0).to(torch.int32)
    x_SI = torch.randn(sum(sizes) + rest, I_, generator=generator, dtype=torch.float64)
    weight_EOI = torch.randn(len(sizes), O_, I_, generator=generator, dtype=torch.float64)
    return x_SI.to(dtype), weight_EOI.to(dtype), ends_E


def plain_products(x_SI, weight_EOI, ends_E):
    """Row by row in float64, (s, O), of the rows that belong to a segment."""
    rows, ends = [], ends_E.tolist()
    for s in range(ends[-1]):
        e = next(e for e, end in enumerate(ends) if s < end)
        rows.append(weight_EOI[e].double() @ x_SI[s].double())
    return torch.stack(rows) if rows else x_SI.new_zeros(0, weight_EOI.shape[1]).double()


def plain_sums(y_SO, x_SI, ends_E):
    """sum y x^T of each segment, (E, O, I), row by row in float64."""
    sums_EOI = torch.zeros(len(ends_E), y_SO.shape[1], x_SI.shape[1], dtype=torch.float64)
    ends = ends_E.tolist()
    for s in range(ends[-1]):
        e = next(e for e, end in enumerate(ends) if s < end)
        sums_EOI[e] += torch.outer(y_SO[s].double(), x_SI[s].double())
    return sums_EOI


def assert_rounded(actual, expected, most):
    """Equal up to the rounding of the dtype in sums of numbers whose sizes add up to `most`."""
    epsilon = torch.finfo(actual.dtype).eps
    assert ((actual.double() - expected).abs() <= 8 * epsilon * (most + 1e-30)).all()


def assert_products(y_SO, x_SI, weight_EOI, ends_E):
    assert y_SO.shape == (len(x_SI), weight_EOI.shape[1])
    assert y_SO.dtype == x_SI.dtype
    kept = y_SO[: ends_E[-1]]
    sizes_SO = plain_products(x_SI.abs(), weight_EOI.abs(), ends_E)
    assert_rounded(kept, plain_products(x_SI, weight_EOI, ends_E), sizes_SO)


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    widths = draw(st.sampled_from(WIDTHS) | st.tuples(st.integers(1, 9), st.integers(1, 9)))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**32))
    return make_case(sizes, widths, draw(st.integers(0, 3)), dtype, seed)


@given(cases())
def test_every_row_is_multiplied_by_the_matrix_of_its_segment(case):
    assert_products(product_of_segments(*case), *case)


@given(cases())
def test_the_operation_that_is_traced_computes_the_same(case):
    assert_products(multiply_segments(*case), *case)
    assert_products(ProductOfSegments.apply(*case), *case)


@given(cases())
def test_sums_over_segments_are_those_of_outer_products(case):
    x_SI, weight_EOI, ends_E = case
    y_SO = torch.randn(len(x_SI), weight_EOI.shape[1], generator=torch.Generator().manual_seed(1))
    y_SO = y_SO.to(x_SI.dtype)
    for run in (sum_over_segments, SumOverSegments.apply):
        sums_EOI = run(y_SO, x_SI, ends_E)
        assert (sums_EOI.shape, sums_EOI.dtype) == (weight_EOI.shape, x_SI.dtype)
        most_EOI = plain_sums(y_SO.abs(), x_SI.abs(), ends_E)
        assert_rounded(sums_EOI, plain_sums(y_SO, x_SI, ends_E), most_EOI)


@every_dtype
@every_width
def test_rows_after_the_last_end_are_ignored_whatever_they_hold(widths, dtype):
    case = make_case([2, 0, 3], widths, rest=4, dtype=dtype)
    case[0][5:] = float("nan")
    for run in (product_of_segments, ProductOfSegments.apply):
        assert_products(run(*case), *case)


@every_dtype
@every_width
def test_gradients_are_those_of_the_rows_one_by_one(widths, dtype):
    """Of segments empty first, in between and last; rows after the last end have none."""
    x_SI, weight_EOI, ends_E = make_case([0, 3, 0, 2, 0], widths, rest=2, dtype=dtype)
    grad_SO = torch.randn(7, widths[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    for run in (product_of_segments, ProductOfSegments.apply):
        leaves = [t.clone().requires_grad_() for t in (x_SI, weight_EOI)]
        kept_sO = run(*leaves, ends_E)[:5]
        grad_SI, grad_EOI = torch.autograd.grad(kept_sO, leaves, grad_SO[:5])
        assert_products(grad_SI, grad_SO, weight_EOI.mT, ends_E)
        most_EOI = plain_sums(grad_SO.abs(), x_SI.abs(), ends_E)
        assert_rounded(grad_EOI, plain_sums(grad_SO, x_SI, ends_E), most_EOI)
        assert not grad_EOI[[0, 2, 4]].any()


SIZES = {"several": [2, 0, 3], "empty ends": [0, 2, 0], "one": [3], "no rows": [0, 0]}
every_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@every_sizes
@pytest.mark.parametrize("rest", [0, 2])
def test_first_and_second_derivatives_are_those_of_finite_differences(sizes, rest):
    x_SI, weight_EOI, ends_E = make_case(sizes, (2, 3), rest)
    y_SO = torch.randn(len(x_SI), 3, dtype=torch.float64, generator=torch.Generator())
    leaves = x_SI.requires_grad_(), weight_EOI.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: product_of_segments(x, w, ends_E), leaves)
    assert torch.autograd.gradgradcheck(lambda x, w: product_of_segments(x, w, ends_E), leaves)
    leaves = y_SO.requires_grad_(), x_SI
    assert torch.autograd.gradcheck(lambda y, x: SumOverSegments.apply(y, x, ends_E), leaves)
    assert torch.autograd.gradgradcheck(lambda y, x: SumOverSegments.apply(y, x, ends_E), leaves)


BATCHED = {
    "rows": (0, None, None),
    "matrices": (None, 0, None),
    "ends": (None, None, 0),
    "all": (0, 0, 0),
    "all, along later dimensions": (2, 1, 1),
}
every_batched = pytest.mark.parametrize("in_dims", BATCHED.values(), ids=BATCHED)


def batched_case(in_dims, widths, dtype):
    """Three cases, with a batch dimension where `in_dims` says so, and the cases one by one."""
    sizes = [[2, 0, 3], [1, 4, 0], [0, 0, 4]]
    each = [make_case(s, widths, rest=6 - sum(s), dtype=dtype, seed=i) for i, s in enumerate(sizes)]
    each = [
        tuple(case[j] if dim is not None else each[0][j] for j, dim in enumerate(in_dims))
        for case in each
    ]
    stacked = [
        first if dim is None else torch.stack(tensors, dim)
        for dim, first, tensors in zip(in_dims, each[0], zip(*each, strict=True), strict=True)
    ]
    return stacked, each


# torch's own product falls back to a loop here and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_batched
@every_dtype
@pytest.mark.parametrize("widths", [(8, 16), (3, 5)], ids=str)
def test_vmap_over_each_argument_equals_a_loop(in_dims, dtype, widths):
    stacked, each = batched_case(in_dims, widths, dtype)
    y_BSO = torch.func.vmap(product_of_segments, in_dims)(*stacked)
    for y_SO, case in zip(y_BSO, each, strict=True):
        assert_products(y_SO, *case)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_batched
@every_dtype
@pytest.mark.parametrize("widths", [(8, 16), (3, 5)], ids=str)
def test_gradients_under_vmap_equal_a_loop(in_dims, dtype, widths):
    def total(x_SI, weight_EOI, ends_E):
        y_SO = product_of_segments(x_SI, weight_EOI, ends_E)
        inside_S = torch.arange(6) < ends_E[-1]
        return y_SO.where(inside_S[:, None], 0).square().sum()

    stacked, each = batched_case(in_dims, widths, dtype)
    found = torch.func.vmap(torch.func.grad(total, (0, 1)), in_dims)(*stacked)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    for *gradients, case in zip(*found, each, strict=True):
        ends = case[2][-1]
        exact = [t.double() if t.is_floating_point() else t for t in case]
        expected = torch.func.grad(total, (0, 1))(*exact)
        for ours, theirs, end in zip(gradients, expected, (ends, None), strict=True):
            assert ours.dtype == dtype
            error = (ours.double() - theirs)[:end].abs().max()
            assert error <= tolerance * theirs.abs().max()


@every_dtype
@every_width
def test_on_the_meta_device_it_has_the_shape_and_the_gradients_too(widths, dtype):
    case = [tensor.to("meta") for tensor in make_case([2, 0, 3], widths, rest=1, dtype=dtype)]
    leaves = [tensor.requires_grad_() for tensor in case[:2]]
    y_SO = product_of_segments(*case)
    assert (y_SO.is_meta, y_SO.shape, y_SO.dtype) == (True, (6, widths[1]), dtype)
    gradients = torch.autograd.grad(y_SO.square().sum(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (gradient.is_meta, gradient.shape, gradient.dtype) == (True, leaf.shape, dtype)


@every_dtype
@every_width
def test_the_operations_pass_torchs_checks_of_custom_operations(widths, dtype):
    case = make_case([2, 0, 3], widths, dtype=dtype)
    checks = ("test_schema", "test_faketensor")
    for made in (multiply_segments, sum_over_segments):
        operands = case if made is multiply_segments else (made_sums_of(case), case[0], case[2])
        torch.library.opcheck(made.default, operands, test_utils=checks)


def made_sums_of(case):
    return multiply_segments(*case)


VIEWS = {
    "matrices transposed": lambda x, w: (x, w.mT.contiguous().mT),
    "half of a stack": lambda x, w: (x, torch.cat([w, w], dim=1)[:, : w.shape[1]]),
    "half of an input": lambda x, w: (x, torch.cat([w, w], dim=2)[..., : w.shape[2]]),
    "every other column": lambda x, w: (x, w.repeat_interleave(2, dim=2)[..., ::2]),
    "every other matrix": lambda x, w: (x, w.repeat_interleave(2, dim=0)[::2]),
    "one matrix for all": lambda x, w: (x, w[:1].expand_as(w)),
    "rows transposed": lambda x, w: (x.mT.contiguous().mT, w),
    "rows of odd strides": lambda x, w: (torch.nn.functional.pad(x, (0, 1))[:, : x.shape[1]], w),
    "one row for all": lambda x, w: (x[:1].expand_as(x), w),
}


@every_dtype
@pytest.mark.parametrize("widths", [(8, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_rows_and_matrices_may_be_views_of_any_strides(view, widths, dtype):
    x_SI, weight_EOI, ends_E = make_case([2, 0, 3], widths, rest=1, dtype=dtype)
    x_SI, weight_EOI = view(x_SI, weight_EOI)
    assert not (x_SI.is_contiguous() and weight_EOI.is_contiguous())
    assert_products(product_of_segments(x_SI, weight_EOI, ends_E), x_SI, weight_EOI, ends_E)
    traced_SO = ProductOfSegments.apply(x_SI, weight_EOI, ends_E)
    assert_products(traced_SO, x_SI, weight_EOI, ends_E)


@every_dtype
@every_width
@pytest.mark.parametrize("sizes", [[0], [0, 0, 0]])
@pytest.mark.parametrize("rest", [0, 3])
def test_no_row_in_any_segment_gives_no_row_and_no_gradient(sizes, rest, widths, dtype):
    case = make_case(sizes, widths, rest, dtype)
    for run in (product_of_segments, ProductOfSegments.apply):
        leaves = [tensor.clone().requires_grad_() for tensor in case[:2]]
        y_SO = run(*leaves, case[2])
        assert y_SO.shape == (rest, widths[1])
        _, grad_EOI = torch.autograd.grad(y_SO[:0].sum(), leaves)
        assert not grad_EOI.any()


@pytest.mark.parametrize(
    ("groups", "dtype", "widths"),
    [
        (True, torch.float32, (4, 8)),
        (False, torch.float32, (6, 8)),
        (False, torch.float32, (8, 6)),
        (True, torch.bfloat16, (8, 16)),
        (False, torch.bfloat16, (4, 8)),
        (False, torch.bfloat16, (8, 4)),
        (False, torch.float64, (8, 8)),
        (False, torch.float16, (8, 8)),
    ],
)
def test_only_rows_of_whole_sixteen_bytes_are_grouped(groups, dtype, widths):
    assert can_group(*make_case([2], widths, dtype=dtype)[:2]) is groups


def test_values_are_read_unless_something_traces():
    x, seen = torch.zeros(2), []

    def look(x):
        seen.append(is_traced(x))
        return x.sum()

    look(x)
    torch.func.grad(look)(x)
    torch.func.grad(torch.func.grad(look))(x[0])
    assert seen == [False] * 3
    torch.func.vmap(look)(x[None])
    torch.func.vmap(torch.func.grad(look))(x[None])
    torch.func.grad(lambda x: torch.func.vmap(look)(x[None]).sum())(x)
    look(x.to("meta"))
    assert seen[3:] == [True] * 4
