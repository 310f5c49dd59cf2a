"""Transformers as data and modules. Builds on `moe`; knows nothing of files or families."""

from .cache import Cache, LayerCache, WindowCache
from .config import (
    DenseConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MTPConfig,
    QKNormConfig,
    RopeConfig,
    YarnConfig,
)
from .generation.generate import Generation, GenerationStatistics, generate, generate_batch
from .generation.teacher_forcing import forced_states
from .loss import next_token_loss
from .model import Transformer
from .mtp import mtp_loss

__all__ = [
    "Cache",
    "DenseConfig",
    "GQAConfig",
    "Generation",
    "GenerationStatistics",
    "LayerCache",
    "LayerConfig",
    "MLAConfig",
    "MTPConfig",
    "ModelConfig",
    "QKNormConfig",
    "RopeConfig",
    "Transformer",
    "WindowCache",
    "YarnConfig",
    "forced_states",
    "generate",
    "generate_batch",
    "mtp_loss",
    "next_token_loss",
]
