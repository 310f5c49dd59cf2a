"""Qwen3-MoE: q/k norms per head, head_dim independent of hidden_size, no shared expert."""

from modeling import LayerConfig, ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .qwen2_moe import set_window, sparse_steps


def read_config(fields: Fields) -> ModelConfig:
    rope = llama.rope_config(fields, llama.head_width(fields))
    attention = llama.grouped_query(
        fields, rope, qk_norm=llama.qk_norm(fields), **llama.biases(fields)
    )
    moe = MoEConfig(
        router=TopK(
            scoring="softmax",
            router_precision="weights",
            num_experts=fields.integer("num_experts", "num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            # no default: transformers' is false and every release says true
            normalize=fields.flag("norm_topk_prob"),
        ),
        expert_width=fields.integer("moe_intermediate_size"),
    )
    attention = set_window(attention, fields)
    layers = [
        LayerConfig(attention=attention, feed_forward=feed_forward)
        for feed_forward in sparse_steps(fields, moe)
    ]
    return llama.model_config(fields, layers)


SPARSE = (*llama.ROUTER, *llama.expert_rules())
RULES = llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *llama.DENSE, *SPARSE))

FAMILY = Family(read_config, RULES)
