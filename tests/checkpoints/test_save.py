"""A saved model is whole or absent, loads again to the bit, and transformers can read it."""

import json
import os

import pytest
import torch
from files import REMOVED, edit_json, shards_of, tensors_of
from published import relative_difference, reload
from tiny import mla, model_config

import checkpoints.storage.writing
from checkpoints import CheckpointError, load_model, read_config, save_model
from modeling import Transformer

INDEX = "model.safetensors.index.json"


def load(path, **options):
    return load_model(path, progress=False, **options)


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.equal(other[name]), name


@pytest.mark.parametrize("max_shard_bytes", [1, 50_000, 5_000_000_000])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_a_saved_model_loads_to_the_bit(pristine, tmp_path, family, max_shard_bytes):
    model = load(pristine(family))
    save_model(model, tmp_path / "saved", max_shard_bytes)
    again = load(tmp_path / "saved")
    assert again.config == model.config
    same(again.state_dict(), model.state_dict())
    same(tensors_of(tmp_path / "saved"), tensors_of(pristine(family)))


def test_what_does_not_fit_one_file_is_split_and_listed(pristine, tmp_path):
    save_model(load(pristine()), tmp_path / "saved", 100_000)
    files = shards_of(tmp_path / "saved")
    count = len(files)
    assert count > 3
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert [file.name for file in files] == names
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    tensors = tensors_of(tmp_path / "saved")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == set(names)
    assert all(file.stat().st_size < 100_000 + 20_000 for file in files)


def test_what_fits_one_file_needs_no_index(pristine, tmp_path):
    save_model(load(pristine()), tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("nested", ["saved", "new/saved"])
def test_a_new_or_empty_directory_is_taken(pristine, tmp_path, nested, monkeypatch):
    model = load(pristine())
    save_model(model, tmp_path / nested)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    save_model(model, ".")
    assert read_config(tmp_path / "empty") == read_config(tmp_path / nested) == model.config


def test_what_exists_is_never_overwritten(pristine, tmp_path):
    model = load(pristine())
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("precious")
    for name in ("file", "folder"):
        with pytest.raises(CheckpointError, match=f"{name}: exists already; remove it or choose"):
            save_model(model, tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"
    assert os.listdir(tmp_path / "folder") == ["note"]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
def test_an_interruption_leaves_nothing_behind(pristine, tmp_path, monkeypatch, error):
    written = []

    def failing(tensors, file, **options):
        if written:
            raise error
        written.append(file)
        file.write_bytes(b"half")

    monkeypatch.setattr(checkpoints.storage.writing, "save_file", failing)
    with pytest.raises(type(error)):
        save_model(load(pristine()), tmp_path / "saved", 100_000)
    assert len(written) == 1
    assert os.listdir(tmp_path) == []


def test_nothing_stands_at_the_final_place_while_writing(pristine, tmp_path, monkeypatch):
    seen = []
    write = checkpoints.storage.writing.write_shards

    def watched(*arguments):
        write(*arguments)
        seen.append((tmp_path / "saved").exists())

    monkeypatch.setattr(checkpoints.storage.writing, "write_shards", watched)
    save_model(load(pristine()), tmp_path / "saved")
    assert seen == [False]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_modes_that_the_umask_gives(pristine, tmp_path, umask, mode):
    model = load(pristine())
    before = os.umask(umask)
    try:
        save_model(model, tmp_path / "saved", 100_000)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "saved").iterdir()} == {mode}


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": True, "auto_map": {"AutoModel": "x"}, "unknown": [1, None, "größer"]},
        {"num_mtp_layers": 1, "num_nextn_predict_layers": REMOVED},
        {"num_local_experts": 8, "n_routed_experts": REMOVED},
        {"dtype": "float32", "torch_dtype": REMOVED},
        {"rope_scaling": None, "q_lora_rank": 28},
    ],
)
def test_config_json_keeps_its_spelling_and_its_unknown_keys(tiny, tmp_path, changes):
    edit_json((path := tiny()) / "config.json", **changes)
    save_model(load(path), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved == json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_config_json_says_the_dtype_of_the_weights_it_is_saved_with(tiny, tmp_path, spelling):
    path = tiny()
    edit_json(path / "config.json", torch_dtype=REMOVED)
    edit_json(path / "config.json", **{spelling: "float32"})
    save_model(load(path, dtype=torch.bfloat16), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved[spelling] == "bfloat16"
    assert len({"dtype", "torch_dtype"} & saved.keys()) == 1
    tensors = tensors_of(tmp_path / "saved")
    kept = [name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16]
    assert len(kept) == 3
    assert all(name.endswith("e_score_correction_bias") for name in kept)


@pytest.mark.parametrize("family", ["kimi_k2", "deepseek_v3"])
def test_tied_embeddings_are_stored_once(tiny, tmp_path, family):
    path = tiny(family, tie_word_embeddings=True)
    save_model(load(path), tmp_path / "saved")
    assert "lm_head.weight" not in tensors_of(tmp_path / "saved")
    same(load(tmp_path / "saved").state_dict(), load(path).state_dict())


def test_a_model_of_an_unknown_family_cannot_be_saved_as_published(tmp_path):
    model = Transformer(model_config(mla(), published={"model_type": "bert"}))
    with pytest.raises(
        CheckpointError, match=r"config.published names no family.*'bert'.*deepseek_v2, deep"
    ):
        save_model(model, tmp_path / "saved")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("published", "said"),
    [
        ({"model_type": "deepseek_v3"}, "config.published: num_attention_heads is missing"),
        (
            {"rope_theta": 123.0},
            r"describes another model: layers\[0\].attention.rope.theta is 10000.0 here and 123.0",
        ),
        ({"num_hidden_layers": 4}, "layers has 3 elements here and 4 as published. Make.*to="),
    ],
)
def test_a_published_config_of_another_model_is_refused(pristine, tmp_path, published, said):
    model = load(pristine())
    whole = published if "model_type" in published else {**model.config.published, **published}
    object.__setattr__(model.config, "published", whole)
    with pytest.raises(CheckpointError, match=said):
        save_model(model, tmp_path / "saved")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@torch.no_grad()
def test_transformers_reads_the_published_spelling_and_computes_our_logits(pristine, family):
    peer, info = reload(pristine(family))
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    tokens_BT = torch.randint(320, (2, 100), generator=torch.Generator().manual_seed(2))
    ours_BTV = load(pristine(family))(tokens_BT)
    assert relative_difference(ours_BTV, peer(tokens_BT).logits) < 1e-4
