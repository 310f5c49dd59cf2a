"""The same weights in transformers, to be timed beside ours with each of its best options.

Shapes: B rows, T tokens, R rounds.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling import Transformer

from .contexts import draw_context
from .timing import Contender, clock

PEER = "transformers"
EXPERTS = "eager", "grouped_mm"
ATTENTIONS = "eager", "sdpa"


def import_transformers() -> Any:
    """The package; ValueError with the way to install it if it is missing."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise ValueError(
            "--against transformers: transformers is not installed: "
            "pip install 'transformers>=5.23'"
        ) from None


class Peer:
    """A model of transformers; `options` are the (experts, attention) implementations it has."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        library = import_transformers()
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
        self.make_cache = library.DynamicCache
        try:
            model = library.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: transformers cannot load it: {reason}") from None
        self.model, self.device = model.to(device).eval(), device
        self.options = [(experts, attention) for experts in EXPERTS for attention in ATTENTIONS]
        tokens_BT = torch.zeros(1, 4, dtype=torch.int64, device=device)
        with torch.inference_mode():
            self.keep_options(lambda: self.model(tokens_BT, logits_to_keep=1))

    def keep_options(self, trial: Callable[[], Any]) -> None:
        """Keep the options with which this runs: some want other shapes or know other models."""

        def runs(option: tuple[str, str]) -> bool:
            try:
                self.choose(option)
                trial()
            except (ValueError, KeyError, RuntimeError, NotImplementedError):
                return False
            return True

        self.options = [option for option in self.options if runs(option)]

    def choose(self, option: tuple[str, str]) -> None:
        experts, attention = option
        self.model.set_experts_implementation(experts)
        self.model.set_attn_implementation(attention)

    def prefill_contenders(self, tokens_RBT: Tensor) -> dict[str, Contender]:
        def prefill(i: int) -> float:
            return self.time_forward(tokens_RBT[i], self.make_cache(config=self.model.config))

        return self.contenders(prefill)

    def decoding_contenders(self, tokens_RBT: Tensor, held: Any) -> dict[str, Contender]:
        """Decoding one token of each row after what a cache of one row holds, in each row."""
        cache = self.spread_cache(held, tokens_RBT.shape[1])

        def decode(i: int) -> float:
            with restored(cache):
                return self.time_forward(tokens_RBT[i], cache)

        return self.contenders(decode)

    def contenders(self, step: Callable[[int], float]) -> dict[str, Contender]:
        """A contender for each setting that takes this step."""

        def with_option(option: tuple[str, str]) -> Contender:
            def chosen_step(i: int) -> float:
                self.choose(option)
                return step(i)

            return Contender(chosen_step, rival=True)

        return {
            f"{PEER}, {experts} experts, {attention} attention": with_option((experts, attention))
            for experts, attention in self.options
        }

    def training_contenders(
        self, tokens_RBT: Tensor, autocast: torch.autocast
    ) -> dict[str, Contender]:
        """A training step on the tokens of a round, of a model in float32."""
        parameters = list(self.model.train().requires_grad_(True).parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-9, fused=True)

        def update(tokens_BT: Tensor) -> None:
            with autocast:
                loss = self.model(tokens_BT, labels=tokens_BT, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        self.keep_options(lambda: update(tokens_RBT[0][:, :8]))
        return self.contenders(lambda i: clock(self.device, lambda: update(tokens_RBT[i])))

    def time_forward(self, tokens_BT: Tensor, cache: Any) -> float:
        def forward() -> None:
            self.model(tokens_BT, past_key_values=cache, logits_to_keep=1)

        return clock(self.device, forward)

    def fill_cache(self, model: Transformer, length: int) -> Any:
        """A cache of one row, filled from the same tokens as ours: see `contexts`."""
        cache, tokens_1T = self.make_cache(config=self.model.config), draw_context(model, length)
        self.choose(self.options[-1])
        self.model(tokens_1T, past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            kept = length
            if layer.is_sliding:
                kept, layer.cumulative_length = min(length, layer.sliding_window - 1), length
            copies = -(-kept // layer.keys.shape[2])
            layer.keys = layer.keys.repeat(1, 1, copies, 1)[:, :, :kept].contiguous()
            layer.values = layer.values.repeat(1, 1, copies, 1)[:, :, :kept].contiguous()
        return cache

    def spread_cache(self, held: Any, rows: int) -> Any:
        """A cache with so many rows like the only one of `held`."""
        cache = self.make_cache(config=self.model.config)
        for layer, source in zip(cache.layers, held.layers, strict=True):
            vars(layer).update(vars(source))
        cache.batch_repeat_interleave(rows)
        return cache

    def count_cache_bytes(self, cache: Any) -> int:
        """Bytes of a cache, and of its largest layer once more, which grows by a copy."""
        kept = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
        return sum(kept) + max(kept)


@contextmanager
def restored(cache: Any) -> Iterator[None]:
    """A block after which a cache, which makes new tensors when it grows, is as it was.

    transformers' own `crop` refuses full sliding windows.
    """
    kept = [dict(vars(layer)) for layer in cache.layers]
    yield
    for layer, state in zip(cache.layers, kept, strict=True):
        vars(layer).update(state)
