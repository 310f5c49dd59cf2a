"""Recording: the `Routing` of every sparse layer, collected by hooks."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .routing import Router, Routing

Part = TypeVar("Part")


class Recorded(Mapping[int, Part]):
    """{layer number: what was recorded there}: of all forwards so far, joined in their order."""

    def __init__(self) -> None:
        self.parts: dict[int, list[Part]] = {}

    def join(self, parts: list[Part]) -> Part:
        raise NotImplementedError

    def __getitem__(self, layer: int) -> Part:
        if len(parts := self.parts[layer]) > 1:
            parts[:] = [self.join(parts)]
        return parts[0]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.parts))

    def __len__(self) -> int:
        return len(self.parts)


class RecordedRoutings(Recorded[Routing]):
    """{layer number: Routing}, and in `routers` {layer number: the module that routed}."""

    def __init__(self) -> None:
        super().__init__()
        self.routers: dict[int, Router] = {}

    def join(self, parts: list[Routing]) -> Routing:
        tensors = zip(*(vars(part).values() for part in parts), strict=True)
        return Routing(*map(torch.cat, tensors))

    def add(self, layer: int, router: Any, inputs: tuple, output: object) -> None:
        """The forward hook of every module: keep the output if it is a `Routing`."""
        parts = self.parts.get(layer, [])
        if not isinstance(output, Routing) or (parts and parts[-1] is output):
            return  # not a routing, or one that the router in this wrapper has just returned
        if in_backward():
            if parts and not parts[-1].weights_NK.requires_grad:
                problem = "under reentrant checkpointing, recorded routings have no gradient"
                warnings.warn(f"{problem}: checkpoint with use_reentrant=False", stacklevel=2)
            return
        if self.routers.setdefault(layer, router) is not router:
            raise ValueError(f"two routers routed in layer {layer}: record one model at a time")
        self.parts.setdefault(layer, []).append(output)


def in_backward() -> bool:
    """Whether activation checkpointing is running layers again, for a backward."""
    return torch._C._current_graph_task_id() != -1


def layer_numbers(model: nn.Module) -> dict[nn.Module, int]:
    """{module: the number of its layer}. A model that has `numbered_layers` says the numbers.

    Elsewhere it is the first number in a module's path (`2.router` belongs to layer 2), else 0.
    """
    numbers = {}
    for path, module in model.named_modules():
        numbers[module] = next((int(part) for part in path.split(".") if part.isdigit()), 0)
    for module in model.modules():
        for number, layer in getattr(module, "numbered_layers", {}).items():
            numbers |= dict.fromkeys(layer.modules(), number)
    return numbers


def routers(model: nn.Module) -> dict[int, Router]:
    """{layer number: router}. Raises ValueError if two routers belong to one layer."""
    found: dict[int, Router] = {}
    for module, layer in layer_numbers(model).items():
        if isinstance(module, Router) and found.setdefault(layer, module) is not module:
            raise ValueError(f"two routers belong to layer {layer}: give each a layer of its own")
    return found


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RecordedRoutings]:
    """Record every `Routing` that a module of `model` returns, for the length of a `with` block.

    So a router is recorded wherever it stands, wrapped or replaced, if it runs. Gradients flow
    through what is recorded. Under activation checkpointing each token is recorded once; compiled
    code, which would call no hooks, runs uncompiled inside the block.
    Raises ValueError in a forward where two routers route in one layer.
    """
    recorded = RecordedRoutings()
    numbers = layer_numbers(model).items()
    with keep_hooks(m.register_forward_hook(partial(recorded.add, layer)) for m, layer in numbers):
        yield recorded


@contextmanager
def keep_hooks(made: Iterable[RemovableHandle]) -> Iterator[None]:
    """Run without compiled code, which calls no hooks, and remove these hooks at the end."""
    hooks = list(made)
    compiled = "torch._dynamo" in sys.modules  # importing it takes seconds
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()
