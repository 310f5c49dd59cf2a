"""Routing: which experts a token uses and how much each counts.

A kind of router is a config whose `route` turns logits into a `Routing`, a pure function, and the
module that makes the logits. `TopK` gives every token K experts, `TopP` as many as it takes to
reach a probability mass, `ExpertChoice` lets experts choose their tokens.

Precision: scores and weights are at least float32. `router_precision` says whether the router's
matrix product runs in float32 or in the weights' own precision: at near-ties the two choose
different experts, so this belongs to the architecture, and autocast does not change it.

Shapes: N tokens, D model width, E experts, K slots of a token, G groups of e = E / G experts, C
tokens that an expert takes.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config, Count, Limit, Positive, one_of
from .scoring import GROUP_SCORES, SCORING

Fraction = Annotated[float, Limit("a number from 0 to below 1", lambda value: 0 <= value < 1)]
Mass = Annotated[float, Limit("a number above 0, at most 1", lambda value: 0 < value <= 1)]


@dataclass(frozen=True)
class Routing:
    """What a router decided for N tokens. A slot may be empty: it holds expert E, of weight 0."""

    weights_NK: Tensor  # of each slot: the factor of its expert's output
    experts_NK: Tensor  # int64; a token's experts are distinct and in no particular order
    scores_NE: Tensor  # of all experts, without any selection bias
    logits_NE: Tensor  # what the scores were made from

    def check(self) -> None:
        """Raise ValueError for weights and experts of other dtypes or shapes."""
        weights_NK, experts_NK = self.weights_NK, self.experts_NK
        wide = weights_NK.dtype.itemsize >= 4 and experts_NK.dtype == torch.int64
        if weights_NK.dim() != 2 or experts_NK.shape != weights_NK.shape or not wide:
            found = [(x.dtype, tuple(x.shape)) for x in (weights_NK, experts_NK)]
            raise ValueError(f"routing {found}: expected float32 at least and int64, both (N, K)")


@runtime_checkable
class Router(Protocol):
    """What a sparse layer asks of its router, an `nn.Module` that a `RouterConfig` builds.

    Called with x_ND, N >= 0, it returns a `Routing` whose weights and scores are float32 at least,
    under autocast too (see `exact_products`). Recording, losses and balancing go by it.
    `selection_bias` is a buffer, (E,), that training moves against the load; None for a router that
    is not balanced so. `sees_other_tokens = True` says that a token's experts depend on others.
    """

    num_experts: int
    selection_bias: Tensor | None

    def __call__(self, x_ND: Tensor) -> Routing: ...


@runtime_checkable
class RouterConfig(Protocol):
    """A kind of router: `TopK`, `TopP`, `ExpertChoice`, or anybody's frozen dataclass."""

    @property
    def num_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> float:
        """How many experts a token uses: on average if that is fixed, else at most."""

    def build(self, d_model: int) -> nn.Module:
        """The `Router`, its weights drawn."""


@dataclass(frozen=True, kw_only=True)
class LinearRouterConfig(Config):
    """What the kinds here share: a linear score per expert."""

    sees_other_tokens: ClassVar[bool] = False

    num_experts: Count
    router_precision: Literal["float32", "weights"] = "float32"  # of the matrix product
    router_bias: bool = False  # added to the logits, so it takes part in everything after

    def route(self, logits_NE: Tensor, bias_E: Tensor | None = None) -> Routing:
        """The decision; `bias_E` is the selection bias, for kinds that have one."""
        raise NotImplementedError

    def build(self, d_model: int) -> "LinearRouter":
        return LinearRouter(d_model, self)


class LinearRouter(nn.Module):
    """Linear logits and the config's `route`. The matrix begins normal, biases at 0."""

    exact = ("selection_bias",)  # in float32 at least: biases near 10 may differ by only 1e-3
    quantizable = ()
    selection_bias: Tensor | None

    def __init__(self, d_model: int, config: LinearRouterConfig, biased: bool = False) -> None:
        super().__init__()
        self.config, self.num_experts = config, config.num_experts
        self.sees_other_tokens = config.sees_other_tokens
        self.weight = nn.Parameter(torch.empty(self.num_experts, d_model))
        self.bias = nn.Parameter(torch.empty(self.num_experts)) if config.router_bias else None
        bias_E = torch.zeros(self.num_experts) if biased else None
        self.register_buffer("selection_bias", bias_E)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        if not self.weight.is_meta:
            self.weight.normal_(std=std)
        for bias in (self.bias, self.selection_bias):
            if bias is not None:
                bias.zero_()

    def forward(self, x_ND: Tensor) -> Routing:
        wide, device = torch.promote_types(x_ND.dtype, torch.float32), x_ND.device.type
        dtype = wide if self.config.router_precision == "float32" else self.weight.dtype
        own_bias_E = None if self.bias is None else self.bias.to(dtype)
        with exact_products(device):
            logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype), own_bias_E)
        return self.config.route(logits_NE.to(wide), self.selection_bias)

    def extra_repr(self) -> str:
        E, D = self.weight.shape
        return f"{D} -> {E} experts, {type(self.config).__name__}"

    def _apply(self, fn, recurse=True):
        """Never cast the selection bias, which is `exact`, to a narrower dtype than it has."""
        bias_E = self.selection_bias
        super()._apply(fn, recurse)
        cast_E: Any = self.selection_bias
        if bias_E is not None and cast_E.dtype.itemsize < bias_E.dtype.itemsize:
            self.selection_bias = bias_E.to(cast_E.device)
        return self


def exact_products(device: str) -> torch.autocast | nullcontext:
    """A block in which autocast changes nothing; some devices have no autocast to switch off."""
    known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


@dataclass(frozen=True, kw_only=True)
class TopK(LinearRouterConfig):
    """Each token uses its K best experts (Shazeer et al. 2017).

    The order of the fields is the order of the computation: score, choose, weigh. Which published
    model uses which value is known to `checkpoints.families` alone.
    """

    top_k: Count
    scoring: Annotated[str, one_of(SCORING)]

    selection_bias: bool = False  # a bias per expert that takes part in choosing, never in weighing
    num_groups: Count = 1  # experts in equal, consecutive groups; 1: no group limit
    groups_kept: Count = 1  # a token's experts come from this many groups
    group_score: Annotated[str, one_of(GROUP_SCORES)] = "max"
    # Divide the chosen weights by their sum. Softmax scores then equal a softmax over the chosen
    # logits, so a model that applies the softmax after the top K sets this too.
    normalize: bool = False
    normalize_epsilon: Fraction = 0.0  # added to that sum
    normalize_minimum: Fraction = 0.0  # lower bound of that sum
    scale: Positive = 1.0  # multiplies the weights, normalised or not

    def check(self) -> None:
        experts, groups = self.num_experts, self.num_groups
        self.require(self.top_k <= experts, "top_k", "be <= {num_experts}")
        self.require(experts % groups == 0, "num_groups", "divide {num_experts}")
        self.require(self.groups_kept <= groups, "groups_kept", "be <= {num_groups}")
        reachable = self.groups_kept * (experts // groups)
        fits = f"be <= the {reachable} experts of {{groups_kept}} of {{num_groups}}"
        self.require(self.top_k <= reachable, "top_k", fits)
        pairs = groups == 1 or self.group_score != "top2_sum" or experts // groups >= 2
        self.require(pairs, "num_groups", "leave two experts in a group for {group_score}")

    @property
    def experts_per_token(self) -> float:
        return self.top_k

    def build(self, d_model: int) -> LinearRouter:
        return LinearRouter(d_model, self, self.selection_bias)

    def route(self, logits_NE: Tensor, bias_E: Tensor | None = None) -> Routing:
        """Choose with one score, weigh with another: the bias takes part in choosing alone.

        Weights are gathered from the unbiased scores (DeepSeek-V3, section 2.1.2). Recovering them
        as choice minus bias would cancel catastrophically: scores of 1e-8 beside a bias of 12 are
        real.
        """
        scores_NE = SCORING[self.scoring](logits_NE)
        choice_NE = self.limit_to_groups(scores_NE if bias_E is None else scores_NE + bias_E)
        experts_NK = choice_NE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(-1, experts_NK)
        if self.normalize:
            total_N1 = weights_NK.sum(dim=-1, keepdim=True).clamp(min=self.normalize_minimum)
            weights_NK = weights_NK / (total_N1 + self.normalize_epsilon)
        return Routing(weights_NK * self.scale, experts_NK, scores_NE, logits_NE)

    def limit_to_groups(self, choice_NE: Tensor) -> Tensor:
        """Set the choice scores outside each token's `groups_kept` best groups to -inf.

        -inf and not 0: with a negative selection bias every score of a kept group may lie below 0,
        and an expert of an excluded group would win. (transformers' deepseek_v2 fills with 0, which
        is safe for its unbiased probabilities only, and chooses the same there.)
        """
        if self.num_groups == 1:
            return choice_NE
        choice_NGe = choice_NE.unflatten(-1, (self.num_groups, -1))
        group_NG = GROUP_SCORES[self.group_score](choice_NGe)
        kept_Ng = group_NG.topk(self.groups_kept, dim=-1, sorted=False).indices
        excluded_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(-1, kept_Ng, False)
        return choice_NGe.masked_fill(excluded_NG[..., None], float("-inf")).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class TopP(LinearRouterConfig):
    """Each token uses its most likely experts, as many as reach a probability mass together.

    Huang et al. 2024, "Harder Tasks Need More Experts in MoE Models", section 3.2: a token that is
    sure of an expert uses one, others use more. Weights are the probabilities, not normalised.
    """

    mass: Mass
    max_experts: Count  # slots of a token: the most it uses, mass reached or not

    def check(self) -> None:
        self.require(self.max_experts <= self.num_experts, "max_experts", "be <= {num_experts}")

    @property
    def experts_per_token(self) -> float:
        return self.max_experts

    def route(self, logits_NE: Tensor, bias_E: Tensor | None = None) -> Routing:
        scores_NE = logits_NE.softmax(dim=-1)
        weights_NK, experts_NK = scores_NE.topk(self.max_experts, dim=-1)
        before_NK = weights_NK.cumsum(dim=-1) - weights_NK
        reached_NK = before_NK >= self.mass  # False for NaN, which so stays visible in the weights
        weights_NK = weights_NK.masked_fill(reached_NK, 0)
        experts_NK = experts_NK.masked_fill(reached_NK, self.num_experts)
        return Routing(weights_NK, experts_NK, scores_NE, logits_NE)


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(LinearRouterConfig):
    """Each expert takes the ceil(N * capacity / E) tokens that score highest for it.

    Zhou et al. 2022, section 3.2. Loads are equal by construction; a token may get no expert, or
    all. What it gets depends on the other tokens of the forward, later ones and padding included,
    so `generate` refuses such a model.
    """

    sees_other_tokens: ClassVar[bool] = True

    capacity: Positive  # experts that a token uses on average

    def check(self) -> None:
        self.require(self.capacity <= self.num_experts, "capacity", "be <= {num_experts}")

    @property
    def experts_per_token(self) -> float:
        return self.capacity

    def route(self, logits_NE: Tensor, bias_E: Tensor | None = None) -> Routing:
        """Slot e of a token holds expert e, or is empty."""
        (N, E), scores_NE = logits_NE.shape, logits_NE.softmax(dim=-1)
        taken = min(N, math.ceil(N * self.capacity / E))
        tokens_CE = scores_NE.topk(taken, dim=0, sorted=False).indices
        chosen_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter(0, tokens_CE, True)
        experts_NE = torch.arange(E, device=logits_NE.device).where(chosen_NE, E)
        return Routing(scores_NE.where(chosen_NE, 0), experts_NE, scores_NE, logits_NE)
