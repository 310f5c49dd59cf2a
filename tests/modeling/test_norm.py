"""Root-mean-square normalisation: the formula, and where it rounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling.norm import RMSNorm


def filled_norm(width: int, epsilon: float, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, epsilon).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    norm.weight.copy_(1 + 0.3 * torch.randn(width, generator=generator))
    return norm


@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=6),
    epsilon=st.sampled_from([1e-6, 1e-5, 0.5]),
)
def test_each_vector_is_divided_by_its_root_mean_square(values, epsilon):
    norm = filled_norm(len(values), epsilon, torch.float64)
    root = math.sqrt(sum(x * x for x in values) / len(values) + epsilon)
    expected = [w * x / root for w, x in zip(norm.weight.tolist(), values, strict=True)]
    x_D = torch.tensor(values, dtype=torch.float64)
    assert norm(x_D).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_leading_dimensions_are_independent():
    norm, x_BTD = (
        filled_norm(5, 1e-6, torch.float64),
        torch.arange(-14.0, 16.0).view(2, 3, 5).double(),
    )
    rows = torch.stack([norm(x_D) for x_D in x_BTD.flatten(0, 1)])
    torch.testing.assert_close(norm(x_BTD), rows.view(2, 3, 5))


def test_in_bfloat16_the_quotient_is_rounded_before_the_weight_multiplies():
    norm, D = filled_norm(64, 1e-6, torch.bfloat16), 64
    generator = torch.Generator().manual_seed(2)
    x_ND = (3 * torch.randn(50, D, generator=generator)).bfloat16()
    wide_ND = x_ND.double()
    quotient_ND = wide_ND / (wide_ND.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    rounded_twice = (quotient_ND.bfloat16().double() * norm.weight.double()).bfloat16()
    rounded_once = (quotient_ND * norm.weight.double()).bfloat16()
    assert torch.equal(norm(x_ND), rounded_twice)
    assert (rounded_once != rounded_twice).any()


def test_a_vector_of_zeros_stays_zero_and_finite():
    assert not filled_norm(4, 1e-6, torch.float32)(torch.zeros(4)).any()


def test_float16_values_whose_squares_overflow_are_normed():
    out = filled_norm(4, 1e-6, torch.float16)(torch.full((4,), 1000.0, dtype=torch.float16))
    torch.testing.assert_close(out, filled_norm(4, 1e-6, torch.float16).weight)
