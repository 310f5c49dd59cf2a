"""Watching a model route: collect the `Routing` of every sparse layer, without touching it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .routing import Router, Routing


class RecordedRoutings(Mapping[int, Routing]):
    """{layer index: Routing}; the tokens of all forwards so far, in the order they were routed."""

    def __init__(self) -> None:
        self._parts: dict[int, list[Routing]] = {}

    def add(self, layer: int, routing: Routing) -> None:
        self._parts.setdefault(layer, []).append(routing)

    def __getitem__(self, layer: int) -> Routing:
        parts = self._parts[layer]
        if len(parts) > 1:
            fields = [vars(part).values() for part in parts]
            parts[:] = [Routing(*(torch.cat(tensors) for tensors in zip(*fields, strict=True)))]
        return parts[0]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._parts))

    def __len__(self) -> int:
        return len(self._parts)


def routers(model: nn.Module) -> dict[int, Router]:
    """{layer index: router}. The index is the first number in the router's path, 0 without one.

    `layers.3.feed_forward.router` belongs to layer 3. Raises ValueError if two have the same.
    """
    found: dict[int, Router] = {}
    for path, module in model.named_modules():
        if isinstance(module, Router):
            layer = next((int(part) for part in path.split(".") if part.isdigit()), 0)
            if layer in found:
                raise ValueError(f"two routers belong to layer {layer}, the second is {path}")
            found[layer] = module
    return found


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RecordedRoutings]:
    """Record the routing of every `Router` in `model` for the length of a `with` block.

    Gradients flow through what is recorded.
    """
    recorded = RecordedRoutings()

    def record_as(layer: int):
        return lambda router, inputs, routing: recorded.add(layer, routing)

    hooks = [
        router.register_forward_hook(record_as(layer)) for layer, router in routers(model).items()
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
