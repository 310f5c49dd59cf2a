"""Drafting: the MTP modules guess the next tokens of every row of a batch.

Shapes: B rows, T positions (of the longest row), n positions of one row, D model width,
V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .model import Transformer, new_positions


class Drafter:
    """Guesses tokens ahead with the MTP modules, each with its own cache.

    Module j's entry for position i is made from the previous module's state there and token
    i + j. With n known tokens its cache is therefore valid up to position n - j, exclusive; what
    rests on drafted tokens is cut off again. The previous module's states for the positions that
    it could not take yet wait in `waiting`. Drafts beyond the number of modules come from the
    last one, fed its own state and draft.
    """

    def __init__(self, model: Transformer, batch_size: int, capacity: int, rollback: int) -> None:
        self.model = model
        self.modules = list(model.mtp.values())
        self.caches = model.make_mtp_caches(batch_size, capacity, rollback)
        nothing = model.embed.weight.new_zeros(0, model.config.d_model)
        self.waiting = [[nothing] * batch_size for _ in self.modules]  # per module, per row

    def draft(
        self, confirmed: list[Tensor], tokens: list[list[int]], count: int
    ) -> list[list[int]]:
        """`count` drafted tokens for each row that has new states; none for the others.

        confirmed: per row the main model's (n, D) new states, the last one at the position before
        the newest of `tokens`. `count` may fall from round to round and must not rise.
        """
        rows, known = range(len(tokens)), [list(row) for row in tokens]
        states, left_over = confirmed, list(self.waiting)
        for depth in range(1, count + 1):
            number = min(depth, len(self.modules))
            if depth == number:
                states = [
                    torch.cat([waiting, new]) if len(new) else new
                    for waiting, new in zip(self.waiting[depth - 1], states, strict=True)
                ]
            else:
                states = [states_nD[-1:] for states_nD in states]
            starts = self.caches[number - 1].lengths
            states = self.run(number, states, known)
            if depth < len(self.modules):
                left_over[depth] = [
                    states[row][untaken(depth, starts[row], len(tokens[row]))] for row in rows
                ]
            guessing = [row for row in rows if len(states[row])]
            logits_nV = self.model.logits(torch.stack([states[row][-1] for row in guessing]))
            for row, token in zip(guessing, logits_nV.argmax(dim=-1).tolist(), strict=True):
                known[row].append(token)
        self.waiting = left_over
        for number, cache in enumerate(self.caches[:count], start=1):
            lengths = zip(cache.lengths, tokens, strict=True)
            cache.truncate([min(held, max(0, len(row) - number)) for held, row in lengths])
        return [known[row][len(tokens[row]) :] for row in rows]

    def run(self, number: int, states: list[Tensor], known: list[list[int]]) -> list[Tensor]:
        """Module `number` on each row's states and the tokens that far ahead; (n, D) each."""
        cache, module = self.caches[number - 1], self.modules[number - 1]
        starts, counts = cache.lengths, [len(states_nD) for states_nD in states]
        ahead = [
            row[start + number :][:n] for row, start, n in zip(known, starts, counts, strict=True)
        ]
        tokens_BT = padded(ahead, self.model)
        state_BTD = pad_sequence(states, batch_first=True)
        positions = new_positions(starts, tokens_BT, counts)
        state_BTD = module(state_BTD, self.model.embedded(tokens_BT), positions, cache)
        return [state_nD[:n] for state_nD, n in zip(state_BTD, counts, strict=True)]


def untaken(number: int, start: int, num_known: int) -> slice:
    """Which of module `number`'s new states, the first at `start`, the next one cannot take yet."""
    return slice(max(0, num_known - number - 1) - start, max(0, num_known - number) - start)


def padded(rows: list[list[int]], model: Transformer) -> Tensor:
    """Rows of ids as one tensor, (B, T), padded on the right with id 0."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(model.embed.weight.device)
