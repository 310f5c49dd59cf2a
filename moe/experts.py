"""Routed experts: a loop that reads like the paper, and its sorted, grouped twin.

Both compute  y_n = sum_k weights[n, k] * FFN_{experts[n, k]}(x_n)  and have the same signature.
The sum over a token's K experts runs in the precision of the weights (float32 at least) and is
rounded once; transformers' eager loop rounds after every expert, which shows in bfloat16 only.

Shapes: N tokens, D model width, E experts, K experts a token uses, F expert width, S = N * K
(token, expert) pairs sorted by expert, I and O input and output width of one product.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import MoEConfig
from .feed_forward import clamped_swiglu, swiglu
from .routing import Routing

Activation = Callable[[Tensor, Tensor], Tensor]  # of an expert's gate and up products


class Biases(NamedTuple):
    """What is added to the products of each expert; None: nothing."""

    gate_EF: Tensor | None = None
    up_EF: Tensor | None = None
    down_ED: Tensor | None = None


NO_BIASES = Biases()


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
    """Run each expert that was chosen on the tokens that chose it; returns (N, D)."""
    y_NKD = x_ND.new_zeros(*experts_NK.shape, x_ND.shape[-1])
    for expert in experts_NK.unique().tolist():
        token, slot = torch.where(experts_NK == expert)
        x_nD = x_ND[token]
        gate_nF = product_of_one(x_nD, gate_EFD, biases.gate_EF, expert)
        up_nF = product_of_one(x_nD, up_EFD, biases.up_EF, expert)
        y_nD = product_of_one(activation(gate_nF, up_nF), down_EDF, biases.down_ED, expert)
        y_NKD[token, slot] = y_nD
    return weigh(y_NKD, weights_NK)


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
    """Compute `experts_loop`, sorted so that each expert sees one contiguous slice of rows."""
    (N, K), E = experts_NK.shape, gate_EFD.shape[0]
    experts_S, order_S = experts_NK.flatten().sort(stable=True)
    ends_E = torch.bincount(experts_S, minlength=E).cumsum(0).to(torch.int32)
    x_SD = x_ND.index_select(0, order_S // K)
    gate_SF = product_of_each(x_SD, gate_EFD, biases.gate_EF, experts_S, ends_E)
    up_SF = product_of_each(x_SD, up_EFD, biases.up_EF, experts_S, ends_E)
    hidden_SF = activation(gate_SF, up_SF)
    y_SD = product_of_each(hidden_SF, down_EDF, biases.down_ED, experts_S, ends_E)
    y_NKD = y_SD.index_select(0, order_S.argsort()).unflatten(0, (N, K))
    return weigh(y_NKD, weights_NK)


def product_of_each(
    x_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, experts_S: Tensor, ends_E: Tensor
) -> Tensor:
    y_SO = F.grouped_mm(x_SI, weight_EOI.mT, offs=ends_E)
    return y_SO if bias_EO is None else y_SO + bias_EO[experts_S]


def weigh(y_NKD: Tensor, weights_NK: Tensor) -> Tensor:
    """The weighted sum over each token's K expert outputs, in the weights' precision."""
    return (y_NKD * weights_NK[..., None]).sum(dim=1).to(y_NKD.dtype)


def grouping_pays(x_ND: Tensor, gate_EFD: Tensor) -> bool:
    """The rule that picks the twin: group wherever it can run, unless there is a single token.

    A token's experts are distinct, so with one token there is nothing to bring together and the
    loop wins by the cost of sorting (a tenth to a quarter on a CPU); from a few tokens on
    grouping does, by up to 2.4. `grouped_mm` takes float32 and bfloat16 (not float64) and rows of
    whole 16-byte units.
    """
    rows_fit = all(w * x_ND.element_size() % 16 == 0 for w in gate_EFD.shape[1:])
    supported = x_ND.dtype in (torch.float32, torch.bfloat16) and rows_fit
    return supported and x_ND.shape[0] > 1


class Experts(nn.Module):
    """The weights of E routed experts, stacked: gate and up (E, F, D), down (E, D, F)."""

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        E, F_, D = config.num_experts, config.expert_width, d_model
        self.gate = nn.Parameter(torch.empty(E, F_, D))
        self.up = nn.Parameter(torch.empty(E, F_, D))
        self.down = nn.Parameter(torch.empty(E, D, F_))
        biased = config.expert_biases
        self.gate_bias = nn.Parameter(torch.empty(E, F_)) if biased else None
        self.up_bias = nn.Parameter(torch.empty(E, F_)) if biased else None
        self.down_bias = nn.Parameter(torch.empty(E, D)) if biased else None
        self.activation: Activation = (
            swiglu if config.clamp is None else partial(clamped_swiglu, clamp=config.clamp)
        )

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        weights_NK, experts_NK = routing.weights_NK, routing.experts_NK
        biases = Biases(self.gate_bias, self.up_bias, self.down_bias)
        grouped = grouping_pays(x_ND, self.gate)
        run = experts_grouped if grouped else experts_loop
        weights = self.gate, self.up, self.down
        return run(x_ND, weights_NK, experts_NK, *weights, biases, self.activation)
