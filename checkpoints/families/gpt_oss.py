"""gpt-oss: attention sinks, a window in every second layer, biases everywhere, clamped SwiGLU.

Experts are fused on disk, transposed, and the columns of gate and up alternate. (The files under
`original/` in the releases have other names and are not read.)
"""

from dataclasses import replace

from modeling import LayerConfig, ModelConfig
from moe import Clamp, ConfigError, MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family, Rule
from . import llama


def read_config(fields: Fields) -> ModelConfig:
    if llama.rope_section(fields) is None:  # transformers then scales rope by 32
        raise ConfigError("rope_scaling or rope_parameters is missing")
    bias = fields.flag("attention_bias", default=True)
    attention = llama.grouped_query(
        fields,
        llama.rope_config(fields, llama.head_width(fields), theta=150000.0),
        sinks=True,
        qkv_bias=bias,
        output_bias=bias,
    )
    limit, alpha = (
        fields.number("swiglu_limit", default=7.0),
        fields.number("swiglu_alpha", default=1.702),
    )
    moe = MoEConfig(
        router=TopK(
            scoring="softmax",
            router_precision="weights",
            router_bias=True,
            num_experts=fields.integer("num_local_experts", "num_experts"),
            top_k=fields.integer("num_experts_per_tok", "experts_per_token"),
            normalize=True,  # the softmax over the chosen logits
        ),
        expert_width=fields.integer("intermediate_size"),
        expert_biases=True,
        clamp=Clamp(limit=limit, alpha=alpha),
    )
    layers = [
        LayerConfig(attention=replace(attention, window=window), feed_forward=moe)
        for window in read_windows(fields)
    ]
    return llama.model_config(fields, layers)


def read_windows(fields: Fields) -> list[int | None]:
    """layer_types; without it every second layer, from the first on, has a window."""
    count = llama.num_layers(fields)
    default = (["sliding_attention", "full_attention"] * count)[:count]
    return llama.windows(fields, fields.integer("sliding_window"), default)


ATTENTION = (*llama.ATTENTION, Rule("attention.sinks", "self_attn.sinks"))
OURS = "feed_forward.experts."
SPARSE = (
    Rule("feed_forward.router.weight", "mlp.router.weight"),
    Rule("feed_forward.router.bias", "mlp.router.bias"),
    Rule((OURS + "gate", OURS + "up"), "mlp.experts.gate_up_proj", "E D (F P) -> P E F D"),
    Rule(
        (OURS + "gate_bias", OURS + "up_bias"), "mlp.experts.gate_up_proj_bias", "E (F P) -> P E F"
    ),
    Rule(OURS + "down", "mlp.experts.down_proj", "E F D -> 1 E D F"),
    Rule(OURS + "down_bias", "mlp.experts.down_proj_bias"),
    *(  # one by one
        rule
        for part in ("gate", "up", "down")
        for rule in (
            Rule(OURS + part, f"mlp.experts.{{expert}}.{part}_proj.weight"),
            Rule(OURS + part + "_bias", f"mlp.experts.{{expert}}.{part}_proj.bias"),
        )
    ),
)

FAMILY = Family(read_config, llama.decoder_rules((*llama.NORMS, *ATTENTION, *SPARSE)))
