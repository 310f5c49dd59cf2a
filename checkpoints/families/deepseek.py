"""DeepSeek-V2 and V3 (R1, V3.1), Kimi-K2 and Moonlight: config.json -> ModelConfig.

Kimi-K2 says `kimi_k2` and is a V3 in everything else; Moonlight says `deepseek_v3` itself.
"""

import math

from modeling import DenseConfig, LayerConfig, MLAConfig, ModelConfig, RopeConfig, YarnConfig
from moe import MoEConfig

from ..config_file import Fields


def deepseek_v2(fields: Fields) -> ModelConfig:
    """DeepSeek-V2, V2-Lite, Coder-V2: softmax scores, groups scored by their best expert."""
    fields.choice("scoring_func", known=["softmax"], default="softmax")
    method = fields.choice(
        "topk_method", known=["greedy", "group_limited_greedy"], default="greedy"
    )
    limited = method == "group_limited_greedy"
    moe = MoEConfig(
        scoring="softmax",
        num_experts=fields.integer("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size"),
        num_groups=fields.integer("n_group") if limited else 1,
        groups_kept=fields.integer("topk_group") if limited else 1,
        group_score="max",
        # transformers ignores norm_topk_prob here, and every published V2 has it false
        normalize=False,
        scale=fields.number("routed_scaling_factor", default=1.0),
        shared_width=shared_width(fields),
    )
    return model_config(fields, moe, interleaved=True)


def deepseek_v3(fields: Fields) -> ModelConfig:
    """DeepSeek-V3: sigmoid scores, a selection bias, groups scored by their two best experts."""
    fields.choice("scoring_func", known=["sigmoid"], default="sigmoid")
    fields.choice("topk_method", known=["noaux_tc"], default="noaux_tc")
    moe = MoEConfig(
        scoring="sigmoid",
        selection_bias=True,
        num_experts=fields.integer("n_routed_experts", "num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size"),
        num_groups=fields.integer("n_group", default=1),
        groups_kept=fields.integer("topk_group", default=1),
        group_score="top2_sum",
        normalize=fields.flag("norm_topk_prob", default=True),
        normalize_epsilon=1e-20,
        scale=fields.number("routed_scaling_factor"),
        shared_width=shared_width(fields),
    )
    return model_config(fields, moe, fields.flag("rope_interleave", default=True))


def shared_width(fields: Fields) -> int:
    """Several shared experts are stored, and run, as one of their summed width."""
    count = fields.integer("n_shared_experts", default=0, at_least=0)
    return count * fields.integer("moe_intermediate_size")


def model_config(fields: Fields, moe: MoEConfig, interleaved: bool) -> ModelConfig:
    """What V2 and V3 share: MLA, leading dense layers, the names of the sizes."""
    fields.choice("hidden_act", known=["silu"], default="silu")
    fields.integer("moe_layer_freq", default=1)
    num_layers = fields.integer("num_hidden_layers")
    num_dense = fields.integer("first_k_dense_replace", at_least=0)
    attention = MLAConfig(
        num_heads=fields.integer("num_attention_heads"),
        query_rank=fields.optional_integer("q_lora_rank"),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_width=fields.integer("qk_nope_head_dim"),
        value_width=fields.integer("v_head_dim"),
        rope=rope_config(fields, "interleaved" if interleaved else "half"),
        bias=fields.flag("attention_bias", default=False),
        # transformers builds these norms with 1e-6 whatever rms_norm_eps says (Moonlight: 1e-5)
        latent_norm_epsilon=1e-6,
    )
    dense = LayerConfig(
        attention=attention,
        feed_forward=DenseConfig(width=fields.integer("intermediate_size")),
    )
    sparse = LayerConfig(attention=attention, feed_forward=moe)
    num_mtp = fields.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, at_least=0)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        layers=tuple(dense if i < num_dense else sparse for i in range(num_layers)),
        mtp=(sparse,) * num_mtp,
        norm_epsilon=fields.number("rms_norm_eps", default=1e-6),
        tied_embeddings=fields.flag("tie_word_embeddings", default=False),
        max_length=fields.integer("max_position_embeddings"),
        published=dict(fields.raw),
    )


def rope_config(fields: Fields, layout: str) -> RopeConfig:
    """Rope from the old keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    width = fields.integer("qk_rope_head_dim")
    nested = fields.section("rope_parameters")
    scaling = nested or fields.section("rope_scaling")
    theta = fields.number("rope_theta", default=10000.0)
    if nested is not None:
        theta = nested.number("rope_theta", default=theta)
    if scaling is None:
        return RopeConfig(width=width, theta=theta, layout=layout)
    kind = scaling.choice("rope_type", "type", known=["default", "yarn"], default="default")
    if kind == "default":
        return RopeConfig(width=width, theta=theta, layout=layout)
    factor = scaling.number("factor")
    mscale = scaling.number("mscale", default=0.0)
    mscale_all = scaling.number("mscale_all_dim", default=0.0)
    ratio = g(mscale, factor) / g(mscale_all, factor) if mscale and mscale_all else g(1.0, factor)
    return RopeConfig(
        width=width,
        theta=theta,
        layout=layout,
        yarn=YarnConfig(
            factor=factor,
            original_length=scaling.integer("original_max_position_embeddings"),
            beta_fast=scaling.number("beta_fast", default=32.0),
            beta_slow=scaling.number("beta_slow", default=1.0),
            truncate=scaling.flag("truncate", default=True),
        ),
        amplitude=scaling.number("attention_factor", default=ratio),
        softmax_multiplier=g(mscale_all, factor) ** 2 if mscale_all else 1.0,
    )


def g(mscale: float, factor: float) -> float:
    """YaRN's temperature: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
