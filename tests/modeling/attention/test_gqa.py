"""Grouped-query attention and the attention function itself against a loop over positions."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import YARN, gqa, plain_gqa, randomize, rope

from modeling import GQAConfig, QKNormConfig, Step
from modeling.attention import dot_product, kernels
from modeling.attention.dot_product import attend
from modeling.attention.gqa import GroupedQueryAttention
from modeling.attention.kernels import (
    attend_by_kernel,
    attend_in_blocks,
    attend_in_pieces,
    blocks_pay,
    mask_keys,
    pieces_pay,
)
from moe.testing import close, noise

D = 11
CONFIGS = {
    "grouped": gqa(),
    "one head each": gqa(kv_heads=6),
    "one for all": gqa(kv_heads=1),
    "whole width rotated": gqa(head_width=4),
    "interleaved": gqa(rope=rope()),
    "yarn": gqa(rope=rope(yarn=YARN, amplitude=1.3, softmax_multiplier=1.4)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def attention(config: GQAConfig) -> GroupedQueryAttention:
    module = GroupedQueryAttention(D, config).double().requires_grad_(False)
    randomize(module, 0)
    return module


@every_config
def test_grouped_query_attention_is_its_equations_head_by_head(config):
    module, x_BTD = attention(config), noise(2, 6, D)
    expected = torch.stack([plain_gqa(module, config, x_TD) for x_TD in x_BTD])
    close(module(x_BTD, Step(torch.arange(6)[None]), None), expected, 1e-5)


@st.composite
def gqa_configs(draw) -> GQAConfig:
    kv_heads, norms = draw(st.sampled_from([1, 2])), [None]
    for over in ("head", "all"):
        for after_rope in (False, True):
            norms.append(QKNormConfig(over=over, after_rope=after_rope, epsilon=1e-2))
    return GQAConfig(
        num_heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        head_width=draw(st.integers(4, 6)),
        rope=rope(
            width=draw(st.sampled_from([2, 4])),
            layout=draw(st.sampled_from(["half", "interleaved"])),
            softmax_multiplier=draw(st.sampled_from([1.0, 1.4])),
        ),
        scale=draw(st.sampled_from([None, 0.3, 1.7])),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(norms)),
        window=draw(st.sampled_from([None, 1, 2, 3, 9])),
        sinks=draw(st.booleans()),
    )


@settings(max_examples=60)
@given(config=gqa_configs(), cuts=st.sets(st.integers(1, 5)))
def test_every_combination_of_options_is_its_equations_at_once_and_piece_by_piece(config, cuts):
    module, x_BTD = attention(config), noise(2, 6, D)
    expected_BTD = torch.stack([plain_gqa(module, config, x_TD) for x_TD in x_BTD])
    close(module(x_BTD, Step(torch.arange(6)[None]), None), expected_BTD, 1e-5)
    cache, bounds = module.make_cache(2, 6), [0, *sorted(cuts), 6]
    for start, end in pairwise(bounds):
        y_BtD = module(x_BTD[:, start:end], Step(torch.arange(start, end)[None]), cache)
        close(y_BtD, expected_BTD[:, start:end], 1e-5)


def seen_by(query: int, keys: list[int], window: int | None) -> list[bool]:
    """For keys of these positions: at most the query's own, and in a window the last so many."""
    nearest = range(0 if window is None else max(0, query - window + 1), query + 1)
    return [key in nearest for key in keys]


def plain_attend(q_BHTP, k_BJSP, v_BJSM, queries, keys, scale, window=None, sinks=None):
    """One query after the other, among the keys that it sees; queries, keys: positions by row."""
    B, H, T, _ = q_BHTP.shape
    y_BHTM = torch.zeros(B, H, T, v_BJSM.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            j, sink = h // (H // k_BJSP.shape[1]), math.exp(sinks[h]) if sinks else 0.0
            for t in range(T):
                seen = [s for s, see in enumerate(seen_by(queries[b][t], keys[b], window)) if see]
                powers = [math.exp(scale * float(q_BHTP[b, h, t] @ k_BJSP[b, j, s])) for s in seen]
                for s, power in zip(seen, powers, strict=True):
                    y_BHTM[b, h, t] += power / (sum(powers) + sink) * v_BJSM[b, j, s]
    return y_BHTM


@st.composite
def placements(draw):
    """Positions of T queries and S keys in each row: the queries' own (None), or all up to the
    last query and a few more at either end, in any order. A single query comes last."""
    starts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    num_new = draw(st.integers(1, 4))
    queries = [list(range(start, start + num_new)) for start in starts]
    if draw(st.booleans()):
        return queries, None
    more = 0 if len(starts) * num_new == 1 else 2
    lowest = -draw(st.integers(0, more))
    positions = range(lowest, max(starts) + num_new + draw(st.integers(0, more)))
    return queries, [draw(st.permutations(positions)) for _ in starts]


windows = st.none() | st.integers(1, 6)


def attend_in_blocks_of_two(*inputs):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "BLOCK", 2)
        return attend_in_blocks(*inputs)


FORMS = {
    "chosen": attend,
    "kernel": attend_by_kernel,
    "one block": attend_in_blocks,
    "blocks": attend_in_blocks_of_two,
}


@pytest.mark.parametrize(
    ("form", "with_sinks"),
    [
        (form, sinks)
        for form in FORMS
        for sinks in (False, True)
        if (form, sinks) != ("kernel", True)
    ],
)
@given(
    placement=placements(),
    key_heads=st.sampled_from([1, 2, 4]),
    key_width=st.integers(1, 5),
    value_width=st.integers(1, 5),
    scale=st.floats(0.1, 2),
    window=windows,
    sinks=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_attention_is_the_softmax_over_what_each_query_may_see(
    form, with_sinks, placement, key_heads, key_width, value_width, scale, window, sinks
):
    """With values narrower and wider than the keys, rows of unequal lengths, keys in any order;
    a sink is one more score in the softmax of its head, which has no value."""
    queries, keys = placement
    B, T, S = len(queries), len(queries[0]), len((keys or queries)[0])
    q_BHTP = noise(B, 4, T, key_width)
    k_BJSP = noise(B, key_heads, S, key_width, seed=1)
    v_BJSM = noise(B, key_heads, S, value_width, seed=2)
    positions, keys_BS = Step(torch.tensor(queries)), keys and torch.tensor(keys)
    inputs = q_BHTP, k_BJSP, v_BJSM, positions, keys_BS, scale, window
    sinks = sinks if with_sinks else None
    given_sinks = [torch.tensor(sinks, dtype=torch.float64)] if with_sinks else []
    y_BHTM = FORMS[form](*inputs, *given_sinks)
    plain = plain_attend(q_BHTP, k_BJSP, v_BJSM, queries, keys or queries, scale, window, sinks)
    close(y_BHTM, plain, 1e-10)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (16, 1)])
def test_blocks_are_for_many_query_rows_on_a_cpu(heads):
    H, J = heads
    for T in (1, 7, 8, 31, 32, 63, 64, 127, 128, 500):
        q_BHTP, k_BJSP = torch.empty(1, H, T, 3), torch.empty(1, J, T, 3)
        assert blocks_pay(q_BHTP, k_BJSP) == (T * H // J >= 128)
        assert not blocks_pay(q_BHTP.to("meta"), k_BJSP.to("meta"))


def test_products_of_16_bits_are_for_cpus_with_instructions_for_them(monkeypatch):
    q_BHTP, k_BJSP = torch.empty(1, 4, 500, 3).bfloat16(), torch.empty(1, 4, 500, 3).bfloat16()
    query_BHTP, latents_B1SP = torch.empty(1, 4, 1, 3).bfloat16(), torch.empty(1, 1, 9000, 3)
    for fast in (False, True):
        dtypes = [torch.float32, *([torch.bfloat16] if fast else [])]
        monkeypatch.setattr(kernels, "FAST_PRODUCTS", dtypes)
        assert blocks_pay(q_BHTP, k_BJSP) == fast
        assert pieces_pay(query_BHTP, latents_B1SP, None) == fast
        assert blocks_pay(q_BHTP.float(), k_BJSP.float())


@given(
    keys=st.integers(1, 9),
    key_width=st.integers(1, 5),
    value_width=st.integers(1, 5),
    scale=st.floats(0.1, 2),
)
def test_a_single_query_attends_to_pieces_of_the_keys(keys, key_width, value_width, scale):
    q_BHTP, k_BJSP = noise(1, 4, 1, key_width), noise(1, 1, keys, key_width, seed=1)
    v_BJSM = noise(1, 1, keys, value_width, seed=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "PIECE", 2)
        y_BHTM = attend_in_pieces(q_BHTP, k_BJSP, v_BJSM, scale)
    query, all_keys = [[keys - 1]], [list(range(keys))]
    plain = plain_attend(q_BHTP, k_BJSP, v_BJSM, query, all_keys, scale, None, None)
    close(y_BHTM, plain, 1e-6)


def test_pieces_are_for_a_single_query_whose_heads_share_many_keys_in_16_bits(monkeypatch):
    monkeypatch.setattr(kernels, "FAST_PRODUCTS", [torch.float32, torch.bfloat16, torch.float16])

    def pays(B=1, H=4, T=1, J=1, S=4096, window=None, dtype=torch.bfloat16, device="cpu"):
        q_BHTP = torch.empty(B, H, T, 2, dtype=dtype, device=device)
        return pieces_pay(q_BHTP, torch.empty(B, J, S, 2, dtype=dtype, device=device), window)

    assert pays()
    assert pays(S=40000, H=1, dtype=torch.float16)
    for other in (
        {"B": 2},
        {"T": 2},
        {"J": 2},
        {"S": 4095},
        {"window": 9},
        {"dtype": torch.float32},
        {"device": "meta"},
    ):
        assert not pays(**other)


def noting(chosen, form):
    def run(*inputs):
        chosen.append(form.__name__)
        return form(*inputs)

    return run


def test_every_form_is_chosen_and_is_about_the_plain_weights_in_bfloat16(monkeypatch):
    """A prefill in blocks, a step by the kernel, and a step among many keys in pieces."""
    chosen = []
    monkeypatch.setattr(kernels, "FAST_PRODUCTS", [torch.bfloat16])
    for T, S, H, J in ((300, 300, 2, 2), (40, 300, 4, 1), (1, 300, 4, 2), (1, 5000, 4, 1)):
        q_BHTP = noise(1, H, T, 8).bfloat16()
        k_BJSP, v_BJSM = noise(1, J, S, 8, seed=1).bfloat16(), noise(1, J, S, 8, seed=2).bfloat16()
        step = Step(torch.arange(S - T, S)[None])
        keys_BS = None if S == T else torch.arange(S)[None]
        with pytest.MonkeyPatch.context() as patched:
            for form in ("attend_by_kernel", "attend_in_blocks", "attend_in_pieces"):
                patched.setattr(dot_product, form, noting(chosen, getattr(dot_product, form)))
            y_BHTM = attend(q_BHTP, k_BJSP, v_BJSM, step, keys_BS, 0.3)
        twin = dot_product.attention_weights(q_BHTP, k_BJSP, step, keys_BS, 0.3).weights_BHTS
        v_BHSM = v_BJSM.float().repeat_interleave(H // J, dim=1)
        assert (y_BHTM.float() - twin @ v_BHSM).abs().max() < 0.02
    assert chosen == ["attend_in_blocks"] * 2 + ["attend_by_kernel", "attend_in_pieces"]


@given(placement=placements(), window=windows)
def test_a_sink_without_weight_changes_nothing_and_one_with_all_leaves_nothing(placement, window):
    queries, keys = placement
    B, T, S = len(queries), len(queries[0]), len((keys or queries)[0])
    qkv = noise(B, 2, T, 3), noise(B, 1, S, 3, seed=1), noise(B, 1, S, 3, seed=2)
    among = Step(torch.tensor(queries)), keys and torch.tensor(keys), 0.5, window
    none_H, all_H = torch.full((2,), -1e9).double(), torch.full((2,), 1e9).double()
    close(attend(*qkv, *among, none_H), attend(*qkv, *among), 1e-12)
    assert not attend(*qkv, *among, all_H).any()


@given(length=st.integers(1, 7), further=st.integers(0, 3))
def test_a_window_as_long_as_the_text_is_none(length, further):
    positions, x_BTD = Step(torch.arange(length)[None]), noise(1, length, D)
    whole, windowed = attention(gqa()), attention(gqa(window=length + further))
    close(windowed(x_BTD, positions, None), whole(x_BTD, positions, None), 1e-12)


@pytest.mark.parametrize("value_width", [2, 5, 8])
def test_attention_is_causal_when_nothing_is_cached(value_width):
    q_BHTP, k_BJSP, v_BJSM = (
        noise(1, 2, 6, 5),
        noise(1, 2, 6, 5, seed=1),
        noise(1, 2, 6, value_width),
    )
    positions = Step(torch.arange(6)[None])
    before = attend(q_BHTP, k_BJSP, v_BJSM, positions, None, 1.0)
    assert before.shape == (1, 2, 6, value_width)
    for t in range(1, 6):
        k_changed, v_changed = k_BJSP.clone(), v_BJSM.clone()
        k_changed[:, :, t:] += 1
        v_changed[:, :, t:] -= 1
        after = attend(q_BHTP, k_changed, v_changed, positions, None, 1.0)
        close(after[:, :, :t], before[:, :, :t], 1e-12)
        assert (after[:, :, t:] - before[:, :, t:]).abs().amax(dim=-1).min() > 1e-3


@given(placement=placements(), window=windows)
def test_a_query_sees_its_own_position_and_those_before_as_far_as_its_window(placement, window):
    queries, keys = placement
    seen = mask_keys(Step(torch.tensor(queries)), keys and torch.tensor(keys), window)
    assert seen.shape == (len(queries), 1, len(queries[0]), len((keys or queries)[0]))
    for b, row in enumerate(queries):
        for t, query in enumerate(row):
            assert seen[b, 0, t].tolist() == seen_by(query, (keys or queries)[b], window)


def test_a_window_of_three_shows_the_query_and_the_two_before_it_and_no_key_before_the_start():
    positions = Step(torch.tensor([[1, 5]]))
    seen = mask_keys(positions, torch.tensor([[5, -1, 0, 1, 2, 3, 4, 6]]), window=3)
    assert seen[0, 0].tolist() == [
        [False, False, True, True, False, False, False, False],  # position 1 sees 0 and 1
        [True, False, False, False, False, True, True, False],  # position 5 sees 3, 4 and 5
    ]


@pytest.mark.parametrize("multiplier", [1.0, 1.4])
def test_the_scale_is_the_inverse_root_of_the_head_width_times_the_multiplier(multiplier):
    module = attention(gqa(rope=rope(softmax_multiplier=multiplier)))
    assert module.scale == pytest.approx(multiplier / math.sqrt(7), rel=1e-12)


def test_an_explicit_scale_takes_the_place_of_the_inverse_root_and_not_of_the_multiplier():
    module = attention(gqa(scale=0.25, rope=rope(softmax_multiplier=1.4)))
    assert module.scale == pytest.approx(0.25 * 1.4, rel=1e-12)


def test_biases_stand_where_the_config_asks_for_them():
    for fields, expected in (
        ({"qkv_bias": True}, {"q.bias", "k.bias", "v.bias"}),
        ({"output_bias": True}, {"o.bias"}),
        ({}, set()),
    ):
        names = attention(gqa(**fields)).state_dict()
        assert {name for name in names if name.endswith("bias")} == expected


def test_the_cache_keeps_rotated_keys_and_values_of_the_key_heads_only():
    module, config, x_BTD = attention(gqa()), gqa(), noise(1, 3, D)
    cache = module.make_cache(1, 4)
    module(x_BTD, Step(torch.arange(3)[None]), cache)
    keys, values = cache.tensors
    assert keys.shape == values.shape == (1, 4, config.kv_heads * config.head_width)
    unrotated = x_BTD @ module.k.weight.T
    close(values[:, :3], x_BTD @ module.v.weight.T, 1e-12)
    close(keys[:, 0], unrotated[:, 0], 1e-12)  # position 0
    assert (keys[:, 1] - unrotated[:, 1]).abs().max() > 1e-2
