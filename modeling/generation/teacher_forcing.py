"""The drafts of the MTP modules at every position of a given text, any number of tokens ahead.

The simple form of `drafting`: at each position, tokens are drafted as if the text ended there, but
each draft reads the tokens of the text instead of the drafts before it. So one pass over a text
measures the drafts of every depth, under any wiring, without generating text.

Shapes: B rows of a batch (1 here), T positions of the text, n positions at once, D model width.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import LayerCache
from ..config import MTPConfig
from ..model import States, Transformer
from ..mtp import first_state, next_state
from ..step import Step

POSITIONS_AT_ONCE = 64  # each needs a copy of the last module's cache


@torch.no_grad()
def forced_states(
    model: Transformer, states: States, tokens_BT: Tensor, depths: int, wiring: MTPConfig
) -> list[Tensor]:
    """The states that the head reads at each depth k = 1 to `depths`, (1, T - k, D).

    states: those of `Transformer.hidden_states` for tokens_BT, (1, T). wiring: its `input` and
    `carry` are used instead of the model's own. Position i of depth k reads tokens 0 to i + k and
    predicts token i + k + 1.
    """
    T, modules = tokens_BT.shape[1], model.mtp_modules
    caches = model.make_mtp_caches(1, T + depths, T + depths)
    normed_states, read_BnD = [], first_state(wiring, states)
    for k, (module, cache) in enumerate(zip(modules[:depths], caches, strict=False), start=1):
        next_Bn = tokens_BT[:, k:]
        read_BnD = read_BnD[:, : next_Bn.shape[1]]
        made = model.mtp_step(module, read_BnD, Step.after([0], next_Bn), cache)
        normed_states.append(made.normed_BTD)
        read_BnD = next_state(wiring, read_BnD, made)
    M = len(modules)
    if depths <= M:
        return normed_states
    # beyond the modules, the last one goes on from each position with its own state
    empty_nD = read_BnD[0, :0]
    further_states = [[empty_nD] for _ in range(depths - M)]  # by depth, in pieces of positions
    for start in range(0, read_BnD.shape[1], POSITIONS_AT_ONCE):
        positions = range(start, min(start + POSITIONS_AT_ONCE, read_BnD.shape[1]))
        cache = spread_row(caches[M - 1], [i + 1 for i in positions])
        read_n1D = read_BnD[0, positions.start : positions.stop, None]
        for k, depth_states in enumerate(further_states, start=M + 1):
            # past the end of the text any token will do: these states are cut off below
            next_n1 = tokens_BT[0, [min(i + k, T - 1) for i in positions]][:, None]
            made = model.mtp_step(modules[-1], read_n1D, Step.after(cache.lengths, next_n1), cache)
            depth_states.append(made.normed_BTD[:, 0])
            read_n1D = next_state(wiring, read_n1D, made)
    return normed_states + [
        torch.cat(depth_states)[None, : max(0, T - k)]
        for k, depth_states in enumerate(further_states, start=M + 1)
    ]


def spread_row(cache: LayerCache, lengths: Sequence[int]) -> LayerCache:
    """A copy with rows of these lengths: each holds the first positions of the only row."""
    (held,), (floor,), rows = cache.lengths, cache.floors, len(lengths)
    spread = copy.copy(cache)
    spread.tensors = [tensor.repeat_interleave(rows, dim=0) for tensor in cache.tensors]
    spread.shapes = [(rows, *shape[1:]) for shape in cache.shapes]
    spread.lengths, spread.floors = [held] * rows, [floor] * rows
    spread.truncate(lengths)
    return spread
