"""What nearly all families inherited from Llama: tensor names, keys of sizes, heads and rope.

No family itself. An adapter takes from here what its files share with the others and writes down
what is its own.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from modeling import GQAConfig, LayerConfig, ModelConfig, QKNormConfig, RopeConfig, YarnConfig
from moe import ConfigError

from ..config_file import Fields, NamedInt
from ..mapping import Rule

MOST = 2**40  # positions


def model_config(fields: Fields, layers: Iterable[LayerConfig], **more: Any) -> ModelConfig:
    """The whole model: sizes under the names that all files share, and these layers."""
    fields.choice("hidden_act", known=["silu"], default="silu")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        layers=tuple(layers),
        norm_epsilon=fields.number("rms_norm_eps"),
        max_length=fields.integer("max_position_embeddings", at_most=MOST),
        published=dict(fields.raw),
        **{"tied_embeddings": fields.flag("tie_word_embeddings", default=False)} | more,
    )


def num_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", at_most=1000)


def grouped_query(fields: Fields, rope: RopeConfig, **more: Any) -> GQAConfig:
    """Grouped-query attention under the shared names of its sizes; `more` is the family's own."""
    heads = fields.integer("num_attention_heads")
    return GQAConfig(
        num_heads=heads,
        kv_heads=fields.integer("num_key_value_heads", default=heads),
        head_width=head_width(fields),
        rope=rope,
        **more,
    )


def biases(fields: Fields) -> dict[str, bool]:
    """attention_bias, where it means all four projections."""
    bias = fields.flag("attention_bias", default=False)
    return {"qkv_bias": bias, "output_bias": bias}


def qk_norm(fields: Fields, **more: Any) -> QKNormConfig:
    return QKNormConfig(epsilon=fields.number("rms_norm_eps"), **more)


def head_width(fields: Fields) -> int:
    """head_dim, which need not be hidden_size / num_attention_heads; that where it is not given."""
    if fields.has("head_dim", "attention_head_dim"):
        return fields.integer("head_dim", "attention_head_dim")
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.check(
        width % heads == 0, "num_attention_heads", heads, f"a divisor of hidden_size = {width}"
    )
    return fields.give(NamedInt, "hidden_size / num_attention_heads", width // heads)


def rope_config(
    fields: Fields, width: int, theta: float = 10000.0, layout: str = "half"
) -> RopeConfig:
    """Rope over `width` dimensions from the old keys (rope_theta, rope_scaling), or the new one.

    theta: what the family means where it is not given. YaRN's amplitude is set; the softmax
    multiplier, which latent attention alone has, is not.
    """
    section = rope_section(fields)
    theta = fields.number("rope_theta", default=theta)
    if section is None:
        return RopeConfig(width=width, theta=theta, layout=layout)
    theta = section.number("rope_theta", default=theta)
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
    """How much of a head is rotated: partial_rotary_factor of it, rounded down."""
    section = rope_section(fields)
    factor = fields.number("partial_rotary_factor", default=default, above=0.0, at_most=1.0)
    if section is not None:
        factor = section.number("partial_rotary_factor", default=factor, above=0.0, at_most=1.0)
    width = head_width(fields)
    if factor == 1.0:
        return width
    return fields.give(NamedInt, "head_dim * partial_rotary_factor", int(width * factor))


def yarn(section: Fields) -> dict[str, Any]:
    """What a YaRN section makes of a rope."""
    factor = section.number("factor")
    section.number("partial_rotary_factor", default=1.0)
    mscale, mscale_all = mscales(section)
    ratio = g(mscale, factor) / g(mscale_all, factor) if mscale and mscale_all else g(1.0, factor)
    stretch = YarnConfig(
        factor=factor,
        original_length=section.integer("original_max_position_embeddings", at_most=MOST),
        beta_fast=section.number("beta_fast", default=32.0),
        beta_slow=section.number("beta_slow", default=1.0),
        truncate=section.flag("truncate", default=True),
    )
    return {"yarn": stretch, "amplitude": section.number("attention_factor", default=ratio)}


def mscales(section: Fields) -> tuple[float, float]:
    mscale = section.number("mscale", default=0.0, at_least=0)
    return mscale, section.number("mscale_all_dim", default=0.0, at_least=0)


def g(mscale: float, factor: float) -> float:
    """YaRN's temperature: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def windows(fields: Fields, window: int | None, default: Sequence[str]) -> list[int | None]:
    """The window of each layer by layer_types; default: the kinds where that is absent."""
    known = ["sliding_attention", "full_attention"]
    kinds = fields.layer_kinds("layer_types", known, default)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def rules(names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(ours, published) for ours, published in names.items())


NORMS = rules(
    {
        "attention_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
    }
)
ATTENTION = rules(
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


def gated(ours: str, published: str) -> tuple[Rule, ...]:
    """A dense feed-forward layer, or a shared expert."""
    parts = ("gate", "up", "down")
    return rules({f"{ours}{part}.weight": f"{published}{part}_proj.weight" for part in parts})


def experts(
    published: str = "mlp.experts.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Rule, ...]:
    """Routed experts: one by one under these names, or fused as transformers holds them.

    The fused tensor has the rows of gate first, then those of up.
    """
    ours = [f"feed_forward.experts.{part}" for part in ("gate", "up", "down")]
    singly = (f"{published}{{expert}}.{name}.weight" for name in names)
    return (
        *(Rule(mine, theirs) for mine, theirs in zip(ours, singly, strict=True)),
        Rule((ours[0], ours[1]), published + "gate_up_proj", "E (P F) D -> P E F D"),
        Rule(ours[2], published + "down_proj"),
    )


DENSE = gated("feed_forward.", "mlp.")
ROUTER = (Rule("feed_forward.router.weight", "mlp.gate.weight"),)


def decoder(block: Iterable[Rule], model: str = "model.", head: str = "") -> tuple[Rule, ...]:
    """The whole model: `block` in every layer; `model` and `head` are published prefixes."""
    return (
        Rule("embed.weight", model + "embed_tokens.weight"),
        *(rule.under("layers.{layer}.", model + "layers.{layer}.") for rule in block),
        Rule("norm.weight", model + "norm.weight"),
        Rule("head.weight", head + "lm_head.weight"),
    )


INV_FREQ = "model.layers.*.self_attn.rotary_emb.inv_freq"  # recomputed from the config
