"""Drafting: the MTP modules guess the next tokens of every row of a batch.

Module j makes its entry at position i from the state of the module before it there (the main
model's for j = 1) and from token i + j. With n tokens known, the entries at positions below n - j
are final. Those behind them are made from drafts, and are made again once the tokens are known:
until then the states that they were made from wait.

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
    """Guesses tokens ahead with the MTP modules, each with its own cache.

    Drafts beyond the number of modules come from the last one, fed its own state and draft.
    max_drafts: how many are ever asked for at once.
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
        self.waiting: list[list[Tensor]] = []  # per module and row: states to be read, (n, D)

    def add_states(self, confirmed: Sequence[Tensor]) -> None:
        """Take the main model's new states of each row, (n, D), that follow those taken before."""
        if not self.waiting:
            self.waiting = [[state_nD[:0] for state_nD in confirmed] for _ in self.modules]
        self.waiting[0] = [torch.cat(pair) for pair in zip(self.waiting[0], confirmed, strict=True)]

    def draft(self, texts: Sequence[list[int]], counts: Sequence[int]) -> list[list[Draft]]:
        """`counts[row]` drafts for each row, which follow its text.

        The main model's states of all but the newest token of a drafting row have been added.
        """
        drafts: list[list[Draft]] = [[] for _ in texts]
        known = [list(text) for text in texts]  # goes on with the drafts
        guessed: dict[int, Tensor] = {}  # by row: states made from drafts, for the next depth
        for depth in range(1, max(counts, default=0) + 1):
            number = min(depth, len(self.modules))
            rows = [row for row, count in enumerate(counts) if depth <= count]
            read = guessed if depth > number else self.join_waiting(number, rows, guessed)
            starts = self.caches[number - 1].lengths
            made = self.run(number, {row: read[row] for row in rows}, known)
            last_nD = torch.stack([normed_nD[-1] for normed_nD, _ in made.values()])
            logits_nV = self.model.logits(last_nD, self.modules[number - 1])
            for row, logits_V in zip(rows, logits_nV, strict=True):
                drafts[row].append(self.sampling.draft(logits_V, self.random[row]))
                known[row].append(drafts[row][-1].token)
            guessed = {row: following_nD for row, (_, following_nD) in made.items()}
            if depth == number:
                final = {row: max(0, len(texts[row]) - number - starts[row]) for row in rows}
                guessed = self.keep_final(number, read, guessed, final)
        self.cut_back(texts, max(counts, default=0))
        return drafts

    def join_waiting(
        self, number: int, rows: Sequence[int], guessed: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """What a module reads first in a round: what waits for it, and then what is guessed."""
        waiting = self.waiting[number - 1]
        return {row: torch.cat([waiting[row], guessed.get(row, waiting[row][:0])]) for row in rows}

    def keep_final(
        self,
        number: int,
        read: Mapping[int, Tensor],
        made: Mapping[int, Tensor],
        final: Mapping[int, int],
    ) -> dict[int, Tensor]:
        """Let wait what is to be read again, and hand what is final to the next module for good.

        read, made: what module `number` has read and what the next depth reads, of each row;
        final: at how many of these positions it knew the token. Returns what is not final.
        """
        waiting, last = self.waiting[number - 1], number == len(self.modules)
        for row, end in final.items():
            waiting[row] = read[row][end : len(waiting[row])]
            if not last:
                following = self.waiting[number]
                following[row] = torch.cat([following[row], made[row][:end]])
        return {row: made[row][-1:] if last else made[row][end:] for row, end in final.items()}

    def run(
        self, number: int, read: Mapping[int, Tensor], known: Sequence[list[int]]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Module `number` on the states of some rows and the tokens so far ahead.

        Returns what the head reads and what the next depth reads, (n, D) each, by row.
        """
        cache, nothing_nD = self.caches[number - 1], next(iter(read.values()))[:0]
        states = [read.get(row, nothing_nD) for row in range(len(known))]
        counts, starts = [len(state_nD) for state_nD in states], cache.lengths
        rows = zip(known, starts, counts, strict=True)
        ahead = [tokens[start + number :][:count] for tokens, start, count in rows]
        step = Step.behind(starts, pad_tokens(ahead, self.model.device), counts)
        read_BTD = pad_sequence(states, batch_first=True)
        made = self.model.mtp_step(self.modules[number - 1], read_BTD, step, cache)
        following_BTD = next_state(self.model.config.mtp, read_BTD, made)
        return {
            row: (made.normed_BTD[row, : counts[row]], following_BTD[row, : counts[row]])
            for row in read
        }

    def cut_back(self, texts: Sequence[list[int]], depths: int) -> None:
        """Forget the entries that were made from drafts."""
        for number, cache in enumerate(self.caches[:depths], start=1):
            rows = zip(cache.lengths, texts, strict=True)
            cache.truncate([min(held, max(0, len(text) - number)) for held, text in rows])


def pad_tokens(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    """Rows of ids as one tensor, (B, T), padded on the right with id 0."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(device)
