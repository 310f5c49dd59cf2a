"""What the layers of one forward share.

Shapes: B batch (1 in positions where all rows stand at the same ones), T new tokens.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Step:
    """One forward: made once, read by every layer, forgotten with it.

    positions_BT  where each new token stands in its row
    counts        how many of the T tokens of each row are real, the rest on the right being
                  padding; None: all
    tokens_BT     the ids of the new tokens; None where there are none, as in a test of one layer
    shared        what a layer hands to later ones of the same forward, by a name that they agree
                  on: rope tables, or a selection of positions
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
    def behind(
        cls, lengths: Sequence[int], tokens_BT: Tensor, counts: Sequence[int] | None = None
    ) -> "Step":
        """The step of new tokens that continue rows of these lengths."""
        T, device = tokens_BT.shape[1], tokens_BT.device
        rows = lengths[:1] if len(set(lengths)) == 1 else lengths
        starts_B1 = torch.tensor(rows, device=device)[:, None]
        return cls(starts_B1 + torch.arange(T, device=device), counts, tokens_BT)

    def real(self, num_new: int) -> Tensor | None:
        """Which of the new tokens are real, bool (B, T); None: all."""
        if self.counts is None:
            return None
        device = self.positions_BT.device
        counts_B1 = torch.tensor(self.counts, device=device)[:, None]
        return torch.arange(num_new, device=device) < counts_B1
