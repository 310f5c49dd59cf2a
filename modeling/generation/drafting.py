"""Drafting: the MTP modules guess the next tokens of every row of a batch.

At position i, module j reads the state of module j - 1 (for j = 1: of the main model) and token
i + j, and predicts token i + j + 1. For example, 5 tokens t0 to t4 are known, and 2 modules make
3 drafts d1 to d3. This is the token that each module reads at each position:

    position        0    1    2    3    4
    main model     t0   t1   t2   t3        it reads t4 only when it verifies the drafts
    module 1       t1   t2   t3   t4        its output at 3 predicts d1
    module 2       t2   t3   t4   d1        its output at 3 predicts d2
    module 2 again                     d2   it reads its own state of 3, and predicts d3

With n known tokens, module j's cache entries at positions below n - j are final. The others are
tentative: they come from drafts (here d1 and d2), and are removed at the end of the round. Module 2
reads position 3 again when token 5 is known; until then the state that it reads there, which is
final (module 1 made it from known tokens), is pending.

Shapes: B rows, T positions (of the longest row), n positions of one row, D model width,
V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model import Transformer
from ..mtp import next_state
from ..step import Step
from .sampling import Draft, RandomStream, Sampling


class Drafter:
    """Drafts tokens with the MTP modules; each module has its own cache.

    Drafts beyond the number of modules come from the last one, which reads its own state and draft.
    max_drafts: the largest number of drafts in a round.
    """

    def __init__(
        self,
        model: Transformer,
        capacity: int,
        max_drafts: int,
        sampling: Sampling,
        random: Sequence[RandomStream],
    ) -> None:
        self.model, self.modules = model, model.mtp_modules[:max_drafts]
        self.sampling, self.random = sampling, random
        self.caches = model.make_mtp_caches(len(random), capacity, max_drafts)[:max_drafts]
        # [module][row]: final states at the positions where the module has no final entry, (n, D)
        self.pending: list[list[Tensor]] = []

    def add_states(self, new_states: Sequence[Tensor]) -> None:
        """Append the main model's states of each row, (n, D), at the next positions."""
        if not self.pending:
            self.pending = [[state_nD[:0] for state_nD in new_states] for _ in self.modules]
        self.pending[0] = [
            torch.cat(pair) for pair in zip(self.pending[0], new_states, strict=True)
        ]

    def draft(self, texts: Sequence[list[int]], counts: Sequence[int]) -> list[list[Draft]]:
        """Draft `counts[row]` tokens after the text of each row.

        `add_states` must have given the main model's states of every row that drafts, at all
        positions of its text but the last.
        """
        drafts: list[list[Draft]] = [[] for _ in texts]
        tokens = [list(text) for text in texts]  # each text, followed by its drafts
        tentative: dict[int, Tensor] = {}  # by row: the states that the next depth reads
        for depth in range(1, max(counts, default=0) + 1):
            number = min(depth, len(self.modules))
            rows = [row for row, count in enumerate(counts) if depth <= count]
            if depth == number:
                inputs = self.join_states(number, rows, tentative)
            else:
                inputs = {row: tentative[row] for row in rows}
            starts = self.caches[number - 1].lengths
            normed, outputs = self.run_module(number, inputs, tokens)
            last_nD = torch.stack([normed[row][-1] for row in rows])
            logits_nV = self.model.logits(last_nD, self.modules[number - 1])
            for row, logits_V in zip(rows, logits_nV, strict=True):
                drafts[row].append(self.sampling.draft(logits_V, self.random[row]))
                tokens[row].append(drafts[row][-1].token)
            if depth == number:
                num_final = {row: max(0, len(texts[row]) - number - starts[row]) for row in rows}
                outputs = self.update_pending(number, inputs, outputs, num_final)
            tentative = outputs
        self.remove_tentative(texts, max(counts, default=0))
        return drafts

    def join_states(
        self, number: int, rows: Sequence[int], tentative: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """The states that module `number` reads, by row: pending ones, then tentative ones."""
        pending = self.pending[number - 1]
        return {
            row: torch.cat([pending[row], tentative.get(row, pending[row][:0])]) for row in rows
        }

    def update_pending(
        self,
        number: int,
        inputs: Mapping[int, Tensor],
        outputs: Mapping[int, Tensor],
        num_final: Mapping[int, int],
    ) -> dict[int, Tensor]:
        """Keep final states for later rounds; return the tentative ones, for the next depth.

        inputs, outputs: by row, the states that module `number` has read and those that it gives to
        the next depth, (n, D) each; its entries are final at the first `num_final` positions.
        """
        pending, is_last = self.pending[number - 1], number == len(self.modules)
        for row, end in num_final.items():
            pending[row] = inputs[row][end : len(pending[row])]
            if not is_last:
                next_pending = self.pending[number]
                next_pending[row] = torch.cat([next_pending[row], outputs[row][:end]])
        if is_last:  # the next depth is this module again, on its own last state
            return {row: output_nD[-1:] for row, output_nD in outputs.items()}
        return {row: outputs[row][end:] for row, end in num_final.items()}

    def run_module(
        self, number: int, inputs: Mapping[int, Tensor], tokens: Sequence[list[int]]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Module `number` on the next positions of some rows; appends to its cache.

        inputs: by row, the states to read, (n, D); tokens: of every row, its text and drafts.
        Returns the states that the head reads and those that the next depth reads, like `inputs`.
        """
        cache, empty_nD = self.caches[number - 1], next(iter(inputs.values()))[:0]
        states = [inputs.get(row, empty_nD) for row in range(len(tokens))]
        counts, starts = [len(state_nD) for state_nD in states], cache.lengths
        rows = zip(tokens, starts, counts, strict=True)
        read_tokens = [row_tokens[start + number :][:count] for row_tokens, start, count in rows]
        step = Step.after(starts, pad_tokens(read_tokens, self.model.device), counts)
        input_BTD = pad_sequence(states, batch_first=True)
        output = self.model.mtp_step(self.modules[number - 1], input_BTD, step, cache)
        next_BTD = next_state(self.model.config.mtp, input_BTD, output)
        normed = {row: output.normed_BTD[row, : counts[row]] for row in inputs}
        return normed, {row: next_BTD[row, : counts[row]] for row in inputs}

    def remove_tentative(self, texts: Sequence[list[int]], depths: int) -> None:
        """Cut each module's cache back to its final entries."""
        for number, cache in enumerate(self.caches[:depths], start=1):
            rows = zip(cache.lengths, texts, strict=True)
            cache.truncate([min(length, max(0, len(text) - number)) for length, text in rows])


def pad_tokens(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    """Rows of ids as one tensor, (B, T), padded on the right with id 0."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(device)
