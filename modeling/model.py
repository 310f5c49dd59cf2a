"""The transformer: token ids -> logits. Everything it is, is in its `ModelConfig`.

Shapes: B batch, T new tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moe import is_traced

from .cache import Cache, LayerCache
from .config import Attention, LayerConfig, ModelConfig
from .mtp import MTPModule, first_state, next_state
from .norm import RMSNorm
from .step import Step


class States(NamedTuple):
    """The last block's output: raw, and as the head reads it (normed, times logits_multiplier)."""

    raw_BTD: Tensor
    normed_BTD: Tensor


class Block(nn.Module):
    """One layer. The residual stream is the two additions of `forward` and nothing else.

    Norms stand before attention and feed-forward, after them (on what they return), or both.
    """

    def __init__(self, d_model: int, norm_epsilon: float, config: LayerConfig) -> None:
        super().__init__()
        norm = partial(RMSNorm, d_model, norm_epsilon)
        wanted = config.norm_before, config.norm_after
        before, after = (norm if is_wanted else nn.Identity for is_wanted in wanted)
        self.attention_norm = before()
        self.attention = cast(Attention, config.attention.build(d_model))
        self.attention_output_norm = after()
        self.feed_forward_norm = before()
        self.feed_forward = config.feed_forward.build(d_model)
        self.feed_forward_output_norm = after()
        self.residual_multiplier = config.residual_multiplier
        if not hasattr(self.attention, "make_cache"):
            raise TypeError(f"{type(config.attention).__name__} builds no attention: see Attention")

    def forward(self, x_BTD: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        y_BTD = self.attention(self.attention_norm(x_BTD), step, cache)
        x_BTD = x_BTD.add(self.attention_output_norm(y_BTD), alpha=self.residual_multiplier)
        y_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD.add(self.feed_forward_output_norm(y_BTD), alpha=self.residual_multiplier)


class Transformer(nn.Module):
    """A decoder-only language model with its multi-token-prediction modules, ready to train.

    `mtp` is keyed by layer number, counted on from the main layers: the first module of a model
    of 61 layers is `mtp["61"]`, which is where published checkpoints keep it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, V, epsilon = config.d_model, config.vocab_size, config.norm_epsilon
        make_head = partial(nn.Linear, D, V, bias=False)

        def make_embed() -> nn.Embedding:  # undrawn: on the meta device, that imports the compiler
            return nn.Embedding.from_pretrained(torch.empty(V, D), freeze=False)

        self.embed = make_embed()
        self.layers = nn.ModuleList(Block(D, epsilon, layer) for layer in config.layers)
        self.norm = RMSNorm(D, epsilon)
        self.head = make_head()
        if config.tied_embeddings:
            self.head.weight = self.embed.weight
        self.mtp = nn.ModuleDict()
        for number, layer in enumerate(config.mtp.blocks, start=len(config.layers)):
            embed = make_embed() if config.mtp.own_embedding else None
            head = make_head() if config.mtp.own_head else None
            self.mtp[str(number)] = MTPModule(config, Block(D, epsilon, layer), embed, head)
        self.call: Callable[..., Any] = nn.Module.__call__  # of blocks and heads: may be compiled
        self.reset_parameters()

    def forward(
        self, tokens_BT: Tensor, cache: Cache | None = None, logits_to_keep: int | None = None
    ) -> Tensor:
        """Logits of the next token at every position, (B, T, V), in float32 at least.

        tokens_BT: int64. With a `cache`, row b continues at `cache.lengths[b]`, and its tokens are
        appended. logits_to_keep: compute the head for this many last positions only.
        Raises ValueError for ids outside the vocabulary, another dtype, rank or number of rows.
        """
        if logits_to_keep is not None and logits_to_keep < 1:
            raise ValueError(f"logits_to_keep = {logits_to_keep}: must be >= 1")
        x_BTD = self.hidden_states(tokens_BT, cache).normed_BTD
        if logits_to_keep is not None:  # cloned: to multiply a slice, torch would copy the matrix
            x_BtD = x_BTD[:, -logits_to_keep:].clone(memory_format=torch.contiguous_format)
            return self.logits(x_BtD)
        return self.logits(x_BTD)

    def hidden_states(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        counts: Sequence[int] | None = None,
    ) -> States:
        """The states, (B, T, D), before and after the final norm, which the head reads.

        counts: the real tokens of each row, padded on the right; the cache keeps those alone.
        """
        self.check_tokens(tokens_BT)
        lengths = [0] if cache is None else cache.lengths
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"{len(cache.layers)} layers in the cache, {len(self.layers)} here")
        if cache is not None and len(lengths) != len(tokens_BT):
            raise ValueError(f"{len(tokens_BT)} rows of tokens, but {len(lengths)} in the cache")
        x_BTD = self.embed(tokens_BT) * self.config.embedding_multiplier
        step = Step.after(lengths, tokens_BT, counts)
        for i, layer in enumerate(self.layers):
            x_BTD = self.call(layer, x_BTD, step, None if cache is None else cache.layers[i])
        return self.norm_states(x_BTD, self.norm)

    def norm_states(self, x_BTD: Tensor, norm: nn.Module) -> States:
        """A last block's output, and what the head reads of it."""
        # the head is linear: what scales its input scales the logits, in the loss as well
        return States(x_BTD, norm(x_BTD) * self.config.logits_multiplier)

    def logits(self, x_BTD: Tensor, module: MTPModule | None = None) -> Tensor:
        """Logits (..., V), float32 at least, of normed states, by the head of `module` if given."""
        head = self.head if module is None else module.head or self.head
        logits_BTV = self.call(head, x_BTD)
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))

    def make_cache(self, batch_size: int, max_length: int, rollback: int = 0) -> Cache:
        """An empty cache for the main layers, which can be cut back by `rollback` positions at any
        time; layers that keep every entry can be truncated to any length."""
        return Cache(self.make_caches(self.layers, batch_size, max_length, rollback))

    def make_mtp_caches(self, *sizes: int) -> list[LayerCache]:
        """An empty cache for each MTP module; `sizes` are the arguments of `make_cache`."""
        return self.make_caches([module.block for module in self.mtp_modules], *sizes)

    def make_caches(self, blocks: Iterable[nn.Module], *sizes: int) -> list[LayerCache]:
        caches = [cast(Block, block).attention.make_cache(*sizes) for block in blocks]
        for cache in caches:  # so that bytes can be counted before anything is appended
            cache.allocate(self.dtype, self.device)
        return caches

    def mtp_logits(self, tokens_BT: Tensor) -> list[Tensor]:
        """Logits of depths k = 1, 2, ...: (B, T - k, V); position i predicts token i + 1 + k."""
        depths = self.mtp_hidden_states(self.hidden_states(tokens_BT), tokens_BT)
        return list(map(self.logits, depths, self.mtp_modules))

    def mtp_hidden_states(self, states: States, tokens_BT: Tensor) -> list[Tensor]:
        """What the head reads at each depth k, (B, T - k, D); states: of `hidden_states`."""
        depths, read_BtD = [], first_state(self.config.mtp, states)
        for k, module in enumerate(self.mtp_modules, start=1):
            next_Bt = tokens_BT[:, k:]
            read_BtD = read_BtD[:, : next_Bt.shape[1]]
            made = self.mtp_step(module, read_BtD, Step.after([0], next_Bt), None)
            depths.append(made.normed_BTD)
            read_BtD = next_state(self.config.mtp, read_BtD, made)
        return depths

    def mtp_step(
        self, module: MTPModule, state_BTD: Tensor, step: Step, cache: LayerCache | None
    ) -> States:
        """One module on states and the tokens of the step, which are embedded for it."""
        if hasattr(module, "unshard"):  # its norm and head are called outside its forward
            raise ValueError("an MTP module is sharded as a whole: shard its block, not the module")
        embedding_BTD = (module.embed or self.embed)(step.tokens_BT)
        embedding_BTD = embedding_BTD * self.config.embedding_multiplier
        x_BTD = self.call(module, state_BTD, embedding_BTD, step, cache)
        return self.norm_states(x_BTD, module.norm or self.norm)

    @property
    def mtp_modules(self) -> list[MTPModule]:
        return [cast(MTPModule, module) for module in self.mtp.values()]

    @property
    def mtp_heads(self) -> list[nn.Module]:
        return [module.head or self.head for module in self.mtp_modules]

    @property
    def numbered_layers(self) -> Mapping[int, nn.Module]:
        """Every layer by its number; MTP modules follow the main layers."""
        return dict(enumerate([*self.layers, *self.mtp.values()]))

    @property
    def dtype(self) -> torch.dtype:
        return [*self.embed.parameters(), *self.embed.buffers()][0].dtype

    @property
    def device(self) -> torch.device:
        return [*self.embed.parameters(), *self.embed.buffers()][0].device

    def check_tokens(self, tokens_BT: Tensor) -> None:
        if any(hasattr(p, "full_tensor") for p in self.embed.parameters()):  # of fully_shard
            raise ValueError("the model is sharded: call model.unshard() before this method")
        if tokens_BT.dim() != 2 or tokens_BT.dtype != torch.int64:
            found = f"{tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}"
            raise ValueError(f"tokens must be int64 of shape (batch, length), not {found}")
        bad = (tokens_BT < 0) | (tokens_BT >= self.config.vocab_size)
        if not is_traced(tokens_BT) and bad.any():
            row, position = bad.nonzero()[0].tolist()
            raise ValueError(
                f"token id {tokens_BT[row, position].item()} at position {position} of row {row} "
                f"is outside the vocabulary of {self.config.vocab_size}"
            )

    def initialize(self, std: float, seed: int) -> None:
        """`reset_parameters` from a seed; torch's own generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reset_parameters(std)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw every weight: matrices from a normal distribution, and the rest as its module says.

        Every module that owns parameters has `reset_parameters`, which takes `std` if it owns
        matrices; what it leaves undrawn is an error. The `residual_outputs` of a module, which
        write to the residual stream, are divided by sqrt(2 layers) (GPT-2, section 2.3), so that
        its variance does not grow with depth. On the meta device nothing is drawn.
        """
        for path, module in self.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if own and self.device.type != "meta":
                draw_parameters(path, module, own, std)
        for module in self.modules():
            for name in getattr(module, "residual_outputs", ()):
                module.get_parameter(name).mul_((2 * len(self.layers)) ** -0.5)


def draw_parameters(path: str, module: nn.Module, own: dict[str, nn.Parameter], std: float) -> None:
    """Draw the parameters that a module owns; TypeError if it does not say how they begin."""
    what = f"{path}, a {type(module).__name__}," if path else "the model"
    reset = None if isinstance(module, Transformer) else getattr(module, "reset_parameters", None)
    if reset is None:
        raise TypeError(f"{what} owns {', '.join(own)} and has no reset_parameters to draw them")
    for parameter in own.values():
        parameter.fill_(float("nan"))
    if getattr(type(module), "reset_parameters", None) in DRAWN_BY_TORCH:
        own["weight"].normal_(std=std)
        if "bias" in own:
            own["bias"].zero_()
    else:
        reset(**({"std": std} if "std" in signature(reset).parameters else {}))
    for name, parameter in own.items():
        if not parameter.isfinite().all():
            raise TypeError(f"{what} has a reset_parameters that does not set {name}")


DRAWN_BY_TORCH = nn.Linear.reset_parameters, nn.Embedding.reset_parameters  # with no deviation
