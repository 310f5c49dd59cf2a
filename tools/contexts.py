"""Caches that hold a context of some length, to measure steps after it.

Prefilling tens of thousands of tokens takes minutes, and the speed of a step does not depend on
the values in the cache. So of a long context only the first part is prefilled, and its entries are
repeated up to the length wanted: so values, and the experts that they lead to, stay plausible.

Shapes: B rows, T positions, S positions held.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from modeling import Cache, LayerCache, Transformer

LONGEST_PREFILL = 2048  # a longer context is filled from its first REPEATED tokens
REPEATED = 512


def random_tokens(model: Transformer, *shape: int, seed: int) -> Tensor:
    """Token ids of this shape, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)


def draw_context(model: Transformer, length: int) -> Tensor:
    """The tokens, (1, T), that a context of this length is filled from."""
    return random_tokens(model, 1, length if length <= LONGEST_PREFILL else REPEATED, seed=length)


def fill_cache(model: Transformer, length: int) -> Cache:
    """A cache of one row that holds `length` positions, with room for one more, which can be cut
    off again."""
    cache = model.make_cache(1, length + 1, 1)
    tokens_1T = draw_context(model, length)
    model.hidden_states(tokens_1T, cache)
    for layer in cache.layers:
        if layer.bytes_per_token:  # an entry for each position; others have a constant size
            for tensor in layer.tensors:
                repeat_entries(tensor[:, :length], tokens_1T.shape[1])
        grown = length - layer.lengths[0]
        layer.lengths, layer.floors = [length], [layer.floors[0] + grown]
    return cache


def repeat_entries(kept: Tensor, held: int) -> None:
    """Fill the entries after the first `held` ones, along axis 1, with copies of these."""
    for start in range(held, kept.shape[1], held):
        piece = kept[:, start : start + held]
        piece.copy_(kept[:, : piece.shape[1]])


def spread_cache(model: Transformer, cache: Cache, rows: int) -> Cache:
    """A cache with so many rows like the only one of `cache`."""
    spread = model.make_cache(rows, cache.layers[0].max_length, 1)
    for layer, source in pair_layers(spread, cache):
        layer.tensors = [tensor.repeat_interleave(rows, dim=0) for tensor in source.tensors]
        layer.lengths, layer.floors = source.lengths * rows, source.floors * rows
    return spread


def pair_layers(left: Cache, right: Cache) -> Iterator[tuple[LayerCache, LayerCache]]:
    return zip(left.layers, right.layers, strict=True)
