"""What attention remembers of earlier tokens: plain buffers, handed in, that can be cut back.

A row of a batch has its own length, so rows of unequal prompts, and rows that accept unequal
numbers of drafted tokens, share one cache: an append says how many of the new entries are real in
each row, and a row can be cut back afterwards. What lies behind a row's end is overwritten by the
next append and never attended to.

Shapes: B batch, T new tokens, S entries to attend to, W width of an entry, C entries kept.
"""

import copy
from collections.abc import Sequence
from typing import Self

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
        self.max_length = max_length
        # zeros, not empty: what is never attended to must still be finite
        kept = self.entries_kept()
        self.buffers = [like.new_zeros(batch_size, kept, width) for width in widths]
        self.lengths = [0] * batch_size

    def entries_kept(self) -> int:
        return self.max_length

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def append(
        self, *new_BTW: Tensor, counts: Sequence[int] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Write new entries behind each row's end.

        counts: how many of the T are real, row by row; None: all.
        Returns the entries to attend to, (B, S, W) for each of `new_BTW`, and their positions,
        (B or 1, S): None if they are the new ones alone.
        """
        T, device = new_BTW[0].shape[1], new_BTW[0].device
        counts = [T] * len(self.lengths) if counts is None else counts
        starts, self.lengths = self.lengths, self.grown(counts)
        if len({*zip(starts, counts, strict=True), (starts[0], T)}) == 1:
            for buffer, new in zip(self.buffers, new_BTW, strict=True):
                buffer[:, starts[0] : starts[0] + T] = new
        else:
            counts_B1 = torch.tensor(counts, device=device)[:, None]
            row_n, t_n = (torch.arange(T, device=device) < counts_B1).nonzero(as_tuple=True)
            position_n = torch.tensor(starts, device=device)[row_n] + t_n
            for buffer, new in zip(self.buffers, new_BTW, strict=True):
                buffer[row_n, position_n] = new[row_n, t_n]
        if not any(starts):
            return list(new_BTW), None
        longest = max(self.lengths)
        keys_BS = torch.arange(longest, device=device)[None]
        return [buffer[:, :longest] for buffer in self.buffers], keys_BS

    def grown(self, counts: Sequence[int]) -> list[int]:
        """The lengths after an append of so many; an error if they do not fit."""
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if max(ends) > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} positions and {max(ends)} are needed: "
                "make it with a larger max_length"
            )
        return ends

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what lies behind `lengths[row]` in each row."""
        self.check(lengths)
        self.lengths = list(lengths)

    def spread(self, lengths: Sequence[int]) -> Self:
        """A cache of its own with a row for each of `lengths`: the beginning of this one's row."""
        (held,), rows = self.lengths, len(lengths)
        spread = copy.copy(self)
        spread.buffers = [buffer.repeat(rows, 1, 1) for buffer in self.buffers]
        spread.lengths = [held] * rows
        spread.truncate(lengths)
        return spread

    def check(self, lengths: Sequence[int]) -> None:
        """Raise ValueError unless the rows can be cut back to these lengths."""
        if len(lengths) != len(self.lengths):
            raise ValueError(f"{len(lengths)} lengths for a cache of {len(self.lengths)} rows")
        for row, (length, held) in enumerate(zip(lengths, self.lengths, strict=True)):
            if not 0 <= length <= held:
                raise ValueError(f"row {row} holds {held} positions: cannot truncate to {length}")


class WindowCache(LayerCache):
    """What a layer keeps whose queries see `window` positions: no more than those.

    The entry of position p is in slot p modulo C. Of the next query's window the query itself is
    not here yet, so C is window - 1, and `rollback` more where rows are to be cut back by so many
    positions: what was overwritten by entries that are cut off again must not have been needed.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        widths: Sequence[int],
        like: Tensor,
        window: int,
        rollback: int = 0,
    ) -> None:
        self.window, self.rollback = window, rollback
        super().__init__(batch_size, max_length, widths, like)
        self.floors = [0] * batch_size  # the lengths below which entries are gone

    def entries_kept(self) -> int:
        return min(self.window - 1 + self.rollback, self.max_length)

    def append(
        self, *new_BTW: Tensor, counts: Sequence[int] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        T, C, device = new_BTW[0].shape[1], self.entries_kept(), new_BTW[0].device
        starts = self.lengths
        self.lengths = self.grown([T] * len(starts) if counts is None else counts)
        start_B1 = torch.tensor(starts, device=device)[:, None]
        end_B1 = torch.tensor(self.lengths, device=device)[:, None]
        self.floors = [
            floor if end <= C else max(floor, end - self.rollback)
            for floor, end in zip(self.floors, self.lengths, strict=True)
        ]
        entries = [torch.cat(pair, dim=1) for pair in zip(self.buffers, new_BTW, strict=True)]
        slots_C = torch.arange(C, device=device)
        held_BC, kept_BC = newest_in(slots_C, start_B1), newest_in(slots_C, end_B1)
        source_BC = torch.where(kept_BC >= start_B1, C + kept_BC - start_B1, slots_C)
        self.buffers = [e.take_along_dim(source_BC[..., None], dim=1) for e in entries]
        if not any(starts):
            return list(new_BTW), None
        new_BT = start_B1 + torch.arange(T, device=device)
        return entries, torch.cat([held_BC, new_BT], dim=1)

    def check(self, lengths: Sequence[int]) -> None:
        super().check(lengths)
        for row, (length, floor) in enumerate(zip(lengths, self.floors, strict=True)):
            if 0 < length < floor:
                raise ValueError(
                    f"row {row} cannot be truncated to {length}: what a window of {self.window} "
                    f"does not show any more is forgotten; make the cache with a larger rollback"
                )

    def spread(self, lengths: Sequence[int]) -> Self:
        (floor,), whole = self.floors, copy.copy(self)
        whole.floors = [floor] * len(lengths)
        return super(WindowCache, whole).spread(lengths)

    def truncate(self, lengths: Sequence[int]) -> None:
        super().truncate(lengths)
        pairs = zip(self.floors, lengths, strict=True)
        self.floors = [floor if length else 0 for floor, length in pairs]


def newest_in(slots_C: Tensor, length_B1: Tensor) -> Tensor:
    """Of rows of these lengths, the last position that belongs in each slot; below 0: none."""
    last_B1 = length_B1 - 1
    return last_B1 - (last_B1 - slots_C) % max(1, len(slots_C))


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
            layer.check(lengths)
        for layer in self.layers:
            layer.truncate(lengths)
