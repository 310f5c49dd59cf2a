"""What bench measures of a model: loading, prefill and decoding, beside what bounds them.

Every figure is made of rounds, in which the model, its compiled twin, a peer, and the machine's own
best reading and multiplying take a step each. The tokens are random, others in every round, and the
same for all in a round.

Shapes: B rows, T tokens, R rounds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling import Cache, Transformer, compile_decoding
from moe import record_routing

from .contexts import fill_cache, random_tokens, spread_cache
from .floor import (
    Chosen,
    Machine,
    Speed,
    Work,
    count_bytes,
    count_cache_bytes,
    count_chosen_experts,
    count_operations,
    count_weight_bytes,
)
from .peer import PEER, Peer
from .timing import (
    LEAST_ROUNDS,
    Contender,
    Rounds,
    available_memory,
    clock,
    peak_memory,
    shorten,
    summarize,
    take_turns,
)

OURS, COMPILED = "abacus", "abacus, compiled"


def measure_loading(
    load: Callable[[], Transformer],
    load_peer: Callable[[torch.dtype], Peer] | None,
    device: torch.device,
) -> tuple[Transformer, Peer | None, dict[str, Any]]:
    """Load a model, a peer of it if asked, and copy the model's tensors in memory, in turns.

    The first load tells the peak of memory and brings the files into memory; it and one more round
    do not count. Returns the last model and peer with the figures.
    """
    held: dict[str, Any] = {}
    before = peak_memory(device)
    first = clock(device, lambda: held.update(model=load()))
    while_loading = peak_memory(device)

    def load_again(_: int) -> float:
        held.clear()
        return clock(device, lambda: held.update(model=load()))

    def copy(_: int) -> float:
        held.pop("peer", None)  # of the two models and the copy, two are in memory at once
        tensors = [*held["model"].parameters(), *held["model"].buffers()]
        return clock(device, lambda: [tensor.clone() for tensor in tensors])

    def load_peer_again(_: int) -> float:
        assert load_peer is not None
        held.pop("peer", None)
        return clock(device, lambda: held.update(peer=load_peer(held["model"].dtype)))

    contenders = {OURS: Contender(load_again), "copy": Contender(copy)}
    if load_peer is not None:
        contenders[PEER] = Contender(load_peer_again)
    rounds = take_turns(contenders, LEAST_ROUNDS, "loading in turns")
    if load_peer is not None and "peer" not in held:
        held["peer"] = load_peer(held["model"].dtype)
    figures = {
        "bytes": count_bytes(held["model"]),
        "first_seconds": shorten(first),
        "peak_before": before,
        "peak": while_loading,
        "runs": [describe_loading(rounds, name) for name in rounds],
    }
    return held["model"], held.get("peer"), figures


def describe_loading(rounds: Rounds, name: str) -> dict[str, Any]:
    row = {
        "name": name,
        "seconds": summarize(rounds.values(name)),
        "share_of_floor": shorten(rounds.median("copy") / rounds.median(name)),
        "steps": len(rounds.values(name)),
    }
    if name == OURS and PEER in rounds:
        row["ratio_to_transformers"] = summarize(rounds.ratios(name, PEER))
    return row


class Bench:
    """A model and what takes turns with it."""

    def __init__(
        self, model: Transformer, peer: Peer | None, steps: int, compiled: bool = False
    ) -> None:
        self.model, self.peer, self.steps = model, peer, steps
        self.machine = Machine(model.dtype, model.device)
        self.calls = {OURS: model.call}
        if compiled:
            compile_decoding(model)
            self.calls[COMPILED], model.call = model.call, self.calls[OURS]

    @torch.inference_mode()
    def measure_prefill(self, length: int) -> dict[str, Any]:
        """The figures of prefilling so many tokens of one row, with logits for the last one."""
        model = self.model
        tokens_RBT = random_tokens(model, self.steps, 1, length, seed=0)
        cache = model.make_cache(1, length)

        def step(i: int) -> float:
            cache.truncate(0)
            return clock(model.device, lambda: model(tokens_RBT[i], cache, 1))

        contenders = self.machine.contenders() | {OURS: Contender(step)}
        if self.peer is not None:
            contenders |= self.peer.prefill_contenders(tokens_RBT)
        rounds = take_turns(contenders, self.steps, f"prefill of {length}")
        cache.truncate(0)
        chosen = self.record_chosen_experts(tokens_RBT[:1], cache)
        operations = count_operations(model.config, 1, length, 0, with_head=1)
        work = Work(count_weight_bytes(model, length, chosen), 0, operations)
        return {"tokens": length} | describe_rounds(
            rounds, self.machine.speed(rounds), work, length
        )

    @torch.inference_mode()
    def measure_decoding(self, length: int, batches: Sequence[int]) -> list[dict[str, Any]]:
        """The figures of decoding after a context of this length, for each number of rows.

        Every step is cut off again, so that all start from the same length.
        """
        held = fill_cache(self.model, length)
        peer_held = None if self.peer is None else self.peer.fill_cache(self.model, length)
        return [self.measure_rows(held, peer_held, rows) for rows in batches]

    def measure_rows(self, held: Cache, peer_held: Any, rows: int) -> dict[str, Any]:
        """The figures of decoding so many rows, which all hold what the only row of `held` does.

        `skipped` says which runs would not fit into memory.
        """
        figures: dict[str, Any] = {"context": held.length, "batch": rows}
        if lack := self.find_lack(OURS, rows * held.nbytes):
            return figures | {"skipped": [lack]}
        cache = spread_cache(self.model, held, rows)
        tokens_RBT = random_tokens(self.model, self.steps, rows, 1, seed=rows)
        contenders = self.machine.contenders(products=LEAST_ROUNDS)
        contenders |= self.decoding_contenders(tokens_RBT, cache)
        if self.peer is not None:
            needed = rows * self.count_peer_bytes(held, peer_held)
            if lack := self.find_lack(PEER, needed):
                figures["skipped"] = [lack]
            else:
                contenders |= self.peer.decoding_contenders(tokens_RBT, peer_held)
        rounds = take_turns(contenders, self.steps, f"decoding {rows} after {held.length}")
        chosen = self.record_chosen_experts(tokens_RBT[:LEAST_ROUNDS], cache)
        work = Work(
            count_weight_bytes(self.model, rows, chosen),
            count_cache_bytes(cache, held.length),
            count_operations(self.model.config, rows, 1, held.length, with_head=1),
        )
        experts = {layer: shorten(mean) for layer, (mean, _) in chosen.items()}
        figures |= describe_rounds(rounds, self.machine.speed(rounds), work, rows)
        return figures | {"distinct_experts": experts}

    def find_lack(self, name: str, needed: int) -> str | None:
        """What is wrong if there are not so many bytes; None if there are, or nobody knows."""
        available = available_memory(self.model.device)
        if available is None or needed <= available:
            return None
        return f"{name}: takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"

    def count_peer_bytes(self, held: Cache, peer_held: Any) -> int:
        """About the bytes of a row in the peer, which may make every head's keys and values of a
        layer, and copy them."""
        assert self.peer is not None
        layers = self.model.config.layers
        width = max(getattr(layer.attention, "uncompressed_width", 0) for layer in layers)
        by_head = held.length * width * self.model.dtype.itemsize
        return self.peer.count_cache_bytes(peer_held) + 2 * by_head

    def decoding_contenders(self, tokens_RBT: Tensor, cache: Cache) -> dict[str, Contender]:
        """The model, and compiled if asked for and there is one row, decoding a token of each."""
        model, length = self.model, cache.length

        def contender(call: Callable[..., Any]) -> Contender:
            def step(i: int) -> float:
                model.call = call
                seconds = clock(model.device, lambda: model(tokens_RBT[i], cache))
                model.call = self.calls[OURS]
                cache.truncate(length)
                return seconds

            return Contender(step, least=self.steps)

        contenders = {
            name: contender(call)
            for name, call in self.calls.items()
            if name == OURS or tokens_RBT.shape[1] == 1
        }
        for name in contenders.keys() - {OURS}:
            contenders[name].step(0)  # compiles
        return contenders

    def record_chosen_experts(self, tokens_RBT: Tensor, cache: Cache) -> dict[int, Chosen]:
        """How many experts the steps after what the cache holds choose, from taking them again."""
        length = cache.length
        with record_routing(self.model) as routings:
            for tokens_BT in tokens_RBT:
                self.model(tokens_BT, cache, 1)
                cache.truncate(length)
        return count_chosen_experts(routings, len(tokens_RBT))


def describe_rounds(rounds: Rounds, speed: Speed, work: Work, tokens: int) -> dict[str, Any]:
    """Every run's figures, and the floor, of steps over so many tokens in all."""
    best = find_best_peer(rounds)
    shown = [name for name in rounds if name.startswith(OURS) or name == best]
    return {
        "runs": [describe_run(rounds, name, speed.seconds(work), tokens, best) for name in shown],
        "floor": describe_floor(speed, work, tokens),
        "tried": {
            name: shorten(seconds)
            for name, seconds in rounds.warm_up.items()
            if name.startswith(PEER)
        },
    }


def find_best_peer(rounds: Rounds) -> str | None:
    """The name of the fastest setting of the peer."""
    return min((name for name in rounds if name.startswith(PEER)), key=rounds.median, default=None)


def describe_run(
    rounds: Rounds, name: str, floor_seconds: float, tokens: int, best: str | None
) -> dict[str, Any]:
    """The figures of one contender, whose steps are over so many tokens in all."""
    row = {
        "name": name,
        "tokens_per_second": summarize([tokens / seconds for seconds in rounds.values(name)]),
        "share_of_floor": shorten(floor_seconds / rounds.median(name)),
        "steps": len(rounds.values(name)),
    }
    if name == COMPILED:
        row["ratio_to_abacus"] = summarize(rounds.ratios(name, OURS))
    if best is not None and name != best:
        row["ratio_to_transformers"] = summarize(rounds.ratios(name, best))
    return row


def describe_floor(speed: Speed, work: Work, tokens: int) -> dict[str, Any]:
    return {
        "tokens_per_second": shorten(tokens / speed.seconds(work)),
        "bound": speed.bound(work),
        "weight_bytes": round(work.weight_bytes),
        "cache_bytes": round(work.cache_bytes),
        "operations": round(work.operations),
        "read_bytes_per_second": shorten(speed.read_bytes),
        "operations_per_second": shorten(speed.operations),
    }
