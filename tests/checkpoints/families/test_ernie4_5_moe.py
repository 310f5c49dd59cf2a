"""ERNIE-4.5-MoE: neighbours rotated, softmax routing with a selection bias, tied embeddings."""

from dataclasses import replace

import pytest
import torch
from files import REMOVED, edit_json, tensors_of, write_tensors
from layouts import fused
from published import relative_difference, reload
from tiny import plain_mtp_states
from torch import Tensor
from traps import (
    BIAS,
    ROPE,
    ROUTER,
    TINY,
    YARN,
    check_bias_kept_wide,
    check_gate_comes_first,
    check_refused,
    check_router_precision,
    check_routing,
    experts_of,
    named,
    pair,
    random_tokens,
    read,
    set_bias,
)

from checkpoints import CheckpointError, load_model
from moe import DenseConfig
from tools.make_tiny import write_tiny

MODEL_TYPES = ("ernie4_5_moe",)
MTP_WITHOUT_PEER = True
ERNIE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5_moe",
    "moe_capacity": [64, 64, 64],
    "moe_gate": "topk",
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_use_aux_free": True,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": False,
    "vocab_size": 103424,
}
ERNIE_300B = ERNIE | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "moe_intermediate_size": 3584,
    "moe_k": 8,
    "moe_layer_end_index": 53,
    "moe_layer_start_index": 3,
    "moe_num_shared_experts": None,
    "num_attention_heads": 64,
    "num_hidden_layers": 54,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
PUBLISHED = {"ERNIE-4.5-21B-A3B": ERNIE, "ERNIE-4.5-300B-A47B": ERNIE_300B}
FIGURES = {
    "ERNIE-4.5-21B-A3B": (21.825, 3.352, 3.352),  # the embedding is the head: it counts once
    "ERNIE-4.5-300B-A47B": (299.484, 47.927, 47.079),
}
NAMES = {
    "model.embed_tokens.weight": [103424, 2560],
    "model.norm.weight": [2560],
    "model.layers.0.input_layernorm.weight": [2560],
    "model.layers.0.post_attention_layernorm.weight": [2560],
    "model.layers.0.self_attn.q_proj.weight": [2560, 2560],
    "model.layers.0.self_attn.k_proj.weight": [512, 2560],
    "model.layers.0.self_attn.v_proj.weight": [512, 2560],
    "model.layers.0.self_attn.o_proj.weight": [2560, 2560],
    "model.layers.0.mlp.gate_proj.weight": [12288, 2560],
    "model.layers.0.mlp.up_proj.weight": [12288, 2560],
    "model.layers.0.mlp.down_proj.weight": [2560, 12288],
    "model.layers.27.input_layernorm.weight": [2560],
    "model.layers.27.post_attention_layernorm.weight": [2560],
    "model.layers.27.self_attn.q_proj.weight": [2560, 2560],
    "model.layers.27.self_attn.k_proj.weight": [512, 2560],
    "model.layers.27.self_attn.v_proj.weight": [512, 2560],
    "model.layers.27.self_attn.o_proj.weight": [2560, 2560],
    "model.layers.27.mlp.gate.weight": [64, 2560],
    "model.layers.27.mlp.moe_statics.e_score_correction_bias": [1, 64],
    "model.layers.27.mlp.experts.0.gate_proj.weight": [1536, 2560],
    "model.layers.27.mlp.experts.0.up_proj.weight": [1536, 2560],
    "model.layers.27.mlp.experts.0.down_proj.weight": [2560, 1536],
    "model.layers.27.mlp.experts.63.gate_proj.weight": [1536, 2560],
    "model.layers.27.mlp.experts.63.up_proj.weight": [1536, 2560],
    "model.layers.27.mlp.experts.63.down_proj.weight": [2560, 1536],
    "model.layers.27.mlp.shared_experts.gate_proj.weight": [3072, 2560],
    "model.layers.27.mlp.shared_experts.up_proj.weight": [3072, 2560],
    "model.layers.27.mlp.shared_experts.down_proj.weight": [2560, 3072],
    "model.mtp_emb_norm.0.weight": [2560],
    "model.mtp_hidden_norm.0.weight": [2560],
    "model.mtp_linear_proj.0.weight": [2560, 5120],
    "model.mtp_block.0.input_layernorm.weight": [2560],
    "model.mtp_block.0.post_attention_layernorm.weight": [2560],
    "model.mtp_block.0.self_attn.q_proj.weight": [2560, 2560],
    "model.mtp_block.0.self_attn.k_proj.weight": [512, 2560],
    "model.mtp_block.0.self_attn.v_proj.weight": [512, 2560],
    "model.mtp_block.0.self_attn.o_proj.weight": [2560, 2560],
    "model.mtp_block.0.mlp.gate_proj.weight": [12288, 2560],
    "model.mtp_block.0.mlp.up_proj.weight": [12288, 2560],
    "model.mtp_block.0.mlp.down_proj.weight": [2560, 12288],
}
SIZES = TINY | {
    "intermediate_size": 92,
    "moe_num_experts": 10,
    "moe_k": 3,
    "moe_intermediate_size": 28,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
PEERS = {
    "tied, a dense layer first": SIZES,
    "untied, every second layer, up to the fourth": SIZES
    | {
        "tie_word_embeddings": False,
        "num_hidden_layers": 6,
        "moe_layer_start_index": 0,
        "moe_layer_interval": 2,
        "moe_layer_end_index": 4,
    },
    "no shared expert, a minimum that counts": SIZES
    | {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_norm_min": 0.4, "moe_k": 2},
    "wide heads, another base of rope, a large epsilon": SIZES
    | {
        "head_dim": 14,
        "num_key_value_heads": 6,
        "rope_parameters": ROPE,
        "rms_norm_eps": 0.03,
        "moe_num_shared_experts": 1,
    },
    "yarn": SIZES | {"rope_parameters": YARN},
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"fused experts": fused(tensors)}


def sparse_layers(**changes) -> list[int]:
    kinds = [layer.feed_forward for layer in read(ERNIE, **changes).layers]
    return [i for i, kind in enumerate(kinds) if not isinstance(kind, DenseConfig)]


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, range(1, 28)),
        ({"moe_layer_end_index": -1}, range(1, 28)),
        ({"moe_layer_end_index": None}, range(1, 28)),
        ({"moe_layer_end_index": 20, "moe_layer_start_index": 3}, range(3, 21)),
        ({"moe_layer_interval": 2}, range(1, 28, 2)),
        ({"moe_layer_interval": 3, "moe_layer_start_index": 3}, range(5, 28, 3)),
        ({"moe_layer_interval": REMOVED, "moe_layer_start_index": 0}, range(28)),
        ({"moe_layer_start_index": 28}, []),
    ],
)
def test_sparse_layers_are_a_stretch_of_every_so_many(changes, sparse):
    assert sparse_layers(**changes) == list(sparse)


def test_the_numbers_of_experts_have_two_names():
    other = {"moe_k": REMOVED, "num_experts_per_tok": 6}
    assert read(ERNIE, **other, moe_num_experts=REMOVED, num_experts=64) == read(ERNIE)


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_bias", True), ("moe_gate_act", "sigmoid"), ("sliding_window", 4096)],
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", ERNIE, **{key: value})


@pytest.mark.parametrize("num_modules", [1, 2])
@torch.no_grad()
def test_mtp_modules_are_the_written_equations(tmp_path, num_modules):
    """A dense block, its state behind the main model's norm; transformers does not know them."""
    write_tiny("ernie4_5_moe", tmp_path / "tiny", num_nextn_predict_layers=num_modules)
    model = load_model(tmp_path / "tiny", dtype=torch.float64, progress=False)
    assert model.config.mtp.final_norm == "main"
    assert len(model.mtp) == num_modules
    tokens_BT = random_tokens(9)
    found, depths = model.mtp_logits(tokens_BT), plain_mtp_states(model, tokens_BT[0])
    for logits, states_TD in zip(found, depths, strict=True):
        expected = states_TD @ model.head.weight.T
        assert relative_difference(logits[0], expected) < 1e-4
    for wrong in ({"final_norm": "none"}, {"input": "raw"}):
        model.config = replace(model.config, mtp=replace(model.config.mtp, **wrong))
        expected = plain_mtp_states(model, tokens_BT[0])[0] @ model.head.weight.T
        assert relative_difference(found[0][0], expected) > 1e-3


@torch.no_grad()
def test_a_model_with_mtp_modules_is_the_peers_without_them(tmp_path):
    write_tiny("ernie4_5_moe", tmp_path / "tiny", num_nextn_predict_layers=1)
    peer, info = reload(tmp_path / "tiny")
    assert not info["missing_keys"]
    tokens_BT = random_tokens(9)
    model = load_model(tmp_path / "tiny", progress=False)
    assert relative_difference(model(tokens_BT), peer(tokens_BT).logits) < 1e-4
    stored = tensors_of(tmp_path / "tiny")
    write_tensors(tmp_path / "tiny", stored | {"model.mtp.layers.0.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"1 are unexpected \(model.mtp.layers"):
        load_model(tmp_path / "tiny", progress=False)


def test_modules_that_the_config_does_not_announce_are_left_alone(tmp_path):
    write_tiny("ernie4_5_moe", tmp_path / "tiny", num_nextn_predict_layers=1)
    edit_json(tmp_path / "tiny" / "config.json", num_nextn_predict_layers=REMOVED)
    assert load_model(tmp_path / "tiny", progress=False).config.mtp.blocks == ()


@pytest.mark.parametrize("key", ["mtp_own_head", "mtp_own_embedding"])
def test_modules_have_no_head_or_embedding_of_their_own(tmp_path, key):
    check_refused(tmp_path, f"{key} = True", ERNIE, **{key: True})


def test_a_config_that_announces_a_module_which_the_files_lack_loads_without(tmp_path):
    with pytest.warns(UserWarning, match="announces 1 MTP module"):
        _, model = pair(tmp_path, "ernie4_5_moe", SIZES | {"num_nextn_predict_layers": 1})
    assert model.config.mtp.blocks == ()


def test_trap_04_neighbours_are_rotated():
    assert {layer.attention.rope.layout for layer in read(ERNIE).layers} == {"interleaved"}


@pytest.mark.parametrize("minimum", [1e-12, 1e-3, 0.4])
def test_trap_16_weights_are_those_of_improbable_experts_where_the_bias_chooses_them(
    tmp_path, minimum
):
    """Probabilities down to 1e-30 beside biases up to 30: what is chosen may sum to less than
    the minimum that the sum counts as."""

    def prepare(peer):
        set_bias(peer, 0.0, 30.0)
        for weight_ED in named(peer, ROUTER):
            weight_ED.mul_(12)

    peer, model = pair(tmp_path, "ernie4_5_moe", SIZES | {"moe_norm_min": minimum}, prepare)
    assert named(peer, BIAS)[0].abs().max() > 20
    for weights_NE in check_routing(peer, model):
        sums_N = weights_NE.sum(dim=-1)
        assert sums_N.max() == pytest.approx(1.0)
        assert sums_N.min() < 0.5


@pytest.mark.parametrize("said", [False, None, REMOVED])
def test_trap_19_weights_are_normalised_whatever_the_config_says(said):
    moe = experts_of(ERNIE, norm_topk_prob=said)
    assert (moe.router.normalize, moe.router.normalize_minimum, moe.router.normalize_epsilon) == (
        True,
        1e-12,
        0.0,
    )
    assert experts_of(ERNIE, moe_norm_min=1e-6).router.normalize_minimum == 1e-6


def test_trap_21_the_selection_bias_stays_float32(tmp_path):
    check_bias_kept_wide(tmp_path, "ernie4_5_moe", SIZES)


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "ernie4_5_moe", SIZES, wide=True)


@pytest.mark.parametrize(("count", "width"), [(2, 3072), (1, 1536), (0, 0), (None, 0)])
def test_trap_27_shared_experts_are_one_of_their_summed_width(count, width):
    moe = experts_of(ERNIE, moe_num_shared_experts=count)
    assert (moe.shared_width, moe.shared_gate) == (width, False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "ernie4_5_moe", SIZES, fused)


@pytest.mark.parametrize("said", [True, None, REMOVED])
def test_trap_44_the_embedding_is_the_head_unless_the_config_says_otherwise(said):
    assert read(ERNIE, tie_word_embeddings=said).tied_embeddings
    assert not read(ERNIE, tie_word_embeddings=False).tied_embeddings
