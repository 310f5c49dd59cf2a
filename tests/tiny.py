"""Small models of odd widths, filled with noise, and what they compute written out plainly.

The `plain_` functions follow the papers' equations position by position and head by head. They
read a module's weights and its config and call none of its methods.
"""

import math
from dataclasses import fields as dataclass_fields
from dataclasses import replace

import torch
from torch import Tensor, nn

from modeling import (
    GQAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MTPConfig,
    QKNormConfig,
    RopeConfig,
    Transformer,
    YarnConfig,
)
from modeling.testing import random_tokens, transformer
from modeling.testing import tiny_gqa as gqa
from modeling.testing import tiny_mla as mla
from modeling.testing import tiny_rope as rope
from moe import Clamp, DenseConfig, MoEConfig, TopK
from moe.testing import randomize
from moe.testing import tiny_moe as grouped_experts

YARN = YarnConfig(factor=4.0, original_length=64, beta_fast=16.0, beta_slow=1.0)


def sparse(**fields) -> MoEConfig:
    """A layer with a top-k router, from the fields of both."""
    of_router = {name: fields.pop(name) for name in list(fields) if name in ROUTER_FIELDS}
    return MoEConfig(**{"router": TopK(**of_router)} | fields)


ROUTER_FIELDS = {field.name for field in dataclass_fields(TopK)}


def softmax_experts(**changes) -> MoEConfig:
    """Five experts weighed by their softmax probabilities as they are."""
    experts = {"num_experts": 5, "top_k": 2, "expert_width": 6, "scoring": "softmax"}
    return sparse(**experts | changes)


def modules(layers: tuple[LayerConfig, ...], count: int, **wiring) -> MTPConfig:
    """So many prediction modules with blocks like these layers in turn."""
    return MTPConfig(blocks=(layers * 3)[:count], **wiring)


def model_config(attention: GQAConfig | MLAConfig, mtp: int = 0, **changes) -> ModelConfig:
    """A dense layer, two sparse ones and `mtp` prediction modules, all with this attention."""
    kinds = DenseConfig(width=10), grouped_experts(), softmax_experts()
    layers = tuple(LayerConfig(attention=attention, feed_forward=kind) for kind in kinds)
    return sized(**{"layers": layers, "mtp": modules(layers[1:], mtp)} | changes)


def sized(**fields) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 23, "d_model": 11, "max_length": 64} | fields)


def windows_and_sinks(mtp: int = 0) -> ModelConfig:
    """Windows and a full view in turn, each with its rope; sinks, biases, clamped experts."""
    extras = {"sinks": True, "qkv_bias": True, "output_bias": True}
    local, far = gqa(window=3, **extras), gqa(rope=rope(theta=900.0, yarn=YARN), **extras)
    clamped = softmax_experts(
        normalize=True, router_bias=True, expert_biases=True, clamp=Clamp(limit=1.2, alpha=1.7)
    )
    layers = tuple(LayerConfig(attention=a, feed_forward=clamped) for a in (local, far, local))
    return sized(layers=layers, mtp=modules(layers, mtp))


def norms_behind(mtp: int = 0) -> ModelConfig:
    """Norms behind the sublayers, in one layer before them too, and over all heads of a token."""
    attention = gqa(qk_norm=QKNormConfig(over="all", epsilon=1e-5))
    plain = model_config(attention).layers
    layers = tuple(
        replace(layer, norm_before=i == 1, norm_after=True) for i, layer in enumerate(plain)
    )
    return sized(layers=layers, mtp=modules(layers[1:], mtp))


def norms_of_heads_and_multipliers(mtp: int = 0) -> ModelConfig:
    """Heads normed after their rotation, a gated shared expert, multipliers, a tied head."""
    attention = gqa(qk_norm=QKNormConfig(after_rope=True, epsilon=1e-5), scale=0.6)
    experts = grouped_experts(
        shared_gate=True, expert_biases=True, clamp=Clamp(limit=0.8, alpha=1.2)
    )
    layer = LayerConfig(attention=attention, feed_forward=experts, residual_multiplier=0.7)
    multipliers = {"embedding_multiplier": 3.0, "logits_multiplier": 0.4, "tied_embeddings": True}
    return sized(layers=(layer,) * 2, mtp=modules((layer,), mtp), **multipliers)


VARIED = {
    "windows and sinks": windows_and_sinks,
    "norms behind": norms_behind,
    "norms of heads and multipliers": norms_of_heads_and_multipliers,
}


@torch.no_grad()
def agreeable(config: ModelConfig, strength: float = 0.05) -> Transformer:
    """A model whose drafts are often right: its layers add little to the embedding."""
    model = transformer(config, seed=4)
    for module in model.modules():
        for name in getattr(module, "residual_outputs", ()):
            module.get_parameter(name).mul_(strength)
    seen = slice(config.d_model, None) if config.mtp.first == "state" else slice(config.d_model)
    for module in model.mtp_modules:
        module.projection.weight.zero_()
        module.projection.weight[:, seen] += torch.eye(config.d_model)
        if config.mtp.final_norm == "own":
            module.norm.weight.copy_(model.norm.weight)
        if module.embed is not None:
            module.embed.weight.copy_(model.embed.weight)
        if module.head is not None:
            module.head.weight.copy_(model.head.weight)
    return model


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


def plain_head(
    q_TP: Tensor,
    k_TP: Tensor,
    v_TM: Tensor,
    scale: float,
    window: int | None = None,
    sink: float = -math.inf,
) -> Tensor:
    """Causal attention of one head, one query after the other; the sink has no value."""
    y_TM = torch.zeros(len(q_TP), v_TM.shape[1], dtype=v_TM.dtype)
    for t in range(len(q_TP)):
        seen = [s for s in range(t + 1) if window is None or t - s < window]
        scores = [scale * float(q_TP[t] @ k_TP[s]) for s in seen]
        highest = max(*scores, sink)
        powers = [math.exp(score - highest) for score in scores]
        total = sum(powers) + math.exp(sink - highest)
        y_TM[t] = sum(power / total * v_TM[s] for s, power in zip(seen, powers, strict=True))
    return y_TM


def plain_placed(x_THP: Tensor, norm: nn.Module, config: GQAConfig) -> Tensor:
    """The queries or keys of positions 0, 1, ...: normed and turned, in the config's order."""

    def normed(x_THP: Tensor) -> Tensor:
        if (qk_norm := config.qk_norm) is None:
            return x_THP
        vectors = x_THP if qk_norm.over == "head" else x_THP.reshape(len(x_THP), -1)
        return plain_norm(vectors, norm.weight, qk_norm.epsilon).reshape(x_THP.shape)

    def turned(x_THP: Tensor) -> Tensor:
        positions = enumerate(x_THP)
        rows = [[plain_rotation(x_P, config.rope, t) for x_P in x_HP] for t, x_HP in positions]
        return torch.stack([torch.stack(row) for row in rows])

    after = config.qk_norm is not None and config.qk_norm.after_rope
    return normed(turned(x_THP)) if after else turned(normed(x_THP))


def plain_gqa(module: nn.Module, config: GQAConfig, x_TD: Tensor) -> Tensor:
    """Ainslie et al. 2023: query head h uses key-value head h // (H / J)."""
    T, H, J, P = len(x_TD), config.num_heads, config.kv_heads, config.head_width
    q_THP = plain_placed(plain_linear(x_TD, module.q).view(T, H, P), module.q_norm, config)
    k_TJP = plain_placed(plain_linear(x_TD, module.k).view(T, J, P), module.k_norm, config)
    v_TJP = plain_linear(x_TD, module.v).view(T, J, P)
    scale = 1 / math.sqrt(P) if config.scale is None else config.scale
    scale *= config.rope.softmax_multiplier
    heads = []
    for h in range(H):
        j, sink = h // (H // J), float(module.sinks[h]) if config.sinks else -math.inf
        heads.append(plain_head(q_THP[:, h], k_TJP[:, j], v_TJP[:, j], scale, config.window, sink))
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


def plain_activation(gate: float, up: float, clamp: Clamp | None = None) -> float:
    """silu(gate) * up; clamped: gate * sigmoid(alpha * gate) * (up + 1), gate bounded from above
    and up from both sides."""
    if clamp is None:
        return gate / (1 + math.exp(-gate)) * up
    gate, up = min(gate, clamp.limit), max(-clamp.limit, min(up, clamp.limit))
    return gate / (1 + math.exp(-clamp.alpha * gate)) * (up + 1)


def plain_hidden(gate_F: Tensor, up_F: Tensor, clamp: Clamp | None = None) -> Tensor:
    pairs = zip(gate_F.tolist(), up_F.tolist(), strict=True)
    return gate_F.new_tensor([plain_activation(gate, up, clamp) for gate, up in pairs])


def plain_expert(experts: nn.Module, config: MoEConfig, e: int, x_D: Tensor) -> Tensor:
    gate_F, up_F = experts.gate[e] @ x_D, experts.up[e] @ x_D
    if config.expert_biases:
        gate_F, up_F = gate_F + experts.gate_bias[e], up_F + experts.up_bias[e]
    y_D = experts.down[e] @ plain_hidden(gate_F, up_F, config.clamp)
    return y_D + experts.down_bias[e] if config.expert_biases else y_D


def plain_moe(module: nn.Module, config: MoEConfig, x_D: Tensor) -> Tensor:
    """One token through its experts (DeepSeek-V2, 2.2.1 and 2.2.2; DeepSeek-V3, 2.1.2)."""
    router, logits_E = config.router, module.router.weight @ x_D
    logits = (logits_E + module.router.bias if router.router_bias else logits_E).tolist()
    powers = [math.exp(logit) for logit in logits]
    softmax = router.scoring == "softmax"
    scores = [p / sum(powers) if softmax else p / (1 + p) for p in powers]
    bias = module.router.selection_bias
    choice = [s + (0.0 if bias is None else float(bias[e])) for e, s in enumerate(scores)]
    size, best = router.num_experts // router.num_groups, 2 if router.group_score != "max" else 1
    groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:best]))
    reachable = [e for group in groups[: router.groups_kept] for e in group]
    chosen = sorted(reachable, key=lambda e: -choice[e])[: router.top_k]
    total = sum(scores[e] for e in chosen) if router.normalize else 1.0
    y_D = torch.zeros_like(x_D)
    for e in chosen:
        y_D += router.scale * scores[e] / total * plain_expert(module.experts, config, e, x_D)
    if module.shared is not None:
        score = module.shared.score.weight[0] @ x_D if config.shared_gate else None
        share = 1.0 if score is None else 1 / (1 + (-score).exp())
        y_D += share * plain_feed_forward(module.shared, x_D)
    return y_D


def plain_feed_forward(module: nn.Module, x_D: Tensor) -> Tensor:
    return module.down.weight @ plain_hidden(module.gate.weight @ x_D, module.up.weight @ x_D)


def plain_block(block: nn.Module, layer: LayerConfig, epsilon: float, x_TD: Tensor) -> Tensor:
    def normed(x_TD: Tensor, wanted: bool, norm: nn.Module) -> Tensor:
        return plain_norm(x_TD, norm.weight, epsilon) if wanted else x_TD

    attention = plain_mla if isinstance(layer.attention, MLAConfig) else plain_gqa
    read_TD = normed(x_TD, layer.norm_before, block.attention_norm)
    y_TD = attention(block.attention, layer.attention, read_TD)
    y_TD = normed(y_TD, layer.norm_after, block.attention_output_norm)
    x_TD = x_TD + layer.residual_multiplier * y_TD
    read_TD = normed(x_TD, layer.norm_before, block.feed_forward_norm)
    if isinstance(layer.feed_forward, DenseConfig):
        rows = [plain_feed_forward(block.feed_forward, x_D) for x_D in read_TD]
    else:
        rows = [plain_moe(block.feed_forward, layer.feed_forward, x_D) for x_D in read_TD]
    y_TD = normed(torch.stack(rows), layer.norm_after, block.feed_forward_output_norm)
    return x_TD + layer.residual_multiplier * y_TD


def plain_embedded(model: Transformer, tokens_T: Tensor) -> Tensor:
    return model.config.embedding_multiplier * model.embed.weight[tokens_T]


def plain_raw_states(model: Transformer, tokens_T: Tensor) -> Tensor:
    """What the last block leaves, (T, D), for one sequence."""
    config, x_TD = model.config, plain_embedded(model, tokens_T)
    for block, layer in zip(model.layers, config.layers, strict=True):
        x_TD = plain_block(block, layer, config.norm_epsilon, x_TD)
    return x_TD


def plain_states(model: Transformer, tokens_T: Tensor) -> Tensor:
    """What the head reads, (T, D), for one sequence."""
    config, x_TD = model.config, plain_raw_states(model, tokens_T)
    return config.logits_multiplier * plain_norm(x_TD, model.norm.weight, config.norm_epsilon)


def plain_module(model, number, read_TD, tokens_T):
    """One module on states and the tokens beside them: DeepSeek-V3, equations 21 and 22.

    Returns its states before and after the norm that precedes the head.
    """
    module, config = model.mtp_modules[number - 1], model.config
    epsilon, rows = config.norm_epsilon, []
    table = module.embed.weight if config.mtp.own_embedding else model.embed.weight
    for read_D, token in zip(read_TD, tokens_T, strict=True):
        embedding_D = config.embedding_multiplier * table[token]
        first_D = plain_norm(embedding_D, module.embedding_norm.weight, epsilon)
        second_D = plain_norm(read_D, module.state_norm.weight, epsilon)
        if config.mtp.first == "state":
            first_D, second_D = second_D, first_D
        rows.append(module.projection.weight @ torch.cat([first_D, second_D]))
    raw_TD = plain_block(module.block, config.mtp.blocks[number - 1], epsilon, torch.stack(rows))
    norms = {"own": lambda: module.norm.weight, "main": lambda: model.norm.weight}
    if config.mtp.final_norm == "none":
        return raw_TD, config.logits_multiplier * raw_TD
    weight_D = norms[config.mtp.final_norm]()
    return raw_TD, config.logits_multiplier * plain_norm(raw_TD, weight_D, epsilon)


def plain_first(model, tokens_T):
    """What the first module reads."""
    states = plain_raw_states if model.config.mtp.input == "raw" else plain_states
    return states(model, tokens_T)


def plain_next(model, read_TD, raw_TD, normed_TD):
    """What the next draft is made from."""
    return {"normed": normed_TD, "raw": raw_TD, "main": read_TD}[model.config.mtp.carry]


def plain_mtp_states(model, tokens_T):
    """What the head reads at each depth, position by position (DeepSeek-V3, section 2.2)."""
    read_TD, depths = plain_first(model, tokens_T), []
    for k in range(1, len(model.mtp) + 1):
        read_TD = read_TD[: len(tokens_T) - k]
        raw_TD, normed_TD = plain_module(model, k, read_TD, tokens_T[k:])
        depths.append(normed_TD)
        read_TD = plain_next(model, read_TD, raw_TD, normed_TD)
    return depths
