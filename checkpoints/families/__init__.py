"""The table of families: the model_type of a published config.json -> its family."""

from ..mapping import Family
from . import (
    deepseek_v1,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    hy_v3,
    kimi_k25,
    minimax_m2,
    mixtral,
    native,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    solar_open,
)

FAMILIES: dict[str, Family] = {
    native.MODEL_TYPE: native.make_family(),
    "deepseek": deepseek_v1.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "dots1": dots1.FAMILY,
    "ernie4_5_moe": ernie4_5_moe.FAMILY,
    "flex_olmo": flex_olmo.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "glm4_moe_lite": glm4_moe_lite.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granitemoe": granitemoe.FAMILY,
    "hunyuan_v1_moe": hunyuan_v1_moe.FAMILY,
    "hy_v3": hy_v3.FAMILY,
    "kimi_k2": deepseek_v3.FAMILY,
    "kimi_k25": kimi_k25.FAMILY,
    "minimax_m2": minimax_m2.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "solar_open": solar_open.FAMILY,
}

NOT_YET = {  # model types that look like a family here, but have another mechanism
    "deepseek_v32": "its sparse attention (a lightning indexer beside latent attention)",
    "glm_moe_dsa": "its sparse attention (an indexer shared between layers)",
}

# Keys that change what a model computes, in some family, and the values that mean "not used". If an
# adapter does not read such a key, any other value is refused: nothing is silently ignored.
FACTORS = (
    "attention_multiplier",
    "attention_value_scale",
    "embedding_multiplier",
    "logit_scale",
    "logits_scaling",
    "partial_rotary_factor",
    "residual_multiplier",
    "routed_scaling_factor",
)
SWITCHES_AND_SIZES = (
    "attention_bias",
    "attention_chunk_size",
    "attn_logit_softcapping",
    "clip_qkv",
    "compress_ratios",
    "final_logit_softcapping",
    "hc_mult",
    "index_topk",
    "kv_lora_rank",
    "linear_attn_config",
    "lm_head_bias",
    "mlp_bias",
    "mtp_hidden_states_first",
    "mtp_own_embedding",
    "mtp_own_head",
    "n_shared_experts",
    "no_rope_layers",
    "num_shared_experts",
    "q_lora_rank",
    "qkv_bias",
    "rotary_dim",
    "shared_expert_intermediate_size",
    "sliding_window",
    "use_bias",
    "use_qk_norm",
    "zero_expert_num",
)
MECHANISMS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(FACTORS, (None, False, 1)),
    **dict.fromkeys(SWITCHES_AND_SIZES, (None, False, 0, [])),
}
