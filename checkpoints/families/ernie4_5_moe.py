"""ERNIE-4.5-MoE: interleaved rope, softmax routing with a selection bias, tied embeddings.

The smaller model has an MTP module with a dense block, under names that count modules from 0. The
publisher's training code applies the main model's final norm after it, and so does this code; vLLM
applies none. In the training code the module reads the main model's raw state, and in the
publisher's serving code the normed one, which is the default here as in the other families.
"""

from dataclasses import replace

from modeling import LayerConfig, ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family, Rule
from . import llama
from .deepseek import dense, dense_and_sparse, mtp_modules


def read_config(fields: Fields) -> ModelConfig:
    """use_bias, which would add biases to all layers and which no release sets, is refused."""
    fields.require_flag("use_bias", False)
    fields.choice("moe_gate_act", known=["softmax"], default="softmax")
    rope = llama.rope_config(fields, llama.head_width(fields), theta=5e5, layout="interleaved")
    attention = llama.grouped_query(fields, rope)
    expert_width = fields.integer("moe_intermediate_size")
    num_shared = fields.integer("moe_num_shared_experts", default=0, at_least=0)
    moe = MoEConfig(
        router=TopK(
            scoring="softmax",
            selection_bias=True,
            num_experts=fields.integer("moe_num_experts", "num_experts"),
            top_k=fields.integer("moe_k", "num_experts_per_tok"),
            normalize=True,
            normalize_minimum=fields.number("moe_norm_min", default=1e-12),
        ),
        expert_width=expert_width,
        shared_width=num_shared * expert_width,
    )
    tied = fields.flag("tie_word_embeddings", default=True)
    config = dense_and_sparse(fields, attention, moe, layer_kinds(fields), tied_embeddings=tied)
    block = LayerConfig(attention=attention, feed_forward=dense(fields))
    return replace(config, mtp=replace(mtp_modules(fields, block), final_norm="main"))


def layer_kinds(fields: Fields) -> list[str]:
    """Every moe_layer_interval-th layer from moe_layer_start_index to moe_layer_end_index."""
    count = llama.num_layers(fields)
    step = fields.integer("moe_layer_interval", default=1)
    first = fields.integer("moe_layer_start_index", default=0, at_least=0)
    last = fields.integer("moe_layer_end_index", default=-1, at_least=-1)
    last = count - 1 if last == -1 else last
    return [
        "sparse" if (i + 1) % step == 0 and first <= i <= last else "dense" for i in range(count)
    ]


BIAS = "feed_forward.router.selection_bias"
SPARSE = (
    *llama.ROUTER,
    Rule(BIAS, "mlp.moe_statics.e_score_correction_bias", "1 E -> 1 E"),
    *llama.expert_rules(),
    *llama.gated_rules("feed_forward.shared.", "mlp.shared_experts."),
)
BLOCK = (*llama.NORMS, *llama.ATTENTION, *llama.DENSE)
MTP = llama.make_rules(
    {
        "mtp.{layer}.embedding_norm.weight": "model.mtp_emb_norm.{mtp}.weight",
        "mtp.{layer}.state_norm.weight": "model.mtp_hidden_norm.{mtp}.weight",
        "mtp.{layer}.projection.weight": "model.mtp_linear_proj.{mtp}.weight",
    }
)
RULES = (
    *llama.decoder_rules((*BLOCK, *SPARSE)),
    *MTP,
    *(rule.under("mtp.{layer}.block.", "model.mtp_block.{mtp}.") for rule in BLOCK),
)

# of modules that the config does not announce
UNANNOUNCED = tuple(rule.published.partition("{mtp}")[0] + "*" for rule in (*MTP, RULES[-1]))

FAMILY = Family(read_config, RULES, ignored=UNANNOUNCED)
