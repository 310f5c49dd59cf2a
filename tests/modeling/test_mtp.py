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
    plain_first,
    plain_module,
    plain_mtp_states,
    plain_next,
    plain_states,
    random_tokens,
    transformer,
)

from modeling import LayerConfig, ModelConfig, MTPConfig, Step
from modeling.generation.teacher_forcing import forced_states
from moe import ConfigError
from moe.testing import close

CONFIGS = {
    "mla": lambda mtp: model_config(mla(), mtp),
    "mla without query compression": lambda mtp: model_config(mla(query_rank=None), mtp),
    "gqa": lambda mtp: model_config(gqa(), mtp),
    **VARIED,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def plain_draft_states(model, tokens_T, depths):
    """What the head reads at the last position of each depth, drafting after a text of which the
    last `depths` tokens are what was drafted; every depth computed anew from the whole text."""
    start, count = len(tokens_T) - depths, len(model.mtp)
    known_T = tokens_T[: start + 1]
    read_TD, found = plain_first(model, known_T[:-1]), []
    for k in range(1, min(depths, count) + 1):
        raw_TD, normed_TD = plain_module(model, k, read_TD, tokens_T[k : k + len(read_TD)])
        found.append(normed_TD[-1])
        inputs_TD, read_TD = read_TD, plain_next(model, read_TD, raw_TD, normed_TD)
    carried_D = read_TD[-1:]
    for _ in range(depths - count):
        inputs_TD = torch.cat([inputs_TD, carried_D])
        followers_T = tokens_T[count : count + len(inputs_TD)]
        raw_TD, normed_TD = plain_module(model, count, inputs_TD, followers_T)
        found.append(normed_TD[-1])
        carried_D = plain_next(model, inputs_TD, raw_TD, normed_TD)[-1:]
    return found


@every_config
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_logits_of_each_depth_are_the_written_equations(config, modules):
    model, tokens_BT = transformer(config(modules)), random_tokens(2, 7)
    depths = model.mtp_logits(tokens_BT)
    assert [logits.shape for logits in depths] == [(2, 7 - k, 23) for k in range(1, modules + 1)]
    for row, tokens_T in enumerate(tokens_BT):
        for logits, states_TD in zip(depths, plain_mtp_states(model, tokens_T), strict=True):
            close(logits[row], states_TD @ model.head.weight.T, 1e-4)


WIRINGS = {
    "raw input": {"input": "raw"},
    "raw carry": {"carry": "raw"},
    "raw both": {"input": "raw", "carry": "raw"},
    "main carry": {"carry": "main"},
    "raw main carry": {"input": "raw", "carry": "main"},
    "state first": {"first": "state"},
    "main norm": {"final_norm": "main"},
    "no norm": {"final_norm": "none", "carry": "raw"},
    "all its own": {"own_embedding": True, "own_head": True},
}
every_wiring = pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS.keys())


def wired(wiring, count, attention=None, **changes):
    config = model_config(attention or gqa(), count, **changes)
    return transformer(replace(config, mtp=replace(config.mtp, **wiring)))


@every_wiring
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_wiring_is_what_its_words_say(wiring, count):
    model = wired(wiring, count, logits_multiplier=0.6, embedding_multiplier=1.4)
    tokens_T = random_tokens(1, 8)[0]
    depths = model.mtp_logits(tokens_T[None])
    for module, head, logits, states_TD in zip(
        model.mtp_modules, model.mtp_heads, depths, plain_mtp_states(model, tokens_T), strict=True
    ):
        assert head is (module.head or model.head)
        close(logits[0], states_TD @ head.weight.T, 1e-4)


@every_wiring
def test_every_wiring_computes_something_else(wiring):
    model, usual = wired(wiring, 2), wired({}, 2)
    shared = {name: tensor for name, tensor in usual.state_dict().items()}
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    names = model.state_dict().keys()
    model.load_state_dict({name: own[name] if name in own else shared[name] for name in names})
    tokens_BT = random_tokens(1, 8)
    depths = zip(model.mtp_logits(tokens_BT), usual.mtp_logits(tokens_BT), strict=True)
    differences = [(ours - theirs).abs().max() > 1e-3 for ours, theirs in depths]
    assert differences == [set(wiring) != {"carry"}, True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": "main"},
        {"carry": "held"},
        {"first": "hidden"},
        {"final_norm": "shared"},
        {"own_head": 1},
        {"blocks": 2},
    ],
)
def test_a_wiring_that_is_none_is_refused_by_name(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"MTPConfig\.{name} = {value!r}: must be "):
        MTPConfig(**wrong)


CHAINED = {
    "mla": mla(),
    "gqa": gqa(),
    "windows": gqa(window=3),
    "windows of one": gqa(window=1),
}


@pytest.mark.parametrize("attention", CHAINED.values(), ids=CHAINED.keys())
@pytest.mark.parametrize(("count", "depths"), [(1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (3, 5)])
def test_forced_drafts_are_those_made_where_the_text_ends(attention, count, depths):
    check_forced(wired({}, count, attention), depths)


@every_wiring
@pytest.mark.parametrize(("count", "depths"), [(1, 3), (2, 4)])
def test_forced_drafts_follow_the_wiring(wiring, count, depths):
    check_forced(wired(wiring, count), depths)


def check_forced(model, depths, length=9):
    tokens_T = random_tokens(1, length)[0]
    states = model.hidden_states(tokens_T[None])
    found = forced_states(model, states, tokens_T[None], depths, model.config.mtp)
    assert [tuple(x.shape) for x in found] == [(1, length - k, 11) for k in range(1, depths + 1)]
    # a round that drafts after token n - 1 makes every draft at position n - 2
    for n in range(2, length - depths + 2):
        expected = plain_draft_states(model, tokens_T[: n - 1 + depths], depths)
        for depth_states, state_D in zip(found, expected, strict=True):
            close(depth_states[0, n - 2], state_D, 1e-4)


def test_forced_drafts_take_another_wiring_than_the_models_own():
    model, wiring = wired({}, 1), MTPConfig(input="raw", carry="main")
    tokens_BT = random_tokens(1, 9)
    found = forced_states(model, model.hidden_states(tokens_BT), tokens_BT, 3, wiring)
    model.config = replace(model.config, mtp=replace(model.config.mtp, input="raw", carry="main"))
    again = forced_states(model, model.hidden_states(tokens_BT), tokens_BT, 3, model.config.mtp)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_forced_drafts_of_a_text_that_is_too_short_are_none(length):
    model, tokens_BT = wired({}, 1), random_tokens(1, length)
    found = forced_states(model, model.hidden_states(tokens_BT), tokens_BT, 4, model.config.mtp)
    assert [x.shape[1] for x in found] == [max(0, length - k) for k in range(1, 5)]


def test_more_positions_than_are_done_at_once_make_no_difference(monkeypatch):
    model, tokens_BT = wired({}, 1), random_tokens(1, 11)
    states = model.hidden_states(tokens_BT)
    whole = forced_states(model, states, tokens_BT, 3, model.config.mtp)
    monkeypatch.setattr("modeling.generation.teacher_forcing.POSITIONS_AT_ONCE", 4)
    for ours, theirs in zip(
        forced_states(model, states, tokens_BT, 3, model.config.mtp), whole, strict=True
    ):
        close(ours, theirs)


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
        x_BTD = model.hidden_states(tokens_BT).normed_BTD
        positions = Step(torch.arange(6)[None])
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
    states, next_BT = model.hidden_states(tokens_BT), tokens_BT[:, 1:]
    step = Step(torch.arange(5)[None] + offset, tokens_BT=next_BT)
    there = model.mtp_step(module, states.normed_BTD[:, :-1], step, None)
    close(
        there.normed_BTD,
        model.mtp_hidden_states(model.hidden_states(tokens_BT), tokens_BT)[0],
        1e-3,
    )


@every_config
@given(cuts=st.sets(st.integers(1, 5)))
def test_a_module_with_a_cache_equals_the_whole_for_every_way_of_cutting(config, cuts):
    model, tokens_BT = transformer(config(1)), random_tokens(2, 7)
    (module,), (cache,) = model.mtp.values(), model.make_mtp_caches(2, 6)
    x_BTD, next_BT = model.hidden_states(tokens_BT).normed_BTD[:, :-1], tokens_BT[:, 1:]
    states, bounds = [], [0, *sorted(cuts), 6]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        step = Step.after([start], next_BT[:, start:end])
        states.append(model.mtp_step(module, x_BTD[:, start:end], step, cache).normed_BTD)
    (expected,) = model.mtp_hidden_states(model.hidden_states(tokens_BT), tokens_BT)
    close(torch.cat(states, dim=1), expected)


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
        mtp=MTPConfig(
            blocks=(blocks[0], LayerConfig(attention=gqa(), feed_forward=blocks[1].feed_forward))
        ),
    )
    first, second = transformer(config).mtp.values()
    assert hasattr(first.block.attention, "kv_compress")
    assert not hasattr(first.block.feed_forward, "router")
    assert hasattr(second.block.attention, "k")
    assert hasattr(second.block.feed_forward, "router")
