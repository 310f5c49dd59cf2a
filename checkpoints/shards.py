"""The safetensors files of a checkpoint directory: found, checked, opened, read tensor by tensor.

The headers of the files are the truth; the index only says which files there are. Nothing is
executed, nothing outside the directory is opened, and nothing is read before it is asked for.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config_file import CheckpointError, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor."""

    file: Path
    dtype: str  # in safetensors' spelling: F32, BF16 ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = int("".join(filter(str.isdigit, self.dtype.split("_")[0])) or 8)
        return prod(self.shape) * bits // 8


class Shards:
    """All tensors of a checkpoint by their published name."""

    def __init__(self, tensors: dict[str, StoredTensor], handles: dict[Path, Any]) -> None:
        self.tensors, self._handles = tensors, handles

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU."""
        return self._handles[self.tensors[name].file].get_tensor(name)


@contextmanager
def open_shards(directory: Path) -> Iterator[Shards]:
    """Open every weight file of a checkpoint directory for the length of a `with` block."""
    files, listed = weight_files(directory)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(open_shard(file)) for file in files}
        tensors: dict[str, StoredTensor] = {}
        for file, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle, no dict)
                if name in tensors:
                    other = tensors[name].file.name
                    raise CheckpointError(f"{file}: {name} is in {other} too; keep one of them")
                header = handle.get_slice(name)
                shape = tuple(header.get_shape())
                tensors[name] = StoredTensor(file, header.get_dtype(), shape)
        for name, file_name in listed.items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise CheckpointError(f"{directory / INDEX}: {name} is not in {file_name}")
        yield Shards(tensors, handles)


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """What the headers of a checkpoint's files say; no weight is read."""
    with open_shards(Path(path)) as shards:
        return shards.tensors


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the weights, and what the index (if there is one) says is where."""
    single, index = directory / SINGLE, directory / INDEX
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory")
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory}: has both {SINGLE} and {INDEX}; remove the stale one")
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
        names = sorted(set(listed.values()))
        for name in names:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r} is not a plain .safetensors file name")
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise CheckpointError(
                f"{directory}: {len(missing)} of {len(names)} weight files are missing: "
                + some(missing)
            )
        return [directory / name for name in names], listed
    if single.exists() or single.is_symlink():
        return [single], {}
    present = sorted(file.name for file in directory.iterdir())
    if any(name.endswith(".safetensors") for name in present):
        raise CheckpointError(f"{directory}: weight files without {INDEX}: an unfinished copy")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in present):
        raise CheckpointError(
            f"{directory}: holds pickled weights only, which can run code when opened; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{directory}: no {SINGLE} or {INDEX}; found {some(present)}")


def open_shard(file: Path) -> Any:
    """`safe_open`, with errors that name the file and what it is instead."""
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


def some(names: list[str], limit: int = 5) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
