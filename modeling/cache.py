"""What attention keeps of earlier tokens: entries or states that can be cut back.

Each row of a batch has its own length, so prompts of unequal lengths and rows that accept unequal
numbers of drafts share one cache: an append says how many of the new tokens are real in each row,
and each row can be cut back afterwards. The kinds of cache are in `attention/caches.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]  # of one row


class LayerCache:
    """The contract of one layer's cache, and what all kinds have in common.

    tensors     everything that is kept, its first axis the row: bytes are counted and copies made
                over them. They take dtype and device of what is appended.
    lengths     how many positions each row holds; `append`, of each kind, advances them by counts
    rollback    by how many positions a row can be cut back at any time; cutting to 0 always works
    floors      the lengths below which a row cannot be cut back, except to 0

    New tokens after a row's count are padding and leave no trace, whatever they hold.
    """

    def __init__(
        self, batch_size: int, max_length: int, shapes: Sequence[Shape], rollback: int = 0
    ) -> None:
        if batch_size < 1 or max_length < 1 or rollback < 0:
            raise ValueError(
                f"{batch_size} rows, {max_length} positions, rollback {rollback}: too few"
            )
        self.max_length, self.rollback = max_length, rollback
        self.lengths, self.floors = [0] * batch_size, [0] * batch_size
        self.shapes = [(batch_size, *shape) for shape in shapes]
        self.tensors: list[Tensor] = []

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tensors now, so that bytes can be counted; an append may change their dtype.

        They begin as zeros: even entries that nothing attends to must be finite.
        """
        self.tensors = [torch.zeros(shape, dtype=dtype, device=device) for shape in self.shapes]

    def fit(self, new: Tensor) -> None:
        """Make the tensors in the dtype of `new`, or cast held entries to one that fits both."""
        if not any(self.lengths) and (not self.tensors or self.tensors[-1].dtype != new.dtype):
            self.allocate(new.dtype, new.device)
        wide = torch.promote_types(self.tensors[-1].dtype, new.dtype)
        if wide != self.tensors[-1].dtype:
            self.tensors = [tensor.to(wide) for tensor in self.tensors]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more position of a row takes: 0 for a kind of fixed size."""
        return 0

    @property
    def constant_bytes(self) -> int:
        """Bytes that a row takes at any length."""
        return self.nbytes // len(self.lengths) - self.bytes_per_token * self.max_length

    def lengths_after(self, counts: Sequence[int]) -> list[int]:
        """The lengths after an append of these counts; ValueError if they do not fit."""
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if max(ends) > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} positions and {max(ends)} are needed: "
                "make it with a larger max_length"
            )
        return ends

    def check_truncation(self, lengths: Sequence[int]) -> None:
        """Raise ValueError unless the rows can be cut back to these lengths."""
        if len(lengths) != len(self.lengths):
            raise ValueError(f"{len(lengths)} lengths for a cache of {len(self.lengths)} rows")
        rows = zip(lengths, self.lengths, self.floors, strict=True)
        for row, (length, held, floor) in enumerate(rows):
            if not 0 <= length <= held:
                raise ValueError(f"row {row} holds {held} positions: cannot truncate to {length}")
            if 0 < length < floor:
                raise ValueError(
                    f"row {row} cannot be truncated to {length}: what it held below {floor} is "
                    "forgotten; make the cache with a larger rollback"
                )

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths[row]` positions of each row."""
        self.check_truncation(lengths)
        self.lengths = list(lengths)
        pairs = zip(self.floors, lengths, strict=True)
        self.floors = [floor if length else 0 for floor, length in pairs]


class Cache:
    """One cache per layer, all of the same lengths."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = list(layers)

    @property
    def lengths(self) -> list[int]:
        lengths = self.layers[0].lengths
        if any(layer.lengths != lengths for layer in self.layers):
            raise ValueError("the cache's layers differ in length: truncate to the shortest one")
        return lengths

    @property
    def length(self) -> int:
        """Positions held in the longest row."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def constant_bytes(self) -> int:
        return sum(layer.constant_bytes for layer in self.layers)

    def truncate(self, length: int | Sequence[int]) -> None:
        """Forget every position from `length` on: one number for all rows, or one for each."""
        rows = len(self.layers[0].lengths)
        lengths = [length] * rows if isinstance(length, int) else length
        for layer in self.layers:
            layer.check_truncation(lengths)
        for layer in self.layers:
            layer.truncate(lengths)
