"""Loading is strict: every tensor of the config is there, fits and is used; configs are checked."""

import json
import math
import re
import shutil
import warnings

import pytest
import torch
from files import REMOVED, edit_json, single, tensors_of, write_tensors
from safetensors.torch import save_file

from checkpoints import CheckpointError, load_model, read_config, save_model

QUIET = {"progress": False}


def altered(path, **changes):
    """Replace or (given None) drop tensors by their published names."""
    tensors = tensors_of(path) | {name.replace("__", "."): t for name, t in changes.items()}
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return path


def without(path, *names):
    write_tensors(path, {n: tensor for n, tensor in tensors_of(path).items() if n not in names})
    return path


CONFIGS = {
    "truncated": ('{"model_type": "deepseek_v3",', "not JSON: .* at line 1, column"),
    "empty": ("", "not JSON"),
    "a list": ("[1]", "holds a list, expected an object"),
    "a number": ("3", "holds a int, expected an object"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
    "NaN": ('{"rms_norm_eps": NaN}', "NaN is not a JSON number"),
    "infinity": ('{"rms_norm_eps": -Infinity}', "-Infinity is not a JSON number"),
    "beyond float64": ('{"unread": 1e999}', "1e999 is not a JSON number"),
    "thousands of digits": ('{"hidden_size": ' + "9" * 5000 + "}", "digits"),
    "nested deeply": ('{"a":' * 100_000, "nested too deeply"),
    "no model_type": (
        "{}",
        "model_type is missing",
    ),
    "a near miss": ('{"model_type": "deepseek-v3"}', "did you mean deepseek_v"),
    "an unknown family": ('{"model_type": "bert"}', "'bert' is not one of .*solar_open$"),
    "no name at all": ('{"model_type": ["deepseek_v3"]}', "is not one of"),
}


@pytest.mark.parametrize(("content", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_file_that_is_none_is_refused_by_name(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"config.json: .*{said}"):
        load_model(tmp_path, **QUIET)


def test_a_config_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(CheckpointError, match=r"config.json: not UTF-8"):
        load_model(tmp_path, **QUIET)


FIELDS = {
    "num_hidden_layers": [0, -1, True, "3", 3.0, 10**7, [], None],
    "hidden_size": [0, -48, 10**9, 10**400, {}],
    "vocab_size": [0, 10**12],
    "n_routed_experts": [0, 7, 10**7],
    "num_experts_per_tok": [0, 9, 5],
    "n_group": [0, 3, 8],
    "topk_group": [0, 5, 1],
    "n_shared_experts": [-1, "2"],
    "first_k_dense_replace": [-1, 4, None],
    "moe_layer_freq": [0, 2],
    "num_nextn_predict_layers": [-1, 10**7, 1.5],
    "qk_rope_head_dim": [0, 7],
    "kv_lora_rank": [0, None],
    "q_lora_rank": [0, "28"],
    "max_position_embeddings": [0, None],
    "rms_norm_eps": [0.0, -1e-6, "1e-6", 10**400],
    "rope_theta": [0.5, -(10**400)],
    "routed_scaling_factor": [0.0, -1.0, None],
    "norm_topk_prob": [1, "true"],
    "attention_bias": [0],
    "tie_word_embeddings": ["no"],
    "hidden_act": ["gelu", 3],
    "scoring_func": ["softmax", ["sigmoid"]],
    "topk_method": ["greedy"],
    "rope_scaling": [[], "yarn", {"type": "linear", "factor": 2.0}, {"type": "yarn"}],
    "rope_parameters": [{"rope_type": "evil"}, {"rope_type": "default", "rope_theta": "1e4"}],
}
WRONG = [(field, value) for field, values in FIELDS.items() for value in values]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{k}={v!r:.30}" for k, v in WRONG])
def test_a_wrong_config_value_is_refused_by_field_and_rule(tiny, field, value):
    edit_json((path := tiny()) / "config.json", **{field: value})
    with pytest.raises(CheckpointError) as caught:
        load_model(path, **QUIET)
    said = str(caught.value).removeprefix(f"{path}/config.json: ")
    named = re.match(r"([\w.]+) (?:= .*(?:expected|must be|must divide)|is missing)", said)
    assert named, said
    # the subject and whatever else is mentioned are keys of the file, by the names they have there
    assert named[1].split(".")[0] in {field, *json.loads((path / "config.json").read_text())}
    assert field in said
    assert not re.search(r"[A-Z]\w+(Config|TopK)\b|\btop_k\b|\bnum_groups\b", said)


YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("factor", value) for value in (None, 0.5, -1, "4", True)),
        *(("original_max_position_embeddings", value) for value in (None, 0, 64.0)),
        *(("beta_fast", value) for value in (0.5, 0, "32")),
        *(("mscale", value) for value in (-1, 10**400, "1")),
        *(("mscale_all_dim", value) for value in (-10 / math.log(4), 1e200, 1e308)),
        *(("attention_factor", value) for value in (0, -1.0, "1")),
        ("truncate", 1),
    ],
)
def test_a_wrong_value_of_yarn_is_refused(tiny, key, value):
    scaling = {"type": "yarn", **YARN, "factor": 4.0, "original_max_position_embeddings": 64}
    edit_json((path := tiny()) / "config.json", rope_scaling=scaling | {key: value})
    with pytest.raises(CheckpointError, match=r"config.json: .*(expected|must|missing)"):
        read_config(path)


@pytest.mark.parametrize("method", ["awq", "gptq", "modelopt", None])
def test_an_unknown_way_of_quantising_is_refused_by_name(tiny, method):
    edit_json(
        (path := tiny()) / "config.json", quantization_config={"quant_method": method, "b": 1}
    )
    name = method or "quant_method is missing"
    with pytest.raises(CheckpointError, match=rf"config.json: .*{name}.*convert the weights to bf"):
        load_model(path, **QUIET)


def test_a_place_without_a_checkpoint_says_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or directory"):
        load_model(tmp_path / "nowhere", **QUIET)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        CheckpointError, match=r"not a model directory: no config.json; found notes"
    ):
        load_model(tmp_path, **QUIET)


def test_a_file_is_not_a_checkpoint_directory(tiny):
    with pytest.raises(CheckpointError, match=r"config.json: not a directory"):
        load_model(tiny() / "config.json", **QUIET)
    file = tiny() / "weights.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00\xff")
    with pytest.raises(CheckpointError, match=r"weights.gguf: not (UTF-8|JSON)"):
        load_model(file, **QUIET)


def test_missing_and_unexpected_tensors_are_named_and_counted(tiny):
    path = without(tiny(), "model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight")
    altered(path, **{"model.layers.0.surplus.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError) as caught:
        load_model(path, **QUIET)
    text = str(caught.value)
    assert "2 tensors are missing (model.layers.1.mlp.experts.3.up_proj.weight, model.norm" in text
    assert "1 are unexpected (model.layers.0.surplus.weight)" in text


def test_more_layers_in_the_config_than_in_the_files_are_missing(tiny):
    edit_json((path := tiny("kimi_k2")) / "config.json", num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"tensors are missing \(model.layers.3.*0 are unexp"):
        load_model(path, **QUIET)


def test_fewer_layers_in_the_config_than_in_the_files_leave_tensors_over(tiny):
    edit_json((path := tiny("kimi_k2")) / "config.json", num_hidden_layers=2)
    with pytest.raises(
        CheckpointError, match=r"0 tensors are missing.*unexpected \(model.layers.2"
    ):
        load_model(path, **QUIET)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tiny):
    path = altered(tiny(), **{"lm_head.weight": torch.zeros(384, 48)})
    said = (
        r"model.safetensors: lm_head.weight has shape \[384, 48\], config.json makes it \[320, 48\]"
    )
    with pytest.raises(CheckpointError, match=said):
        load_model(path, **QUIET)


@pytest.mark.filterwarnings("ignore:the config announces")
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**6},
        {"n_routed_experts": 10**6, "num_hidden_layers": 50},
        {"kv_lora_rank": 10**6, "num_attention_heads": 10**6, "v_head_dim": 10**6},
        {"hidden_size": 10**6, "moe_intermediate_size": 10**6, "n_routed_experts": 10**6},
    ],
)
def test_sizes_that_the_files_do_not_have_are_refused_before_memory_is_taken(tiny, changes):
    edit_json((path := tiny()) / "config.json", **changes)
    with pytest.raises(
        CheckpointError, match=r"config.json describes [\d,]+ parameters, the weight"
    ):
        load_model(path, **QUIET)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_a_tensor_stored_in_another_kind_of_number_is_refused(tiny, dtype):
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    path = altered(tiny(), **{name: torch.zeros(48, 24).to(dtype)})
    with pytest.raises(
        CheckpointError, match=rf"{name} is (F8_E4M3 and no file|[IU]8, expected F64)"
    ):
        load_model(path, **QUIET)


def test_buffers_that_old_files_hold_besides_are_ignored(tiny):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    load_model(altered(tiny(), **{name: torch.zeros(4)}), **QUIET)


def test_mtp_tensors_that_the_config_does_not_announce_are_unexpected(tiny):
    edit_json((path := tiny()) / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"unexpected \(model.layers.3.eh_proj.weight"):
        load_model(path, **QUIET)


def test_half_an_mtp_module_is_a_missing_tensor(tiny):
    path = without(tiny(), "model.layers.3.eh_proj.weight")
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(model.layers.3.eh_proj"):
        load_model(path, **QUIET)
    assert len(load_model(path, mtp=False, **QUIET).mtp) == 0


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_an_mtp_copy_may_be_absent_and_warns_if_it_differs(tiny, copy):
    name = f"model.layers.3.{copy}.weight"
    path = without(tiny(), name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = load_model(path, **QUIET)
    altered(path, **{name: torch.zeros(320, 48)})
    with pytest.warns(UserWarning, match=rf"{name} differs from the tensor it repeats"):
        model = load_model(path, **QUIET)
    for ours, same in zip(plain.parameters(), model.parameters(), strict=True):
        assert ours.equal(same)


def test_a_head_stored_beside_tied_embeddings_warns_only_if_it_differs(tiny):
    path = tiny("kimi_k2", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(path)
    embedding = tensors_of(path)["model.embed_tokens.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(altered(path, **{"lm_head.weight": embedding}), **QUIET)
    assert model.head.weight is model.embed.weight
    altered(path, **{"lm_head.weight": embedding + 1})
    with pytest.warns(UserWarning, match=r"lm_head.weight differs .* used as it is stored"):
        model = load_model(path, **QUIET)
    assert model.head.weight.equal(embedding + 1)
    assert model.embed.weight.equal(embedding)
    save_model(model, path.with_name("untied"))
    assert load_model(path.with_name("untied"), **QUIET).head.weight.equal(embedding + 1)


def test_a_model_is_loaded_for_use_not_for_training(tiny):
    model = load_model(tiny(), **QUIET)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_without_a_dtype_every_tensor_keeps_its_own(tiny):
    path = tiny()
    tensors = tensors_of(path)
    tensors = {
        name: tensor if "e_score" in name or "norm" in name else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    write_tensors(path, tensors)
    model = load_model(path, **QUIET)
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.embed.weight.equal(tensors["model.embed_tokens.weight"])
    assert model.norm.weight.dtype == torch.float32
    router = model.layers[1].feed_forward.router
    assert router.weight.dtype == torch.bfloat16
    assert router.selection_bias.equal(tensors["model.layers.1.mlp.gate.e_score_correction_bias"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_dtype_converts_everything_but_keeps_the_selection_bias_wide(tiny, dtype):
    path = tiny()
    model = load_model(path, dtype=dtype, **QUIET)
    tensors = tensors_of(path)
    for name, parameter in model.named_parameters():
        assert name.endswith("selection_bias") or parameter.dtype == dtype, name
    assert model.norm.weight.equal(tensors["model.norm.weight"].to(dtype))
    bias = model.layers[1].feed_forward.router.selection_bias
    assert bias.dtype == torch.promote_types(dtype, torch.float32)
    assert bias.float().equal(tensors["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_a_selection_bias_stored_in_bfloat16_is_widened(tiny):
    path = tiny()
    write_tensors(path, {name: tensor.bfloat16() for name, tensor in tensors_of(path).items()})
    model = load_model(path, **QUIET)
    assert model.layers[1].feed_forward.router.selection_bias.dtype == torch.float32


def test_one_file_or_several_give_the_same_model(tiny):
    path = tiny()
    several = load_model(path, **QUIET).state_dict()
    save_file(tensors_of(path), path / "all")
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "all").rename(single(path))
    one = load_model(path, **QUIET).state_dict()
    assert several.keys() == one.keys()
    assert all(several[name].equal(tensor) for name, tensor in one.items())


def test_experts_of_different_dtypes_keep_the_wider_one(tiny):
    path = tiny("kimi_k2")
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    tensors = {n: tensor.bfloat16() for n, tensor in tensors_of(path).items()}
    wide = torch.randn(24, 48)
    write_tensors(path, tensors | {name.format(5): wide})
    up_EFD = load_model(path, **QUIET).layers[1].feed_forward.experts.up
    assert up_EFD[5].equal(wide)
    assert up_EFD[0].equal(tensors[name.format(0)].float())


def test_strange_but_valid_paths_work(tiny, tmp_path):
    path = shutil.copytree(tiny(), tmp_path / "mit Leerzeichen, größer 模型")
    assert json.loads((path / "config.json").read_text())["model_type"] == "deepseek_v3"
    load_model(path, **QUIET)


def test_an_unread_key_does_not_matter(tiny):
    path = tiny()
    expected = read_config(path)
    edit_json(path / "config.json", use_cache=True, eos_token_id=REMOVED, whatever={"a": [1]})
    assert read_config(path) == expected
