"""Small models of odd widths, filled with noise, and what they compute written out plainly.

The `plain_` functions follow the papers' equations position by position and head by head. They
read a module's weights and its config and call none of its methods.
"""

import math

import torch
from torch import Tensor, nn

from modeling import (
    DenseConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    RopeConfig,
    Transformer,
    YarnConfig,
)
from moe import MoEConfig

YARN = YarnConfig(factor=4.0, original_length=64, beta_fast=16.0, beta_slow=1.0)


def rope(**changes) -> RopeConfig:
    return RopeConfig(**{"width": 4, "theta": 50.0, "layout": "interleaved"} | changes)


def mla(**changes) -> MLAConfig:
    widths = {"num_heads": 3, "query_rank": 9, "kv_rank": 6, "nope_width": 5, "value_width": 7}
    return MLAConfig(**widths | {"rope": rope(), "bias": True} | changes)


def gqa(**changes) -> GQAConfig:
    widths = {"num_heads": 6, "kv_heads": 3, "head_width": 7}
    return GQAConfig(**widths | {"rope": rope(layout="half")} | changes)


def grouped_experts(**changes) -> MoEConfig:
    """Eight experts in four groups, chosen by biased sigmoids, with a shared one."""
    experts = {"num_experts": 8, "top_k": 3, "expert_width": 5, "shared_width": 9}
    groups = {"num_groups": 4, "groups_kept": 2, "group_score": "top2_sum"}
    weighing = {"normalize": True, "normalize_epsilon": 1e-20, "scale": 1.7}
    scoring = {"scoring": "sigmoid", "selection_bias": True}
    return MoEConfig(**experts | groups | weighing | scoring | changes)


def softmax_experts(**changes) -> MoEConfig:
    """Five experts weighed by their softmax probabilities as they are."""
    experts = {"num_experts": 5, "top_k": 2, "expert_width": 6, "scoring": "softmax"}
    return MoEConfig(**experts | changes)


def model_config(attention: GQAConfig | MLAConfig, mtp: int = 0, **changes) -> ModelConfig:
    """A dense layer, two sparse ones and `mtp` prediction modules, all with this attention."""
    kinds = DenseConfig(width=10), grouped_experts(), softmax_experts()
    layers = tuple(LayerConfig(attention=attention, feed_forward=kind) for kind in kinds)
    sizes = {"vocab_size": 23, "d_model": 11, "max_length": 64}
    return ModelConfig(**sizes | {"layers": layers, "mtp": (layers[1:] * 2)[:mtp]} | changes)


def transformer(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A randomised `Transformer` that tracks no gradients."""
    model = Transformer(config).to(dtype).requires_grad_(False)
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer with noise: matrices wide enough that attention is uneven,
    norms around 1, biases around 0 with both signs."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.dim() > 1:
            noise *= 2.5 / tensor.shape[-1] ** 0.5
        elif name.endswith("bias"):
            noise = noise.abs() * torch.tensor([0.4, -0.4]).repeat(noise.numel())[: noise.numel()]
        else:
            noise = 1.0 + 0.4 * noise
        tensor.copy_(noise)


def random_tokens(batch: int, length: int, vocab_size: int = 23, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


def plain_norm(x_D: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean of squares + epsilon) * weight over the last dimension."""
    return x_D / (x_D.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight_D


def plain_frequencies(rope: RopeConfig) -> list[float]:
    """Radians per position of each pair; YaRN as in section 3.2 of its paper."""
    d = rope.width
    frequencies = [rope.theta ** (-2 * i / d) for i in range(d // 2)]
    if (yarn := rope.yarn) is None:
        return frequencies

    def corner(rotations: float) -> float:
        cycle = yarn.original_length / (2 * math.pi * rotations)
        return d * math.log(cycle) / (2 * math.log(rope.theta))

    low, high = corner(yarn.beta_fast), corner(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(d // 2)]
    return [f / yarn.factor * r + f * (1 - r) for f, r in zip(frequencies, ramp, strict=True)]


def plain_rotation(x_P: Tensor, rope: RopeConfig, position: int) -> Tensor:
    """One head's vector, its pairs turned one after the other by 2 x 2 rotations."""
    turned_P, half = x_P.clone(), rope.width // 2
    for i, frequency in enumerate(plain_frequencies(rope)):
        a, b = (i, i + half) if rope.layout == "half" else (2 * i, 2 * i + 1)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turned_P[a] = rope.amplitude * (x_P[a] * cos - x_P[b] * sin)
        turned_P[b] = rope.amplitude * (x_P[b] * cos + x_P[a] * sin)
    return turned_P


def plain_linear(x_D: Tensor, linear: nn.Linear) -> Tensor:
    y = x_D @ linear.weight.T
    return y if linear.bias is None else y + linear.bias


def plain_head(q_TP: Tensor, k_TP: Tensor, v_TM: Tensor, scale: float) -> Tensor:
    """Causal attention of one head, one query after the other."""
    y_TM = torch.zeros(len(q_TP), v_TM.shape[1], dtype=v_TM.dtype)
    for t in range(len(q_TP)):
        scores = [scale * float(q_TP[t] @ k_TP[s]) for s in range(t + 1)]
        powers = [math.exp(score - max(scores)) for score in scores]
        y_TM[t] = sum(power / sum(powers) * v_TM[s] for s, power in enumerate(powers))
    return y_TM


def plain_gqa(module: nn.Module, config: GQAConfig, x_TD: Tensor) -> Tensor:
    """Ainslie et al. 2023: query head h uses key-value head h // (H / J)."""
    T, P, rope = len(x_TD), config.head_width, config.rope
    q_THP = plain_linear(x_TD, module.q).view(T, config.num_heads, P)
    k_TJP = plain_linear(x_TD, module.k).view(T, config.kv_heads, P)
    v_TJP = plain_linear(x_TD, module.v).view(T, config.kv_heads, P)
    heads = []
    for h in range(config.num_heads):
        j = h // (config.num_heads // config.kv_heads)
        q_TP = torch.stack([plain_rotation(q_THP[t, h], rope, t) for t in range(T)])
        k_TP = torch.stack([plain_rotation(k_TJP[t, j], rope, t) for t in range(T)])
        scale = rope.softmax_multiplier / math.sqrt(P)
        heads.append(plain_head(q_TP, k_TP, v_TJP[:, j], scale))
    return plain_linear(torch.cat(heads, dim=-1), module.o)


def plain_mla(module: nn.Module, config: MLAConfig, x_TD: Tensor) -> Tensor:
    """DeepSeek-V2, equations 37 to 47: per head [no position | rotated], one shared rotary key."""
    T, H, rope, epsilon = len(x_TD), config.num_heads, config.rope, config.latent_norm_epsilon
    P, R, C, M = config.nope_width, config.rope.width, config.kv_rank, config.value_width
    if config.query_rank is None:
        q_THp = plain_linear(x_TD, module.q).view(T, H, P + R)
    else:
        compressed = plain_linear(x_TD, module.q.compress)
        latent_TQ = plain_norm(compressed, module.q.norm.weight, epsilon)
        q_THp = plain_linear(latent_TQ, module.q.expand).view(T, H, P + R)
    down_TW = plain_linear(x_TD, module.kv_compress)
    latent_TC = plain_norm(down_TW[:, :C], module.kv_norm.weight, epsilon)
    key_TR = torch.stack([plain_rotation(down_TW[t, C:], rope, t) for t in range(T)])
    heads = []
    for h in range(H):
        up = module.kv_expand.weight[h * (P + M) : (h + 1) * (P + M)]
        turned = [plain_rotation(q_THp[t, h, P:], rope, t) for t in range(T)]
        q_Tp = torch.cat([q_THp[:, h, :P], torch.stack(turned)], dim=-1)
        k_Tp = torch.cat([latent_TC @ up[:P].T, key_TR], dim=-1)
        scale = rope.softmax_multiplier / math.sqrt(P + R)
        heads.append(plain_head(q_Tp, k_Tp, latent_TC @ up[P:].T, scale))
    return plain_linear(torch.cat(heads, dim=-1), module.o)


def plain_swiglu(x_D: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    gate_F = gate_FD @ x_D
    return down_DF @ (gate_F / (1 + (-gate_F).exp()) * (up_FD @ x_D))


def plain_moe(module: nn.Module, config: MoEConfig, x_D: Tensor) -> Tensor:
    """One token through its experts (DeepSeek-V2, 2.2.1 and 2.2.2; DeepSeek-V3, 2.1.2)."""
    logits = (module.router.weight @ x_D).tolist()
    powers = [math.exp(logit) for logit in logits]
    softmax = config.scoring == "softmax"
    scores = [p / sum(powers) if softmax else p / (1 + p) for p in powers]
    bias = module.router.selection_bias
    choice = [s + (0.0 if bias is None else float(bias[e])) for e, s in enumerate(scores)]
    size, best = config.num_experts // config.num_groups, 2 if config.group_score != "max" else 1
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:best]))
    reachable = [e for group in groups[: config.groups_kept] for e in group]
    chosen = sorted(reachable, key=lambda e: -choice[e])[: config.top_k]
    total = sum(scores[e] for e in chosen) if config.normalize else 1.0
    y_D, experts = torch.zeros_like(x_D), module.experts
    for e in chosen:
        out_D = plain_swiglu(x_D, experts.gate[e], experts.up[e], experts.down[e])
        y_D += config.scale * scores[e] / total * out_D
    if module.shared is not None:
        y_D += plain_feed_forward(module.shared, x_D)
    return y_D


def plain_feed_forward(module: nn.Module, x_D: Tensor) -> Tensor:
    return plain_swiglu(x_D, module.gate.weight, module.up.weight, module.down.weight)


def plain_block(block: nn.Module, layer: LayerConfig, epsilon: float, x_TD: Tensor) -> Tensor:
    attention = plain_mla if isinstance(layer.attention, MLAConfig) else plain_gqa
    normed_TD = plain_norm(x_TD, block.attention_norm.weight, epsilon)
    x_TD = x_TD + attention(block.attention, layer.attention, normed_TD)
    normed_TD = plain_norm(x_TD, block.feed_forward_norm.weight, epsilon)
    if isinstance(layer.feed_forward, DenseConfig):
        rows = [plain_feed_forward(block.feed_forward, x_D) for x_D in normed_TD]
    else:
        rows = [plain_moe(block.feed_forward, layer.feed_forward, x_D) for x_D in normed_TD]
    return x_TD + torch.stack(rows)


def plain_states(model: Transformer, tokens_T: Tensor) -> Tensor:
    """What the head reads, (T, D), for one sequence."""
    config, x_TD = model.config, model.embed.weight[tokens_T]
    for block, layer in zip(model.layers, config.layers, strict=True):
        x_TD = plain_block(block, layer, config.norm_epsilon, x_TD)
    return plain_norm(x_TD, model.norm.weight, config.norm_epsilon)
