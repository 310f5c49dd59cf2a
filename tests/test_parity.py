"""Our logits are those of transformers, through its files and our loader, however fed.

`pytest tests/test_parity.py -rP` prints the differences.
"""

import pytest
import torch
from published import YARN, random_peer, relative_difference, reload, save

from checkpoints import load_model, save_model
from moe import record_routing

BOUND = 1e-4

V2 = {
    "greedy": {"topk_method": "greedy", "q_lora_rank": None},
    "greedy, compressed queries": {"topk_method": "greedy", "q_lora_rank": 22},
    "groups": {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": None,
        "routed_scaling_factor": 16.0,
    },
    "groups, compressed queries": {
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 1,
        "q_lora_rank": 22,
    },
}
V3 = {
    "groups, normalised": {
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "q_lora_rank": 22,
    },
    "groups, not normalised": {
        "n_group": 3,
        "topk_group": 2,
        "norm_topk_prob": False,
        "q_lora_rank": None,
    },
    "one group, biases": {
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 22,
        "attention_bias": True,
        "routed_scaling_factor": 2.446,
    },
    "half-split pairs, narrow values": {
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 22,
        "rope_interleave": False,
        "v_head_dim": 10,
    },
    "tied": {"n_group": 2, "topk_group": 2, "q_lora_rank": 22, "tie_word_embeddings": True},
}
CASES = [
    pytest.param(family, {**changes, "rope_parameters": rope}, id=f"{family}: {name}, {kind}")
    for family, variants in (("deepseek_v2", V2), ("deepseek_v3", V3))
    for name, changes in variants.items()
    for kind, rope in (("yarn", YARN), ("plain rope", {"rope_type": "default", "rope_theta": 5e4}))
]
MOONLIGHT = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(103, (2, 41), generator=torch.Generator().manual_seed(7))


@pytest.mark.filterwarnings("ignore:the config announces")
@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(tmp_path, tokens_BT, family, changes):
    peer = random_peer(family, **changes)
    model = load_model(save(peer, tmp_path / "peer"), progress=False)
    expected_BTV = peer(tokens_BT).logits
    assert expected_BTV.std() > 0.1

    whole_BTV = model(tokens_BT)
    cache = model.make_cache(2, 41)
    chunks = [model(chunk, cache=cache) for chunk in tokens_BT.split([5, 1, 20, 15], dim=1)]
    cache = model.make_cache(2, 41)
    steps = [model(token, cache=cache) for token in tokens_BT.split(1, dim=1)]
    save_model(model, tmp_path / "ours")
    again, info = reload(tmp_path / "ours")
    assert not any(info.values()), info
    ways = {
        "whole": whole_BTV,
        "chunks": torch.cat(chunks, dim=1),
        "steps": torch.cat(steps, dim=1),
        "saved and read by transformers": again(tokens_BT).logits,
    }
    found = {way: relative_difference(ours, expected_BTV) for way, ours in ways.items()}
    print("".join(f"{way} {difference:.1e}  " for way, difference in found.items()))
    assert max(found.values()) < BOUND


@pytest.mark.filterwarnings("ignore:the config announces")
@torch.no_grad()
def test_routed_experts_are_the_same_set(tmp_path, tokens_BT):
    peer = random_peer("deepseek_v3", **V3["groups, normalised"])
    bias_E = peer.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias_E.min() < -0.1
    assert bias_E.max() > 0.1
    model = load_model(save(peer, tmp_path / "peer"), progress=False)
    chosen = {}
    for i, layer in enumerate(peer.model.layers[1:], start=1):
        layer.mlp.gate.register_forward_hook(lambda m, x, out, i=i: chosen.__setitem__(i, out[2]))
    peer(tokens_BT)
    with record_routing(model) as routings:
        model(tokens_BT)
    assert routings.keys() == chosen.keys()
    for i, expected_NK in chosen.items():
        assert routings[i].experts_NK.sort().values.equal(expected_NK.sort().values)
