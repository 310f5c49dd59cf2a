"""GLM-4.5, 4.6, 4.7 and Air: half of each head rotated, V3's routing, an MTP module."""

import pytest
from files import REMOVED
from layouts import fused
from torch import Tensor
from traps import (
    TINY,
    V3_EXPERTS,
    YARN,
    biases_in_a_layer,
    build_on_meta,
    check_bias_kept_wide,
    check_embedding_comes_first,
    check_gate_comes_first,
    check_masked_groups,
    check_mtp_layer_is_apart,
    check_refused,
    check_rotated_part,
    check_router_precision,
    check_routing,
    check_states_are_normed,
    check_weights_without_the_bias,
    experts_of,
    pair,
    read,
)

from moe import ConfigError, DenseConfig

MODEL_TYPES = ("glm4_moe",)
AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
GLM = AIR | {
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
PUBLISHED = {
    "GLM-4.5": GLM,
    "GLM-4.6": GLM | {"max_position_embeddings": 202752},
    "GLM-4.5-Air": AIR,
}
FIGURES = {
    "GLM-4.5": (352.798, 33.632, 32.856),
    "GLM-4.6": (352.798, 33.632, 32.856),
    "GLM-4.5-Air": (106.852, 13.424, 12.803),
}
NAMES = {
    "model.embed_tokens.weight": [151552, 5120],
    "model.norm.weight": [5120],
    "lm_head.weight": [151552, 5120],
    "model.layers.0.input_layernorm.weight": [5120],
    "model.layers.0.post_attention_layernorm.weight": [5120],
    "model.layers.0.self_attn.q_proj.weight": [12288, 5120],
    "model.layers.0.self_attn.q_proj.bias": [12288],
    "model.layers.0.self_attn.k_proj.weight": [1024, 5120],
    "model.layers.0.self_attn.k_proj.bias": [1024],
    "model.layers.0.self_attn.v_proj.weight": [1024, 5120],
    "model.layers.0.self_attn.v_proj.bias": [1024],
    "model.layers.0.self_attn.o_proj.weight": [5120, 12288],
    "model.layers.0.self_attn.q_norm.weight": [128],
    "model.layers.0.self_attn.k_norm.weight": [128],
    "model.layers.0.mlp.gate_proj.weight": [12288, 5120],
    "model.layers.0.mlp.up_proj.weight": [12288, 5120],
    "model.layers.0.mlp.down_proj.weight": [5120, 12288],
    "model.layers.3.input_layernorm.weight": [5120],
    "model.layers.3.post_attention_layernorm.weight": [5120],
    "model.layers.3.self_attn.q_proj.weight": [12288, 5120],
    "model.layers.3.self_attn.q_proj.bias": [12288],
    "model.layers.3.self_attn.k_proj.weight": [1024, 5120],
    "model.layers.3.self_attn.k_proj.bias": [1024],
    "model.layers.3.self_attn.v_proj.weight": [1024, 5120],
    "model.layers.3.self_attn.v_proj.bias": [1024],
    "model.layers.3.self_attn.o_proj.weight": [5120, 12288],
    "model.layers.3.self_attn.q_norm.weight": [128],
    "model.layers.3.self_attn.k_norm.weight": [128],
    "model.layers.3.mlp.gate.weight": [160, 5120],
    "model.layers.3.mlp.gate.e_score_correction_bias": [160],
    "model.layers.3.mlp.experts.0.gate_proj.weight": [1536, 5120],
    "model.layers.3.mlp.experts.0.up_proj.weight": [1536, 5120],
    "model.layers.3.mlp.experts.0.down_proj.weight": [5120, 1536],
    "model.layers.3.mlp.experts.159.gate_proj.weight": [1536, 5120],
    "model.layers.3.mlp.experts.159.up_proj.weight": [1536, 5120],
    "model.layers.3.mlp.experts.159.down_proj.weight": [5120, 1536],
    "model.layers.3.mlp.shared_experts.gate_proj.weight": [1536, 5120],
    "model.layers.3.mlp.shared_experts.up_proj.weight": [1536, 5120],
    "model.layers.3.mlp.shared_experts.down_proj.weight": [5120, 1536],
    "model.layers.92.enorm.weight": [5120],
    "model.layers.92.hnorm.weight": [5120],
    "model.layers.92.eh_proj.weight": [5120, 10240],
    "model.layers.92.embed_tokens.weight": [151552, 5120],
    "model.layers.92.shared_head.norm.weight": [5120],
    "model.layers.92.shared_head.head.weight": [151552, 5120],
    "model.layers.92.input_layernorm.weight": [5120],
    "model.layers.92.post_attention_layernorm.weight": [5120],
    "model.layers.92.self_attn.q_proj.weight": [12288, 5120],
    "model.layers.92.self_attn.q_proj.bias": [12288],
    "model.layers.92.self_attn.k_proj.weight": [1024, 5120],
    "model.layers.92.self_attn.k_proj.bias": [1024],
    "model.layers.92.self_attn.v_proj.weight": [1024, 5120],
    "model.layers.92.self_attn.v_proj.bias": [1024],
    "model.layers.92.self_attn.o_proj.weight": [5120, 12288],
    "model.layers.92.self_attn.q_norm.weight": [128],
    "model.layers.92.self_attn.k_norm.weight": [128],
    "model.layers.92.mlp.gate.weight": [160, 5120],
    "model.layers.92.mlp.gate.e_score_correction_bias": [160],
    "model.layers.92.mlp.experts.0.gate_proj.weight": [1536, 5120],
    "model.layers.92.mlp.experts.0.up_proj.weight": [1536, 5120],
    "model.layers.92.mlp.experts.0.down_proj.weight": [5120, 1536],
    "model.layers.92.mlp.experts.159.gate_proj.weight": [1536, 5120],
    "model.layers.92.mlp.experts.159.up_proj.weight": [1536, 5120],
    "model.layers.92.mlp.experts.159.down_proj.weight": [5120, 1536],
    "model.layers.92.mlp.shared_experts.gate_proj.weight": [1536, 5120],
    "model.layers.92.mlp.shared_experts.up_proj.weight": [1536, 5120],
    "model.layers.92.mlp.shared_experts.down_proj.weight": [5120, 1536],
}
SIZES = (
    TINY
    | V3_EXPERTS
    | {
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
        "attention_bias": False,
        "use_qk_norm": True,
    }
)
PEERS = {
    "q/k norms, groups": SIZES,
    "biases, one group": SIZES
    | {"attention_bias": True, "use_qk_norm": False, "n_group": 1, "topk_group": 1},
    "less than half rotated, not normalised": SIZES
    | {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 2,
        "head_dim": 14,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 300.0,
            "partial_rotary_factor": 0.49,
        },
        "norm_topk_prob": False,
        "n_shared_experts": 1,
    },
    "tied, all rotated, no dense layer, a large epsilon": SIZES
    | {
        "tie_word_embeddings": True,
        "first_k_dense_replace": 0,
        "head_dim": 10,
        "partial_rotary_factor": 1.0,
        "attention_bias": True,
        "num_key_value_heads": 6,
        "rms_norm_eps": 0.03,
    },
    "yarn on half a head": SIZES | {"rope_parameters": YARN},
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"fused experts": fused(tensors)}


def test_the_large_ones_normalise_queries_and_keys_and_air_does_not():
    assert read(GLM).layers[0].attention.qk_norm.over == "head"
    assert read(AIR).layers[0].attention.qk_norm is None
    assert read(AIR, use_qk_norm=REMOVED) == read(AIR)


def test_dense_layers_come_first_and_then_sparse_ones():
    dense = [isinstance(layer.feed_forward, DenseConfig) for layer in read(GLM).layers]
    assert dense == [True] * 3 + [False] * 89
    assert [block.feed_forward for block in read(GLM).mtp.blocks] == [experts_of(GLM)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("sliding_window", 4096),
        ("q_lora_rank", 1536),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
    ],
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", GLM, **{key: value})


def test_trap_07_the_first_dimensions_of_a_head_are_rotated(tmp_path):
    single = SIZES | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    check_rotated_part(tmp_path, "glm4_moe", single, r"\.q_proj\.weight", slice(8), slice(8, None))


@pytest.mark.parametrize(
    ("head_dim", "factor", "width"), [(128, 0.5, 64), (192, 0.334, 64), (14, 0.49, 6)]
)
def test_trap_09_the_rotated_part_of_a_head_is_rounded_down(head_dim, factor, width):
    changes = {"head_dim": head_dim, "partial_rotary_factor": factor}
    attention = read(AIR, **changes).layers[0].attention
    assert (attention.rope.width, attention.head_width) == (width, head_dim)
    rope = {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": factor}
    inside = {"head_dim": head_dim, "partial_rotary_factor": 0.25, "rope_parameters": rope}
    assert read(AIR, **inside) == read(AIR, **changes)
    assert read(AIR, partial_rotary_factor=REMOVED) == read(AIR)


def test_trap_15_experts_of_masked_groups_never_win(tmp_path):
    check_masked_groups(tmp_path, "glm4_moe", SIZES)


def test_trap_16_weights_are_not_taken_from_biased_scores(tmp_path):
    check_weights_without_the_bias(tmp_path, "glm4_moe", SIZES)


def test_trap_18_whether_weights_are_normalised_is_read_and_never_assumed():
    assert experts_of(GLM).router.normalize
    assert not experts_of(GLM, norm_topk_prob=False).router.normalize
    with pytest.raises(ConfigError, match="norm_topk_prob is missing"):
        read(GLM, norm_topk_prob=REMOVED)


@pytest.mark.parametrize("normalised", [False, True])
def test_trap_20_the_scaling_factor_multiplies_the_weights(tmp_path, normalised):
    peer, model = pair(tmp_path, "glm4_moe", SIZES | {"norm_topk_prob": normalised})
    (weights_NE,) = check_routing(peer, model)
    if normalised:
        assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(2.2)
    with pytest.raises(ConfigError, match="routed_scaling_factor is missing"):
        read(GLM, routed_scaling_factor=REMOVED)


def test_trap_21_the_selection_bias_stays_float32(tmp_path):
    check_bias_kept_wide(tmp_path, "glm4_moe", SIZES)


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "glm4_moe", SIZES, wide=True)


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (3, 1), (1, 1)])
def test_trap_23_a_group_counts_by_its_two_best_and_a_single_one_masks_nothing(
    tmp_path, groups, kept
):
    check_routing(*pair(tmp_path, "glm4_moe", SIZES | {"n_group": groups, "topk_group": kept}))


@pytest.mark.parametrize(("count", "width"), [(1, 1536), (3, 4608), (0, 0), (None, 0)])
def test_trap_27_shared_experts_are_one_of_their_summed_width(count, width):
    moe = experts_of(GLM, n_shared_experts=count)
    assert (moe.shared_width, moe.shared_gate) == (width, False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "glm4_moe", SIZES, fused)


def test_trap_45_queries_and_keys_are_normalised_head_by_head():
    attention = build_on_meta(GLM, num_hidden_layers=1, first_k_dense_replace=1).layers[0].attention
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (128,)


def test_trap_46_biases_are_on_queries_keys_and_values_only(tmp_path):
    peer, _ = pair(tmp_path, "glm4_moe", SIZES | {"attention_bias": True})
    assert biases_in_a_layer(peer) == {"q_proj", "k_proj", "v_proj"}
    attention = read(GLM).layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (True, False)


def test_trap_47_the_embedding_comes_before_the_state(tmp_path):
    check_embedding_comes_first(tmp_path, "glm4_moe", SIZES)


def test_trap_48_states_are_handed_on_after_their_norm(tmp_path):
    check_states_are_normed(tmp_path, "glm4_moe", SIZES)


def test_trap_49_the_layer_behind_the_last_one_is_no_main_layer(tmp_path):
    check_mtp_layer_is_apart(tmp_path, "glm4_moe", SIZES)
