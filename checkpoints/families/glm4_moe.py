"""GLM-4.5, 4.6, 4.7 and Air: grouped queries, half of each head rotated; V3's routing and MTP."""

from modeling import ModelConfig

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .deepseek import FEED_FORWARD, MTP_COPIES, leading_dense, mtp_rules, v3_experts


def read_config(fields: Fields) -> ModelConfig:
    attention = llama.grouped_query(
        fields,
        llama.rope_config(fields, llama.rotated_width(fields, default=0.5)),
        qkv_bias=fields.flag("attention_bias", default=False),  # never on the output
        # the large ones have it, Air has not
        qk_norm=llama.qk_norm(fields) if fields.flag("use_qk_norm", default=False) else None,
    )
    return leading_dense(fields, attention, v3_experts(fields))


BLOCK = (*llama.NORMS, *llama.ATTENTION, *FEED_FORWARD)

FAMILY = Family(read_config, mtp_rules(BLOCK), MTP_COPIES)
