"""Where the time of a forward goes: to attention, router, experts, other feed-forward parts, head.

A module counts by its place in the model, so parts from outside the project count like ours. Hooks
around the modules take the time, and mark the modules in the traces.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.profiler import profile, record_function

from modeling import Transformer
from moe import keep_hooks

from .contexts import fill_cache, random_tokens
from .timing import clock, shorten, synchronize

ATTENTION, ROUTER, EXPERTS, HEAD, REST = "attention", "router", "experts", "head", "rest"
DENSE = "shared and dense feed-forward"
DECODING_STEPS = 4


def find_mechanisms(model: Transformer) -> dict[nn.Module, str]:
    """{module: what it is}, of modules that do not contain each other."""
    found: dict[nn.Module, str] = {model.head: HEAD}
    for layer in model.layers:
        block = cast(Any, layer)
        parts = dict(block.feed_forward.named_children())
        found[block.attention] = ATTENTION
        if ROUTER in parts and EXPERTS in parts:
            for name, part in parts.items():
                found[part] = name if name in (ROUTER, EXPERTS) else DENSE
        else:
            found[block.feed_forward] = DENSE
    return found


@contextmanager
def time_mechanisms(model: Transformer) -> Iterator[dict[str, float]]:
    """Collect the seconds of each mechanism in the forwards of a `with` block."""
    seconds: dict[str, float] = defaultdict(float)

    def hook(module: nn.Module, name: str) -> Iterator[Any]:
        running: list[tuple[record_function, float]] = []

        def enter(*_: Any) -> None:
            synchronize(model.device)
            marked = record_function(name)
            marked.__enter__()
            running.append((marked, time.perf_counter()))

        def leave(*_: Any) -> None:
            synchronize(model.device)
            marked, started = running.pop()
            seconds[name] += time.perf_counter() - started
            marked.__exit__(None, None, None)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    hooks = (made for found in find_mechanisms(model).items() for made in hook(*found))
    with keep_hooks(hooks):
        yield seconds


@torch.inference_mode()
def profile_prefill(model: Transformer, length: int, folder: Path) -> dict[str, Any]:
    """Where the time of one prefill goes; its trace is `folder`/prefill-LENGTH.json."""
    cache = model.make_cache(1, length)
    tokens_BT = random_tokens(model, 1, length, seed=0)

    def prefill() -> None:
        cache.truncate(0)
        model(tokens_BT, cache, 1)

    file = folder / f"prefill-{length}.json"
    return {"phase": "prefill", "tokens": length} | profile_forwards(model, prefill, file)


@torch.inference_mode()
def profile_decoding(model: Transformer, length: int, folder: Path) -> dict[str, Any]:
    """Where the time of DECODING_STEPS steps of one row goes, after a context of this length; their
    trace is `folder`/decode-LENGTH.json."""
    cache = fill_cache(model, length)
    tokens_RBT = random_tokens(model, DECODING_STEPS, 1, 1, seed=0)

    def decode() -> None:
        for tokens_BT in tokens_RBT:
            model(tokens_BT, cache)
            cache.truncate(length)

    sizes = {"phase": "decode", "context": length, "steps": DECODING_STEPS}
    return sizes | profile_forwards(model, decode, folder / f"decode-{length}.json")


def profile_forwards(model: Transformer, run: Callable[[], None], file: Path) -> dict[str, Any]:
    """The seconds of a run with and without hooks, and of each mechanism; writes a Chrome trace."""
    run()
    unwatched = clock(model.device, run)
    with time_mechanisms(model) as seconds:
        watched = clock(model.device, run)
        mechanisms = {name: seconds[name] for name in (ATTENTION, ROUTER, EXPERTS, DENSE, HEAD)}
        write_trace(run, file)
    mechanisms[REST] = watched - sum(mechanisms.values())
    return {
        "seconds": shorten(watched),
        "seconds_without_hooks": shorten(unwatched),
        "mechanisms": {name: shorten(value) for name, value in mechanisms.items()},
        "trace": str(file),
    }


def write_trace(run: Callable[[], None], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with profile() as profiler:
        run()
    partial = file.with_name(f"{file.stem}.new.json")
    profiler.export_chrome_trace(str(partial))
    partial.replace(file)
