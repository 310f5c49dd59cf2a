"""DeepSeekMoE-16B (DeepSeek V1): multi-head attention, plain softmax routing, shared experts.

transformers has no class for it; the facts are those of the model's own code, whose scores are
computed in the weights' precision.
"""

from dataclasses import replace

from modeling import LayerConfig, ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .deepseek import FEED_FORWARD, dense, shared_width


def read_config(fields: Fields) -> ModelConfig:
    fields.choice("scoring_func", known=["softmax"], default="softmax")
    moe = MoEConfig(
        router=TopK(
            scoring="softmax",
            router_precision="weights",
            num_experts=fields.integer("n_routed_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            normalize=fields.flag("norm_topk_prob"),
            normalize_epsilon=1e-20,
        ),
        expert_width=fields.integer("moe_intermediate_size"),
        shared_width=shared_width(fields),
    )
    rope = llama.rope_config(fields, llama.head_width(fields))
    attention = llama.grouped_query(fields, rope, **llama.biases(fields))
    sparse = LayerConfig(attention=attention, feed_forward=moe)
    count = llama.num_layers(fields)
    first = fields.integer("first_k_dense_replace", at_least=0, at_most=count)
    step = fields.integer("moe_layer_freq", default=1)
    layers = [
        sparse if i >= first and i % step == 0 else replace(sparse, feed_forward=dense(fields))
        for i in range(count)
    ]
    return llama.model_config(fields, layers)


RULES = llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *FEED_FORWARD))

FAMILY = Family(read_config, RULES, ignored=(llama.INV_FREQ,))
