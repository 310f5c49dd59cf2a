"""Hunyuan-A13B: q/k norms after rope, rope with a larger constant base, a shared expert."""

from modeling import LayerConfig, ModelConfig, RopeConfig
from moe import MoEConfig, TopK

from ..config_file import Fields, NamedFloat
from ..mapping import Family, Rule
from . import llama

AS_RELEASED = {  # switches of the model's own code that transformers does not read
    "group_limited_greedy": False,
    "position_embedding_xdrope": False,
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_mla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
}


def read_config(fields: Fields) -> ModelConfig:
    for key, value in AS_RELEASED.items():
        fields.require_flag(key, value)
    fields.integer("moe_layer_num_skipped", default=0, at_least=0, at_most=0)
    rope = rope_config(fields, llama.head_width(fields))
    attention = llama.grouped_query(
        fields,
        rope,
        qk_norm=llama.qk_norm(fields, after_rope=True),
        **llama.biases(fields),
    )
    layers = [LayerConfig(attention=attention, feed_forward=moe) for moe in experts(fields)]
    return llama.model_config(fields, layers)


def experts(fields: Fields) -> list[MoEConfig]:
    """The sizes of the experts are one number for all layers, or a list with one per layer."""
    count = llama.num_layers(fields)
    # the width of the shared expert, and the default of the routed ones
    width = fields.integer("intermediate_size")
    num_shared = fields.per_layer(count, "num_shared_expert", default=1)
    fields.check(num_shared == [1] * count, "num_shared_expert", num_shared, "1 in every layer")
    return [
        MoEConfig(
            router=TopK(
                scoring="softmax",
                num_experts=num_experts,
                top_k=top_k,
                normalize=True,
            ),
            expert_width=expert_width,
            shared_width=width,
        )
        for num_experts, top_k, expert_width in zip(
            fields.per_layer(count, "num_experts", "num_local_experts"),
            fields.per_layer(count, "moe_topk", "num_experts_per_tok"),
            fields.per_layer(count, "moe_intermediate_size", default=width),
            strict=True,
        )
    ]


def rope_config(fields: Fields, width: int) -> RopeConfig:
    """Rope of kind "dynamic" with an `alpha`, which is constant: theta * alpha^(d / (d - 2))."""
    section = llama.rope_section(fields)
    if section is None or section.raw.get("rope_type", section.raw.get("type")) != "dynamic":
        return llama.rope_config(fields, width)
    theta = fields.number("rope_theta", default=10000.0, above=1.0)
    if section.has("rope_theta"):
        theta = section.number("rope_theta", above=1.0)
    alpha = section.number("alpha", above=0.0)
    # the release carries YaRN's keys too, at values that change nothing
    section.number("factor", default=1.0)
    fields.check(width > 2, "head_dim", width, "at least 4 with rope of type dynamic")
    scaled = theta * alpha ** (width / (width - 2))
    return RopeConfig(
        width=width,
        theta=fields.attach_key(NamedFloat, "rope_theta * alpha ** (d / (d - 2))", scaled),
    )


ATTENTION = (
    Rule("attention.q_norm.weight", "self_attn.query_layernorm.weight"),
    Rule("attention.k_norm.weight", "self_attn.key_layernorm.weight"),
    *llama.ATTENTION,
)
SPARSE = (
    Rule("feed_forward.router.weight", "mlp.gate.wg.weight"),
    *llama.expert_rules(),
    *llama.gated_rules("feed_forward.shared.", "mlp.shared_mlp."),
)

FAMILY = Family(read_config, llama.decoder_rules((*llama.NORMS, *ATTENTION, *SPARSE)))
