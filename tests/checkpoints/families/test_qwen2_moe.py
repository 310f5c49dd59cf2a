"""Qwen1.5-MoE and Qwen2-MoE: biases on queries, keys and values, a shared expert with a gate."""

import pytest
import torch
from files import REMOVED, tensors_of
from layouts import fused
from published import modern, partners_of_the_first
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

from checkpoints import load_model
from moe import DenseConfig, MoEConfig

MODEL_TYPES = ("qwen2_moe",)

QWEN15 = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2 = QWEN15 | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
}
PUBLISHED = {"Qwen1.5-MoE-A2.7B": QWEN15, "Qwen2-57B-A14B": QWEN2}
every_release = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)

FIGURES = {
    "Qwen1.5-MoE-A2.7B": (14.316, 2.69, None),
    "Qwen2-57B-A14B": (57.409, 14.25, None),
}

LAYER = {
    "input_layernorm.weight": [2048],
    "post_attention_layernorm.weight": [2048],
    "self_attn.q_proj.weight": [2048, 2048],
    "self_attn.q_proj.bias": [2048],
    "self_attn.k_proj.weight": [2048, 2048],
    "self_attn.k_proj.bias": [2048],
    "self_attn.v_proj.weight": [2048, 2048],
    "self_attn.v_proj.bias": [2048],
    "self_attn.o_proj.weight": [2048, 2048],
    "mlp.gate.weight": [60, 2048],
    "mlp.shared_expert.gate_proj.weight": [5632, 2048],
    "mlp.shared_expert.up_proj.weight": [5632, 2048],
    "mlp.shared_expert.down_proj.weight": [2048, 5632],
    "mlp.shared_expert_gate.weight": [1, 2048],
    "mlp.experts.0.gate_proj.weight": [1408, 2048],
    "mlp.experts.0.up_proj.weight": [1408, 2048],
    "mlp.experts.0.down_proj.weight": [2048, 1408],
    "mlp.experts.59.gate_proj.weight": [1408, 2048],
    "mlp.experts.59.up_proj.weight": [1408, 2048],
    "mlp.experts.59.down_proj.weight": [2048, 1408],
}
NAMES = {
    "model.embed_tokens.weight": [151936, 2048],
    "model.norm.weight": [2048],
    "lm_head.weight": [151936, 2048],
    **{f"model.layers.23.{name}": shape for name, shape in LAYER.items()},
}

SIZES = {
    "vocab_size": 103,
    "hidden_size": 56,
    "intermediate_size": 50,
    "moe_intermediate_size": 22,
    "shared_expert_intermediate_size": 34,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 7}
FOUR = {"num_hidden_layers": 4}
LONG, SHORT = "full_attention", "sliding_attention"
PEERS = {
    "plain": SIZES,
    "normalised": SIZES | {"norm_topk_prob": True},
    "no biases, wide heads, one key": SIZES
    | {"qkv_bias": False, "head_dim": 18, "num_key_value_heads": 1},
    "tied, another base": SIZES
    | {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e3},
    },
    "every second layer sparse": SIZES | FOUR | {"decoder_sparse_step": 2},
    "some layers dense": SIZES | FOUR | {"mlp_only_layers": [0, 3]},
    "windows in the first layers": SIZES | FOUR | SLIDING | {"max_window_layers": 2},
    "windows in a list": SIZES | FOUR | SLIDING | {"layer_types": [LONG, SHORT, SHORT, LONG]},
    "windows that are off": SIZES | {"sliding_window": 7, "max_window_layers": 2},
    "yarn": SIZES | {"rope_parameters": YARN},
}


ONE = SIZES | {"num_hidden_layers": 1}


def layouts(tensors):
    return {"experts fused": fused(tensors)}


@every_release
def test_old_and_new_spelling_describe_the_same_model(published):
    assert read(modern(published)) == read(published)


@every_release
def test_trap_04_halves_are_rotated_together(published):
    rope = read(published).layers[0].attention.rope
    assert (rope.width, rope.theta, rope.yarn) == (128, 1e6, None)
    assert partners_of_the_first(rope) == {0, 64}


def test_trap_14_a_window_of_five_is_oneself_and_four_before(tmp_path):
    sliding = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    check_window(tmp_path, "qwen2_moe", ONE | sliding, 5)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, [None] * 5),
        ({"use_sliding_window": False, "layer_types": [LONG] * 5}, [None] * 5),
        ({"use_sliding_window": REMOVED}, [None] * 5),
        ({"use_sliding_window": True}, [8, None, 8, None, None]),
        ({"use_sliding_window": True, "max_window_layers": 0}, [None] * 5),
        (
            {"use_sliding_window": True, "layer_types": [LONG] * 3 + [SHORT] * 2},
            [None] * 3 + [8, 8],
        ),
    ],
)
def test_windows_are_where_the_flag_and_the_list_say(changes, windows):
    few = {"num_hidden_layers": 5, "sliding_window": 8, "max_window_layers": 4}
    config = read(QWEN15, **few | changes)
    assert [layer.attention.window for layer in config.layers] == windows


@pytest.mark.parametrize("normalised", [False, True])
def test_trap_17_the_weights_are_probabilities_among_all_experts(tmp_path, normalised):
    sizes = ONE | {"norm_topk_prob": normalised}
    (weights_NE,) = check_routing(*pair(tmp_path, "qwen2_moe", sizes))
    assert (weights_NE.sum(dim=1).min().item() > 0.99) is normalised


@every_release
def test_trap_18_weights_are_normalised_where_the_file_says_so(tmp_path, published):
    assert not experts_of(published).router.normalize
    moe = experts_of(published, norm_topk_prob=True)
    assert (moe.router.normalize, moe.router.normalize_epsilon) == (True, 0.0)
    check_refused(tmp_path, "norm_topk_prob is missing", published, norm_topk_prob=REMOVED)


def test_trap_22_the_router_multiplies_in_the_precision_of_the_weights(tmp_path):
    check_router_precision(tmp_path, "qwen2_moe", ONE, wide=False)


@torch.no_grad()
def test_trap_27_the_shared_expert_counts_as_much_as_the_sigmoid_of_its_gate_says(pristine):
    path = pristine("qwen2_moe")
    model, tensors = load_model(path, progress=False), tensors_of(path)
    last = len(model.layers) - 1
    prefix, moe = f"model.layers.{last}.mlp.", model.layers[last].feed_forward
    x_ND = torch.randn(4, model.config.d_model, generator=torch.Generator().manual_seed(0))
    gate, up, down = (
        tensors[f"{prefix}shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")
    )
    score_N1 = (x_ND @ tensors[prefix + "shared_expert_gate.weight"].T).sigmoid()
    expected_ND = score_N1 * ((torch.nn.functional.silu(x_ND @ gate.T) * (x_ND @ up.T)) @ down.T)
    torch.testing.assert_close(moe.shared(x_ND), expected_ND)


@every_release
def test_trap_27_the_shared_width_is_given_and_no_multiple(published):
    moe = experts_of(published)
    assert moe.shared_width == published["shared_expert_intermediate_size"]
    assert moe.shared_gate


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "qwen2_moe", ONE, fused)


@pytest.mark.parametrize("bias", [True, REMOVED, None, False])
def test_trap_46_biases_stand_on_queries_keys_and_values_alone(tmp_path, bias):
    attention = read(QWEN15, qkv_bias=bias).layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (bias is not False, False)
    sizes = ONE | {"qkv_bias": bias is not False}
    peer, _ = pair(tmp_path, "qwen2_moe", sizes)
    assert biases_in_a_layer(peer) == (set() if bias is False else {"q_proj", "k_proj", "v_proj"})


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"mlp_only_layers": [1, 4]}, [0, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1]),
        ({"decoder_sparse_step": REMOVED, "mlp_only_layers": None}, [0, 1, 2, 3, 4]),
    ],
)
def test_layers_are_sparse_by_step_and_list(changes, sparse):
    config = read(QWEN15, num_hidden_layers=5, **changes)
    kinds = [layer.feed_forward for layer in config.layers]
    assert [i for i, kind in enumerate(kinds) if isinstance(kind, MoEConfig)] == sparse
    assert {kind.width for kind in kinds if isinstance(kind, DenseConfig)} <= {5632}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("routed_scaling_factor", 2.0),
        ("mlp_only_layers", [-1]),
        ("decoder_sparse_step", 0),
        ("hidden_act", "gelu"),
        ("n_shared_experts", 2),
    ],
)
def test_what_a_qwen2_moe_cannot_be_is_refused_by_name(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", QWEN15, **{key: value})


def test_the_shared_expert_must_be_given(tmp_path):
    key = "shared_expert_intermediate_size"
    check_refused(tmp_path, f"{key} is missing", QWEN15, **{key: REMOVED})


@pytest.mark.parametrize("kinds", [[LONG], [LONG] * 23 + ["chunked_attention"]])
def test_a_list_of_layers_must_be_long_enough_and_known(tmp_path, kinds):
    said = f"layer_types = {kinds!r}, expected a list of at least 24"
    check_refused(tmp_path, said, QWEN15, use_sliding_window=True, layer_types=kinds)
