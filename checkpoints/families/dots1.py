"""dots.llm1: multi-head attention with q/k norms per head, V3's routing."""

from dataclasses import replace

from modeling import LayerConfig, ModelConfig

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .deepseek import FEED_FORWARD, dense, v3_experts


def read_config(fields: Fields) -> ModelConfig:
    attention = llama.grouped_query(
        fields,
        llama.rope_config(fields, llama.head_width(fields)),
        qk_norm=llama.qk_norm(fields),
        **llama.biases(fields),
    )
    # the release names V3's whole method where others name the scores
    moe = v3_experts(fields, sigmoid=("sigmoid", "noaux_tc"))
    fields.integer("moe_layer_freq", default=1, at_most=1)
    count = llama.num_layers(fields)
    num_dense = fields.integer("first_k_dense_replace", at_least=0, at_most=count)
    layers = [
        LayerConfig(
            attention=replace(attention, window=window),
            feed_forward=dense(fields) if i < num_dense else moe,
        )
        for i, window in enumerate(read_windows(fields))
    ]
    return llama.model_config(fields, layers)


def read_windows(fields: Fields) -> list[int | None]:
    """Layers from max_window_layers on have a window; in the release there are none of them."""
    count = llama.num_layers(fields)
    window = fields.optional_integer("sliding_window")
    first = fields.integer("max_window_layers", default=count, at_least=0)
    slide = window is not None
    default = [
        "sliding_attention" if slide and i >= first else "full_attention" for i in range(count)
    ]
    return llama.windows(fields, window, default)


FAMILY = Family(read_config, llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *FEED_FORWARD)))
