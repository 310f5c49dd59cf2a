"""Names tell shapes: x_BTD has three dimensions, and a letter is one size within a call.

The rules stand in `moe.testing.wrong_shapes`; here all functions of the packages are watched.
"""

from pathlib import Path

import pytest
import torch
from files import ROOT
from outside import CosineRouterConfig, DecayConfig, SquaredConfig
from tiny import (
    VARIED,
    YARN,
    gqa,
    grouped_experts,
    mla,
    model_config,
    modules,
    random_tokens,
    rope,
    sized,
    transformer,
)

from modeling import LayerConfig, mtp_loss, next_token_loss
from moe import (
    ExpertChoice,
    MoEConfig,
    TopP,
    expert_balance_loss,
    expert_load,
    record_routing,
    router_z_loss,
    sequence_balance_loss,
    updated_selection_bias,
)
from moe.testing import watch_names

PACKAGES = tuple(f"{ROOT / package}/" for package in ("moe", "modeling"))


def run_everything(model) -> None:
    """A forward, a cached prefill and decode with unequal rows, all depths, all losses."""
    tokens_BT = random_tokens(2, 7)
    with record_routing(model) as routings:
        states = model.hidden_states(tokens_BT)
        assert len(routings) > 0
    cache = model.make_cache(2, 13, rollback=4)
    model(tokens_BT, cache=cache)
    cache.truncate([3, 6])
    model(tokens_BT[:, :3], cache=cache, logits_to_keep=2)
    model.hidden_states(tokens_BT[:, :3], cache, counts=[1, 3])
    model(tokens_BT[:, :1], cache=cache)
    model.mtp_logits(tokens_BT)
    depths, mask_BT = model.mtp_hidden_states(states, tokens_BT), tokens_BT > 3
    for mask in (None, mask_BT):
        next_token_loss(states.normed_BTD, model.head, tokens_BT, mask_BT=mask)
        if depths:
            mtp_loss(depths, model.mtp_heads, tokens_BT, [0.1] * len(depths), mask, tokens_BT // 9)
    for routing in routings.values():
        expert_balance_loss(routing)
        sequence_balance_loss(routing, num_sequences=2)
        router_z_loss(routing)
        load_E = expert_load(routing)
        updated_selection_bias(torch.zeros_like(load_E), load_E, 1e-3)


def layers_of(attention, *routers):
    """One sparse layer for each router."""
    kinds = [MoEConfig(router=router, expert_width=6) for router in routers]
    return tuple(LayerConfig(attention=attention, feed_forward=kind) for kind in kinds)


STRETCHED = rope(width=6, yarn=YARN)
EVEN = LayerConfig(
    attention=mla(), feed_forward=grouped_experts(expert_width=8, expert_biases=True)
)
ROUTERS = layers_of(
    gqa(),
    TopP(num_experts=5, mass=0.6, max_experts=4),
    ExpertChoice(num_experts=5, capacity=1.5),
)
OUTSIDE = (
    *layers_of(
        DecayConfig(num_heads=2, head_width=3),
        CosineRouterConfig(num_experts=5, slots=3, least_cosine=-0.1),
    ),
    LayerConfig(attention=gqa(window=3), feed_forward=SquaredConfig(width=7, leak=0.1)),
)
MODELS = {
    "mla": transformer(model_config(mla(), mtp=2)),
    "mla with yarn": transformer(model_config(mla(query_rank=None, rope=STRETCHED), mtp=1)),
    "gqa": transformer(model_config(gqa(), mtp=3)),
    "grouped": transformer(
        model_config(gqa(), d_model=12, layers=(EVEN,)), torch.float32
    ).requires_grad_(True),  # the rule groups where gradients are wanted
    "routers with empty slots": transformer(sized(layers=ROUTERS, mtp=modules(ROUTERS, 2))),
    "recurrent state": transformer(sized(layers=OUTSIDE, mtp=modules(OUTSIDE[:1], 1))),
    **{name: transformer(config(mtp=2)) for name, config in VARIED.items()},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_every_suffixed_tensor_has_the_shape_its_name_says(model):
    with watch_names(lambda file: file.startswith(PACKAGES)) as found:
        run_everything(model)
    wrong = [f"{place}: {complaint}" for place in sorted(found) for complaint in found[place]]
    assert not wrong, "\n".join(wrong)
    assert len(found) > 25  # functions that were seen
    assert ("experts.py: experts_grouped" in found) == (model is MODELS["grouped"])


@pytest.mark.parametrize(
    ("planted", "shapes", "complaints"),
    [
        (lambda x_BTD, y_BT: None, [(2, 3, 4), (2, 3, 4)], {"y_BT has 3 dimensions"}),
        (lambda x_ND, y_ND: None, [(4, 5), (5, 5)], {"y_ND: N = 5, but 4 in x_ND"}),
        (lambda x_NN: None, [(4, 5)], {"x_NN: N = 5, but 4 in x_NN"}),
        (lambda x_ND, y_N1: None, [(4, 5), (4, 2)], {"y_N1: 1 = 2, but 1 in its name"}),
        (lambda x_ND, y_nD: None, [(4, 5), (3, 5)], set()),  # another letter
        (lambda x_ND, y_ND: None, [(4, 5), (1, 5)], set()),  # broadcasts
        (lambda x_ND, y_ND, z_ND: None, [(1, 5), (4, 5), (3, 5)], {"z_ND: N = 3, but 4 in y_ND"}),
        (lambda q_head, mtp_loss: None, [(4,), (4, 5)], set()),  # words, not suffixes
    ],
)
def test_the_checker_catches_a_planted_mismatch_and_nothing_else(planted, shapes, complaints):
    tensors = [torch.zeros(shape) for shape in shapes]
    with watch_names(__file__.__eq__) as found:
        planted(*tensors)
    assert found[f"{Path(__file__).name}: <lambda>"] == complaints
