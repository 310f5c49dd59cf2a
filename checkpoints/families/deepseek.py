"""DeepSeek-V2 and V3 (R1, V3.1), Kimi-K2 and Moonlight: config.json -> ModelConfig.

Kimi-K2 says `kimi_k2` and is a V3 in everything else; Moonlight says `deepseek_v3` itself.
"""

import math

from modeling import DenseConfig, LayerConfig, MLAConfig, ModelConfig, RopeConfig, YarnConfig
from moe import MoEConfig

from ..config_file import Fields
from ..mapping import Family, Rule


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
    fields.integer("moe_layer_freq", default=1, at_most=1)
    num_layers = fields.integer("num_hidden_layers", at_most=1000)
    num_dense = fields.integer("first_k_dense_replace", at_least=0, at_most=num_layers)
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
    mtp_keys = ("num_nextn_predict_layers", "num_mtp_layers")
    num_mtp = fields.integer(*mtp_keys, default=0, at_least=0, at_most=1000)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        layers=tuple(dense if i < num_dense else sparse for i in range(num_layers)),
        mtp=(sparse,) * num_mtp,
        norm_epsilon=fields.number("rms_norm_eps", default=1e-6),
        tied_embeddings=fields.flag("tie_word_embeddings", default=False),
        max_length=fields.integer("max_position_embeddings", at_most=2**40),
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
    mscale = scaling.number("mscale", default=0.0, at_least=0)
    mscale_all = scaling.number("mscale_all_dim", default=0.0, at_least=0)
    ratio = g(mscale, factor) / g(mscale_all, factor) if mscale and mscale_all else g(1.0, factor)
    # besides the amplitude, at every length; transformers' deepseek_v2 lacked it until mid-2026
    multiplier = g(mscale_all, factor) * g(mscale_all, factor) if mscale_all else 1.0
    return RopeConfig(
        width=width,
        theta=theta,
        layout=layout,
        yarn=YarnConfig(
            factor=factor,
            original_length=scaling.integer("original_max_position_embeddings", at_most=2**40),
            beta_fast=scaling.number("beta_fast", default=32.0),
            beta_slow=scaling.number("beta_slow", default=1.0),
            truncate=scaling.flag("truncate", default=True),
        ),
        amplitude=scaling.number("attention_factor", default=ratio),
        softmax_multiplier=multiplier,
    )


def g(mscale: float, factor: float) -> float:
    """YaRN's temperature: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.q.compress.weight": "self_attn.q_a_proj.weight",
    "attention.q.compress.bias": "self_attn.q_a_proj.bias",
    "attention.q.norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q.expand.weight": "self_attn.q_b_proj.weight",
    "attention.kv_compress.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_compress.bias": "self_attn.kv_a_proj_with_mqa.bias",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_expand.weight": "self_attn.kv_b_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "attention.o.bias": "self_attn.o_proj.bias",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
    "feed_forward.router.weight": "mlp.gate.weight",
    "feed_forward.router.selection_bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.experts.gate": "mlp.experts.{expert}.gate_proj.weight",
    "feed_forward.experts.up": "mlp.experts.{expert}.up_proj.weight",
    "feed_forward.experts.down": "mlp.experts.{expert}.down_proj.weight",
    "feed_forward.shared.gate.weight": "mlp.shared_experts.gate_proj.weight",
    "feed_forward.shared.up.weight": "mlp.shared_experts.up_proj.weight",
    "feed_forward.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}

FUSED_EXPERTS = {  # the layout in transformers' memory, met in re-saved files: gate rows, then up
    ("feed_forward.experts.gate", "feed_forward.experts.up"): "mlp.experts.gate_up_proj",
    ("feed_forward.experts.down",): "mlp.experts.down_proj",
}

MTP = {
    "embedding_norm.weight": "enorm.weight",
    "state_norm.weight": "hnorm.weight",
    "projection.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}


def block_rules(prefix: str) -> list[Rule]:
    """Rules of a decoder layer that we keep under `prefix`; the published prefix is always one."""
    theirs = "model.layers.{layer}."
    rules = [Rule(prefix + ours, theirs + published) for ours, published in BLOCK.items()]
    return rules + [
        Rule(tuple(prefix + name for name in ours), theirs + published)
        for ours, published in FUSED_EXPERTS.items()
    ]


RULES = (
    Rule("embed.weight", "model.embed_tokens.weight"),
    *block_rules("layers.{layer}."),
    Rule("norm.weight", "model.norm.weight"),
    Rule("head.weight", "lm_head.weight"),
    *(Rule("mtp.{layer}." + ours, "model.layers.{layer}." + name) for ours, name in MTP.items()),
    *block_rules("mtp.{layer}.block."),
)

MTP_COPIES = (
    Rule("embed.weight", "model.layers.{mtp}.embed_tokens.weight"),
    Rule("head.weight", "model.layers.{mtp}.shared_head.head.weight"),
)

IGNORED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)  # recomputed from the config

V2 = Family(deepseek_v2, RULES, MTP_COPIES, IGNORED)
V3 = Family(deepseek_v3, RULES, MTP_COPIES, IGNORED)
