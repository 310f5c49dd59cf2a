"""OLMoE: full-width q/k norms, many small experts, softmax weights as they are."""

import pytest
from files import REMOVED
from layouts import fused
from torch import Tensor
from traps import (
    ROPE,
    TINY,
    YARN,
    build_on_meta,
    check_gate_comes_first,
    check_refused,
    check_router_precision,
    check_routing,
    pair,
    read,
)

from moe import ConfigError

MODEL_TYPES = ("olmoe",)
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}
PUBLISHED = {"OLMoE-1B-7B": OLMOE}
FIGURES = {"OLMoE-1B-7B": (6.919, 1.282, 1.179)}
NAMES = {
    "model.embed_tokens.weight": [50304, 2048],
    "model.norm.weight": [2048],
    "lm_head.weight": [50304, 2048],
    "model.layers.3.input_layernorm.weight": [2048],
    "model.layers.3.post_attention_layernorm.weight": [2048],
    "model.layers.3.self_attn.q_proj.weight": [2048, 2048],
    "model.layers.3.self_attn.k_proj.weight": [2048, 2048],
    "model.layers.3.self_attn.v_proj.weight": [2048, 2048],
    "model.layers.3.self_attn.o_proj.weight": [2048, 2048],
    "model.layers.3.self_attn.q_norm.weight": [2048],
    "model.layers.3.self_attn.k_norm.weight": [2048],
    "model.layers.3.mlp.gate.weight": [64, 2048],
    "model.layers.3.mlp.experts.0.gate_proj.weight": [1024, 2048],
    "model.layers.3.mlp.experts.0.up_proj.weight": [1024, 2048],
    "model.layers.3.mlp.experts.0.down_proj.weight": [2048, 1024],
    "model.layers.3.mlp.experts.63.gate_proj.weight": [1024, 2048],
    "model.layers.3.mlp.experts.63.up_proj.weight": [1024, 2048],
    "model.layers.3.mlp.experts.63.down_proj.weight": [2048, 1024],
}
SIZES = TINY | {
    "intermediate_size": 28,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 6,
    "norm_topk_prob": False,
}
PEERS = {
    "plain": SIZES,
    "normalised, fewer heads of keys": SIZES | {"norm_topk_prob": True, "num_key_value_heads": 2},
    "biases, all experts": SIZES
    | {"attention_bias": True, "num_key_value_heads": 3, "num_experts_per_tok": 7},
    "tied, another base of rope, a large epsilon": SIZES
    | {"tie_word_embeddings": True, "rope_parameters": ROPE, "rms_norm_eps": 0.03},
    "yarn": SIZES | {"rope_parameters": YARN},
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"fused experts": fused(tensors)}


def test_the_width_of_an_expert_is_intermediate_size():
    moe = read(OLMOE).layers[0].feed_forward
    assert (moe.router.num_experts, moe.router.top_k, moe.expert_width, moe.shared_width) == (
        64,
        8,
        1024,
        0,
    )
    assert read(OLMOE, num_experts=REMOVED, num_local_experts=64) == read(OLMOE)


@pytest.mark.parametrize("heads", [REMOVED, None, 16])
def test_without_num_key_value_heads_every_head_has_its_own(heads):
    assert read(OLMOE, num_key_value_heads=heads) == read(OLMOE)


def test_clipped_queries_keys_and_values_are_refused(tmp_path):
    check_refused(tmp_path, "clip_qkv = 8.0", OLMOE, clip_qkv=8.0)


def test_a_shared_expert_is_refused(tmp_path):
    check_refused(tmp_path, "n_shared_experts = 2", OLMOE, n_shared_experts=2)


@pytest.mark.parametrize("normalised", [False, True])
def test_trap_17_the_softmax_runs_over_all_experts_before_the_choice(tmp_path, normalised):
    peer, model = pair(tmp_path, "olmoe", SIZES | {"norm_topk_prob": normalised})
    for weights_NE in check_routing(peer, model):
        mean = weights_NE.sum(dim=-1).mean().item()
        assert mean == pytest.approx(1.0) if normalised else mean < 0.95


def test_trap_18_whether_weights_are_normalised_is_read_and_never_assumed():
    assert not read(OLMOE).layers[0].feed_forward.router.normalize
    assert read(OLMOE, norm_topk_prob=True).layers[0].feed_forward.router.normalize
    with pytest.raises(ConfigError, match="norm_topk_prob is missing"):
        read(OLMOE, norm_topk_prob=REMOVED)


def test_trap_22_the_router_multiplies_in_the_weights_precision(tmp_path):
    check_router_precision(tmp_path, "olmoe", SIZES, wide=False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "olmoe", SIZES, fused)


def test_trap_45_queries_and_keys_are_normalised_over_all_heads_at_once():
    attention = build_on_meta(OLMOE, num_key_value_heads=4).layers[0].attention
    assert attention.q_norm.weight.shape == (16 * 128,)
    assert attention.k_norm.weight.shape == (4 * 128,)
