"""Qwen3-MoE: q/k norms per head, a width of heads of its own, no shared expert."""

import pytest
from files import REMOVED
from layouts import fused
from published import difference, modern, partners_of_the_first
from traps import (
    YARN,
    biases_in_a_layer,
    check_gate_comes_first,
    check_refused,
    check_router_precision,
    check_routing,
    check_window,
    experts_of,
    pair,
    read,
)

from modeling import QKNormConfig
from moe import MoEConfig

MODEL_TYPES = ("qwen3_moe",)

SMALL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LARGE = SMALL | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 94,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
PUBLISHED = {"30B-A3B": SMALL, "235B-A22B": LARGE}
every_release = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)

FIGURES = {"30B-A3B": (30.532, 3.35, None), "235B-A22B": (235.094, 22.19, None)}

LAYER = {
    "input_layernorm.weight": [2048],
    "post_attention_layernorm.weight": [2048],
    "self_attn.q_proj.weight": [4096, 2048],
    "self_attn.k_proj.weight": [512, 2048],
    "self_attn.v_proj.weight": [512, 2048],
    "self_attn.o_proj.weight": [2048, 4096],
    "self_attn.q_norm.weight": [128],
    "self_attn.k_norm.weight": [128],
    "mlp.gate.weight": [128, 2048],
    "mlp.experts.0.gate_proj.weight": [768, 2048],
    "mlp.experts.0.up_proj.weight": [768, 2048],
    "mlp.experts.0.down_proj.weight": [2048, 768],
    "mlp.experts.127.gate_proj.weight": [768, 2048],
    "mlp.experts.127.up_proj.weight": [768, 2048],
    "mlp.experts.127.down_proj.weight": [2048, 768],
}
NAMES = {
    "model.embed_tokens.weight": [151936, 2048],
    "model.norm.weight": [2048],
    "lm_head.weight": [151936, 2048],
    **{f"model.layers.47.{name}": shape for name, shape in LAYER.items()},
}

SIZES = {
    "vocab_size": 103,
    "hidden_size": 56,
    "intermediate_size": 50,
    "moe_intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,
}
FOUR = {"num_hidden_layers": 4}
PEERS = {
    "plain": SIZES,
    "not normalised": SIZES | {"norm_topk_prob": False},
    "biases, head_dim not given": {
        **{key: value for key, value in SIZES.items() if key != "head_dim"},
        "attention_bias": True,
    },
    "tied, one key, another base": SIZES
    | {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e3},
    },
    "every second layer sparse": SIZES | FOUR | {"decoder_sparse_step": 2},
    "some layers dense": SIZES | FOUR | {"mlp_only_layers": [0, 3]},
    "windows in every layer": SIZES
    | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "windows that are off": SIZES | {"sliding_window": 7},
    "yarn": SIZES | {"rope_parameters": YARN},
}


ONE = SIZES | {"num_hidden_layers": 1}


def layouts(tensors):
    return {"experts fused": fused(tensors)}


@every_release
def test_old_and_new_spelling_describe_the_same_model(published):
    assert read(modern(published, num_experts="num_local_experts")) == read(published)


def test_trap_02_yarn_that_a_user_adds_multiplies_cos_and_sin_alone(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = read(SMALL, rope_scaling=yarn).layers[0].attention.rope
    assert rope.amplitude == pytest.approx(1.138629, abs=5e-7)  # 0.1 ln 4 + 1
    assert rope.softmax_multiplier == 1.0
    sizes = ONE | {"rope_parameters": YARN | {"attention_factor": 0.7}}
    peer, model = pair(tmp_path, "qwen3_moe", sizes)
    assert model.config.layers[0].attention.rope.amplitude == 0.7
    assert difference(peer, model) < 1e-4


@every_release
def test_trap_04_halves_are_rotated_together(published):
    rope = read(published).layers[0].attention.rope
    assert (rope.width, rope.theta, rope.yarn) == (128, 1e6, None)
    assert partners_of_the_first(rope) == {0, 64}


def test_trap_14_a_window_of_five_is_oneself_and_four_before(tmp_path):
    sliding = {"use_sliding_window": True, "sliding_window": 5}
    check_window(tmp_path, "qwen3_moe", ONE | sliding, 5)


def test_windows_are_in_all_layers_whatever_max_window_layers_says():
    for first in (0, 20, 48):
        changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": first}
        config = read(SMALL, **changes)
        assert [layer.attention.window for layer in config.layers] == [8] * 48


@pytest.mark.parametrize("normalised", [False, True])
def test_trap_17_the_weights_are_probabilities_among_all_experts(tmp_path, normalised):
    sizes = ONE | {"norm_topk_prob": normalised}
    (weights_NE,) = check_routing(*pair(tmp_path, "qwen3_moe", sizes))
    assert (weights_NE.sum(dim=1).min().item() > 0.99) is normalised


@every_release
def test_trap_18_a_file_must_say_whether_weights_are_normalised(tmp_path, published):
    moe = experts_of(published)
    assert (moe.router.normalize, moe.router.normalize_epsilon) == (True, 0.0)
    assert not experts_of(published, norm_topk_prob=False).router.normalize
    check_refused(tmp_path, "norm_topk_prob is missing", published, norm_topk_prob=REMOVED)


def test_trap_22_the_router_multiplies_in_the_precision_of_the_weights(tmp_path):
    check_router_precision(tmp_path, "qwen3_moe", ONE, wide=False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "qwen3_moe", ONE, fused)


@every_release
def test_trap_45_norms_on_queries_and_keys_are_per_head_and_before_rope(published):
    for layer in read(published, rms_norm_eps=1e-5).layers:
        assert layer.attention.qk_norm == QKNormConfig(over="head", after_rope=False, epsilon=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_trap_46_attention_bias_means_all_four_projections(tmp_path, bias):
    peer, model = pair(tmp_path, "qwen3_moe", ONE | {"attention_bias": bias})
    named = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert biases_in_a_layer(peer) == (named if bias else set())
    attention = model.config.layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (bias, bias)
    assert not read(SMALL, attention_bias=REMOVED).layers[0].attention.qkv_bias


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"mlp_only_layers": [1, 4]}, [0, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": REMOVED, "mlp_only_layers": None}, [0, 1, 2, 3, 4]),
    ],
)
def test_layers_are_sparse_by_step_and_list(changes, sparse):
    kinds = [layer.feed_forward for layer in read(SMALL, num_hidden_layers=5, **changes).layers]
    assert [i for i, kind in enumerate(kinds) if isinstance(kind, MoEConfig)] == sparse


def test_heads_have_a_width_of_their_own():
    attention = read(SMALL).layers[0].attention
    assert (attention.num_heads, attention.kv_heads, attention.head_width) == (32, 4, 128)
    assert read(SMALL, head_dim=REMOVED).layers[0].attention.head_width == 64
    assert {layer.feed_forward.shared_width for layer in read(SMALL).layers} == {0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qkv_bias", True),
        ("routed_scaling_factor", 2.0),
        ("shared_expert_intermediate_size", 512),
        ("num_key_value_heads", 0),
        ("hidden_act", "gelu"),
        ("kv_lora_rank", 512),
    ],
)
def test_what_a_qwen3_moe_cannot_be_is_refused_by_name(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", SMALL, **{key: value})


def test_other_kinds_of_rope_are_refused_by_name(tmp_path):
    dynamic = {"type": "dynamic", "factor": 2.0}
    check_refused(tmp_path, "rope_scaling.type = 'dynamic'", SMALL, rope_scaling=dynamic)
