"""Kimi-K2.5 and K2.6: the text model of a multimodal file, which is a Kimi-K2."""

import json

import pytest
from files import REMOVED, edit_json, tensors_of, write_tensors
from layouts import fused, renamed
from published import TINY_YARN, modern, peer_of, reload, save
from test_deepseek_v3 import KIMI_K2, KIMI_K2_0905, ONE_GROUP
from test_deepseek_v3 import SIZES as SIZES_OF_V3
from transformers import AutoModelForImageTextToText
from traps import check_refused, experts_of, read

from checkpoints import CheckpointError, load_model, save_model

MODEL_TYPES = ("kimi_k25",)

K25 = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "configuration_kimi_k25.KimiK25Config",
        "AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_kimi_k25.KimiK25ForConditionalGeneration",
    },
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163585,
    "ignore_index": -100,
    "media_placeholder_token_id": 163605,
    "model_type": "kimi_k25",
    "pad_token_id": 163839,
    "text_config": KIMI_K2_0905
    | {"_name_or_path": "", "architectures": ["DeepseekV3ForCausalLM"], "is_decoder": False},
    "tie_word_embeddings": False,
    "use_unified_vision_chunk": True,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "vision_config": {
        "init_pos_emb_height": 64,
        "init_pos_emb_time": 4,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
        "mm_hidden_size": 1152,
        "patch_size": 14,
        "projector_ln_eps": 1e-05,
        "text_hidden_size": 7168,
        "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304,
        "vt_num_attention_heads": 16,
        "vt_num_hidden_layers": 27,
    },
}
PUBLISHED = {"K2.5": K25, "K2.6": K25}
FIGURES = {"K2.5": (1026.4, 32.86, 31.69), "K2.6": (1026.4, 32.86, 31.69)}

ATTENTION = {
    "input_layernorm.weight": [7168],
    "post_attention_layernorm.weight": [7168],
    "self_attn.q_a_proj.weight": [1536, 7168],
    "self_attn.q_a_layernorm.weight": [1536],
    "self_attn.q_b_proj.weight": [12288, 1536],
    "self_attn.kv_a_proj_with_mqa.weight": [576, 7168],
    "self_attn.kv_a_layernorm.weight": [512],
    "self_attn.kv_b_proj.weight": [16384, 512],
    "self_attn.o_proj.weight": [7168, 8192],
}
DENSE = {
    "mlp.gate_proj.weight": [18432, 7168],
    "mlp.up_proj.weight": [18432, 7168],
    "mlp.down_proj.weight": [7168, 18432],
}
SPARSE = {
    "mlp.gate.weight": [384, 7168],
    "mlp.gate.e_score_correction_bias": [384],
    "mlp.shared_experts.gate_proj.weight": [2048, 7168],
    "mlp.shared_experts.up_proj.weight": [2048, 7168],
    "mlp.shared_experts.down_proj.weight": [7168, 2048],
    "mlp.experts.0.gate_proj.weight": [2048, 7168],
    "mlp.experts.0.up_proj.weight": [2048, 7168],
    "mlp.experts.0.down_proj.weight": [7168, 2048],
    "mlp.experts.383.gate_proj.weight": [2048, 7168],
    "mlp.experts.383.up_proj.weight": [2048, 7168],
    "mlp.experts.383.down_proj.weight": [7168, 2048],
}
MODEL = "language_model.model."
NAMES = {
    MODEL + "embed_tokens.weight": [163840, 7168],
    MODEL + "norm.weight": [7168],
    "language_model.lm_head.weight": [163840, 7168],
    **{f"{MODEL}layers.0.{name}": shape for name, shape in (ATTENTION | DENSE).items()},
    **{f"{MODEL}layers.60.{name}": shape for name, shape in (ATTENTION | SPARSE).items()},
}

VISION = {
    "patch_size": 2,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "pos_emb_time": 2,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 12,
    "intermediate_size": 14,
}
TEXT = SIZES_OF_V3 | ONE_GROUP | {"model_type": "deepseek_v3", "n_shared_experts": 1}
STEP = {"beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 5e4}
PEERS = {
    name: {
        "text_config": TEXT | changes,
        "vision_config": VISION,
        "projection_hidden_size": 12,
        "tie_word_embeddings": False,
    }
    for name, changes in {
        "as published": {"rope_parameters": TINY_YARN | STEP, "routed_scaling_factor": 2.827},
        "groups, not normalised": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    }.items()
}
NOT_TEXT = ("model.vision_tower.", "model.mm_projector.")


def write_peer(path, overrides):
    """With the class's own default beside text_config, and the text's model_type as published."""
    peer = peer_of("kimi_k25", overrides, auto=AutoModelForImageTextToText)
    text = json.loads((save(peer, path) / "config.json").read_text())["text_config"]
    edit_json(
        path / "config.json",
        tie_word_embeddings=True,
        text_config=text | {"model_type": "kimi_k2"},
    )
    return peer


def reload_peer(path):
    """Of what is missing, the tensors that are no text's are left out."""
    peer, info = reload(path, auto=AutoModelForImageTextToText)
    info["missing_keys"] = {n for n in info["missing_keys"] if not n.startswith(NOT_TEXT)}
    return peer, info


def layouts(tensors):
    published = renamed(tensors, {MODEL + "blocks.": MODEL + "layers."})
    return {
        "as published": published,
        "as published, experts fused": fused(published),
        "experts fused": fused(tensors),
        "text alone": {n: t for n, t in published.items() if n.startswith("language_model.")},
    }


def test_the_text_is_what_it_would_be_alone():
    text = read(KIMI_K2_0905)
    assert read(K25) == text
    assert read(K25 | {"text_config": K25["text_config"] | {"model_type": "deepseek_v3"}}) == text
    assert read(K25 | {"text_config": KIMI_K2}) == read(KIMI_K2) != text
    newer = modern(KIMI_K2_0905, n_routed_experts="num_local_experts")
    assert read(K25 | {"text_config": newer}) == text


def test_trap_01_yarn_multiplies_the_softmax_scale_once():
    rope = read(K25).layers[0].attention.rope
    assert rope.softmax_multiplier == pytest.approx(2.004740, abs=5e-7)
    assert rope.amplitude == 1.0


def test_trap_23_one_group_is_no_limit():
    moe = experts_of(K25)
    assert (moe.router.num_groups, moe.router.groups_kept, moe.router.group_score) == (
        1,
        1,
        "top2_sum",
    )


def test_how_the_text_is_packed_is_read_inside_text_config(tmp_path):
    packed = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    said = "quantization_config.format = 'nvfp4-pack-quantized', expected one of"
    check_refused(
        tmp_path, said, K25, text_config=K25["text_config"] | {"quantization_config": packed}
    )


def test_trap_44_the_flag_beside_text_config_ties_nothing(tmp_path):
    peer = write_peer(tmp_path / "peer", PEERS["as published"])
    model = load_model(tmp_path / "peer", progress=False)
    assert not model.config.tied_embeddings
    assert model.head.weight.equal(peer.lm_head.weight)
    assert not model.head.weight.equal(model.embed.weight)
    save_model(model, tmp_path / "ours")
    assert reload_peer(tmp_path / "ours")[0].lm_head.weight.equal(peer.lm_head.weight)
    tensors = tensors_of(tmp_path / "peer")
    del tensors["language_model.lm_head.weight"]
    write_tensors(tmp_path / "peer", tensors)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(language_model.lm_head"):
        load_model(tmp_path / "peer", progress=False)


@pytest.mark.parametrize("tied", [True, False, REMOVED])
def test_trap_44_the_flag_inside_text_config_does(tied):
    inside = {key: v for key, v in KIMI_K2.items() if key != "tie_word_embeddings"}
    inside |= {} if tied is REMOVED else {"tie_word_embeddings": tied}
    for beside in (True, False, REMOVED):
        config = read(K25, text_config=inside, tie_word_embeddings=beside)
        assert config.tied_embeddings is (tied is True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_nextn_predict_layers": 1}, r"text_config.num_nextn_predict_layers = 1, expected 0"),
        ({"model_type": "deepseek_v32"}, "text_config.model_type = 'deepseek_v32'"),
        ({"hidden_size": 0}, "text_config.hidden_size = 0"),
        ({"index_topk": 2048}, "index_topk = 2048"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
    ],
)
def test_what_is_no_kimi_k2_inside_is_refused_by_name(tmp_path, changes, said):
    check_refused(tmp_path, said, K25, text_config=K25["text_config"] | changes)


def test_there_must_be_a_text(tmp_path):
    check_refused(tmp_path, "text_config is missing", K25, text_config=REMOVED)
