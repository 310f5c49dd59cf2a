"""Whatever wraps, hooks, replaces or watches a submodule acts in every path alike.

Every submodule that is called is changed in turn, of every kind of attention, of feed-forward
layers, MTP modules and head; the whole forward, which calls modules, is the reference.
"""

from dataclasses import replace

import pytest
import torch
from outside import DecayConfig
from tiny import VARIED, agreeable, gqa, mla, model_config, random_tokens, rope, transformer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from modeling import QKNormConfig, forced_states, generate, mtp_loss, next_token_loss
from modeling.linear import plain_weight
from moe.testing import close

ATTENTIONS = {
    "mla": mla(),
    "mla, plain queries": mla(query_rank=None, bias=False),
    "gqa": gqa(qkv_bias=True, output_bias=True),
    "windows and sinks": gqa(window=3, sinks=True),
    "norms of heads": gqa(qk_norm=QKNormConfig(epsilon=1e-5)),
    "norms over all heads": gqa(qk_norm=QKNormConfig(over="all", after_rope=True, epsilon=1e-5)),
    "states": DecayConfig(num_heads=2, head_width=3),
}
every_attention = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)


class Adapter(nn.Module):
    """A bottleneck beside the base layer: not linear, and acting in `forward` alone. `weight` is
    the base's, as in peft."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(width)
        self.A = nn.Parameter(torch.randn(width, 2, generator=generator, dtype=torch.float64) / 3)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        y = self.base(x)
        narrow = torch.tanh(x @ self.A).sum(dim=-1, keepdim=True)
        return y + self.scale * narrow * torch.ones_like(y)


class Stored(nn.Module):
    """A linear layer that keeps its weight in 8 bits and computes in the dtype of its input."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        largest = 127 if dtype == torch.int8 else 448
        self.register_buffer("scale", linear.weight.abs().amax(1, keepdim=True) / largest)
        stored = linear.weight / self.scale
        stored = stored.round() if dtype == torch.int8 else stored.float()
        self.register_buffer("weight", stored.to(dtype))
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Doubled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


def halve(module, inputs, output):
    return output / 2


def change(model: nn.Module, path: str, how: str) -> bool:
    """Change the submodule at `path`; False if that is no change for a module like it."""
    parent, _, name = path.rpartition(".")
    module, owner = model.get_submodule(path), model.get_submodule(parent)
    if how == "hook":
        module.register_forward_hook(halve)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5, *inputs[1:]))
    elif not isinstance(module, nn.Linear):
        return False
    elif how == "adapter":
        setattr(owner, name, Adapter(module, module.in_features))
    elif how == "parametrised":
        parametrize.register_parametrization(module, "weight", Doubled())
    elif how == "patched forward":
        really = module.forward
        module.forward = lambda x: really(x) * 0.5
    else:
        setattr(owner, name, Stored(module, getattr(torch, how)))
    return True


HOWS = ["adapter", "hook", "pre-hook", "parametrised", "patched forward", "int8", "float8_e4m3fn"]


def check_all_ways_agree(model, plain) -> None:
    """Token by token, in pieces, with unequal rows, and `generate`, all against whole forwards."""
    tokens_BT = random_tokens(2, 8)
    whole_BTV = model(tokens_BT)
    # little where a norm follows, whose epsilon alone shows that its input was halved
    assert (whole_BTV - plain(tokens_BT)).abs().max() > 1e-10, "the change changes nothing"
    for cuts in ([1] * 8, [5, 1, 2]):
        cache = model.make_cache(2, 9, 4)
        close(torch.cat([model(x, cache) for x in tokens_BT.split(cuts, dim=1)], 1), whole_BTV)
    cache.truncate([6, 8])
    states = model.hidden_states(
        torch.stack([tokens_BT[0, 6:], tokens_BT[1, :2]]), cache, counts=[2, 0]
    )
    close(model.logits(states.normed_BTD[:1]), whole_BTV[:1, 6:])
    ids = [3, 1, 4, 1, 5]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate(model, ids[:5], 4)) == ids[5:]


@every_attention
@pytest.mark.parametrize("how", HOWS)
def test_every_submodule_of_every_attention_acts_in_decoding_as_in_the_whole(attention, how):
    config = replace(model_config(attention), layers=model_config(attention).layers[:1])
    plain, tried = transformer(config), 0
    for path, _ in plain.layers[0].attention.named_modules(prefix="layers.0.attention"):
        model = transformer(config)
        if path != "layers.0.attention" and change(model, path, how):
            check_all_ways_agree(model, plain)
            tried += 1
    assert tried >= 2


@pytest.mark.parametrize("how", HOWS)
def test_every_submodule_of_a_block_acts_in_decoding_as_in_the_whole(how):
    config = model_config(mla())
    plain, tried = transformer(config), 0
    for path, module in plain.layers[1].named_modules(prefix="layers.1"):
        model = transformer(config)
        inner = path.startswith("layers.1.attention.") or path.endswith((".router", ".attention"))
        leaf = path.count(".") > 1 and not list(module.children())
        if leaf and not inner and change(model, path, how):
            check_all_ways_agree(model, plain)
            tried += 1
    assert tried >= 3


HEADS = [how for how in HOWS if how != "float8_e4m3fn"]


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("own_head", [False, True])
def test_losses_are_those_of_the_logits_that_the_head_gives_and_so_are_their_gradients(
    how, own_head
):
    config = model_config(gqa(), mtp=2)
    config = replace(config, mtp=replace(config.mtp, own_head=own_head), logits_multiplier=0.7)
    model, tokens_BT = transformer(config), random_tokens(3, 9)
    for path in ["head", *(f"mtp.{number}.head" for number in model.mtp if own_head)]:
        assert change(model, path, how)
    model.requires_grad_(True)

    def logits_losses():
        first = model(tokens_BT)[:, :-1].flatten(0, 1)
        yield F.cross_entropy(first, tokens_BT[:, 1:].flatten())
        for k, logits in enumerate(model.mtp_logits(tokens_BT), start=1):
            yield F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1 + k :].flatten())

    def gradients(total):
        model.zero_grad()
        total.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    states = model.hidden_states(tokens_BT)
    depths = model.mtp_hidden_states(states, tokens_BT)
    ours = [
        next_token_loss(states.normed_BTD, model.head, tokens_BT),
        mtp_loss(depths, model.mtp_heads, tokens_BT, [1.0, 0.5]),
    ]
    main, first, second = logits_losses()
    close(ours[0], main)
    close(ours[1], first + 0.5 * second)
    expected, found = gradients(main + first + 0.5 * second), gradients(sum(ours))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        close(found[name], gradient)


def test_the_pieces_of_a_called_head_are_one_loss(monkeypatch):
    monkeypatch.setattr("modeling.loss.PIECE", 4)
    model, tokens_BT = transformer(model_config(gqa())), random_tokens(2, 9)
    model.head.register_forward_hook(halve)
    states = model.hidden_states(tokens_BT)
    expected = F.cross_entropy(model(tokens_BT)[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    close(next_token_loss(states.normed_BTD, model.head, tokens_BT), expected)


@pytest.mark.parametrize("how", ["adapter", "hook", "int8"])
@pytest.mark.parametrize("kind", ["mla", "windows"])
def test_drafts_change_no_token_whatever_is_changed_in_modules_and_model(how, kind):
    config = model_config(mla(), mtp=2) if kind == "mla" else VARIED["windows and sinks"](mtp=2)
    model = agreeable(config, 0.1)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "head":
            change(model, path, how)
    plain = list(generate(model, [1, 2, 3], 10))
    assert list(generate(model, [1, 2, 3], 10, draft_tokens=3)) == plain
    tokens_BT = random_tokens(1, 9)
    states = model.hidden_states(tokens_BT)
    forced = forced_states(model, states, tokens_BT, 2, model.config.mtp)
    for ours, theirs in zip(forced, model.mtp_hidden_states(states, tokens_BT), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@every_attention
def test_caches_take_the_dtype_of_what_is_appended(attention, dtype):
    model = transformer(model_config(attention))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "head":
            change(model, path, str(dtype).removeprefix("torch."))
    cache = model.make_cache(1, 6)
    model(random_tokens(1, 3), cache)
    assert {t.dtype for layer in cache.layers for t in layer.tensors} == {torch.float64}


@every_attention
def test_a_cache_begun_under_autocast_goes_on_without_and_the_other_way_round(attention):
    model, tokens_BT = transformer(model_config(attention), torch.float32), random_tokens(1, 6)
    exact = model(tokens_BT)
    for reduced_first in (True, False):
        cache = model.make_cache(1, 6)
        for part, reduced in zip(
            tokens_BT.split(3, dim=1), (reduced_first, not reduced_first), strict=True
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
                logits = model(part, cache)
        assert (logits - exact[:, 3:]).abs().max() < 0.3 * exact.std()


def test_absorbing_is_for_a_plain_projection_alone():
    module = mla().build(11)
    assert plain_weight(module.kv_expand) is module.kv_expand.weight
    for how in HOWS:
        module = nn.Sequential(mla(rope=rope()).build(11).double())
        assert change(module, "0.kv_expand", how)
        assert plain_weight(module[0].kv_expand) is None, how
    assert plain_weight(module[0].kv_compress) is None  # it has a bias
