"""Converting keeps every tensor and file, streams, and leaves nothing half-written."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files import ROOT, shards_of, tensors_of, write_tensors
from safetensors.torch import load_file

import checkpoints.storage.writing
from checkpoints import CheckpointError, convert, load_model, verify
from tools.__main__ import main
from tools.convert import parse_size

QUIET = {"progress": False}
BIAS = "e_score_correction_bias"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_every_tensor_is_there_in_the_dtype_asked_for(pristine, tmp_path, dtype):
    source, target = pristine(), tmp_path / "converted"
    convert(source, target, dtype, **QUIET)
    before, after = tensors_of(source), tensors_of(target)
    assert before.keys() == after.keys()
    assert any(name.startswith("model.layers.3.") for name in after)  # the MTP module
    for name, tensor in before.items():
        kept = tensor.dtype if dtype is None or BIAS in name else dtype
        assert after[name].equal(tensor.to(kept)), name
    assert verify(target, values=True) == ([], [])


def test_fp8_is_made_and_unmade(pristine, tmp_path):
    convert(pristine(), tmp_path / "fp8", torch.float8_e4m3fn, **QUIET)
    convert(tmp_path / "fp8", tmp_path / "plain", torch.float32, **QUIET)
    packed, plain, source = (
        tensors_of(p) for p in (tmp_path / "fp8", tmp_path / "plain", pristine())
    )
    scales = {name for name in packed if name.endswith("_scale_inv")}
    assert len(scales) > 50
    assert plain.keys() == source.keys() == packed.keys() - scales
    for name, tensor in source.items():
        exact = name + "_scale_inv" not in packed
        assert plain[name].equal(tensor) == exact, name
        assert (plain[name] - tensor).abs().max() <= tensor.abs().max() / 14
    written = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert written["quantization_config"]["weight_block_size"] == [128, 128]
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize("limit", [1, 30_000, 10**9])
def test_shards_hold_no_more_than_asked_for(pristine, tmp_path, limit):
    convert(pristine(), tmp_path / "converted", max_shard_bytes=limit, **QUIET)
    files = shards_of(tmp_path / "converted")
    largest = max(tensor.nbytes for tensor in tensors_of(pristine()).values())
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(sizes) <= max(limit, largest)
    assert ((tmp_path / "converted" / "model.safetensors.index.json").exists()) == (len(files) > 1)
    for ours, same in zip(
        load_model(pristine(), **QUIET).state_dict().values(),
        load_model(tmp_path / "converted", **QUIET).state_dict().values(),
        strict=True,
    ):
        assert ours.equal(same)


def test_every_other_file_comes_along(tiny, tmp_path):
    source = tiny()
    beside = {
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": "{}",
        "tokenization_x.py": "raise SystemExit",
        "README.md": "# x",
    }
    for name, text in beside.items():
        (source / name).write_text(text)
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / "original").mkdir()
    convert(source, tmp_path / "converted", **QUIET)
    found = {file.name for file in (tmp_path / "converted").iterdir()}
    assert found == {*beside, "tokenizer.model", "config.json", "model.safetensors"}
    assert all((tmp_path / "converted" / name).read_text() == beside[name] for name in beside)


def test_the_config_changes_where_the_weights_did(pristine, tmp_path):
    convert(pristine(), tmp_path / "converted", torch.bfloat16, **QUIET)
    before, after = (
        json.loads((path / "config.json").read_text())
        for path in (pristine(), tmp_path / "converted")
    )
    assert after == before | {"torch_dtype": "bfloat16"}


def test_what_exists_is_not_touched(tiny, tmp_path):
    source = tiny()
    for target, said in ((source, "exists already|is the source"), (tmp_path / "x", "exists")):
        target.mkdir(exist_ok=True)
        (target / "mine").write_text("mine")
        with pytest.raises(CheckpointError, match=said):
            convert(source, target, **QUIET)
        assert (target / "mine").read_text() == "mine"


def test_a_damaged_source_is_refused_before_anything_is_written(tiny, tmp_path):
    source = tiny()
    tensors = tensors_of(source)
    del tensors["model.norm.weight"]
    write_tensors(source, tensors)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(model.norm.weight\)"):
        convert(source, tmp_path / "converted", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_disk_that_is_too_small_is_told_first(pristine, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"[\d,]+ bytes are needed, 1,000 are free"):
        convert(pristine(), tmp_path / "converted", **QUIET)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing_behind(pristine, tmp_path, monkeypatch, error):
    write, written = checkpoints.storage.writing.save_file, []

    def failing(tensors, file, metadata):
        if len(written) == 2:
            raise error
        written.append(file)
        write(tensors, file, metadata)

    monkeypatch.setattr(checkpoints.storage.writing, "save_file", failing)
    with pytest.raises((KeyboardInterrupt, OSError)):
        convert(pristine(), tmp_path / "converted", max_shard_bytes=50_000, **QUIET)
    assert len(written) == 2
    assert not any(tmp_path.iterdir())


def test_the_index_comes_last(pristine, tmp_path, monkeypatch):
    write, seen = checkpoints.storage.writing.save_file, []

    def watched(tensors, file, metadata):
        seen.append({path.name for path in Path(file).parent.iterdir()})
        write(tensors, file, metadata)

    monkeypatch.setattr(checkpoints.storage.writing, "save_file", watched)
    convert(pristine(), tmp_path / "converted", max_shard_bytes=50_000, **QUIET)
    assert len(seen) > 5
    assert not any("model.safetensors.index.json" in names for names in seen)
    assert all({"config.json", "tokenizer.model"} <= names for names in seen)


def test_killed_at_any_moment_it_leaves_nothing_or_what_verify_calls_incomplete(pristine, tmp_path):
    """The process stops itself after each write in turn, as hard as kill -9 does."""
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import checkpoints.storage.writing as writing
from checkpoints import convert
left, save = int(sys.argv[4]), writing.save_file
def counted(*args, **more):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **more)
writing.save_file = counted
convert(sys.argv[2], sys.argv[3], max_shard_bytes=100_000, progress=False)
"""
    for survived in (0, 1, 4):
        target = tmp_path / f"killed{survived}"
        command = [sys.executable, "-c", script, str(ROOT), str(pristine()), str(target)]
        done = subprocess.run([*command, str(survived)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not target.exists()
        (left,) = tmp_path.glob(f"killed{survived}*")
        assert main(["verify", str(left)]) == 1
        with pytest.raises(CheckpointError, match="unfinished copy|no model.safetensors"):
            load_model(left, **QUIET)
        convert(pristine(), target, max_shard_bytes=100_000, **QUIET)  # a second try cleans up
        assert verify(target) == ([], [])
        assert [path.name for path in tmp_path.glob(f"killed{survived}*")] == [target.name]


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500 * 10**6), ("5 gb", 5 * 10**9), ("100000", 100_000)]
)
def test_sizes_have_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "5 apples", "-1GB", "1.5GB"])
def test_what_is_no_size_is_refused(pristine, tmp_path, text, capsys):
    arguments = ["convert", str(pristine()), str(tmp_path / "x"), f"--max-shard-size={text}"]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "is not a size like 500MB" in capsys.readouterr().err


def test_the_command_prints_where_the_result_is(pristine, tmp_path, capsys):
    target = tmp_path / "converted"
    assert main(["convert", str(pristine()), str(target), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert main(["convert", str(pristine()), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
