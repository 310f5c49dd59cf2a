"""Qwen1.5-MoE and Qwen2-MoE: biases on queries, keys and values, a shared expert with a gate."""

from dataclasses import replace

from modeling import GQAConfig, LayerConfig, ModelConfig
from moe import DenseConfig, MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family, Rule
from . import llama


def read_config(fields: Fields) -> ModelConfig:
    rope = llama.rope_config(fields, llama.head_width(fields))
    attention = llama.grouped_query(fields, rope, qkv_bias=fields.flag("qkv_bias", default=True))
    moe = MoEConfig(
        router=TopK(
            scoring="softmax",
            router_precision="weights",
            num_experts=fields.integer("num_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            normalize=fields.flag("norm_topk_prob"),
        ),
        expert_width=fields.integer("moe_intermediate_size"),
        shared_width=fields.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    windows = read_windows(fields)
    layers = [
        LayerConfig(attention=replace(attention, window=window), feed_forward=feed_forward)
        for window, feed_forward in zip(windows, sparse_steps(fields, moe), strict=True)
    ]
    return llama.model_config(fields, layers)


def sparse_steps(fields: Fields, moe: MoEConfig) -> list[DenseConfig | MoEConfig]:
    """Every `decoder_sparse_step`-th layer is sparse, except those of `mlp_only_layers`."""
    step = fields.integer("decoder_sparse_step", default=1)
    only_dense = fields.integers("mlp_only_layers", default=(), at_least=0)
    return [
        moe
        if i not in only_dense and (i + 1) % step == 0
        else DenseConfig(width=fields.integer("intermediate_size"))
        for i in range(llama.num_layers(fields))
    ]


def read_windows(fields: Fields) -> list[int | None]:
    """Windows only where use_sliding_window says so, whatever sliding_window holds.

    Without layer_types every second layer, from the first on, has one, below max_window_layers.
    """
    count = llama.num_layers(fields)
    if not fields.flag("use_sliding_window", default=False):
        fields.ignore("sliding_window", "max_window_layers", "layer_types")
        return [None] * count
    window = fields.integer("sliding_window")
    below = fields.integer("max_window_layers", at_least=0)
    default = [
        "sliding_attention" if i % 2 == 0 and i < below else "full_attention" for i in range(count)
    ]
    return llama.windows(fields, window, default)


def set_window(attention: GQAConfig, fields: Fields) -> GQAConfig:
    """The same window in every layer, where use_sliding_window says so."""
    if not fields.flag("use_sliding_window", default=False):
        fields.ignore("sliding_window", "max_window_layers")
        return attention
    return replace(attention, window=fields.integer("sliding_window"))


SPARSE = (
    *llama.ROUTER,
    *llama.expert_rules(),
    *llama.gated_rules("feed_forward.shared.", "mlp.shared_expert."),
    Rule("feed_forward.shared.score.weight", "mlp.shared_expert_gate.weight"),
)
RULES = llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *llama.DENSE, *SPARSE))

FAMILY = Family(read_config, RULES)
