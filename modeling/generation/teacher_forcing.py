"""What the MTP modules draft at every position of a given text, any number of tokens ahead.

The plain twin of `drafting`: at each position the drafts are made as if the text ended there, and
every draft but the last is replaced by what the text goes on with. So one pass over a text tells
how good the drafts of each depth are, under any wiring, without generating anything.

Shapes: B rows of a batch (1 here), T positions of the text, n positions at once, D model width.
"""

import torch
from torch import Tensor

from ..config import MTPConfig
from ..model import States, Transformer
from ..mtp import first_state, next_state
from ..step import Step

AT_ONCE = 64  # positions, each with a copy of the last module's cache


@torch.no_grad()
def forced_states(
    model: Transformer, states: States, tokens_BT: Tensor, depths: int, wiring: MTPConfig
) -> list[Tensor]:
    """What the head reads at each depth k = 1 to `depths`, (1, T - k, D).

    states: of `Transformer.hidden_states` for tokens_BT, (1, T). wiring: takes the place of the
    model's own `input` and `carry`. Position i knows tokens 0 to i + k and guesses the one after.
    """
    T, modules = tokens_BT.shape[1], model.mtp_modules
    caches = model.make_mtp_caches(1, T + depths, T + depths)
    found, read_BnD = [], first_state(wiring, states)
    for k, (module, cache) in enumerate(zip(modules[:depths], caches, strict=False), start=1):
        next_Bn = tokens_BT[:, k:]
        read_BnD = read_BnD[:, : next_Bn.shape[1]]
        made = model.mtp_step(module, read_BnD, Step.after([0], next_Bn), cache)
        found.append(made.normed_BTD)
        read_BnD = next_state(wiring, read_BnD, made)
    M = len(modules)
    if depths <= M:
        return found
    nothing_nD = read_BnD[0, :0]
    later = [[nothing_nD] for _ in range(depths - M)]
    for start in range(0, read_BnD.shape[1], AT_ONCE):
        places = range(start, min(start + AT_ONCE, read_BnD.shape[1]))
        cache = caches[M - 1].spread([i + 1 for i in places])
        read_n1D = read_BnD[0, places.start : places.stop, None]
        for k, depth_states in enumerate(later, start=M + 1):
            # beyond the text's end anything will do: it is cut off below
            next_n1 = tokens_BT[0, [min(i + k, T - 1) for i in places]][:, None]
            made = model.mtp_step(modules[-1], read_n1D, Step.after(cache.lengths, next_n1), cache)
            depth_states.append(made.normed_BTD[:, 0])
            read_n1D = next_state(wiring, read_n1D, made)
    return found + [
        torch.cat(depth_states)[None, : max(0, T - k)]
        for k, depth_states in enumerate(later, start=M + 1)
    ]
