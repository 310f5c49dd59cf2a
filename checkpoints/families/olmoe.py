"""OLMoE: q/k norms over all heads at once, many small experts, weights that are not normalised."""

from modeling import LayerConfig, ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family
from . import llama


def read_config(fields: Fields) -> ModelConfig:
    """clip_qkv, which no release sets, is refused."""
    layer = LayerConfig(attention=attention(fields, 1e4), feed_forward=experts(fields))
    return llama.model_config(fields, [layer] * llama.num_layers(fields))


def attention(fields: Fields, theta: float):
    return llama.grouped_query(
        fields,
        llama.rope_config(fields, llama.head_width(fields), theta),
        qk_norm=llama.qk_norm(fields, over="all"),
        **llama.biases(fields),
    )


def experts(fields: Fields) -> MoEConfig:
    return MoEConfig(
        router=TopK(
            scoring="softmax",
            router_precision="weights",
            num_experts=fields.integer("num_experts", "num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            normalize=fields.flag("norm_topk_prob"),
        ),
        expert_width=fields.integer("intermediate_size"),
    )


SPARSE = (*llama.ROUTER, *llama.expert_rules())

FAMILY = Family(read_config, llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *SPARSE)))
