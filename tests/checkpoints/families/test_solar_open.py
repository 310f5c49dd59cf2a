"""Solar-Open: grouped-query attention without q/k norms, V3's routing in every layer."""

import pytest
from files import REMOVED
from layouts import fused
from tiny import sparse
from torch import Tensor
from traps import (
    ROPE,
    TINY,
    V3_EXPERTS,
    YARN,
    biases_in_a_layer,
    check_bias_kept_wide,
    check_gate_comes_first,
    check_masked_groups,
    check_refused,
    check_router_precision,
    check_routing,
    check_weights_without_the_bias,
    experts_of,
    pair,
    read,
)

from moe import ConfigError

MODEL_TYPES = ("solar_open",)
SOLAR = {
    "architectures": ["SolarOpenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "max_position_embeddings": 131072,
    "model_type": "solar_open",
    "moe_intermediate_size": 1280,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536},
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 196608,
}
PUBLISHED = {"Solar-Open-100B": SOLAR}
FIGURES = {"Solar-Open-100B": (102.652, 12.055, 11.25)}
NAMES = {
    "model.embed_tokens.weight": [196608, 4096],
    "model.norm.weight": [4096],
    "lm_head.weight": [196608, 4096],
    "model.layers.0.input_layernorm.weight": [4096],
    "model.layers.0.post_attention_layernorm.weight": [4096],
    "model.layers.0.self_attn.q_proj.weight": [8192, 4096],
    "model.layers.0.self_attn.k_proj.weight": [1024, 4096],
    "model.layers.0.self_attn.v_proj.weight": [1024, 4096],
    "model.layers.0.self_attn.o_proj.weight": [4096, 8192],
    "model.layers.0.mlp.gate.weight": [128, 4096],
    "model.layers.0.mlp.gate.e_score_correction_bias": [128],
    "model.layers.0.mlp.experts.0.gate_proj.weight": [1280, 4096],
    "model.layers.0.mlp.experts.0.up_proj.weight": [1280, 4096],
    "model.layers.0.mlp.experts.0.down_proj.weight": [4096, 1280],
    "model.layers.0.mlp.experts.127.gate_proj.weight": [1280, 4096],
    "model.layers.0.mlp.experts.127.up_proj.weight": [1280, 4096],
    "model.layers.0.mlp.experts.127.down_proj.weight": [4096, 1280],
    "model.layers.0.mlp.shared_experts.gate_proj.weight": [1280, 4096],
    "model.layers.0.mlp.shared_experts.up_proj.weight": [1280, 4096],
    "model.layers.0.mlp.shared_experts.down_proj.weight": [4096, 1280],
}
SIZES = TINY | V3_EXPERTS | {"head_dim": 14}
PEERS = {
    "groups": SIZES,
    "one group, biases": SIZES
    | {"attention_bias": True, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "not normalised, every head with keys of its own": SIZES
    | {"norm_topk_prob": False, "num_key_value_heads": 6, "head_dim": 10},
    "tied, another base of rope, a large epsilon": SIZES
    | {"tie_word_embeddings": True, "rope_parameters": ROPE, "rms_norm_eps": 0.03},
    "yarn": SIZES | {"rope_parameters": YARN},
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"fused experts": fused(tensors)}


def test_every_layer_is_sparse_and_its_routing_has_one_group_where_none_is_given():
    assert experts_of(SOLAR) == sparse(
        num_experts=128,
        top_k=8,
        expert_width=1280,
        scoring="sigmoid",
        selection_bias=True,
        group_score="top2_sum",
        normalize=True,
        normalize_epsilon=1e-20,
        shared_width=1280,
    )
    assert {layer.feed_forward for layer in read(SOLAR).layers} == {experts_of(SOLAR)}
    assert read(SOLAR, n_group=1, topk_group=1) == read(SOLAR)


def test_yarn_scales_cos_and_sin_and_leaves_the_softmax():
    rope = read(SOLAR).layers[0].attention.rope
    assert rope.yarn.factor == 2.0
    assert rope.yarn.original_length == 65536
    assert rope.amplitude == pytest.approx(1.0693147)  # 0.1 ln 2 + 1
    assert rope.softmax_multiplier == 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qk_norm", True),
        ("first_k_dense_replace", 1),
        ("sliding_window", 4096),
        ("scoring_func", "softmax"),
    ],
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", SOLAR, **{key: value})


def test_trap_15_experts_of_masked_groups_never_win(tmp_path):
    check_masked_groups(tmp_path, "solar_open", SIZES)


def test_trap_16_weights_are_not_taken_from_biased_scores(tmp_path):
    check_weights_without_the_bias(tmp_path, "solar_open", SIZES)


def test_trap_18_whether_weights_are_normalised_is_read_and_never_assumed():
    assert not experts_of(SOLAR, norm_topk_prob=False).router.normalize
    with pytest.raises(ConfigError, match="norm_topk_prob is missing"):
        read(SOLAR, norm_topk_prob=REMOVED)


@pytest.mark.parametrize("normalised", [False, True])
def test_trap_20_the_scaling_factor_multiplies_the_weights(tmp_path, normalised):
    peer, model = pair(tmp_path, "solar_open", SIZES | {"norm_topk_prob": normalised})
    for weights_NE in check_routing(peer, model):
        if normalised:
            assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(2.2)
    assert experts_of(SOLAR, routed_scaling_factor=2.5).router.scale == 2.5


def test_trap_21_the_selection_bias_stays_float32(tmp_path):
    check_bias_kept_wide(tmp_path, "solar_open", SIZES)


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "solar_open", SIZES, wide=True)


@pytest.mark.parametrize(("groups", "kept"), [(3, 2), (1, 1)])
def test_trap_23_a_group_counts_by_its_two_best_and_a_single_one_masks_nothing(
    tmp_path, groups, kept
):
    check_routing(*pair(tmp_path, "solar_open", SIZES | {"n_group": groups, "topk_group": kept}))


@pytest.mark.parametrize(("count", "width"), [(1, 1280), (2, 2560), (None, 0)])
def test_trap_27_shared_experts_are_one_of_their_summed_width(count, width):
    moe = experts_of(SOLAR, n_shared_experts=count)
    assert (moe.shared_width, moe.shared_gate) == (width, False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "solar_open", SIZES, fused)


def test_trap_46_biases_are_on_queries_keys_and_values_only(tmp_path):
    peer, _ = pair(tmp_path, "solar_open", SIZES | {"attention_bias": True})
    assert biases_in_a_layer(peer) == {"q_proj", "k_proj", "v_proj"}
    attention = read(SOLAR, attention_bias=True).layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (True, False)
