"""MiniMax-M2: q/k norms over all heads, half of each head rotated, biased sigmoid routing.

The config announces MTP modules (num_mtp_modules) of which no tensor is published.
"""

from modeling import LayerConfig, ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family, Rule
from . import llama
from .mixtral import W1_W3_W2


def read_config(fields: Fields) -> ModelConfig:
    fields.choice("scoring_func", known=["sigmoid"], default="sigmoid")
    fields.choice("qk_norm_type", known=["per_layer"], default="per_layer")
    fields.require_flag("use_qk_norm", True)
    fields.require_flag("use_routing_bias", True)
    fields.integer("shared_intermediate_size", default=0, at_least=0, at_most=0)
    kinds = fields.integers("attn_type_list", default=(), at_least=0)
    fields.check(0 not in kinds, "attn_type_list", list(kinds), "1 (full attention) in every layer")
    attention = llama.grouped_query(
        fields,
        llama.rope_config(fields, rotated_width(fields), theta=5e6),
        qk_norm=llama.qk_norm(fields, over="all"),
    )
    moe = MoEConfig(
        router=TopK(
            scoring="sigmoid",
            router_precision="weights",
            selection_bias=True,
            num_experts=fields.integer("num_local_experts", "num_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            normalize=True,
        ),
        expert_width=fields.integer("intermediate_size"),
    )
    layer = LayerConfig(attention=attention, feed_forward=moe)
    return llama.model_config(fields, [layer] * llama.num_layers(fields))


def rotated_width(fields: Fields) -> int:
    """Releases say rotary_dim; re-saved configs partial_rotary_factor inside rope_parameters."""
    section = llama.rope_section(fields)
    if section is not None and section.has("partial_rotary_factor"):
        fields.ignore("rotary_dim")
        return llama.rotated_width(fields)
    return fields.integer("rotary_dim", default=llama.rotated_width(fields))


MOE = "block_sparse_moe."
SPARSE = (
    Rule("feed_forward.router.weight", MOE + "gate.weight"),
    Rule("feed_forward.router.selection_bias", MOE + "e_score_correction_bias"),
    *llama.expert_rules(MOE + "experts.", W1_W3_W2),
    # the layout that transformers writes, found in re-saved files
    *llama.ROUTER,
    Rule("feed_forward.router.selection_bias", "mlp.e_score_correction_bias"),
    *llama.expert_rules(),
)

FAMILY = Family(read_config, llama.decoder_rules((*llama.NORMS, *llama.ATTENTION, *SPARSE)))
