"""Mixtral 8x7B and 8x22B: grouped-query attention, a few wide experts, weights that sum to one."""

from modeling import LayerConfig, ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family, Rule
from . import llama


def read_config(fields: Fields) -> ModelConfig:
    rope = llama.rope_config(fields, llama.head_width(fields), theta=1e6)
    attention = llama.grouped_query(fields, rope, window=fields.optional_integer("sliding_window"))
    moe = MoEConfig(
        router=TopK(
            scoring="softmax",
            router_precision="weights",
            num_experts=fields.integer("num_local_experts", "num_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            normalize=True,  # always: the config has no key for it
        ),
        expert_width=fields.integer("intermediate_size"),
    )
    layer = LayerConfig(attention=attention, feed_forward=moe)
    return llama.model_config(fields, [layer] * llama.num_layers(fields))


W1_W3_W2 = ("w1", "w3", "w2")  # gate, up, down
SPARSE = (
    Rule("feed_forward.router.weight", "block_sparse_moe.gate.weight"),
    *llama.expert_rules("block_sparse_moe.experts.", W1_W3_W2),
    # the layout that transformers writes, found in re-saved files
    *llama.ROUTER,
    *llama.expert_rules(),
)

FAMILY = Family(read_config, llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *SPARSE)))
