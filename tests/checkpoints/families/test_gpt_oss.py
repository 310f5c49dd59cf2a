"""gpt-oss: sinks, a window in every second layer, biases everywhere, clamped SwiGLU."""

import pytest
import torch
from files import REMOVED, tensors_of, write_tensors
from published import relative_difference
from torch import Tensor
from traps import (
    BOUND,
    TINY,
    YARN,
    biases_in_a_layer,
    check_refused,
    check_router_precision,
    check_routing,
    check_window,
    experts_of,
    named,
    our_weights,
    pair,
    random_tokens,
    read,
    router_output,
    their_weights,
)

from checkpoints import CheckpointError, load_model
from modeling.rope import inverse_frequencies
from moe import Clamp, ConfigError

MODEL_TYPES = ("gpt_oss",)
OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
PUBLISHED = {
    "gpt-oss-20b": OSS_20B,
    "gpt-oss-120b": OSS_20B
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "num_hidden_layers": 36,
        "num_local_experts": 128,
    },
}
FIGURES = {
    "gpt-oss-20b": (20.915, 4.187, 3.608),
    "gpt-oss-120b": (116.829, 5.712, 5.133),
}
NAMES = {
    "model.embed_tokens.weight": [201088, 2880],
    "model.norm.weight": [2880],
    "lm_head.weight": [201088, 2880],
    "model.layers.23.input_layernorm.weight": [2880],
    "model.layers.23.post_attention_layernorm.weight": [2880],
    "model.layers.23.self_attn.q_proj.weight": [4096, 2880],
    "model.layers.23.self_attn.q_proj.bias": [4096],
    "model.layers.23.self_attn.k_proj.weight": [512, 2880],
    "model.layers.23.self_attn.k_proj.bias": [512],
    "model.layers.23.self_attn.v_proj.weight": [512, 2880],
    "model.layers.23.self_attn.v_proj.bias": [512],
    "model.layers.23.self_attn.o_proj.weight": [2880, 4096],
    "model.layers.23.self_attn.o_proj.bias": [2880],
    "model.layers.23.self_attn.sinks": [64],
    "model.layers.23.mlp.router.weight": [32, 2880],
    "model.layers.23.mlp.router.bias": [32],
    "model.layers.23.mlp.experts.gate_up_proj": [32, 2880, 5760],
    "model.layers.23.mlp.experts.gate_up_proj_bias": [32, 5760],
    "model.layers.23.mlp.experts.down_proj": [32, 2880, 2880],
    "model.layers.23.mlp.experts.down_proj_bias": [32, 2880],
}
OSS_YARN = YARN | {"rope_theta": 150000.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
PLAIN = {"rope_type": "default", "rope_theta": 150000.0}
SIZES = TINY | {
    "num_hidden_layers": 3,
    "intermediate_size": 28,
    "num_local_experts": 7,
    "num_experts_per_tok": 3,
    "head_dim": 14,
    "sliding_window": 7,
    "rope_parameters": OSS_YARN,
}
PEERS = {
    "yarn without rounding": SIZES,
    "yarn with rounding, one expert": SIZES
    | {"rope_parameters": OSS_YARN | {"truncate": True}, "num_experts_per_tok": 1},
    "plain rope, no biases in attention": SIZES
    | {"rope_parameters": PLAIN, "attention_bias": False, "num_key_value_heads": 6},
    "another order of windows, a tight clamp": SIZES
    | {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 1,
        "swiglu_limit": 0.5,
        "swiglu_alpha": 1.1,
    },
    "tied, no window, a large epsilon": SIZES
    | {
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "tie_word_embeddings": True,
        "num_experts_per_tok": 7,
        "rms_norm_eps": 0.03,
    },
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Experts one by one, each matrix as a linear layer has it."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, experts, last = name.rpartition(".experts.")
        if not experts:
            out[name] = tensor
            continue
        of_gate_up, end = last.startswith("gate_up_proj"), "bias" if "bias" in last else "weight"
        for expert, theirs in enumerate(tensor):
            ours = theirs.T if end == "weight" else theirs
            pieces = {"gate": ours[0::2], "up": ours[1::2]} if of_gate_up else {"down": ours}
            for part, piece in pieces.items():
                out[f"{prefix}.experts.{expert}.{part}_proj.{end}"] = piece
    return {"experts one by one": out}


def test_every_second_layer_has_a_window_from_the_first_on():
    def windows(**changes) -> list[int | None]:
        return [layer.attention.window for layer in read(OSS_20B, **changes).layers]

    assert windows() == windows(layer_types=REMOVED) == [128, None] * 12
    assert windows(layer_types=["full_attention"] * 23 + ["sliding_attention"]) == [None] * 23 + [
        128
    ]


def test_the_number_of_experts_has_two_names():
    assert read(OSS_20B, num_experts_per_tok=REMOVED) == read(OSS_20B)
    assert read(OSS_20B, num_local_experts=REMOVED, num_experts=32) == read(OSS_20B)
    assert experts_of(OSS_20B).router.top_k == 4


def test_the_activation_is_clamped_where_the_config_says():
    assert experts_of(OSS_20B).clamp == Clamp(limit=7.0, alpha=1.702)
    assert experts_of(OSS_20B, swiglu_limit=5.0, swiglu_alpha=1.0).clamp == Clamp(
        limit=5.0, alpha=1.0
    )


@pytest.mark.parametrize("key", ["sliding_window", "num_local_experts", "rope_scaling"])
def test_what_the_model_depends_on_is_never_assumed(key):
    with pytest.raises(ConfigError, match=f"{key}.* is missing"):
        read(OSS_20B, **{key: REMOVED})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_types", ["sliding_attention", "chunked_attention"] * 12),
        ("hidden_act", "gelu"),
        ("n_shared_experts", 2),
        ("attention_chunk_size", 8192),
    ],
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}"[:40], OSS_20B, **{key: value})


def test_the_names_of_the_other_files_in_the_releases_are_refused(tmp_path):
    pair(tmp_path, "gpt_oss", SIZES)
    stored = tensors_of(tmp_path)
    write_tensors(tmp_path, stored | {"block.0.attn.qkv.weight": torch.ones(2, 3)})
    with pytest.raises(CheckpointError, match=r"1 are unexpected \(block\.0\.attn\.qkv\.weight"):
        load_model(tmp_path, progress=False)
    del stored["model.layers.1.self_attn.sinks"]
    write_tensors(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(.*layers\.1.*sinks"):
        load_model(tmp_path, progress=False)


@pytest.mark.parametrize("sink", [-30.0, 3.0, 30.0])
@torch.no_grad()
def test_a_sink_takes_its_share_of_every_softmax(tmp_path, sink):
    def prepare(peer):
        for sinks_H in named(peer, r"\.sinks"):
            sinks_H.copy_(sink + torch.arange(6) / 3)

    peer, model = pair(tmp_path, "gpt_oss", SIZES, prepare)
    tokens_BT = random_tokens(19, batch=2)
    cache = model.make_cache(2, 19)
    steps = [model(token, cache=cache) for token in tokens_BT.split(1, dim=1)]
    for logits_BTV in (model(tokens_BT), torch.cat(steps, dim=1)):
        assert relative_difference(logits_BTV, peer(tokens_BT).logits) < BOUND


def test_trap_02_yarns_amplitude_is_in_cos_and_sin_and_not_in_the_softmax():
    rope = read(OSS_20B).layers[0].attention.rope
    assert rope.amplitude == pytest.approx(1.3465736, rel=1e-7)  # 0.1 ln 32 + 1
    assert (rope.softmax_multiplier, read(OSS_20B).layers[0].attention.scale) == (1.0, None)


def test_trap_03_the_ramp_of_yarn_is_not_rounded():
    rope = read(OSS_20B).layers[0].attention.rope
    assert not rope.yarn.truncate
    expected = {  # rounded, pairs 9, 12 and 17 would turn by 0.0316208, 0.00701571, 0.000227948
        0: 1.0,
        8: 0.050813274815,
        9: 0.031705696185,
        12: 0.006794959490,
        17: 0.000129318701,
        18: 0.000038308812,
        31: 3.023511428e-07,
    }
    found_r = inverse_frequencies(rope)
    for i, frequency in expected.items():
        assert found_r[i].item() == pytest.approx(frequency, rel=1e-6)


@pytest.mark.parametrize("window", [1, 6])
def test_trap_14_a_window_counts_the_querys_own_position(tmp_path, window):
    single = {"num_hidden_layers": 1, "sliding_window": window}
    check_window(tmp_path, "gpt_oss", SIZES | single, window)


def test_trap_17_a_softmax_over_the_chosen_is_one_over_all_that_is_normalised(tmp_path):
    for weights_NE in check_routing(*pair(tmp_path, "gpt_oss", SIZES)):
        assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(1.0)


def test_trap_22_the_router_multiplies_in_the_weights_precision(tmp_path):
    check_router_precision(tmp_path, "gpt_oss", SIZES, wide=False)


@torch.no_grad()
def test_trap_24_weights_are_float32_and_theirs_are_rounded_to_the_models_precision(tmp_path):
    peer, model = pair(tmp_path, "gpt_oss", SIZES, dtype=torch.bfloat16)
    sparse = peer.bfloat16().model.layers[0].mlp
    x_ND = torch.randn(50, 60, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits_NE, _, experts_NK = router_output(sparse, x_ND)
    exact_NK = logits_NE.gather(-1, experts_NK).float().softmax(dim=-1)
    weights_NE = our_weights(model.layers[0].feed_forward, x_ND)
    torch.testing.assert_close(weights_NE.gather(-1, experts_NK), exact_NK)
    theirs_NE = their_weights(sparse, x_ND)
    assert theirs_NE.dtype == torch.bfloat16
    torch.testing.assert_close(weights_NE, theirs_NE.float(), rtol=2**-8, atol=0)
    assert not weights_NE.equal(weights_NE.bfloat16().float())


def test_trap_29_columns_of_gate_and_up_alternate(tmp_path):
    _, model = pair(tmp_path, "gpt_oss", SIZES)
    stored = tensors_of(tmp_path)
    for i, layer in enumerate(model.layers):
        experts, theirs = layer.feed_forward.experts, f"model.layers.{i}.mlp.experts."
        gate_up_EDf, bias_Ef = stored[theirs + "gate_up_proj"], stored[theirs + "gate_up_proj_bias"]
        assert experts.gate.equal(gate_up_EDf[:, :, 0::2].mT)
        assert experts.up.equal(gate_up_EDf[:, :, 1::2].mT)
        assert experts.gate_bias.equal(bias_Ef[:, 0::2])
        assert experts.up_bias.equal(bias_Ef[:, 1::2])
        assert experts.down.equal(stored[theirs + "down_proj"].mT)


def test_trap_46_biases_are_on_all_four_projections(tmp_path):
    peer, _ = pair(tmp_path, "gpt_oss", SIZES)
    assert biases_in_a_layer(peer) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    attention = read(OSS_20B).layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (True, True)
    without = read(OSS_20B, attention_bias=False).layers[0].attention
    assert (without.qkv_bias, without.output_bias) == (False, False)
