"""Modules whose matrices are held as integer codes, for models that only run.

One row of input is bound by the bytes of the weights, and torch's kernels for such matrices read
two to four times fewer of them. For many rows, pieces of the matrix are expanded to the input's
dtype and multiplied as usual; the whole is never expanded.

Shapes: N rows of input, O and I output and input width of a matrix, E experts, G groups of columns,
o rows of a piece of a matrix; D model width, F expert width, K slots of a token, S = N * K slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe import Biases, Experts, Routing, experts_loop, is_traced, register_operation

from .codes import Codes, Format, Int8, format_of

NO_GRADIENTS = (
    "quantised weights have no gradients: load the model without quantize, or use torch.no_grad()"
)


def refuse_gradients(x: Tensor) -> None:
    """Raise ValueError if the gradient of x is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(NO_GRADIENTS)


class QuantizedMatrix:
    """One matrix (O, I); `F.linear` takes it as a weight."""

    def __init__(self, form: Format, shape: tuple[int, ...], held: Tensor, scale: Tensor) -> None:
        self.form, self.shape, self.held, self.scale = form, shape, held, scale

    @property
    def codes(self) -> Codes:
        """The codes (O, I) and scales (O, G), whatever way they are held."""
        return Codes(*(rows[: self.shape[0]] for rows in self.form.unpack(self.held, self.scale)))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The plain matrix, (O, I)."""
        return torch.cat([w.T for w in self.form.expand(self.held, self.scale, dtype)])[
            : self.shape[0]
        ]

    def multiply(self, x_NI: Tensor) -> Tensor:
        """x times the transposed matrix, (N, O): by torch's kernel for few rows.

        In bfloat16, the kernels are faster for up to 8 rows (Int8) and 32 rows (Int4), measured on
        a CPU with AVX-512; in other dtypes they are 3 to 60 times as slow as expanding.
        """
        O, form, N = self.shape[0], self.form, len(x_NI)  # noqa: E741
        fits = x_NI.dtype == self.scale.dtype == torch.bfloat16 and x_NI.is_cpu
        if 0 < N <= form.kernel_rows and fits and form.can_run(x_NI):
            return form.run_kernel(x_NI.contiguous(), self.held, self.scale)[:, :O]
        y_NO, start = x_NI.new_empty(N, O), 0
        for y_No in form.multiply_many(x_NI, self.held, self.scale):
            y_NO[:, start : start + y_No.shape[1]] = y_No[:, : O - start]
            start += y_No.shape[1]
        return y_NO

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        x, matrix, *bias = args
        if function is not F.linear or not isinstance(matrix, cls) or kwargs:
            return NotImplemented
        y = matrix.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], matrix.shape[0])
        return y if not bias or bias[0] is None else y + bias[0]


@register_operation(
    "(Tensor x, Tensor codes, Tensor scale, Tensor? matrices, int[] form, int width) -> Tensor",
    lambda x_NI, codes, scale, matrix_N, form, width: x_NI.new_empty(len(x_NI), width),
)
def multiply_by_codes(
    x_NI: Tensor,
    codes: Tensor,
    scale: Tensor,
    matrix_N: Tensor | None,
    form: list[int],
    width: int,
) -> Tensor:
    """Each row times its matrix of a stack, (N, O), or all rows times the only one.

    matrix_N: the numbers of the matrices; rows beyond the last matrix get zeros. width: O.
    """
    shape = width, x_NI.shape[1]
    if matrix_N is None:
        return QuantizedMatrix(format_of(form), shape, codes, scale).multiply(x_NI).contiguous()
    y_NO = x_NI.new_zeros(len(x_NI), width)
    for number in [m for m in matrix_N.unique().tolist() if m < len(codes)]:
        matrix = QuantizedMatrix(format_of(form), shape, codes[number], scale[number])
        row_n = torch.where(matrix_N == number)[0]
        y_NO[row_n] = matrix.multiply(x_NI[row_n])
    return y_NO


class QuantizedWeight(nn.Module):
    """A matrix (O, I), or a stack of E (E, O, I), as buffers; it begins undrawn.

    codes, scale: as the format holds them, for a stack with E in front.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self, form: Format, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.form, self.shape = form, shape
        *stack, O, I = shape  # noqa: E741
        held, scale = form.shapes(O, I)
        code_dtype = torch.int8 if isinstance(form, Int8) else torch.uint8
        make = partial(torch.empty, device=device)
        self.register_buffer("codes", make((*stack, *held), dtype=code_dtype))
        self.register_buffer("scale", make((*stack, *scale), dtype=dtype))

    def __getitem__(self, expert: int) -> QuantizedMatrix:
        """A matrix of a stack."""
        return QuantizedMatrix(self.form, self.shape[1:], self.codes[expert], self.scale[expert])

    @property
    def matrix(self) -> QuantizedMatrix:
        """The only matrix."""
        return QuantizedMatrix(self.form, self.shape, self.codes, self.scale)

    def multiply(self, x_NI: Tensor, matrix_N: Tensor | None = None) -> Tensor:
        """`multiply_by_codes` with the matrices held here; torch's compiler calls it as it is."""
        width = self.shape[-2]
        return multiply_by_codes(x_NI, self.codes, self.scale, matrix_N, self.form.numbers, width)

    @torch.no_grad()
    def put(self, codes: Codes, expert: int | None = None) -> None:
        """Hold a matrix, as that of an expert in a stack."""
        place = (
            (self.codes, self.scale) if expert is None else (self.codes[expert], self.scale[expert])
        )
        for held, made in zip(place, self.form.pack(codes), strict=True):
            held.copy_(made)

    def extra_repr(self) -> str:
        size = self.form.group_size
        return f"{list(self.shape)}, {self.form.bits} bits, a scale per {size or 'row'}"


class QuantizedLinear(nn.Module):
    """`nn.Linear` with a quantised matrix; its bias stays."""

    exact = ()
    quantizable = ()

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        y_NO = self.weight.multiply(x.reshape(-1, x.shape[-1]))
        y = y_NO.view(*x.shape[:-1], y_NO.shape[1])
        return y if self.bias is None else y + self.bias

    def reset_parameters(self) -> None:
        raise ValueError(NO_GRADIENTS)


class QuantizedExperts(nn.Module):
    """`moe.Experts` with quantised matrices; biases stay.

    It runs as the loop over experts, and where torch's compiler traces it as products of all slots.
    """

    exact = ()
    quantizable = ()

    def __init__(
        self,
        experts: Experts,
        gate: QuantizedWeight,
        up: QuantizedWeight,
        down: QuantizedWeight,
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.gate_bias, self.up_bias = experts.gate_bias, experts.up_bias
        self.down_bias = experts.down_bias
        self.activation = experts.activation

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        routing.check()
        refuse_gradients(x_ND)
        if is_traced(x_ND, routing.experts_NK):
            return self.multiply_slots(x_ND, routing)
        biases = Biases(self.gate_bias, self.up_bias, self.down_bias)
        chosen = routing.weights_NK, routing.experts_NK
        gate, up, down = cast(tuple[Tensor, ...], (self.gate, self.up, self.down))
        return experts_loop(x_ND, *chosen, gate, up, down, biases, self.activation)

    def multiply_slots(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Compute what the loop does without a look at which experts are chosen."""
        expert_S, K = routing.experts_NK.flatten(), routing.experts_NK.shape[1]

        def multiply(x_SI: Tensor, weight: QuantizedWeight, bias_EO: Tensor | None) -> Tensor:
            y_SO = weight.multiply(x_SI, expert_S)
            return y_SO if bias_EO is None else y_SO + F.pad(bias_EO, (0, 0, 0, 1))[expert_S]

        x_SD = x_ND.repeat_interleave(K, dim=0)
        gate_SF = multiply(x_SD, self.gate, self.gate_bias)
        up_SF = multiply(x_SD, self.up, self.up_bias)
        y_SD = multiply(self.activation(gate_SF, up_SF), self.down, self.down_bias)
        y_NKD = y_SD.where((expert_S < len(self.gate.codes))[:, None], 0).unflatten(0, (-1, K))
        return (y_NKD * routing.weights_NK[..., None]).sum(dim=1).to(x_ND.dtype)

    def reset_parameters(self) -> None:
        raise ValueError(NO_GRADIENTS)
