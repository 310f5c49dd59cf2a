"""Recorded attention is what the fast kernels use; recorded states are the residual stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outside import DecayConfig
from tiny import (
    VARIED,
    gqa,
    mla,
    model_config,
    plain_block,
    plain_embedded,
    random_tokens,
    sized,
    softmax_experts,
    transformer,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling import (
    AttentionWeights,
    LayerConfig,
    generate,
    record_attention,
    record_states,
    report_weights,
)
from modeling.attention import dot_product
from modeling.attention import gqa as gqa_file
from modeling.attention import mla as mla_file
from moe.testing import close

MODELS = {
    "mla": transformer(model_config(mla(), mtp=2)),
    "gqa": transformer(model_config(gqa(), mtp=1)),
    **{name: transformer(config(mtp=1)) for name, config in VARIED.items()},
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def feed(model, tokens_BT, cuts):
    cache = model.make_cache(*tokens_BT.shape)
    return torch.cat([model(piece, cache) for piece in tokens_BT.tensor_split(cuts, dim=1)], dim=1)


FORMS = {"expanded": False, "absorbed": True}


@pytest.mark.parametrize("form", FORMS)
@every_model
@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, 6)))
def test_the_plain_twin_computes_what_the_kernels_do(model, form, cuts):
    """Every output of a kernel is the twin's weights times the values it was given."""
    checked = []

    def checking(kernel):
        def attend(q_BHTP, k_BJSP, v_BJSM, step, keys_BS, scale, window=None, *sinks):
            y_BHTM = kernel(q_BHTP, k_BJSP, v_BJSM, step, keys_BS, scale, window, *sinks)
            twin = dot_product.attention_weights(
                q_BHTP, k_BJSP, step, keys_BS, scale, window, *sinks
            )
            groups = q_BHTP.shape[1] // k_BJSP.shape[1]
            close(y_BHTM, twin.weights_BHTS @ v_BJSM.repeat_interleave(groups, dim=1))
            checked.append(twin)
            return y_BHTM

        return attend

    with pytest.MonkeyPatch.context() as patched:
        for file in (gqa_file, mla_file):
            patched.setattr(file, "attend", checking(file.attend))
        patched.setattr(mla_file, "absorbing_pays", lambda *sizes: FORMS[form])
        feed(model, random_tokens(2, 7), sorted(cuts))
    assert checked


@every_model
@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, 6)))
def test_weights_are_the_same_whole_in_pieces_and_in_either_form(model, cuts):
    tokens_BT, recorded = random_tokens(2, 7), []
    with record_attention(model) as whole:
        model.mtp_logits(tokens_BT)
    for absorbed in (False, True):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(mla_file, "absorbing_pays", lambda *sizes, a=absorbed: a)
            with record_attention(model) as in_pieces:
                feed(model, tokens_BT, sorted(cuts))
        recorded.append(in_pieces)
    assert list(whole) == list(range(len(model.layers) + len(model.mtp)))
    for in_pieces in recorded:
        assert list(in_pieces) == list(range(len(model.layers)))
        for layer, weights in in_pieces.items():
            assert weights.weights_BHTS.shape[2:] == (7, 7)
            close(weights.weights_BHTS, whole[layer].weights_BHTS)
            if weights.sinks_BHT is not None:
                close(weights.sinks_BHT, whole[layer].sinks_BHT)


@every_model
def test_the_weights_of_a_query_sum_to_one_with_its_sink_and_see_no_future(model):
    with record_attention(model) as recorded:
        model(random_tokens(2, 7))
    for layer, weights in recorded.items():
        window = getattr(model.config.layers[layer].attention, "window", None)
        seen_TS = torch.ones(7, 7, dtype=torch.bool).tril()
        if window is not None:
            seen_TS = seen_TS.triu(1 - window)
        assert ((weights.weights_BHTS > 0) == seen_TS).all()
        sinks = 0 if weights.sinks_BHT is None else weights.sinks_BHT
        total_BHT = weights.weights_BHTS.sum(dim=-1) + sinks
        close(total_BHT, torch.ones_like(total_BHT))


@every_model
@settings(max_examples=10)
@given(counts=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=3))
def test_padding_attends_to_nothing_and_columns_are_positions(model, counts):
    texts = random_tokens(2, 9)
    cache, starts = model.make_cache(2, 9), [0, 0]
    with record_attention(model) as recorded:
        for ends in counts:
            rows = [texts[row, s : s + 3] for row, s in enumerate(starts)]
            padded = [torch.cat([r, r.new_zeros(3 - len(r))]) for r in rows]
            model.hidden_states(torch.stack(padded), cache, ends)
            starts = [s + n for s, n in zip(starts, ends, strict=True)]
    with record_attention(model) as alone:
        model(texts)
    for layer, weights in recorded.items():
        S = weights.weights_BHTS.shape[-1]
        assert max(starts) == S
        for row in range(2):
            queries, real = [], 0
            for forward, ends in enumerate(counts):
                for t in range(3):
                    found_HS = weights.weights_BHTS[row, :, 3 * forward + t]
                    if t < ends[row]:
                        close(found_HS, alone[layer].weights_BHTS[row, :, real, :S])
                        queries, real = [*queries, real], real + 1
                    else:
                        assert not found_HS.any()


def test_recording_changes_no_result_and_leaves_nothing_behind():
    model, tokens_BT = MODELS["windows and sinks"], random_tokens(2, 7)
    before = model(tokens_BT)
    with record_attention(model), record_states(model):
        assert model(tokens_BT).equal(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_where_each_query_stands_is_recorded():
    model = MODELS["gqa"]
    cache = model.make_cache(2, 9)
    with record_attention(model) as recorded:
        model.hidden_states(random_tokens(2, 3), cache, [3, 1])
        model.hidden_states(random_tokens(2, 2), cache, [0, 2])
    assert recorded[1].positions_BT.tolist() == [[0, 1, 2, -1, -1], [0, -1, -1, 1, 2]]


def test_one_layer_can_be_recorded_alone_and_others_compute_no_weights(monkeypatch):
    model, made = MODELS["gqa"], []
    twin = dot_product.attention_weights
    monkeypatch.setattr(
        dot_product, "attention_weights", lambda *args: made.append(1) or twin(*args)
    )
    with record_attention(model.layers[0]) as first, record_attention(model) as all_layers:
        model(random_tokens(1, 4))
    assert len(made) == 3
    with record_attention(model.layers[0]) as alone:
        model(random_tokens(1, 4))
    assert len(made) == 4
    close(alone[0].weights_BHTS, first[0].weights_BHTS)
    close(all_layers[0].weights_BHTS, first[0].weights_BHTS)


@every_model
def test_autocast_leaves_recorded_weights_wide(model):
    model = transformer(model.config, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), record_attention(model) as recorded:
        model(random_tokens(2, 5))
    for weights in recorded.values():
        sinks = 0 if weights.sinks_BHT is None else weights.sinks_BHT
        total_BHT = weights.weights_BHTS.sum(dim=-1) + sinks
        assert total_BHT.dtype == torch.float32
        close(total_BHT, torch.ones_like(total_BHT), 1e-6)


def test_blocks_within_blocks_record_alike():
    model, tokens_BT = MODELS["windows and sinks"], random_tokens(2, 7)
    with record_attention(model) as outer, record_states(model) as outer_states:
        model(tokens_BT[:, :3])
        with record_attention(model) as inner, record_states(model) as inner_states:
            model(tokens_BT)
    with record_attention(model) as alone:
        model(tokens_BT)
    for layer in alone:
        close(inner[layer].weights_BHTS, alone[layer].weights_BHTS)
        close(outer[layer].weights_BHTS[:, :, 3:], alone[layer].weights_BHTS)
        close(outer_states[layer].after_BTD[:, 3:], inner_states[layer].after_BTD)


def test_a_forward_that_fails_leaves_no_hooks_and_no_half_of_a_record():
    model, tokens_BT = transformer(model_config(gqa())), random_tokens(1, 4)

    def fail(module, args):
        raise RuntimeError("stopped")

    failing = model.layers[1].feed_forward.register_forward_pre_hook(fail)
    with record_attention(model) as attention, record_states(model) as states:
        with pytest.raises(RuntimeError, match="stopped"):
            model(tokens_BT)
        failing.remove()
        model(tokens_BT)
    assert states[1].after_BTD.shape == (1, 4, 11)
    assert attention[2].weights_BHTS.shape == (1, 6, 4, 4)
    with pytest.raises(RuntimeError, match="outside"), record_attention(model):
        raise RuntimeError("outside")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_generation_is_recorded_and_its_tokens_stay_the_same():
    model = MODELS["mla"]
    plain = list(generate(model, [1, 2, 3], 6))
    with record_attention(model) as attention, record_states(model) as states:
        assert list(generate(model, [1, 2, 3], 6)) == plain
    text = [[1, 2, 3, *plain][:8]]
    with record_attention(model) as expected:
        model(torch.tensor(text))
    for layer in range(3):
        close(attention[layer].weights_BHTS, expected[layer].weights_BHTS)
        assert states[layer].after_BTD.shape == (1, 8, 11)


@every_model
def test_states_are_the_residual_stream_around_each_sublayer(model):
    tokens_BT = random_tokens(2, 6)
    with record_states(model) as recorded:
        states = model.hidden_states(tokens_BT)
    config = model.config
    for row, tokens_T in enumerate(tokens_BT):
        x_TD = plain_embedded(model, tokens_T)
        for layer, (block, kind) in enumerate(zip(model.layers, config.layers, strict=True)):
            before_TD, between_TD, after_TD = (x_BTD[row] for x_BTD in recorded[layer])
            close(before_TD, x_TD, 1e-4)
            x_TD = plain_block(block, kind, config.norm_epsilon, x_TD)
            close(after_TD, x_TD, 1e-4)
            read_TD = block.feed_forward_norm(between_TD)
            added_TD = block.feed_forward_output_norm(block.feed_forward(read_TD[None])[0])
            close(after_TD, between_TD + kind.residual_multiplier * added_TD)
    assert recorded[len(model.layers) - 1].after_BTD.equal(states.raw_BTD)


def test_states_of_several_forwards_are_joined_in_order():
    model, tokens_BT = MODELS["gqa"], random_tokens(2, 7)
    with record_states(model) as whole:
        model(tokens_BT)
    with record_states(model) as pieces:
        feed(model, tokens_BT, [2, 5])
    for layer in whole:
        for found, expected in zip(pieces[layer], whole[layer], strict=True):
            close(found, expected)


def test_forwards_of_other_numbers_of_rows_are_not_joined():
    model = MODELS["gqa"]
    with record_attention(model) as attention, record_states(model) as states:
        model(random_tokens(2, 4))
        model(random_tokens(1, 4))
    for recorded in (attention, states):
        with pytest.raises(ValueError, match=r"forwards over \[1, 2\] rows cannot be joined"):
            recorded[0]


def test_an_intervention_shows_in_what_is_recorded():
    """A hook of torch's own that zeroes the first layer's attention, and one that wraps a head."""
    model = transformer(model_config(gqa()))
    model.layers[0].attention.register_forward_hook(lambda module, args, y_BTD: y_BTD * 0)
    with record_states(model) as recorded:
        model(random_tokens(1, 5))
    assert recorded[0].between_BTD.equal(recorded[0].before_BTD)


def checkpoint_layers(model, reentrant):
    for layer in model.layers:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=reentrant)


@pytest.mark.filterwarnings("ignore:under reentrant")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recorded_once_and_gradients_flow_through(reentrant):
    model = transformer(model_config(mla())).requires_grad_(True)
    checkpoint_layers(model, reentrant)
    with record_attention(model) as attention, record_states(model) as states:
        model(random_tokens(2, 5)).square().mean().backward()
    assert attention[0].weights_BHTS.shape == (2, 3, 5, 5)
    assert states[2].after_BTD.shape == (2, 5, 11)
    if not reentrant:
        model.zero_grad()
        with record_attention(model) as attention:
            logits_BTV = model(random_tokens(2, 5))
        (attention[1].weights_BHTS[..., 0].sum() + 0 * logits_BTV.sum()).backward()
        assert model.layers[0].attention.o.weight.grad.abs().max() > 0


@pytest.mark.parametrize("record", [record_attention, record_states])
def test_a_record_without_gradient_under_reentrant_checkpointing_is_told(record):
    model = transformer(model_config(gqa())).requires_grad_(True)
    checkpoint_layers(model, reentrant=True)
    with pytest.warns(UserWarning, match="what is recorded has no gradient"), record(model):
        model(random_tokens(1, 4)).sum().backward()


@pytest.mark.parametrize("record", [record_attention, record_states])
def test_two_models_in_one_record_are_refused(record):
    models = nn.ModuleList([transformer(model_config(gqa())), transformer(model_config(gqa()))])
    with record(models):
        models[0](random_tokens(1, 4))
        with pytest.raises(ValueError, match="two modules ran as layer 0: record one model at a"):
            models[1](random_tokens(1, 4))


def test_bfloat16_weights_are_recorded_in_float32():
    model = transformer(model_config(gqa()), torch.bfloat16)
    with record_attention(model) as recorded:
        model(random_tokens(1, 5))
    assert recorded[0].weights_BHTS.dtype == torch.float32


# --- attentions from outside


def with_attention(attention):
    layer = LayerConfig(attention=attention, feed_forward=softmax_experts())
    return transformer(sized(layers=(layer, layer)))


def test_an_attention_that_reports_nothing_is_named_unless_it_says_that_it_has_no_weights(
    monkeypatch,
):
    model = with_attention(DecayConfig(num_heads=2, head_width=3))
    model.layers[1].attention = gqa().build(11).double()
    with record_attention(model) as recorded:
        model(random_tokens(1, 4))
    assert list(recorded) == [1]
    monkeypatch.delattr("outside.DecayAttention.has_attention_weights")
    with (
        pytest.raises(ValueError, match="layer 0, a DecayAttention, reported weights 0 times"),
        record_attention(model),
    ):
        model(random_tokens(1, 4))


class Averaging(nn.Module):
    """Each position reads the mean of those before it; reports its weights as anybody may."""

    def __init__(self):
        super().__init__()
        self.inner = gqa().build(11)

    def make_cache(self, *sizes):
        return self.inner.make_cache(*sizes)

    def forward(self, x_BTD, step, cache):
        T = x_BTD.shape[1]
        weights_TT = torch.ones(T, T, dtype=x_BTD.dtype).tril()
        weights_TT = weights_TT / weights_TT.sum(dim=1, keepdim=True)
        report_weights(step, AttentionWeights(weights_TT.expand(len(x_BTD), 1, T, T)))
        return weights_TT @ x_BTD


def test_any_attention_can_report_its_weights():
    model = with_attention(gqa())
    model.layers[1].attention = Averaging()
    with record_attention(model) as recorded:
        model(random_tokens(2, 3))
    third = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]).double()
    close(recorded[1].weights_BHTS, third.expand(2, 1, 3, 3), 1e-7)
    assert recorded[0].weights_BHTS.shape == (2, 6, 3, 3)


def test_a_wrapped_attention_is_recorded_once():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.make_cache = inner, inner.make_cache

        def forward(self, *args):
            return self.inner(*args)

    model, tokens_BT = with_attention(gqa()), random_tokens(1, 4)
    with record_attention(model) as before:
        model(tokens_BT)
    model.layers[0].attention = Wrapper(model.layers[0].attention)
    with record_attention(model) as after:
        model(tokens_BT)
    close(after[0].weights_BHTS, before[0].weights_BHTS)
