"""HY3: q/k norms per head before rope, biased sigmoid routing, a dense layer first, MTP.

Files hold the tensors of the MTP module without copies of embedding and head.
"""

from modeling import ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family, Rule
from . import llama
from .deepseek import dense_and_sparse, layer_kinds, mtp_rules

AS_RELEASED = {  # all but the first are switches of other engines, which transformers does not read
    "mlp_bias": False,
    "moe_router_enable_expert_bias": True,
    "moe_router_use_sigmoid": True,
    "qk_norm": True,
    "route_norm": True,
}


def read_config(fields: Fields) -> ModelConfig:
    """enable_moe_fp32_combine changes the rounding of bfloat16 alone, and is not read."""
    for key, value in AS_RELEASED.items():
        fields.require_flag(key, value)
    fields.ignore("enable_moe_fp32_combine")
    attention = llama.grouped_query(
        fields,
        llama.rope_config(fields, llama.head_width(fields), theta=11158840.0),
        qk_norm=llama.qk_norm(fields),
        **llama.biases(fields),
    )
    expert_width = fields.integer("moe_intermediate_size")
    moe = MoEConfig(
        router=TopK(
            scoring="sigmoid",
            selection_bias=True,
            num_experts=fields.integer("num_experts", "num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            normalize=True,
            normalize_epsilon=1e-20,
            scale=fields.number("router_scaling_factor"),
        ),
        expert_width=expert_width,
        shared_width=expert_width * fields.integer("num_shared_experts"),
    )
    return dense_and_sparse(fields, attention, moe, layer_kinds(fields), mtp=True)


SPARSE = (
    Rule("feed_forward.router.weight", "mlp.router.gate.weight"),
    Rule("feed_forward.router.selection_bias", "mlp.expert_bias"),
    *llama.expert_rules(),
    *llama.gated_rules("feed_forward.shared.", "mlp.shared_mlp."),
    # the layout that transformers writes, found in re-saved files
    *llama.ROUTER,
    Rule("feed_forward.router.selection_bias", "mlp.e_score_correction_bias"),
    *llama.gated_rules("feed_forward.shared.", "mlp.shared_experts."),
)
BLOCK = (*llama.NORMS, *llama.ATTENTION, *llama.DENSE, *SPARSE)
MTP_NORM = Rule("mtp.{layer}.norm.weight", "model.layers.{layer}.final_layernorm.weight")

FAMILY = Family(
    read_config,
    (MTP_NORM, *mtp_rules(BLOCK)),
    ignored=("model.layers.*.embed_tokens.weight", "model.layers.*.shared_head.head.weight"),
)
