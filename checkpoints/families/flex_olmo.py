"""FlexOlmo: OLMoE with norms after attention and experts instead of before them."""

from modeling import LayerConfig, ModelConfig

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .olmoe import SPARSE, attention, experts


def read_config(fields: Fields) -> ModelConfig:
    layer = LayerConfig(
        attention=attention(fields, 5e5),
        feed_forward=experts(fields),
        norm_before=False,
        norm_after=True,
    )
    return llama.model_config(fields, [layer] * llama.num_layers(fields))


# post_attention_layernorm comes after attention here; in the pre-norm families of the same lineage
# it comes before the feed-forward layer
NORMS = llama.make_rules(
    {
        "attention_output_norm.weight": "post_attention_layernorm.weight",
        "feed_forward_output_norm.weight": "post_feedforward_layernorm.weight",
    }
)

FAMILY = Family(read_config, llama.decoder_rules((*NORMS, *llama.ATTENTION, *SPARSE)))
