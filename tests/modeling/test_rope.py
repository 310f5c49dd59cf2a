"""Rotary positions: layouts, partial width, relativity, amplitude, YaRN, precision."""

import cmath
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    YARN,
    gqa,
    mla,
    model_config,
    plain_frequencies,
    plain_rotation,
    random_tokens,
    rope,
    transformer,
)

import modeling.rope
from modeling import RopeConfig, Step, YarnConfig
from modeling.rope import inverse_frequencies, rotate
from moe.testing import close, noise

layouts = pytest.mark.parametrize("layout", ["half", "interleaved"])


def turn(x_P: torch.Tensor, config: RopeConfig, position: int) -> torch.Tensor:
    """One vector, through the code under test."""
    return rotate(x_P[None, None, None], config, Step(torch.tensor([[position]])))[0, 0, 0]


@layouts
@given(position=st.integers(0, 100), half=st.integers(1, 4))
def test_a_rotation_is_a_complex_multiplication_of_each_pair(layout, position, half):
    config, x_P = rope(layout=layout, width=2 * half), noise(2 * half)
    pairs = x_P.view(2, half).T if layout == "half" else x_P.view(half, 2)
    expected = []
    for i, (real, imaginary) in enumerate(pairs.tolist()):
        angle = position * 50.0 ** (-i / half)
        z = complex(real, imaginary) * cmath.exp(1j * angle)
        expected.append([z.real, z.imag])
    turned = turn(x_P, config, position)
    turned = turned.view(2, half).T if layout == "half" else turned.view(half, 2)
    close(turned, torch.tensor(expected, dtype=torch.float64), 1e-4)


@layouts
def test_every_batch_row_and_head_turns_to_its_own_position(layout):
    config, x_BTHP = rope(layout=layout), noise(2, 3, 2, 7)
    indices_BT = torch.tensor([[4, 5, 6], [0, 1, 9]])
    turned = rotate(x_BTHP, config, Step(indices_BT))
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 2))).tolist():
        expected = plain_rotation(x_BTHP[b, t, h], config, int(indices_BT[b, t]))
        close(turned[b, t, h], expected, 1e-5)


def test_the_layouts_agree_at_position_0_and_differ_after_it():
    x_P, half, interleaved = noise(6), rope(width=6, layout="half"), rope(width=6)
    assert torch.equal(turn(x_P, half, 0), turn(x_P, interleaved, 0))
    for position in (1, 2, 50):
        difference = turn(x_P, half, position) - turn(x_P, interleaved, position)
        assert difference.abs().max() > 0.1


def test_the_layouts_are_the_same_rotation_of_permuted_dimensions():
    x_P, to_half = noise(6), [0, 2, 4, 1, 3, 5]
    half = turn(x_P[to_half], rope(width=6, layout="half"), 5)
    assert torch.equal(half, turn(x_P, rope(width=6), 5)[to_half])


@layouts
@given(pairs=st.integers(1, 3), still=st.integers(0, 5), position=st.integers(0, 100))
def test_a_partial_width_leaves_the_rest_untouched(layout, pairs, still, position):
    config, x_P = rope(layout=layout, width=2 * pairs, amplitude=1.3), noise(2 * pairs + still)
    turned = turn(x_P, config, position)
    assert torch.equal(turned[2 * pairs :], x_P[2 * pairs :])
    close(turned[: 2 * pairs], turn(x_P[: 2 * pairs], config, position), 1e-12)


@layouts
@given(q=st.integers(0, 100), k=st.integers(0, 100), shift=st.integers(0, 100))
def test_scores_depend_on_the_difference_of_positions_only(layout, q, k, shift):
    config, q_P, k_P = rope(layout=layout, width=6, yarn=YARN), noise(6, seed=1), noise(6, seed=2)
    here = turn(q_P, config, q) @ turn(k_P, config, k)
    there = turn(q_P, config, q + shift) @ turn(k_P, config, k + shift)
    close(there, here, 1e-4)


def test_scores_do_depend_on_the_difference():
    q_P, k_P, config = noise(6, seed=1), noise(6, seed=2), rope(width=6)
    scores = [float(turn(q_P, config, 9) @ turn(k_P, config, k)) for k in range(10)]
    assert max(scores) - min(scores) > 0.5


@layouts
@given(amplitude=st.floats(0.5, 2), position=st.integers(0, 50))
def test_the_amplitude_multiplies_cos_and_sin(layout, amplitude, position):
    config, x_P = rope(layout=layout), noise(6)
    plain, louder = (turn(x_P, c, position) for c in (config, replace(config, amplitude=amplitude)))
    close(louder[:4], amplitude * plain[:4], 1e-6)
    assert torch.equal(louder[4:], plain[4:])


@pytest.mark.parametrize("attention", [mla(bias=False), gqa()], ids=["mla", "gqa"])
def test_the_amplitude_reaches_queries_and_keys(attention, monkeypatch):
    """Whatever is rotated in a forward comes out longer by the amplitude."""
    turned = []

    def noting(x_BTHP, config, positions):
        turned.append((x_BTHP, out := rotate(x_BTHP, config, positions)))
        return out

    monkeypatch.setattr("modeling.attention.mla.rotate", noting)
    monkeypatch.setattr("modeling.attention.gqa.rotate", noting)
    louder = replace(attention, rope=replace(attention.rope, amplitude=1.5))
    model = transformer(model_config(louder))
    model(random_tokens(2, 5))
    assert len(turned) == 2 * len(model.layers)
    for x_BTHP, out in turned:
        close(out[..., :4].norm(dim=-1), 1.5 * x_BTHP[..., :4].norm(dim=-1), 1e-5)


YARNS = {
    "factor 40": (64, 1e4, YarnConfig(factor=40.0, original_length=4096)),
    "one-step ramp": (
        64,
        5e4,
        YarnConfig(factor=32.0, original_length=4096, beta_fast=1.0, beta_slow=1.0),
    ),
    "not truncated": (64, 1.5e5, YarnConfig(factor=32.0, original_length=4096, truncate=False)),
    "not truncated, one step": (
        64,
        1e4,
        YarnConfig(factor=8.0, original_length=4096, beta_fast=2.0, beta_slow=2.0, truncate=False),
    ),
    "ramp beyond both ends": (8, 1e4, YarnConfig(factor=4.0, original_length=200, beta_fast=64.0)),
    "factor 1": (16, 1e4, YarnConfig(factor=1.0, original_length=2048)),
    "small": (4, 50.0, YARN),
}


@pytest.mark.parametrize(("width", "theta", "yarn"), YARNS.values(), ids=YARNS.keys())
def test_yarn_frequencies_are_those_of_the_paper(width, theta, yarn):
    config = RopeConfig(width=width, theta=theta, yarn=yarn)
    actual = inverse_frequencies(config)
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(plain_frequencies(config), rel=2e-6)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    """Factor 40 over 4096 positions, width 64: the ramp runs from pair 10 to pair 23."""
    plain = RopeConfig(width=64)
    yarn = replace(plain, yarn=YarnConfig(factor=40.0, original_length=4096))
    ratio = (inverse_frequencies(yarn) / inverse_frequencies(plain)).tolist()
    assert ratio[:11] == pytest.approx([1.0] * 11)
    assert ratio[23:] == pytest.approx([1 / 40] * 9)
    assert ratio[11:23] == pytest.approx([1 - (i - 10) / 13 * 39 / 40 for i in range(11, 23)])


def test_equal_betas_make_a_ramp_of_one_step():
    """Both ends round to pairs 19 and 20: pair 19 is kept, pair 20 divided, none is between."""
    step = YarnConfig(factor=32.0, original_length=4096, beta_fast=1.0, beta_slow=1.0)
    plain = RopeConfig(width=64, theta=5e4)
    ratio = inverse_frequencies(replace(plain, yarn=step)) / inverse_frequencies(plain)
    assert ratio.tolist() == pytest.approx([1.0] * 20 + [1 / 32] * 12)


@given(
    half=st.integers(1, 32),
    theta=st.sampled_from([50.0, 1e4, 1e6]),
    factor=st.floats(1, 64),
    original_length=st.integers(16, 10_000),
    betas=st.lists(st.floats(0.1, 64), min_size=2, max_size=2),
    truncate=st.booleans(),
)
def test_yarn_frequencies_lie_between_the_plain_and_the_divided_ones(
    half, theta, factor, original_length, betas, truncate
):
    yarn = YarnConfig(
        factor=factor,
        original_length=original_length,
        beta_fast=max(betas),
        beta_slow=min(betas),
        truncate=truncate,
    )
    config = RopeConfig(width=2 * half, theta=theta, yarn=yarn)
    frequencies = inverse_frequencies(config)
    plain = torch.tensor(plain_frequencies(replace(config, yarn=None)))
    assert (frequencies <= plain * 1.00001).all()
    assert (frequencies >= plain / factor * 0.99999).all()


def test_tables_stay_float32_in_a_bfloat16_model(monkeypatch):
    tables, table = [], modeling.rope.rope_table

    def noting(config, step):
        tables.extend(out := table(config, step))
        return out

    monkeypatch.setattr(modeling.rope, "rope_table", noting)
    for attention in (mla(), gqa()):
        transformer(model_config(attention), torch.bfloat16)(random_tokens(1, 3))
    assert len(tables) >= 4
    assert {table_BTr.dtype for table_BTr in tables} == {torch.float32}


@layouts
def test_a_bfloat16_vector_is_rotated_in_float32_and_rounded_once(layout):
    """At position 299 a table rounded to bfloat16, or a product rounded on the way, shows."""
    config, x_NP = rope(layout=layout, width=64, theta=1e4), noise(20, 64).bfloat16()
    turned = torch.stack([turn(x_P, config, 299) for x_P in x_NP])
    assert turned.dtype == torch.bfloat16
    exact = torch.stack([plain_rotation(x_P.double(), config, 299) for x_P in x_NP])
    assert (turned != exact.bfloat16()).float().mean() < 0.01  # near-ties of the rounding


def test_frequencies_do_not_depend_on_the_default_dtype():
    config = RopeConfig(width=64, yarn=YarnConfig(factor=40.0, original_length=4096))
    expected, usual = inverse_frequencies(config), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(inverse_frequencies(config), expected)
    finally:
        torch.set_default_dtype(usual)
