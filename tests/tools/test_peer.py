"""The peer: the same steps from the same context give the same logits in every setting."""

import importlib

import pytest
import torch

from checkpoints import load_model
from modeling.testing import random_tokens
from tools import peer
from tools.contexts import fill_cache, spread_cache
from tools.peer import PEER, Peer, import_transformers, restored

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@torch.inference_mode()
def test_both_decode_from_the_same_context(pristine, family):
    model, other = load_model(pristine(family)), Peer(pristine(family), CPU, torch.float32)
    held, peer_held = fill_cache(model, 21), other.fill_cache(model, 21)
    cache, peer_cache = spread_cache(model, held, 2), other.spread_cache(peer_held, 2)
    assert peer_held.get_seq_length() == 21
    assert ("eager", "eager") in other.options
    for seed in (0, 1):
        new_B1 = random_tokens(2, 1, 300, seed)
        ours = model(new_B1, cache)
        cache.truncate(21)
        for option in other.options:
            other.choose(option)
            with restored(peer_cache):
                theirs = other.model(new_B1, past_key_values=peer_cache).logits
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_long_context_repeats_its_first_entries(pristine, monkeypatch):
    monkeypatch.setattr("tools.contexts.LONGEST_PREFILL", 16)
    monkeypatch.setattr("tools.contexts.REPEATED", 10)
    model, other = load_model(pristine("gpt_oss")), Peer(pristine("gpt_oss"), CPU, torch.float32)
    cache = other.fill_cache(model, 50)
    assert cache.get_seq_length() == 50
    for layer in cache.layers:
        kept = min(50, layer.sliding_window - 1) if layer.is_sliding else 50
        assert layer.keys.shape[2] == layer.values.shape[2] == kept
        if not layer.is_sliding:
            assert torch.equal(layer.keys[:, :, 10:20], layer.keys[:, :, :10])
    tokens_RBT = random_tokens(3, 2, 300).view(3, 2, 1)
    for contender in other.decoding_contenders(tokens_RBT, cache).values():
        assert contender.rival
        assert contender.step(0) > 0
    assert cache.get_seq_length() == 50


def test_a_setting_that_does_not_run_is_no_contender(pristine):
    other = Peer(pristine(), CPU, torch.float32)
    other.keep_options(lambda: torch.zeros(2) @ torch.zeros(3 - (chosen(other) == "eager")))
    assert {experts for experts, _ in other.options} == {"eager"}
    tokens_RBT = random_tokens(1, 5, 300)[None]
    assert list(other.prefill_contenders(tokens_RBT)) == [
        f"{PEER}, eager experts, eager attention",
        f"{PEER}, eager experts, sdpa attention",
    ]


def chosen(other):
    return other.model.config._experts_implementation


def test_every_contender_runs_with_its_own_setting(pristine, monkeypatch):
    other, used = Peer(pristine(), CPU, torch.float32), []

    def forward(*_):
        used.append((chosen(other), other.model.config._attn_implementation))
        return 1.0

    monkeypatch.setattr(other, "time_forward", forward)
    contenders = other.prefill_contenders(random_tokens(1, 5, 300)[None])
    for contender in reversed(contenders.values()):
        contender.step(0)
    assert used == other.options[::-1]
    assert len(set(used)) == 4


def test_a_missing_installation_is_told(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match="pip install 'transformers"):
        import_transformers()
    assert peer.importlib is importlib


def test_a_model_unknown_to_transformers_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ValueError, match="transformers cannot load it"):
        Peer(tmp_path, CPU, torch.float32)
