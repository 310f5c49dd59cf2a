"""FlexOlmo: OLMoE's attention and experts with the norms behind them instead of before."""

import pytest
from files import REMOVED, tensors_of
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

MODEL_TYPES = ("flex_olmo",)
FLEX = {
    "architectures": ["FlexOlmoForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "flex_olmo",
    "norm_topk_prob": False,
    "num_attention_heads": 32,
    "num_experts": 7,
    "num_experts_per_tok": 7,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "output_router_logits": False,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.55.0",
    "use_cache": True,
    "vocab_size": 100352,
}
PUBLISHED = {
    "FlexOlmo-7x7B-1T": FLEX,
    "Flex-code-2x7B-1T": FLEX | {"num_experts": 2, "num_experts_per_tok": 2},
}
FIGURES = {  # every token uses every expert
    "FlexOlmo-7x7B-1T": (33.271, 33.271, 32.860),
    "Flex-code-2x7B-1T": (11.627, 11.627, 11.216),
}
NAMES = {
    "model.embed_tokens.weight": [100352, 4096],
    "model.norm.weight": [4096],
    "lm_head.weight": [100352, 4096],
    "model.layers.31.post_attention_layernorm.weight": [4096],
    "model.layers.31.post_feedforward_layernorm.weight": [4096],
    "model.layers.31.self_attn.q_proj.weight": [4096, 4096],
    "model.layers.31.self_attn.k_proj.weight": [4096, 4096],
    "model.layers.31.self_attn.v_proj.weight": [4096, 4096],
    "model.layers.31.self_attn.o_proj.weight": [4096, 4096],
    "model.layers.31.self_attn.q_norm.weight": [4096],
    "model.layers.31.self_attn.k_norm.weight": [4096],
    "model.layers.31.mlp.gate.weight": [7, 4096],
    "model.layers.31.mlp.experts.0.gate_proj.weight": [11008, 4096],
    "model.layers.31.mlp.experts.0.up_proj.weight": [11008, 4096],
    "model.layers.31.mlp.experts.0.down_proj.weight": [4096, 11008],
    "model.layers.31.mlp.experts.6.gate_proj.weight": [11008, 4096],
    "model.layers.31.mlp.experts.6.up_proj.weight": [11008, 4096],
    "model.layers.31.mlp.experts.6.down_proj.weight": [4096, 11008],
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
    "tied, wide heads, another base of rope, a large epsilon": SIZES
    | {
        "tie_word_embeddings": True,
        "head_dim": 14,
        "num_key_value_heads": 2,
        "rope_parameters": ROPE,
        "rms_norm_eps": 0.03,
    },
    "yarn": SIZES | {"rope_parameters": YARN},
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"fused experts": fused(tensors)}


def test_norms_stand_behind_attention_and_experts_and_nowhere_before_them(tmp_path):
    for layer in read(FLEX).layers:
        assert (layer.norm_before, layer.norm_after) == (False, True)
    _, model = pair(tmp_path, "flex_olmo", SIZES)
    stored = tensors_of(tmp_path)
    for i, block in enumerate(model.layers):
        theirs = f"model.layers.{i}.post_"
        after_attention = stored[theirs + "attention_layernorm.weight"]
        assert block.attention_output_norm.weight.equal(after_attention)
        after_experts = stored[theirs + "feedforward_layernorm.weight"]
        assert block.feed_forward_output_norm.weight.equal(after_experts)


def test_rope_has_a_base_of_its_own_where_none_is_given():
    assert read(FLEX, rope_theta=REMOVED) == read(FLEX)
    assert read(FLEX).layers[0].attention.rope.theta == 5e5


def test_clipped_queries_keys_and_values_are_refused(tmp_path):
    check_refused(tmp_path, "clip_qkv = 8.0", FLEX, clip_qkv=8.0)


@pytest.mark.parametrize("normalised", [False, True])
def test_trap_17_the_softmax_runs_over_all_experts_before_the_choice(tmp_path, normalised):
    peer, model = pair(tmp_path, "flex_olmo", SIZES | {"norm_topk_prob": normalised})
    for weights_NE in check_routing(peer, model):
        mean = weights_NE.sum(dim=-1).mean().item()
        assert mean == pytest.approx(1.0) if normalised else mean < 0.95


def test_trap_18_weights_and_number_of_experts_are_read_and_never_assumed():
    assert not read(FLEX).layers[0].feed_forward.router.normalize
    assert (
        read(FLEX).layers[0].feed_forward.router.top_k == 7
    )  # and not 5 as transformers' class says
    for key in ("norm_topk_prob", "num_experts_per_tok", "num_experts"):
        with pytest.raises(ConfigError, match=f"{key}.* is missing"):
            read(FLEX, **{key: REMOVED})


def test_trap_22_the_router_multiplies_in_the_weights_precision(tmp_path):
    check_router_precision(tmp_path, "flex_olmo", SIZES, wide=False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "flex_olmo", SIZES, fused)


def test_trap_45_queries_and_keys_are_normalised_over_all_heads_at_once():
    attention = build_on_meta(FLEX, num_key_value_heads=4).layers[0].attention
    assert attention.q_norm.weight.shape == (32 * 128,)
    assert attention.k_norm.weight.shape == (4 * 128,)
