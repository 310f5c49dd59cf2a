"""Published config.json files of the DeepSeek family say what these models are known to be."""

import math
from dataclasses import replace

import pytest
import torch
from files import REMOVED

from checkpoints.config_file import Fields
from checkpoints.families import FAMILIES
from modeling import DenseConfig, ModelConfig, Transformer
from moe import ConfigError, MoEConfig
from tools.describe import count_parameters

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
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
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
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
MOONLIGHT = V3 | {
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
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_nextn_predict_layers": REMOVED,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
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
PUBLISHED = {
    "V3": V3,
    "V2": V2,
    "V2-Lite": V2_LITE,
    "Kimi-K2": KIMI_K2,
    "Moonlight": MOONLIGHT,
}
every_model = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)


def read(published: dict, **changes) -> ModelConfig:
    raw = {key: value for key, value in (published | changes).items() if value is not REMOVED}
    return FAMILIES[raw["model_type"]].read_config(Fields(raw))


def read_yarn(**changes):
    """The rope of a V3 whose YaRN differs."""
    scaling = {key: value for key, value in (YARN | changes).items() if value is not REMOVED}
    return read(V3, rope_scaling=scaling).layers[0].attention.rope


def modern(published: dict) -> dict:
    """The same in the spelling that newer files use."""
    scaling = dict(published["rope_scaling"] or {"type": "default"})
    rope = {"rope_type": scaling.pop("type"), "rope_theta": published["rope_theta"], **scaling}
    renamed = {
        "torch_dtype": "dtype",
        "num_nextn_predict_layers": "num_mtp_layers",
        "n_routed_experts": "num_local_experts",
    }
    kept = {k: v for k, v in published.items() if k not in ("rope_theta", "rope_scaling")}
    return {renamed.get(k, k): v for k, v in kept.items()} | {"rope_parameters": rope}


@every_model
def test_old_and_new_spelling_describe_the_same_model(published):
    assert read(published) == read(modern(published))


@pytest.mark.parametrize("other", [{"rope_theta": 3.0}, {"rope_scaling": YARN | {"factor": 7}}])
def test_what_stands_in_rope_parameters_wins(other):
    assert read(modern(V3) | other) == read(V3)


@pytest.mark.parametrize("nothing", [REMOVED, None, {}])
def test_without_scaling_rope_is_plain(nothing):
    rope = read(V3, rope_scaling=nothing).layers[0].attention.rope
    assert (rope.theta, rope.width, rope.layout) == (10000.0, 64, "interleaved")
    assert (rope.yarn, rope.amplitude, rope.softmax_multiplier) == (None, 1.0, 1.0)


@pytest.mark.parametrize(
    ("published", "multiplier", "theta", "betas"),
    [
        (V3, 1.873854, 1e4, (32, 1)),
        (V2, 1.589626, 1e4, (32, 1)),
        (V2_LITE, 1.589626, 1e4, (32, 1)),
        (KIMI_K2, 1.813260, 5e4, (1, 1)),
        (MOONLIGHT, 1.0, 5e4, None),
    ],
    ids=["V3", "V2", "V2-Lite", "Kimi-K2", "Moonlight"],
)
def test_yarn_multiplies_the_softmax_scale_once_and_leaves_cos_and_sin(
    published, multiplier, theta, betas
):
    attention = read(published, num_hidden_layers=1, first_k_dense_replace=1).layers[0].attention
    assert attention.rope.softmax_multiplier == pytest.approx(multiplier, abs=5e-7)
    assert attention.rope.amplitude == 1.0
    assert attention.rope.theta == theta
    yarn = attention.rope.yarn
    assert betas == (yarn and (yarn.beta_fast, yarn.beta_slow))
    assert yarn is None or yarn.original_length == 4096
    with torch.device("meta"):
        model = Transformer(read(published, num_hidden_layers=1, first_k_dense_replace=1))
    assert model.layers[0].attention.scale == pytest.approx(multiplier / math.sqrt(192), rel=1e-6)


G = 0.1 * math.log(40) + 1


@pytest.mark.parametrize(
    ("changes", "amplitude", "multiplier"),
    [
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
def test_amplitude_and_multiplier_follow_the_scaling(changes, amplitude, multiplier):
    rope = read_yarn(**changes)
    assert rope.amplitude == pytest.approx(amplitude)
    assert rope.softmax_multiplier == pytest.approx(multiplier)


def test_the_ramp_of_yarn_has_defaults():
    rope = read_yarn(beta_fast=REMOVED, beta_slow=REMOVED)
    assert (rope.yarn.beta_fast, rope.yarn.beta_slow, rope.yarn.truncate) == (32, 1, True)
    assert not read_yarn(truncate=False).yarn.truncate


@every_model
def test_norms_inside_the_attention_keep_their_own_epsilon(published):
    config = read(published, rms_norm_eps=1e-5)
    assert config.norm_epsilon == 1e-5
    assert {layer.attention.latent_norm_epsilon for layer in config.layers} == {1e-6}


@pytest.mark.parametrize(
    ("published", "width"),
    [(V3, 2048), (V2, 3072), (V2_LITE, 2816), (MOONLIGHT, 2816)],
    ids=["V3", "V2", "V2-Lite", "Moonlight"],
)
def test_shared_experts_are_one_of_their_summed_width(published, width):
    assert read(published).layers[-1].feed_forward.shared_width == width


@pytest.mark.parametrize("none", [0, None, REMOVED])
def test_there_may_be_no_shared_expert(none):
    assert read(V3, n_shared_experts=none).layers[-1].feed_forward.shared_width == 0


@pytest.mark.parametrize(
    ("published", "first_sparse", "num_layers", "num_mtp"),
    [
        (V3, 3, 61, 1),
        (V2, 1, 60, 0),
        (KIMI_K2, 1, 61, 0),
        (V3 | {"first_k_dense_replace": 0, "num_nextn_predict_layers": 3}, 0, 61, 3),
        (V3 | {"first_k_dense_replace": 61}, 61, 61, 1),
    ],
)
def test_dense_layers_come_first_and_mtp_modules_are_no_main_layers(
    published, first_sparse, num_layers, num_mtp
):
    config = read(published)
    kinds = [type(layer.feed_forward) for layer in config.layers]
    assert kinds == [DenseConfig] * first_sparse + [MoEConfig] * (num_layers - first_sparse)
    assert [type(block.feed_forward) for block in config.mtp] == [MoEConfig] * num_mtp
    with torch.device("meta"):
        model = Transformer(replace(config, layers=config.layers[:5]))
    assert list(model.mtp) == [str(5 + j) for j in range(num_mtp)]


def test_v3_routes_by_biased_sigmoids_in_groups():
    assert read(V3).layers[-1].feed_forward == MoEConfig(
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


@pytest.mark.parametrize("published", [KIMI_K2, MOONLIGHT], ids=["Kimi-K2", "Moonlight"])
def test_one_group_is_no_limit(published):
    moe = read(published).layers[-1].feed_forward
    assert (moe.num_groups, moe.groups_kept) == (1, 1)
    assert (moe.scoring, moe.selection_bias, moe.normalize) == ("sigmoid", True, True)
    assert moe.scale == published["routed_scaling_factor"]


@pytest.mark.parametrize(
    ("method", "groups"), [("greedy", (1, 1)), ("group_limited_greedy", (8, 3))]
)
def test_v2_has_groups_only_where_its_method_limits_them(method, groups):
    moe = read(V2, topk_method=method).layers[-1].feed_forward
    assert (moe.num_groups, moe.groups_kept) == groups
    assert moe.group_score == "max"
    assert (moe.scoring, moe.selection_bias, moe.normalize) == ("softmax", False, False)
    assert moe.scale == 16.0


def test_v3_may_rotate_half_split_pairs():
    assert read(V3, rope_interleave=False).layers[0].attention.rope.layout == "half"


def test_a_half_of_v2_cannot_read_the_other_family():
    with pytest.raises(ConfigError, match="scoring_func = 'sigmoid'"):
        read(V3, model_type="deepseek_v2")
    with pytest.raises(ConfigError, match="scoring_func = 'softmax'"):
        read(V2, model_type="deepseek_v3")


FIGURES = {  # parameters in billions: all, used per token, of them not the input embedding
    "V3": (V3, 671.026, 37.55, 36.63),
    "V2": (V2, 235.741, 21.38, 20.85),
    "V2-Lite": (V2_LITE, 15.706, 2.66, 2.45),
    "Kimi-K2": (KIMI_K2, 1026.4, 32.86, 31.69),
    "Moonlight": (MOONLIGHT, 15.96, 2.91, 2.58),
}


@pytest.mark.parametrize(("published", "all_", "active", "inner"), FIGURES.values(), ids=FIGURES)
def test_parameters_add_up_to_the_published_totals(published, all_, active, inner):
    with torch.device("meta"):
        model = Transformer(read(published))
    counted = count_parameters(model)
    assert counted["total"] / 1e9 == pytest.approx(all_, abs=0.05 if all_ > 1000 else 0.005)
    assert counted["active"] / 1e9 == pytest.approx(active, abs=0.006)
    assert counted["active_without_embedding"] / 1e9 == pytest.approx(inner, abs=0.006)
    if model.mtp:
        assert counted["mtp"] / 1e9 == pytest.approx(11.6, abs=0.1)


@pytest.mark.parametrize(
    ("published", "nbytes"), [(V3, 70_272), (V2, 69_120), (V2_LITE, 31_104), (KIMI_K2, 70_272)]
)
def test_the_cache_holds_what_is_published_per_token(published, nbytes):
    with torch.device("meta"):
        model = Transformer(read(published)).to(torch.bfloat16)
        assert model.make_cache(1, 1).nbytes == nbytes
