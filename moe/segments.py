"""Products of sorted rows with the matrix of their segment, as operations that torch can trace.

torch's `grouped_mm` takes float32 and bfloat16 rows of whole 16-byte units, and traces in bfloat16
alone. These take every dtype and width, under compile, export, vmap and on the meta device too.

Shapes: S rows sorted by segment, E segments, I and O input and output width of one product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def is_traced(*tensors: Tensor) -> bool:
    """Whether values of these cannot be read: in compile, export, vmap, on the meta device."""
    if torch.compiler.is_compiling() or any(tensor.is_meta for tensor in tensors):
        return True
    functorch = torch._C._functorch  # torch has no public name for what vmap and grad wrap
    for tensor in tensors:
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False


def can_group(x_SI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether `grouped_mm` takes rows and matrices like these."""
    rows_fit = all(width * x_SI.element_size() % 16 == 0 for width in weight_EOI.shape[1:])
    return rows_fit and x_SI.dtype in (torch.float32, torch.bfloat16)


def product_of_segments(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Row s times the matrix of its segment, (S, O); segment e ends before row ends[e].

    Rows after the last end belong to no segment; their result is undefined and may be NaN.
    """
    traceable = x_SI.dtype == torch.bfloat16 or not is_traced(x_SI, weight_EOI, ends_E)
    if can_group(x_SI, weight_EOI) and traceable:
        return F.grouped_mm(x_SI.contiguous(), weight_EOI.contiguous().mT, offs=ends_E)
    return ProductOfSegments.apply(x_SI, weight_EOI, ends_E)


def product_of_rows(x_SI: Tensor, weight_SOI: Tensor) -> Tensor:
    """Row s times its own matrix, (S, O): compiled, one pass over the matrices, chosen or not."""
    wide = torch.promote_types(x_SI.dtype, torch.float32)
    return (weight_SOI.to(wide) * x_SI[:, None].to(wide)).sum(dim=-1).to(x_SI.dtype)


Operation = Callable[..., Tensor]


def register_operation(schema: str, make_result: Operation) -> Callable[[Operation], Operation]:
    """Register a function as a torch operation, which `vmap` runs element by element.
    make_result: returns an empty tensor of the result's shape; tracing calls it instead."""

    def register(function: Operation) -> Operation:
        name = f"abacus::{function.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "default", function)
        torch.library.register_fake(name, make_result)
        registered = getattr(torch.ops.abacus, function.__name__)

        def map_elements(info: Any, in_dims: tuple, *batched: Tensor) -> tuple[Tensor, int]:
            rows = [
                tensor.unbind(dim) if dim is not None else [tensor] * info.batch_size
                for tensor, dim in zip(batched, in_dims, strict=True)
            ]
            return torch.stack([registered(*row) for row in zip(*rows, strict=True)]), 0

        torch.library.register_vmap(name, map_elements)
        return registered

    return register


@register_operation(
    "(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    lambda x_SI, weight_EOI, ends_E: x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1]),
)
def multiply_segments(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`product_of_segments` without its gradient."""
    if can_group(x_SI, weight_EOI):
        return F.grouped_mm(x_SI.contiguous(), weight_EOI.contiguous().mT, offs=ends_E)
    y_SO, ends = x_SI.new_zeros(len(x_SI), weight_EOI.shape[1]), ends_E.tolist()
    for weight_OI, start, end in zip(weight_EOI, [0, *ends], ends, strict=False):
        y_SO[start:end] = F.linear(x_SI[start:end], weight_OI)
    return y_SO


@register_operation(
    "(Tensor y, Tensor x, Tensor ends) -> Tensor",
    lambda y_SO, x_SI, ends_E: x_SI.new_empty(len(ends_E), y_SO.shape[1], x_SI.shape[1]),
)
def sum_over_segments(y_SO: Tensor, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    """The sum of y x^T over the rows of each segment, (E, O, I): the gradient of its matrix."""
    ends = ends_E.tolist()
    pairs = zip([0, *ends], ends, strict=False)
    return torch.stack([y_SO[start:end].mT @ x_SI[start:end] for start, end in pairs])


class ProductOfSegments(torch.autograd.Function):
    """`multiply_segments` with its gradient. (With a `jvp` too, compile would not take it.)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        return multiply_segments(x_SI, weight_EOI, ends_E)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_SI, weight_EOI, ends_E = ctx.saved_tensors
        grad_SI = ProductOfSegments.apply(grad_SO, weight_EOI.mT, ends_E)
        return grad_SI, SumOverSegments.apply(grad_SO, x_SI, ends_E), None


class SumOverSegments(torch.autograd.Function):
    """`sum_over_segments` with its gradient, so that gradients have gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y_SO: Tensor, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        return sum_over_segments(y_SO, x_SI, ends_E)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_EOI: Tensor) -> tuple[Tensor, Tensor, None]:
        y_SO, x_SI, ends_E = ctx.saved_tensors
        grad_SO = ProductOfSegments.apply(x_SI, grad_EOI, ends_E)
        return grad_SO, ProductOfSegments.apply(y_SO, grad_EOI.mT, ends_E), None
