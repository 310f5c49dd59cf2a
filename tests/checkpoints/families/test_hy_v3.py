"""HY3: q/k norms per head before rope, biased sigmoid routing, a dense layer first, MTP."""

import pytest
from files import REMOVED, tensors_of
from layouts import fused, renamed
from torch import Tensor
from traps import (
    BOUND,
    ROPE,
    TINY,
    YARN,
    biases_in_a_layer,
    check_bias_kept_wide,
    check_embedding_comes_first,
    check_gate_comes_first,
    check_mtp_layer_is_apart,
    check_refused,
    check_router_precision,
    check_routing,
    check_states_are_normed,
    check_weights_without_the_bias,
    experts_of,
    mtp_differences,
    pair,
    read,
    with_mtp,
)

from checkpoints import load_model, save_model
from moe import ConfigError, DenseConfig

MODEL_TYPES = ("hy_v3",)
HY3 = {
    "architectures": ["HYV3ForCausalLM"],
    "bos_token_id": 120000,
    "enable_attention_fp32_softmax": False,
    "enable_lm_head_fp32": True,
    "enable_moe_fp32_combine": False,
    "eod_token_id": 120026,
    "eos_token_id": 120025,
    "expert_hidden_dim": 1536,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.006,
    "intermediate_size": 13312,
    "max_position_embeddings": 262144,
    "model_type": "hy_v3",
    "moe_intermediate_size": 1536,
    "moe_router_enable_expert_bias": True,
    "moe_router_use_sigmoid": True,
    "num_attention_heads": 64,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "num_shared_experts": 1,
    "output_router_logits": True,
    "pad_token_id": 120002,
    "qk_norm": True,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"},
    "route_norm": True,
    "router_scaling_factor": 2.826,
    "tie_word_embeddings": False,
    "transformers_version": "5.6.0",
    "use_cache": True,
    "use_grouped_mm": False,
    "vocab_size": 120832,
}
PUBLISHED = {"Hy3-preview": HY3}
FIGURES = {"Hy3-preview": (295.034, 20.676, 20.181)}
NAMES = {
    "model.embed_tokens.weight": [120832, 4096],
    "model.norm.weight": [4096],
    "lm_head.weight": [120832, 4096],
    "model.layers.0.input_layernorm.weight": [4096],
    "model.layers.0.post_attention_layernorm.weight": [4096],
    "model.layers.0.self_attn.q_proj.weight": [8192, 4096],
    "model.layers.0.self_attn.k_proj.weight": [1024, 4096],
    "model.layers.0.self_attn.v_proj.weight": [1024, 4096],
    "model.layers.0.self_attn.o_proj.weight": [4096, 8192],
    "model.layers.0.self_attn.q_norm.weight": [128],
    "model.layers.0.self_attn.k_norm.weight": [128],
    "model.layers.0.mlp.gate_proj.weight": [13312, 4096],
    "model.layers.0.mlp.up_proj.weight": [13312, 4096],
    "model.layers.0.mlp.down_proj.weight": [4096, 13312],
    "model.layers.79.input_layernorm.weight": [4096],
    "model.layers.79.post_attention_layernorm.weight": [4096],
    "model.layers.79.self_attn.q_proj.weight": [8192, 4096],
    "model.layers.79.self_attn.k_proj.weight": [1024, 4096],
    "model.layers.79.self_attn.v_proj.weight": [1024, 4096],
    "model.layers.79.self_attn.o_proj.weight": [4096, 8192],
    "model.layers.79.self_attn.q_norm.weight": [128],
    "model.layers.79.self_attn.k_norm.weight": [128],
    "model.layers.79.mlp.router.gate.weight": [192, 4096],
    "model.layers.79.mlp.expert_bias": [192],
    "model.layers.79.mlp.experts.0.gate_proj.weight": [1536, 4096],
    "model.layers.79.mlp.experts.0.up_proj.weight": [1536, 4096],
    "model.layers.79.mlp.experts.0.down_proj.weight": [4096, 1536],
    "model.layers.79.mlp.experts.191.gate_proj.weight": [1536, 4096],
    "model.layers.79.mlp.experts.191.up_proj.weight": [1536, 4096],
    "model.layers.79.mlp.experts.191.down_proj.weight": [4096, 1536],
    "model.layers.79.mlp.shared_mlp.gate_proj.weight": [1536, 4096],
    "model.layers.79.mlp.shared_mlp.up_proj.weight": [1536, 4096],
    "model.layers.79.mlp.shared_mlp.down_proj.weight": [4096, 1536],
    "model.layers.80.enorm.weight": [4096],
    "model.layers.80.hnorm.weight": [4096],
    "model.layers.80.eh_proj.weight": [4096, 8192],
    "model.layers.80.final_layernorm.weight": [4096],
    "model.layers.80.input_layernorm.weight": [4096],
    "model.layers.80.post_attention_layernorm.weight": [4096],
    "model.layers.80.self_attn.q_proj.weight": [8192, 4096],
    "model.layers.80.self_attn.k_proj.weight": [1024, 4096],
    "model.layers.80.self_attn.v_proj.weight": [1024, 4096],
    "model.layers.80.self_attn.o_proj.weight": [4096, 8192],
    "model.layers.80.self_attn.q_norm.weight": [128],
    "model.layers.80.self_attn.k_norm.weight": [128],
    "model.layers.80.mlp.router.gate.weight": [192, 4096],
    "model.layers.80.mlp.expert_bias": [192],
    "model.layers.80.mlp.experts.0.gate_proj.weight": [1536, 4096],
    "model.layers.80.mlp.experts.0.up_proj.weight": [1536, 4096],
    "model.layers.80.mlp.experts.0.down_proj.weight": [4096, 1536],
    "model.layers.80.mlp.experts.191.gate_proj.weight": [1536, 4096],
    "model.layers.80.mlp.experts.191.up_proj.weight": [1536, 4096],
    "model.layers.80.mlp.experts.191.down_proj.weight": [4096, 1536],
    "model.layers.80.mlp.shared_mlp.gate_proj.weight": [1536, 4096],
    "model.layers.80.mlp.shared_mlp.up_proj.weight": [1536, 4096],
    "model.layers.80.mlp.shared_mlp.down_proj.weight": [4096, 1536],
}
SIZES = TINY | {
    "intermediate_size": 92,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 28,
    "num_shared_experts": 2,
    "head_dim": 14,
    "router_scaling_factor": 1.7,
}
PEERS = {
    "a dense layer first": SIZES,
    "dense layers by list, biases": SIZES
    | {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "attention_bias": True,
        "enable_moe_fp32_combine": False,
    },
    "tied, sparse throughout, a large epsilon": SIZES
    | {
        "mlp_layer_types": ["sparse", "sparse"],
        "tie_word_embeddings": True,
        "num_shared_experts": 1,
        "rms_norm_eps": 0.03,
    },
    "every head with keys of its own, another base of rope": SIZES
    | {
        "num_key_value_heads": 6,
        "head_dim": 10,
        "rope_parameters": ROPE,
        "num_experts_per_tok": 10,
    },
    "yarn": SIZES | {"rope_parameters": YARN},
}
AS_TRANSFORMERS_HOLDS_IT = {
    "mlp.router.gate.weight": "mlp.gate.weight",
    "mlp.expert_bias": "mlp.e_score_correction_bias",
    "mlp.shared_mlp.": "mlp.shared_experts.",
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    held = renamed(tensors, AS_TRANSFORMERS_HOLDS_IT)
    return {
        "fused experts": fused(tensors),
        "transformers' names": held,
        "as transformers holds it": fused(held),
    }


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an MTP module as they are published: without copies of embedding and head."""
    spellings = {theirs: ours for ours, theirs in AS_TRANSFORMERS_HOLDS_IT.items()}
    ours = renamed(tensors, spellings | {"shared_head.norm": "final_layernorm"})
    copies = (".embed_tokens.weight", ".shared_head.head.weight")
    return {
        name: tensor
        for name, tensor in ours.items()
        if not (name.startswith("model.layers.") and name.endswith(copies))
    }


def test_the_kinds_of_layers_come_from_a_list_or_from_a_number():
    def dense(**changes) -> list[int]:
        kinds = [layer.feed_forward for layer in read(HY3, **changes).layers]
        return [i for i, kind in enumerate(kinds) if isinstance(kind, DenseConfig)]

    assert dense() == dense(first_k_dense_replace=REMOVED) == [0]
    assert dense(mlp_layer_types=["dense"] * 2 + ["sparse"] * 79) == [0, 1]


def test_rope_has_a_base_of_its_own_where_none_is_given():
    assert read(HY3, rope_parameters=REMOVED) == read(HY3)


def test_the_precision_of_adding_the_shared_expert_is_no_part_of_the_model():
    assert read(HY3, enable_moe_fp32_combine=True) == read(HY3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_bias", True),
        ("qk_norm", False),
        ("route_norm", False),
        ("moe_router_use_sigmoid", False),
        ("moe_router_enable_expert_bias", False),
        ("sliding_window", 4096),
        ("routed_scaling_factor", 2.5),
    ],
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", HY3, **{key: value})


def test_trap_16_weights_are_not_taken_from_biased_scores(tmp_path):
    check_weights_without_the_bias(tmp_path, "hy_v3", SIZES)


@pytest.mark.parametrize("said", [False, None, REMOVED])
def test_trap_19_weights_are_normalised_whatever_the_config_says(said):
    moe = experts_of(HY3, norm_topk_prob=said)
    assert (moe.router.normalize, moe.router.normalize_epsilon) == (True, 1e-20)


def test_trap_20_the_scaling_factor_multiplies_the_weights(tmp_path):
    (weights_NE,) = check_routing(*pair(tmp_path, "hy_v3", SIZES))
    assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(1.7)
    assert experts_of(HY3).router.scale == 2.826
    with pytest.raises(ConfigError, match="router_scaling_factor is missing"):
        read(HY3, router_scaling_factor=REMOVED)


def test_trap_21_the_selection_bias_stays_float32(tmp_path):
    check_bias_kept_wide(tmp_path, "hy_v3", SIZES)


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "hy_v3", SIZES, wide=True)


def test_trap_27_shared_experts_are_one_of_their_summed_width():
    for count in (1, 3):
        moe = experts_of(HY3, num_shared_experts=count)
        assert (moe.shared_width, moe.shared_gate) == (count * 1536, False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "hy_v3", SIZES, fused)


def test_trap_45_queries_and_keys_are_normalised_head_by_head():
    assert {layer.attention.qk_norm.over for layer in read(HY3).layers} == {"head"}
    assert {layer.attention.qk_norm.after_rope for layer in read(HY3).layers} == {False}


def test_trap_46_biases_are_on_all_four_projections(tmp_path):
    peer, _ = pair(tmp_path, "hy_v3", SIZES | {"attention_bias": True})
    assert biases_in_a_layer(peer) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    attention = read(HY3, attention_bias=True).layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (True, True)


def test_trap_47_the_embedding_comes_before_the_state(tmp_path):
    check_embedding_comes_first(tmp_path, "hy_v3", SIZES, published)


def test_trap_48_states_are_handed_on_after_their_norm(tmp_path):
    check_states_are_normed(tmp_path, "hy_v3", SIZES, published)


def test_trap_49_the_layer_behind_the_last_one_is_no_main_layer(tmp_path):
    check_mtp_layer_is_apart(tmp_path, "hy_v3", SIZES, published)


def test_an_mtp_module_is_read_in_v3s_spelling_and_saved_in_the_releases(tmp_path):
    peer, modules = with_mtp(tmp_path / "v3", "hy_v3", SIZES, 1)
    stored = tensors_of(tmp_path / "v3")
    assert "model.layers.2.shared_head.norm.weight" in stored
    assert "model.layers.2.embed_tokens.weight" in stored
    model = load_model(tmp_path / "v3", progress=False)
    assert mtp_differences(peer, modules, model)[0] < BOUND
    save_model(model, tmp_path / "saved")
    saved = tensors_of(tmp_path / "saved")
    expected = published(stored)
    assert saved.keys() == expected.keys()
    assert all(tensor.equal(saved[name]) for name, tensor in expected.items())
