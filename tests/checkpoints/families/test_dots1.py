"""dots.llm1: multi-head attention with q/k norms per head, V3's routing, windows possible."""

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
    check_gate_comes_first,
    check_masked_groups,
    check_refused,
    check_router_precision,
    check_routing,
    check_weights_without_the_bias,
    check_window,
    experts_of,
    pair,
    read,
)

from moe import ConfigError

MODEL_TYPES = ("dots1",)
DOTS = {
    "architectures": ["Dots1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 151649,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 32768,
    "max_window_layers": 62,
    "model_type": "dots1",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": None,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 62,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "noaux_tc",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "topk_group": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
PUBLISHED = {"dots.llm1": DOTS}
FIGURES = {"dots.llm1": (142.774, 14.017, 13.394)}
NAMES = {
    "model.embed_tokens.weight": [152064, 4096],
    "model.norm.weight": [4096],
    "lm_head.weight": [152064, 4096],
    "model.layers.0.input_layernorm.weight": [4096],
    "model.layers.0.post_attention_layernorm.weight": [4096],
    "model.layers.0.self_attn.q_proj.weight": [4096, 4096],
    "model.layers.0.self_attn.k_proj.weight": [4096, 4096],
    "model.layers.0.self_attn.v_proj.weight": [4096, 4096],
    "model.layers.0.self_attn.o_proj.weight": [4096, 4096],
    "model.layers.0.self_attn.q_norm.weight": [128],
    "model.layers.0.self_attn.k_norm.weight": [128],
    "model.layers.0.mlp.gate_proj.weight": [10944, 4096],
    "model.layers.0.mlp.up_proj.weight": [10944, 4096],
    "model.layers.0.mlp.down_proj.weight": [4096, 10944],
    "model.layers.61.input_layernorm.weight": [4096],
    "model.layers.61.post_attention_layernorm.weight": [4096],
    "model.layers.61.self_attn.q_proj.weight": [4096, 4096],
    "model.layers.61.self_attn.k_proj.weight": [4096, 4096],
    "model.layers.61.self_attn.v_proj.weight": [4096, 4096],
    "model.layers.61.self_attn.o_proj.weight": [4096, 4096],
    "model.layers.61.self_attn.q_norm.weight": [128],
    "model.layers.61.self_attn.k_norm.weight": [128],
    "model.layers.61.mlp.gate.weight": [128, 4096],
    "model.layers.61.mlp.gate.e_score_correction_bias": [128],
    "model.layers.61.mlp.experts.0.gate_proj.weight": [1408, 4096],
    "model.layers.61.mlp.experts.0.up_proj.weight": [1408, 4096],
    "model.layers.61.mlp.experts.0.down_proj.weight": [4096, 1408],
    "model.layers.61.mlp.experts.127.gate_proj.weight": [1408, 4096],
    "model.layers.61.mlp.experts.127.up_proj.weight": [1408, 4096],
    "model.layers.61.mlp.experts.127.down_proj.weight": [4096, 1408],
    "model.layers.61.mlp.shared_experts.gate_proj.weight": [2816, 4096],
    "model.layers.61.mlp.shared_experts.up_proj.weight": [2816, 4096],
    "model.layers.61.mlp.shared_experts.down_proj.weight": [4096, 2816],
}
SIZES = (
    TINY
    | V3_EXPERTS
    | {"num_key_value_heads": 6, "first_k_dense_replace": 1, "sliding_window": None}
)
WINDOWS = {"sliding_window": 6, "num_hidden_layers": 3}
PEERS = {
    "groups": SIZES,
    "one group, biases, wide heads, fewer of keys": SIZES
    | {
        "attention_bias": True,
        "head_dim": 14,
        "num_key_value_heads": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "windows behind the second layer, not normalised": SIZES
    | WINDOWS
    | {"max_window_layers": 2, "norm_topk_prob": False},
    "windows by list, no dense layer": SIZES
    | WINDOWS
    | {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "first_k_dense_replace": 0,
    },
    "tied, another base of rope, a large epsilon": SIZES
    | {"tie_word_embeddings": True, "rope_parameters": ROPE, "rms_norm_eps": 0.03},
    "yarn, all experts of two groups": SIZES | {"rope_parameters": YARN, "num_experts_per_tok": 6},
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"fused experts": fused(tensors)}


def windows(**changes) -> list[int | None]:
    return [layer.attention.window for layer in read(DOTS, **changes).layers]


def test_the_release_has_no_windows_because_they_would_begin_behind_the_last_layer():
    assert windows() == [None] * 62
    assert windows(sliding_window=4096) == [None] * 62
    assert windows(sliding_window=4096, max_window_layers=60) == [None] * 60 + [4096] * 2
    kinds = ["sliding_attention"] + ["full_attention"] * 61
    assert windows(sliding_window=4096, layer_types=kinds) == [4096] + [None] * 61


def test_a_kind_of_attention_that_is_none_is_refused(tmp_path):
    kinds = ["linear_attention"] * 62
    check_refused(tmp_path, "layer_types = ", DOTS, layer_types=kinds)


def test_the_scores_are_sigmoids_under_either_name(tmp_path):
    assert experts_of(DOTS).router.scoring == "sigmoid"
    assert read(DOTS, scoring_func="sigmoid") == read(DOTS, scoring_func=REMOVED) == read(DOTS)
    check_refused(tmp_path, "scoring_func = 'softmax'", DOTS, scoring_func="softmax")


@pytest.mark.parametrize(
    ("key", "value"), [("moe_layer_freq", 2), ("clip_qkv", 8.0), ("kv_lora_rank", 512)]
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", DOTS, **{key: value})


@pytest.mark.parametrize("window", [1, 5])
def test_trap_14_a_window_counts_the_querys_own_position(tmp_path, window):
    single = {"num_hidden_layers": 1, "sliding_window": window, "max_window_layers": 0}
    check_window(tmp_path, "dots1", SIZES | single, window)


def test_trap_15_experts_of_masked_groups_never_win(tmp_path):
    check_masked_groups(tmp_path, "dots1", SIZES)


def test_trap_16_weights_are_not_taken_from_biased_scores(tmp_path):
    check_weights_without_the_bias(tmp_path, "dots1", SIZES)


def test_trap_18_whether_weights_are_normalised_is_read_and_never_assumed():
    assert experts_of(DOTS).router.normalize
    assert not experts_of(DOTS, norm_topk_prob=False).router.normalize
    with pytest.raises(ConfigError, match="norm_topk_prob is missing"):
        read(DOTS, norm_topk_prob=REMOVED)


@pytest.mark.parametrize("normalised", [False, True])
def test_trap_20_the_scaling_factor_multiplies_the_weights(tmp_path, normalised):
    peer, model = pair(tmp_path, "dots1", SIZES | {"norm_topk_prob": normalised})
    (weights_NE,) = check_routing(peer, model)
    if normalised:
        assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(2.2)
    assert experts_of(DOTS).router.scale == 2.5


def test_trap_21_the_selection_bias_stays_float32(tmp_path):
    check_bias_kept_wide(tmp_path, "dots1", SIZES)


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "dots1", SIZES, wide=True)


@pytest.mark.parametrize(("groups", "kept"), [(3, 2), (1, 1)])
def test_trap_23_a_group_counts_by_its_two_best_and_a_single_one_masks_nothing(
    tmp_path, groups, kept
):
    check_routing(*pair(tmp_path, "dots1", SIZES | {"n_group": groups, "topk_group": kept}))


@pytest.mark.parametrize(("count", "width"), [(2, 2816), (1, 1408), (None, 0)])
def test_trap_27_shared_experts_are_one_of_their_summed_width(count, width):
    moe = experts_of(DOTS, n_shared_experts=count)
    assert (moe.shared_width, moe.shared_gate) == (width, False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "dots1", SIZES, fused)


def test_trap_45_queries_and_keys_are_normalised_head_by_head():
    attention = build_on_meta(DOTS, num_hidden_layers=1).layers[0].attention
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (128,)


def test_trap_46_biases_are_on_all_four_projections(tmp_path):
    peer, _ = pair(tmp_path, "dots1", SIZES | {"attention_bias": True})
    assert biases_in_a_layer(peer) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    attention = read(DOTS, attention_bias=True).layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (True, True)
