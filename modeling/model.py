"""The transformer: token ids -> logits. Everything it is, is in its `ModelConfig`.

Shapes: B batch, T new tokens, D model width, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import assert_never, cast

import torch
from torch import Tensor, nn

from moe import FeedForward, MoE, MoEConfig

from .attention.gqa import GroupedQueryAttention
from .attention.mla import MultiHeadLatentAttention
from .cache import Cache, LayerCache
from .config import DenseConfig, GQAConfig, LayerConfig, MLAConfig, ModelConfig
from .mtp import MTPModule, States, embedding, first_state, next_state
from .norm import RMSNorm
from .rope import Positions


class Block(nn.Module):
    """One layer. The residual stream is the two additions of `forward` and nothing else.

    Norms stand before attention and feed-forward, after them (on what they return), or both.
    """

    def __init__(self, d_model: int, norm_epsilon: float, config: LayerConfig) -> None:
        super().__init__()
        self.attention: GroupedQueryAttention | MultiHeadLatentAttention
        self.feed_forward: nn.Module
        before = partial(norm_or_nothing, config.norm_before, d_model, norm_epsilon)
        after = partial(norm_or_nothing, config.norm_after, d_model, norm_epsilon)
        self.attention_norm = before()
        match config.attention:
            case GQAConfig() as gqa:
                self.attention = GroupedQueryAttention(d_model, gqa)
            case MLAConfig() as mla:
                self.attention = MultiHeadLatentAttention(d_model, mla)
            case other:
                assert_never(other)
        self.attention_output_norm = after()
        self.feed_forward_norm = before()
        match config.feed_forward:
            case DenseConfig(width=width):
                self.feed_forward = FeedForward(d_model, width)
            case MoEConfig() as moe:
                self.feed_forward = MoE(d_model, moe)
            case unknown:
                assert_never(unknown)
        self.feed_forward_output_norm = after()
        self.residual_multiplier = config.residual_multiplier

    def forward(self, x_BTD: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        y_BTD = self.attention(self.attention_norm(x_BTD), positions, cache)
        x_BTD = self.added(x_BTD, self.attention_output_norm(y_BTD))
        y_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        return self.added(x_BTD, self.feed_forward_output_norm(y_BTD))

    def added(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        return torch.add(x_BTD, y_BTD, alpha=self.residual_multiplier)


def norm_or_nothing(wanted: bool, d_model: int, epsilon: float) -> nn.Module:
    return RMSNorm(d_model, epsilon) if wanted else nn.Identity()


class Transformer(nn.Module):
    """A decoder-only language model with its multi-token-prediction modules.

    `mtp` is keyed by layer number, counted on from the main layers: the first module of a model
    of 61 layers is `mtp["61"]`, which is where published checkpoints keep it. Weights of a new
    model are whatever `torch.empty` finds; load them, or call `initialize`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, epsilon = config.d_model, config.norm_epsilon
        self.embed = embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(Block(D, epsilon, layer) for layer in config.layers)
        self.norm = RMSNorm(D, epsilon)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight
        self.mtp = nn.ModuleDict(
            {
                str(len(config.layers) + j): MTPModule(config, Block(D, epsilon, layer))
                for j, layer in enumerate(config.mtp.blocks)
            }
        )

    def forward(
        self, tokens_BT: Tensor, cache: Cache | None = None, logits_to_keep: int | None = None
    ) -> Tensor:
        """Logits of the next token at every position, (B, T, V), in float32 at least.

        tokens_BT: int64. With a `cache` the tokens continue at `cache.length` and are appended to
        it. logits_to_keep: compute the head for the last so many positions only.
        Raises ValueError for ids outside the vocabulary, another dtype, rank or number of rows.
        """
        if logits_to_keep is not None and logits_to_keep < 1:
            raise ValueError(f"logits_to_keep = {logits_to_keep}: must be >= 1")
        x_BTD = self.hidden_states(tokens_BT, cache).normed_BTD
        return self.logits(x_BTD if logits_to_keep is None else x_BTD[:, -logits_to_keep:])

    def hidden_states(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        counts: Sequence[int] | None = None,
    ) -> States:
        """The states, (B, T, D), before and after the final norm, which the head reads.

        counts: how many tokens of each row are real, where rows are padded on the right; the
        cache keeps those alone.
        """
        self.check_tokens(tokens_BT)
        lengths = [0] if cache is None else cache.lengths
        if cache is not None and len(lengths) != len(tokens_BT):
            raise ValueError(f"{len(tokens_BT)} rows of tokens for a cache of {len(lengths)}")
        x_BTD = self.embed(tokens_BT) * self.config.embedding_multiplier
        positions = new_positions(lengths, tokens_BT, counts)
        for i, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, positions, None if cache is None else cache.layers[i])
        return self.states(x_BTD, self.norm)

    def states(self, x_BTD: Tensor, norm: nn.Module) -> States:
        """What a last block leaves, with what the head reads of it."""
        # the head is linear: what scales its input scales the logits, in the loss as well
        return States(x_BTD, norm(x_BTD) * self.config.logits_multiplier)

    def logits(self, x_BTD: Tensor, module: MTPModule | None = None) -> Tensor:
        """The head on normed states, of an MTP module if one is named, in float32 at least."""
        own = None if module is None else module.head
        logits_BTV = (own or self.head)(x_BTD)
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))

    def make_cache(self, batch_size: int, max_length: int, rollback: int = 0) -> Cache:
        """An empty cache on the model's device and in its dtype, for the main layers.

        rollback: how many positions it can be truncated by, at any time, where layers have
        windows; layers without can be truncated to any length.
        """
        layers = cast(list[Block], self.layers)
        sizes = batch_size, max_length, rollback
        return Cache([layer.attention.make_cache(*sizes) for layer in layers])

    def make_mtp_caches(
        self, batch_size: int, max_length: int, rollback: int = 0
    ) -> list[LayerCache]:
        """An empty cache for each MTP module."""
        blocks = [cast(Block, module.block) for module in self.mtp_modules]
        return [block.attention.make_cache(batch_size, max_length, rollback) for block in blocks]

    def mtp_logits(self, tokens_BT: Tensor) -> list[Tensor]:
        """Logits of depths k = 1, 2, ...: (B, T - k, V); position i predicts token i + 1 + k."""
        depths = self.mtp_hidden_states(self.hidden_states(tokens_BT), tokens_BT)
        return list(map(self.logits, depths, self.mtp_modules))

    def mtp_hidden_states(self, states: States, tokens_BT: Tensor) -> list[Tensor]:
        """What the head reads at each depth k, (B, T - k, D), after `hidden_states` of the text."""
        depths, read_BtD = [], first_state(self.config.mtp, states)
        for k, module in enumerate(self.mtp_modules, start=1):
            next_Bt = tokens_BT[:, k:]
            read_BtD = read_BtD[:, : next_Bt.shape[1]]
            left = self.mtp_step(module, read_BtD, next_Bt, new_positions([0], next_Bt), None)
            depths.append(left.normed_BTD)
            read_BtD = next_state(self.config.mtp, read_BtD, left)
        return depths

    def mtp_step(
        self,
        module: MTPModule,
        state_BTD: Tensor,
        tokens_BT: Tensor,
        positions: Positions,
        cache: LayerCache | None,
    ) -> States:
        """One module on states and the tokens that it embeds beside them."""
        embedding_BTD = (module.embed or self.embed)(tokens_BT) * self.config.embedding_multiplier
        x_BTD = module(state_BTD, embedding_BTD, positions, cache)
        return self.states(x_BTD, module.norm or self.norm)

    @property
    def mtp_modules(self) -> list[MTPModule]:
        """In the order of their depths."""
        return [cast(MTPModule, module) for module in self.mtp.values()]

    @property
    def mtp_heads(self) -> list[Tensor]:
        """The (V, D) weight of the head that each depth is read with."""
        return [(module.head or self.head).weight for module in self.mtp_modules]

    def check_tokens(self, tokens_BT: Tensor) -> None:
        if tokens_BT.dim() != 2 or tokens_BT.dtype != torch.int64:
            found = f"{tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}"
            raise ValueError(f"tokens must be int64 of shape (batch, length), not {found}")
        bad = (tokens_BT < 0) | (tokens_BT >= self.config.vocab_size)
        if not tokens_BT.is_meta and bad.any():
            row, position = bad.nonzero()[0].tolist()
            raise ValueError(
                f"token id {tokens_BT[row, position].item()} at position {position} of row {row} "
                f"is outside the vocabulary of {self.config.vocab_size}"
            )

    @torch.no_grad()
    def initialize(self, std: float, seed: int) -> None:
        """Draw every matrix from a normal distribution; norms start at 1, biases and sinks at 0.

        Projections that write to the residual stream get std / sqrt(2 layers) (GPT-2, section
        2.3), so that its variance does not grow with depth.
        """
        generator = torch.Generator().manual_seed(seed)
        into_residual = std / (2 * len(self.layers)) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                writes = name.endswith(("attention.o.weight", "down", "down.weight"))
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * (into_residual if writes else std))


def new_positions(
    lengths: list[int], tokens_BT: Tensor, counts: Sequence[int] | None = None
) -> Positions:
    """The positions that new tokens take behind rows of these lengths."""
    T, device = tokens_BT.shape[1], tokens_BT.device
    rows = lengths[:1] if len(set(lengths)) == 1 else lengths
    indices_BT = torch.tensor(rows, device=device)[:, None] + torch.arange(T, device=device)
    return Positions(indices_BT, counts)
