"""Multi-token prediction: the states of each depth, and the loss over them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    VARIED,
    gqa,
    mla,
    model_config,
    plain_block,
    plain_embedded,
    plain_norm,
    plain_states,
    random_tokens,
    transformer,
)

from modeling import LayerConfig, ModelConfig
from modeling.rope import Positions

CONFIGS = {
    "mla": lambda mtp: model_config(mla(), mtp),
    "mla without query compression": lambda mtp: model_config(mla(query_rank=None), mtp),
    "gqa": lambda mtp: model_config(gqa(), mtp),
    **VARIED,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def plain_mtp_states(model, tokens_T):
    """What the head reads at each depth: DeepSeek-V3, equations 21 to 23, with the embedding first
    and every state after its norm."""
    states_TD, epsilon = plain_states(model, tokens_T), model.config.norm_epsilon
    depths, length = [], len(tokens_T)
    for k, (module, layer) in enumerate(zip(model.mtp.values(), model.config.mtp, strict=True), 1):
        rows = []
        for i in range(length - k):
            embedding_D = plain_embedded(model, tokens_T[i + k])
            first_D = plain_norm(embedding_D, module.embedding_norm.weight, epsilon)
            second_D = plain_norm(states_TD[i], module.state_norm.weight, epsilon)
            rows.append(module.projection.weight @ torch.cat([first_D, second_D]))
        x_TD = plain_block(module.block, layer, epsilon, torch.stack(rows))
        states_TD = plain_norm(x_TD, module.norm.weight, epsilon)
        depths.append(model.config.logits_multiplier * states_TD)
    return depths


@every_config
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_logits_of_each_depth_are_the_written_equations(config, modules):
    model, tokens_BT = transformer(config(modules)), random_tokens(2, 7)
    depths = model.mtp_logits(tokens_BT)
    assert [logits.shape for logits in depths] == [(2, 7 - k, 23) for k in range(1, modules + 1)]
    for row, tokens_T in enumerate(tokens_BT):
        for logits, states_TD in zip(depths, plain_mtp_states(model, tokens_T), strict=True):
            close(logits[row], states_TD @ model.head.weight.T, 1e-4)


def test_a_model_without_modules_has_no_depths():
    model = transformer(model_config(mla()))
    assert model.mtp_logits(random_tokens(1, 3)) == []
    assert model.make_mtp_caches(1, 4) == []


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_text_shorter_than_the_depth_has_no_predictions_there(length):
    model = transformer(model_config(mla(), mtp=3))
    depths = model.mtp_logits(random_tokens(2, length))
    assert [logits.shape[1] for logits in depths] == [max(0, length - k) for k in (1, 2, 3)]


def test_the_projection_reads_the_embedding_first_and_the_state_second():
    """Zeroing its first half makes the module blind to tokens, its second half to states."""
    tokens_BT = random_tokens(1, 6)
    for blinded, seen in ((slice(0, 11), "state"), (slice(11, 22), "embedding")):
        model = transformer(model_config(mla(), mtp=1))
        (module,) = model.mtp.values()
        module.projection.weight[:, blinded] = 0
        x_BTD, positions = model.hidden_states(tokens_BT), Positions(torch.arange(6)[None])
        embedding_BTD = model.embed(tokens_BT)
        before = module(x_BTD, embedding_BTD, positions, None)
        other_state = module(x_BTD.flip(-1), embedding_BTD, positions, None)
        other_embedding = module(x_BTD, embedding_BTD.flip(-1), positions, None)
        assert torch.equal(before, other_state) == (seen == "embedding")
        assert torch.equal(before, other_embedding) == (seen == "state")


def test_swapping_the_halves_of_the_projection_changes_the_logits():
    model, tokens_BT = transformer(model_config(mla(), mtp=1)), random_tokens(1, 6)
    (before,) = model.mtp_logits(tokens_BT)
    (module,) = model.mtp.values()
    module.projection.weight.copy_(module.projection.weight.roll(11, dims=1))
    (after,) = model.mtp_logits(tokens_BT)
    assert (after - before).abs().max() > 1e-2


def test_each_module_is_handed_the_state_after_the_norm_before_the_head():
    model, tokens_BT = transformer(model_config(mla(), mtp=2)), random_tokens(1, 6)
    handed = []
    for module in model.mtp.values():
        module.register_forward_pre_hook(lambda module, inputs: handed.append(inputs[0]))
    model.mtp_logits(tokens_BT)
    first_TD, _ = plain_mtp_states(model, tokens_BT[0])
    close(handed[0][0], plain_states(model, tokens_BT[0])[:5], 1e-4)
    close(handed[1][0], first_TD[:4], 1e-4)


@given(offset=st.integers(0, 200))
def test_a_global_offset_of_the_positions_changes_nothing(offset):
    model, tokens_BT = transformer(model_config(mla(), mtp=1)), random_tokens(1, 6)
    (module,) = model.mtp.values()
    x_BTD, next_BTD = model.hidden_states(tokens_BT)[:, :-1], model.embed(tokens_BT[:, 1:])
    there = module(x_BTD, next_BTD, Positions(torch.arange(5)[None] + offset), None)
    close(there, model.mtp_hidden_states(model.hidden_states(tokens_BT), tokens_BT)[0], 1e-3)


@every_config
@given(cuts=st.sets(st.integers(1, 5)))
def test_a_module_with_a_cache_equals_the_whole_for_every_way_of_cutting(config, cuts):
    model, tokens_BT = transformer(config(1)), random_tokens(2, 7)
    (module,), (cache,) = model.mtp.values(), model.make_mtp_caches(2, 6)
    x_BTD, next_BTD = model.hidden_states(tokens_BT)[:, :-1], model.embedded(tokens_BT[:, 1:])
    states, bounds = [], [0, *sorted(cuts), 6]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        positions = Positions(torch.arange(start, end)[None])
        states.append(module(x_BTD[:, start:end], next_BTD[:, start:end], positions, cache))
    (expected,) = model.mtp_hidden_states(model.hidden_states(tokens_BT), tokens_BT)
    close(torch.cat(states, dim=1) * model.config.logits_multiplier, expected)


@pytest.mark.parametrize("modules", [1, 3])
def test_no_depth_sees_further_than_the_token_it_is_given(modules):
    """Depth k at position i knows tokens 0 to i + k."""
    model, tokens_BT = transformer(model_config(mla(), mtp=modules)), random_tokens(1, 8)
    for t in range(4, 8):
        changed_BT = tokens_BT.clone()
        changed_BT[:, t:] = (changed_BT[:, t:] + 5) % 23
        pairs = zip(model.mtp_logits(tokens_BT), model.mtp_logits(changed_BT), strict=True)
        for k, (before, after) in enumerate(pairs, start=1):
            close(after[:, : t - k], before[:, : t - k], 1e-12)
            assert (after[:, t - k] - before[:, t - k]).abs().max() > 1e-6


@pytest.mark.parametrize("modules", [0, 1, 3])
def test_module_keys_continue_the_layer_numbering(modules):
    for layers in (1, 3):
        config = model_config(mla(), mtp=modules)
        model = transformer(replace(config, layers=config.layers[:layers]))
        assert list(model.mtp) == [str(layers + j) for j in range(modules)]
        prefixes = {name.split(".")[1] for name in model.state_dict() if name[:4] == "mtp."}
        assert prefixes == set(model.mtp)


def test_each_module_has_the_block_that_its_config_describes():
    blocks = model_config(mla()).layers
    config: ModelConfig = replace(
        model_config(gqa()),
        mtp=(blocks[0], LayerConfig(attention=gqa(), feed_forward=blocks[1].feed_forward)),
    )
    first, second = transformer(config).mtp.values()
    assert hasattr(first.block.attention, "kv_compress")
    assert not hasattr(first.block.feed_forward, "router")
    assert hasattr(second.block.attention, "k")
    assert hasattr(second.block.feed_forward, "router")
