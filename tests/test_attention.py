"""Grouped-query attention and the attention function itself against a loop over positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import YARN, gqa, plain_gqa, randomize, rope

from modeling import GQAConfig
from modeling.attention import GroupedQueryAttention, attend, visible
from modeling.rope import Positions

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


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_config
def test_grouped_query_attention_is_its_equations_head_by_head(config):
    module, x_BTD = attention(config), noise(2, 6, D)
    expected = torch.stack([plain_gqa(module, config, x_TD) for x_TD in x_BTD])
    close(module(x_BTD, Positions(torch.arange(6)[None]), None), expected, 1e-5)


def plain_attend(q_BHTP, k_BJSP, v_BJSM, positions_BT, scale):
    """One query after the other; keys up to and including its own position."""
    B, H, T, _ = q_BHTP.shape
    y_BHTM = torch.zeros(B, H, T, v_BJSM.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            j = h // (H // k_BJSP.shape[1])
            for t in range(T):
                seen = range(int(positions_BT[b, t]) + 1)
                powers = [math.exp(scale * float(q_BHTP[b, h, t] @ k_BJSP[b, j, s])) for s in seen]
                for s, power in zip(seen, powers, strict=True):
                    y_BHTM[b, h, t] += power / sum(powers) * v_BJSM[b, j, s]
    return y_BHTM


@given(
    starts=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    num_new=st.integers(1, 4),
    key_heads=st.sampled_from([1, 2, 4]),
    key_width=st.integers(1, 5),
    value_width=st.integers(1, 5),
    scale=st.floats(0.1, 2),
)
def test_attend_is_the_softmax_over_what_each_query_may_see(
    starts, num_new, key_heads, key_width, value_width, scale
):
    """With values narrower and wider than the keys, and rows of unequal lengths."""
    B, S = len(starts), max(starts) + num_new
    q_BHTP = noise(B, 4, num_new, key_width)
    k_BJSP = noise(B, key_heads, S, key_width, seed=1)
    v_BJSM = noise(B, key_heads, S, value_width, seed=2)
    indices_BT = torch.tensor(starts)[:, None] + torch.arange(num_new)
    y_BHTM = attend(q_BHTP, k_BJSP, v_BJSM, Positions(indices_BT), scale)
    close(y_BHTM, plain_attend(q_BHTP, k_BJSP, v_BJSM, indices_BT, scale), 1e-10)


@pytest.mark.parametrize("value_width", [2, 5, 8])
def test_attention_is_causal_when_nothing_is_cached(value_width):
    q_BHTP, k_BJSP, v_BJSM = (
        noise(1, 2, 6, 5),
        noise(1, 2, 6, 5, seed=1),
        noise(1, 2, 6, value_width),
    )
    positions = Positions(torch.arange(6)[None])
    before = attend(q_BHTP, k_BJSP, v_BJSM, positions, 1.0)
    assert before.shape == (1, 2, 6, value_width)
    for t in range(1, 6):
        k_changed, v_changed = k_BJSP.clone(), v_BJSM.clone()
        k_changed[:, :, t:] += 1
        v_changed[:, :, t:] -= 1
        after = attend(q_BHTP, k_changed, v_changed, positions, 1.0)
        close(after[:, :, :t], before[:, :, :t], 1e-12)
        assert (after[:, :, t:] - before[:, :, t:]).abs().amax(dim=-1).min() > 1e-3


@given(starts=st.lists(st.integers(0, 5), min_size=1, max_size=3), num_new=st.integers(1, 4))
def test_a_query_sees_its_own_position_and_those_before(starts, num_new):
    indices_BT = torch.tensor(starts)[:, None] + torch.arange(num_new)
    S = max(starts) + num_new
    seen = visible(Positions(indices_BT), S)
    assert seen.shape == (len(starts), 1, num_new, S)
    for b, start in enumerate(starts):
        for t in range(num_new):
            assert seen[b, 0, t].tolist() == [s <= start + t for s in range(S)]


@pytest.mark.parametrize("multiplier", [1.0, 1.4])
def test_the_scale_is_the_inverse_root_of_the_head_width_times_the_multiplier(multiplier):
    module = attention(gqa(rope=rope(softmax_multiplier=multiplier)))
    assert module.scale == pytest.approx(multiplier / math.sqrt(7), rel=1e-12)


def test_the_cache_keeps_rotated_keys_and_values_of_the_key_heads_only():
    module, config, x_BTD = attention(gqa()), gqa(), noise(1, 3, D)
    cache = module.make_cache(1, 4)
    module(x_BTD, Positions(torch.arange(3)[None]), cache)
    keys, values = cache.buffers
    assert keys.shape == values.shape == (1, 4, config.kv_heads * config.head_width)
    unrotated = x_BTD @ module.k.weight.T
    close(values[:, :3], x_BTD @ module.v.weight.T, 1e-12)
    close(keys[:, 0], unrotated[:, 0], 1e-12)  # position 0
    assert (keys[:, 1] - unrotated[:, 1]).abs().max() > 1e-2
