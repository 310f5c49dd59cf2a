"""Parts that somebody else wrote: they know the contracts, and the package does not know them.

A router that hashes token states into experts, an attention without softmax whose state decays, and
a feed-forward layer with a bare parameter.

Shapes: B batch, T positions, L positions of one run, N tokens, D model width, E experts, H heads, P
head width, V = H * P, W = 3 * V.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

from modeling import StateCache
from moe import Config, Count, Routing, exact_products


@dataclass(frozen=True, kw_only=True)
class DecayConfig(Config):
    """Linear attention with a decay per head and a short convolution (as RetNet, Mamba 2 do it)."""

    num_heads: Count
    head_width: Count

    def build(self, d_model: int) -> "DecayAttention":
        return DecayAttention(d_model, self)


class DecayAttention(nn.Module):
    """S_t = decay * S_{t-1} + k_t v_t^T and y_t = q_t S_t, where k is smoothed over two tokens."""

    residual_outputs = ("o.weight",)
    has_attention_weights = False

    def __init__(self, d_model: int, config: DecayConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_width
        self.qkv = nn.Linear(d_model, 3 * width, bias=False)
        self.decay = nn.Parameter(torch.empty(config.num_heads))
        self.smoothing = nn.Parameter(torch.empty(2))
        self.o = nn.Linear(width, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.decay, 1.0)
        nn.init.constant_(self.smoothing, 0.5)

    def make_cache(self, batch_size: int, max_length: int, rollback: int = 0) -> StateCache:
        H, P = self.config.num_heads, self.config.head_width
        return StateCache(batch_size, max_length, [(H, P, P), (H, P)], [(3 * H * P,)], rollback)

    def forward(self, x_BTD: Tensor, step, cache: StateCache | None) -> Tensor:
        qkv_BTW = self.qkv(x_BTD)
        if cache is None:
            B, T, (H, P) = *x_BTD.shape[:2], (self.config.num_heads, self.config.head_width)
            wide = torch.promote_types(x_BTD.dtype, torch.float32)
            zeros = [x_BTD.new_zeros(B, *shape, dtype=wide) for shape in ((H, P, P), (H, P))]
            real_BT = step.real_mask(T)
            real_BT = x_BTD.new_ones(B, T, dtype=torch.bool) if real_BT is None else real_BT
            y_BTV, _ = self.recur(zeros, [qkv_BTW], real_BT)
        else:
            y_BTV = cache.append(self.recur, qkv_BTW, counts=step.counts)
        return self.o(y_BTV)

    def recur(self, states, inputs, real_BL: Tensor):
        state_BHPP, before_BHP = states
        H, (qkv_BLW,), outputs = self.config.num_heads, inputs, []
        wide_BLW = qkv_BLW.to(state_BHPP.dtype)
        q_BLHP, k_BLHP, v_BLHP = rearrange(wide_BLW, "B L (n H P) -> n B L H P", n=3, H=H)
        decay_H11 = torch.sigmoid(self.decay)[:, None, None]
        for i in range(qkv_BLW.shape[1]):
            real_B111 = real_BL[:, i, None, None, None]
            k_BHP = self.smoothing[0] * k_BLHP[:, i] + self.smoothing[1] * before_BHP
            new_BHPP = decay_H11 * state_BHPP + k_BHP[..., None] * v_BLHP[:, i, :, None]
            state_BHPP = torch.where(real_B111, new_BHPP, state_BHPP)
            before_BHP = torch.where(real_B111[..., 0], k_BLHP[:, i], before_BHP)
            outputs.append(torch.einsum("BHP,BHPQ->BHQ", q_BLHP[:, i], state_BHPP).flatten(1))
        y_BLV = torch.stack(outputs, dim=1) if outputs else qkv_BLW.tensor_split(3, dim=-1)[0]
        return y_BLV.to(qkv_BLW.dtype), [state_BHPP, before_BHP]


@dataclass(frozen=True, kw_only=True)
class CosineRouterConfig(Config):
    """Experts have directions; a token takes those that it points to, if it points well enough."""

    num_experts: Count
    slots: Count
    least_cosine: float

    @property
    def experts_per_token(self) -> float:
        return self.slots

    def build(self, d_model: int) -> "CosineRouter":
        return CosineRouter(d_model, self)


class CosineRouter(nn.Module):
    quantizable = ()

    def __init__(self, d_model: int, config: CosineRouterConfig) -> None:
        super().__init__()
        self.config, self.num_experts = config, config.num_experts
        self.directions = nn.Parameter(torch.empty(config.num_experts, d_model))
        self.temperature = nn.Parameter(torch.empty(1))
        self.register_buffer("selection_bias", torch.zeros(config.num_experts))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.directions, std=std)
        nn.init.constant_(self.temperature, 3.0)

    def forward(self, x_ND: Tensor) -> Routing:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        x_ND, directions_ED = x_ND.to(wide), self.directions.to(wide)
        with exact_products(x_ND.device.type):
            x_ND, directions_ED = normalize(x_ND, dim=-1), normalize(directions_ED, dim=-1)
            cosine_NE = x_ND @ directions_ED.T
        logits_NE = cosine_NE * self.temperature
        scores_NE = logits_NE.softmax(dim=-1)
        experts_NK = (scores_NE + self.selection_bias).topk(self.config.slots, dim=-1).indices
        empty_NK = cosine_NE.gather(1, experts_NK) < self.config.least_cosine
        weights_NK = scores_NE.gather(1, experts_NK).masked_fill(empty_NK, 0)
        experts_NK = experts_NK.masked_fill(empty_NK, self.num_experts)
        return Routing(weights_NK, experts_NK, scores_NE, logits_NE)


@dataclass(frozen=True, kw_only=True)
class SquaredConfig(Config):
    """A feed-forward layer with a squared ReLU and a scale of its own."""

    width: Count
    leak: float = 0.0

    def build(self, d_model: int) -> "Squared":
        return Squared(d_model, self)


class Squared(nn.Module):
    residual_outputs = ("down.weight",)

    def __init__(self, d_model: int, config: SquaredConfig) -> None:
        super().__init__()
        self.leak = config.leak
        self.up = nn.Linear(d_model, config.width)
        self.down = nn.Linear(config.width, d_model)
        self.scale = nn.Parameter(torch.empty(config.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.up(x_BTD)
        return self.down(self.scale * (hidden_BTF.relu().square() + self.leak * hidden_BTF))


CLASSES = [DecayConfig, CosineRouterConfig, SquaredConfig]
