"""Granite-MoE: four multipliers, a softmax over the chosen logits, experts fused on disk."""

import pytest
from files import REMOVED, tensors_of, write_tensors
from layouts import renamed, split
from torch import Tensor
from traps import (
    ROPE,
    TINY,
    YARN,
    biases_in_a_layer,
    check_gate_comes_first,
    check_refused,
    check_router_precision,
    check_routing,
    pair,
    random_tokens,
    read,
)

from checkpoints import load_model
from moe import ConfigError

MODEL_TYPES = ("granitemoe",)
GRANITE_1B = {
    "architectures": ["GraniteMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "model_type": "granitemoe",
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "use_cache": True,
    "vocab_size": 49155,
}
PUBLISHED = {
    "granite-3.0-1b-a400m": GRANITE_1B,
    "granite-3.1-3b-a800m": GRANITE_1B
    | {
        "hidden_size": 1536,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_local_experts": 40,
        "rope_theta": 10000000.0,
    },
}
FIGURES = {  # the embedding is the head: it counts once
    "granite-3.0-1b-a400m": (1.335, 0.429, 0.429),
    "granite-3.1-3b-a800m": (3.299, 0.883, 0.883),
}
NAMES = {
    "model.embed_tokens.weight": [49155, 1024],
    "model.norm.weight": [1024],
    "model.layers.23.input_layernorm.weight": [1024],
    "model.layers.23.post_attention_layernorm.weight": [1024],
    "model.layers.23.self_attn.q_proj.weight": [1024, 1024],
    "model.layers.23.self_attn.k_proj.weight": [512, 1024],
    "model.layers.23.self_attn.v_proj.weight": [512, 1024],
    "model.layers.23.self_attn.o_proj.weight": [1024, 1024],
    "model.layers.23.block_sparse_moe.router.layer.weight": [32, 1024],
    "model.layers.23.block_sparse_moe.input_linear.weight": [32, 1024, 1024],
    "model.layers.23.block_sparse_moe.output_linear.weight": [32, 1024, 512],
}
SIZES = TINY | {
    "intermediate_size": 28,
    "num_local_experts": 7,
    "num_experts_per_tok": 3,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 1.7,
}
PEERS = {
    "four multipliers": SIZES,
    "four multipliers, tied": SIZES | {"tie_word_embeddings": True, "rms_norm_eps": 0.03},
    "large and whole multipliers": SIZES
    | {
        "attention_multiplier": 1,
        "embedding_multiplier": 12,
        "residual_multiplier": 1.5,
        "logits_scaling": 0.3,
        "tie_word_embeddings": True,
        "num_key_value_heads": 6,
    },
    "biases, wide heads, one expert": SIZES
    | {"attention_bias": True, "head_dim": 14, "rope_parameters": ROPE, "num_experts_per_tok": 1},
    "yarn, all experts": SIZES | {"rope_parameters": YARN, "num_experts_per_tok": 7},
}
AS_TRANSFORMERS_HOLDS_IT = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
    "router.layer.weight": "router.weight",
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    held = renamed(tensors, AS_TRANSFORMERS_HOLDS_IT)
    return {"as transformers holds it": held, "experts one by one": split(held)}


def test_each_multiplier_has_its_place():
    config = read(GRANITE_1B)
    assert (config.embedding_multiplier, config.logits_multiplier) == (12.0, 1 / 6)
    assert {layer.residual_multiplier for layer in config.layers} == {0.22}
    assert {layer.attention.scale for layer in config.layers} == {0.015625}  # and not 1 / sqrt(64)


@pytest.mark.parametrize("key", ["attention", "embedding", "residual"])
def test_no_multiplier_is_assumed(key):
    with pytest.raises(ConfigError, match=f"{key}_multiplier is missing"):
        read(GRANITE_1B, **{f"{key}_multiplier": REMOVED})


@pytest.mark.parametrize("divisor", [0, -1.0])
def test_logits_are_divided_by_something_positive(tmp_path, divisor):
    check_refused(tmp_path, f"logits_scaling = {divisor}", GRANITE_1B, logits_scaling=divisor)
    with pytest.raises(ConfigError, match="logits_scaling is missing"):
        read(GRANITE_1B, logits_scaling=REMOVED)


def test_the_shared_expert_of_a_relative_is_refused(tmp_path):
    check_refused(tmp_path, "num_shared_experts = 2", GRANITE_1B, num_shared_experts=2)


def test_trap_17_a_softmax_over_the_chosen_is_one_over_all_that_is_normalised(tmp_path):
    peer, model = pair(tmp_path, "granitemoe", SIZES)
    for weights_NE in check_routing(peer, model):
        assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("said", [False, None, REMOVED])
def test_trap_19_weights_are_normalised_whatever_the_config_says(said):
    assert read(GRANITE_1B, norm_topk_prob=said).layers[0].feed_forward.router.normalize


def test_trap_22_the_router_multiplies_in_the_weights_precision(tmp_path):
    check_router_precision(tmp_path, "granitemoe", SIZES, wide=False)


@pytest.mark.parametrize(
    ("spellings", "fused"),
    [({}, "input_linear.weight"), (AS_TRANSFORMERS_HOLDS_IT, "experts.gate_up_proj")],
)
def test_trap_29_the_rows_of_gate_come_first(tmp_path, spellings, fused):
    check_gate_comes_first(
        tmp_path, "granitemoe", SIZES, lambda tensors: renamed(tensors, spellings), fused
    )


def test_trap_44_the_embedding_is_the_head_and_a_file_may_hold_it_twice(tmp_path, recwarn):
    assert read(GRANITE_1B).tied_embeddings
    _, model = pair(tmp_path, "granitemoe", PEERS["four multipliers, tied"])
    stored = tensors_of(tmp_path)
    assert "lm_head.weight" not in stored
    write_tensors(
        tmp_path, stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    )
    tokens_BT = random_tokens(5)
    assert load_model(tmp_path, progress=False)(tokens_BT).equal(model(tokens_BT))
    assert not recwarn.list


def test_trap_46_biases_are_on_all_four_projections(tmp_path):
    peer, _ = pair(tmp_path, "granitemoe", PEERS["biases, wide heads, one expert"])
    assert biases_in_a_layer(peer) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    attention = read(GRANITE_1B, attention_bias=True).layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (True, True)
