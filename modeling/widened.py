"""Products of 16-bit numbers in float32, for CPUs that have no instructions for such numbers.

There torch multiplies many rows of bfloat16 at a fifth or less of its speed in float32. So matrices
are widened, a piece at a time, which holds them once; sums are rounded to 16 bits once. A few rows
are bound by reading the matrix, and torch's own products read it as it is.

Shapes: ... any leading dimensions, N rows, I and O input and output width of a product, o rows of a
piece of a matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .model import Transformer
from .products import FAST_PRODUCTS

LEAST_ROWS = 16  # from which on widening pays, measured on two cores with AVX2
PIECE = 2**20  # numbers of a matrix that are widened at a time: 4 MiB


def widen_products(model: Transformer) -> None:
    """Let blocks and heads multiply in float32 where this CPU has no instructions for bfloat16.

    Elsewhere, with gradients, and inside what torch's compiler traces, nothing changes.
    """
    if torch.bfloat16 not in FAST_PRODUCTS:
        model.call = WidenedCall()


class WidenedCall:
    """Calls a module with `WidenedProducts` on."""

    def __call__(self, module: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nn.Module.__call__(module, x, *rest)
        with WidenedProducts():
            return nn.Module.__call__(module, x, *rest)


class WidenedProducts(TorchFunctionMode):
    """While it is on, `F.linear` is `multiply_widened` where that pays."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is F.linear and not kwargs and widening_pays(*args):
            return multiply_widened(*args)
        return function(*args, **(kwargs or {}))


def widening_pays(x_I: Tensor, weight_OI: Any, bias_O: Tensor | None = None) -> bool:
    """The rule: many rows of a dtype without instructions, times a plain matrix on a CPU."""
    plain = type(weight_OI) in (Tensor, nn.Parameter) and weight_OI.dtype == x_I.dtype
    narrow = x_I.is_floating_point() and x_I.dtype not in FAST_PRODUCTS and x_I.is_cpu
    return plain and narrow and x_I.shape[:-1].numel() >= LEAST_ROWS


def multiply_widened(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """F.linear, (..., I) -> (..., O), with sums in float32."""
    x_NI, rows = x_I.reshape(-1, x_I.shape[-1]).float(), max(1, PIECE // weight_OI.shape[1])
    y_NO = x_I.new_empty(len(x_NI), len(weight_OI))
    for y_No, weight_oI in zip(y_NO.split(rows, dim=1), weight_OI.split(rows), strict=True):
        y_No.copy_(F.linear(x_NI, weight_oI.float()))
    y_O = y_NO.view(*x_I.shape[:-1], len(weight_OI))
    return y_O if bias_O is None else y_O + bias_O
