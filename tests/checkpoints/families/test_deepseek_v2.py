"""DeepSeek-V2, V2-Lite, Coder-V2: latent attention, softmax scores, groups by their best expert."""

import math

import pytest
import torch
from files import REMOVED
from layouts import fused
from published import TINY_YARN, difference, modern, partners_of_the_first, with_frequencies
from traps import (
    biases_in_a_layer,
    build_on_meta,
    check_gate_comes_first,
    check_refused,
    check_router_precision,
    check_routing,
    experts_of,
    pair,
    read,
)

MODEL_TYPES = ("deepseek_v2",)

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2_LITE = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
PUBLISHED = {"V2": V2, "V2-Lite": V2_LITE, "Coder-V2": V2, "Coder-V2-Lite": V2_LITE}
every_release = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)

FIGURES = {
    "V2": (235.741, 21.38, 20.85),
    "V2-Lite": (15.706, 2.66, 2.45),
    "Coder-V2": (235.741, 21.38, 20.85),
    "Coder-V2-Lite": (15.706, 2.66, 2.45),
}

ATTENTION = {
    "input_layernorm.weight": [5120],
    "post_attention_layernorm.weight": [5120],
    "self_attn.q_a_proj.weight": [1536, 5120],
    "self_attn.q_a_layernorm.weight": [1536],
    "self_attn.q_b_proj.weight": [24576, 1536],
    "self_attn.kv_a_proj_with_mqa.weight": [576, 5120],
    "self_attn.kv_a_layernorm.weight": [512],
    "self_attn.kv_b_proj.weight": [32768, 512],
    "self_attn.o_proj.weight": [5120, 16384],
}
DENSE = {
    "mlp.gate_proj.weight": [12288, 5120],
    "mlp.up_proj.weight": [12288, 5120],
    "mlp.down_proj.weight": [5120, 12288],
}
SPARSE = {
    "mlp.gate.weight": [160, 5120],
    "mlp.shared_experts.gate_proj.weight": [3072, 5120],
    "mlp.shared_experts.up_proj.weight": [3072, 5120],
    "mlp.shared_experts.down_proj.weight": [5120, 3072],
    "mlp.experts.0.gate_proj.weight": [1536, 5120],
    "mlp.experts.0.up_proj.weight": [1536, 5120],
    "mlp.experts.0.down_proj.weight": [5120, 1536],
    "mlp.experts.159.gate_proj.weight": [1536, 5120],
    "mlp.experts.159.up_proj.weight": [1536, 5120],
    "mlp.experts.159.down_proj.weight": [5120, 1536],
}
NAMES = {
    "model.embed_tokens.weight": [102400, 5120],
    "model.norm.weight": [5120],
    "lm_head.weight": [102400, 5120],
    **{f"model.layers.0.{name}": shape for name, shape in (ATTENTION | DENSE).items()},
    **{f"model.layers.59.{name}": shape for name, shape in (ATTENTION | SPARSE).items()},
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
    "q_lora_rank": None,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
    "v_head_dim": 18,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,  # not that of the norms inside the attention, and enough to show
    "topk_method": "greedy",
}
FOUR_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
THREE_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}
VARIANTS = {
    "greedy": {},
    "greedy, compressed queries": {"q_lora_rank": 22},
    "groups": {**FOUR_GROUPS, "routed_scaling_factor": 16.0},
    "groups, compressed queries": {**THREE_GROUPS, "q_lora_rank": 22},
}
ROPES = {"yarn": TINY_YARN, "plain rope": {"rope_type": "default", "rope_theta": 5e4}}
PEERS = {
    **{
        f"{name}, {kind}": {**SIZES, **changes, "rope_parameters": rope}
        for name, changes in VARIANTS.items()
        for kind, rope in ROPES.items()
    },
    "biases, tied": SIZES
    | {"q_lora_rank": 22, "attention_bias": True, "tie_word_embeddings": True},
    "no dense layer, narrow values": SIZES | {"first_k_dense_replace": 0, "v_head_dim": 10},
    "dense layers alone, one shared expert": SIZES
    | {"first_k_dense_replace": 2, "n_shared_experts": 1},
    "yarn without mscale_all_dim": SIZES
    | {"rope_parameters": TINY_YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}},
    "yarn with its own amplitude": SIZES
    | {"rope_parameters": TINY_YARN | {"attention_factor": 0.8, "truncate": False}},
    "norm_topk_prob, which is ignored": SIZES | {"norm_topk_prob": True},
}


ONE = SIZES | {"num_hidden_layers": 1, "first_k_dense_replace": 0}


def layouts(tensors):
    return {"experts fused": fused(tensors), "with frequencies": with_frequencies(tensors)}


@every_release
def test_old_and_new_spelling_describe_the_same_model(published):
    for experts in ("num_experts", "num_local_experts"):
        assert read(modern(published, n_routed_experts=experts)) == read(published)


@pytest.mark.parametrize("published", [V2, V2_LITE], ids=["V2", "V2-Lite"])
def test_trap_01_yarn_multiplies_the_softmax_scale_once(published):
    model = build_on_meta(published, num_hidden_layers=1)
    assert model.layers[0].attention.scale == pytest.approx(1.589626 / 192**0.5, rel=1e-6)
    rope = model.config.layers[0].attention.rope
    assert rope.softmax_multiplier == pytest.approx(1.589626, abs=5e-7)
    assert (rope.theta, rope.yarn.factor, rope.yarn.original_length) == (10000.0, 40.0, 4096)
    assert (rope.yarn.beta_fast, rope.yarn.beta_slow, rope.yarn.truncate) == (32, 1, True)


def test_trap_02_equal_mscales_leave_cos_and_sin_and_an_attention_factor_does_not(tmp_path):
    assert read(V2).layers[0].attention.rope.amplitude == 1.0
    sizes = ONE | {"rope_parameters": TINY_YARN | {"attention_factor": 0.7}}
    peer, model = pair(tmp_path, "deepseek_v2", sizes)
    rope = model.config.layers[0].attention.rope
    assert rope.amplitude == 0.7
    assert rope.softmax_multiplier == pytest.approx((0.09 * math.log(4) + 1) ** 2)
    assert difference(peer, model) < 1e-4


@every_release
def test_trap_04_neighbours_are_rotated_together(published):
    rope = read(published).layers[0].attention.rope
    assert rope.width == 64
    assert partners_of_the_first(rope) == {0, 1}


def test_trap_17_the_weights_are_softmax_probabilities_over_all_experts(tmp_path):
    for weights_NE in check_routing(*pair(tmp_path, "deepseek_v2", SIZES)):
        assert weights_NE.sum(dim=1).max() < 0.99


@pytest.mark.parametrize("normalise", [True, False, REMOVED])
def test_trap_19_weights_are_never_normalised(normalise):
    assert experts_of(V2, norm_topk_prob=normalise).router.normalize is False


def test_trap_20_the_scaling_factor_multiplies_the_weights(tmp_path):
    (doubled,) = check_routing(*pair(tmp_path, "deepseek_v2", ONE | {"routed_scaling_factor": 2.0}))
    (plain,) = check_routing(*pair(tmp_path, "deepseek_v2", ONE))
    assert doubled.equal(2 * plain)
    assert experts_of(V2, routed_scaling_factor=REMOVED).router.scale == 1.0


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "deepseek_v2", ONE, wide=True)


@pytest.mark.parametrize(
    ("method", "groups"), [("greedy", (1, 1)), ("group_limited_greedy", (8, 3))]
)
def test_trap_23_groups_are_limited_only_where_the_method_says_so_by_their_best_expert(
    method, groups
):
    moe = experts_of(V2, topk_method=method)
    assert (moe.router.num_groups, moe.router.groups_kept) == groups
    logits_NE = torch.zeros(1, 160)
    logits_NE[0, :60:20] = 9.0  # the best expert of groups 0, 1, 2
    logits_NE[0, 60:160] = 8.9  # all of the others, whose sums are greater
    kept = set((moe.router.route(logits_NE).experts_NK // 20).flatten().tolist())
    assert kept == {0, 1, 2} if method == "group_limited_greedy" else kept - {0, 1, 2}


@pytest.mark.parametrize(("published", "width"), [(V2, 3072), (V2_LITE, 2816)])
def test_trap_27_shared_experts_are_one_of_their_summed_width(published, width):
    moe = experts_of(published)
    assert (moe.shared_width, moe.shared_gate) == (width, False)
    for none in (0, None, REMOVED):
        assert experts_of(published, n_shared_experts=none).shared_width == 0


@every_release
def test_trap_41_norms_inside_the_attention_keep_their_own_epsilon(published):
    model = build_on_meta(published, num_hidden_layers=1, rms_norm_eps=1e-5)
    attention = model.layers[0].attention
    inner = [attention.kv_norm] + ([attention.q.norm] if published["q_lora_rank"] else [])
    assert {norm.epsilon for norm in inner} == {1e-6}
    assert {model.norm.epsilon, model.layers[0].attention_norm.epsilon} == {1e-5}


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "deepseek_v2", ONE, fused)


@pytest.mark.parametrize(("rank", "biased"), [(22, {"q_a_proj"}), (None, set())])
def test_trap_46_biases_stand_on_the_compressions_and_the_output_alone(tmp_path, rank, biased):
    sizes = ONE | {"attention_bias": True, "q_lora_rank": rank}
    peer, model = pair(tmp_path, "deepseek_v2", sizes)
    assert biases_in_a_layer(peer) == biased | {"kv_a_proj_with_mqa", "o_proj"}
    assert model.config.layers[0].attention.bias


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 2),
        ("hidden_act", "gelu"),
        ("sliding_window", 4096),
        ("mlp_bias", True),
        ("index_topk", 2048),
    ],
)
def test_what_a_v2_cannot_be_is_refused_by_name(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", V2, **{key: value})


@pytest.mark.parametrize("key", ["n_group", "topk_group"])
def test_limited_groups_must_be_given(tmp_path, key):
    check_refused(tmp_path, f"{key} is missing", V2, **{key: REMOVED})


@pytest.mark.parametrize(("published", "nbytes"), [(V2, 69_120), (V2_LITE, 31_104)])
def test_the_cache_holds_what_is_published_per_token(published, nbytes):
    with torch.device("meta"):
        assert build_on_meta(published).to(torch.bfloat16).make_cache(1, 1).nbytes == nbytes
