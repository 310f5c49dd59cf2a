"""Recording what happens inside a model: attention weights, and the residual stream.

Both give {layer number: what was recorded}, MTP modules after the main layers, the tokens of all
forwards in order; see `record_routing` for routers. Recording changes no result, and gradients flow
through what is recorded. To change what happens, register torch's own hooks on the modules; hooks
that are there before the recording begins show in it.

Shapes: B batch, T tokens of all forwards, S positions, H heads, D model width.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from moe import Recorded, in_backward, keep_hooks, layer_numbers

from .attention.weights import AttentionWeights
from .model import Block
from .step import Step

Part = TypeVar("Part")


class RecordedLayers(Recorded[Part]):
    """What the layers of one model did. `modules`: {layer number: the module that was recorded}."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: dict[int, nn.Module] = {}
        self.gradients: dict[int, bool] = {}  # whether what was kept last has one

    def keep(self, layer: int, module: nn.Module, part: Part, has_gradient: bool) -> None:
        """Keep what a module did in a forward; not when a backward runs it again.

        Raises ValueError if another module was recorded under this number.
        """
        if in_backward():
            self.tell_lost_gradient(layer)
            return
        if self.modules.setdefault(layer, module) is not module:
            raise ValueError(f"two modules ran as layer {layer}: record one model at a time")
        self.gradients[layer] = has_gradient
        self.parts.setdefault(layer, []).append(part)

    def tell_lost_gradient(self, layer: int) -> None:
        """Warn, in a backward through a layer, if what was recorded there has no gradient."""
        if not self.gradients.get(layer, True):
            problem = "under reentrant checkpointing, what is recorded has no gradient"
            warnings.warn(f"{problem}: checkpoint with use_reentrant=False", stacklevel=2)


class RecordedAttention(RecordedLayers[AttentionWeights]):
    """{layer number: AttentionWeights}."""

    def join(self, parts: list[AttentionWeights]) -> AttentionWeights:
        weights, sinks = [part.weights_BHTS for part in parts], [part.sinks_BHT for part in parts]
        check_rows(weights)
        S = max(weights_BHTS.shape[-1] for weights_BHTS in weights)
        padded = [F.pad(weights_BHTS, (0, S - weights_BHTS.shape[-1])) for weights_BHTS in weights]
        with_sinks = [sinks_BHT for sinks_BHT in sinks if sinks_BHT is not None]
        sinks_BHT = torch.cat(with_sinks, dim=2) if with_sinks else None
        positions_BT = torch.cat([cast(Tensor, part.positions_BT) for part in parts], dim=1)
        return AttentionWeights(torch.cat(padded, dim=2), sinks_BHT, positions_BT)

    def begin(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hook before an attention: ask for its weights, as other recordings may have done."""
        shared = find_step(args, kwargs).shared
        if shared.get(AttentionWeights) != []:
            shared[AttentionWeights] = []
        self.asked = shared[AttentionWeights]

    def end(
        self, layer: int, attention: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> None:
        """The hook behind an attention: keep the weights that it reported.

        Where there are gradients, the step keeps the question: when activation checkpointing runs
        the layer again, perhaps after the recording, it must compute what it computed before.
        """
        reported = list(self.asked)
        if not output.requires_grad:
            find_step(args, kwargs).shared.pop(AttentionWeights, None)
        if len(reported) == 1:
            weights = reported[0]
            self.keep(layer, attention, weights, weights.weights_BHTS.requires_grad)
        elif reported or getattr(attention, "has_attention_weights", True):
            raise ValueError(
                f"the attention of layer {layer}, a {type(attention).__name__}, reported weights "
                f"{len(reported)} times: it must call `report_weights` once in a forward, or say "
                "that it has none by has_attention_weights = False"
            )


class LayerStates(NamedTuple):
    """The residual stream around the sublayers of one layer, (B, T, D) each."""

    before_BTD: Tensor  # what enters the layer
    between_BTD: Tensor  # after attention
    after_BTD: Tensor  # after the feed-forward layer: what enters the next one


class RecordedStates(RecordedLayers[LayerStates]):
    """{layer number: LayerStates}."""

    def join(self, parts: list[LayerStates]) -> LayerStates:
        check_rows([part.before_BTD for part in parts])
        return LayerStates(*(torch.cat(states, dim=1) for states in zip(*parts, strict=True)))

    def watch(self, layer: int, block: Block) -> list[RemovableHandle]:
        """Hooks on a block that keep the states of its forwards."""
        states: list[Tensor] = []

        def begin(module: nn.Module, inputs: tuple) -> None:
            states[:] = [inputs[0]]

        def pass_between(module: nn.Module, inputs: tuple) -> None:
            states.append(inputs[0])
            if in_backward():
                self.tell_lost_gradient(layer)

        def end(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            before_BTD, between_BTD = states
            made = LayerStates(before_BTD, between_BTD, output)
            self.keep(layer, block, made, between_BTD.requires_grad)

        return [
            block.register_forward_pre_hook(begin),
            block.feed_forward_norm.register_forward_pre_hook(pass_between),
            block.register_forward_hook(end),
        ]


def find_step(args: tuple, kwargs: dict) -> Step:
    """The step among the arguments of an attention."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Step))


def check_rows(parts: list[Tensor]) -> None:
    """Raise ValueError unless all parts have the same number of rows."""
    rows = sorted({len(part) for part in parts})
    if len(rows) > 1:
        raise ValueError(f"forwards over {rows} rows cannot be joined: record each by itself")


@contextmanager
def record_attention(model: nn.Module) -> Iterator[RecordedAttention]:
    """Record the weights of every attention, for the length of a `with` block.

    {layer: AttentionWeights}: column s of `weights_BHTS` is position s of the row, whatever the
    cache keeps where. Queries stand in the order of the forwards, drafts that were rejected
    included: `positions_BT` says where each stands. Queries that are padding have zeros.

    The weights come from the plain twin of the attention, beside the fast kernel, so they need
    memory for B x H x T x S numbers a layer.
    Raises ValueError in a forward for an attention that reports no weights, unless it says that it
    has none.
    """
    recorded, hooks, seen = RecordedAttention(), [], set[nn.Module]()
    for module, layer in layer_numbers(model).items():
        if module not in seen and is_attention(module):
            seen |= set(module.modules())  # of a wrapped attention, the wrapper stands for both
            end = partial(recorded.end, layer)
            hooks.append(module.register_forward_pre_hook(recorded.begin, with_kwargs=True))
            hooks.append(module.register_forward_hook(end, with_kwargs=True))
    with keep_hooks(hooks):
        yield recorded


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an `Attention`; a `Transformer` makes caches too, of all its layers."""
    return hasattr(module, "make_cache") and not hasattr(module, "numbered_layers")


@contextmanager
def record_states(model: nn.Module) -> Iterator[RecordedStates]:
    """Record the residual stream after every sublayer, for the length of a `with` block.

    {layer: LayerStates}: as it enters the layer, after attention, and after the feed-forward layer.
    `recorded[0].before_BTD` is the embedding. Padding is recorded too. Of a forward that fails, the
    layers that ran are recorded.
    """
    recorded, hooks = RecordedStates(), list[RemovableHandle]()
    for module, layer in layer_numbers(model).items():
        if isinstance(module, Block):
            hooks += recorded.watch(layer, module)
    with keep_hooks(hooks):
        yield recorded
