"""Mixtral 8x7B and 8x22B: grouped-query attention, a few wide experts, weights that sum to one."""

import pytest
import torch
from files import REMOVED, tensors_of
from layouts import fused, renamed
from published import TINY_YARN, modern, partners_of_the_first
from traps import (
    YARN,
    check_gate_comes_first,
    check_refused,
    check_router_precision,
    check_routing,
    check_window,
    pair,
    read,
)

from checkpoints import load_model
from moe import MoEConfig

MODEL_TYPES = ("mixtral",)

SMALL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LARGE = SMALL | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
}
PUBLISHED = {"8x7B": SMALL, "8x22B": LARGE}
every_release = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)

FIGURES = {"8x7B": (46.703, 12.88, None), "8x22B": (140.621, 39.15, None)}

LAYER = {
    "input_layernorm.weight": [4096],
    "post_attention_layernorm.weight": [4096],
    "self_attn.q_proj.weight": [4096, 4096],
    "self_attn.k_proj.weight": [1024, 4096],
    "self_attn.v_proj.weight": [1024, 4096],
    "self_attn.o_proj.weight": [4096, 4096],
    "block_sparse_moe.gate.weight": [8, 4096],
    "block_sparse_moe.experts.0.w1.weight": [14336, 4096],
    "block_sparse_moe.experts.0.w2.weight": [4096, 14336],
    "block_sparse_moe.experts.0.w3.weight": [14336, 4096],
    "block_sparse_moe.experts.7.w1.weight": [14336, 4096],
    "block_sparse_moe.experts.7.w2.weight": [4096, 14336],
    "block_sparse_moe.experts.7.w3.weight": [14336, 4096],
}
NAMES = {
    "model.embed_tokens.weight": [32000, 4096],
    "model.norm.weight": [4096],
    "lm_head.weight": [32000, 4096],
    **{f"model.layers.31.{name}": shape for name, shape in LAYER.items()},
}

SIZES = {
    "vocab_size": 103,
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_local_experts": 7,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,
}
PEERS = {
    "plain": SIZES,
    "windows": SIZES | {"sliding_window": 7},
    "wide heads, one key": SIZES | {"head_dim": 14, "num_key_value_heads": 1},
    "tied, another base": SIZES
    | {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e3},
    },
    "yarn": SIZES | {"rope_parameters": YARN, "head_dim": 10},
    "yarn, mscales, windows": SIZES
    | {"rope_parameters": TINY_YARN, "head_dim": 10, "sliding_window": 16},
    "three experts, one layer": SIZES | {"num_experts_per_tok": 3, "num_hidden_layers": 1},
}

ONE = SIZES | {"num_hidden_layers": 1}
UNDER_MLP = {".block_sparse_moe.": ".mlp."}
PARTS = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


def layouts(tensors):
    stacked = fused(tensors, ("w1", "w3", "w2"))
    return {
        "experts fused": stacked,
        "as transformers holds it": renamed(stacked, UNDER_MLP),
        "experts one by one under mlp": renamed(renamed(tensors, UNDER_MLP), PARTS),
    }


@every_release
def test_old_and_new_spelling_describe_the_same_model(published):
    assert read(modern(published, num_local_experts="num_experts")) == read(published)


@every_release
def test_trap_04_halves_are_rotated_together(published):
    rope = read(published).layers[0].attention.rope
    assert (rope.width, rope.theta, rope.yarn) == (128, 1e6, None)
    assert partners_of_the_first(rope) == {0, 64}
    assert read(published, rope_theta=REMOVED) == read(published)


def test_trap_14_a_window_of_five_is_oneself_and_four_before(tmp_path):
    check_window(tmp_path, "mixtral", ONE | {"sliding_window": 5}, 5)


@pytest.mark.parametrize("said", [{}, {"norm_topk_prob": False}])
def test_trap_19_the_chosen_weights_sum_to_one_whatever_is_said(tmp_path, said):
    (weights_NE,) = check_routing(*pair(tmp_path, "mixtral", ONE | said))
    torch.testing.assert_close(weights_NE.sum(dim=1), torch.ones(200))


def test_trap_22_the_router_multiplies_in_the_precision_of_the_weights(tmp_path):
    check_router_precision(tmp_path, "mixtral", ONE, wide=False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "mixtral", ONE, lambda t: fused(t, ("w1", "w3", "w2")))


def test_trap_30_w1_is_gate_and_w3_is_up_and_w2_is_down(pristine):
    tensors = tensors_of(pristine("mixtral"))
    experts = load_model(pristine("mixtral"), progress=False).layers[1].feed_forward.experts
    for expert in range(len(experts.gate)):
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}"
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            assert getattr(experts, part)[expert].equal(tensors[f"{prefix}.{name}.weight"])


def test_every_layer_is_sparse_without_a_shared_expert():
    config = read(SMALL)
    assert {type(layer.feed_forward) for layer in config.layers} == {MoEConfig}
    assert {layer.feed_forward.shared_width for layer in config.layers} == {0}
    assert (config.norm_epsilon, config.layers[0].attention.qk_norm) == (1e-5, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 0),
        ("sliding_window", 0),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("routed_scaling_factor", 2.0),
        ("n_shared_experts", 2),
    ],
)
def test_what_a_mixtral_cannot_be_is_refused_by_name(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", SMALL, **{key: value})


def test_numbers_that_do_not_go_together_are_refused(tmp_path):
    said = "num_experts_per_tok = 9: must be <= num_local_experts = 8"
    check_refused(tmp_path, said, SMALL, num_experts_per_tok=9)
    said = "num_attention_heads = 31, expected a divisor of hidden_size"
    check_refused(tmp_path, said, SMALL, num_attention_heads=31)
    said = "num_local_experts or num_experts is missing"
    check_refused(tmp_path, said, SMALL, num_local_experts=REMOVED)


def test_other_kinds_of_rope_are_refused_by_name(tmp_path):
    longrope = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    check_refused(tmp_path, "rope_scaling.type = 'longrope'", SMALL, rope_scaling=longrope)
