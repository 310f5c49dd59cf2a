"""The kinds of cache: an entry for every position, the last entries alone, or states.

Shapes: B batch, T new tokens, S entries to attend to, W width of an entry, C entries kept, R
inputs held for a cut, L = R + T places.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cache import LayerCache, Shape


class EntryCache(LayerCache):
    """An entry per position: for each of `widths`, a (B, max_length, W) tensor."""

    def __init__(self, batch_size: int, max_length: int, widths: Sequence[int]) -> None:
        shapes = [(max_length, width) for width in widths]
        super().__init__(batch_size, max_length, shapes, rollback=max_length)

    @property
    def bytes_per_token(self) -> int:
        return self.nbytes // (len(self.lengths) * self.max_length)

    def append(
        self, *new_BTW: Tensor, counts: Sequence[int] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Write new entries after the end of each row.

        counts: how many of the T are real, row by row; None: all.
        Returns the entries to attend to, (B, S, W) for each of `new_BTW`, and their positions,
        (B or 1, S): None if they are the new ones alone.
        """
        T, device = new_BTW[0].shape[1], new_BTW[0].device
        counts = [T] * len(self.lengths) if counts is None else counts
        ends = self.lengths_after(counts)
        self.fit(widest(new_BTW))
        starts, self.lengths = self.lengths, ends
        if all(start == starts[0] for start in starts) and all(count == T for count in counts):
            for tensor, new in zip(self.tensors, new_BTW, strict=True):
                tensor[:, starts[0] : starts[0] + T] = new
        else:
            counts_B1 = torch.tensor(counts, device=device)[:, None]
            row_n, t_n = (torch.arange(T, device=device) < counts_B1).nonzero(as_tuple=True)
            position_n = torch.tensor(starts, device=device)[row_n] + t_n
            for tensor, new in zip(self.tensors, new_BTW, strict=True):
                tensor[row_n, position_n] = new[row_n, t_n].to(tensor.dtype)
        if not any(starts):
            return list(new_BTW), None
        longest = max(self.lengths)
        keys_BS = torch.arange(longest, device=device)[None]
        pairs = zip(self.tensors, new_BTW, strict=True)
        return [tensor[:, :longest].to(new.dtype) for tensor, new in pairs], keys_BS


class WindowCache(LayerCache):
    """The last entries alone, for queries that see `window` positions.

    The entry of position p is in slot p modulo C. The next query sees its own entry, which is not
    in the cache yet, and window - 1 earlier ones. So C = window - 1 + rollback, at most max_length:
    entries that are cut off again have overwritten up to `rollback` ones that the window needs.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        widths: Sequence[int],
        window: int,
        rollback: int = 0,
    ) -> None:
        self.kept = min(window - 1 + rollback, max_length)
        shapes = [(self.kept, width) for width in widths]
        super().__init__(batch_size, max_length, shapes, rollback)

    def append(
        self, *new_BTW: Tensor, counts: Sequence[int] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """See `EntryCache.append`; a negative position marks an empty slot."""
        T, C, device = new_BTW[0].shape[1], self.kept, new_BTW[0].device
        ends = self.lengths_after([T] * len(self.lengths) if counts is None else counts)
        self.fit(widest(new_BTW))
        starts, self.lengths = self.lengths, ends
        start_B1 = torch.tensor(starts, device=device)[:, None]
        end_B1 = torch.tensor(ends, device=device)[:, None]
        self.floors = [
            floor if end <= C else max(floor, end - self.rollback)
            for floor, end in zip(self.floors, ends, strict=True)
        ]
        entries = [torch.cat(pair, dim=1) for pair in zip(self.tensors, new_BTW, strict=True)]
        slots_C = torch.arange(C, device=device)
        held_BC, kept_BC = positions_in(slots_C, start_B1), positions_in(slots_C, end_B1)
        source_BC = torch.where(kept_BC >= start_B1, C + kept_BC - start_B1, slots_C)
        self.tensors = [e.take_along_dim(source_BC[..., None], dim=1) for e in entries]
        if not any(starts):
            return list(new_BTW), None
        new_BT = start_B1 + torch.arange(T, device=device)
        pairs = zip(entries, new_BTW, strict=True)
        return [e.to(new.dtype) for e, new in pairs], torch.cat([held_BC, new_BT], dim=1)


def widest(tensors: Sequence[Tensor]) -> Tensor:
    """The tensor to whose dtype the others are promoted."""
    found = tensors[0]
    for tensor in tensors[1:]:
        found = tensor if torch.promote_types(found.dtype, tensor.dtype) != found.dtype else found
    return found


def positions_in(slots_C: Tensor, length_B1: Tensor) -> Tensor:
    """The position whose entry each slot holds, in rows of these lengths; negative: none."""
    last_B1 = length_B1 - 1
    return last_B1 - (last_B1 - slots_C) % max(1, len(slots_C))


# A recurrence: (states (B, ...), inputs (B, L, ...), real_BL) -> (outputs (B, L, ...), the states
# after them). States and inputs are lists, and L may be 0. Where real_BL is False, the input is 0
# and must not change the states. An append calls it twice, so it must be a pure function.
Recurrence = Callable[[list[Tensor], list[Tensor], Tensor], tuple[Tensor, list[Tensor]]]


class StateCache(LayerCache):
    """The states of a recurrence, which begin at zero: a fixed size at any length.

    A state cannot be cut back. So the cache keeps the states at `floors`, at most `rollback`
    positions back, and the inputs since then. Every append runs these again; a cut drops the last.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        states: Sequence[Shape],
        inputs: Sequence[Shape],
        rollback: int = 0,
    ) -> None:
        self.num_states = len(states)
        held = [(rollback, *shape) for shape in inputs]
        super().__init__(batch_size, max_length, [*states, *held], rollback)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """States are in float32 at least."""
        super().allocate(dtype, device)
        wide = torch.promote_types(dtype, torch.float32)
        self.tensors[: self.num_states] = [t.to(wide) for t in self.tensors[: self.num_states]]

    def append(
        self, run: Recurrence, *new_BT: Tensor, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Run new inputs, (B, T, ...) each, after the end of each row; returns outputs (B, T, ...).

        counts: how many of the T are real, row by row; None: all.
        """
        (B, T), R, device = new_BT[0].shape[:2], self.rollback, new_BT[0].device
        counts = [T] * B if counts is None else counts
        ends = self.lengths_after(counts)
        self.fit(new_BT[0])
        states, held = self.tensors[: self.num_states], self.tensors[self.num_states :]
        # R places for inputs held, of which the last ones are in use, and T for the new ones
        in_use = [length - floor for length, floor in zip(self.lengths, self.floors, strict=True)]
        place_L = torch.arange(R + T, device=device)
        counts_B1 = torch.tensor(counts, device=device)[:, None]
        real_BL = place_L >= R - torch.tensor(in_use, device=device)[:, None]
        inputs = [
            zero_unless(real_BL, torch.cat(pair, 1)) for pair in zip(held, new_BT, strict=True)
        ]
        # what is now more than R positions old goes into the states
        old_BT = real_BL[:, :T] & (place_L[:T] < counts_B1)
        old = [zero_unless(old_BT, x[:, :T]) for x in inputs]
        y_old, states = run(states, old, old_BT)
        recent_BR = counts_B1 + place_L[:R]
        held, real_BR = gather_places(inputs, recent_BR), real_BL.take_along_dim(recent_BR, dim=1)
        self.tensors, self.lengths = [*states, *held], ends
        self.floors = [
            end - min(R, used + count)
            for end, used, count in zip(ends, in_use, counts, strict=True)
        ]
        if R == 0:
            return y_old
        y_recent, _ = run(states, held, real_BR)
        place_BT = R + place_L[:T].expand(B, T)
        recent_place_BT = T + (place_BT - counts_B1).clamp(0, R - 1)
        place_BT = place_BT.where(place_BT < counts_B1, recent_place_BT)
        return gather_places([torch.cat([y_old, y_recent], dim=1)], place_BT)[0]

    def truncate(self, lengths: Sequence[int]) -> None:
        self.check_truncation(lengths)
        cuts = [held - length for held, length in zip(self.lengths, lengths, strict=True)]
        super().truncate(lengths)
        if not self.tensors:
            return
        device = self.tensors[0].device
        keep_B1 = torch.tensor([[length > 0] for length in lengths], device=device)
        states = [zero_unless(keep_B1[:, 0], state) for state in self.tensors[: self.num_states]]
        place_R = torch.arange(self.rollback, device=device)
        source_BR = (place_R - torch.tensor(cuts, device=device)[:, None]).clamp(min=0)
        self.tensors = [*states, *gather_places(self.tensors[self.num_states :], source_BR)]


def zero_unless(kept: Tensor, x: Tensor) -> Tensor:
    """x, (..., *), where `kept`, (...), is True, and zeros elsewhere."""
    return x.where(kept.reshape(*kept.shape, *[1] * (x.dim() - kept.dim())), 0)


def gather_places(tensors: Sequence[Tensor], place_BL: Tensor) -> list[Tensor]:
    """The elements of each tensor, (B, S, ...), at these places of each row: (B, L, ...)."""
    rows_B1 = torch.arange(len(place_BL), device=place_BL.device)[:, None]
    return [tensor[rows_B1, place_BL] for tensor in tensors]
