"""Caches of a context: those of a plain prefill, and repeated where the context is long."""

import pytest
import torch
from outside import DecayConfig
from tiny import gqa, mla, model_config, transformer, windows_and_sinks

from modeling.testing import random_tokens
from tools import contexts
from tools.contexts import draw_context, fill_cache, spread_cache

CONFIGS = {
    "mla": model_config(mla()),
    "gqa": model_config(gqa()),
    "windows": windows_and_sinks(),
    "states": model_config(DecayConfig(num_heads=2, head_width=4)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_config
def test_every_row_continues_the_context(config):
    model = transformer(config)
    cache = spread_cache(model, fill_cache(model, 12), 3)
    new_B1 = random_tokens(3, 1)
    for _ in range(2):
        logits_BV = model(new_B1, cache)[:, -1]
        cache.truncate(12)
    whole_BT = torch.cat([draw_context(model, 12).expand(3, -1), new_B1], dim=1)
    torch.testing.assert_close(logits_BV, model(whole_BT)[:, -1])


@every_config
def test_a_long_context_repeats_its_first_entries(config, monkeypatch):
    monkeypatch.setattr(contexts, "LONGEST_PREFILL", 8)
    monkeypatch.setattr(contexts, "REPEATED", 5)
    model = transformer(config)
    cache = fill_cache(model, 23)
    assert draw_context(model, 23).shape == (1, 5)
    for layer in cache.layers:
        if layer.bytes_per_token:
            for tensor in layer.tensors:
                assert tensor[0, :5].any()
                assert torch.equal(tensor[0, 5:23], tensor[0, :5].repeat(4, 1)[:18])
        else:
            assert 0 <= layer.lengths[0] - layer.floors[0] <= 1
    for _ in range(2):
        assert model(random_tokens(1, 1), cache).isfinite().all()
        assert cache.lengths == [24]
        cache.truncate(23)


def test_tokens_are_drawn_from_a_seed():
    model = transformer(model_config(gqa()))
    first, again, other = (contexts.random_tokens(model, 4, 50, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.flatten().tolist()) == set(range(23))
