"""Transformers as data and modules. Builds on `moe`; knows nothing of files or families."""

from .attention.caches import EntryCache, StateCache, WindowCache
from .attention.gqa import GQAConfig, QKNormConfig
from .attention.mla import MLAConfig
from .attention.weights import AttentionWeights, is_recorded, report_weights
from .cache import Cache, LayerCache
from .codes import Codes, Format, Int4, Int8, choose_format, quantize_matrix
from .compiled import compile_decoding
from .config import (
    Attention,
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MTPConfig,
)
from .generation.draft_count import DraftCount
from .generation.generate import Generation, GenerationStatistics, generate, generate_batch
from .generation.rows import find_non_causal
from .generation.teacher_forcing import forced_states
from .linear import plain_weight
from .loss import mtp_loss, next_token_loss
from .model import Transformer
from .norm import RMSNorm
from .quantized import QuantizedExperts, QuantizedLinear, QuantizedMatrix, QuantizedWeight
from .record import LayerStates, record_attention, record_states
from .rope import RopeConfig, YarnConfig, rotate
from .step import Step
from .widened import widen_products
