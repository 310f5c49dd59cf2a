"""The transformer: one code path for every way of feeding tokens, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    VARIED,
    YARN,
    gqa,
    mla,
    model_config,
    plain_block,
    plain_states,
    random_tokens,
    rope,
    transformer,
)
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from modeling import LayerConfig, MTPConfig, Step, Transformer, mtp_loss, next_token_loss
from modeling.testing import check_model_is_causal
from moe import DenseConfig
from moe.testing import close

STRETCHED = rope(yarn=YARN, amplitude=1.3, softmax_multiplier=1.4)
MODELS = {
    "mla": transformer(model_config(mla())),
    "mla without query compression": transformer(model_config(mla(query_rank=None, bias=False))),
    "mla with yarn": transformer(model_config(mla(rope=STRETCHED))),
    "gqa": transformer(model_config(gqa())),
    "gqa with yarn": transformer(model_config(gqa(rope=STRETCHED))),
    **{name: transformer(config()) for name, config in VARIED.items()},
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
LENGTH = 7


@every_model
def test_logits_are_the_equations_of_the_papers(model):
    tokens_BT = random_tokens(2, LENGTH)
    expected = torch.stack([plain_states(model, tokens_T) for tokens_T in tokens_BT])
    states = model.hidden_states(tokens_BT)
    close(states.normed_BTD, expected, 1e-4)
    close(model(tokens_BT), states.normed_BTD @ model.head.weight.T)
    close(model.norm(states.raw_BTD) * model.config.logits_multiplier, states.normed_BTD)


@every_model
@given(cuts=st.sets(st.integers(1, LENGTH - 1)), batch=st.integers(1, 3))
def test_cached_logits_equal_uncached_ones_for_every_way_of_cutting(model, cuts, batch):
    tokens_BT = random_tokens(batch, LENGTH)
    cache = model.make_cache(batch, LENGTH)
    pieces = tokens_BT.tensor_split(sorted(cuts), dim=1)
    logits_BTV = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
    close(logits_BTV, model(tokens_BT))
    assert cache.lengths == [LENGTH] * batch


@every_model
@given(
    rows=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4),
)
def test_rows_of_unequal_lengths_in_one_cache_equal_single_runs(model, rows):
    """Prompts padded on the right and cut back; three more tokens, of which each row keeps its own
    number; two more."""
    prompts, kept = [prompt for prompt, _ in rows], [sum(row) for row in rows]
    texts_BT = torch.cat([random_tokens(1, 10, seed=row) for row in range(len(rows))])
    cache = model.make_cache(len(rows), max(prompts) + 5, rollback=4)
    logits = []
    for lengths, new in (([0] * len(rows), max(prompts)), (prompts, 3), (kept, 2)):
        cache.truncate(lengths)
        starts_B1 = torch.tensor(lengths)[:, None]
        logits.append(model(texts_BT.gather(1, starts_B1 + torch.arange(new)), cache=cache))
        assert cache.lengths == [length + new for length in lengths]
    for row, (prompt, end) in enumerate(zip(prompts, kept, strict=True)):
        alone_TV = model(texts_BT[row : row + 1, : end + 2])[0]
        close(logits[0][row, :prompt], alone_TV[:prompt])
        close(logits[1][row, : end - prompt], alone_TV[prompt:end])
        close(logits[2][row], alone_TV[end:])


@every_model
@settings(max_examples=15)
@given(
    batch=st.integers(1, 3),
    rounds=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_rows_that_grow_by_unequal_counts_equal_single_runs(model, batch, rounds):
    """Each round pads the rows to the longest; what is counted out leaves no trace."""
    rounds = [counts[:batch] for counts in rounds]
    ends = [sum(row) for row in zip(*rounds, strict=True)]
    cache = model.make_cache(batch, max(1, *ends))
    texts = [random_tokens(1, end, seed=row)[0] for row, end in enumerate(ends)]
    parts = [list(text.split(counts)) for text, *counts in zip(texts, *rounds, strict=True)]
    states = [[] for _ in range(batch)]
    for number, counts in enumerate(rounds):
        tokens_BT = pad_sequence([row[number] for row in parts], batch_first=True, padding_value=7)
        new = model.hidden_states(tokens_BT, cache, counts).normed_BTD
        for row, count in enumerate(counts):
            states[row].append(new[row, :count])
    assert cache.lengths == ends
    for text, row in zip(texts, states, strict=True):
        close(torch.cat(row), model.hidden_states(text[None]).normed_BTD[0])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_decoding_through_many_windows_equals_the_whole_and_takes_no_more_memory(window):
    model, tokens_BT = transformer(model_config(gqa(window=window))), random_tokens(2, 40)
    cache = model.make_cache(2, 40)
    memory, logits = cache.nbytes, [model(tokens_BT[:, :3], cache=cache)]
    for t in range(3, 40):
        logits.append(model(tokens_BT[:, t : t + 1], cache=cache))
    close(torch.cat(logits, dim=1), model(tokens_BT))
    assert cache.nbytes == memory == 3 * 2 * (window - 1) * 2 * (3 * 7) * 8


def test_a_model_of_windows_alone_sees_no_further_than_they_reach_together():
    """Three layers of windows of three: the last position reaches 3 * (3 - 1) back."""
    model, tokens_BT = transformer(model_config(gqa(window=3))), random_tokens(1, 9)
    for t in range(9):
        changed_BT = tokens_BT.clone()
        changed_BT[:, t] = (changed_BT[:, t] + 5) % 23
        change = (model(changed_BT) - model(tokens_BT))[0, -1].abs().max()
        assert (change > 1e-9) == (t >= 9 - 1 - 3 * 2)


@every_model
def test_no_position_sees_its_future_or_another_row(model):
    check_model_is_causal(model, random_tokens(3, LENGTH))


@every_model
def test_every_position_sees_its_past(model):
    """The last logits change with the first token, so the test above cannot pass by blindness."""
    tokens_BT = random_tokens(1, LENGTH)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 0] = (changed_BT[:, 0] + 5) % 23
    assert (model(tokens_BT) - model(changed_BT))[0, -1].abs().max() > 1e-6


@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_float32_at_least(model_dtype):
    model = transformer(model_config(mla(), mtp=1), model_dtype)
    expected = torch.float64 if model_dtype == torch.float64 else torch.float32
    tokens_BT = random_tokens(1, 4)
    assert model(tokens_BT).dtype == expected
    assert model.mtp_logits(tokens_BT)[0].dtype == expected
    assert model.make_cache(1, 4).layers[0].tensors[0].dtype == model_dtype


@given(kept=st.integers(1, LENGTH))
def test_logits_to_keep_leaves_the_last_positions(kept):
    model, tokens_BT = MODELS["mla"], random_tokens(2, LENGTH)
    close(model(tokens_BT, logits_to_keep=kept), model(tokens_BT)[:, LENGTH - kept :])
    cache = model.make_cache(2, LENGTH)
    close(model(tokens_BT, cache, logits_to_keep=kept), model(tokens_BT)[:, LENGTH - kept :])
    assert cache.length == LENGTH


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("multiplier", [1.0, 0.3])
def test_a_block_norms_before_and_behind_and_multiplies_what_it_adds(before, after, multiplier):
    config = model_config(gqa())
    dense, sparse, _ = (
        replace(layer, norm_before=before, norm_after=after, residual_multiplier=multiplier)
        for layer in config.layers
    )
    model = transformer(replace(config, layers=(dense, sparse), norm_epsilon=0.05))
    x_TD = model.embed.weight[:5]
    for block, layer in zip(model.layers, (dense, sparse), strict=True):
        y_TD = block(x_TD[None], Step(torch.arange(5)[None]), None)[0]
        close(y_TD, plain_block(block, layer, 0.05, x_TD), 1e-5)
        norms = {name.split(".")[0] for name in block.state_dict() if "norm.weight" in name}
        behind = {"attention_output_norm", "feed_forward_output_norm"} if after else set()
        assert norms == ({"attention_norm", "feed_forward_norm"} if before else set()) | behind


@pytest.mark.parametrize("attention", [mla(), gqa()], ids=["mla", "gqa"])
def test_multipliers_can_be_multiplied_into_the_weights_they_act_on(attention):
    plain = model_config(attention, mtp=2, norm_epsilon=1e-20)
    scaled = replace(plain, embedding_multiplier=3.0, logits_multiplier=0.4)
    layers = [
        replace(layer, residual_multiplier=0.7) for layer in (*plain.layers, *plain.mtp.blocks)
    ]
    scaled = replace(scaled, layers=tuple(layers[:3]), mtp=MTPConfig(blocks=tuple(layers[3:])))
    by_config, by_hand, tokens_BT = transformer(scaled), transformer(plain), random_tokens(2, 6)
    by_hand.embed.weight *= 3.0
    by_hand.head.weight *= 0.4
    for name, parameter in by_hand.named_parameters():
        if name.endswith(("attention.o.weight", "attention.o.bias", "down", "down.weight")):
            parameter *= 0.7
    close(by_config(tokens_BT), by_hand(tokens_BT))
    for depth in range(2):
        logits = (model.mtp_logits(tokens_BT)[depth] for model in (by_config, by_hand))
        close(*logits)


@pytest.mark.parametrize("multiplier", [1.0, 0.4])
def test_the_losses_of_states_are_those_of_the_logits(multiplier):
    model = transformer(model_config(mla(), mtp=2, logits_multiplier=multiplier))
    tokens_BT, head_VD = random_tokens(2, 8), model.head.weight
    states = model.hidden_states(tokens_BT)
    depths = model.mtp_hidden_states(states, tokens_BT)
    of_logits = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1 + depth :].flatten())
        for depth, logits in enumerate([model(tokens_BT), *model.mtp_logits(tokens_BT)])
    ]
    close(next_token_loss(states.normed_BTD, head_VD, tokens_BT), of_logits[0])
    expected = 0.3 * of_logits[1] + 0.1 * of_logits[2]
    close(mtp_loss(depths, model.mtp_heads, tokens_BT, [0.3, 0.1]), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_tensor(tied):
    model = Transformer(model_config(mla(), tied_embeddings=tied))
    assert (model.head.weight is model.embed.weight) == tied
    counted = sum(parameter.numel() for parameter in model.parameters())
    untied = sum(p.numel() for p in Transformer(model_config(mla())).parameters())
    assert untied - counted == (23 * 11 if tied else 0)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (torch.tensor([[1, 2], [3, 23]]), ["23", "position 1", "row 1"]),
        (torch.tensor([[1, 2, 3], [4, -1, 6]]), ["-1", "position 1", "row 1"]),
        (torch.tensor([[1, 2]], dtype=torch.int32), ["int64", "int32"]),
        (torch.tensor([[1.0, 2.0]]), ["int64", "float32"]),
        (torch.tensor([1, 2]), ["(batch, length)", "(2,)"]),
        (torch.zeros(1, 2, 3, dtype=torch.int64), ["(batch, length)", "(1, 2, 3)"]),
    ],
    ids=["too large", "negative", "int32", "float", "one dimension", "three dimensions"],
)
def test_bad_tokens_are_refused_by_name_and_place(tokens, told):
    model = MODELS["mla"]
    cache = model.make_cache(len(tokens), 8)
    for call in (model, model.mtp_logits, lambda tokens: model(tokens, cache=cache)):
        with pytest.raises(ValueError, match="token") as caught:
            call(tokens)
        assert all(word in str(caught.value) for word in told)
    assert cache.length == 0


CONFIGS = {"mla": model_config(mla(), mtp=2)} | {
    name: config(mtp=2) for name, config in VARIED.items()
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
def test_initialize_is_seeded_finite_and_touches_every_parameter(config):
    def initialized(seed):
        model = Transformer(config)
        for parameter in model.parameters():
            parameter.detach().fill_(float("nan"))
        model.initialize(std=0.02, seed=seed)
        return model.state_dict()

    first, same, other = initialized(1), initialized(1), initialized(2)
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert all(torch.equal(first[name], same[name]) for name in first)
    zeros = {name for name in first if name.endswith(("bias", "sinks"))}
    ones = {name for name in first if name.endswith("norm.weight")}
    assert all((first[name] == 0).all() for name in zeros)
    assert all((first[name] == 1).all() for name in ones)
    drawn = set(first) - zeros - ones
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_sinks_and_the_biases_of_attention_router_and_experts_start_at_zero():
    model = Transformer(CONFIGS["windows and sinks"])
    model.initialize(std=0.02, seed=0)
    attention, moe = model.layers[0].attention, model.layers[0].feed_forward
    biases = [getattr(attention, name).bias for name in "qkvo"]
    biases += [moe.experts.gate_bias, moe.experts.up_bias, moe.experts.down_bias]
    assert not any(tensor.any() for tensor in (attention.sinks, moe.router.bias, *biases))


def test_initialize_narrows_what_writes_to_the_residual_stream():
    wide = replace(model_config(mla()), d_model=200)
    model = Transformer(wide)
    model.initialize(std=0.5, seed=0)
    narrow = 0.5 / (2 * 3) ** 0.5
    first, second, _ = model.layers
    for into in (first.attention.o, first.feed_forward.down, second.feed_forward.shared.down):
        assert into.weight.std().item() == pytest.approx(narrow, rel=0.05)
    assert second.feed_forward.experts.down.std().item() == pytest.approx(narrow, rel=0.05)
    for other in (model.embed, first.attention.kv_compress, second.feed_forward.router):
        assert other.weight.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    "config",
    [
        *(model_config(attention, mtp=2) for attention in (mla(), mla(query_rank=None), gqa())),
        *(config(mtp=2) for config in VARIED.values()),
    ],
)
def test_every_parameter_receives_a_gradient_from_the_losses(config):
    model = transformer(config).requires_grad_(True)
    tokens_BT = random_tokens(4, 12)
    states = model.hidden_states(tokens_BT)
    depths = model.mtp_hidden_states(states, tokens_BT)
    loss = next_token_loss(states.normed_BTD, model.head, tokens_BT)
    (loss + mtp_loss(depths, model.mtp_heads, tokens_BT, [0.3, 0.1])).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_model_on_the_meta_device_runs_without_memory():
    dense = LayerConfig(attention=gqa(), feed_forward=DenseConfig(width=10))
    with torch.device("meta"):
        model = Transformer(model_config(gqa(), layers=(dense, dense)))
        tokens_BT = torch.zeros(2, 5, dtype=torch.int64)
    assert model(tokens_BT).shape == (2, 5, 23)


@pytest.mark.parametrize("logits_to_keep", [0, -2])
def test_keeping_no_logits_is_refused(logits_to_keep):
    model = transformer(model_config(mla()))
    with pytest.raises(ValueError, match=f"logits_to_keep = {logits_to_keep}"):
        model(torch.tensor([[1, 2, 3]]), logits_to_keep=logits_to_keep)


@pytest.mark.parametrize(("rows", "cached_rows"), [(1, 2), (2, 1)])
def test_a_cache_of_another_number_of_rows_is_refused(rows, cached_rows):
    model = transformer(model_config(mla()))
    with pytest.raises(ValueError, match=f"{rows} rows of tokens, but {cached_rows} in the cache"):
        model(torch.ones(rows, 3, dtype=torch.int64), cache=model.make_cache(cached_rows, 8))


@every_model
def test_no_new_tokens_change_nothing(model):
    cache = model.make_cache(2, 8)
    model(torch.ones(2, 3, dtype=torch.int64), cache=cache)
    assert model(torch.ones(2, 0, dtype=torch.int64), cache=cache).shape == (2, 0, 23)
    assert cache.length == 3
