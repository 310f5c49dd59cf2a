"""What a step needs, against plain recomputations from shapes and choices."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outside import DecayConfig
from tiny import gqa, mla, model_config, transformer, windows_and_sinks
from torch import nn

from modeling import LayerConfig
from modeling.testing import random_tokens
from moe import DenseConfig, record_routing
from tools import floor
from tools.floor import (
    Machine,
    Speed,
    Work,
    count_cache_bytes,
    count_chosen_experts,
    count_operations,
    count_pairs,
    count_training_operations,
    count_weight_bytes,
)
from tools.timing import Rounds


def chosen_in(model, tokens_RB1):
    with record_routing(model) as routings:
        for tokens_B1 in tokens_RB1:
            model(tokens_B1)
    return count_chosen_experts(routings, len(tokens_RB1))


def plain_weight_bytes(model, tokens_B1, tied):
    """The embedding's rows, each expert that is chosen, and everything else, one by one."""
    with record_routing(model) as routings:
        model(tokens_B1)
    read = 0
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("embed.") and not tied:
            read += len(tokens_B1) * x[0].nbytes
        elif ".experts." in name and not name.startswith("mtp."):
            ids = set(routings[int(name.split(".")[1])].experts_NK.flatten().tolist())
            read += sum(x[e].nbytes for e in ids if e < len(x))
        elif not name.startswith("mtp."):
            read += x.nbytes
    return read


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_weights_are_read_whole_but_for_experts_and_embedding(rows, tied):
    model = transformer(model_config(mla(), 1, tied_embeddings=tied))
    steps_RB1 = random_tokens(3, rows, seed=rows)[..., None]
    counted = count_weight_bytes(model, rows, chosen_in(model, steps_RB1))
    plain = [plain_weight_bytes(model, tokens_B1, tied) for tokens_B1 in steps_RB1]
    assert counted == pytest.approx(sum(plain) / 3)


def test_chosen_experts_are_counted_once_a_step_and_empty_slots_never():
    model = transformer(model_config(gqa()))
    tokens_RB1 = random_tokens(1, 5)[..., None].expand(2, 5, 1)
    with record_routing(model) as routings:
        for tokens_B1 in tokens_RB1:
            model(tokens_B1)
    routings[2].experts_NK[::2] = 5  # of five experts
    chosen = count_chosen_experts(routings, 2)
    halves = [set(half.flatten().tolist()) - {5} for half in routings[2].experts_NK.chunk(2)]
    assert chosen[2] == (sum(map(len, halves)) / 2, 5)


def test_bytes_are_those_of_the_stored_tensors():
    model = transformer(model_config(gqa())).float()
    before = count_weight_bytes(model, 1, {})
    packed = nn.Module()
    packed.register_buffer("weight", model.layers[0].feed_forward.gate.weight.to(torch.int8))
    model.layers[0].feed_forward.gate = packed
    assert count_weight_bytes(model, 1, {}) == before - 3 * packed.weight.numel()


class Elsewhere(nn.Module):
    """Experts whose weights are in no tensor of the model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = [experts]

    def forward(self, x_ND, routing):
        return self.experts[0](x_ND, routing)


def test_experts_that_hold_no_tensors_count_as_if_they_did():
    model = transformer(model_config(gqa()))
    steps_RB1 = random_tokens(3, 2)[..., None]
    chosen = chosen_in(model, steps_RB1)
    counted = count_weight_bytes(model, 2, chosen)
    model.layers[1].feed_forward.experts = Elsewhere(model.layers[1].feed_forward.experts)
    assert chosen_in(model, steps_RB1) == chosen
    assert count_weight_bytes(model, 2, chosen) == pytest.approx(counted)


def test_a_cache_is_read_up_to_its_length_and_what_is_constant_whole():
    model = transformer(windows_and_sinks()).float()
    cache, entry = model.make_cache(2, 32, 1), 2 * 3 * 7 * 4  # keys and values of three heads
    assert count_cache_bytes(cache, 20) == 2 * (20 * entry + 2 * 3 * entry)


def plain_operations(model, tokens_BT, with_head):
    """Two for each weight of a layer that is called, a row of its input each; and for vectors."""
    (B, T), counted = tokens_BT.shape, 0
    hooks = []

    def count(module, inputs, _):
        nonlocal counted
        rows = B * with_head if module is model.head else B * T
        counted += 2 * module.weight.numel() * rows

    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(count))
    model(tokens_BT)
    for hook in hooks:
        hook.remove()
    for layer in model.layers:
        if hasattr(layer.feed_forward, "router"):
            router, (_, F, D) = layer.feed_forward.router, layer.feed_forward.experts.gate.shape
            counted += 2 * B * T * (router.weight.numel() + router.config.top_k * 3 * F * D)
    vectors = [p.numel() for n, p in model.named_parameters() if p.dim() == 1 and "mtp" not in n]
    return counted + 2 * B * T * sum(vectors)


def test_operations_are_those_of_the_products():
    model = transformer(model_config(mla(), 1))
    tokens_BT = random_tokens(2, 9)
    seen, (H, widths) = 9 * 10 // 2, (3, 5 + 4 + 7)
    attention = 2 * 3 * 2 * H * widths * seen  # rows, layers, multiply and add
    counted = count_operations(model.config, 2, 9, 0, with_head=1)
    assert counted == plain_operations(model, tokens_BT, 1) + attention
    more = count_operations(model.config, 2, 9, 20, with_head=1) - counted
    assert more == 2 * 3 * 2 * H * widths * 9 * 20


def test_an_attention_from_outside_counts_as_its_weights():
    layer = LayerConfig(
        attention=DecayConfig(num_heads=2, head_width=4), feed_forward=DenseConfig(width=10)
    )
    config = replace(model_config(gqa()), layers=(layer,))
    long, short = (count_operations(config, 1, n, 0, with_head=0) for n in (20, 10))
    assert long == 2 * short > 0


def test_training_computes_three_forwards_and_those_of_the_modules():
    config = model_config(gqa(), 1)
    plain = count_training_operations(config, 2, 9, mtp=False)
    assert plain == 3 * count_operations(config, 2, 9, 0, with_head=9)
    (module,) = transformer(config).mtp_modules
    used = sum(p.numel() for part in (module.projection, module.block) for p in part.parameters())
    used += 23 * 11 - module.block.feed_forward.idle_parameters
    of_eight = 2 * (2 * used * 8 + 2 * 6 * 2 * 7 * (8 * 9 // 2))
    assert count_training_operations(config, 2, 9, mtp=True) - plain == 3 * of_eight


@given(st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(1, 12))
def test_pairs_are_those_of_the_mask(new, held, window):
    query_T1, key_S = torch.arange(held, held + new)[:, None], torch.arange(held + new)
    seen = key_S <= query_T1
    if window is not None:
        seen &= key_S > query_T1 - window
    assert count_pairs(new, held, window) == seen.sum()


def test_the_floor_is_the_longer_of_reading_and_multiplying():
    speed = Speed(read_bytes=100.0, operations=1000.0)
    reading, multiplying = Work(150.0, 50.0, 1999.0), Work(150.0, 50.0, 2001.0)
    assert (speed.seconds(reading), speed.bound(reading)) == (2.0, "reading")
    assert (speed.seconds(multiplying), speed.bound(multiplying)) == (2.001, "products")


def test_the_machine_reads_its_buffer_and_multiplies_its_matrices(monkeypatch):
    monkeypatch.setattr(floor, "READ_BYTES", 4000)
    monkeypatch.setattr(floor, "PRODUCT_WIDTH", 8)
    machine = Machine(torch.float32, torch.device("cpu"))
    contenders = machine.contenders(products=2)
    assert (contenders["read"].most, contenders["product"].most) == (None, 2)
    assert all(0 < contender.step(0) < 1 for contender in contenders.values())
    seconds = {"read": {0: 1.0, 1: 2.0, 2: 9.0}, "product": {0: 0.5}}
    assert machine.speed(Rounds(seconds, {})) == Speed(2000.0, 2 * 8**3 / 0.5)
