"""DeepSeek-V3, R1, V3.1, Kimi-K2 and Moonlight: biased sigmoids in groups, an MTP module."""

import math
from dataclasses import replace

import pytest
import torch
from files import REMOVED, edit_json, tensors_of, write_tensors
from layouts import fused
from published import (
    TINY_YARN,
    modern,
    partners_of_the_first,
    peer_of,
    save,
    with_frequencies,
)
from tiny import sparse
from traps import (
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

from checkpoints import CheckpointError, load_model
from modeling import Transformer
from modeling.rope import inverse_frequencies
from moe import DenseConfig, MoEConfig
from tools.describe import count_parameters

MODEL_TYPES = ("deepseek_v3", "kimi_k2")

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = V3 | {
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
KIMI_K2_0905 = KIMI_K2 | {
    "max_position_embeddings": 262144,
    "rope_scaling": KIMI_K2["rope_scaling"] | {"factor": 64.0},
}
MOONLIGHT = V3 | {
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
PUBLISHED = {
    "V3": V3,
    "Kimi-K2": KIMI_K2,
    "Kimi-K2-0905": KIMI_K2_0905,
    "Moonlight": MOONLIGHT,
}
every_release = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)

FIGURES = {
    "V3": (671.026, 37.55, 36.63),
    "Kimi-K2": (1026.4, 32.86, 31.69),
    "Kimi-K2-0905": (1026.4, 32.86, 31.69),
    "Moonlight": (15.96, 2.91, 2.58),
}

ATTENTION = {
    "input_layernorm.weight": [7168],
    "post_attention_layernorm.weight": [7168],
    "self_attn.q_a_proj.weight": [1536, 7168],
    "self_attn.q_a_layernorm.weight": [1536],
    "self_attn.q_b_proj.weight": [24576, 1536],
    "self_attn.kv_a_proj_with_mqa.weight": [576, 7168],
    "self_attn.kv_a_layernorm.weight": [512],
    "self_attn.kv_b_proj.weight": [32768, 512],
    "self_attn.o_proj.weight": [7168, 16384],
}
DENSE = {
    "mlp.gate_proj.weight": [18432, 7168],
    "mlp.up_proj.weight": [18432, 7168],
    "mlp.down_proj.weight": [7168, 18432],
}
SPARSE = {
    "mlp.gate.weight": [256, 7168],
    "mlp.gate.e_score_correction_bias": [256],
    "mlp.shared_experts.gate_proj.weight": [2048, 7168],
    "mlp.shared_experts.up_proj.weight": [2048, 7168],
    "mlp.shared_experts.down_proj.weight": [7168, 2048],
    "mlp.experts.0.gate_proj.weight": [2048, 7168],
    "mlp.experts.0.up_proj.weight": [2048, 7168],
    "mlp.experts.0.down_proj.weight": [7168, 2048],
    "mlp.experts.255.gate_proj.weight": [2048, 7168],
    "mlp.experts.255.up_proj.weight": [2048, 7168],
    "mlp.experts.255.down_proj.weight": [7168, 2048],
}
MTP = {
    "enorm.weight": [7168],
    "hnorm.weight": [7168],
    "eh_proj.weight": [7168, 14336],
    "embed_tokens.weight": [129280, 7168],
    "shared_head.norm.weight": [7168],
    "shared_head.head.weight": [129280, 7168],
}
NAMES = {
    "model.embed_tokens.weight": [129280, 7168],
    "model.norm.weight": [7168],
    "lm_head.weight": [129280, 7168],
    **{f"model.layers.2.{name}": shape for name, shape in (ATTENTION | DENSE).items()},
    **{f"model.layers.3.{name}": shape for name, shape in (ATTENTION | SPARSE).items()},
    **{f"model.layers.61.{name}": shape for name, shape in (ATTENTION | SPARSE | MTP).items()},
}

SIZES = {
    "vocab_size": 103,
    "hidden_size": 60,
    "intermediate_size": 92,
    "moe_intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 22,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
    "v_head_dim": 18,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,  # not that of the norms inside the attention, and enough to show
    "num_mtp_layers": 0,
}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
VARIANTS = {
    "groups, normalised": {"n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    "groups, not normalised": {
        "n_group": 3,
        "topk_group": 2,
        "norm_topk_prob": False,
        "q_lora_rank": None,
    },
    "one group, biases": ONE_GROUP | {"attention_bias": True, "routed_scaling_factor": 2.446},
    "half-split pairs, narrow values": {
        "n_group": 2,
        "topk_group": 1,
        "rope_interleave": False,
        "v_head_dim": 10,
    },
    "tied": {"n_group": 2, "topk_group": 2, "tie_word_embeddings": True},
}
PLAIN = {"rope_type": "default", "rope_theta": 5e4}
PEERS = {
    **{
        f"{name}, {kind}": {**SIZES, **changes, "rope_parameters": rope}
        for name, changes in VARIANTS.items()
        for kind, rope in {"yarn": TINY_YARN, "plain rope": PLAIN}.items()
    },
    "as in Kimi-K2": SIZES
    | ONE_GROUP
    | {
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.827,
        "rope_parameters": TINY_YARN
        | {"beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 5e4},
    },
    "as in Moonlight": SIZES
    | ONE_GROUP
    | {"q_lora_rank": None, "routed_scaling_factor": 2.446, "rope_parameters": PLAIN},
    "no dense layer": SIZES | {"first_k_dense_replace": 0, "n_group": 6, "topk_group": 4},
    "two dense layers": SIZES | {"first_k_dense_replace": 2, "n_group": 6, "topk_group": 2},
}


ONE = SIZES | {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.2,
}


def layouts(tensors):
    return {"experts fused": fused(tensors), "with frequencies": with_frequencies(tensors)}


def yarn_of(**changes):
    """The rope of a V3 whose YaRN differs."""
    scaling = {key: value for key, value in (YARN | changes).items() if value is not REMOVED}
    return read(V3, rope_scaling=scaling).layers[0].attention.rope


# --- positions


@pytest.mark.parametrize(
    ("published", "multiplier", "theta", "betas"),
    [
        (V3, 1.873854, 1e4, (32, 1)),
        (KIMI_K2, 1.813260, 5e4, (1, 1)),
        (KIMI_K2_0905, 2.004740, 5e4, (1, 1)),
        (MOONLIGHT, 1.0, 5e4, None),
    ],
    ids=PUBLISHED,
)
def test_trap_01_yarn_multiplies_the_softmax_scale_once(published, multiplier, theta, betas):
    model = build_on_meta(published, num_hidden_layers=1, first_k_dense_replace=1)
    rope = model.config.layers[0].attention.rope
    assert rope.softmax_multiplier == pytest.approx(multiplier, abs=5e-7)
    assert rope.theta == theta
    assert betas == (rope.yarn and (rope.yarn.beta_fast, rope.yarn.beta_slow))
    assert rope.yarn is None or rope.yarn.original_length == 4096
    assert model.layers[0].attention.scale == pytest.approx(multiplier / 192**0.5, rel=1e-6)


G = 0.1 * math.log(40) + 1


@pytest.mark.parametrize(
    ("changes", "amplitude", "multiplier"),
    [
        ({}, 1.0, G**2),
        ({"mscale": REMOVED, "mscale_all_dim": REMOVED}, G, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0}, G, 1.0),
        ({"mscale": 0, "mscale_all_dim": 1.0}, G, G**2),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (2 * G - 1) / G, G**2),
        ({"attention_factor": 0.5}, 0.5, G**2),
        ({"attention_factor": 1.0, "mscale": REMOVED, "mscale_all_dim": REMOVED}, 1.0, 1.0),
        ({"attention_factor": None}, 1.0, G**2),
        ({"factor": 1.0, "mscale": REMOVED, "mscale_all_dim": REMOVED}, 1.0, 1.0),
    ],
)
def test_trap_02_amplitude_and_multiplier_are_two_numbers(changes, amplitude, multiplier):
    rope = yarn_of(**changes)
    assert rope.amplitude == pytest.approx(amplitude)
    assert rope.softmax_multiplier == pytest.approx(multiplier)


def test_trap_03_equal_betas_make_a_step_between_pairs_19_and_20():
    turns_r = inverse_frequencies(read(KIMI_K2).layers[0].attention.rope)
    plain_r = torch.tensor([50000 ** (-i / 32) for i in range(32)])
    torch.testing.assert_close(turns_r[:20], plain_r[:20])
    torch.testing.assert_close(turns_r[20:], plain_r[20:] / 32)


def test_trap_03_the_ramp_of_yarn_has_defaults():
    rope = yarn_of(beta_fast=REMOVED, beta_slow=REMOVED)
    assert (rope.yarn.beta_fast, rope.yarn.beta_slow, rope.yarn.truncate) == (32, 1, True)
    assert not yarn_of(truncate=False).yarn.truncate


@every_release
def test_trap_04_neighbours_are_rotated_together_unless_rope_interleave_is_false(published):
    rope = read(published).layers[0].attention.rope
    assert partners_of_the_first(rope) == {0, 1}
    halves = read(published, rope_interleave=False).layers[0].attention.rope
    assert partners_of_the_first(halves) == {0, 32}


def test_trap_07_the_last_dimensions_of_a_head_are_rotated(tmp_path):
    check_rotated_part(
        tmp_path, "deepseek_v3", ONE, r"\.q_b_proj\.weight", slice(-6, None), slice(-6)
    )


@pytest.mark.parametrize("nothing", [REMOVED, None, {}])
def test_without_scaling_rope_is_plain(nothing):
    rope = read(V3, rope_scaling=nothing).layers[0].attention.rope
    assert (rope.theta, rope.width, rope.layout) == (10000.0, 64, "interleaved")
    assert (rope.yarn, rope.amplitude, rope.softmax_multiplier) == (None, 1.0, 1.0)


@every_release
def test_old_and_new_spelling_describe_the_same_model(published):
    assert read(modern(published, n_routed_experts="num_local_experts")) == read(published)


@pytest.mark.parametrize("other", [{"rope_theta": 3.0}, {"rope_scaling": YARN | {"factor": 7}}])
def test_what_stands_in_rope_parameters_wins(other):
    assert read(modern(V3) | other) == read(V3)


# --- routing


def test_v3_routes_by_biased_sigmoids_in_groups():
    assert experts_of(V3) == sparse(
        num_experts=256,
        top_k=8,
        expert_width=2048,
        scoring="sigmoid",
        selection_bias=True,
        num_groups=8,
        groups_kept=4,
        group_score="top2_sum",
        normalize=True,
        normalize_epsilon=1e-20,
        scale=2.5,
        shared_width=2048,
    )


def test_trap_15_experts_of_masked_groups_never_win(tmp_path):
    check_masked_groups(tmp_path, "deepseek_v3", ONE)


def test_trap_16_weights_are_not_taken_from_biased_scores(tmp_path):
    check_weights_without_the_bias(tmp_path, "deepseek_v3", ONE)


@every_release
def test_trap_18_weights_are_normalised_where_the_file_says_so(tmp_path, published):
    assert experts_of(published).router.normalize
    assert not experts_of(published, norm_topk_prob=False).router.normalize
    check_refused(tmp_path, "norm_topk_prob is missing", published, norm_topk_prob=REMOVED)


@pytest.mark.parametrize("normalised", [True, False])
def test_trap_20_the_scaling_factor_multiplies_weights_normalised_or_not(tmp_path, normalised):
    sizes = ONE | {"norm_topk_prob": normalised}
    (weights_NE,) = check_routing(*pair(tmp_path, "deepseek_v3", sizes))
    sums_N = weights_NE.sum(dim=1)
    assert (sums_N.mean().item() == pytest.approx(2.2)) is normalised
    check_refused(tmp_path, "routed_scaling_factor is missing", V3, routed_scaling_factor=REMOVED)


def test_trap_21_the_selection_bias_stays_in_float32(tmp_path):
    check_bias_kept_wide(tmp_path, "deepseek_v3", ONE)


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "deepseek_v3", ONE, wide=True)


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (3, 1), (1, 1)])
def test_trap_23_a_group_counts_by_its_two_best_and_a_single_one_masks_nothing(
    tmp_path, groups, kept
):
    sizes = ONE | {"n_group": groups, "topk_group": kept}
    check_routing(*pair(tmp_path, "deepseek_v3", sizes))


@pytest.mark.parametrize("published", [KIMI_K2, MOONLIGHT], ids=["Kimi-K2", "Moonlight"])
def test_one_group_is_no_limit(published):
    moe = experts_of(published)
    assert (moe.router.num_groups, moe.router.groups_kept) == (1, 1)
    assert (moe.router.scoring, moe.router.selection_bias, moe.router.normalize) == (
        "sigmoid",
        True,
        True,
    )
    assert moe.router.scale == published["routed_scaling_factor"]


@pytest.mark.parametrize(("published", "width"), [(V3, 2048), (KIMI_K2, 2048), (MOONLIGHT, 2816)])
def test_trap_27_shared_experts_are_one_of_their_summed_width(published, width):
    moe = experts_of(published)
    assert (moe.shared_width, moe.shared_gate) == (width, False)
    for none in (0, None, REMOVED):
        assert experts_of(published, n_shared_experts=none).shared_width == 0


# --- tensors


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "deepseek_v3", ONE, fused)


@pytest.mark.filterwarnings("ignore:the config announces")
def test_trap_32_scales_multiply_despite_their_name(tmp_path):
    path = save(peer_of("deepseek_v3", ONE), tmp_path / "fp8")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = tensors_of(path)
    raw = tensors[name].to(torch.float8_e4m3fn)
    write_tensors(path, tensors | {name: raw, name + "_scale_inv": torch.tensor([[4.0]])})
    model = load_model(path, dtype=torch.float32, progress=False)
    assert model.layers[0].attention.o.weight.equal(raw.float() * 4)
    write_tensors(path, tensors | {name: raw})
    with pytest.raises(CheckpointError, match="download the file that holds its scale"):
        load_model(path, progress=False)


def test_another_way_of_quantising_is_refused_by_name(tmp_path):
    quantized = {"quant_method": "awq", "weight_block_size": [128, 128]}
    said = "quantization_config.quant_method = 'awq', expected one of fp8"
    check_refused(tmp_path, said, V3, quantization_config=quantized)


@every_release
def test_trap_41_norms_inside_the_attention_keep_their_own_epsilon(published):
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 1}
    model = build_on_meta(published, **one, rms_norm_eps=1e-5)
    attention = model.layers[0].attention
    inner = [attention.kv_norm] + ([attention.q.norm] if published["q_lora_rank"] else [])
    assert {norm.epsilon for norm in inner} == {1e-6}
    assert {model.norm.epsilon, model.layers[0].attention_norm.epsilon} == {1e-5}


@pytest.mark.parametrize(("rank", "biased"), [(22, {"q_a_proj"}), (None, set())])
def test_trap_46_biases_stand_on_the_compressions_and_the_output_alone(tmp_path, rank, biased):
    sizes = ONE | {"attention_bias": True, "q_lora_rank": rank}
    peer, model = pair(tmp_path, "deepseek_v3", sizes)
    assert biases_in_a_layer(peer) == biased | {"kv_a_proj_with_mqa", "o_proj"}
    assert model.config.layers[0].attention.bias


# --- layers and MTP modules


@pytest.mark.parametrize(
    ("published", "first_sparse", "num_layers", "num_mtp"),
    [
        (V3, 3, 61, 1),
        (KIMI_K2, 1, 61, 0),
        (MOONLIGHT, 1, 27, 0),
        (V3 | {"first_k_dense_replace": 0, "num_nextn_predict_layers": 3}, 0, 61, 3),
        (V3 | {"first_k_dense_replace": 61}, 61, 61, 1),
    ],
)
def test_trap_49_dense_layers_come_first_and_mtp_modules_are_counted_apart(
    published, first_sparse, num_layers, num_mtp
):
    config = read(published)
    kinds = [type(layer.feed_forward) for layer in config.layers]
    assert kinds == [DenseConfig] * first_sparse + [MoEConfig] * (num_layers - first_sparse)
    assert [type(block.feed_forward) for block in config.mtp.blocks] == [MoEConfig] * num_mtp
    with torch.device("meta"):
        model = Transformer(replace(config, layers=config.layers[:5]))
    assert list(model.mtp) == [str(5 + j) for j in range(num_mtp)]


def test_trap_47_the_embedding_comes_before_the_state(tmp_path):
    check_embedding_comes_first(tmp_path, "deepseek_v3", ONE)


def test_trap_48_states_are_handed_on_after_their_norm(tmp_path):
    check_states_are_normed(tmp_path, "deepseek_v3", ONE)


def test_trap_49_the_layer_behind_the_last_one_is_no_main_layer(tmp_path):
    check_mtp_layer_is_apart(tmp_path, "deepseek_v3", ONE)


def test_the_modules_of_v3_have_the_published_size():
    assert count_parameters(build_on_meta(V3))["mtp"] / 1e9 == pytest.approx(11.6, abs=0.1)


# --- the rest of a config


def test_a_kimi_k2_is_a_v3_in_everything_but_name(tiny):
    path = tiny("kimi_k2")
    named_kimi = load_model(path, progress=False)
    edit_json(path / "config.json", model_type="deepseek_v3")
    assert load_model(path, progress=False).config == named_kimi.config
    assert read(KIMI_K2, model_type="deepseek_v3") == read(KIMI_K2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("hidden_act", "gelu"),
        ("sliding_window", 4096),
        ("mlp_bias", True),
        ("index_topk", 2048),
    ],
)
def test_what_a_v3_cannot_be_is_refused_by_name(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", V3, **{key: value})


@pytest.mark.parametrize(
    ("published", "nbytes"), [(V3, 70_272), (KIMI_K2, 70_272), (MOONLIGHT, 31_104)]
)
def test_the_cache_holds_what_is_published_per_token(published, nbytes):
    with torch.device("meta"):
        assert build_on_meta(published).to(torch.bfloat16).make_cache(1, 1).nbytes == nbytes
