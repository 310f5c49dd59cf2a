"""The precision in which each tensor of a model may be stored. Its modules declare it:

  exact        names of a module's own tensors that stay in float32 at least
  quantizable  names of its own matrices that formats of 8 bits and fewer may hold

Linear layers inside attention and feed-forward are quantised too, unless they have a single row.
"""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from modeling import Transformer

from .config_file import CheckpointError
from .storage.shards import READABLE
from .storage.writing import FP8


class Precision:
    """Chooses the dtype in which each tensor of a model is stored, if `wanted` is requested.

    stacks: a stack of matrices may be stored in FP8, as our own format does.
    """

    def __init__(self, model: Transformer, wanted: torch.dtype | None, stacks: bool) -> None:
        check_dtype(wanted, (*READABLE.values(), FP8))
        self.wanted, self.stacks = wanted, stacks
        self.exact = find_exact(model)
        self.quantizable = find_quantizable(model) if wanted == FP8 else set()

    def choose(
        self, ours: str | None, published: str, shape: tuple[int, ...], own: torch.dtype
    ) -> torch.dtype:
        """The stored dtype of a tensor of dtype `own`; ours: None if the model does not have it."""
        if self.wanted is None or ours in self.exact or not own.is_floating_point:
            return own
        if self.wanted != FP8:
            return self.wanted
        if ours not in self.quantizable:
            return own
        if len(shape) != 2 and not self.stacks:
            raise CheckpointError(
                f"{published} holds the matrices of all experts of a layer in one tensor: FP8 "
                "blocks are defined for one matrix; choose another dtype"
            )
        return FP8


def check_dtype(dtype: torch.dtype | None, known: Collection[torch.dtype]) -> None:
    """Raise ValueError for a requested dtype that is not known."""
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype = {dtype!r}: expected None, {', '.join(map(str, known))}")


def read_names(path: str, module: nn.Module, attribute: str) -> tuple[str, ...]:
    """The names of its own tensors that a module declares; CheckpointError for anything else."""
    names = getattr(module, attribute, ())
    if not isinstance(names, tuple) or not all(hasattr(module, str(name)) for name in names):
        raise CheckpointError(
            f"{path}, a {type(module).__name__}: {attribute} = {names!r}, expected a tuple of the "
            "names of its own tensors"
        )
    return names


def find_exact(model: Transformer) -> set[str]:
    """The names of the tensors that keep float32 at least, whatever dtype is requested."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name in read_names(path, module, "exact")
    }


def find_quantizable(model: Transformer) -> set[str]:
    """The names of the matrices that may be quantised.

    Embedding, head, routers and MTP projections are not among them. Raises CheckpointError for a
    module that owns matrices and does not declare which of them may be.
    """
    found = set()
    for path, module in list_sublayer_modules(model):
        if isinstance(module, nn.Linear):
            found |= {f"{path}.weight"} if module.weight.shape[0] > 1 else set()
            continue
        own = [n for n, p in module.named_parameters(recurse=False) if p.dim() > 1]
        if own and not hasattr(module, "quantizable"):
            raise CheckpointError(
                f"{path}, a {type(module).__name__}, does not say whether {', '.join(own)} may be "
                "quantised: give it an attribute quantizable, a tuple of names"
            )
        found |= {f"{path}.{name}" for name in read_names(path, module, "quantizable")}
    return found


def list_sublayer_modules(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """Every module of every attention and feed-forward, with its path."""
    blocks = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    numbers = zip(model.mtp, model.mtp_modules, strict=True)
    blocks |= {f"mtp.{number}.block": module.block for number, module in numbers}
    for path, block in blocks.items():
        for part in ("attention", "feed_forward"):
            yield from getattr(block, part).named_modules(prefix=f"{path}.{part}")
