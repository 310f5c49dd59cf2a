"""What nearly all families share with Llama: tensor names, and keys of sizes, heads and rope.

This is no family itself. An adapter uses these parts and adds what is particular to its family.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from modeling import GQAConfig, LayerConfig, ModelConfig, QKNormConfig, RopeConfig, YarnConfig
from moe import ConfigError

from ..config_file import Fields, NamedInt
from ..mapping import Rule

MAX_POSITIONS = 2**40  # positions


def model_config(fields: Fields, layers: Iterable[LayerConfig], **more: Any) -> ModelConfig:
    """The model config: sizes, under the keys that all families share, and these layers."""
    fields.choice("hidden_act", known=["silu"], default="silu")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        layers=tuple(layers),
        norm_epsilon=fields.number("rms_norm_eps"),
        max_length=fields.integer("max_position_embeddings", at_most=MAX_POSITIONS),
        published=dict(fields.raw),
        **{"tied_embeddings": fields.flag("tie_word_embeddings", default=False)} | more,
    )


def num_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", at_most=1000)


def grouped_query(fields: Fields, rope: RopeConfig, **more: Any) -> GQAConfig:
    """Grouped-query attention, with sizes under the shared keys; more: the family's own fields."""
    heads = fields.integer("num_attention_heads")
    return GQAConfig(
        num_heads=heads,
        kv_heads=fields.integer("num_key_value_heads", default=heads),
        head_width=head_width(fields),
        rope=rope,
        **more,
    )


def biases(fields: Fields) -> dict[str, bool]:
    """attention_bias, in families where it is for all four projections."""
    bias = fields.flag("attention_bias", default=False)
    return {"qkv_bias": bias, "output_bias": bias}


def qk_norm(fields: Fields, **more: Any) -> QKNormConfig:
    return QKNormConfig(epsilon=fields.number("rms_norm_eps"), **more)


def head_width(fields: Fields) -> int:
    """head_dim; if it is absent, hidden_size / num_attention_heads."""
    if fields.has("head_dim", "attention_head_dim"):
        return fields.integer("head_dim", "attention_head_dim")
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.check(
        width % heads == 0, "num_attention_heads", heads, f"a divisor of hidden_size = {width}"
    )
    return fields.attach_key(NamedInt, "hidden_size / num_attention_heads", width // heads)


def rope_config(
    fields: Fields, width: int, theta: float = 10000.0, layout: str = "half"
) -> RopeConfig:
    """Rope over `width` dimensions, from rope_theta and rope_scaling or from rope_parameters.

    theta: the family's default. YaRN's amplitude is set; the softmax multiplier, which only latent
    attention has, is not.
    """
    section = rope_section(fields)
    theta = fields.number("rope_theta", default=theta)
    if section is None:
        return RopeConfig(width=width, theta=theta, layout=layout)
    if section.has("rope_theta"):
        theta = section.number("rope_theta")
    kind = section.choice("rope_type", "type", known=["default", "yarn"], default="default")
    plain = RopeConfig(width=width, theta=theta, layout=layout)
    rope = replace(plain, **yarn(section)) if kind == "yarn" else plain
    nested = [key for key, value in section.raw.items() if isinstance(value, dict | list)]
    unknown = section.unread() if kind == "yarn" else nested
    if unknown:
        raise ConfigError(f"{section.where}{unknown[0]} is not known to change rope of kind {kind}")
    return rope


def rope_section(fields: Fields) -> Fields | None:
    return fields.section("rope_parameters") or fields.section("rope_scaling")


def rotated_width(fields: Fields, default: float = 1.0) -> int:
    """The rotated width of a head: partial_rotary_factor times its width, rounded down."""
    section = rope_section(fields)
    factor = fields.number("partial_rotary_factor", default=default, above=0.0, at_most=1.0)
    if section is not None and section.has("partial_rotary_factor"):
        factor = section.number("partial_rotary_factor", above=0.0, at_most=1.0)
    width = head_width(fields)
    if factor == 1.0:
        return width
    return fields.attach_key(NamedInt, "head_dim * partial_rotary_factor", int(width * factor))


def yarn(section: Fields) -> dict[str, Any]:
    """The fields of a rope that a YaRN section sets."""
    factor = section.number("factor")
    section.number("partial_rotary_factor", default=1.0)
    mscale, mscale_all = mscales(section)
    ratio = (
        yarn_temperature(mscale, factor) / yarn_temperature(mscale_all, factor)
        if mscale and mscale_all
        else yarn_temperature(1.0, factor)
    )
    yarn_config = YarnConfig(
        factor=factor,
        original_length=section.integer("original_max_position_embeddings", at_most=MAX_POSITIONS),
        beta_fast=section.number("beta_fast", default=32.0),
        beta_slow=section.number("beta_slow", default=1.0),
        truncate=section.flag("truncate", default=True),
    )
    return {"yarn": yarn_config, "amplitude": section.number("attention_factor", default=ratio)}


def mscales(section: Fields) -> tuple[float, float]:
    mscale = section.number("mscale", default=0.0, at_least=0)
    return mscale, section.number("mscale_all_dim", default=0.0, at_least=0)


def yarn_temperature(mscale: float, factor: float) -> float:
    """YaRN's temperature, 0.1 * mscale * ln(factor) + 1 (Peng et al. 2023, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def windows(fields: Fields, window: int | None, default: Sequence[str]) -> list[int | None]:
    """The window of each layer, from layer_types; default: the kinds if that is absent."""
    known = ["sliding_attention", "full_attention"]
    kinds = fields.layer_kinds("layer_types", known, default)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def make_rules(names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(ours, published) for ours, published in names.items())


NORMS = make_rules(
    {
        "attention_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
    }
)
ATTENTION = make_rules(
    {
        "attention.q.weight": "self_attn.q_proj.weight",
        "attention.q.bias": "self_attn.q_proj.bias",
        "attention.k.weight": "self_attn.k_proj.weight",
        "attention.k.bias": "self_attn.k_proj.bias",
        "attention.v.weight": "self_attn.v_proj.weight",
        "attention.v.bias": "self_attn.v_proj.bias",
        "attention.o.weight": "self_attn.o_proj.weight",
        "attention.o.bias": "self_attn.o_proj.bias",
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
    }
)


def gated_rules(ours: str, published: str) -> tuple[Rule, ...]:
    """Rules for a dense feed-forward layer or a shared expert."""
    parts = ("gate", "up", "down")
    return make_rules({f"{ours}{part}.weight": f"{published}{part}_proj.weight" for part in parts})


def expert_rules(
    published: str = "mlp.experts.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Rule, ...]:
    """Rules for routed experts: one by one under these names, or fused as in transformers.

    The fused tensor holds the rows of gate first, then those of up.
    """
    ours = [f"feed_forward.experts.{part}" for part in ("gate", "up", "down")]
    singly = (f"{published}{{expert}}.{name}.weight" for name in names)
    return (
        *(Rule(mine, theirs) for mine, theirs in zip(ours, singly, strict=True)),
        Rule((ours[0], ours[1]), published + "gate_up_proj", "E (P F) D -> P E F D"),
        Rule(ours[2], published + "down_proj"),
    )


DENSE = gated_rules("feed_forward.", "mlp.")
ROUTER = (Rule("feed_forward.router.weight", "mlp.gate.weight"),)


def decoder_rules(block: Iterable[Rule], model: str = "model.", head: str = "") -> tuple[Rule, ...]:
    """Rules for the whole model; model, head: published prefixes."""
    return (
        Rule("embed.weight", model + "embed_tokens.weight"),
        *(rule.under("layers.{layer}.", model + "layers.{layer}.") for rule in block),
        Rule("norm.weight", model + "norm.weight"),
        Rule("head.weight", head + "lm_head.weight"),
    )


INV_FREQ = "model.layers.*.self_attn.rotary_emb.inv_freq"  # recomputed from the config
