"""Routed experts: a loop that reads like the paper, and its sorted, grouped form.

Both compute  y_n = sum_k weights[n, k] * FFN_{experts[n, k]}(x_n)  and have the same signature.
A slot that holds expert E is empty: it computes nothing and adds nothing. The sum over K slots runs
in the precision of the routing weights (float32 at least) and is rounded once; transformers' eager
loop rounds after every expert, which shows in bfloat16 only.

Shapes: N tokens, D model width, E experts, K slots of a token, F expert width, S = N * K slots
sorted by expert, I and O input and output width of one product.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .feed_forward import Clamp, clamped_swiglu, swiglu
from .routing import Routing
from .segments import can_group, is_traced, product_of_rows, product_of_segments

Activation = Callable[[Tensor, Tensor], Tensor]  # of an expert's gate and up products


class Biases(NamedTuple):
    """What is added to the products of each expert; None: nothing."""

    gate_EF: Tensor | None = None
    up_EF: Tensor | None = None
    down_ED: Tensor | None = None


NO_BIASES = Biases()
ZERO_ROW = 0, 0, 0, 1  # appended to rows, for empty slots to read


def experts_loop(
    x_ND: Tensor,
    weights_NK: Tensor,
    experts_NK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    biases: Biases = NO_BIASES,
    activation: Activation = swiglu,
) -> Tensor:
    """Run each expert on the tokens that chose it, which it reads; returns (N, D)."""
    E, zero_N1 = gate_EFD.shape[0], 0 * weights_NK.sum(dim=1, keepdim=True)
    y_ND = zero_N1.repeat(1, x_ND.shape[1])  # the weights have a gradient even if none is used
    for expert in [e for e in experts_NK.unique().tolist() if e < E]:
        token, slot = torch.where(experts_NK == expert)
        x_nD = x_ND[token]
        gate_nF = product_of_one(x_nD, gate_EFD, biases.gate_EF, expert)
        up_nF = product_of_one(x_nD, up_EFD, biases.up_EF, expert)
        y_nD = product_of_one(activation(gate_nF, up_nF), down_EDF, biases.down_ED, expert)
        y_ND.index_add_(0, token, y_nD * weights_NK[token, slot, None])
    return y_ND.to(x_ND.dtype)


def product_of_one(x_nI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, expert: int) -> Tensor:
    return F.linear(x_nI, weight_EOI[expert], None if bias_EO is None else bias_EO[expert])


def experts_grouped(
    x_ND: Tensor,
    weights_NK: Tensor,
    experts_NK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    biases: Biases = NO_BIASES,
    activation: Activation = swiglu,
) -> Tensor:
    """Compute what `experts_loop` does, on rows sorted so that each expert has one slice.

    Empty slots are sorted to the end, where products leave rows unwritten: they may hold NaN, and
    so may their gradients. So empty slots read an appended row of zeros, which absorbs their
    gradients, and their results are replaced by 0, since 0 * NaN is NaN.
    """
    (N, K), E = experts_NK.shape, gate_EFD.shape[0]
    experts_S, order_S = experts_NK.flatten().sort(stable=True)
    every_E = torch.arange(E, device=experts_S.device)
    ends_E = torch.searchsorted(experts_S, every_E, right=True, out_int32=True)
    each_alone = N == 1 and torch.compiler.is_compiling()  # no segments: each row has its expert

    def multiply(x_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        if each_alone:
            y_SO = product_of_rows(x_SI, weight_EOI[experts_S.clamp(max=E - 1)])
        else:
            y_SO = product_of_segments(x_SI, weight_EOI, ends_E)
        return y_SO if bias_EO is None else y_SO + F.pad(bias_EO, ZERO_ROW)[experts_S]

    token_S = torch.where(experts_S < E, order_S // K, N)
    x_SD = F.pad(x_ND, ZERO_ROW).index_select(0, token_S)
    gate_SF, up_SF = multiply(x_SD, gate_EFD, biases.gate_EF), multiply(x_SD, up_EFD, biases.up_EF)
    y_SD = multiply(activation(gate_SF, up_SF), down_EDF, biases.down_ED)
    y_SD = y_SD.where((experts_S < E)[:, None], 0)
    y_NKD = y_SD.index_select(0, order_S.argsort()).unflatten(0, (N, K))
    return (y_NKD * weights_NK[..., None]).sum(dim=1).to(x_ND.dtype)


def grouping_pays(x_ND: Tensor, gate_EFD: Tensor) -> bool:
    """Whether to group: where `grouped_mm` runs, if gradients are wanted or no CPU computes.

    In the loop's backward each expert makes a gradient as large as all experts. Without gradients
    both forms take a CPU about as long for up to 64 tokens; from 512 on the loop is 1.2 to 1.3
    times as fast, because what lies between its products stays in the CPU's cache.
    """
    wanted = torch.is_grad_enabled() and (x_ND.requires_grad or gate_EFD.requires_grad)
    pays = wanted or x_ND.device.type != "cpu"
    return pays and can_group(x_ND, gate_EFD) and x_ND.shape[0] > 1


class Experts(nn.Module):
    """The weights of E routed experts, stacked: gate and up (E, F, D), down (E, D, F).

    Matrices begin normal with a deviation of `std`, biases at 0.
    """

    exact = ()
    quantizable = ("gate", "up", "down")
    residual_outputs = ("down",)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        width: int,
        biases: bool = False,
        clamp: Clamp | None = None,
    ) -> None:
        super().__init__()
        E, F_, D = num_experts, width, d_model
        self.gate = nn.Parameter(torch.empty(E, F_, D))
        self.up = nn.Parameter(torch.empty(E, F_, D))
        self.down = nn.Parameter(torch.empty(E, D, F_))
        self.gate_bias = nn.Parameter(torch.empty(E, F_)) if biases else None
        self.up_bias = nn.Parameter(torch.empty(E, F_)) if biases else None
        self.down_bias = nn.Parameter(torch.empty(E, D)) if biases else None
        self.activation: Activation = partial(clamped_swiglu, clamp=clamp) if clamp else swiglu
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        for matrices in (self.gate, self.up, self.down):
            if not matrices.is_meta:
                matrices.normal_(std=std)
        for bias in (self.gate_bias, self.up_bias, self.down_bias):
            if bias is not None:
                bias.zero_()

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        routing.check()
        biases = Biases(self.gate_bias, self.up_bias, self.down_bias)
        weights = self.gate, self.up, self.down
        read = [x for x in (x_ND, routing.experts_NK, *weights, *biases) if x is not None]
        grouped = grouping_pays(x_ND, self.gate) or is_traced(*read)
        run = experts_grouped if grouped else experts_loop
        return run(x_ND, routing.weights_NK, routing.experts_NK, *weights, biases, self.activation)

    def extra_repr(self) -> str:
        E, F_, D = self.gate.shape
        return f"{E} of {D} -> {F_} -> {D}, biases={self.gate_bias is not None}"
