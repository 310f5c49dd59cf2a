"""Drafting: the MTP modules guess the next tokens of every row of a batch.

Shapes: B rows, T positions (of the longest row), n positions of one row, D model width,
V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model import Transformer, new_positions
from ..mtp import next_state
from .sampling import Draft, RandomStream, Sampling


class Drafter:
    """Guesses tokens ahead with the MTP modules, each with its own cache.

    Module j's entry for position i is made from the previous module's state there and token
    i + j. With n known tokens its cache is therefore valid up to position n - j, exclusive; what
    rests on drafted tokens is cut off again. States that a module has not made such entries of
    yet wait for it: of the newest token, and of rounds in which it did not draft. Drafts beyond
    the number of modules come from the last one, fed its own state and draft.

    most: how many drafts are ever asked for at once.
    """

    def __init__(
        self,
        model: Transformer,
        capacity: int,
        most: int,
        sampling: Sampling,
        random: Sequence[RandomStream],
    ) -> None:
        self.model, self.modules = model, model.mtp_modules[:most]
        self.sampling, self.random = sampling, random
        self.caches = model.make_mtp_caches(len(random), capacity, rollback=most)[:most]
        # per module, per row: pieces of one (n, D)
        self.waiting: list[list[list[Tensor]]] = [[[] for _ in random] for _ in self.modules]

    def add(self, confirmed: list[Tensor]) -> None:
        """Take the main model's new states of each row, (n, D), that follow those taken before."""
        for waiting, new_nD in zip(self.waiting[0], confirmed, strict=True):
            waiting.append(new_nD)

    def draft(self, tokens: list[list[int]], counts: list[int]) -> list[list[Draft]]:
        """`counts[row]` drafts for each row, which follow its `tokens`.

        The main model's states of all but the newest of a drafting row's tokens have been added.
        """
        rows, known = range(len(tokens)), [list(row) for row in tokens]
        drafts: list[list[Draft]] = [[] for _ in rows]
        nothing = self.model.embed.weight.new_zeros(0, self.model.config.d_model)
        handed = [nothing for _ in rows]  # states that rest on drafts, to the next depth
        for depth in range(1, max(counts) + 1):
            number = min(depth, len(self.modules))
            going = [row for row in rows if depth <= counts[row]]
            read = [nothing for _ in rows]
            for row in going:
                waiting = self.waiting[number - 1][row] if depth == number else []
                read[row] = torch.cat([*waiting, handed[row]])
            starts = self.caches[number - 1].lengths
            left, following = self.run(number, read, known)
            last_nD = torch.stack([left[row][-1] for row in going])
            logits_nV = self.model.logits(last_nD, self.modules[number - 1])
            for row, logits_V in zip(going, logits_nV, strict=True):
                drafts[row].append(self.sampling.draft(logits_V, self.random[row]))
                known[row].append(drafts[row][-1].token)
                if depth == number:
                    lasting = max(0, len(tokens[row]) - number - starts[row])
                    handed[row] = self.settled(number, row, read[row], following[row], lasting)
                else:
                    handed[row] = following[row]
        for number, cache in enumerate(self.caches[: max(counts)], start=1):
            pairs = zip(cache.lengths, tokens, strict=True)
            cache.truncate([min(held, max(0, len(row) - number)) for held, row in pairs])
        return drafts

    def settled(
        self, number: int, row: int, read_nD: Tensor, following_nD: Tensor, lasting: int
    ) -> Tensor:
        """Let wait what modules will read again, of what this one has read and hands on.

        lasting: at how many positions what it has read rests on no draft, nor its token.
        Returns what the next depth reads besides.
        """
        waited = sum(map(len, self.waiting[number - 1][row]))
        self.waiting[number - 1][row] = [read_nD[lasting:waited]]
        if number == len(self.modules):
            return following_nD[-1:]
        self.waiting[number][row].append(following_nD[:lasting])
        return following_nD[lasting:]

    def run(
        self, number: int, read: list[Tensor], known: list[list[int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Module `number` on each row's states and the tokens so far ahead.

        Returns what the head reads and what the next draft is made from, (n, D) for each row.
        """
        cache, counts = self.caches[number - 1], [len(read_nD) for read_nD in read]
        starts = cache.lengths
        ahead = [
            row[start + number :][:n] for row, start, n in zip(known, starts, counts, strict=True)
        ]
        tokens_BT = padded(ahead, self.model)
        read_BTD = pad_sequence(read, batch_first=True)
        positions = new_positions(starts, tokens_BT, counts)
        left = self.model.mtp_step(self.modules[number - 1], read_BTD, tokens_BT, positions, cache)
        following_BTD = next_state(self.model.config.mtp, read_BTD, left)
        return cut(left.normed_BTD, counts), cut(following_BTD, counts)


def cut(state_BTD: Tensor, counts: list[int]) -> list[Tensor]:
    """The real positions of each row."""
    return [state_nD[:n] for state_nD, n in zip(state_BTD, counts, strict=True)]


def padded(rows: list[list[int]], model: Transformer) -> Tensor:
    """Rows of ids as one tensor, (B, T), padded on the right with id 0."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(model.embed.weight.device)
