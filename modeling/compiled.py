"""Decoding with compiled blocks: one row's products are sums, which read weights at full speed.

torch's products of one row with a matrix are bound by instructions on many CPUs, not by memory.
torch's compiler fuses a sum of products into one pass over the matrix, also where experts are
chosen by index, and whatever surrounds it into the same pass. Forwards over several tokens are
bound by arithmetic, where torch's own products are best: they run as if nothing were compiled.

Shapes: ... any leading dimensions, I and O input and output width of one product, H heads.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from moe import product_of_rows

from .model import Transformer


def compile_decoding(model: Transformer) -> None:
    """Compile the model's blocks and heads, in place, for forwards over one token of one row.

    Each kind of block is compiled when it first runs (some seconds; torch keeps the result on disk)
    and needs the C++ compiler that torch finds. Where a hook acts, gradients are wanted or there is
    more than one token, the modules are called as before. Results differ by rounding alone.
    """
    model.call = CompiledCall(model.call)


class CompiledCall:
    """Calls a module: compiled where its input is one row and nobody watches, or by `plain`."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.compiled = torch.compile(run_module, backend=compile_row_products, dynamic=True)

    def __call__(self, module: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        one_row = x.shape[:-1].numel() == 1
        pays = one_row and not torch.is_grad_enabled() and not is_watched(module)
        return (self.compiled if pays else self.plain)(module, x, *rest)

    def __reduce__(self) -> tuple:
        return CompiledCall, (self.plain,)  # what is compiled stays out of copies and files


def run_module(module: nn.Module, *inputs: Any) -> Tensor:
    return module(*inputs)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook acts on the module or inside it: compiled code would not notice a new one."""
    own = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return own or torch_module._has_any_global_hook()


def compile_row_products(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: products of one row become sums, and the rest is torch's."""
    for node in graph.graph.nodes:
        node.target = REPLACEMENTS.get(node.target, node.target)
    graph.recompile()
    return torch._inductor.compile(graph, inputs)


def multiply_by_linear(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """F.linear, (..., I) -> (..., O), where one row is a sum."""
    if x_I.shape[:-1].numel() != 1:
        return F.linear(x_I, weight_OI, bias_O)
    y_O = product_of_rows(x_I.reshape(1, -1), weight_OI[None]).view(*x_I.shape[:-1], -1)
    return y_O if bias_O is None else y_O + bias_O


def multiply_matrices(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, where heads, (H, O, I) @ (H, I, O), of one row or column are sums."""
    if left.dim() == right.dim() == 3 and left.shape[1] == 1:
        return product_of_rows(left.squeeze(1), right.mT)[:, None]
    if left.dim() == right.dim() == 3 and right.shape[2] == 1:
        return product_of_rows(right.squeeze(2), left)[..., None]
    return left @ right


REPLACEMENTS = {F.linear: multiply_by_linear, operator.matmul: multiply_matrices}
