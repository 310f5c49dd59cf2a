"""Parts from outside the package take part in everything: training, files, drafts, recording.

The model has a recurrent attention, a router with empty slots and a feed-forward layer that the
package has never heard of, beside parts of its own.
"""

from dataclasses import replace

import pytest
import torch
from outside import CLASSES, CosineRouterConfig, DecayConfig, SquaredConfig
from tiny import agreeable, gqa, mla, modules, random_tokens, sized, softmax_experts, transformer
from torch import nn

from checkpoints import CheckpointError, convert, load_model, save_model
from modeling import (
    LayerConfig,
    Transformer,
    generate,
    generate_batch,
    mtp_loss,
    next_token_loss,
)
from modeling.testing import check_attention, check_model
from moe import MoEConfig, expert_load, record_routing, routers, sequence_balance_loss
from moe.testing import check_feed_forward, check_router, close
from tools.describe import describe_checkpoint

DECAY = DecayConfig(num_heads=2, head_width=3)
ROUTER = CosineRouterConfig(num_experts=5, slots=3, least_cosine=-0.1)
SPARSE = MoEConfig(router=ROUTER, expert_width=6, shared_width=4)


def config(mtp: int = 0):
    layers = (
        LayerConfig(attention=DECAY, feed_forward=SquaredConfig(width=7, leak=0.1)),
        LayerConfig(attention=mla(), feed_forward=SPARSE),
        LayerConfig(attention=DECAY, feed_forward=SPARSE),
        LayerConfig(attention=gqa(window=3), feed_forward=softmax_experts()),
    )
    return sized(layers=layers, mtp=modules(layers[2:3], mtp))


@pytest.mark.parametrize("mtp", [0, 1])
def test_twenty_steps_of_training_lower_the_loss_and_the_file_holds_what_was_trained(mtp, tmp_path):
    torch.manual_seed(0)
    model = Transformer(config(mtp))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    tokens_BT, losses = random_tokens(4, 12), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(20):
        with record_routing(model) as routings:
            states = model.hidden_states(tokens_BT)
            loss = next_token_loss(states.normed_BTD, model.head, tokens_BT)
            if mtp:
                depths = model.mtp_hidden_states(states, tokens_BT)
                loss = loss + mtp_loss(depths, model.mtp_heads, tokens_BT, [0.3] * mtp)
        balance = sum(
            sequence_balance_loss(routing, 4) for routing in routings.values() if mtp == 0
        )
        (loss + 0.01 * balance).backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        for layer, router in routings.routers.items():
            if router.selection_bias is not None:
                load_E = expert_load(routings[layer])
                router.selection_bias.sub_(1e-3 * (load_E - load_E.mean()).sign())
    assert losses[-1] < 0.8 * losses[0]
    assert {1, 2, 3} <= routings.keys()
    unchanged = [n for n, tensor in model.state_dict().items() if tensor.equal(before[n])]
    assert unchanged == []
    save_model(model.requires_grad_(False), tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", classes=CLASSES, progress=False)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor)
    assert loaded(tokens_BT).equal(model(tokens_BT))


def test_a_file_that_names_them_is_refused_unless_they_are_named_too(tmp_path):
    save_model(Transformer(config()).requires_grad_(False), tmp_path / "saved")
    for classes in ([], CLASSES[1:], CLASSES[:1]):
        with pytest.raises(CheckpointError, match=r"config.json: model.layers.*classes="):
            load_model(tmp_path / "saved", classes=classes)


@pytest.mark.parametrize("drafts", [1, 2, 4, "auto"])
@pytest.mark.parametrize("count", [1, 2])
def test_drafting_changes_no_token(drafts, count):
    model, prompts = agreeable(config(count), 0.3), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    plain = [list(generate(model, prompt, 14)) for prompt in prompts]
    kept = made = 0
    for prompt, expected in zip(prompts, plain, strict=True):
        generation = generate(model, prompt, 14, draft_tokens=drafts)
        assert list(generation) == expected
        kept += sum(generation.statistics.accepted)
        made += sum(generation.statistics.drafted)
    assert made > kept > 0 or drafts == "auto"
    assert generate_batch(model, prompts, 14, draft_tokens=drafts) == plain


def test_each_part_and_a_model_of_them_keep_the_contracts():
    check_attention(DECAY)
    check_router(ROUTER)
    check_feed_forward(SquaredConfig(width=7, leak=0.1))
    check_model(config(mtp=1))


def test_its_bytes_are_told_as_constant_and_growing_ones(tmp_path):
    model = transformer(config(), torch.float32)
    cache = model.make_cache(3, 50)
    state, latent, window = 2 * 3 * 3 + 2 * 3, 6 + 4, 2 * 2 * 21
    assert cache.bytes_per_token == latent * 4
    assert cache.constant_bytes == (2 * state + window) * 4
    assert cache.nbytes == 3 * (50 * cache.bytes_per_token + cache.constant_bytes)
    statistics = (generation := generate(model, [1, 2], 3)).statistics
    list(generation)
    assert statistics.cache_bytes_per_token == latent * 4
    assert statistics.cache_constant_bytes == (2 * state + window) * 4
    save_model(model, tmp_path / "saved")


def test_its_routers_are_found_and_recorded():
    model, tokens_BT = transformer(config()), random_tokens(2, 6)
    assert list(routers(model)) == [1, 2, 3]
    with record_routing(model) as routings:
        model(tokens_BT)
    assert list(routings) == [1, 2, 3]
    empty = (routings[1].experts_NK == 5).sum()
    assert 0 < empty < 36
    assert expert_load(routings[1]).mean().item() == pytest.approx(1)


def test_commands_that_know_no_such_class_say_so_and_convert_takes_it_where_it_is_named(tmp_path):
    save_model(transformer(config(), torch.float32), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="'DecayConfig' is no config of this pack"):
        describe_checkpoint(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "half", torch.bfloat16, classes=CLASSES, progress=False)
    loaded = load_model(tmp_path / "half", classes=CLASSES, progress=False)
    assert loaded.dtype == torch.bfloat16


def test_fp8_asks_every_part_whether_its_matrices_may_be_quantised(tmp_path, monkeypatch):
    model, fp8 = transformer(config(), torch.float32), torch.float8_e4m3fn
    save_model(model, tmp_path / "saved", dtype=fp8)
    loaded = load_model(tmp_path / "saved", classes=CLASSES, dtype=torch.float32, progress=False)
    same = {n for n, tensor in model.state_dict().items() if tensor.equal(loaded.state_dict()[n])}
    assert {"layers.1.feed_forward.router.directions", "layers.0.attention.decay"} <= same
    assert not {"layers.0.attention.qkv.weight", "layers.1.feed_forward.experts.up"} & same
    monkeypatch.delattr("outside.CosineRouter.quantizable")
    with pytest.raises(CheckpointError, match=r"layers.1.feed_forward.router, a CosineRouter"):
        save_model(model, tmp_path / "other", dtype=fp8)
    assert not (tmp_path / "other").exists()


def test_a_parameter_that_nobody_draws_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr("outside.Squared.reset_parameters", lambda self: None)
    with pytest.raises(TypeError, match=r"layers.0.feed_forward, a Squared, has .* not set scale"):
        Transformer(config())


def test_a_module_without_reset_parameters_is_an_error_too():
    class Bare(SquaredConfig):
        def build(self, d_model):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.zeros(d_model))
            return layer

    layer = replace(config().layers[0], feed_forward=Bare(width=3))
    with pytest.raises(TypeError, match=r"layers.0.feed_forward, a Module, owns weight and has no"):
        Transformer(sized(layers=(layer,)))


@pytest.mark.parametrize("backend", ["eager"])
def test_it_compiles_whole(backend):
    model, tokens_BT = transformer(config(), torch.float32), random_tokens(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    close(compiled(tokens_BT), model(tokens_BT), 1e-5)
