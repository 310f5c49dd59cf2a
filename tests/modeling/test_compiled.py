"""Compiled decoding gives the text and the logits of the same model uncompiled."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from tiny import (
    agreeable,
    gqa,
    mla,
    model_config,
    random_tokens,
    windows_and_sinks,
)

from modeling import compile_decoding, generate, generate_batch
from modeling.compiled import REPLACEMENTS, multiply_by_linear, multiply_matrices
from moe import record_routing
from moe.testing import close, noise

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

MODELS = {  # each kind of block takes the compiler some seconds
    "latents": lambda: one_layer(model_config(mla(), 1)),
    "groups": lambda: one_layer(model_config(gqa(qkv_bias=True), 1)),
    "windows, sinks and biases": lambda: one_layer(windows_and_sinks(1)),
}


def one_layer(config):
    """A model of the config's last layer, and of its prediction modules."""
    return agreeable(replace(config, layers=config.layers[-1:]))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled; torch runs them as they are, which takes no C++ compiler."""
    made = []

    def keep(graph, inputs):
        made.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", keep)
    torch.compiler.reset()
    yield made
    torch.compiler.reset()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_text_logits_and_drafts_are_those_of_the_model(make, graphs):
    model = make()
    prompt = random_tokens(1, 5)[0].tolist()
    plain, drafted = (list(generate(model, prompt, 12, draft_tokens=k)) for k in (0, 2))
    compile_decoding(model)
    assert list(generate(model, prompt, 12)) == plain
    number = len(graphs)
    used = {node.target for graph in graphs for node in graph.graph.nodes}
    assert used & set(REPLACEMENTS.values())
    assert not used & set(REPLACEMENTS)
    assert list(generate(model, prompt, 12)) == plain
    assert len(graphs) == number <= 2 * len(model.layers) + 2  # no length is compiled anew
    assert list(generate(model, prompt, 12, draft_tokens=2)) == drafted == plain
    assert generate_batch(model, [prompt, prompt[:3]], 4)[0] == plain[:4]


def decode(model, tokens_BT, begin=0):
    """The logits of tokens that enter one by one, after the first `begin`, which enter together."""
    cache = model.make_cache(*tokens_BT.shape)
    begun = [tokens_BT[:, :begin]] if begin else []
    pieces = *begun, *tokens_BT[:, begin:].split(1, dim=1)
    with torch.no_grad():
        return torch.cat([model(tokens_Bt, cache) for tokens_Bt in pieces], dim=1)


def test_experts_and_heads_of_one_token_are_computed_as_sums(graphs):
    model = one_layer(model_config(mla()))
    tokens_BT = random_tokens(1, 6)
    expected = decode(model, tokens_BT)
    compile_decoding(model)
    close(decode(model, tokens_BT), expected, 1e-10)
    names = {
        node.target.__name__ for g in graphs for node in g.graph.nodes if callable(node.target)
    }
    assert names >= {"multiply_by_linear", "multiply_matrices"}
    assert not names & {"linear", "grouped_mm", "abacus.multiply_segments.default"}


def test_hooks_act_and_more_than_one_token_runs_as_before(graphs):
    model = one_layer(model_config(gqa()))
    tokens_BT = random_tokens(1, 6)
    with record_routing(model) as expected:
        decode(model, tokens_BT)
    compile_decoding(model)
    decode(model, tokens_BT)
    number = len(graphs)
    with record_routing(model) as recorded:
        decode(model, tokens_BT)
    for layer, routing in expected.items():
        close(recorded[layer].weights_NK, routing.weights_NK)
        assert torch.equal(recorded[layer].experts_NK, routing.experts_NK)
    model(tokens_BT, model.make_cache(1, 6))
    decode(model, random_tokens(2, 3))
    model.requires_grad_(True)(tokens_BT[:, :1]).sum().backward()
    assert len(graphs) == number


def test_a_hook_on_every_module_acts_as_well(graphs):
    model, seen = one_layer(model_config(gqa())), []
    compile_decoding(model)
    decode(model, random_tokens(1, 2))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        decode(model, random_tokens(1, 1))
    finally:
        handle.remove()
    assert model.layers[0].feed_forward in seen


def test_copies_have_their_own_weights(graphs):
    model = one_layer(model_config(gqa()))
    tokens_BT = random_tokens(1, 4)
    compile_decoding(model)
    before = decode(model, tokens_BT)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(decode(twin, tokens_BT), before)
        with torch.no_grad():
            twin.head.weight.zero_()
        assert not decode(twin, tokens_BT).any()
    close(decode(model, tokens_BT), before)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1, 3), (2, 3), (2, 1, 3), (0, 3)])
def test_products_of_any_number_of_rows_are_torchs(shape):
    x_I, weight_OI, bias_O = noise(*shape), noise(5, 3, seed=1), noise(5, seed=2)
    for bias in (None, bias_O):
        plain = torch.nn.functional.linear(x_I, weight_OI, bias)
        close(multiply_by_linear(x_I, weight_OI, bias), plain, 1e-12)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        *[((4, 1, 3), (4, 3, 5)), ((4, 5, 3), (4, 3, 1)), ((4, 2, 3), (4, 3, 5))],
        *[
            ((1, 3), (3, 5)),
            ((2, 4, 1, 3), (2, 4, 3, 5)),
            ((4, 1, 3), (1, 3, 1)),
            ((4, 1, 3), (3, 5)),
        ],
    ],
)
def test_products_of_matrices_are_torchs(left, right):
    left, right = noise(*left), noise(*right, seed=1)
    close(multiply_matrices(left, right), left @ right, 1e-12)


def test_torchs_compiler_gives_the_models_logits():
    torch.compiler.reset()
    model, tokens_BT = one_layer(model_config(mla())).float(), random_tokens(1, 6)
    expected = decode(model, tokens_BT, begin=3)
    compile_decoding(model)
    close(decode(model, tokens_BT, begin=3), expected, 1e-5)
