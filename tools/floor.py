"""The floor under a step's time: the bytes and operations it needs, at this machine's best speed.

The best speed is measured: torch reads a large buffer, and multiplies two large matrices. A step
that reads every weight it uses once at this speed, and multiplies at this speed, is at the floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints import build_on_meta
from modeling import Cache, LayerConfig, ModelConfig, Transformer
from moe import Recorded, Routing

from .describe import count_parameters
from .timing import Contender, Rounds, clock

READ_BYTES = 1 << 30  # far larger than any cache
PRODUCT_WIDTH = 4096


@dataclass(frozen=True)
class Work:
    """What a step needs at the least."""

    weight_bytes: float
    cache_bytes: float
    operations: float

    @property
    def nbytes(self) -> float:
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Speed:
    """What the machine can do at best, per second."""

    read_bytes: float
    operations: float

    def seconds(self, work: Work) -> float:
        """The floor: the longer of reading and multiplying, which can overlap."""
        return max(work.nbytes / self.read_bytes, work.operations / self.operations)

    def bound(self, work: Work) -> str:
        reading = work.nbytes / self.read_bytes >= work.operations / self.operations
        return "reading" if reading else "products"


class Machine:
    """The operations whose speed is the machine's best. Holds READ_BYTES and three matrices."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        width, self.device = PRODUCT_WIDTH, device
        self.buffer = torch.ones(READ_BYTES // 4, device=device)
        self.left, self.right = torch.ones(2, width, width, dtype=dtype, device=device)

    def contenders(self, products: int | None = None) -> dict[str, Contender]:
        """Reading and multiplying, to be timed beside steps; products: at most so many."""
        multiply = partial(F.linear, self.left, self.right)
        return {
            "read": Contender(lambda _: clock(self.device, self.buffer.sum)),
            "product": Contender(lambda _: clock(self.device, multiply), most=products),
        }

    def speed(self, rounds: Rounds) -> Speed:
        """The best speed during some rounds, from their medians."""
        operations = 2 * len(self.left) ** 3
        return Speed(
            self.buffer.nbytes / rounds.median("read"), operations / rounds.median("product")
        )


def count_bytes(module: nn.Module) -> int:
    """Bytes of the tensors that a module holds, as they are stored, shared ones once."""
    tensors: dict[int, Tensor] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


class Chosen(NamedTuple):
    """How many distinct experts the tokens of a step choose, on average, and of how many."""

    experts: float
    of: int


def count_chosen_experts(routings: Recorded[Routing], steps: int) -> dict[int, Chosen]:
    """What is chosen in each layer that routes, of so many recorded steps of equal size."""
    chosen = {}
    for layer, routing in routings.items():
        num_experts = routing.scores_NE.shape[1]
        of_steps = routing.experts_NK.reshape(steps, -1)
        distinct = [e[e < num_experts].unique().numel() for e in of_steps]  # E: an empty slot
        chosen[layer] = Chosen(sum(distinct) / steps, num_experts)
    return chosen


def count_weight_bytes(model: Transformer, rows: int, chosen: Mapping[int, Chosen]) -> float:
    """Bytes of the weights that a step over one token of each row reads, without MTP modules.

    Of routed experts (`feed_forward.experts`) the chosen ones are read, and of an embedding that is
    not the head as well, a row for each token. Everything else is read whole. Experts that hold no
    tensors, since they stay in a file, count with the bytes they would have in the model's dtype.
    """
    total = float(count_bytes(model) - count_bytes(model.mtp))
    if not model.config.tied_embeddings:
        total -= count_bytes(model.embed) * (1 - min(1, rows / model.config.vocab_size))
    planned = build_on_meta(model.config).to(model.dtype)
    for layer, (number, of) in chosen.items():
        experts = find_experts(model, layer)
        if experts is not None:
            held = count_bytes(experts)
            stored = held or count_bytes(cast(nn.Module, find_experts(planned, layer)))
            total += stored * number / of - held
    return total


def find_experts(model: Transformer, layer: int) -> nn.Module | None:
    """The routed experts of a layer, if they stand where ours do."""
    return getattr(cast(Any, model.numbered_layers[layer]).feed_forward, "experts", None)


def count_cache_bytes(cache: Cache, length: int) -> int:
    """Bytes that a step reads of a cache whose rows all hold so many positions."""
    rows = len(cache.lengths)
    return rows * (cache.bytes_per_token * length + cache.constant_bytes)


def count_operations(config: ModelConfig, rows: int, new: int, held: int, with_head: int) -> float:
    """Multiplications and additions of a forward over `new` tokens of each row after `held` ones.

    with_head: the positions of a row whose logits are computed. Of attention, the products of
    scores and values count, at the widths of every head's keys and values; a kind of attention
    without `uncompressed_width` counts as its weights alone.
    """
    active = count_parameters(build_on_meta(config))["active_without_embedding"]
    head = config.vocab_size * config.d_model
    of_attention = sum(count_attention_operations(layer, new, held) for layer in config.layers)
    return float(rows * (2 * (active - head) * new + 2 * head * with_head + of_attention))


def count_training_operations(config: ModelConfig, rows: int, length: int, mtp: bool) -> float:
    """Operations of a step with the next-token loss, and with MTP losses if `mtp`: three forwards.

    A backward computes two products for each of the forward: the gradients of both factors.
    """
    forward = count_operations(config, rows, length, 0, with_head=length)
    modules = build_on_meta(config).mtp_modules if mtp else []
    for depth, (module, layer) in enumerate(zip(modules, config.mtp.blocks, strict=False), 1):
        block, new = cast(Any, module.block), length - depth
        used = sum(p.numel() for part in (module.projection, block) for p in part.parameters())
        used -= getattr(block.feed_forward, "idle_parameters", 0)
        used += config.vocab_size * config.d_model
        forward += rows * (2 * used * new + count_attention_operations(layer, new, 0))
    return 3 * forward


def count_attention_operations(layer: LayerConfig, new: int, held: int) -> int:
    width = getattr(layer.attention, "uncompressed_width", 0)
    return 2 * width * count_pairs(new, held, getattr(layer.attention, "window", None))


def count_pairs(new: int, held: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, of `new` positions after `held` ones."""
    seen = range(held + 1, held + new + 1)
    return sum(seen) if window is None else sum(min(count, window) for count in seen)
