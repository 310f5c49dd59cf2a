"""Multi-head latent attention: its two forms, its norms, its scale and the rule between them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import YARN, mla, model_config, plain_mla, random_tokens, randomize, rope, transformer

from modeling import MLAConfig, RopeConfig, Step
from modeling.attention.mla import MultiHeadLatentAttention, absorbing_pays
from moe.testing import close, noise

D = 11
CONFIGS = {
    "compressed queries": mla(),
    "plain queries": mla(query_rank=None),
    "one head": mla(num_heads=1, bias=False),
    "wide values": mla(value_width=12),
    "half layout": mla(rope=rope(layout="half")),
    "yarn": mla(rope=rope(yarn=YARN, amplitude=1.3, softmax_multiplier=1.4)),
    "multiplier": mla(query_rank=None, rope=rope(softmax_multiplier=1.9)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def attention(config: MLAConfig, seed: int = 0) -> MultiHeadLatentAttention:
    module = MultiHeadLatentAttention(D, config).double().requires_grad_(False)
    randomize(module, seed)
    return module


def from_start(T: int) -> Step:
    return Step(torch.arange(T)[None])


@every_config
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_each_form_is_the_equations_of_the_paper(config, form, monkeypatch):
    module, x_BTD = attention(config), noise(2, 6, D)
    pays = form == "absorbed"
    monkeypatch.setattr("modeling.attention.mla.absorbing_pays", lambda *args: pays)
    expected = torch.stack([plain_mla(module, config, x_TD) for x_TD in x_BTD])
    close(module(x_BTD, from_start(6), None), expected, 1e-5)


@every_config
@given(
    starts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    num_new=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_expanded_and_absorbed_agree(config, starts, num_new, seed):
    """Also for rows of unequal lengths, whose unused entries must count in neither."""
    module, c = attention(config, seed), config
    B, T, S = len(starts), num_new, max(starts) + num_new
    q_BTHP = noise(B, T, c.num_heads, c.nope_width, seed=seed)
    q_BTHR = noise(B, T, c.num_heads, c.rope.width, seed=seed + 1)
    kept_BSW = noise(B, S, c.kv_rank + c.rope.width, seed=seed + 2)
    positions = Step(torch.tensor(starts)[:, None] + torch.arange(T))
    keys_BS = torch.arange(S)[None] if any(starts) else None
    expanded, absorbed = (
        form(q_BTHP, q_BTHR, kept_BSW, positions, keys_BS)
        for form in (module.attend_expanded, module.attend_absorbed)
    )
    assert expanded.shape == (B, T, c.num_heads, c.value_width)
    close(absorbed, expanded, 1e-10)


def test_what_lies_behind_a_rows_end_counts_in_neither_form():
    module, config = attention(mla()), mla()
    q_BTHP, q_BTHR = noise(2, 2, 3, config.nope_width), noise(2, 2, 3, config.rope.width)
    kept_BSW = noise(2, 6, config.kv_rank + config.rope.width)
    other_BSW = kept_BSW.clone()
    other_BSW[1, 3:] = 9.0
    positions, keys_BS = Step(torch.tensor([[4, 5], [1, 2]])), torch.arange(6)[None]
    for form in (module.attend_expanded, module.attend_absorbed):
        before = form(q_BTHP, q_BTHR, kept_BSW, positions, keys_BS)
        close(form(q_BTHP, q_BTHR, other_BSW, positions, keys_BS), before, 1e-12)


def test_the_cache_keeps_the_normed_latent_and_the_rotated_key():
    module, config, x_BTD = attention(mla()), mla(), noise(1, 3, D)
    cache = module.make_cache(1, 4)
    module(x_BTD, from_start(3), cache)
    (kept_BSW,) = cache.tensors
    assert kept_BSW.shape == (1, 4, config.kv_rank + config.rope.width)
    down_TW = x_BTD[0] @ module.kv_compress.weight.T + module.kv_compress.bias
    latent_TC = down_TW[:, : config.kv_rank]
    mean_T1 = latent_TC.square().mean(dim=-1, keepdim=True)
    normed_TC = latent_TC / (mean_T1 + 1e-6).sqrt() * module.kv_norm.weight
    close(kept_BSW[0, :3, : config.kv_rank], normed_TC, 1e-12)
    close(kept_BSW[0, 0, config.kv_rank :], down_TW[0, config.kv_rank :], 1e-12)  # position 0
    assert (kept_BSW[0, 1, config.kv_rank :] - down_TW[1, config.kv_rank :]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("mscale_all_dim", "multiplier", "nope_width", "rope_width"),
    [(1.0, 1.873854, 128, 64), (0.707, 1.589626, 128, 64)],
    ids=["V3", "V2-Lite"],
)
def test_the_scale_carries_the_softmax_multiplier_once(
    mscale_all_dim, multiplier, nope_width, rope_width
):
    assert (0.1 * mscale_all_dim * math.log(40) + 1) ** 2 == pytest.approx(multiplier, abs=5e-7)
    rotary = RopeConfig(width=rope_width, softmax_multiplier=multiplier)
    config = mla(nope_width=nope_width, rope=rotary)
    assert attention(config).scale == pytest.approx(multiplier / math.sqrt(192), rel=1e-12)


def test_the_multiplier_acts_on_the_whole_score_and_the_amplitude_on_the_rotated_part():
    """Multiplying every score by m equals multiplying queries by m; amplitude a equals
    multiplying the rotated parts of queries and keys by a."""
    plain = mla(query_rank=None, bias=False)
    x_BTD, P, R, C = noise(1, 5, D), plain.nope_width, plain.rope.width, plain.kv_rank
    for config, on_nope, on_rope, on_key in (
        (replace(plain, rope=rope(softmax_multiplier=1.9)), 1.9, 1.9, 1.0),
        (replace(plain, rope=rope(amplitude=1.3)), 1.0, 1.3, 1.3),
    ):
        module, by_hand = attention(config), attention(plain)
        weight_HpD = by_hand.q.weight.view(plain.num_heads, P + R, D)
        weight_HpD[:, :P] *= on_nope
        weight_HpD[:, P:] *= on_rope
        by_hand.kv_compress.weight[C:] *= on_key
        close(module(x_BTD, from_start(5), None), by_hand(x_BTD, from_start(5), None), 1e-6)


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_latent_norms_use_their_own_epsilon(epsilon):
    config, x_BTD = mla(latent_norm_epsilon=epsilon), noise(1, 4, D)
    outputs = []
    for norm_epsilon in (1e-6, 0.3):
        model = transformer(model_config(config, norm_epsilon=norm_epsilon))
        module = model.layers[1].attention
        outputs.append(module(x_BTD, from_start(4), None))
        close(outputs[-1][0], plain_mla(module, config, x_BTD[0]), 1e-5)
    assert torch.equal(*outputs)


def test_the_models_norms_do_not_use_the_latent_epsilon():
    tokens_BT = random_tokens(1, 4)
    small, large = (
        transformer(model_config(mla(latent_norm_epsilon=0.5), norm_epsilon=epsilon))
        for epsilon in (1e-6, 0.3)
    )
    assert (small(tokens_BT) - large(tokens_BT)).abs().max() > 1e-3
    assert small.layers[0].attention_norm.epsilon == 1e-6


V3_SHAPE = mla(num_heads=128, kv_rank=512, nope_width=128, value_width=128, rope=rope(width=64))


def test_decoding_absorbs_and_a_long_prefill_expands():
    for held in (1, 10, 1000, 100_000):
        assert absorbing_pays(1, held + 1, V3_SHAPE)
    for length in (2, 10, 1000, 100_000):
        assert not absorbing_pays(length, length, V3_SHAPE)


def test_many_new_tokens_on_a_long_cache_expand_and_few_absorb():
    """C (P + M) S against 768 T S more for the pairs: the border is near 131072 / 768 = 170."""
    assert absorbing_pays(150, 10**6, V3_SHAPE)
    assert not absorbing_pays(180, 10**6, V3_SHAPE)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    num_new=st.integers(1, 6),
    held=st.integers(0, 12),
)
def test_the_form_with_fewer_multiplications_is_taken(sizes, num_new, held):
    P, M, C, half = sizes
    config = mla(nope_width=P, value_width=M, kv_rank=C, rope=rope(width=2 * half))
    R, expanded, absorbed = 2 * half, 0, 0
    for _ in range(held + num_new):
        expanded += C * P + C * M  # this position's key and value
    for _ in range(num_new):
        absorbed += P * C + C * M  # this query into the latent space, its result out of it
        for _ in range(held + num_new):
            expanded += P + R + M  # score and weighted value
            absorbed += C + R + C
    assert absorbing_pays(num_new, held + num_new, config) == (absorbed < expanded)


@pytest.mark.parametrize("pays", [True, False])
def test_forward_follows_the_rule(pays, monkeypatch):
    module, asked, taken = attention(mla()), [], []
    monkeypatch.setattr(
        "modeling.attention.mla.absorbing_pays", lambda T, S, config: asked.append((T, S)) or pays
    )
    for name in ("attend_expanded", "attend_absorbed"):
        form = getattr(module, name)
        note = lambda *args, name=name, form=form: taken.append(name) or form(*args)  # noqa: E731
        monkeypatch.setattr(module, name, note)
    cache = module.make_cache(1, 8)
    module(noise(1, 5, D), from_start(5), cache)
    module(noise(1, 1, D), Step(torch.tensor([[5]])), cache)
    assert asked == [(5, 5), (1, 6)]
    assert taken == ["attend_absorbed" if pays else "attend_expanded"] * 2


def test_biases_stand_on_the_compressions_and_the_output_only():
    with_bias = {name for name in attention(mla(bias=True)).state_dict() if name.endswith("bias")}
    assert with_bias == {"q.compress.bias", "kv_compress.bias", "o.bias"}
    without = attention(mla(bias=False)).state_dict()
    assert not any(name.endswith("bias") for name in without)
