"""GLM-4.7-Flash: DeepSeek-V3 with other sizes, its dense layers given as a list."""

import pytest
from files import REMOVED
from layouts import fused
from torch import Tensor
from traps import (
    ROPE,
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
    check_router_precision,
    check_routing,
    check_states_are_normed,
    check_weights_without_the_bias,
    experts_of,
    pair,
    read,
)

from moe import ConfigError, DenseConfig

MODEL_TYPES = ("glm4_moe_lite",)
FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [154820, 154827, 154829],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 154820,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.0rc0",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
PUBLISHED = {"GLM-4.7-Flash": FLASH}
FIGURES = {"GLM-4.7-Flash": (29.943, 3.897, 3.580)}
NAMES = {
    "model.embed_tokens.weight": [154880, 2048],
    "model.norm.weight": [2048],
    "lm_head.weight": [154880, 2048],
    "model.layers.0.input_layernorm.weight": [2048],
    "model.layers.0.post_attention_layernorm.weight": [2048],
    "model.layers.0.self_attn.q_a_proj.weight": [768, 2048],
    "model.layers.0.self_attn.q_a_layernorm.weight": [768],
    "model.layers.0.self_attn.q_b_proj.weight": [5120, 768],
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": [576, 2048],
    "model.layers.0.self_attn.kv_a_layernorm.weight": [512],
    "model.layers.0.self_attn.kv_b_proj.weight": [8960, 512],
    "model.layers.0.self_attn.o_proj.weight": [2048, 5120],
    "model.layers.0.mlp.gate_proj.weight": [10240, 2048],
    "model.layers.0.mlp.up_proj.weight": [10240, 2048],
    "model.layers.0.mlp.down_proj.weight": [2048, 10240],
    "model.layers.46.input_layernorm.weight": [2048],
    "model.layers.46.post_attention_layernorm.weight": [2048],
    "model.layers.46.self_attn.q_a_proj.weight": [768, 2048],
    "model.layers.46.self_attn.q_a_layernorm.weight": [768],
    "model.layers.46.self_attn.q_b_proj.weight": [5120, 768],
    "model.layers.46.self_attn.kv_a_proj_with_mqa.weight": [576, 2048],
    "model.layers.46.self_attn.kv_a_layernorm.weight": [512],
    "model.layers.46.self_attn.kv_b_proj.weight": [8960, 512],
    "model.layers.46.self_attn.o_proj.weight": [2048, 5120],
    "model.layers.46.mlp.gate.weight": [64, 2048],
    "model.layers.46.mlp.gate.e_score_correction_bias": [64],
    "model.layers.46.mlp.experts.0.gate_proj.weight": [1536, 2048],
    "model.layers.46.mlp.experts.0.up_proj.weight": [1536, 2048],
    "model.layers.46.mlp.experts.0.down_proj.weight": [2048, 1536],
    "model.layers.46.mlp.experts.63.gate_proj.weight": [1536, 2048],
    "model.layers.46.mlp.experts.63.up_proj.weight": [1536, 2048],
    "model.layers.46.mlp.experts.63.down_proj.weight": [2048, 1536],
    "model.layers.46.mlp.shared_experts.gate_proj.weight": [1536, 2048],
    "model.layers.46.mlp.shared_experts.up_proj.weight": [1536, 2048],
    "model.layers.46.mlp.shared_experts.down_proj.weight": [2048, 1536],
    "model.layers.47.enorm.weight": [2048],
    "model.layers.47.hnorm.weight": [2048],
    "model.layers.47.eh_proj.weight": [2048, 4096],
    "model.layers.47.embed_tokens.weight": [154880, 2048],
    "model.layers.47.shared_head.norm.weight": [2048],
    "model.layers.47.shared_head.head.weight": [154880, 2048],
    "model.layers.47.input_layernorm.weight": [2048],
    "model.layers.47.post_attention_layernorm.weight": [2048],
    "model.layers.47.self_attn.q_a_proj.weight": [768, 2048],
    "model.layers.47.self_attn.q_a_layernorm.weight": [768],
    "model.layers.47.self_attn.q_b_proj.weight": [5120, 768],
    "model.layers.47.self_attn.kv_a_proj_with_mqa.weight": [576, 2048],
    "model.layers.47.self_attn.kv_a_layernorm.weight": [512],
    "model.layers.47.self_attn.kv_b_proj.weight": [8960, 512],
    "model.layers.47.self_attn.o_proj.weight": [2048, 5120],
    "model.layers.47.mlp.gate.weight": [64, 2048],
    "model.layers.47.mlp.gate.e_score_correction_bias": [64],
    "model.layers.47.mlp.experts.0.gate_proj.weight": [1536, 2048],
    "model.layers.47.mlp.experts.0.up_proj.weight": [1536, 2048],
    "model.layers.47.mlp.experts.0.down_proj.weight": [2048, 1536],
    "model.layers.47.mlp.experts.63.gate_proj.weight": [1536, 2048],
    "model.layers.47.mlp.experts.63.up_proj.weight": [1536, 2048],
    "model.layers.47.mlp.experts.63.down_proj.weight": [2048, 1536],
    "model.layers.47.mlp.shared_experts.gate_proj.weight": [1536, 2048],
    "model.layers.47.mlp.shared_experts.up_proj.weight": [1536, 2048],
    "model.layers.47.mlp.shared_experts.down_proj.weight": [2048, 1536],
}
SIZES = (
    TINY
    | V3_EXPERTS
    | {
        "num_key_value_heads": 6,
        "kv_lora_rank": 20,
        "q_lora_rank": 22,
        "qk_nope_head_dim": 14,
        "qk_rope_head_dim": 6,
        "v_head_dim": 18,
    }
)
PEERS = {
    "compressed queries, groups": SIZES,
    "plain queries, biases, narrow values, one group": SIZES
    | {
        "q_lora_rank": None,
        "attention_bias": True,
        "v_head_dim": 10,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "half-split pairs, dense layers in between, not normalised": SIZES
    | {
        "num_hidden_layers": 3,
        "rope_interleave": False,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "norm_topk_prob": False,
        "attention_bias": True,
    },
    "tied, all sparse, a large epsilon": SIZES
    | {
        "tie_word_embeddings": True,
        "mlp_layer_types": ["sparse", "sparse"],
        "rope_parameters": ROPE,
        "rms_norm_eps": 0.03,
    },
    "yarn": SIZES | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}},
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"fused experts": fused(tensors)}


def dense_layers(**changes) -> list[int]:
    kinds = [layer.feed_forward for layer in read(FLASH, **changes).layers]
    return [i for i, kind in enumerate(kinds) if isinstance(kind, DenseConfig)]


def test_the_kinds_of_layers_come_from_a_list_or_from_a_number():
    assert dense_layers() == [0]
    assert dense_layers(first_k_dense_replace=REMOVED) == [0]
    assert dense_layers(first_k_dense_replace=3) == [0, 1, 2]
    kinds = ["sparse", "dense"] * 23 + ["sparse"]
    assert dense_layers(mlp_layer_types=kinds) == list(range(1, 47, 2))


def test_trap_40_a_list_of_layers_may_go_on_with_the_mtp_module():
    kinds = ["sparse", "dense"] * 24
    assert dense_layers(mlp_layer_types=kinds) == list(range(1, 47, 2))
    assert len(read(FLASH, mlp_layer_types=kinds).layers) == 47


@pytest.mark.parametrize("kinds", [["dense"] * 46, ["dense"] * 46 + ["moe"], "dense", [1] * 47])
def test_a_list_of_layers_that_does_not_fit_is_refused(tmp_path, kinds):
    check_refused(tmp_path, "mlp_layer_types = ", FLASH, mlp_layer_types=kinds)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scoring_func", "softmax"), ("partial_rotary_factor", 0.5), ("index_topk", 2048)],
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", FLASH, **{key: value})


def test_trap_01_yarn_multiplies_the_softmax_scale_once():
    scaling = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    scaling["original_max_position_embeddings"] = 4096
    model = build_on_meta(FLASH, rope_scaling=scaling, num_hidden_layers=1)
    assert model.layers[0].attention.scale == pytest.approx(1.873854 / 16, rel=1e-6)
    assert model.config.layers[0].attention.rope.amplitude == 1.0
    assert build_on_meta(FLASH, num_hidden_layers=1).layers[0].attention.scale == 1 / 16


def test_trap_04_neighbours_are_rotated_unless_the_config_says_otherwise():
    assert read(FLASH).layers[0].attention.rope.layout == "interleaved"
    assert read(FLASH, rope_interleave=False).layers[0].attention.rope.layout == "half"


def test_trap_15_experts_of_masked_groups_never_win(tmp_path):
    check_masked_groups(tmp_path, "glm4_moe_lite", SIZES)


def test_trap_16_weights_are_not_taken_from_biased_scores(tmp_path):
    check_weights_without_the_bias(tmp_path, "glm4_moe_lite", SIZES)


def test_trap_18_whether_weights_are_normalised_is_read_and_never_assumed():
    assert experts_of(FLASH).router.normalize
    assert not experts_of(FLASH, norm_topk_prob=False).router.normalize
    with pytest.raises(ConfigError, match="norm_topk_prob is missing"):
        read(FLASH, norm_topk_prob=REMOVED)


@pytest.mark.parametrize("normalised", [False, True])
def test_trap_20_the_scaling_factor_multiplies_the_weights(tmp_path, normalised):
    peer, model = pair(tmp_path, "glm4_moe_lite", SIZES | {"norm_topk_prob": normalised})
    (weights_NE,) = check_routing(peer, model)
    if normalised:
        assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(2.2)
    assert experts_of(FLASH).router.scale == 1.8


def test_trap_21_the_selection_bias_stays_float32(tmp_path):
    check_bias_kept_wide(tmp_path, "glm4_moe_lite", SIZES)


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "glm4_moe_lite", SIZES, wide=True)


@pytest.mark.parametrize(("groups", "kept"), [(3, 2), (1, 1)])
def test_trap_23_a_group_counts_by_its_two_best_and_a_single_one_masks_nothing(
    tmp_path, groups, kept
):
    sizes = SIZES | {"n_group": groups, "topk_group": kept}
    check_routing(*pair(tmp_path, "glm4_moe_lite", sizes))


@pytest.mark.parametrize(("count", "width"), [(1, 1536), (2, 3072), (0, 0)])
def test_trap_27_shared_experts_are_one_of_their_summed_width(count, width):
    moe = experts_of(FLASH, n_shared_experts=count)
    assert (moe.shared_width, moe.shared_gate) == (width, False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "glm4_moe_lite", SIZES, fused)


def test_trap_41_the_norms_of_the_latents_have_an_epsilon_of_their_own():
    config = read(FLASH, rms_norm_eps=1e-3)
    assert config.norm_epsilon == 1e-3
    assert {layer.attention.latent_norm_epsilon for layer in config.layers} == {1e-6}


def test_trap_46_biases_are_on_the_compressions_and_the_output(tmp_path):
    peer, _ = pair(tmp_path, "glm4_moe_lite", SIZES | {"attention_bias": True})
    assert biases_in_a_layer(peer) == {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"}
    attention = build_on_meta(FLASH, attention_bias=True, num_hidden_layers=1).layers[0].attention
    biased = {name for name, _ in attention.named_parameters() if name.endswith("bias")}
    assert biased == {"q.compress.bias", "kv_compress.bias", "o.bias"}


def test_trap_47_the_embedding_comes_before_the_state(tmp_path):
    check_embedding_comes_first(tmp_path, "glm4_moe_lite", SIZES)


def test_trap_48_states_are_handed_on_after_their_norm(tmp_path):
    check_states_are_normed(tmp_path, "glm4_moe_lite", SIZES)


def test_trap_49_the_layer_behind_the_last_one_is_no_main_layer(tmp_path):
    check_mtp_layer_is_apart(tmp_path, "glm4_moe_lite", SIZES)
