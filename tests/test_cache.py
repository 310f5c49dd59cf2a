"""The cache against lists of entries: what it holds, what it refuses, how much memory it takes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import gqa, mla, model_config, random_tokens, rope, softmax_experts, transformer

from modeling import Cache, DenseConfig, LayerCache, LayerConfig, ModelConfig, Transformer

WIDTHS, MAX_LENGTH = [2, 3], 9
steps = st.lists(
    st.one_of(st.integers(1, 4), st.lists(st.floats(0, 1), min_size=3, max_size=3)), max_size=8
)


@given(batch=st.integers(1, 3), steps=steps)
def test_a_layer_cache_holds_what_lists_of_entries_would(batch, steps):
    """A step appends this many entries to every row, or cuts each row to a share of its length."""
    cache = LayerCache(batch, MAX_LENGTH, WIDTHS, like=torch.zeros(1).double())
    lists = [[] for _ in range(batch)]
    for number, step in enumerate(steps):
        if isinstance(step, list):
            lengths = [int(share * len(row)) for share, row in zip(step, lists, strict=False)]
            cache.truncate(lengths)
            lists = [row[:length] for row, length in zip(lists, lengths, strict=True)]
        elif max(map(len, lists)) + step > MAX_LENGTH:
            with pytest.raises(ValueError, match="max_length"):
                cache.append(*(torch.zeros(batch, step, width).double() for width in WIDTHS))
        else:
            shapes = [(batch, step, width) for width in WIDTHS]
            new = [torch.arange(math.prod(s)).view(s).double() + 100 * number for s in shapes]
            for row, *entries in zip(lists, *new, strict=True):
                row.extend(zip(*entries, strict=True))
            held = cache.append(*new)
            longest = max(map(len, lists))
            assert [tuple(h.shape) for h in held] == [(batch, longest, width) for width in WIDTHS]
            for b, row in enumerate(lists):
                for part, h in enumerate(held):
                    expected = torch.stack([entry[part] for entry in row])
                    assert torch.equal(h[b, : len(row)], expected)
                    assert h[b].isfinite().all()
        assert cache.lengths == [len(row) for row in lists]


@pytest.mark.parametrize("lengths", [[6, 6], [2, 6]])
def test_more_than_max_length_is_refused_with_the_numbers_and_without_a_trace(lengths):
    cache = LayerCache(2, 8, [3], like=torch.zeros(1))
    cache.append(torch.ones(2, 6, 3))
    cache.truncate(lengths)
    with pytest.raises(ValueError, match="max_length") as caught:
        cache.append(torch.zeros(2, 3, 3))
    assert "8" in str(caught.value)
    assert "9" in str(caught.value)
    assert cache.lengths == lengths
    assert (cache.buffers[0][:, :6] == 1).all()


@pytest.mark.parametrize("attention", [mla(), gqa()], ids=["mla", "gqa"])
def test_a_model_refuses_tokens_beyond_max_length_and_keeps_its_cache_usable(attention):
    model, tokens_BT = transformer(model_config(attention)), random_tokens(2, 6)
    cache = model.make_cache(2, 6)
    model(tokens_BT[:, :4], cache=cache)
    with pytest.raises(ValueError, match=r"holds 6 positions and 7 are needed"):
        model(tokens_BT[:, :3], cache=cache)
    assert cache.lengths == [4, 4]
    torch.testing.assert_close(model(tokens_BT[:, 4:], cache=cache), model(tokens_BT)[:, 4:])


@pytest.mark.parametrize(
    ("lengths", "told"),
    [([4, 3], "row 1 holds 2 positions.* 3"), ([-1, 2], "row 0 holds 4 positions.* -1")],
)
def test_truncating_forward_or_below_zero_is_refused(lengths, told):
    cache = LayerCache(2, 8, [3], like=torch.zeros(1))
    cache.append(torch.zeros(2, 4, 3))
    cache.truncate([4, 2])
    with pytest.raises(ValueError, match=told):
        cache.truncate(lengths)
    assert cache.lengths == [4, 2]


def test_truncating_another_number_of_rows_is_refused():
    cache = LayerCache(2, 8, [3], like=torch.zeros(1))
    with pytest.raises(ValueError, match="argument|rows"):
        cache.truncate([0])


def test_one_number_truncates_every_row_of_every_layer():
    layers = [LayerCache(2, 8, [3], like=torch.zeros(1)) for _ in range(3)]
    for layer in layers:
        layer.append(torch.zeros(2, 5, 3))
    cache = Cache(layers)
    assert (cache.length, cache.lengths, cache.max_length) == (5, [5, 5], 8)
    cache.truncate(4)
    assert [layer.lengths for layer in layers] == [[4, 4]] * 3
    cache.truncate([1, 3])
    assert [layer.lengths for layer in layers] == [[1, 3]] * 3
    assert cache.length == 3
    with pytest.raises(ValueError, match="row 0"):
        cache.truncate(2)


@given(batch=st.integers(1, 3), length=st.integers(1, 9))
def test_nbytes_is_what_the_buffers_take(batch, length):
    model = transformer(model_config(gqa()), torch.float32)
    cache = model.make_cache(batch, length)
    buffers = [buffer for layer in cache.layers for buffer in layer.buffers]
    assert cache.nbytes == sum(b.numel() * b.element_size() for b in buffers)
    assert cache.nbytes == 3 * batch * length * 2 * (3 * 7) * 4  # layers, keys and values, float32


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


def test_impossible_caches_and_truncations_are_refused_by_name():
    with pytest.raises(ValueError, match="0 rows and 4 positions"):
        LayerCache(0, 4, [3], like=torch.zeros(1))
    with pytest.raises(ValueError, match="1 lengths for a cache of 2 rows"):
        LayerCache(2, 4, [3], like=torch.zeros(1)).truncate([0])
