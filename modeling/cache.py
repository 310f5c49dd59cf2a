"""What attention remembers of earlier tokens: plain buffers, handed in, that can be cut back.

A row of a batch has its own length, so rows of unequal prompts, and rows that accept unequal
numbers of drafted tokens, share one cache: append the same number to every row, then cut each
row back to what is valid for it. What lies behind a row's end is overwritten by the next append
and never attended to.

Shapes: B batch, T new tokens, S positions held so far in the longest row, W width of an entry.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """What one attention layer keeps: for each of `widths`, one (B, max_length, W) buffer."""

    def __init__(
        self, batch_size: int, max_length: int, widths: Sequence[int], like: Tensor
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                f"a cache of {batch_size} rows and {max_length} positions holds nothing"
            )
        # zeros, not empty: what is never attended to must still be finite
        self.buffers = [like.new_zeros(batch_size, max_length, width) for width in widths]
        self.lengths = [0] * batch_size

    @property
    def max_length(self) -> int:
        return self.buffers[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def append(self, *new_BTW: Tensor) -> list[Tensor]:
        """Write T new entries behind each row's end; returns all entries so far, (B, S, W) each."""
        T, start = new_BTW[0].shape[1], self.lengths[0]
        ends = [length + T for length in self.lengths]
        if max(ends) > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} positions and {max(ends)} are needed: "
                "make it with a larger max_length"
            )
        for buffer, new in zip(self.buffers, new_BTW, strict=True):
            if all(length == start for length in self.lengths):
                buffer[:, start : start + T] = new
            else:
                row_B1 = torch.arange(len(ends), device=buffer.device)[:, None]
                end_B1 = torch.tensor(ends, device=buffer.device)[:, None]
                buffer[row_B1, torch.arange(-T, 0, device=buffer.device) + end_B1] = new
        self.lengths = ends
        return [buffer[:, : max(ends)] for buffer in self.buffers]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what lies behind `lengths[row]` in each row."""
        if len(lengths) != len(self.lengths):
            raise ValueError(f"{len(lengths)} lengths for a cache of {len(self.lengths)} rows")
        for row, (length, held) in enumerate(zip(lengths, self.lengths, strict=True)):
            if not 0 <= length <= held:
                raise ValueError(f"row {row} holds {held} positions: cannot truncate to {length}")
        self.lengths = list(lengths)


class Cache:
    """One cache per layer, all of the same lengths."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = list(layers)

    @property
    def lengths(self) -> list[int]:
        """Positions held, row by row."""
        return self.layers[0].lengths

    @property
    def length(self) -> int:
        """Positions held in the longest row."""
        return max(self.lengths)

    @property
    def max_length(self) -> int:
        return self.layers[0].max_length

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def truncate(self, length: int | Sequence[int]) -> None:
        """Forget every position from `length` on: one number for all rows, or one for each."""
        rows = len(self.lengths)
        lengths = [length] * rows if isinstance(length, int) else length
        for layer in self.layers:
            layer.truncate(lengths)
