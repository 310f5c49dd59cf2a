"""MiniMax-M2: q/k norms over all heads, half of each head rotated, biased sigmoid routing."""

import pytest
from files import REMOVED
from layouts import fused, renamed, split
from torch import Tensor
from traps import (
    ROPE,
    TINY,
    YARN,
    build_on_meta,
    check_bias_kept_wide,
    check_gate_and_up,
    check_gate_comes_first,
    check_refused,
    check_router_precision,
    check_routing,
    check_weights_without_the_bias,
    experts_of,
    pair,
    read,
)

MODEL_TYPES = ("minimax_m2",)
M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [1] * 62,
    "bos_token_id": 200034,
    "eos_token_id": 200020,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "mlp_intermediate_size": 8192,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "output_router_logits": False,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.1",
    "use_cache": True,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
PUBLISHED = {"MiniMax-M2": M2}
FIGURES = {"MiniMax-M2": (228.690, 11.031, 10.416)}
NAMES = {
    "model.embed_tokens.weight": [200064, 3072],
    "model.norm.weight": [3072],
    "lm_head.weight": [200064, 3072],
    "model.layers.61.input_layernorm.weight": [3072],
    "model.layers.61.post_attention_layernorm.weight": [3072],
    "model.layers.61.self_attn.q_proj.weight": [6144, 3072],
    "model.layers.61.self_attn.k_proj.weight": [1024, 3072],
    "model.layers.61.self_attn.v_proj.weight": [1024, 3072],
    "model.layers.61.self_attn.o_proj.weight": [3072, 6144],
    "model.layers.61.self_attn.q_norm.weight": [6144],
    "model.layers.61.self_attn.k_norm.weight": [1024],
    "model.layers.61.block_sparse_moe.gate.weight": [256, 3072],
    "model.layers.61.block_sparse_moe.e_score_correction_bias": [256],
    "model.layers.61.block_sparse_moe.experts.0.w1.weight": [1536, 3072],
    "model.layers.61.block_sparse_moe.experts.0.w2.weight": [3072, 1536],
    "model.layers.61.block_sparse_moe.experts.0.w3.weight": [1536, 3072],
    "model.layers.61.block_sparse_moe.experts.255.w1.weight": [1536, 3072],
    "model.layers.61.block_sparse_moe.experts.255.w2.weight": [3072, 1536],
    "model.layers.61.block_sparse_moe.experts.255.w3.weight": [1536, 3072],
}
SIZES = TINY | {
    "intermediate_size": 28,
    "num_local_experts": 7,
    "num_experts_per_tok": 3,
    "head_dim": 16,
    "rotary_dim": 8,
}
PEERS = {
    "half a head rotated": SIZES,
    "less than half a head, another base": SIZES
    | {"head_dim": 14, "rotary_dim": 6}
    | {"rope_parameters": ROPE},
    "all of a head, tied, a large epsilon": SIZES
    | {
        "head_dim": 10,
        "rotary_dim": 10,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.03,
    },
    "partial_rotary_factor, one expert": SIZES
    | {
        "rotary_dim": None,
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.75},
        "num_experts_per_tok": 1,
    },
    "yarn on half a head": SIZES | {"rope_parameters": YARN},
}
W1_W3_W2 = ("w1", "w3", "w2")
AS_TRANSFORMERS_HOLDS_IT = {"block_sparse_moe.": "mlp."}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    stacked = fused(tensors, W1_W3_W2)
    held = renamed(stacked, AS_TRANSFORMERS_HOLDS_IT)
    return {
        "fused experts": stacked,
        "as transformers holds it": held,
        "transformers' names, experts one by one": split(held),
    }


def test_the_announced_mtp_modules_are_not_looked_for_because_none_are_published():
    assert read(M2).mtp.blocks == ()
    assert read(M2, num_mtp_modules=0) == read(M2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_norm_type", "per_head"),
        ("use_qk_norm", False),
        ("use_routing_bias", False),
        ("scoring_func", "softmax"),
        ("shared_intermediate_size", 1536),
        ("sliding_window", 4096),
        ("routed_scaling_factor", 2.0),
    ],
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", M2, **{key: value})


def test_layers_of_linear_attention_are_refused(tmp_path):
    kinds = [1] * 61 + [0]
    said = f"attn_type_list = {kinds}, expected 1 (full attention) in every layer"
    check_refused(tmp_path, said, M2, attn_type_list=kinds)


def test_trap_09_the_rotated_width_is_read_under_either_name():
    assert read(M2).layers[0].attention.rope.width == 64
    rope = {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.5}
    resaved = {"rope_theta": REMOVED, "rope_parameters": rope}
    assert read(M2, **resaved) == read(M2, **resaved, rotary_dim=REMOVED) == read(M2)
    other = {"rope_parameters": rope | {"partial_rotary_factor": 0.49}, "head_dim": 14}
    assert read(M2, **other).layers[0].attention.rope.width == 6  # and rotary_dim is the older


def test_trap_16_weights_are_not_taken_from_biased_scores(tmp_path):
    check_weights_without_the_bias(tmp_path, "minimax_m2", SIZES)


@pytest.mark.parametrize("said", [False, None, REMOVED])
def test_trap_19_weights_are_normalised_whatever_the_config_says(tmp_path, said):
    assert experts_of(M2, norm_topk_prob=said).router.normalize
    peer, model = pair(tmp_path, "minimax_m2", SIZES)
    for weights_NE in check_routing(peer, model):
        assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(1.0)


def test_trap_21_the_selection_bias_stays_float32(tmp_path):
    check_bias_kept_wide(tmp_path, "minimax_m2", SIZES)


def test_trap_22_the_router_multiplies_in_the_weights_precision(tmp_path):
    check_router_precision(tmp_path, "minimax_m2", SIZES, wide=False)


@pytest.mark.parametrize("held", [False, True])
def test_trap_29_the_rows_of_gate_come_first(tmp_path, held):
    spellings = AS_TRANSFORMERS_HOLDS_IT if held else {}
    check_gate_comes_first(
        tmp_path,
        "minimax_m2",
        SIZES,
        lambda tensors: renamed(fused(tensors, W1_W3_W2), spellings),
    )


def test_trap_30_w1_is_gate_and_w3_is_up(tmp_path):
    check_gate_and_up(*pair(tmp_path, "minimax_m2", SIZES))


def test_trap_45_queries_and_keys_are_normalised_over_all_heads_at_once():
    attention = build_on_meta(M2, num_hidden_layers=1).layers[0].attention
    assert attention.q_norm.weight.shape == (48 * 128,)
    assert attention.k_norm.weight.shape == (8 * 128,)
