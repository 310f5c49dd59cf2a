"""Granite-MoE: four multipliers, a softmax over the chosen logits, experts fused on disk."""

from modeling import LayerConfig, ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family, Rule
from . import llama


def read_config(fields: Fields) -> ModelConfig:
    attention = llama.grouped_query(
        fields,
        llama.rope_config(fields, llama.head_width(fields)),
        scale=fields.number("attention_multiplier"),
        **llama.biases(fields),
    )
    moe = MoEConfig(
        router=TopK(
            scoring="softmax",
            router_precision="weights",
            num_experts=fields.integer("num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            normalize=True,  # the softmax over the chosen logits
        ),
        expert_width=fields.integer("intermediate_size"),
    )
    layer = LayerConfig(
        attention=attention,
        feed_forward=moe,
        residual_multiplier=fields.number("residual_multiplier"),
    )
    return llama.model_config(
        fields,
        [layer] * llama.num_layers(fields),
        embedding_multiplier=fields.number("embedding_multiplier"),
        logits_multiplier=1.0 / fields.number("logits_scaling", above=0.0),
    )


MOE = "block_sparse_moe."
GATE_UP = ("feed_forward.experts.gate", "feed_forward.experts.up")
SPARSE = (
    Rule("feed_forward.router.weight", MOE + "router.layer.weight"),
    Rule(GATE_UP, MOE + "input_linear.weight", "E (P F) D -> P E F D"),
    Rule("feed_forward.experts.down", MOE + "output_linear.weight"),
    # the layout that transformers writes, and experts one by one
    Rule("feed_forward.router.weight", MOE + "router.weight"),
    *llama.expert_rules(MOE + "experts."),
)

FAMILY = Family(read_config, llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *SPARSE)))
