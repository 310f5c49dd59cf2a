"""DeepSeek-V2, V2-Lite, Coder-V2: latent attention, softmax scores, groups by their best expert."""

from modeling import ModelConfig
from moe import MoEConfig, TopK

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .deepseek import BLOCK, latent_attention, leading_dense, shared_width


def read_config(fields: Fields) -> ModelConfig:
    fields.choice("scoring_func", known=["softmax"], default="softmax")
    method = fields.choice(
        "topk_method", known=["greedy", "group_limited_greedy"], default="greedy"
    )
    limited = method == "group_limited_greedy"
    moe = MoEConfig(
        router=TopK(
            scoring="softmax",
            num_experts=fields.integer("n_routed_experts", "num_experts", "num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            num_groups=fields.integer("n_group") if limited else 1,
            groups_kept=fields.integer("topk_group") if limited else 1,
            group_score="max",
            # transformers ignores norm_topk_prob here, and every published V2 has it false
            normalize=False,
            scale=fields.number("routed_scaling_factor", default=1.0),
        ),
        expert_width=fields.integer("moe_intermediate_size"),
        shared_width=shared_width(fields),
    )
    return leading_dense(fields, latent_attention(fields, "interleaved"), moe, mtp=False)


FAMILY = Family(read_config, llama.decoder_rules(BLOCK), ignored=(llama.INV_FREQ,))
