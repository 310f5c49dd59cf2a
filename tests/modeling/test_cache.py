"""A model's cache: all layers alike, its bytes, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import gqa, mla, model_config, random_tokens, rope, softmax_experts, transformer

from modeling import (
    Cache,
    EntryCache,
    LayerConfig,
    ModelConfig,
    Transformer,
    WindowCache,
)
from moe import DenseConfig


def test_truncating_below_what_any_layer_kept_changes_no_layer():
    whole = EntryCache(2, 20, [3])
    windows = [WindowCache(2, 20, [3], window, rollback=2) for window in (9, 4)]
    cache = Cache([whole, *windows])
    for layer in cache.layers:
        layer.append(torch.ones(2, 9, 3).double())
    for lengths in (6, [9, 6], [0, 1]):  # the window of 9 has forgotten nothing yet
        with pytest.raises(ValueError, match=r"row \d cannot .* to \d: .* below \d is forgotten"):
            cache.truncate(lengths)
        assert [layer.lengths for layer in cache.layers] == [[9, 9]] * 3
    cache.truncate([0, 7])
    assert [layer.lengths for layer in cache.layers] == [[0, 7]] * 3
    cache.truncate(0)
    assert cache.length == 0


@pytest.mark.parametrize("attention", [mla(), gqa(), gqa(window=3)], ids=["mla", "gqa", "windows"])
def test_a_model_refuses_tokens_beyond_max_length_and_keeps_its_cache_usable(attention):
    model, tokens_BT = transformer(model_config(attention)), random_tokens(2, 6)
    cache = model.make_cache(2, 6)
    model(tokens_BT[:, :4], cache=cache)
    with pytest.raises(ValueError, match=r"holds 6 positions and 7 are needed"):
        model(tokens_BT[:, :3], cache=cache)
    assert cache.lengths == [4, 4]
    torch.testing.assert_close(model(tokens_BT[:, 4:], cache=cache), model(tokens_BT)[:, 4:])


def test_one_number_truncates_every_row_of_every_layer():
    layers = [EntryCache(2, 8, [3]) for _ in range(3)]
    for layer in layers:
        layer.append(torch.zeros(2, 5, 3))
    cache = Cache(layers)
    assert (cache.length, cache.lengths) == (5, [5, 5])
    cache.truncate(4)
    assert [layer.lengths for layer in layers] == [[4, 4]] * 3
    cache.truncate([1, 3])
    assert [layer.lengths for layer in layers] == [[1, 3]] * 3
    assert cache.length == 3
    with pytest.raises(ValueError, match="row 0"):
        cache.truncate(2)


@given(batch=st.integers(1, 3), length=st.integers(1, 9))
def test_nbytes_is_what_the_tensors_take(batch, length):
    model = transformer(model_config(gqa()), torch.float32)
    cache = model.make_cache(batch, length)
    tensors = [tensor for layer in cache.layers for tensor in layer.tensors]
    assert cache.nbytes == sum(b.numel() * b.element_size() for b in tensors)
    assert cache.nbytes == 3 * batch * length * 2 * (3 * 7) * 4  # layers, keys and values, float32


@given(window=st.integers(1, 9), rollback=st.integers(0, 3))
def test_the_cache_of_a_window_keeps_one_entry_less_and_the_rollback(window, rollback):
    model = transformer(model_config(gqa(window=window)), torch.float32)
    kept = window - 1 + rollback
    for length in (kept, 1000):
        if length:
            cache = model.make_cache(2, length, rollback)
            assert cache.nbytes == 3 * 2 * kept * 2 * (3 * 7) * 4


def published_shape(layers: int, d_model: int, heads: int, query_rank: int | None) -> ModelConfig:
    attention = mla(
        num_heads=heads,
        query_rank=query_rank,
        kv_rank=512,
        nope_width=128,
        value_width=128,
        rope=rope(width=64),
        bias=False,
    )
    dense = LayerConfig(attention=attention, feed_forward=DenseConfig(width=64))
    sparse = LayerConfig(attention=attention, feed_forward=softmax_experts())
    return ModelConfig(
        vocab_size=128,
        d_model=d_model,
        layers=(dense, *[sparse] * (layers - 1)),
        max_length=4096,
    )


@pytest.mark.parametrize(
    ("shape", "bytes_per_token"),
    [((27, 2048, 16, None), 31_104), ((61, 7168, 128, 1536), 70_272)],
    ids=["V2-Lite", "V3"],
)
def test_the_cache_of_published_shapes_takes_the_published_bytes_per_token(shape, bytes_per_token):
    with torch.device("meta"):
        model = Transformer(published_shape(*shape)).to(torch.bfloat16)
    assert model.make_cache(1, 1).nbytes == bytes_per_token
    assert model.make_cache(3, 1000).nbytes == 3000 * bytes_per_token
