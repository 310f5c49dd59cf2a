"""verify tells everything that is wrong with a checkpoint, all at once, and nothing that is not."""

import json
import re

import pytest
import torch
from files import REMOVED, edit_json, shards_of, tensors_of, write_tensors
from safetensors.torch import load_file, save_file

from checkpoints import CheckpointError, verify
from tools.__main__ import main

EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def altered(path, **changes):
    """Replace or (given None) drop tensors by their published names."""
    tensors = tensors_of(path) | {name.replace("__", "."): t for name, t in changes.items()}
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return path


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "kimi_k2"])
def test_nothing_is_wrong_with_a_sound_checkpoint(pristine, family):
    assert verify(pristine(family), values=True) == ([], [])


def test_the_shipped_model_is_sound(capsys):
    assert main(["verify", "checkpoints/pretrained", "--values"]) == 0
    assert capsys.readouterr().out == "checkpoints/pretrained: nothing wrong found\n"


def lfs_pointer(path):
    shards_of(path)[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return "Git LFS pointer"


def truncated(path):
    content = shards_of(path)[2].read_bytes()
    shards_of(path)[2].write_bytes(content[:-7])
    return "truncated or damaged download"


def empty_shard(path):
    shards_of(path)[0].write_bytes(b"")
    return "0 bytes: empty or truncated"


def missing_shard(path):
    shards_of(path)[0].unlink()
    return r"1 of \d+ weight files are missing: model-00001-of"


def missing_index(path):
    (path / "model.safetensors.index.json").unlink()
    return "an unfinished copy"


def misplaced(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name, *_ = index["weight_map"]
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][name] = next(f for f in files if f != index["weight_map"][name])
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"{name} is not in "


def escaping(path):
    edit_json(path / "model.safetensors.index.json", weight_map={"x": "../x.safetensors"})
    return "not a plain .safetensors file name"


def twice(path):
    files = shards_of(path)
    name, tensor = next(iter(load_file(files[0]).items()))
    save_file(load_file(files[1]) | {name: tensor}, files[1])
    return f"{name} is in .* too"


def missing_tensor(path):
    altered(path, **{EXPERT: None})
    return rf"1 tensors are missing \({EXPERT}\)"


def unexpected_tensor(path):
    altered(path, extra=torch.zeros(3))
    return r"1 are unexpected \(extra\)"


def transposed(path):
    altered(path, **{EXPERT: tensors_of(path)[EXPERT].T.contiguous()})
    return r"has shape \[24, 48\], config.json makes it \[48, 24\]"


def unscaled(path):
    altered(path, **{EXPERT: tensors_of(path)[EXPERT].to(torch.float8_e4m3fn)})
    return rf"{EXPERT} is F8_E4M3 and no file holds"


def wrong_config(path):
    edit_json(path / "config.json", num_experts_per_tok=99)
    return "num_experts_per_tok = 99: must be <= n_routed_experts = 8"


def unknown_mechanism(path):
    edit_json(path / "config.json", sliding_window=128)
    return "sliding_window = 128 changes the model"


def unknown_quantisation(path):
    edit_json(path / "config.json", quantization_config={"quant_method": "awq"})
    return "awq"


def broken_tokenizer(path):
    (path / "tokenizer.model").write_bytes(b"nonsense")
    return "not a sentencepiece model"


def foreign_tokenizer(path):
    edit_json(path / "config.json", vocab_size=300)
    tensors = tensors_of(path)
    wide = {n: t for n, t in tensors.items() if t.shape[0] == 320}
    write_tensors(path, tensors | {n: t[:300].contiguous() for n, t in wide.items()})
    return "the tokenizer has 320 ids and the model 300"


FAULTS = (
    *(lfs_pointer, truncated, empty_shard, missing_shard, missing_index, misplaced, escaping),
    *(twice, missing_tensor, unexpected_tensor, transposed, unscaled, wrong_config),
    *(unknown_mechanism, unknown_quantisation, broken_tokenizer, foreign_tokenizer),
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_is_the_only_one(tiny, fault, capsys):
    path = tiny()
    said = fault(path)
    errors, _ = verify(path)
    assert len(errors) == 1, errors
    assert re.search(said, errors[0]), errors
    assert str(path) in errors[0]
    assert main(["verify", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"error: {errors[0]}" in lines
    assert lines[-1] == f"{path}: 1 errors"


def test_independent_faults_are_told_together(tiny):
    path = tiny()
    said = [fault(path) for fault in (lfs_pointer, truncated, empty_shard, broken_tokenizer)]
    errors, _ = verify(path)
    assert len(errors) == len(said)
    for pattern, error in zip(
        ("LFS", "damaged", "0 bytes", "sentencepiece"), sorted(errors, key=rank), strict=True
    ):
        assert pattern in error


def rank(error: str) -> int:
    words = ("LFS", "damaged", "0 bytes", "sentencepiece")
    return next(i for i, word in enumerate(words) if word in error)


def test_missing_unexpected_and_misshapen_tensors_are_told_together(tiny):
    path = tiny()
    missing_tensor(path)
    altered(path, extra=torch.zeros(3), **{"model.norm.weight": torch.zeros(5)})
    errors, _ = verify(path)
    assert any("1 tensors are missing" in e and "1 are unexpected" in e for e in errors)
    assert any("model.norm.weight has shape [5]" in e for e in errors)


def test_what_is_no_fault_is_a_note(tiny):
    path = tiny()
    kept = {n: t for n, t in tensors_of(path).items() if not n.startswith("model.layers.3.")}
    write_tensors(path, kept)
    (path / "tokenizer.model").unlink()
    edit_json(path / "config.json", routed_scaling_factr=2.5)
    errors, notes = verify(path)
    assert errors == []
    assert len(notes) == 3
    assert "announces 1 MTP module(s) and the files hold none" in "".join(notes)
    assert "no tokenizer" in "".join(notes)
    assert "routed_scaling_factr is not read; did you mean routed_scaling_factor?" in "".join(notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", EXPERT, BIAS])
def test_values_that_are_no_numbers_are_counted(tiny, name, value):
    path = tiny()
    tensor = tensors_of(path)[name].clone()
    tensor.view(-1)[:2] = value
    altered(path, **{name: tensor})
    (error,) = verify(path, values=True)[0]
    counts = "2 NaN and 0 infinite" if value != value else "0 NaN and 2 infinite"
    assert f"{name} holds {counts} values of {tensor.numel():,}" in error
    assert verify(path)[0] == []  # without --values nothing is read


@pytest.mark.parametrize("noise", [0.0, 1e-38])
def test_an_expert_that_was_never_written_is_found(tiny, noise):
    path = tiny()
    altered(path, **{EXPERT: torch.full((48, 24), noise)})
    (error,) = verify(path, values=True)[0]
    assert f"{EXPERT} is all zeros" in error


def test_an_expert_in_a_stack_is_found_by_its_number(tiny):
    path = tiny()
    tensors = tensors_of(path)
    stem = "model.layers.1.mlp.experts."
    parts = {
        p: [tensors.pop(f"{stem}{e}.{p}_proj.weight") for e in range(8)]
        for p in ("gate", "up", "down")
    }
    pairs = zip(parts["gate"], parts["up"], strict=True)
    tensors[stem + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
    tensors[stem + "down_proj"] = torch.stack(parts["down"])
    tensors[stem + "down_proj"][[2, 6]] = 0
    write_tensors(path, tensors)
    (error,) = verify(path, values=True)[0]
    assert "down_proj is all zeros (experts 2, 6)" in error


def test_a_bias_that_shuts_experts_out_is_found(tiny):
    """Scores lie between 0 and 1: with three chosen, 1 below the third largest bias is too low."""
    path = tiny("kimi_k2")
    bias = torch.tensor([12.0, 11.9, 11.8, 11.7, 10.9, 10.7, 10.75, 3.0])
    altered(path, **{BIAS: bias})
    (error,) = verify(path, values=True)[0]
    assert f"{BIAS} keeps experts 5, 6, 7 from ever being chosen" in error


def test_a_directory_that_is_not_there_is_a_wrong_argument(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="not a directory"):
        verify(tmp_path / "none")
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_a_directory_with_nothing_in_it_is_told_so(tmp_path):
    errors, notes = verify(tmp_path)
    assert any("no config.json" in error for error in errors)
    assert any("no model.safetensors" in error for error in errors)
    assert any("no tokenizer" in note for note in notes)


def test_removed_keys_of_the_config_are_named(tiny):
    path = tiny()
    edit_json(path / "config.json", kv_lora_rank=REMOVED)
    assert any("kv_lora_rank is missing" in error for error in verify(path)[0])
