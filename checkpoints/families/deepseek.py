"""What several families share with DeepSeek: latent attention, V3's routing, MTP modules.

This is no family itself; it extends `llama`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from modeling import LayerConfig, MLAConfig, ModelConfig, MTPConfig, RopeConfig
from moe import DenseConfig, MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Rule
from . import llama


def v3_experts(fields: Fields, sigmoid: Sequence[str] = ("sigmoid",)) -> MoEConfig:
    """Sigmoid scores, a selection bias, groups scored by their two best experts.

    sigmoid: the names of these scores in the family's files.
    """
    fields.choice("scoring_func", known=sigmoid, default="sigmoid")
    fields.choice("topk_method", known=["noaux_tc"], default="noaux_tc")
    return MoEConfig(
        router=TopK(
            scoring="sigmoid",
            selection_bias=True,
            num_experts=fields.integer("n_routed_experts", "num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            num_groups=fields.integer("n_group", default=1),
            groups_kept=fields.integer("topk_group", default=1),
            group_score="top2_sum",
            normalize=fields.flag("norm_topk_prob"),
            normalize_epsilon=1e-20,
            scale=fields.number("routed_scaling_factor"),
        ),
        expert_width=fields.integer("moe_intermediate_size"),
        shared_width=shared_width(fields),
    )


def shared_width(fields: Fields) -> int:
    """Several shared experts are stored, and run, as one whose width is their sum."""
    count = fields.integer("n_shared_experts", default=0, at_least=0)
    return count * fields.integer("moe_intermediate_size")


def latent_attention(fields: Fields, layout: str) -> MLAConfig:
    return MLAConfig(
        num_heads=fields.integer("num_attention_heads"),
        query_rank=fields.optional_integer("q_lora_rank"),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_width=fields.integer("qk_nope_head_dim"),
        value_width=fields.integer("v_head_dim"),
        rope=latent_rope(fields, layout),
        bias=fields.flag("attention_bias", default=False),
        # transformers builds these norms with 1e-6 whatever rms_norm_eps says (Moonlight: 1e-5)
        latent_norm_epsilon=1e-6,
    )


def rope_layout(fields: Fields) -> str:
    return "interleaved" if fields.flag("rope_interleave", default=True) else "half"


def latent_rope(fields: Fields, layout: str) -> RopeConfig:
    """Rope with YaRN's second correction, of the softmax scale, at every length.

    (transformers' deepseek_v2 lacked it until mid-2026.)
    """
    rope = llama.rope_config(fields, fields.integer("qk_rope_head_dim"), layout=layout)
    section = llama.rope_section(fields)
    if rope.yarn is None or section is None:
        return rope
    correction = llama.yarn_temperature(llama.mscales(section)[1], rope.yarn.factor)
    return replace(rope, softmax_multiplier=correction * correction)


def leading_dense(
    fields: Fields, attention: Any, moe: MoEConfig, mtp: bool = True, **more: Any
) -> ModelConfig:
    """`first_k_dense_replace` dense layers, then sparse ones, then MTP modules (sparse too)."""
    fields.integer("moe_layer_freq", default=1, at_most=1)
    count = llama.num_layers(fields)
    num_dense = fields.integer("first_k_dense_replace", at_least=0, at_most=count)
    kinds = ["dense"] * num_dense + ["sparse"] * (count - num_dense)
    return dense_and_sparse(fields, attention, moe, kinds, mtp, **more)


def dense_and_sparse(
    fields: Fields,
    attention: Any,
    moe: MoEConfig,
    kinds: Iterable[str],
    mtp: bool = False,
    **more: Any,
) -> ModelConfig:
    """Dense and sparse layers with the same attention. mtp: read MTP modules, which are sparse."""
    sparse = LayerConfig(attention=attention, feed_forward=moe)
    layers = [
        sparse if kind == "sparse" else replace(sparse, feed_forward=dense(fields))
        for kind in kinds
    ]
    if mtp:
        more["mtp"] = replace(
            mtp_modules(fields, sparse),
            own_embedding=fields.flag("mtp_own_embedding", default=False),
            own_head=fields.flag("mtp_own_head", default=False),
        )
    return llama.model_config(fields, layers, **more)


def layer_kinds(fields: Fields) -> list[str]:
    """mlp_layer_types; without it the first first_k_dense_replace layers (default 1) are dense."""
    count = llama.num_layers(fields)
    num_dense = fields.integer("first_k_dense_replace", default=1, at_least=0, at_most=count)
    default = ["dense"] * num_dense + ["sparse"] * (count - num_dense)
    return fields.layer_kinds("mlp_layer_types", ["dense", "sparse"], default)


def dense(fields: Fields) -> DenseConfig:
    return DenseConfig(width=fields.integer("intermediate_size"))


def mtp_modules(fields: Fields, block: LayerConfig) -> MTPConfig:
    """The modules that the config announces.

    No release documents how they are wired; `MTPConfig` gives the sources of its defaults. The keys
    read here override them: mtp_hidden_states_first, which transformers reads in every family, and
    this project's own mtp_input and mtp_carry, which record what `probe-mtp` found.
    """
    keys = "num_nextn_predict_layers", "num_mtp_layers"
    count = fields.integer(*keys, default=0, at_least=0, at_most=1000)
    state_first = fields.flag("mtp_hidden_states_first", default=False)
    return MTPConfig(
        blocks=(block,) * count,
        input=fields.choice("mtp_input", known=["normed", "raw"], default="normed"),
        carry=fields.choice("mtp_carry", known=["normed", "raw", "main"], default="normed"),
        first="state" if state_first else "embedding",
    )


LATENT_ATTENTION = llama.make_rules(
    {
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
    }
)
FEED_FORWARD = (
    *llama.DENSE,
    *llama.ROUTER,
    Rule("feed_forward.router.selection_bias", "mlp.gate.e_score_correction_bias"),
    *llama.expert_rules(),
    *llama.gated_rules("feed_forward.shared.", "mlp.shared_experts."),
)
BLOCK = (*llama.NORMS, *LATENT_ATTENTION, *FEED_FORWARD)
MTP = llama.make_rules(
    {
        "embedding_norm.weight": "enorm.weight",
        "state_norm.weight": "hnorm.weight",
        "projection.weight": "eh_proj.weight",
        "norm.weight": "shared_head.norm.weight",
        # present if they do not repeat the main model's
        "embed.weight": "embed_tokens.weight",
        "head.weight": "shared_head.head.weight",
    }
)
MTP_COPIES = (
    Rule("embed.weight", "model.layers.{layer}.embed_tokens.weight"),
    Rule("head.weight", "model.layers.{layer}.shared_head.head.weight"),
)


def mtp_rules(block: Iterable[Rule]) -> tuple[Rule, ...]:
    """The decoder and its MTP modules, which are published as the layers after the last one."""
    block = tuple(block)
    theirs = "model.layers.{layer}."
    return (
        *llama.decoder_rules(block),
        *(rule.under("mtp.{layer}.", theirs) for rule in MTP),
        *(rule.under("mtp.{layer}.block.", theirs) for rule in block),
    )
