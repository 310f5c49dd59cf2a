"""GLM-4.7-Flash: DeepSeek-V3 with other sizes, its dense layers given as a list."""

from modeling import ModelConfig

from ..config_file import Fields
from ..mapping import Family
from .deepseek import (
    BLOCK,
    MTP_COPIES,
    dense_and_sparse,
    latent_attention,
    layer_kinds,
    mtp_rules,
    rope_layout,
    v3_experts,
)


def read_config(fields: Fields) -> ModelConfig:
    attention = latent_attention(fields, rope_layout(fields))
    return dense_and_sparse(fields, attention, v3_experts(fields), layer_kinds(fields), mtp=True)


FAMILY = Family(read_config, mtp_rules(BLOCK), MTP_COPIES)
