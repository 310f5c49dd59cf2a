"""Finds, checks and opens the safetensors files of a checkpoint, and reads tensor by tensor.

The headers of the files decide; the index only lists the files. No code is executed, no file
outside the directory is opened, and a tensor is read only when it is requested.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config_file import CheckpointError, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_MAPPED_BYTES = 64 * 2**20
READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str  # as safetensors writes it: F32, BF16 ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = int("".join(filter(str.isdigit, self.dtype.split("_")[0])) or 8)
        return prod(self.shape) * bits // 8


class Shards:
    """All tensors of a checkpoint by their published names, and the problems of its files."""

    def __init__(self, tensors: dict[str, StoredTensor], problems: list[str]) -> None:
        self.tensors, self.problems = tensors, problems
        self._handles: dict[Path, Any] = {}
        self._mapped = 0

    def read(self, name: str) -> Tensor:
        """Read a tensor, on the CPU."""
        stored = self.tensors[name]
        # the pages of a mapped file count as memory of this process until the file is closed
        if self._mapped + stored.nbytes > MAX_MAPPED_BYTES:
            self.close()
        if stored.file not in self._handles:
            self._handles[stored.file] = open_shard(stored.file)
        self._mapped += stored.nbytes
        return self._handles[stored.file].get_tensor(name)

    def close(self) -> None:
        self._handles.clear()
        self._mapped = 0


@contextmanager
def open_shards(directory: Path) -> Iterator[Shards]:
    """Open every weight file of a checkpoint; CheckpointError if there is a problem."""
    with survey_shards(directory) as shards:
        raise_any(shards.problems)
        yield shards


@contextmanager
def survey_shards(directory: Path) -> Iterator[Shards]:
    """Open the weight files that can be opened, and list the problems of the others."""
    files, listed, problems = find_weight_files(directory)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            handle = open_shard(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle, no dict)
            header = handle.get_slice(name)
            found = StoredTensor(file, header.get_dtype(), tuple(header.get_shape()))
            if name in tensors:
                other = tensors[name].file.name
                problems.append(f"{file}: {name} is in {other} too; keep one of them")
            tensors[name] = found
    if not problems:  # otherwise the problems above explain most of them
        problems += find_misplaced(listed, tensors, directory / INDEX)
    shards = Shards(tensors, problems)
    try:
        yield shards
    finally:
        shards.close()


def find_misplaced(
    listed: dict[str, str], tensors: dict[str, StoredTensor], index: Path
) -> list[str]:
    """The tensors that are not in the file that the index names."""
    files = {stored.file: stored.file.name for stored in tensors.values()}
    return [
        f"{index}: {name} is not in {file}; download both again"
        for name, file in listed.items()
        if name not in tensors or files[tensors[name].file] != file
    ]


def raise_any(problems: list[str]) -> None:
    """Raise one error for all problems."""
    if problems:
        raise CheckpointError(list_some(problems, limit=3, separator="; "))


def find_weight_files(directory: Path) -> tuple[list[Path], dict[str, str], list[str]]:
    """The weight files, the file of each tensor by the index if there is one, and problems."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory")
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        both = f"{directory}: has both {SINGLE} and {INDEX}; remove the stale one"
        return [single], {}, [both]
    if index.exists():
        try:
            listed = read_index(index)
        except CheckpointError as error:
            return [], {}, [str(error)]
        names = sorted(set(listed.values()))
        missing = [name for name in names if not (directory / name).exists()]
        problem = f"{directory}: {len(missing)} of {len(names)} weight files are missing: "
        files = [directory / name for name in names if name not in missing]
        return files, listed, [problem + list_some(missing)] if missing else []
    if single.exists() or single.is_symlink():
        return [single], {}, []
    return [], {}, [f"{directory}: {explain_no_weights(directory)}"]


def read_index(index: Path) -> dict[str, str]:
    """Read the weight_map, tensor name -> file name; no name may lead out of the directory."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    for name in sorted(set(listed.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is not a plain .safetensors file name")
    return listed


def explain_no_weights(directory: Path) -> str:
    """Explain what a directory without a weight file and an index holds instead."""
    present = sorted(file.name for file in directory.iterdir())
    if any(name.endswith(".safetensors") for name in present):
        return f"has weight files but no {INDEX}: an unfinished copy; copy the index too"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in present):
        return (
            "holds pickled weights only, which can run code when opened; "
            "convert them to safetensors"
        )
    if any(name.endswith(".gguf") for name in present):
        return "holds a GGUF file; the safetensors files of the same model are needed"
    return f"no {SINGLE} or {INDEX}; found {list_some(present)}"


def open_shard(file: Path) -> Any:
    """Open a file by `safe_open`; errors name the file and say what it is instead."""
    if not file.is_file():
        kind = "a link to a file that is not there" if file.is_symlink() else "not a regular file"
        raise CheckpointError(f"{file}: {kind}")
    size = file.stat().st_size
    if size < 8:
        raise CheckpointError(f"{file}: {size} bytes: empty or truncated, download it again")
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file}: a Git LFS pointer, not the weights; run git lfs pull")
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        reason = f"{error} ({size} bytes); a truncated or damaged download?"
        raise CheckpointError(f"{file}: {reason}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None


def list_some(names: list[str], limit: int = 5, separator: str = ", ") -> str:
    """The first names of a list, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more if names else "nothing"
