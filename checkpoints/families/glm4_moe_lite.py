"""GLM-4.7-Flash: DeepSeek-V3 with other sizes, its dense layers given as a list."""

from modeling import ModelConfig

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .deepseek import (
    BLOCK,
    MTP_COPIES,
    dense_and_sparse,
    latent_attention,
    num_mtp,
    rope_layout,
    v3_experts,
    with_mtp,
)


def read_config(fields: Fields) -> ModelConfig:
    attention = latent_attention(fields, rope_layout(fields))
    return dense_and_sparse(
        fields, attention, v3_experts(fields), layer_kinds(fields), num_mtp(fields)
    )


def layer_kinds(fields: Fields) -> list[str]:
    """mlp_layer_types; without it first_k_dense_replace dense layers, of which there is one."""
    count = llama.num_layers(fields)
    num_dense = fields.integer("first_k_dense_replace", default=1, at_least=0, at_most=count)
    default = ["dense"] * num_dense + ["sparse"] * (count - num_dense)
    return fields.layer_kinds("mlp_layer_types", ["dense", "sparse"], default)


FAMILY = Family(read_config, with_mtp(BLOCK), MTP_COPIES)
