"""Models in torch's own tools: compile, export, vmap, checkpointing, autocast, meta, fully_shard.

Whatever a tool makes of a model gives what the model gives, and one that needs no values runs
without any. Widths of whole 16 bytes and odd ones go through different products of the experts.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from files import tensors_of, write_tensors
from tiny import (
    VARIED,
    agreeable,
    gqa,
    grouped_experts,
    mla,
    model_config,
    random_tokens,
    randomize,
    rope,
    sized,
    softmax_experts,
    transformer,
    windows_and_sinks,
)
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from checkpoints import load_model, read_config, save_model
from modeling import LayerConfig, Transformer, generate, generate_batch, mtp_loss, next_token_loss
from moe import ExpertChoice, MoEConfig, TopK, TopP, record_routing
from tools.make_tiny import CONFIGS

# under vmap torch runs some operations one by one, or copies their inputs, and warns of it
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted"),
]


def even_widths(attention=None, mtp=0):
    """Two sparse layers whose experts have rows of whole 16 bytes, in bfloat16 too."""
    attention = attention or gqa(head_width=8, rope=rope(width=8, layout="half"))
    kinds = grouped_experts(expert_width=8, shared_width=8), softmax_experts(expert_width=16)
    layers = tuple(LayerConfig(attention=attention, feed_forward=kind) for kind in kinds)
    return sized(layers=layers, d_model=8, mtp=replace(model_config(gqa(), mtp).mtp))


def shortened(config, layers):
    """The last layers alone: tracing each takes its time."""
    return replace(config, layers=config.layers[-layers:])


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


def agree(actual, expected, tolerance=None):
    """Equal up to rounding in their dtype, in units of the largest number."""
    tolerance = tolerance or TOLERANCES[expected.dtype]
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def about(actual, expected, tolerance=0.05):
    """Equal on average: computed in bfloat16 a near-tie may choose another expert for a token."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (actual - expected).abs().mean() <= tolerance * expected.abs().mean()


def equal_in(dtype):
    """How what is computed in this dtype is compared, whatever dtype its result has."""
    return about if dtype == torch.bfloat16 else agree


def all_agree(actual, expected, tolerance=None):
    """`close` of dicts of tensors."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        agree(actual[name], tensor, tolerance)


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- compile


def compiled(function, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


ODD, EVEN = shortened(model_config(mla()), 1), shortened(even_widths(mla()), 1)
SINKS = shortened(windows_and_sinks(), 2)
COMPILED = {
    "odd widths, float32": (ODD, torch.float32, "aot_eager"),
    "odd widths, bfloat16": (ODD, torch.bfloat16, "eager"),
    "odd widths, float64": (ODD, torch.float64, "eager"),
    "even widths, float32": (EVEN, torch.float32, "eager"),
    "even widths, bfloat16": (EVEN, torch.bfloat16, "aot_eager"),
    "windows and sinks, float32": (SINKS, torch.float32, "eager"),
}


@pytest.mark.parametrize(("config", "dtype", "backend"), COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_gives_the_models_logits(config, dtype, backend):
    model = transformer(config, dtype)
    made = compiled(model, backend)
    for seed in (0, 1):  # other tokens choose other experts
        tokens_BT = random_tokens(2, 7, seed=seed)
        equal_in(dtype)(made(tokens_BT), model(tokens_BT))


def test_compiled_prediction_modules_give_the_models_logits():
    model = transformer(shortened(model_config(mla(), mtp=2), 1), torch.float32)
    made = compiled(model.mtp_logits)
    for seed in (0, 1):
        tokens_BT = random_tokens(2, 7, seed=seed)
        expected = model.mtp_logits(tokens_BT)
        assert len(expected) == 2
        for ours, theirs in zip(made(tokens_BT), expected, strict=True):
            agree(ours, theirs)


def test_a_length_that_varies_is_compiled_twice_at_most():
    """For the first length, and for all others."""
    model, graphs = transformer(EVEN, torch.float32), []
    made = compiled(model, lambda graph, inputs: graphs.append(1) or graph)
    for length in (5, 7, 11, 13):
        tokens_BT = random_tokens(2, length)
        agree(made(tokens_BT), model(tokens_BT))
    assert len(graphs) <= 2


TRAINED = {
    "odd widths": (shortened(windows_and_sinks(), 1), torch.float64),
    "even widths": (EVEN, torch.float32),
}


@pytest.mark.parametrize(("config", "dtype"), TRAINED.values(), ids=TRAINED)
def test_gradients_of_a_compiled_model_are_the_models(config, dtype):
    model = transformer(config, dtype).requires_grad_(True)
    made, tokens_BT = compiled(model, "aot_eager"), random_tokens(2, 7)
    found, expected = (gradients_of(model, run(tokens_BT).square().mean()) for run in (made, model))
    assert expected.keys() == dict(model.named_parameters()).keys()
    all_agree(found, expected, 1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("attention", [mla(), gqa(window=3, sinks=True)], ids=["mla", "window"])
def test_compiled_decoding_with_a_cache_gives_the_models_logits(attention):
    """Lengths are numbers, which a graph takes as they are: each step is compiled by itself."""
    model = transformer(shortened(model_config(attention), 1), torch.float32)
    cache, made, tokens_BT = (
        model.make_cache(2, 6, rollback=1),
        compiled(model),
        random_tokens(2, 6),
    )
    parts = [made(part_BT, cache) for part_BT in tokens_BT.split([5, 1], dim=1)]
    whole_BTV = model(tokens_BT)
    agree(torch.cat(parts, dim=1), whole_BTV)
    assert cache.lengths == [6, 6]
    cache.truncate(5)
    agree(made(tokens_BT[:, 5:], cache), whole_BTV[:, 5:])


# --- sparse layers by themselves, whose slots may be empty


ROUTERS = {
    "top-k": TopK(num_experts=5, top_k=2, scoring="softmax"),
    "top-p": TopP(num_experts=5, mass=0.6, max_experts=4),
    "expert choice": ExpertChoice(num_experts=5, capacity=1.5),
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
every_width = pytest.mark.parametrize("width", [8, 5])
WIDE = torch.float32, torch.float64


def sparse_layer(router, width, dtype=torch.float32, seed=0):
    config = MoEConfig(router=router, expert_width=width, shared_width=3, expert_biases=True)
    layer = config.build(width)
    randomize(layer, seed)
    return layer.to(dtype)


def batch_of_rows(width, dtype=torch.float32, rows=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, 6, width, generator=generator).to(dtype)


def assert_slots_are_empty(layer, x_BTD):
    """Unless every token has its K experts, so that what is tested is."""
    empty_NK = layer.router(x_BTD.flatten(0, 1)).experts_NK == layer.router.num_experts
    assert empty_NK.any() == (not isinstance(layer.config.router, TopK))


@every_router
@every_width
def test_a_compiled_sparse_layer_has_the_layers_outputs_and_gradients(router, width):
    layer, x_BTD = sparse_layer(router, width), batch_of_rows(width)
    assert_slots_are_empty(layer, x_BTD)
    made = compiled(layer, "aot_eager")
    agree(made(x_BTD), layer(x_BTD))
    found, expected = (gradients_of(layer, run(x_BTD).square().mean()) for run in (made, layer))
    all_agree(found, expected, 1e-4)


@every_router
@every_width
@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_a_sparse_layer_mapped_over_rows_equals_a_loop(router, width, dtype, in_dim):
    layer, x_BTD = sparse_layer(router, width, dtype), batch_of_rows(width, dtype)
    assert_slots_are_empty(layer, x_BTD)
    mapped_BTD = vmap(layer, in_dim)(x_BTD.movedim(0, in_dim).contiguous())
    equal_in(dtype)(mapped_BTD, torch.stack([layer(x_TD) for x_TD in x_BTD]))


def squared(layer, parameters, inputs):
    return functional_call(layer, parameters, (inputs,)).square().mean()


def check_gradients_by_element(mapped, looped):
    """Of vmap(grad(...)), stacked, and of grad(...) for one element after the other."""
    for i, expected in enumerate(looped):
        all_agree({name: stack[i] for name, stack in mapped.items()}, expected, 1e-4)


@every_router
@every_width
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_gradients_of_a_sparse_layer_per_row_equal_a_loop(router, width, dtype):
    layer, x_BTD = sparse_layer(router, width, dtype), batch_of_rows(width, dtype)
    gradient, parameters = grad(partial(squared, layer), 0), dict(layer.named_parameters())
    mapped = vmap(gradient, (None, 0))(parameters, x_BTD)
    check_gradients_by_element(mapped, [gradient(parameters, x_TD) for x_TD in x_BTD])


@every_router
@every_width
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("part", ["all", "router", "experts"])
def test_sparse_layers_mapped_over_their_weights_equal_a_loop(router, width, dtype, part):
    """An ensemble that sees the same tokens: all weights differ, or those of one part alone."""
    layers = [sparse_layer(router, width, dtype, seed) for seed in range(3)]
    stacked, _ = stack_module_state(layers)
    for name, weights in stacked.items():
        if part != "all" and not name.startswith(part):
            weights.data.copy_(weights[:1].expand_as(weights).clone())
    shared = {n: p[0] for n, p in stacked.items() if part != "all" and not n.startswith(part)}
    mapped = {name: weights for name, weights in stacked.items() if name not in shared}
    (x_TD,) = batch_of_rows(width, dtype, rows=1)

    def run(own):
        return functional_call(layers[0], own | shared, (x_TD,))

    each = [{name: weights[i] for name, weights in mapped.items()} for i in range(3)]
    agree(vmap(run)(mapped), torch.stack([run(own) for own in each]))
    gradient = grad(lambda own: run(own).square().mean())
    check_gradients_by_element(vmap(gradient)(mapped), [gradient(own) for own in each])


# --- export and vmap of whole models


EXPORTED = {"odd widths": ODD, "windows and sinks": SINKS, "even widths": even_widths()}


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_an_exported_model_gives_the_models_logits_for_other_tokens(config):
    model = transformer(config, torch.float32)
    exported = torch.export.export(model, (random_tokens(2, 7),)).module()
    for seed in (1, 2):
        tokens_BT = random_tokens(2, 7, seed=seed)
        agree(exported(tokens_BT), model(tokens_BT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_exported_for_any_length_and_batch_gives_the_models_logits(dtype):
    model = transformer(EVEN, dtype)
    sizes = {0: torch.export.Dim("B", min=1, max=9), 1: torch.export.Dim("T", min=2, max=64)}
    exported = torch.export.export(model, (random_tokens(2, 7),), dynamic_shapes=(sizes,)).module()
    for batch, length in ((2, 7), (3, 5), (1, 2), (5, 31)):
        tokens_BT = random_tokens(batch, length, seed=length)
        equal_in(dtype)(exported(tokens_BT), model(tokens_BT))


MAPPED = EXPORTED | {name: config() for name, config in VARIED.items()}


@pytest.mark.parametrize("config", MAPPED.values(), ids=MAPPED)
@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
def test_a_model_mapped_over_rows_gives_the_rows_logits(config, dtype):
    model, tokens_BT = transformer(config, dtype), random_tokens(3, 7)
    mapped_BTV = vmap(lambda row_T: model(row_T[None])[0])(tokens_BT)
    expected_BTV = torch.cat([model(row_T[None]) for row_T in tokens_BT])
    equal_in(dtype)(mapped_BTV, expected_BTV)


@pytest.mark.parametrize("config", MAPPED.values(), ids=MAPPED)
def test_gradients_of_a_model_per_row_equal_a_loop(config):
    model, tokens_BT = transformer(config), random_tokens(3, 7)
    parameters = dict(model.named_parameters())
    gradient = grad(lambda parameters, row_T: squared(model, parameters, row_T[None]))
    mapped = vmap(gradient, (None, 0))(parameters, tokens_BT)
    check_gradients_by_element(mapped, [gradient(parameters, row_T) for row_T in tokens_BT])


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_an_ensemble_of_models_equals_its_members(config):
    models, tokens_BT = [transformer(config, seed=seed) for seed in range(3)], random_tokens(2, 7)
    mapped = vmap(lambda *state: functional_call(models[0], state, (tokens_BT,)))
    logits = mapped(*stack_module_state(models))
    agree(logits, torch.stack([model(tokens_BT) for model in models]))


def test_unknown_ids_are_refused_wherever_values_can_be_read():
    model = transformer(ODD, torch.float32)
    compiled(model)(random_tokens(2, 7))
    torch.export.export(model, (random_tokens(2, 7),))
    vmap(lambda row_T: model(row_T[None])[0])(random_tokens(2, 7))
    told = r"token id 23 at position 2 of row 1 is outside the vocabulary of 23"
    tokens_BT = torch.tensor([[1, 2, 3], [4, 5, 23]])
    with pytest.raises(ValueError, match=told):
        model(tokens_BT)
    loss = partial(squared, model)
    with pytest.raises(ValueError, match=told):
        grad(loss)(dict(model.named_parameters()), tokens_BT)


# --- activation checkpointing


def checkpoint_blocks(model):
    for block in [*model.layers, *(module.block for module in model.mtp_modules)]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


CHECKPOINTED = {
    "mla": model_config(mla(), mtp=2),
    "windows and sinks": windows_and_sinks(mtp=1),
    "even widths": even_widths(mtp=1),
}


@pytest.mark.parametrize("config", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_blocks_may_be_checkpointed_and_train_and_record_as_they_are(config):
    tokens_BT = random_tokens(2, 9)

    def trained(model):
        model.requires_grad_(True)
        with record_routing(model) as routings:
            states = model.hidden_states(tokens_BT)
            depths = model.mtp_hidden_states(states, tokens_BT)
            loss = next_token_loss(states.normed_BTD, model.head, tokens_BT)
            loss = loss + mtp_loss(depths, model.mtp_heads, tokens_BT, [0.3] * len(depths))
            balance = sum(routing.scores_NE.square().sum() for routing in routings.values())
            gradients = gradients_of(model, loss + balance)
        return routings, gradients

    plain, expected = trained(transformer(config))
    routings, found = trained(checkpoint_blocks(transformer(config)))
    all_agree(found, expected)
    assert routings.keys() == plain.keys()
    for layer, routing in plain.items():
        assert routings[layer].experts_NK.equal(routing.experts_NK)
        agree(routings[layer].weights_NK, routing.weights_NK)


# --- autocast


AUTOCAST = {
    "odd widths": model_config(mla(), mtp=1),
    "windows and sinks": windows_and_sinks(mtp=1),
    "even widths": even_widths(mtp=1),
}
every_autocast = pytest.mark.parametrize("config", AUTOCAST.values(), ids=AUTOCAST)
reduced = partial(torch.autocast, "cpu", torch.bfloat16)


@every_autocast
@pytest.mark.parametrize("length", [1, 9])
def test_under_autocast_routing_is_exactly_that_of_what_routers_read(config, length):
    model, tokens_BT, read = transformer(config, torch.float32), random_tokens(2, length), {}
    with record_routing(model) as plain:
        model(tokens_BT)
    for number, router in plain.routers.items():
        router.register_forward_pre_hook(lambda _, inputs, n=number: read.update({n: inputs[0]}))
    with record_routing(model) as routings, reduced():
        model(tokens_BT)
    assert routings.keys() == read.keys()
    assert len(read) >= 2
    for number, x_ND in read.items():
        router, routing = plain.routers[number], routings[number]
        exact_NE = F.linear(x_ND.float(), router.weight, router.bias)
        assert routing.logits_NE.equal(exact_NE)
        assert not routing.logits_NE.equal(exact_NE.bfloat16().float())
        expected = router.config.route(exact_NE, router.selection_bias)
        assert routing.experts_NK.equal(expected.experts_NK)
        assert routing.weights_NK.equal(expected.weights_NK)


@every_autocast
@pytest.mark.parametrize("length", [1, 9])
def test_under_autocast_logits_are_about_those_without(config, length):
    model, tokens_BT = agreeable_in_float32(config), random_tokens(2, length)
    expected = [model(tokens_BT), *model.mtp_logits(tokens_BT)]
    with reduced():
        assert model.head(model.embed(tokens_BT)).dtype == torch.bfloat16
        found = [model(tokens_BT), *model.mtp_logits(tokens_BT)]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.numel():
            about(ours, theirs)


def agreeable_in_float32(config):
    """Layers that add little, so that it matters less which experts a near-tie chooses."""
    return agreeable(config).float()


@every_autocast
def test_under_autocast_a_training_step_has_about_the_gradients_without(config):
    model, tokens_BT = agreeable_in_float32(config).requires_grad_(True), random_tokens(2, 9)

    def loss():
        states = model.hidden_states(tokens_BT)
        depths = model.mtp_hidden_states(states, tokens_BT)
        main = next_token_loss(states.normed_BTD, model.head, tokens_BT)
        return main + mtp_loss(depths, model.mtp_heads, tokens_BT, [1.0])

    expected = gradients_of(model, loss())
    with reduced():
        found = gradients_of(model, loss())
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    ours, theirs = (torch.cat([g.flatten() for g in x.values()]) for x in (found, expected))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.98


@every_autocast
@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_under_autocast_a_model_generates_about_its_greedy_text(config, draft_tokens):
    model, prompts = agreeable_in_float32(config), [[3, 1, 4], [1, 5]]
    with reduced():
        first = list(generate(model, prompts[0], 8, draft_tokens=draft_tokens))
        texts = generate_batch(model, prompts, 8, draft_tokens=draft_tokens)
    for prompt, text in zip([prompts[0], *prompts], [first, *texts], strict=True):
        assert len(text) == 8
        (logits_TV,) = model(torch.tensor([prompt + text]))
        deciding_tV = logits_TV[len(prompt) - 1 : -1]
        chosen_t = deciding_tV.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert (chosen_t >= deciding_tV.amax(dim=1) - 0.1 * deciding_tV.std()).all()


# --- the meta device


every_tiny = pytest.mark.parametrize("family", sorted(CONFIGS))


@every_tiny
def test_on_the_meta_device_a_model_is_built_undrawn_and_runs_for_shapes(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    config = read_config(tmp_path)
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = Transformer(config)
    assert torch.get_rng_state().equal(before)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    tokens_BT = torch.empty(2, 5, dtype=torch.int64, device="meta")
    cache, V = model.make_cache(2, 6), config.vocab_size
    for logits, T in (
        (model(tokens_BT), 5),
        (model(tokens_BT[:, :1]), 1),
        (model(tokens_BT, cache), 5),
        (model(tokens_BT[:, :1], cache), 1),
        *((depth, 4 - k) for k, depth in enumerate(model.mtp_logits(tokens_BT))),
    ):
        assert (logits.is_meta, logits.shape, logits.dtype) == (True, (2, T, V), torch.float32)
    assert cache.lengths == [6, 6]


def check_loaded_on_meta(path):
    """Names, shapes and dtypes of a real load, nothing in memory, and a forward."""
    real = load_model(path, progress=False)
    model = load_model(path, device="meta", progress=False)
    found, expected = model.state_dict(), real.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        ours = found[name]
        assert (ours.is_meta, ours.shape, ours.dtype) == (True, tensor.shape, tensor.dtype), name
    assert (model.head.weight is model.embed.weight) == (real.head.weight is real.embed.weight)
    logits = model(torch.empty(1, 4, dtype=torch.int64, device="meta"))
    assert (logits.is_meta, logits.shape) == (True, (1, 4, real.config.vocab_size))


@every_tiny
def test_a_checkpoint_is_loaded_on_the_meta_device_for_its_shapes(pristine, family):
    check_loaded_on_meta(pristine(family))


@pytest.mark.filterwarnings("ignore:lm_head.weight differs from the embedding")
def test_a_tied_head_that_is_stored_too_is_loaded_on_the_meta_device(tiny):
    path = tiny("qwen3_moe", tie_word_embeddings=True)
    tensors = tensors_of(path)
    for head in (tensors["model.embed_tokens.weight"].clone(), torch.zeros(320, 42)):
        write_tensors(path, tensors | {"lm_head.weight": head.to(tensors["model.norm.weight"])})
        check_loaded_on_meta(path)


def test_a_quantised_checkpoint_is_loaded_on_the_meta_device(pristine, tmp_path):
    model = load_model(pristine("deepseek_v3"), progress=False)
    save_model(model, tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    check_loaded_on_meta(tmp_path / "fp8")


# --- fully_shard


@pytest.fixture
def process(tmp_path):
    """One process that shards over itself; what is sharded is DTensors all the same."""
    assert not dist.is_initialized()
    store = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard_blocks(model):
    for block in [*model.layers, *(module.block for module in model.mtp_modules)]:
        fully_shard(block)


def shard_root(model):
    fully_shard(model)


def shard_all(model):
    shard_blocks(model)
    fully_shard(model)


OWN = model_config(mla(), mtp=2)
SHARDED = {
    "even widths": even_widths(mtp=2),
    "tied": VARIED["norms of heads and multipliers"](mtp=1),
    "own embedding and head": replace(OWN, mtp=replace(OWN.mtp, own_embedding=True, own_head=True)),
}
every_sharded = pytest.mark.parametrize("config", SHARDED.values(), ids=SHARDED)
WAYS = [shard_blocks, shard_root, shard_all]
every_way = pytest.mark.parametrize("shard", WAYS, ids=lambda way: way.__name__)


def sharded(config, shard):
    model = transformer(config, torch.float32)
    shard(model)
    assert any(hasattr(p, "full_tensor") for p in model.parameters())
    return model


@every_sharded
@every_way
def test_a_sharded_model_gives_the_plain_logits_and_gradients(process, config, shard):
    plain = transformer(config, torch.float32).requires_grad_(True)
    model, tokens_BT = sharded(config, shard).requires_grad_(True), random_tokens(2, 7)
    expected = gradients_of(plain, plain(tokens_BT).square().mean())
    logits_BTV = model(tokens_BT)
    assert logits_BTV.equal(plain(tokens_BT))
    found = gradients_of(model, logits_BTV.square().mean())
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    all_agree(whole, expected)


@every_sharded
@every_way
@pytest.mark.parametrize("forward_first", [False, True])
def test_a_sharded_model_generates_the_plain_text(process, config, shard, forward_first):
    plain, model = transformer(config, torch.float32), sharded(config, shard)
    if forward_first:  # which is when it learns what of it is the root
        model(random_tokens(2, 7))
    prompts = [[3, 1, 4], [1, 5]]
    expected = generate_batch(plain, prompts, 6)
    for draft_tokens in (0, 3):
        assert list(generate(model, prompts[0], 6, draft_tokens=draft_tokens)) == expected[0]
        assert generate_batch(model, prompts, 6, draft_tokens=draft_tokens) == expected


@every_sharded
@every_way
def test_a_sharded_model_is_saved_as_the_plain_one(process, tmp_path, config, shard):
    save_model(transformer(config, torch.float32), tmp_path / "plain")
    save_model(sharded(config, shard), tmp_path / "sharded")
    files = {
        name: {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("plain", "sharded")
    }
    assert "config.json" in files["plain"]
    assert files["sharded"] == files["plain"]


@pytest.mark.parametrize("shard", [shard_root, shard_all], ids=lambda way: way.__name__)
def test_methods_beside_forward_of_a_sharded_model_say_what_to_do(process, shard):
    config, tokens_BT = SHARDED["even widths"], random_tokens(2, 7)
    plain, model = transformer(config, torch.float32), sharded(config, shard)
    told = r"^the model is sharded: call model.unshard\(\) before this method$"
    for method in ("hidden_states", "mtp_logits"):
        with pytest.raises(ValueError, match=told):
            getattr(model, method)(tokens_BT)
    model.unshard()
    assert model.hidden_states(tokens_BT).normed_BTD.equal(plain.hidden_states(tokens_BT)[1])
    for ours, theirs in zip(model.mtp_logits(tokens_BT), plain.mtp_logits(tokens_BT), strict=True):
        assert ours.equal(theirs)
    model.reshard()
    assert list(generate(model, [1, 2], 3)) == list(generate(plain, [1, 2], 3))
    with pytest.raises(ValueError, match=told):  # generation has sharded it again
        model.hidden_states(tokens_BT)


def test_an_mtp_module_that_is_sharded_as_a_whole_is_refused(process):
    model = transformer(SHARDED["even widths"], torch.float32)
    for module in [*model.layers, *model.mtp_modules, model]:
        fully_shard(module)
    assert len(list(generate(model, [3, 1, 4], 6))) == 6
    told = r"^an MTP module is sharded as a whole: shard its block, not the module$"
    with pytest.raises(ValueError, match=told):
        list(generate(model, [3, 1, 4], 6, draft_tokens=3))


def test_a_loss_of_states_trains_an_unsharded_model_as_the_plain_one(process):
    config, tokens_BT = SHARDED["even widths"], random_tokens(2, 7)

    def trained(model):
        states = model.hidden_states(tokens_BT)
        depths = model.mtp_hidden_states(states, tokens_BT)
        loss = next_token_loss(states.normed_BTD, model.head, tokens_BT)
        loss = loss + mtp_loss(depths, model.mtp_heads, tokens_BT, [0.3, 0.2])
        return gradients_of(model, loss)

    expected = trained(transformer(config, torch.float32).requires_grad_(True))
    model = sharded(config, shard_blocks).requires_grad_(True)
    found = {
        n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in trained(model).items()
    }
    all_agree(found, expected)
