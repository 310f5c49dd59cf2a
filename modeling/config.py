"""What a whole model is, as data: a tuple of layer descriptions plus what surrounds them.

A layer's attention and feed-forward are configs that build their modules; the contracts of both
stand here, and a kind from outside the package that fulfils one takes part like ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from moe import Config, Count, Limit, Positive, one_of

from .cache import LayerCache
from .step import Step


class Attention(Protocol):
    """What a `Block` asks of its attention, an `nn.Module`.

    A query sees its own position and earlier ones. T may be 0, and a row may have no new token;
    what `step.counts` calls padding leaves no trace in the cache or in other positions. Fed whole,
    in pieces or token by token, a text gives the same. The module calls its submodules and reads
    no weight around them, so that an adapter or a hook acts in every path.
    """

    def __call__(self, x_BTD: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D); appends the new tokens to the cache, which advances lengths."""

    def make_cache(self, batch_size: int, max_length: int, rollback: int = 0) -> LayerCache:
        """An empty cache whose rows can be cut back by `rollback` positions at any time."""


@runtime_checkable
class AttentionConfig(Protocol):
    """A kind of attention: `GQAConfig`, `MLAConfig`, or anybody's frozen dataclass."""

    def build(self, d_model: int) -> nn.Module:
        """The `Attention`, its weights drawn."""


@runtime_checkable
class FeedForwardConfig(Protocol):
    """A kind of feed-forward layer: `DenseConfig`, `MoEConfig`, or anybody's frozen dataclass."""

    def build(self, d_model: int) -> nn.Module:
        """A module (B, T, D) -> (B, T, D), its weights drawn, to which positions are alike."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig(Config):
    """One transformer block: attention, then feed-forward, each added to the residual stream."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm_before: bool = True  # what each of the two reads is normalised
    norm_after: bool = False  # what each of the two returns is normalised
    residual_multiplier: Positive = 1.0  # of what each of the two adds


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Config):
    """Multi-token-prediction modules (DeepSeek-V3, section 2.2) and how they are wired.

    Nothing published says how, and implementations disagree. The defaults are what transformers
    5.23 computes (`MtpModel`); `python -m tools probe-mtp` measures what weights were trained with.
    """

    blocks: tuple[LayerConfig, ...] = ()  # of each module, in the order of their depths
    # The main model's state that the first module reads: after the norm before the head (also
    # Megatron-LM, vLLM, SGLang), or before it: "raw" (torchtitan).
    input: Annotated[str, one_of(("normed", "raw"))] = "normed"
    # What the draft after next is made from: the module's own state after the norm before the head
    # (also Megatron-LM, torchtitan, SGLang, newer vLLM), before it: "raw" (vLLM up to 2026), or
    # what the first module read, held fixed: "main" (AMD's reference code).
    carry: Annotated[str, one_of(("normed", "raw", "main"))] = "normed"
    # What stands first in what the projection reads: the embedding (every public implementation for
    # the weights of DeepSeek and GLM), or the state (as the paper prints it; MiMo, Inkling).
    first: Annotated[str, one_of(("embedding", "state"))] = "embedding"
    # Whose norm stands before the head.
    final_norm: Annotated[str, one_of(("own", "main", "none"))] = "own"
    own_embedding: bool = False  # else the main model's
    own_head: bool = False  # else the main model's


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A decoder-only language model.

    `published` is the config.json that the description was read from. The saver writes it back in
    its own spelling; nothing else looks inside.
    """

    vocab_size: Count
    d_model: Count
    layers: Annotated[tuple[LayerConfig, ...], Limit("a tuple of at least one LayerConfig", len)]
    mtp: MTPConfig = MTPConfig()
    norm_epsilon: Positive = 1e-6
    tied_embeddings: bool = False  # the head uses the embedding's weight
    embedding_multiplier: Positive = 1.0
    logits_multiplier: Positive = 1.0
    max_length: Count  # positions the model is made for
    published: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
