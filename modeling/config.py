"""What a whole model is, as data: a tuple of layer descriptions plus what surrounds them.

A layer's attention and feed-forward are configs that build their modules. The contracts of both
stand here; a kind from outside the package that fulfils one takes part like ours.
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

    A query sees its own position and earlier ones. T may be 0, and a row may have no new token.
    Padding, by `step.counts`, leaves no trace in the cache or in other positions. A text fed
    whole, in pieces or token by token gives the same outputs. The module calls its submodules and
    reads a weight only through `plain_weight`, so that an adapter or a hook acts in every path.
    In each forward it calls `report_weights`, or it has `has_attention_weights = False`: see
    `record_attention`.
    """

    def __call__(self, x_BTD: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D); appends the new tokens to the cache, which advances lengths."""

    def make_cache(self, batch_size: int, max_length: int, rollback: int = 0) -> LayerCache:
        """An empty cache whose rows can be cut back by `rollback` positions at any time."""


@runtime_checkable
class AttentionConfig(Protocol):
    """A kind of attention: `GQAConfig`, `MLAConfig`, or anybody's frozen dataclass."""

    def build(self, d_model: int) -> nn.Module:
        """The `Attention`, its weights drawn; on the meta device too, where no value is read."""


@runtime_checkable
class FeedForwardConfig(Protocol):
    """A kind of feed-forward layer: `DenseConfig`, `MoEConfig`, or anybody's frozen dataclass."""

    def build(self, d_model: int) -> nn.Module:
        """A module (B, T, D) -> (B, T, D), its weights drawn, that treats all positions alike."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig(Config):
    """One transformer block: attention, then feed-forward, each added to the residual stream."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm_before: bool = True  # a norm on the input of each of the two
    norm_after: bool = False  # a norm on the output of each of the two
    residual_multiplier: Positive = 1.0  # of both outputs, before they are added


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Config):
    """Multi-token-prediction modules (DeepSeek-V3, section 2.2) and how they are wired.

    No publication says which state is read, and implementations disagree. The defaults are those
    of transformers 5.23 (`MtpModel`); `python -m tools probe-mtp` finds the wiring of weights.
    """

    blocks: tuple[LayerConfig, ...] = ()  # of each module, in the order of their depths
    # Which state of the main model the first module reads: "normed", after the final norm (also
    # Megatron-LM, vLLM, SGLang), or "raw", before it (torchtitan).
    input: Annotated[str, one_of(("normed", "raw"))] = "normed"
    # Which state the next depth reads: this module's own, "normed" by the norm before the head
    # (also Megatron-LM, torchtitan, SGLang, newer vLLM) or "raw" (vLLM up to 2026), or "main", the
    # state that the first module read, at every depth (AMD's reference code).
    carry: Annotated[str, one_of(("normed", "raw", "main"))] = "normed"
    # Which half of the projection's input comes first: the embedding (every public implementation
    # for the weights of DeepSeek and GLM), or the state (as the paper prints it; MiMo, Inkling).
    first: Annotated[str, one_of(("embedding", "state"))] = "embedding"
    # Which norm stands before the head: the module's own, the main model's, or none.
    final_norm: Annotated[str, one_of(("own", "main", "none"))] = "own"
    own_embedding: bool = False  # else the main model's
    own_head: bool = False  # else the main model's


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A decoder-only language model.

    `published` is the config.json that the config was read from. Only `checkpoints` reads it, for
    family, quantisation and token ids, and writes it back with the dtype of the saved weights.
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
