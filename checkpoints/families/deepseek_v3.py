"""DeepSeek-V3, R1 and V3.1, Kimi-K2, Moonlight: latent attention, biased sigmoids in groups, MTP.

Kimi-K2 says `kimi_k2` and is a V3 in everything else; Moonlight says `deepseek_v3` itself.
"""

from modeling import ModelConfig

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .deepseek import (
    BLOCK,
    MTP_COPIES,
    latent_attention,
    leading_dense,
    mtp_rules,
    rope_layout,
    v3_experts,
)


def read_config(fields: Fields) -> ModelConfig:
    attention = latent_attention(fields, rope_layout(fields))
    return leading_dense(fields, attention, v3_experts(fields))


FAMILY = Family(read_config, mtp_rules(BLOCK), MTP_COPIES, (llama.INV_FREQ,))
