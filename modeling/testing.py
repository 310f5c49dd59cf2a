"""A test kit for whoever writes an attention, a cache or a model: `check_attention` and so on.

A check takes a config, builds the part in float64, fills every parameter and buffer with noise, and
raises an AssertionError that says what does not hold. It goes by the contracts alone. Each check is
made of smaller ones, which can be called by themselves where a part breaks one on purpose. Routers
and feed-forward layers have theirs in `moe.testing`.

Shapes: B batch, T positions, D model width, H heads, S keys, V vocabulary, N tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from moe import DenseConfig, record_routing, routers
from moe.testing import (
    WIDTH,
    build,
    check_built,
    check_calls,
    check_copied,
    check_gradients,
    check_names,
    check_output,
    close,
    expect,
    noise,
    noting,
    own_parameters,
    randomize,
    tiny_moe,
)

from .attention.gqa import GQAConfig
from .attention.mla import MLAConfig
from .cache import LayerCache
from .config import FeedForwardConfig, LayerConfig, ModelConfig, MTPConfig
from .generation.generate import generate, generate_batch
from .generation.rows import find_non_causal
from .generation.teacher_forcing import spread_row
from .loss import mtp_loss, next_token_loss
from .model import Transformer
from .record import record_attention, record_states
from .rope import RopeConfig
from .step import Step

LENGTH = 6  # positions of most texts that are tried
LONG = 70  # of one: a window should be shorter, else its end is never seen
TOLERANCE = 1e-9

# --- tiny models, of odd widths, so that no two can be mistaken for each other


def tiny_rope(**changes: Any) -> RopeConfig:
    return replace(RopeConfig(width=4, theta=50.0, layout="interleaved"), **changes)


def tiny_mla(**changes: Any) -> MLAConfig:
    plain = MLAConfig(
        num_heads=3,
        query_rank=9,
        kv_rank=6,
        nope_width=5,
        value_width=7,
        rope=tiny_rope(),
        bias=True,
    )
    return replace(plain, **changes)


def tiny_gqa(**changes: Any) -> GQAConfig:
    plain = GQAConfig(num_heads=6, kv_heads=3, head_width=7, rope=tiny_rope(layout="half"))
    return replace(plain, **changes)


def tiny_model(
    attention: Any = None,
    feed_forward: FeedForwardConfig | None = None,
    mtp: int = 0,
    **changes: Any,
) -> ModelConfig:
    """A dense layer and two others, all with this attention, and so many prediction modules.

    attention: `tiny_mla()` if None; feed_forward: of the two others, `tiny_moe()` if None; changes:
    other fields of `ModelConfig`.
    """
    attention = tiny_mla() if attention is None else attention
    feed_forward = tiny_moe() if feed_forward is None else feed_forward
    kinds = DenseConfig(width=10), feed_forward, feed_forward
    layers = tuple(LayerConfig(attention=attention, feed_forward=kind) for kind in kinds)
    modules = MTPConfig(blocks=(layers[1:] * mtp)[:mtp])
    plain = ModelConfig(vocab_size=23, d_model=11, max_length=64, layers=layers, mtp=modules)
    return replace(plain, **changes)


def transformer(
    config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Transformer:
    """The model, filled with noise, in eval mode, which tracks no gradients."""
    model = Transformer(config).to(dtype).requires_grad_(False).eval()
    randomize(model, seed)
    return model


def random_tokens(batch: int, length: int, vocab_size: int = 23, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


# --- attentions and their caches


def check_attention(config: Any, d_model: int = WIDTH) -> None:
    """Everything that a block, generation, training, files and recording ask of an attention.

    config: an `AttentionConfig`. See `modeling.Attention` and `modeling.LayerCache`.
    """
    attention: Any = build(config, d_model)
    x_BTD = noise(3, LENGTH, d_model)
    what = f"{type(config).__name__} builds a {type(attention).__name__}"
    expect(hasattr(attention, "make_cache"), f"{what} without make_cache: no attention")
    check_built(config, d_model)
    check_outputs(config, d_model)
    check_causal(attention, x_BTD)
    check_rows_are_apart(attention, x_BTD)
    check_cached(attention, x_BTD)
    check_long_text(attention, noise(1, LONG, d_model))
    check_cache(attention, x_BTD)
    check_padding(attention, x_BTD)
    check_caches_are_apart(attention, x_BTD)
    check_layers_are_apart(config, d_model)
    check_rollback(attention, x_BTD)
    check_rollback(attention, noise(3, LONG, d_model))
    check_adapters(config, d_model)
    check_recorded(attention, x_BTD)
    check_copied(config, lambda attention: run_whole(attention, x_BTD), d_model)
    check_precision(config, d_model)
    check_calls(attention, lambda attention: run_whole(attention, x_BTD))
    check_gradients(attention, run_whole, x_BTD)
    check_names(attention, lambda attention: run_pieces(attention, x_BTD, [2]))


def run_whole(attention: Any, x_BTD: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """The outputs for texts that begin at position 0, without a cache."""
    return attention(x_BTD, make_step([0], x_BTD, counts), None)


def run_cached(
    attention: Any, x_BTD: Tensor, cache: LayerCache, counts: Sequence[int] | None = None
) -> Tensor:
    """The outputs for what follows the rows of a cache, which it is appended to."""
    return attention(x_BTD, make_step(cache.lengths, x_BTD, counts), cache)


def run_pieces(attention: Any, x_BTD: Tensor, cuts: Sequence[int]) -> Tensor:
    """The outputs for a text that comes in pieces, cut at these positions."""
    cache = attention.make_cache(*x_BTD.shape[:2])
    pieces = x_BTD.tensor_split(list(cuts), dim=1)
    return torch.cat([run_cached(attention, piece, cache) for piece in pieces], dim=1)


def make_step(lengths: Sequence[int], x_BTD: Tensor, counts: Sequence[int] | None) -> Step:
    tokens_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.int64)
    return Step.after(lengths, tokens_BT, counts)


def check_outputs(config: Any, d_model: int = WIDTH) -> None:
    """(B, T, D) in the dtype of the input, for no new token too, with a cache and without.

    The input stays as it was, and a second call gives the same.
    """
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        attention: Any = build(config, d_model, dtype)
        for T in (LENGTH, 1, 0):
            x_BTD = noise(2, T, d_model, dtype=dtype)
            kept_BTD, what = x_BTD.clone(), f"{T} new positions (there may be none) in {dtype}"
            with noting(f"while it ran on {what}"):
                y_BTD = run_whole(attention, x_BTD)
                expect(x_BTD.equal(kept_BTD), "it writes into its input")
                check_output(y_BTD, x_BTD, "without a cache, it must")
                told = "a second call gives other outputs"
                expect(run_whole(attention, x_BTD).equal(y_BTD), told)
                y_BTD = run_cached(attention, x_BTD, attention.make_cache(2, LENGTH))
                check_output(y_BTD, x_BTD, "with a cache, it must")


def check_precision(config: Any, d_model: int = WIDTH) -> None:
    """float32 gives what float64 gives, to a thousandth of the outputs' deviation."""
    x_BTD = noise(2, LENGTH, d_model)
    exact: Any = build(config, d_model)
    single: Any = build(config, d_model, torch.float32)
    for cuts in ([], list(range(1, LENGTH))):
        expected_BTD = run_pieces(exact, x_BTD, cuts)
        found_BTD = run_pieces(single, x_BTD.float(), cuts).double()
        difference = (found_BTD - expected_BTD).abs().max() / expected_BTD.std()
        told = f"cut at {cuts}, outputs in float32 differ from those in float64 by"
        expect(difference < 1e-3, f"{told} {difference:.1g} of their deviation")


def check_causal(attention: Any, x_BTD: Tensor) -> None:
    """A position sees itself and earlier ones, and no later one."""
    expected_BTD, other_BTD = run_whole(attention, x_BTD), noise(*x_BTD.shape, seed=5)
    for t in range(1, x_BTD.shape[1]):
        changed_BTD = torch.cat([x_BTD[:, :t], other_BTD[:, t:]], dim=1)
        found_BTD = run_whole(attention, changed_BTD)
        told = f"positions before {t} change with what stands from {t} on"
        close(found_BTD[:, :t], expected_BTD[:, :t], TOLERANCE, told)
    found_BTD = run_whole(attention, torch.cat([x_BTD[:, :-1], other_BTD[:, -1:]], dim=1))
    expect(not found_BTD.equal(expected_BTD), "the last output does not depend on its position")


def check_rows_are_apart(attention: Any, x_BTD: Tensor) -> None:
    whole_BTD = run_whole(attention, x_BTD)
    for row in range(len(x_BTD)):
        found_BTD = run_whole(attention, x_BTD[row : row + 1])
        told = f"row {row} by itself gets another output than among others"
        close(found_BTD, whole_BTD[row : row + 1], TOLERANCE, told)


def every_cut(length: int) -> Iterator[tuple[int, ...]]:
    """All ways of cutting a text into pieces: token by token, in halves, ..."""
    for number in range(length):
        yield from combinations(range(1, length), number)


def check_cached(attention: Any, x_BTD: Tensor) -> None:
    """Fed whole, in pieces of any lengths or token by token, a text gives the same outputs."""
    expected_BTD = run_whole(attention, x_BTD)
    for cuts in every_cut(x_BTD.shape[1]):
        lengths = [end - start for start, end in pairwise([0, *cuts, x_BTD.shape[1]])]
        told = f"fed in pieces of {lengths}, the outputs are not those of the whole"
        close(run_pieces(attention, x_BTD, cuts), expected_BTD, TOLERANCE, told)


def check_long_text(attention: Any, x_BTD: Tensor) -> None:
    """The same for a text of many positions, token by token and in two pieces."""
    expected_BTD, T = run_whole(attention, x_BTD), x_BTD.shape[1]
    for cuts in (range(1, T), [T // 2], [T - 1]):
        told = f"a text of {T} positions, cut at {list(cuts)[:2]} ..., differs from the whole"
        close(run_pieces(attention, x_BTD, list(cuts)), expected_BTD, TOLERANCE, told)


def check_cache(attention: Any, x_BTD: Tensor) -> None:
    """A cache counts its positions and bytes, holds what it keeps in `tensors`, a row each, and
    refuses what does not fit."""
    (B, T), rollback = x_BTD.shape[:2], 2
    cache = attention.make_cache(B, T, rollback)
    expect(isinstance(cache, LayerCache), f"make_cache makes a {type(cache).__name__}")
    expect(cache.max_length == T, f"max_length is {cache.max_length}, asked for {T}")
    expect(cache.rollback >= rollback, f"rollback is {cache.rollback}, asked for {rollback}")
    expect(cache.lengths == [0] * B, f"an empty cache has lengths {cache.lengths}")
    for end in range(1, T + 1):
        run_cached(attention, x_BTD[:, end - 1 : end], cache)
        expect(cache.lengths == [end] * B, f"after {end} positions, lengths are {cache.lengths}")
    held = sum(tensor.nbytes for tensor in cache.tensors)
    expect(held > 0 and cache.nbytes == held, f"nbytes = {cache.nbytes}, tensors take {held}")
    of_a_row = cache.constant_bytes + T * cache.bytes_per_token
    expect(of_a_row * B == held, f"a row of {of_a_row} bytes is no {B}th of {held}")
    for tensor in cache.tensors:
        expect(len(tensor) == B, f"a tensor {tuple(tensor.shape)} without an axis of {B} rows")
    listed = {tensor.data_ptr() for tensor in cache.tensors}
    apart = [tensor for tensor in find_tensors(vars(cache)) if tensor.data_ptr() not in listed]
    expect(not apart, f"{len(apart)} tensors of the cache are not in `tensors`")
    try:
        run_cached(attention, x_BTD[:, :1], cache)
    except ValueError:
        expect(cache.lengths == [T] * B, f"refusing one more, it changed lengths: {cache.lengths}")
        return
    raise AssertionError(f"a cache for {T} positions takes {T + 1}: raise ValueError")


def find_tensors(value: object) -> list[Tensor]:
    """All tensors in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in find_tensors(v)] if isinstance(value, list | tuple) else []


def check_caches_are_apart(attention: Any, x_BTD: Tensor) -> None:
    """What is kept of earlier positions is in the cache alone: two texts can be fed in turn, and a
    row can be copied."""
    texts = x_BTD, noise(*x_BTD.shape, seed=6)
    caches = [attention.make_cache(*x_BTD.shape[:2]) for _ in texts]
    outputs: list[list[Tensor]] = [[], []]
    for t in range(x_BTD.shape[1]):
        for text_BTD, cache, found in zip(texts, caches, outputs, strict=True):
            found.append(run_cached(attention, text_BTD[:, t : t + 1], cache))
    for text_BTD, found in zip(texts, outputs, strict=True):
        told = "two texts fed in turn, each with its cache, change each other"
        close(torch.cat(found, dim=1), run_whole(attention, text_BTD), TOLERANCE, told)
    one, end = attention.make_cache(1, x_BTD.shape[1], 2), x_BTD.shape[1] - 1
    run_cached(attention, x_BTD[:1, :end], one)
    copied = spread_row(one, [end, end - 1])
    later_BTD = torch.stack([x_BTD[0, end:], x_BTD[0, end - 1 : end]])
    expected_BTD = run_whole(attention, x_BTD[:1])
    expected_BTD = torch.stack([expected_BTD[0, end:], expected_BTD[0, end - 1 : end]])
    told = "a row of a cache that was copied twice, and once cut back, goes on differently"
    close(run_cached(attention, later_BTD, copied), expected_BTD, TOLERANCE, told)


def check_layers_are_apart(config: Any, d_model: int = WIDTH) -> None:
    """Two layers of one config, with other weights, do not change each other through the step."""
    x_BTD = noise(2, LENGTH, d_model)
    first: Any = build(config, d_model)
    second: Any = randomize(build(config, d_model), seed=2)
    step = make_step([0], x_BTD, None)
    first(x_BTD, step, None)
    told = "a layer gives another output behind one like it: what does it keep in step.shared?"
    close(second(x_BTD, step, None), run_whole(second, x_BTD), TOLERANCE, told)


def check_padding(attention: Any, x_BTD: Tensor) -> None:
    """Positions after a row's count leave no trace, neither in its outputs nor in its cache."""
    B, T, D = x_BTD.shape
    for first, second in (([T - 3, 0, 2], [1, 3, 2]), ([0, 0, 1], [3, 0, 0])):
        cache, outputs, starts = attention.make_cache(B, T, 2), [], [0] * B
        for counts in (first, second):
            padded_BTD = 50 * noise(B, T, D, seed=7)
            for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
                padded_BTD[row, :count] = x_BTD[row, start : start + count]
            with noting(f"while rows had {counts} real positions of {T}, after {starts}"):
                outputs.append(run_cached(attention, padded_BTD, cache, counts))
            starts = [start + count for start, count in zip(starts, counts, strict=True)]
            expect(cache.lengths == starts, f"after {starts}, the cache has {cache.lengths}")
        for row, (start, count) in enumerate(zip(first, second, strict=True)):
            expected_BTD = run_whole(attention, x_BTD[row : row + 1, : start + count])
            told = f"a row of {start} positions in a padded batch, and then {count} more,"
            found_TD = torch.cat([outputs[0][row, :start], outputs[1][row, :count]])
            close(found_TD, expected_BTD[0], TOLERANCE, f"{told} differs from the row alone")
    counts, padded_BTD = [T, 0, 2], x_BTD.clone()
    padded_BTD[1:, 2:] = 50 * noise(B - 1, T - 2, D, seed=7)
    found_BTD, expected_BTD = run_whole(attention, padded_BTD, counts), run_whole(attention, x_BTD)
    for row, count in enumerate(counts):
        told = "padding matters where there is no cache"
        close(found_BTD[row, :count], expected_BTD[row, :count], TOLERANCE, told)


def check_rollback(attention: Any, x_BTD: Tensor) -> None:
    """Rows cut back, by up to `rollback` positions at any time and to 0 always, go on as if what
    was cut off had never been there. A deeper cut is right too, or refused."""
    B, T, D = x_BTD.shape
    for rollback in (0, 1, 3):
        cache = attention.make_cache(B, 2 * T, rollback)
        texts = list(x_BTD)
        run_cached(attention, x_BTD, cache)
        check_deep_cut(attention, x_BTD[:1], rollback)
        cuts = [[min(rollback, row) for row in range(B)], [rollback] * B, [0, T, rollback]]
        for number, cut in enumerate(cuts):
            lengths = [0 if c == T else len(text) - c for text, c in zip(texts, cut, strict=True)]
            cache.truncate(lengths)
            expect(cache.lengths == lengths, f"cut back to {lengths}, lengths {cache.lengths}")
            new_BTD = noise(B, max(1, rollback), D, seed=20 + number)
            found_BTD = run_cached(attention, new_BTD, cache)
            rows = zip(texts, lengths, new_BTD, strict=True)
            texts = [torch.cat([text[:length], new]) for text, length, new in rows]
            for row, (text_TD, length) in enumerate(zip(texts, lengths, strict=True)):
                expected_TD = run_whole(attention, text_TD[None])[0, length:]
                told = f"row {row}, cut back to {length} with a rollback of {rollback},"
                close(found_BTD[row], expected_TD, TOLERANCE, f"{told} goes on differently")


def check_deep_cut(attention: Any, x_1TD: Tensor, rollback: int) -> None:
    """A row cut back further than `rollback` goes on rightly, or the cut is refused."""
    cache, length = attention.make_cache(1, x_1TD.shape[1], rollback), 1
    for x_11D in x_1TD.split(1, dim=1):
        run_cached(attention, x_11D, cache)
    try:
        cache.truncate([length])
    except ValueError:
        return
    found_BTD = run_cached(attention, x_1TD[:, length:], cache)
    told = f"cut back to {length}, with a rollback of {rollback}, a row goes on differently"
    close(found_BTD, run_whole(attention, x_1TD)[:, length:], TOLERANCE, told)


def check_adapters(config: Any, d_model: int = WIDTH) -> None:
    """What acts on a submodule acts in every path: whole, in pieces and token by token."""
    x_BTD = noise(2, LENGTH, d_model)
    for path, part in build(config, d_model).named_modules():
        if not path or not own_parameters(part):
            continue
        attention: Any = build(config, d_model)
        attention.get_submodule(path).register_forward_hook(lambda part, args, y: y * 1.5)
        whole_BTD = run_whole(attention, x_BTD)
        for cuts in (list(range(1, LENGTH)), [LENGTH - 2], [LENGTH - 1]):
            told = f"a hook on {path} does not act alike with a cache and without"
            close(run_pieces(attention, x_BTD, cuts), whole_BTD, TOLERANCE, told)


def check_recorded(attention: Any, x_BTD: Tensor) -> None:
    """`record_attention` gets weights that sum to 1 and see no later position, or is told that
    there are none; the outputs stay the same."""
    expected_BTD = run_whole(attention, x_BTD)
    with record_attention(attention) as whole:
        try:
            found_BTD = run_whole(attention, x_BTD)
        except ValueError as error:
            raise AssertionError(str(error)) from error
    close(found_BTD, expected_BTD, TOLERANCE, "recording changes the outputs")
    with record_attention(attention) as in_pieces:
        run_pieces(attention, x_BTD, [2, 3])
    for layer, recorded in whole.items():
        weights_BHTS, sinks_BHT = recorded.weights_BHTS, recorded.sinks_BHT
        expect(not weights_BHTS.triu(1).any(), "recorded weights see later positions")
        told = "report each softmax as a head of its own, before they are combined"
        expect((weights_BHTS >= 0).all(), f"recorded weights are negative: {told}")
        total_BHT = weights_BHTS.sum(dim=-1) + (0 if sinks_BHT is None else sinks_BHT)
        told = (
            f"the recorded weights of a query and its sink do not sum to 1: {told}; what is no "
            "softmax is reported as shares"
        )
        close(total_BHT, torch.ones_like(total_BHT), 1e-6, told)
        told = "recorded weights differ when the text is fed in pieces"
        close(in_pieces[layer].weights_BHTS, weights_BHTS, 1e-6, told)


# --- models


def check_model(config: ModelConfig) -> None:
    """A whole model of these parts keeps the promises of `Transformer` and of generation.

    It does not take the place of `check_attention` and the others, which look at more.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"a {type(config).__name__}: the check takes a ModelConfig")
    model, tokens_BT = transformer(config), random_tokens(3, LENGTH, config.vocab_size)
    check_logits(model, tokens_BT)
    check_model_recorded(model, tokens_BT)
    check_training(model, tokens_BT)
    check_model_state(config, tokens_BT)
    if find_non_causal(model) is None:
        check_model_is_causal(model, tokens_BT)
        check_model_cached(model, tokens_BT)
        check_generation(model, tokens_BT)


def check_logits(model: Transformer, tokens_BT: Tensor) -> None:
    (B, T), V = tokens_BT.shape, model.config.vocab_size
    logits_BTV = model(tokens_BT)
    expect(logits_BTV.shape == (B, T, V), f"logits have shape {tuple(logits_BTV.shape)}")
    expect(logits_BTV.isfinite().all(), "logits are not finite")
    expect(model(tokens_BT).equal(logits_BTV), "a second call gives other logits")
    last_BTV = model(tokens_BT, logits_to_keep=2)
    close(last_BTV, logits_BTV[:, -2:], TOLERANCE, "logits_to_keep changes the logits")
    for depth, logits_BtV in enumerate(model.mtp_logits(tokens_BT), start=1):
        expected = (B, T - depth, V)
        found = tuple(logits_BtV.shape)
        expect(found == expected, f"MTP depth {depth}: {found}, expected {expected}")


def check_model_is_causal(model: Transformer, tokens_BT: Tensor) -> None:
    """No logits, those of MTP depths included, depend on tokens that they do not read, or on other
    rows."""
    logits = [model(tokens_BT), *model.mtp_logits(tokens_BT)]
    for t in range(1, tokens_BT.shape[1]):
        changed_BT = tokens_BT.clone()
        changed_BT[:, t:] = (changed_BT[:, t:] + 5) % model.config.vocab_size
        found = [model(changed_BT), *model.mtp_logits(changed_BT)]
        for depth, (after, before) in enumerate(zip(found, logits, strict=True)):
            told = f"depth {depth} sees tokens from {t} on at positions before {t - depth}"
            close(after[:, : max(0, t - depth)], before[:, : max(0, t - depth)], TOLERANCE, told)
    alone = torch.cat([model(tokens_1T) for tokens_1T in tokens_BT.split(1)])
    close(alone, logits[0], TOLERANCE, "a row by itself gets other logits than among others")


def check_model_cached(model: Transformer, tokens_BT: Tensor) -> None:
    """Fed in two pieces, or token by token, a text gives the logits of the whole."""
    expected_BTV, T = model(tokens_BT), tokens_BT.shape[1]
    for cuts in [*((cut,) for cut in range(1, T)), tuple(range(1, T))]:
        cache = model.make_cache(*tokens_BT.shape)
        pieces = [model(piece, cache) for piece in tokens_BT.tensor_split(list(cuts), dim=1)]
        told = f"cut at {list(cuts)}, logits are not those of the whole"
        close(torch.cat(pieces, dim=1), expected_BTV, TOLERANCE, told)


def check_generation(model: Transformer, tokens_BT: Tensor) -> None:
    """Greedy text is the argmax of whole forwards, alone, in a batch, and with drafts."""
    prompts = [tokens_BT[0].tolist(), tokens_BT[1, :2].tolist()]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    for drafts in (0, 1, 3) if model.mtp else (0,):
        told = f"with {drafts} drafts, generation"
        found = [list(generate(model, prompt, 4, draft_tokens=drafts)) for prompt in prompts]
        expect(found == expected, f"{told} gives {found}, whole forwards {expected}")
        found = generate_batch(model, prompts, 4, draft_tokens=drafts)
        expect(found == expected, f"{told} of a batch gives {found}, whole forwards {expected}")


def check_model_recorded(model: Transformer, tokens_BT: Tensor) -> None:
    """Every router and layer is recorded, MTP modules too, and recording changes nothing."""
    expected = [model(tokens_BT), *model.mtp_logits(tokens_BT)]
    with (
        record_routing(model) as routings,
        record_attention(model),
        record_states(model) as states,
    ):
        found = [model(tokens_BT), *model.mtp_logits(tokens_BT)]
    for after, before in zip(found, expected, strict=True):
        close(after, before, TOLERANCE, "recording changes the logits")
    layers = list(range(len(model.layers) + len(model.mtp)))
    expect(list(states) == layers, f"states of layers {list(states)} are recorded, not {layers}")
    told = f"routings of layers {list(routings)} are recorded, not {list(routers(model))}"
    expect(list(routings) == list(routers(model)), told)


@torch.enable_grad()
def check_training(model: Transformer, tokens_BT: Tensor) -> None:
    """The losses have a gradient for every parameter."""
    model.requires_grad_(True)
    states = model.hidden_states(tokens_BT)
    depths = model.mtp_hidden_states(states, tokens_BT)
    loss = next_token_loss(states.normed_BTD, model.head, tokens_BT)
    loss = loss + mtp_loss(depths, model.mtp_heads, tokens_BT, [0.3] * len(depths))
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    expect(not without, f"no gradient reaches {', '.join(without)}")
    model.zero_grad()
    model.requires_grad_(False)


def check_model_state(config: ModelConfig, tokens_BT: Tensor) -> None:
    """The model is built on the meta device, drawn from a seed, and loaded from its state_dict."""
    with torch.device("meta"):
        Transformer(config)
    first, second = transformer(config), transformer(config, seed=1)
    second.load_state_dict(first.state_dict())
    close(second(tokens_BT), first(tokens_BT), 1e-12, "a copy of the state_dict differs")
    first.initialize(0.02, seed=1)
    second.initialize(0.02, seed=1)
    close(second(tokens_BT), first(tokens_BT), 1e-12, "drawn from one seed, two models differ")


def compare(
    model: Transformer,
    peer_logits: Callable[[Tensor], Tensor],
    tokens_BT: Tensor | None = None,
    tolerance: float = 1e-4,
) -> float:
    """Hold a model to another implementation of it; returns the largest difference of logits, in
    units of the peer's standard deviation.

    peer_logits: (B, T) token ids -> (B, T, V) logits. tokens_BT: random ones if None. Raises
    AssertionError above the tolerance, with the first position that differs, and for logits that
    compare nothing: not finite, or all alike.
    """
    if tokens_BT is None:
        length = min(23, model.config.max_length)
        tokens_BT = random_tokens(2, length, model.config.vocab_size)
    with torch.no_grad():
        ours_BTV, theirs_BTV = model(tokens_BT), peer_logits(tokens_BT)
    shapes = tuple(ours_BTV.shape), tuple(theirs_BTV.shape)
    expect(shapes[0] == shapes[1], f"logits of shape {shapes[0]}, the peer's {shapes[1]}")
    theirs_BTV = theirs_BTV.to(ours_BTV)
    told = "hold values that are not finite"
    expect(ours_BTV.isfinite().all(), f"logits {told}")
    expect(theirs_BTV.isfinite().all(), f"the peer's logits {told}")
    scale = theirs_BTV.std()
    expect(scale > 0, "the peer's logits are all alike, which compares nothing")
    difference_BT = (ours_BTV - theirs_BTV).abs().amax(dim=-1) / scale
    worst = difference_BT.max().item()
    if worst > tolerance:
        t = int((difference_BT > tolerance).any(dim=0).nonzero()[0])
        raise AssertionError(
            f"logits differ by {worst:.2g} standard deviations of the peer's, more than "
            f"{tolerance:g}; first at position {t}, where the token is {tokens_BT[:, t].tolist()}"
        )
    return worst
