"""What a whole model is, as data: a tuple of layer descriptions plus what surrounds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe import MoEConfig, require, require_choice, require_flag, require_int, require_number

INFINITY = float("inf")


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN's stretching of the rotary frequencies (Peng et al. 2023, section 3.2)."""

    factor: float
    original_length: int  # positions the model was trained on before the stretching
    beta_fast: float = 32.0  # rotations over original_length above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which it is divided by factor
    truncate: bool = True  # round the ends of the ramp between the two outwards

    def __post_init__(self) -> None:
        require_number("factor", self.factor, 0, INFINITY)
        require(self.factor >= 1, "factor", self.factor, "must be >= 1")
        require_int("original_length", self.original_length)
        require_flag("truncate", self.truncate)
        require_number("beta_fast", self.beta_fast, 0, INFINITY)
        require_number("beta_slow", self.beta_slow, 0, INFINITY)
        ordered = self.beta_fast >= self.beta_slow
        require(ordered, "beta_fast", self.beta_fast, f"must be >= beta_slow = {self.beta_slow}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions. YaRN's two corrections are two numbers here, computed by whoever knows.

    `amplitude` multiplies cos and sin, so a score by its square; `softmax_multiplier` multiplies
    the softmax scale and therefore the part of a head that is not rotated too.
    """

    width: int  # how many dimensions are rotated
    theta: float = 10000.0
    layout: str = (
        "half"  # which dimensions form a pair: "half" (i, i + width/2), "interleaved" (2i, 2i + 1)
    )
    yarn: YarnConfig | None = None
    amplitude: float = 1.0
    softmax_multiplier: float = 1.0

    def __post_init__(self) -> None:
        require_int("rope width", self.width, at_least=2)
        require(self.width % 2 == 0, "rope width", self.width, "must be even: pairs are rotated")
        require_choice("rope layout", self.layout, ("half", "interleaved"))
        require_number("theta", self.theta, 1, INFINITY)
        require_number("amplitude", self.amplitude, 0, INFINITY)
        require_number("softmax_multiplier", self.softmax_multiplier, 0, INFINITY)


@dataclass(frozen=True, kw_only=True)
class QKNormConfig:
    """RMS norms on queries and keys (Dehghani et al. 2023, section 2, with RMS for layer norms)."""

    over: str = "head"  # "head": each head by itself; "all": all heads of a token as one vector
    after_rope: bool = False  # else before; the order shows because the norms' weights do not turn
    epsilon: float

    def __post_init__(self) -> None:
        require_choice("qk norm over", self.over, ("head", "all"))
        require_flag("after_rope", self.after_rope)
        require_number("qk norm epsilon", self.epsilon, 0, INFINITY)


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention (Ainslie et al. 2023); multi-head where kv_heads = num_heads."""

    num_heads: int
    kv_heads: int
    head_width: int
    rope: RopeConfig  # its width may be less than head_width: the first dimensions are rotated
    scale: float | None = None  # of the scores; None: head_width ** -0.5
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNormConfig | None = None
    window: int | None = None  # how many positions a query sees, its own included; None: all
    sinks: bool = False  # a learned score per head that takes part in the softmax and has no value

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_heads", "head_width"):
            require_int(name, getattr(self, name))
        for name in ("qkv_bias", "output_bias", "sinks"):
            require_flag(name, getattr(self, name))
        if self.scale is not None:
            require_number("scale", self.scale, 0, INFINITY)
        if self.window is not None:
            require_int("window", self.window)
        divides = f"must divide num_heads = {self.num_heads}"
        require(self.num_heads % self.kv_heads == 0, "kv_heads", self.kv_heads, divides)
        fits = f"must be <= head_width = {self.head_width}"
        require(self.rope.width <= self.head_width, "rope width", self.rope.width, fits)


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    num_heads: int
    query_rank: int | None  # None: queries are not compressed
    kv_rank: int  # width of the latent that keys and values are made from
    nope_width: int  # of a head's query and key: the part without position
    value_width: int
    rope: RopeConfig  # its width is the other part of a head's query, and the one shared rotary key
    bias: bool = False  # on the two compressions and the output, nowhere else
    latent_norm_epsilon: float = 1e-6  # of the norms inside the attention; see checkpoints.families

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_rank", "nope_width", "value_width"):
            require_int(name, getattr(self, name))
        if self.query_rank is not None:
            require_int("query_rank", self.query_rank)
        require_flag("bias", self.bias)
        require_number("latent_norm_epsilon", self.latent_norm_epsilon, 0, INFINITY)


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """A dense feed-forward layer of this hidden width."""

    width: int

    def __post_init__(self) -> None:
        require_int("width", self.width)


AttentionConfig = GQAConfig | MLAConfig
FeedForwardConfig = DenseConfig | MoEConfig


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One transformer block: attention, then feed-forward, each added to the residual stream."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm_before: bool = True  # what each of the two reads is normalised
    norm_after: bool = False  # what each of the two returns is normalised
    residual_multiplier: float = 1.0  # of what each of the two adds

    def __post_init__(self) -> None:
        require_flag("norm_before", self.norm_before)
        require_flag("norm_after", self.norm_after)
        require_number("residual_multiplier", self.residual_multiplier, 0, INFINITY)


@dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Multi-token-prediction modules (DeepSeek-V3, section 2.2) and how they are wired.

    Nothing published says how, and implementations disagree. The defaults are what transformers
    5.23 computes (`MtpModel`); `python -m tools probe-mtp` measures what weights were trained with.
    """

    blocks: tuple[LayerConfig, ...] = ()  # of each module, in the order of their depths
    # The main model's state that the first module reads: after the norm before the head (also
    # Megatron-LM, vLLM, SGLang), or before it: "raw" (torchtitan).
    input: str = "normed"
    # What the draft after next is made from: the module's own state after the norm before the head
    # (also Megatron-LM, torchtitan, SGLang, newer vLLM), before it: "raw" (vLLM up to 2026), or
    # what the first module read, held fixed: "main" (AMD's reference code).
    carry: str = "normed"
    # What stands first in what the projection reads: the embedding (every public implementation for
    # the weights of DeepSeek and GLM), or the state (as the paper prints it; MiMo, Inkling).
    first: str = "embedding"
    final_norm: str = "own"  # before the head: the module's "own", the "main" model's, or "none"
    own_embedding: bool = False  # else the main model's
    own_head: bool = False  # else the main model's

    def __post_init__(self) -> None:
        layers = isinstance(self.blocks, tuple)
        require(layers, "mtp blocks", self.blocks, "must be a tuple of LayerConfig")
        require_choice("mtp input", self.input, ("normed", "raw"))
        require_choice("mtp carry", self.carry, ("normed", "raw", "main"))
        require_choice("mtp first", self.first, ("embedding", "state"))
        require_choice("mtp final_norm", self.final_norm, ("own", "main", "none"))
        require_flag("mtp own_embedding", self.own_embedding)
        require_flag("mtp own_head", self.own_head)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model.

    `published` is the config.json that the description was read from. The saver writes it back in
    its own spelling; nothing else looks inside.
    """

    vocab_size: int
    d_model: int
    layers: tuple[LayerConfig, ...]
    mtp: MTPConfig = MTPConfig()
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = False  # the head uses the embedding's weight
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    max_length: int  # positions the model is made for
    published: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "max_length"):
            require_int(name, getattr(self, name))
        some_layers = isinstance(self.layers, tuple) and len(self.layers) > 0
        require(some_layers, "layers", self.layers, "must be a tuple of at least one layer")
        for name in ("norm_epsilon", "embedding_multiplier", "logits_multiplier"):
            require_number(name, getattr(self, name), 0, INFINITY)
        require_flag("tied_embeddings", self.tied_embeddings)
