"""Kimi-K2.5 and K2.6: the text model of a multimodal file, which is a Kimi-K2.

The config of the text model is in `text_config`, and its tensors have a prefix. The tensors of the
vision tower and its projector are not loaded.
"""

from dataclasses import replace

from modeling import ModelConfig
from moe import ConfigError

from ..config_file import Fields
from ..mapping import Family
from . import llama
from .deepseek import BLOCK
from .deepseek_v3 import read_config as read_text_config

VISION = tuple(
    f"{prefix}{part}.*"
    for prefix in ("", "model.")  # as published, and as transformers writes some of them
    for part in ("vision_tower", "mm_projector", "multi_modal_projector")
)


def read_config(fields: Fields) -> ModelConfig:
    text = fields.section("text_config")
    if text is None:
        raise ConfigError("text_config is missing")
    fields.parts.append(text)
    text.choice("model_type", known=["kimi_k2", "deepseek_v3"])
    # tie_word_embeddings outside text_config is a default of the multimodal class; the one inside
    # text_config is right, and the files hold a head
    fields.ignore("tie_word_embeddings", "vision_config")
    config = read_text_config(text)
    count = len(config.mtp.blocks)
    text.check(count == 0, "num_nextn_predict_layers", count, "0: no release has MTP modules")
    return replace(config, published=dict(fields.raw))


PREFIX = "language_model."
RULES = (
    *llama.decoder_rules(BLOCK, model=PREFIX + "model.", head=PREFIX),
    # as transformers writes the layers, whose converter takes them for the vision tower's
    *(rule.under("layers.{layer}.", PREFIX + "model.blocks.{layer}.") for rule in BLOCK),
)

FAMILY = Family(read_config, RULES, ignored=(*VISION, PREFIX + llama.INV_FREQ))
