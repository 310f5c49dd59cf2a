"""The test kit catches planted bugs, one in each toy part, and finds none in any part there is.

The toy attention is right, plainly written and reports its weights; every bug is one method of it,
or of its cache, overridden.

Shapes: B batch, T positions, S keys, D model width, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
from outside import CosineRouterConfig, DecayConfig, SquaredConfig
from tiny import VARIED, YARN
from torch import nn
from toys import ToyConfig, ToyLayer

from modeling import (
    AttentionWeights,
    EntryCache,
    QKNormConfig,
    WindowCache,
    report_weights,
)
from modeling.testing import (
    check_attention,
    check_model,
    compare,
    every_cut,
    random_tokens,
    tiny_gqa,
    tiny_mla,
    tiny_model,
    tiny_rope,
    transformer,
)
from moe import ExpertChoice, MoEConfig, TopP


class ToyAttention(nn.Module):
    """One head whose scores fall with the distance (Press et al. 2021)."""

    def __init__(self, d_model):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model) for _ in "qkvo")
        self.slope = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.slope, 0.3)

    def make_cache(self, batch_size, max_length, rollback=0):
        D = self.q.in_features
        return EntryCache(batch_size, max_length, [D, D])

    def values(self, x_BTD):
        return self.v(x_BTD)

    def keep(self, k_BTD, v_BTD, step, cache):
        if cache is None:
            return k_BTD, v_BTD, None
        (k_BSD, v_BSD), keys_BS = cache.append(k_BTD, v_BTD, counts=step.counts)
        return k_BSD, v_BSD, keys_BS

    def positions(self, step, T):
        return step.positions_BT

    def see(self, queries_BT1, keys_B1S):
        return (keys_B1S <= queries_BT1) & (keys_B1S >= 0)

    def soften(self, scores_BTS):
        return scores_BTS.softmax(dim=-1)

    def report(self, step, weights_BTS, keys_BS):
        report_weights(step, AttentionWeights(weights_BTS[:, None]), keys_BS)

    def forward(self, x_BTD, step, cache):
        k_BSD, v_BSD, keys_BS = self.keep(self.k(x_BTD), self.values(x_BTD), step, cache)
        queries_BT1 = self.positions(step, x_BTD.shape[1])[..., None]
        keys_B1S = (queries_BT1.mT if keys_BS is None else keys_BS[:, None]).contiguous()
        scores_BTS = self.q(x_BTD) @ k_BSD.mT / x_BTD.shape[-1] ** 0.5
        scores_BTS = scores_BTS - self.slope * (queries_BT1 - keys_B1S)
        weights_BTS = self.soften(
            scores_BTS.where(self.see(queries_BT1, keys_B1S), -torch.inf).float()
            if scores_BTS.dtype == torch.bfloat16
            else scores_BTS.where(self.see(queries_BT1, keys_B1S), -torch.inf)
        )
        self.report(step, weights_BTS, keys_BS)
        return self.finish(self.o(weights_BTS.to(v_BSD.dtype) @ v_BSD))

    def finish(self, y_BTD):
        return y_BTD


class SeesAhead(ToyAttention):
    def see(self, queries_BT1, keys_B1S):
        return (keys_B1S <= queries_BT1 + 1) & (keys_B1S >= 0)


class SeesNothing(ToyAttention):
    def finish(self, y_BTD):
        return y_BTD * 0


class RowsMixed(ToyAttention):
    def values(self, x_BTD):
        return self.v(x_BTD) - x_BTD.mean(dim=0)


class RestartedPositions(ToyAttention):
    def positions(self, step, T):
        return torch.arange(T)[None]


class IgnoresCounts(ToyAttention):
    def keep(self, k_BTD, v_BTD, step, cache):
        if cache is None:
            return k_BTD, v_BTD, None
        (k_BSD, v_BSD), keys_BS = cache.append(k_BTD, v_BTD)
        return k_BSD, v_BSD, keys_BS


class StateInLayer(ToyAttention):
    """Keeps the last value itself: right for one text that is fed token by token."""

    last = None

    def values(self, x_BTD):
        v_BTD = self.v(x_BTD)
        T, last = x_BTD.shape[1], self.last
        shifted_BTD = torch.cat([torch.zeros_like(v_BTD[:, :1]), v_BTD[:, :-1]], dim=1)
        if T == 1 and last is not None and last.shape == v_BTD.shape:
            shifted_BTD = last.to(v_BTD.dtype)
        self.last = v_BTD[:, -1:].detach() if T else None
        return v_BTD + shifted_BTD


class SmallRollback(ToyAttention):
    """A window whose cache forgets what a cut would need."""

    window = 3

    def make_cache(self, batch_size, max_length, rollback=0):
        D = self.q.in_features
        cache = WindowCache(batch_size, max_length, [D, D], self.window, rollback=0)
        cache.rollback = rollback
        return cache

    def see(self, queries_BT1, keys_B1S):
        return super().see(queries_BT1, keys_B1S) & (keys_B1S > queries_BT1 - self.window)


class SmallWindow(SmallRollback):
    """Two positions are kept, of which it sees three."""

    def make_cache(self, batch_size, max_length, rollback=0):
        D = self.q.in_features
        return WindowCache(batch_size, max_length, [D, D], window=2, rollback=rollback)


class ReadsWeight(ToyAttention):
    def values(self, x_BTD):
        return x_BTD @ self.v.weight.T


class ReadsWeightInDecoding(ToyAttention):
    def values(self, x_BTD):
        one = x_BTD.shape[1] == 1
        return x_BTD @ self.v.weight.T + self.v.bias if one else self.v(x_BTD)


class Detached(ToyAttention):
    def soften(self, scores_BTS):
        return scores_BTS.detach().softmax(dim=-1) + 0 * scores_BTS.where(scores_BTS > -1e9, 0)


class Unused(ToyAttention):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.unused = nn.Linear(d_model, 2)


class Forgetful(ToyAttention):
    def reset_parameters(self):
        self.slope.shape  # noqa: B018


class ReportsNothing(ToyAttention):
    def report(self, step, weights_BTS, keys_BS):
        pass


class ReportsTwice(ToyAttention):
    def report(self, step, weights_BTS, keys_BS):
        super().report(step, weights_BTS, keys_BS)
        super().report(step, weights_BTS, keys_BS)


class ReportsHalf(ToyAttention):
    def report(self, step, weights_BTS, keys_BS):
        super().report(step, weights_BTS / 2, keys_BS)


class ReportsSlots(ToyAttention):
    """Leaves out where the keys stand."""

    def report(self, step, weights_BTS, keys_BS):
        T, S = weights_BTS.shape[1:]
        super().report(step, weights_BTS[..., S - T :], None)


class Widened(ToyAttention):
    def finish(self, y_BTD):
        return y_BTD.float() if y_BTD.dtype == torch.bfloat16 else y_BTD


class Dropout(ToyAttention):
    def finish(self, y_BTD):
        return nn.functional.dropout(y_BTD)


class WrongName(ToyAttention):
    def values(self, x_BTD):
        v_BDT = self.v(x_BTD)
        return v_BDT * 1


class ReadsValues(ToyAttention):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.first = float(self.slope.detach())


class LostTensor(ToyAttention):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.shift = torch.randn(())

    def finish(self, y_BTD):
        return y_BTD + self.shift.to(y_BTD)


class LostBuffer(ToyAttention):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.register_buffer("table", torch.ones(3), persistent=False)


class WrongOutputs(ToyAttention):
    residual_outputs = ("out.weight",)


class InPlace(ToyAttention):
    def values(self, x_BTD):
        return self.v(x_BTD.mul_(2))


class HalvedInFloat32(ToyAttention):
    def soften(self, scores_BTS):
        factor = 1 if scores_BTS.dtype == torch.float64 else 0.5
        return super().soften(scores_BTS * factor)


class FarMask(ToyAttention):
    """Right for the first positions."""

    def positions(self, step, T):
        return step.positions_BT.clamp(max=16) if T == 1 else step.positions_BT


class LeftInStep(ToyAttention):
    def values(self, x_BTD):
        self.found = self.v(x_BTD)
        return self.found

    def keep(self, k_BTD, v_BTD, step, cache):
        kept_BTD = step.shared.setdefault("values", v_BTD)
        return super().keep(k_BTD, kept_BTD, step, cache)


class TwoMaps(ToyAttention):
    def report(self, step, weights_BTS, keys_BS):
        super().report(step, 2 * weights_BTS - weights_BTS.flip(-1).tril(), keys_BS)


class FarRollback(SmallRollback):
    window = 10


class NoFloors(WindowCache):
    def append(self, *new_BTW, counts=None):
        found = super().append(*new_BTW, counts=counts)
        self.floors = [0] * len(self.lengths)
        return found


class CutsTooFar(FarRollback):
    def make_cache(self, batch_size, max_length, rollback=0):
        D = self.q.in_features
        return NoFloors(batch_size, max_length, [D, D], self.window, rollback)


class NotANumberInTraining(ToyAttention):
    def finish(self, y_BTD):
        return y_BTD / (0.0 if self.training else 1.0)


class NoEmpty(ToyAttention):
    def finish(self, y_BTD):
        y_BTD.amax()
        return y_BTD


def with_cache(kind):
    """The toy attention with a cache of another class."""

    class Cached(ToyAttention):
        def make_cache(self, batch_size, max_length, rollback=0):
            D = self.q.in_features
            return kind(batch_size, max_length, [D, D])

    Cached.__name__ = Cached.__qualname__ = kind.__name__
    return Cached


class Unlisted(EntryCache):
    """Keeps a tensor that no copy, cut or count of bytes knows."""

    def append(self, *new_BTW, counts=None):
        self.newest = new_BTW[0].clone()
        return super().append(*new_BTW, counts=counts)


class NoRows(EntryCache):
    """Has a tensor whose first axis is not the row."""

    def append(self, *new_BTW, counts=None):
        if len(self.tensors) == 3:
            self.tensors.pop()
        found = super().append(*new_BTW, counts=counts)
        self.tensors.append(torch.zeros(1, dtype=torch.int64))
        return found


class WrongBytes(EntryCache):
    @property
    def nbytes(self):
        return super().nbytes // 2


class Overflowing(EntryCache):
    """Forgets what does not fit."""

    def append(self, *new_BTW, counts=None):
        room = self.max_length - max(self.lengths)
        if counts is None and new_BTW[0].shape[1] > room:
            self.truncate([length - 1 for length in self.lengths])
        return super().append(*new_BTW, counts=counts)


class Longer(EntryCache):
    def __init__(self, batch_size, max_length, widths):
        super().__init__(batch_size, max_length + 1, widths)


class Shifted(EntryCache):
    """Says that keys stand one position later, where there are earlier ones."""

    def append(self, *new_BTW, counts=None):
        entries, keys_BS = super().append(*new_BTW, counts=counts)
        return entries, None if keys_BS is None else keys_BS.roll(1, dims=1)


class HalfRefused(EntryCache):
    """Has advanced when it refuses."""

    def append(self, *new_BTW, counts=None):
        if counts is None and max(self.lengths) + new_BTW[0].shape[1] > self.max_length:
            self.lengths = [length + 1 for length in self.lengths]
            raise ValueError("full")
        return super().append(*new_BTW, counts=counts)


class LostLast(EntryCache):
    """Cuts one position more than it was asked for."""

    def truncate(self, lengths):
        super().truncate([max(0, length - 1) for length in lengths])


class LostLengths(EntryCache):
    """Pads the longest row with what was in the others."""

    def lengths_after(self, counts):
        return super().lengths_after([max(counts)] * len(counts))


BUGS = {
    SeesAhead: "positions before . change with what stands from . on",
    SeesNothing: "the last output does not depend on its position",
    RowsMixed: "row 0 by itself gets another output",
    RestartedPositions: r"fed in pieces of \[1, 5\]",
    IgnoresCounts: r"after \[3, 0, 2\], the cache has \[6, 6, 6\]",
    StateInLayer: "a second call gives other outputs|fed in pieces",
    SmallRollback: "cannot be truncated|goes on differently",
    SmallWindow: "fed in pieces of",
    ReadsWeight: "v is read and not called|a hook on v",
    ReadsWeightInDecoding: "a hook on v does not act alike with a cache",
    Detached: "the gradient of input 0 is wrong",
    Unused: "no gradient reaches unused.weight",
    Forgetful: "does not set slope",
    ReportsNothing: "reported weights 0 times",
    ReportsTwice: "reported weights 2 times",
    ReportsHalf: "do not sum to 1",
    ReportsSlots: "recorded weights differ when the text is fed in pieces",
    Widened: "without a cache, it must return .* and not .*float32",
    Dropout: "a second call gives other outputs",
    WrongName: "names do not tell shapes .*v_BDT: D = ",
    ReadsValues: "cannot be built on the meta device",
    LostTensor: "keeps shift in no file",
    LostBuffer: "keeps table in no file",
    WrongOutputs: "residual_outputs of it, a WrongOutputs, names no tensor: out.weight",
    InPlace: "it writes into its input",
    HalvedInFloat32: "outputs in float32 differ from those in float64 by",
    FarMask: "a text of 70 positions",
    LeftInStep: "a layer gives another output behind one like it",
    FarRollback: "cannot be truncated|goes on differently",
    CutsTooFar: "cut back to 1, with a rollback of 0, a row goes on differently",
    NotANumberInTraining: "in training mode, the gradient of .* is not finite",
    TwoMaps: "recorded weights are negative: report each softmax as a head",
    with_cache(Unlisted): "1 tensors of the cache are not in `tensors`",
    with_cache(NoRows): "without an axis of|no 3th of|a row of",
    with_cache(WrongBytes): "nbytes = ",
    with_cache(Overflowing): "a cache for 6 positions takes 7",
    with_cache(HalfRefused): r"refusing one more, it changed lengths: \[7, 7, 7\]",
    with_cache(Longer): "max_length is 7, asked for 6",
    with_cache(Shifted): "fed in pieces of",
    with_cache(LostLast): "cut back to|copied twice",
    with_cache(LostLengths): r"after \[3, 0, 2\], the cache has \[3, 3, 3\]",
}


def test_the_toy_attention_is_right():
    check_attention(ToyConfig(module=ToyAttention))


@pytest.mark.parametrize(("bug", "told"), BUGS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_bug_in_an_attention_or_its_cache_is_caught(bug, told):
    with pytest.raises((AssertionError, ValueError), match=told):
        check_attention(ToyConfig(module=bug))


def test_an_error_in_an_attention_tells_when_it_happened():
    with pytest.raises(RuntimeError, match="amax") as caught:
        check_attention(ToyConfig(module=NoEmpty))
    assert caught.value.__notes__ == [
        "while it ran on 0 new positions (there may be none) in torch.float64"
    ]


def test_what_is_no_attention_or_no_model_is_told():
    with pytest.raises(AssertionError, match="ToyConfig builds a ToyLayer without make_cache"):
        check_attention(ToyConfig(module=ToyLayer))
    with pytest.raises(TypeError, match="a ToyConfig: the check takes a ModelConfig"):
        check_model(ToyConfig(module=ToyLayer))


# --- models


class SeesLater(ToyLayer):
    def forward(self, x_BTD):
        return super().forward(x_BTD + 0.3 * x_BTD.flip(1).cumsum(1).flip(1))


class Infinite(ToyLayer):
    def forward(self, x_BTD):
        return super().forward(x_BTD) / 0.0


class UnusedInLayer(ToyLayer):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.unused = nn.Linear(d_model, 2)


class LostInLayer(ToyLayer):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.shift = torch.randn(d_model)

    def forward(self, x_BTD):
        return super().forward(x_BTD) + self.shift.to(x_BTD)


class DropoutInLayer(ToyLayer):
    def forward(self, x_BTD):
        return nn.functional.dropout(super().forward(x_BTD))


class OtherWhenWatched(ToyLayer):
    """Computes something else where a hook watches, as a fast path might."""

    def forward(self, x_BTD):
        return super().forward(x_BTD * (2 if self._forward_hooks else 1))


class OtherForOneToken(ToyLayer):
    def forward(self, x_BTD):
        return super().forward(x_BTD * (2 if x_BTD.shape[1] == 1 else 1))


MODEL_BUGS = {
    SeesLater: "depth 0 sees tokens from",
    Infinite: "logits are not finite",
    UnusedInLayer: r"no gradient reaches layers.1.feed_forward.unused.weight",
    LostInLayer: "a copy of the state_dict differs",
    DropoutInLayer: "a second call gives other logits",
    OtherWhenWatched: "recording changes the logits",
    OtherForOneToken: "logits are not those of the whole|logits_to_keep|by itself",
}


@pytest.mark.parametrize(
    ("bug", "told"), MODEL_BUGS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_bug_in_a_model_is_caught(bug, told):
    with pytest.raises(AssertionError, match=told):
        check_model(tiny_model(feed_forward=ToyConfig(module=bug)))


def test_a_wrong_cache_in_a_model_is_caught():
    with pytest.raises(AssertionError, match="logits are not those of the whole"):
        check_model(tiny_model(ToyConfig(module=with_cache(Shifted))))


def test_a_model_of_toys_is_right():
    attention, layer = ToyConfig(module=ToyAttention), ToyConfig(module=ToyLayer)
    check_model(tiny_model(attention, layer, mtp=1))


# --- other implementations


def wrong_from(position):
    model = transformer(tiny_model())

    def logits_of(tokens_BT):
        logits_BTV = model(tokens_BT).clone()
        logits_BTV[:, position:] += 1e-2
        return logits_BTV

    return logits_of


COMPARED = {
    "wrong": (wrong_from(4), "first at position 4, where the token is"),
    "not finite": (lambda t: torch.full((*t.shape, 23), torch.nan), "peer's logits hold values"),
    "all alike": (lambda t: torch.ones(*t.shape, 23), "all alike"),
    "another shape": (lambda t: torch.ones(*t.shape, 22), r"the peer's \(2, 23, 22\)"),
}


@pytest.mark.parametrize(("peer", "told"), COMPARED.values(), ids=COMPARED)
def test_a_peer_that_differs_or_compares_nothing_is_told(peer, told):
    with pytest.raises(AssertionError, match=told):
        compare(transformer(tiny_model()), peer)


def test_a_peer_that_agrees_gives_the_difference():
    model = transformer(tiny_model())
    assert compare(model, model) == 0
    single = transformer(tiny_model(), torch.float32)
    assert 0 < compare(single, model) < 1e-4
    tokens_BT = random_tokens(1, 5)
    with pytest.raises(AssertionError, match="more than 1e-09"):
        compare(single, model, tokens_BT, tolerance=1e-9)


# --- nothing is found in what is right


ATTENTIONS = {
    "mla": tiny_mla(),
    "mla, plain queries": tiny_mla(query_rank=None, bias=False),
    "mla, one head, wide values": tiny_mla(num_heads=1, value_width=12),
    "mla with yarn": tiny_mla(rope=tiny_rope(yarn=YARN, amplitude=1.3, softmax_multiplier=1.4)),
    "gqa": tiny_gqa(qkv_bias=True, output_bias=True),
    "multi-head": tiny_gqa(num_heads=2, kv_heads=2, scale=0.4),
    "sinks": tiny_gqa(sinks=True),
    "a window": tiny_gqa(window=3, rope=tiny_rope(layout="interleaved")),
    "a window of one": tiny_gqa(window=1),
    "a window and sinks": tiny_gqa(window=2, sinks=True, qkv_bias=True),
    "a window beyond the text": tiny_gqa(window=40),
    "norms of heads": tiny_gqa(qk_norm=QKNormConfig(epsilon=1e-5)),
    "norms over all heads": tiny_gqa(
        qk_norm=QKNormConfig(over="all", after_rope=True, epsilon=1e-5)
    ),
    "states": DecayConfig(num_heads=2, head_width=3),
}
FEED_FORWARDS = {
    "top-p": MoEConfig(router=TopP(num_experts=5, mass=0.7, max_experts=4), expert_width=4),
    "expert choice": MoEConfig(router=ExpertChoice(num_experts=5, capacity=1.5), expert_width=4),
    "from outside": MoEConfig(
        router=CosineRouterConfig(num_experts=5, slots=3, least_cosine=-0.1), expert_width=4
    ),
    "no experts": SquaredConfig(width=5, leak=0.1),
}
MODELS = {
    "latent": tiny_model(mtp=2),
    "states": tiny_model(ATTENTIONS["states"], mtp=1),
    **{name: config(mtp=1) for name, config in VARIED.items()},
    **{name: tiny_model(tiny_gqa(), kind) for name, kind in FEED_FORWARDS.items()},
}


@pytest.mark.parametrize("config", ATTENTIONS.values(), ids=ATTENTIONS)
def test_nothing_is_found_in_any_attention(config):
    check_attention(config)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_nothing_is_found_in_any_model(config):
    check_model(config)


# --- what tests are made of


def test_every_way_of_cutting_is_tried():
    cuts = list(every_cut(4))
    assert len(cuts) == len(set(cuts)) == 2**3
    assert {(), (1, 2, 3), (2,)} <= set(cuts)


def test_tiny_models_have_the_parts_they_are_given():
    attention, layer = ATTENTIONS["sinks"], FEED_FORWARDS["top-p"]
    config = tiny_model(attention, layer, mtp=3, vocab_size=50, tied_embeddings=True)
    assert [kind.feed_forward for kind in config.layers[1:]] == [layer, layer]
    assert all(kind.attention == attention for kind in (*config.layers, *config.mtp.blocks))
    assert (len(config.mtp.blocks), config.vocab_size) == (3, 50)
    assert transformer(replace(config, tied_embeddings=False)).head.weight.shape == (50, 11)
