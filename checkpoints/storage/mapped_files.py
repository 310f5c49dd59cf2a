"""Tensors of safetensors files that stay mapped: views of the mapping, or copies that are read past
the system's cache of files."""

import json
import mmap
import os
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..config_file import CheckpointError
from .shards import INTEGERS, READABLE, Shards, StoredTensor

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
DTYPES = READABLE | INTEGERS | FLOAT8
PAGE = mmap.PAGESIZE


class MappedFile:
    """A safetensors file, mapped for reading.

    It stays open: deleted or replaced, it can still be read. Written to, it cannot.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._opened, self._direct = file.open("rb"), open_direct(file)
        (length,) = struct.unpack("<Q", self._opened.read(8))
        self._header, self._first = json.loads(self._opened.read(length)), 8 + length
        self._mapping = mmap.mmap(self._opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._state = self._find_state()
        with warnings.catch_warnings():  # the buffer must not be written to
            warnings.simplefilter("ignore")
            self.bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def _find_state(self) -> tuple[int, int]:
        found = os.fstat(self._opened.fileno())
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        if self._find_state() != self._state:
            raise CheckpointError(
                f"{self.file}: was written to while a model read its experts from it, which may "
                "now be others: load the model again"
            )

    def find(self, name: str) -> tuple[int, int]:
        """Where the bytes of a tensor start in the file, and their number."""
        start, end = self._header[name]["data_offsets"]
        return self._first + start, end - start

    def copy(self, start: int, nbytes: int) -> Tensor:
        """A copy of these bytes, which may have changed since the file was mapped."""
        before = start % PAGE
        pages = mmap.mmap(-1, before + nbytes + -(before + nbytes) % PAGE)
        if os.preadv(self._direct.fileno(), [pages], start - before) < before + nbytes:
            raise CheckpointError(f"{self.file}: cannot be read to its end: load the model again")
        return torch.frombuffer(pages, dtype=torch.uint8)[before : before + nbytes]

    def view(self, start: int, nbytes: int) -> Tensor:
        """A view of these bytes, which are in memory now."""
        self._advise(mmap.MADV_WILLNEED, start, nbytes)
        raw = self.bytes[start : start + nbytes]
        raw[::PAGE].sum()  # reads some of each page, and so waits for it
        return raw

    def release(self, start: int, nbytes: int) -> None:
        """Take the pages of these bytes out of the memory of this process."""
        self._advise(mmap.MADV_DONTNEED, start, nbytes)

    def _advise(self, advice: int, start: int, nbytes: int) -> None:
        self._mapping.madvise(advice, start - start % PAGE, start % PAGE + nbytes)


def open_direct(file: Path) -> BinaryIO:
    """Open a file to be read past the system's cache of files, which would hold experts twice; as
    usual where the file system cannot do that."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return open(file, "rb", 0, opener=lambda path, flags: os.open(path, flags | direct))
    except OSError:
        return file.open("rb")


Span = tuple[MappedFile, int, int]  # bytes of a file: where they start, and their number


class MappedShards(Shards):
    """Reads tensors of mapped files, and lists in `spans` what it has read.

    expert: read this one of the tensors that hold all experts of a layer, as (1, ...).
    copied: read copies, instead of views of the mapping.
    """

    def __init__(
        self,
        tensors: dict[str, StoredTensor],
        files: dict[Path, MappedFile],
        expert: int | None,
        copied: bool,
    ) -> None:
        super().__init__(tensors, [])
        self.files, self.expert, self.copied = files, expert, copied
        self.spans: list[Span] = []

    def read(self, name: str) -> Tensor:
        """Read a tensor; CheckpointError if its file was written to since it was mapped."""
        stored = self.tensors[name]
        file, dtype, shape = self.files[stored.file], DTYPES[stored.dtype], stored.shape
        start, nbytes = file.find(name)
        if self.expert is not None and shape:  # a scale of all experts has no shape
            nbytes //= shape[0]
            start, shape = start + self.expert * nbytes, (1, *shape[1:])
        self.spans.append((file, start, nbytes))
        file.check_unchanged()
        raw = file.copy(start, nbytes) if self.copied else file.view(start, nbytes)
        file.check_unchanged()
        if raw.storage_offset() % dtype.itemsize:  # torch makes no view at such an address
            raw = raw.clone()
        return raw.view(dtype).view(shape)
