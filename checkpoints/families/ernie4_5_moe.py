"""ERNIE-4.5-MoE: interleaved rope, softmax routing with a selection bias, tied embeddings.

Files of the smaller model hold an MTP module of another kind (a dense block, no norm before the
head), which is not loaded.
"""

from modeling import ModelConfig
from moe import MoEConfig

from ..config_file import Fields
from ..mapping import Family, Rule
from . import llama
from .deepseek import dense_and_sparse


def read_config(fields: Fields) -> ModelConfig:
    """use_bias, which no release sets and which would be everywhere, is not known here."""
    fields.flag_is("use_bias", False)
    fields.choice("moe_gate_act", known=["softmax"], default="softmax")
    rope = llama.rope_config(fields, llama.head_width(fields), theta=5e5, layout="interleaved")
    attention = llama.grouped_query(fields, rope)
    expert_width = fields.integer("moe_intermediate_size")
    num_shared = fields.integer("moe_num_shared_experts", default=0, at_least=0)
    moe = MoEConfig(
        scoring="softmax",
        selection_bias=True,
        num_experts=fields.integer("moe_num_experts", "num_experts"),
        top_k=fields.integer("moe_k", "num_experts_per_tok"),
        expert_width=expert_width,
        normalize=True,
        normalize_minimum=fields.number("moe_norm_min", default=1e-12),
        shared_width=num_shared * expert_width,
    )
    tied = fields.flag("tie_word_embeddings", default=True)
    return dense_and_sparse(fields, attention, moe, layer_kinds(fields), tied_embeddings=tied)


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
    *llama.experts(),
    *llama.gated("feed_forward.shared.", "mlp.shared_experts."),
)
MTP = tuple(f"model.mtp_{part}.*" for part in ("block", "emb_norm", "hidden_norm", "linear_proj"))
RULES = llama.decoder((*llama.NORMS, *llama.ATTENTION, *llama.DENSE, *SPARSE))

FAMILY = Family(read_config, RULES, ignored=MTP)
