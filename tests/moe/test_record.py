"""Recording: every sparse layer's routing, in order, and nothing left behind."""

import copy

import pytest
import torch
from tiny import sparse
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe import MoE, Routing, record_routing, routers
from moe.testing import noise

CONFIG = sparse(num_experts=4, top_k=2, expert_width=4, scoring="softmax")
FIELDS = ["weights_NK", "experts_NK", "scores_NE", "logits_NE"]


class Model(nn.Module):
    """Layers 1 and 2 are sparse, layer 0 is dense."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), *(self.sparse() for _ in range(2))])
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def sparse(self):
        return nn.ModuleDict({"norm": nn.Identity(), "feed_forward": MoE(8, CONFIG)})

    def forward(self, x_BTD):
        x_BTD = self.layers[0](x_BTD)
        for layer in self.layers[1:]:
            x_BTD = x_BTD + layer["feed_forward"](layer["norm"](x_BTD))
        return x_BTD


@pytest.fixture
def model():
    return Model()


def make_x(B, T, seed=1):
    return noise(B, T, 8, seed=seed, dtype=torch.float32)


def assert_same(routing, expected):
    for field in FIELDS:
        torch.testing.assert_close(getattr(routing, field), getattr(expected, field))


def test_a_layers_index_is_the_first_number_in_its_routers_path(model):
    assert routers(model) == {i: model.layers[i]["feed_forward"].router for i in (1, 2)}
    nested = nn.ModuleDict({"61": nn.ModuleDict({"blocks": nn.ModuleList([MoE(8, CONFIG)])})})
    assert list(routers(nested)) == [61]


def test_a_sparse_layer_on_its_own_is_layer_zero():
    layer = MoE(8, CONFIG)
    assert routers(layer) == {0: layer.router}
    assert routers(layer.router) == {0: layer.router}
    assert routers(nn.Linear(8, 8)) == {}


def test_recording_collects_every_sparse_layer_by_index(model):
    with record_routing(model) as routings:
        assert len(routings) == 0
        model(make_x(2, 3))
    assert list(routings) == [1, 2]
    assert len(routings) == 2
    assert 0 not in routings
    for routing in routings.values():
        assert isinstance(routing, Routing)
        assert routing.experts_NK.shape == (6, 2)
        assert routing.scores_NE.shape == (6, 4)


def test_what_is_recorded_is_what_the_router_said(model):
    x_BTD = make_x(1, 5)
    with record_routing(model) as routings:
        model(x_BTD)
    first = model.layers[1]["feed_forward"].router
    assert_same(routings[1], first(model.layers[0](x_BTD).flatten(0, 1)))


def test_several_forwards_are_concatenated_in_order_even_when_read_in_between(model):
    parts = []
    for seed in range(3):
        with record_routing(model) as routings:
            model(make_x(1, 1 + seed, seed))
        parts.append(routings[2])
    with record_routing(model) as routings:
        for seed in range(3):
            model(make_x(1, 1 + seed, seed))
            assert len(routings[2].weights_NK) == sum(range(2 + seed))
    for field in FIELDS:
        joined = torch.cat([getattr(part, field) for part in parts])
        torch.testing.assert_close(getattr(routings[2], field), joined)


def test_gradients_flow_through_what_is_recorded(model):
    with record_routing(model) as routings:
        model(make_x(1, 3))
        model(make_x(1, 3, seed=2))
    routings[2].scores_NE[:, 0].sum().backward()
    assert model.layers[2]["feed_forward"].router.weight.grad.any()
    assert model.layers[0].weight.grad.any()


def test_recording_changes_no_output(model):
    x_BTD = make_x(2, 3)
    expected_BTD = model(x_BTD)
    with record_routing(model):
        assert torch.equal(model(x_BTD), expected_BTD)


def test_forwards_after_the_block_are_not_recorded(model):
    with record_routing(model) as routings:
        model(make_x(1, 3))
    model(make_x(1, 4))
    assert len(routings[1].experts_NK) == 3


def test_recording_stops_also_when_the_block_raises(model):
    with pytest.raises(RuntimeError, match="stop"), record_routing(model) as routings:  # noqa: PT012
        model(make_x(1, 3))
        raise RuntimeError("stop")
    model(make_x(1, 4))
    assert len(routings[1].experts_NK) == 3
    assert all(not module._forward_hooks for module in model.modules())


def test_nested_recordings_each_hold_the_forwards_of_their_own_block(model):
    with record_routing(model) as outer:
        model(make_x(1, 1))
        with record_routing(model) as inner:
            model(make_x(1, 2))
        model(make_x(1, 4))
    assert len(outer[1].experts_NK) == 7
    assert len(inner[1].experts_NK) == 2


class Saved(nn.Module):
    """A wrapper that keeps the old router beside the one it runs, as peft does."""

    def __init__(self, module):
        super().__init__()
        self.original, self.copies = module, nn.ModuleDict({"mine": copy.deepcopy(module)})

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.copies["mine"], name)

    def forward(self, x_ND):
        return self.copies["mine"](x_ND)


def test_what_runs_is_recorded_once_wrapped_or_nested(model):
    x_BTD = make_x(2, 3)
    with record_routing(model) as plain:
        model(x_BTD)
    wrapped = copy.deepcopy(model)
    for i in (1, 2):
        wrapped.layers[i]["feed_forward"].router = Saved(
            Saved(wrapped.layers[i]["feed_forward"].router)
        )
    with record_routing(wrapped) as routings:
        wrapped(x_BTD)
    assert routings.keys() == plain.keys()
    for layer, routing in plain.items():
        assert_same(routings[layer], routing)
        assert (
            routings.routers[layer]
            is wrapped.layers[layer]["feed_forward"].router.copies["mine"].copies["mine"]
        )


def test_a_model_that_numbers_its_layers_is_asked_wherever_it_stands(model):
    class Numbered(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = model.layers

        @property
        def numbered_layers(self):
            return {10 + i: layer for i, layer in enumerate(self.stack)}

        forward = Model.forward
        layers = property(lambda self: self.stack)

    nested = nn.Sequential(nn.Identity(), Numbered())
    with record_routing(nested) as routings:
        nested(make_x(1, 2))
    assert list(routings) == list(routers(nested)) == [11, 12]


def test_two_models_at_once_are_told_apart_by_an_error(model):
    both = nn.ModuleDict({"student": model, "teacher": copy.deepcopy(model)})
    with record_routing(both):
        both["student"](make_x(1, 2))
        with pytest.raises(ValueError, match="two routers routed in layer 1"):
            both["teacher"](make_x(1, 2))


@pytest.mark.parametrize("forwards", [1, 2])
def test_under_activation_checkpointing_every_token_counts_once(model, forwards):
    def recorded(run):
        with record_routing(model) as routings:
            outputs = [run(make_x(2, 3, seed)) for seed in range(forwards)]
            balance = sum(routing.scores_NE.square().sum() for routing in routings.values())
            (sum(y.square().sum() for y in outputs) + balance).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return routings, gradients

    plain, expected = recorded(model)
    checkpointed, found = recorded(lambda x: checkpoint(model, x, use_reentrant=False))
    for layer, routing in plain.items():
        assert_same(checkpointed[layer], routing)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_reentrant_checkpointing_it_says_that_there_is_no_gradient(model):
    x_BTD = make_x(2, 3).requires_grad_(True)
    with record_routing(model) as routings:
        y_BTD = checkpoint(model, x_BTD, use_reentrant=True)
        with pytest.warns(UserWarning, match="have no gradient: checkpoint with use_ree"):
            y_BTD.sum().backward()
    assert {layer: len(routing.experts_NK) for layer, routing in routings.items()} == {1: 6, 2: 6}


def test_a_compiled_model_is_recorded_too_and_stays_compiled(model):
    torch._dynamo.reset()
    x_BTD, graphs = make_x(2, 3), []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(1) or graph)
    compiled(x_BTD)
    with record_routing(model) as plain:
        model(x_BTD)
    for watched in (model, compiled):
        with record_routing(watched) as routings:
            compiled(x_BTD)
            compiled(x_BTD)
        assert list(routings) == [1, 2]
        assert len(routings[1].experts_NK) == 12
        torch.testing.assert_close(routings[1].logits_NE[:6], plain[1].logits_NE)
    before = len(graphs)
    compiled(x_BTD)
    assert len(graphs) == before
