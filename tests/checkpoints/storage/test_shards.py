"""Weight files that are damaged, missing or in the wrong place are refused by name."""

import json
import os
import struct

import pytest
import torch
from files import edit_json, shards_of, single, tensors_of, write_tensors
from safetensors.torch import load_file, save_file

from checkpoints import CheckpointError, load_model, read_headers
from checkpoints.storage.shards import open_shards

INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GAP = {"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 8, 12)}
OVERLAP = {"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}
DAMAGED = {
    "empty": (b"", "0 bytes: empty or truncated"),
    "three bytes": (b"abc", "3 bytes: empty or truncated"),
    "Git LFS pointer": (LFS, "Git LFS pointer.*run git lfs pull"),
    "header longer than the file": (with_header({}, length=10_000), "invalid header length"),
    "header beyond any limit": (with_header({}, length=2**63), "header too large"),
    "header not JSON": (with_header(b"{'a': 1}"), "invalid JSON"),
    "header not UTF-8": (with_header(b'{"\xff": 1}'), "invalid UTF-8"),
    "header nested deeply": (with_header(b'{"a":' * 9999), "invalid JSON"),
    "unknown dtype": (with_header({"a": tensor("Q4", [4], 0, 2)}, bytes(2)), "Q4"),
    "gap between tensors": (with_header(GAP, bytes(12)), "invalid offset"),
    "overlapping tensors": (with_header(OVERLAP, bytes(12)), "invalid offset"),
    "shape unlike its bytes": (with_header({"a": tensor("F32", [3], 0, 4)}, bytes(4)), "shape"),
    "shape that overflows": (with_header({"a": tensor("F32", [2**62, 8], 0, 4)}, bytes(4)), "over"),
}


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_name(tiny, content, said):
    file = shards_of(path := tiny())[1]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file.name}: .*{said}"):
        load_model(path, progress=False)


@pytest.mark.parametrize("change", [-1, -1000, 1, 1000])
def test_a_file_that_is_too_short_or_too_long_is_refused_with_its_size(tiny, change):
    file = shards_of(path := tiny())[0]
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(
        CheckpointError, match=rf"{file.name}: .*{len(content) + change} bytes.*trunc"
    ):
        load_model(path, progress=False)


def test_every_missing_file_is_named_at_once(tiny):
    path = tiny()
    first, second, *_ = shards_of(path)
    first.unlink()
    second.unlink()
    with pytest.raises(
        CheckpointError, match=rf"2 of \d weight files.*{first.name}, {second.name}"
    ):
        load_model(path, progress=False)


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/etc/outside.safetensors", "sub/outside.safetensors"),
        *("C:\\outside.safetensors", "..\\outside.safetensors", "..", "", "weights.bin"),
    ],
)
def test_an_index_cannot_name_anything_but_a_weight_file_beside_it(tiny, name):
    path = tiny()
    save_file({"x": torch.zeros(1)}, path.parent / "outside.safetensors")
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    edit_json(path / INDEX, weight_map=weight_map | {"x": name})
    with pytest.raises(CheckpointError, match=rf"{INDEX}: .*is not a plain .safetensors file name"):
        load_model(path, progress=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"x": 3}}', "has no weight_map"),
        ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "'x' occurs twice"),
        ('{"weight_map": {', "not JSON"),
    ],
)
def test_an_index_without_a_map_is_refused(tiny, content, said):
    path = tiny()
    (path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: .*{said}"):
        load_model(path, progress=False)


def test_a_tensor_that_its_listed_file_lacks_is_named(tiny):
    path = tiny()
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    some_file = weight_map["lm_head.weight"]
    edit_json(path / INDEX, weight_map=weight_map | {"model.extra.weight": some_file})
    with pytest.raises(
        CheckpointError, match=rf"{INDEX}: model.extra.weight is not in {some_file}"
    ):
        load_model(path, progress=False)


def test_a_tensor_that_is_in_another_file_than_listed_is_named(tiny):
    path = tiny()
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["lm_head.weight"])
    edit_json(path / INDEX, weight_map=weight_map | {"lm_head.weight": other})
    with pytest.raises(CheckpointError, match=rf"{INDEX}: lm_head.weight is not in {other}"):
        load_model(path, progress=False)


def test_a_tensor_in_two_files_is_named_with_both(tiny):
    first, second, *_ = shards_of(path := tiny())
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    with pytest.raises(CheckpointError, match=rf"{second.name}: {name} is in {first.name} too"):
        load_model(path, progress=False)


def test_files_without_their_index_are_an_unfinished_copy(tiny):
    path = tiny()
    (path / INDEX).unlink()
    with pytest.raises(
        CheckpointError, match=f"has weight files but no {INDEX}: an unfinished copy"
    ):
        load_model(path, progress=False)


def test_a_single_file_beside_an_index_is_ambiguous(tiny):
    path = tiny()
    save_file(tensors_of(path), single(path))
    with pytest.raises(CheckpointError, match=f"has both model.safetensors and {INDEX}"):
        load_model(path, progress=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "pickled weights only, which can run code"),
        ("consolidated.00.pth", "pickled weights only"),
        ("notes.txt", "no model.safetensors or .*found .*notes.txt"),
    ],
)
def test_a_directory_without_weight_files_says_what_it_holds(tiny, name, said):
    path = tiny()
    for file in [*shards_of(path), path / INDEX]:
        file.unlink()
    (path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=said):
        load_model(path, progress=False)


def test_a_linked_file_is_read_and_a_dangling_link_named(tiny):
    path = tiny()
    write_tensors(path, tensors_of(path))
    elsewhere = single(path).rename(path.parent / "blob")
    single(path).symlink_to(elsewhere)
    load_model(path, progress=False)
    elsewhere.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: a link to a file that is not"):
        load_model(path, progress=False)


def test_a_dangling_link_among_the_listed_files_counts_as_missing(tiny):
    file = shards_of(path := tiny())[0]
    file.unlink()
    file.symlink_to(path.parent / "nowhere")
    with pytest.raises(CheckpointError, match=rf"1 of \d weight files are missing: {file.name}"):
        load_model(path, progress=False)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["directory", "pipe"])
@pytest.mark.parametrize("name", ["model-00001-of-*", INDEX])
def test_only_regular_files_are_opened(tiny, make, name):
    (file,) = (path := tiny()).glob(name)
    file.unlink()
    make(file)
    with pytest.raises(CheckpointError, match=f"{file.name}: not a regular file"):
        load_model(path, progress=False)


def test_headers_tell_dtype_shape_and_size_of_every_tensor(tiny):
    path = tiny()
    stored, _ = read_headers(path)
    tensors = tensors_of(path)
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        assert stored[name].shape == value.shape
        assert stored[name].dtype == "F32"
        assert stored[name].nbytes == value.nbytes


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bool],
)
def test_bytes_are_counted_for_every_dtype(tmp_path, dtype):
    save_file({"x": torch.zeros(3, 5, dtype=dtype)}, tmp_path / "model.safetensors")
    with open_shards(tmp_path) as shards:
        assert shards.tensors["x"].nbytes == 15 * dtype.itemsize
