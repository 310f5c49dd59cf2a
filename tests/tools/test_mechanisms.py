"""Where the time goes: by place in the model, parts from outside too, adding up to the whole."""

import json
import time

import pytest
from outside import CosineRouterConfig, DecayConfig
from tiny import gqa, mla, model_config, transformer
from torch import nn

from modeling import LayerConfig
from modeling.testing import random_tokens
from moe import DenseConfig, MoEConfig
from tools import mechanisms
from tools.mechanisms import find_mechanisms, profile_decoding, profile_prefill, time_mechanisms


def outside_model():
    sparse = MoEConfig(
        router=CosineRouterConfig(num_experts=4, slots=2, least_cosine=-1.0),
        expert_width=6,
        shared_width=5,
    )
    kinds = (DecayConfig(num_heads=2, head_width=4), sparse), (mla(), DenseConfig(width=9))
    layers = tuple(LayerConfig(attention=a, feed_forward=f) for a, f in kinds)
    return transformer(model_config(gqa(), layers=layers))


def test_every_module_counts_by_its_place():
    model = outside_model()
    first, second = model.layers
    assert find_mechanisms(model) == {
        model.head: "head",
        first.attention: "attention",
        first.feed_forward.router: "router",
        first.feed_forward.experts: "experts",
        first.feed_forward.shared: "shared and dense feed-forward",
        second.attention: "attention",
        second.feed_forward: "shared and dense feed-forward",
    }


class Slow(nn.Module):
    """Takes longer than the module inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        time.sleep(0.02)
        return self.module(*inputs)


def test_time_is_counted_where_it_passes():
    model = outside_model()
    model.layers[0].feed_forward.router = Slow(model.layers[0].feed_forward.router)
    with time_mechanisms(model) as seconds:
        model(random_tokens(1, 4))
    assert 0.02 < seconds["router"] < sum(seconds.values()) < 1
    assert max(seconds, key=seconds.get) == "router"
    before = dict(seconds)
    model(random_tokens(1, 4))
    assert seconds == before  # the hooks are gone


@pytest.mark.parametrize(
    ("measure", "size", "name", "times"),
    [
        (profile_prefill, "tokens", "prefill-9.json", 1),
        (profile_decoding, "context", "decode-9.json", 4),
    ],
)
def test_mechanisms_add_up_and_the_trace_shows_them(tmp_path, measure, size, name, times):
    model = outside_model()
    found = measure(model, 9, tmp_path / "new")
    shares = found["mechanisms"]
    assert sum(shares.values()) == pytest.approx(found["seconds"], rel=2e-3)
    assert min(shares.values()) > 0
    assert found["seconds_without_hooks"] > 0
    assert found[size] == 9
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]
    events = json.loads((tmp_path / "new" / name).read_text())["traceEvents"]
    for mechanism, calls in {"attention": 2, "router": 1, "experts": 1, "head": 1}.items():
        assert sum(event.get("name") == mechanism for event in events) == calls * times
    assert mechanisms.DECODING_STEPS == 4
