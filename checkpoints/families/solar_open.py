"""Solar-Open: grouped-query attention without q/k norms, V3's routing in every layer."""

from modeling import LayerConfig, ModelConfig

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .deepseek import FEED_FORWARD, v3_experts


def read_config(fields: Fields) -> ModelConfig:
    fields.require_flag("use_qk_norm", False)
    fields.integer("first_k_dense_replace", default=0, at_least=0, at_most=0)
    attention = llama.grouped_query(
        fields,
        llama.rope_config(fields, llama.rotated_width(fields), theta=1e6),
        qkv_bias=fields.flag("attention_bias", default=False),  # never on the output
    )
    layer = LayerConfig(attention=attention, feed_forward=v3_experts(fields))
    return llama.model_config(fields, [layer] * llama.num_layers(fields))


FAMILY = Family(read_config, llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *FEED_FORWARD)))
