"""What the layers of one forward share.

Shapes: B batch (1 in positions that are the same in all rows), T new tokens.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Step:
    """One forward: made once, read by every layer, forgotten with it.

    positions_BT  where each new token stands in its row
    counts        how many of the T tokens of each row are real; the others, on its right, are
                  padding. None: all are real
    tokens_BT     the ids of the new tokens; None in a test of one layer, which has no ids
    shared        results that a layer leaves for later ones of the same forward, by a key that
                  they agree on: rope tables, or a selection of positions
    """

    def __init__(
        self,
        positions_BT: Tensor,
        counts: Sequence[int] | None = None,
        tokens_BT: Tensor | None = None,
    ) -> None:
        self.positions_BT, self.counts, self.tokens_BT = positions_BT, counts, tokens_BT
        self.shared: dict[Hashable, Any] = {}

    @classmethod
    def after(
        cls, lengths: Sequence[int], tokens_BT: Tensor, counts: Sequence[int] | None = None
    ) -> "Step":
        """The step of new tokens that follow rows of these lengths."""
        (B, T), device = tokens_BT.shape, tokens_BT.device
        if counts is not None and (len(counts) != B or not all(0 <= n <= T for n in counts)):
            raise ValueError(f"counts = {counts}: expected {B} numbers from 0 to {T}")
        rows = lengths[:1] if len(set(lengths)) == 1 else lengths
        starts_B1 = torch.tensor(rows, device=device)[:, None]
        return cls(starts_B1 + torch.arange(T, device=device), counts, tokens_BT)

    def real_mask(self, num_new: int) -> Tensor | None:
        """True for real tokens and False for padding, bool (B, T); None: all are real."""
        if self.counts is None:
            return None
        device = self.positions_BT.device
        counts_B1 = torch.tensor(self.counts, device=device)[:, None]
        return torch.arange(num_new, device=device) < counts_B1
