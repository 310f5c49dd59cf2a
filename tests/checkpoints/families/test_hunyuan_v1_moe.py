"""Hunyuan-A13B: q/k norms after rope, rope's base stretched for good, a shared expert."""

import pytest
from files import REMOVED, tensors_of
from layouts import fused
from torch import Tensor
from traps import (
    ROPE,
    TINY,
    YARN,
    biases_in_a_layer,
    check_gate_comes_first,
    check_refused,
    check_router_precision,
    check_routing,
    experts_of,
    merged,
    pair,
    read,
)

from checkpoints import load_model, save_model
from modeling import Transformer
from modeling.rope import inverse_frequencies
from moe import ConfigError

MODEL_TYPES = ("hunyuan_v1_moe",)
A13B = {
    "add_classification_head": False,
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_head_dim": 128,
    "bos_token_id": 1,
    "cla_share_factor": 2,
    "class_num": 0,
    "dense_list": [4096, 0],
    "eod_token_id": 127967,
    "eos_token_id": 127960,
    "group_limited_greedy": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "kv_lora_rank": None,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "model_type": "hunyuan_v1_moe",
    "moe_drop_tokens": False,
    "moe_intermediate_size": [3072] * 32,
    "moe_layer_num_skipped": 0,
    "moe_random_routing_dropped_token": False,
    "moe_topk": [8] * 32,
    "n_group": False,
    "norm_topk_prob": True,
    "norm_type": "rms",
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_media_embeds": 257,
    "num_shared_expert": [1] * 32,
    "org_vocab_size": 128167,
    "pad_token_id": 127961,
    "pool_type": "last",
    "position_embedding_xdrope": False,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "routed_scaling_factor": False,
    "tie_word_embeddings": True,
    "topk_group": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_mla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
    "v_head_dim": None,
    "vocab_size": 128167,
    "xdrope_section": None,
}
PUBLISHED = {"Hunyuan-A13B": A13B}
FIGURES = {"Hunyuan-A13B": (80.393, 12.747, 12.747)}  # the embedding is the head: it counts once
NAMES = {
    "model.embed_tokens.weight": [128167, 4096],
    "model.norm.weight": [4096],
    "model.layers.0.input_layernorm.weight": [4096],
    "model.layers.0.post_attention_layernorm.weight": [4096],
    "model.layers.0.self_attn.q_proj.weight": [4096, 4096],
    "model.layers.0.self_attn.k_proj.weight": [1024, 4096],
    "model.layers.0.self_attn.v_proj.weight": [1024, 4096],
    "model.layers.0.self_attn.o_proj.weight": [4096, 4096],
    "model.layers.0.self_attn.query_layernorm.weight": [128],
    "model.layers.0.self_attn.key_layernorm.weight": [128],
    "model.layers.0.mlp.gate.wg.weight": [64, 4096],
    "model.layers.0.mlp.experts.0.gate_proj.weight": [3072, 4096],
    "model.layers.0.mlp.experts.0.up_proj.weight": [3072, 4096],
    "model.layers.0.mlp.experts.0.down_proj.weight": [4096, 3072],
    "model.layers.0.mlp.experts.63.gate_proj.weight": [3072, 4096],
    "model.layers.0.mlp.experts.63.up_proj.weight": [3072, 4096],
    "model.layers.0.mlp.experts.63.down_proj.weight": [4096, 3072],
    "model.layers.0.mlp.shared_mlp.gate_proj.weight": [3072, 4096],
    "model.layers.0.mlp.shared_mlp.up_proj.weight": [3072, 4096],
    "model.layers.0.mlp.shared_mlp.down_proj.weight": [4096, 3072],
}
ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
SIZES = TINY | {
    "intermediate_size": 28,
    "num_experts": 7,
    "moe_topk": 3,
    "head_dim": 14,
    "rope_parameters": ALPHA,
}
PEERS = {
    "alpha": SIZES,
    "alpha, tied, a number of experts for each layer": SIZES
    | {"tie_word_embeddings": True, "moe_topk": [5, 2]},
    "plain rope, biases": SIZES | {"rope_parameters": ROPE, "attention_bias": True},
    "one expert, every head with keys of its own, a large epsilon": SIZES
    | {"moe_topk": [1, 1, 7], "num_key_value_heads": 6, "head_dim": 10, "rms_norm_eps": 0.03},
    "yarn": SIZES | {"rope_parameters": YARN},
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"fused experts": fused(tensors)}


def test_the_numbers_of_the_experts_are_one_for_all_layers_or_a_list():
    single = {"moe_topk": 8, "num_shared_expert": 1, "moe_intermediate_size": 3072}
    assert read(A13B, **single) == read(A13B)
    assert read(A13B, moe_intermediate_size=REMOVED, num_shared_expert=REMOVED) == read(A13B)
    assert read(A13B, moe_topk=REMOVED, num_experts_per_tok=8) == read(A13B)
    halves = {
        "num_experts": [64] * 16 + [32] * 16,
        "moe_topk": [8] * 16 + [4] * 20,  # longer than the layers
        "moe_intermediate_size": [3072] * 16 + [1024] * 16,
    }
    kinds = [layer.feed_forward for layer in read(A13B, **halves).layers]
    sizes = [
        (moe.router.num_experts, moe.router.top_k, moe.expert_width, moe.shared_width)
        for moe in kinds
    ]
    assert sizes == [(64, 8, 3072, 3072)] * 16 + [(32, 4, 1024, 3072)] * 16


def test_layers_of_unequal_experts_survive_save_and_load(tmp_path):
    unequal = {"num_experts": [7, 4], "moe_topk": [5, 2], "moe_intermediate_size": [28, 12]}
    model = Transformer(read(SIZES | unequal, model_type="hunyuan_v1_moe"))
    model.initialize(0.1, seed=0)
    save_model(model, tmp_path / "saved")
    stored = tensors_of(tmp_path / "saved")
    assert stored["model.layers.0.mlp.experts.6.gate_proj.weight"].shape == (28, 60)
    assert stored["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (12, 60)
    assert "model.layers.1.mlp.experts.4.gate_proj.weight" not in stored
    again = load_model(tmp_path / "saved", progress=False).state_dict()
    assert all(tensor.equal(again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_topk", [8] * 31),
        ("num_experts", [64] * 31 + [0]),
        ("use_qk_norm", False),
        ("use_cla", True),
        ("use_mla", True),
        ("use_mixed_mlp_moe", False),
        ("use_rotary_pos_emb", False),
        ("group_limited_greedy", True),
        ("position_embedding_xdrope", True),
        ("moe_layer_num_skipped", 1),
        ("routed_scaling_factor", 2.5),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", A13B, **{key: value})


def test_there_is_one_shared_expert_in_every_layer(tmp_path):
    counts = [1] * 31 + [2]
    said = f"num_shared_expert = {counts}, expected 1 in every layer"
    check_refused(tmp_path, said, A13B, num_shared_expert=counts)


def test_the_width_of_a_head_has_two_names():
    assert read(A13B, head_dim=REMOVED) == read(A13B, attention_head_dim=REMOVED) == read(A13B)
    other = read(A13B, head_dim=REMOVED, attention_head_dim=96).layers[0].attention
    assert (other.head_width, other.rope.width) == (96, 96)


def test_trap_11_the_norms_stand_behind_rope():
    assert {layer.attention.qk_norm.after_rope for layer in read(A13B).layers} == {True}


def test_trap_12_alpha_stretches_the_base_of_rope_at_every_length():
    rope = read(A13B).layers[0].attention.rope
    assert rope.theta == pytest.approx(11158839.925, rel=1e-9)  # 1e4 * 1000 ** (128 / 126)
    assert (rope.yarn, rope.amplitude, rope.softmax_multiplier) == (None, 1.0, 1.0)
    slowest = inverse_frequencies(rope)[-1].item()
    assert slowest == pytest.approx(1.154782e-7, rel=1e-6)  # 1e4 ** -(126 / 128) / 1000
    assert read(A13B, max_position_embeddings=10**6).layers[0].attention.rope == rope


@pytest.mark.parametrize("alpha", [REMOVED, None, 0, -1.0])
def test_trap_12_dynamic_rope_without_alpha_is_refused(alpha):
    with pytest.raises(ConfigError, match=r"rope_scaling\.alpha"):
        read(A13B, rope_scaling=merged(A13B["rope_scaling"], {"alpha": alpha}))


@pytest.mark.parametrize("said", [False, None, REMOVED])
def test_trap_19_weights_are_normalised_whatever_the_config_says(tmp_path, said):
    assert experts_of(A13B, norm_topk_prob=said).router.normalize
    peer, model = pair(tmp_path, "hunyuan_v1_moe", SIZES)
    for weights_NE in check_routing(peer, model):
        assert weights_NE.sum(dim=-1).mean().item() == pytest.approx(1.0)


def test_trap_22_the_router_multiplies_in_float32(tmp_path):
    check_router_precision(tmp_path, "hunyuan_v1_moe", SIZES, wide=True, wide_weights=True)


def test_trap_27_the_shared_expert_has_the_width_intermediate_size():
    moe = experts_of(A13B, moe_intermediate_size=1024)
    assert (moe.expert_width, moe.shared_width, moe.shared_gate) == (1024, 3072, False)


def test_trap_29_the_rows_of_gate_come_first(tmp_path):
    check_gate_comes_first(tmp_path, "hunyuan_v1_moe", SIZES, fused)


def test_trap_44_the_embedding_is_the_head_where_the_config_says_so(tmp_path):
    assert read(A13B).tied_embeddings
    assert not read(A13B, tie_word_embeddings=False).tied_embeddings
    _, model = pair(tmp_path, "hunyuan_v1_moe", SIZES | {"tie_word_embeddings": True})
    assert "lm_head.weight" not in tensors_of(tmp_path)
    assert model.head.weight is model.embed.weight


def test_trap_45_queries_and_keys_are_normalised_head_by_head():
    assert {layer.attention.qk_norm.over for layer in read(A13B).layers} == {"head"}


def test_trap_46_biases_are_on_all_four_projections(tmp_path):
    peer, _ = pair(tmp_path, "hunyuan_v1_moe", SIZES | {"attention_bias": True})
    assert biases_in_a_layer(peer) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    attention = read(A13B, attention_bias=True).layers[0].attention
    assert (attention.qkv_bias, attention.output_bias) == (True, True)
