"""Our logits are those of transformers, through its files and our loader, however fed.

Every variant of every family that transformers has, recorded attention and states included;
`pytest tests/checkpoints/test_parity.py -rP` prints the differences as a table, in units of the
logits' standard deviation.
"""

import pytest
import torch
from published import family_tests, relative_difference, reload_peer, write_peer

from checkpoints import load_model, save_model
from modeling import GQAConfig, Transformer, record_attention, record_states
from moe import Router, record_routing

BOUND = 1e-4
LENGTH, CHUNKS = 41, [5, 1, 20, 15]
WAYS = ("whole", "chunks", "steps", "reloaded")
CASES = [
    pytest.param(family, variant, id=f"{family.MODEL_TYPES[0]}: {variant}")
    for family in family_tests()
    for variant in family.PEERS
]


@pytest.fixture(scope="module")
def table():
    """The differences found, by test; printed behind the last one."""
    rows: dict[str, dict[str, float]] = {}
    yield rows
    width = max(map(len, rows), default=0)
    print(f"\n{'':{width}}  " + "  ".join(f"{way:>8}" for way in WAYS))
    for case, found in rows.items():
        print(f"{case:{width}}  " + "  ".join(f"{found[way]:8.1e}" for way in WAYS))


@pytest.mark.filterwarnings("ignore:the config announces")
@pytest.mark.parametrize(("family", "variant"), CASES)
@torch.no_grad()
def test_logits_and_chosen_experts_equal_those_of_transformers(tmp_path, table, family, variant):
    peer = write_peer(family, variant, tmp_path / "peer")
    model = load_model(tmp_path / "peer", progress=False)
    check_telling(model)
    generator = torch.Generator().manual_seed(7)
    tokens_BT = torch.randint(model.config.vocab_size, (2, LENGTH), generator=generator)
    expected, expected_experts = outputs_and_experts(peer, tokens_BT)
    expected_BTV = expected.logits
    assert expected_BTV.std() > 0.1

    with (
        record_routing(model) as routings,
        record_attention(model) as whole,
        record_states(model) as states,
    ):
        whole_BTV = model(tokens_BT)
    with record_attention(model) as in_pieces:
        chunks_BTV = cached(model, tokens_BT, CHUNKS)
    save_model(model, tmp_path / "ours")
    again, info = reload_peer(family, tmp_path / "ours")
    assert not any(info.values()), info
    found = {
        "whole": whole_BTV,
        "chunks": chunks_BTV,
        "steps": cached(model, tokens_BT, [1] * LENGTH),
        "reloaded": again(tokens_BT).logits,
    }
    table[f"{family.MODEL_TYPES[0]}: {variant}"] = differences = {
        way: relative_difference(logits_BTV, expected_BTV) for way, logits_BTV in found.items()
    }
    assert max(differences.values()) < BOUND, differences
    assert len(routings) == len(expected_experts) > 0
    for routing, expected_NK in zip(routings.values(), expected_experts, strict=True):
        assert routing.experts_NK.sort().values.equal(expected_NK.sort().values)
    for attention in (whole, in_pieces):
        check_attention(attention, expected.attentions)
    check_states(model, states, expected.hidden_states)


def check_attention(recorded, attentions):
    """The weights of every layer, to 1e-5."""
    assert list(recorded) == list(range(len(attentions)))
    for layer, expected_BHTS in enumerate(attentions):
        weights_BHTS = recorded[layer].weights_BHTS
        torch.testing.assert_close(weights_BHTS, expected_BHTS, rtol=0, atol=1e-5)
        assert expected_BHTS[..., -1, :].max() > 3 / LENGTH  # they are uneven


def check_states(model, recorded, hidden_states):
    """What enters each layer, and the last one's output, which transformers gives normed."""
    *entering, last_BTD = hidden_states
    for layer, expected_BTD in enumerate(entering):
        assert relative_difference(recorded[layer].before_BTD, expected_BTD) < BOUND, layer
    normed_BTD = model.norm(recorded[len(entering) - 1].after_BTD)
    assert relative_difference(normed_BTD, last_BTD) < BOUND


def outputs_and_experts(peer, tokens_BT):
    """Of transformers; the experts as its routers return them, behind logits and weights."""
    recorder = peer.get_decoder()._can_record_outputs["router_logits"]
    routers = [m for m in peer.modules() if isinstance(m, recorder.target_class)]
    chosen: dict[int, torch.Tensor] = {}
    for i, router in enumerate(routers):
        router.register_forward_hook(lambda m, x, out, i=i: chosen.__setitem__(i, out[2]))
    outputs = peer(tokens_BT, output_attentions=True, output_hidden_states=True)
    return outputs, [chosen[i] for i in range(len(routers))]


def cached(model: Transformer, tokens_BT, lengths: list[int]):
    """Logits of tokens that come in pieces of these lengths."""
    cache = model.make_cache(len(tokens_BT), LENGTH)
    pieces = [model(piece_BT, cache=cache) for piece_BT in tokens_BT.split(lengths, dim=1)]
    return torch.cat(pieces, dim=1)


def check_telling(model: Transformer) -> None:
    """Windows end within the text, and biases of both signs tell excluded groups from bad ones."""
    attentions = [layer.attention for layer in model.config.layers]
    windows = [a.window for a in attentions if isinstance(a, GQAConfig) and a.window]
    assert max(windows, default=0) < LENGTH
    routers = [module for module in model.modules() if isinstance(module, Router)]
    biases = [router.selection_bias for router in routers if router.selection_bias is not None]
    if biases:
        assert torch.cat(biases).min() < -0.1
        assert torch.cat(biases).max() > 0
