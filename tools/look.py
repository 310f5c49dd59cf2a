"""look: draw what a model does with a text: experts, attention and surprise of each token.

experts.png: The experts that each token went to, layer by layer, under the words of the text, with
their shares of the token's weights. A row for each sparse layer, MTP modules included: position i
of the module of depth k reads token i + k too, and the last k tokens have no position.

load.png: How often each expert was chosen, relative to its fair share: 1 if all experts of a layer
are chosen equally often.

attention.png: The weights with which the tokens attend to each other, in each head of one layer. A
learned sink, which takes a share of a token's attention, is a column of its own.

surprise.png: The text, its tokens coloured by surprise: -log2 of the probability, in bits, that the
model gave to the token. The first token is not predicted.

Shapes: N tokens of the text, n = N - 1 predicted ones, T positions of a layer, H heads, E experts,
K slots of a token.
"""

import argparse
import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoints import TextStream, Tokenizer, check_vocabulary, load_tokenizer, read_config
from modeling import AttentionWeights, Transformer, find_non_causal, record_attention
from moe import Routing, expert_load, record_routing

from .corpus import read_text
from .evaluate import depth_of, judge_tokens
from .generate import add_loading_arguments, load_requested_model

LONGEST = 24  # characters of a token that are shown
NO_TEXT = "◌"  # stands for a token that begins or continues a character and does not end it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="checkpoint directory")
    add("text", type=Path, help="UTF-8 text, plain or .xz, or - for stdin")
    add(
        "--out",
        type=Path,
        default=Path("pictures"),
        help="folder to write to; pictures of the same names are replaced",
    )
    add("--max-tokens", type=int, default=128, help="read only this many first tokens of the text")
    add("--layer", type=int, help="layer whose attention to draw; without it, the last main one")
    add("--heads", type=int, nargs="+", help="heads whose attention to draw; without it, all")
    add_loading_arguments(parser)
    for definition in (__doc__ or "").split("\n\n")[1:-1]:
        title, text = definition.split(": ", 1)
        parser.add_argument_group(title, " ".join(text.split()))


def run(args: argparse.Namespace) -> int:
    check_matplotlib()
    check_folder(args.out)
    config, tokenizer = read_config(args.model), load_tokenizer(args.model)
    check_vocabulary(args.model, tokenizer, config.vocab_size)
    ids = read_tokens(tokenizer, args.text, args.max_tokens, config.max_length)
    model = load_requested_model(args)
    layer = choose_layer(model, args.layer, len(ids))
    seen = observe(model, torch.tensor(ids), layer)
    heads = choose_heads(seen, args.heads)
    subject = f"{args.model.resolve().name}, {len(ids)} tokens"
    for path in draw_pictures(args.out, subject, read_pieces(tokenizer, ids), seen, heads):
        print(path)
    return 0


def check_matplotlib() -> None:
    """Raise ValueError if what draws is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError('matplotlib, which draws, is not installed: pip install -e ".[look]"')


def check_folder(path: Path) -> None:
    """Raise ValueError if a file stands where a folder must be."""
    exists = next(place for place in (path, *path.parents) if place.exists())
    if not exists.is_dir():
        raise ValueError(f"--out {path}: {exists} is a file; choose another path for the folder")


def read_tokens(tokenizer: Tokenizer, path: Path, max_tokens: int, max_length: int) -> list[int]:
    """The first tokens of a text, with a warning if it has more; ValueError for fewer than two."""
    if max_tokens < 2:
        raise ValueError(f"--max-tokens {max_tokens}: must be >= 2")
    ids = tokenizer.encode(read_text(path))
    if len(ids) < 2:
        raise ValueError(f"{path}: {len(ids)} tokens of text, at least 2 needed")
    shown = min(max_tokens, max_length)
    if shown < len(ids):
        reason = f"--max-tokens {max_tokens}" if shown == max_tokens else "the model reads no more"
        problem = f"the first {shown} of {len(ids):,} tokens are shown ({reason})"
        warnings.warn(f"{path}: {problem}", stacklevel=2)
    return ids[:shown]


def choose_layer(model: Transformer, requested: int | None, num_tokens: int) -> int | None:
    """The layer whose attention is drawn: the last main one that has weights, if none is requested.

    None, with a warning, if no main layer has weights. Raises ValueError for a layer that the model
    has not, that has no weights, or that reads none of the tokens.
    """
    layers = model.numbered_layers
    with_weights = [
        number
        for number, layer in layers.items()
        if all(getattr(module, "has_attention_weights", True) for module in layer.modules())
    ]
    if requested is None:
        found = [number for number in with_weights if number < len(model.layers)]
        if not found:
            warnings.warn("no layer has attention weights: no attention.png", stacklevel=2)
        return found[-1] if found else None
    if requested not in layers:
        raise ValueError(f"--layer {requested}: the model has layers 0 to {len(layers) - 1}")
    if requested not in with_weights:
        others = ", ".join(map(str, with_weights)) or "none"
        raise ValueError(
            f"--layer {requested}: its attention has no weights to draw; layers that have: {others}"
        )
    if depth_of(model, requested) >= num_tokens:
        needed = depth_of(model, requested) + 1
        raise ValueError(f"--layer {requested}: needs a text of at least {needed} tokens")
    return requested


@dataclass(frozen=True)
class Observation:
    """What a model did with one text of N tokens."""

    bits_n: Tensor  # the surprise of all tokens but the first
    routings: dict[str, Routing]  # by the name of the layer
    attention: AttentionWeights | None  # of one layer
    layer: str  # its name


@torch.no_grad()
def observe(model: Transformer, tokens_N: Tensor, layer: int | None) -> Observation:
    """Run a model on a text of at least two tokens; `layer`: the one whose attention is kept.

    Raises ValueError for logits that are not finite.
    """
    if path := find_non_causal(model):
        warnings.warn(
            f"{path} routes each token by later ones too: the surprise is no prediction",
            stacklevel=2,
        )
    tokens_1N = tokens_N[None].to(model.device)
    watched: AbstractContextManager[Mapping[int, AttentionWeights]] = nullcontext({})
    if layer is not None:
        watched = record_attention(model.numbered_layers[layer])
    with record_routing(model) as routings, watched as attention:
        states = model.hidden_states(tokens_1N)
        model.mtp_hidden_states(states, tokens_1N)
    nats_n, _ = judge_tokens(model, states.normed_BTD[0, :-1], tokens_1N[0, 1:])
    return Observation(
        nats_n.cpu() / math.log(2),
        {name_layer(model, number): routing for number, routing in routings.items()},
        next(iter(attention.values()), None),
        "" if layer is None else name_layer(model, layer),
    )


def name_layer(model: Transformer, layer: int) -> str:
    return f"layer {layer}" + (" (MTP)" if depth_of(model, layer) else "")


def choose_heads(seen: Observation, requested: list[int] | None) -> list[int]:
    """The heads to draw; ValueError for one that the layer has not."""
    if seen.attention is None:
        return []
    num_heads = seen.attention.weights_BHTS.shape[1]
    for head in requested or ():
        if not 0 <= head < num_heads:
            raise ValueError(f"--heads {head}: {seen.layer} has heads 0 to {num_heads - 1}")
    return list(range(num_heads)) if requested is None else requested


def read_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token; a control token has its name.

    Of a character that several tokens spell, the last one has it, and the others have "".
    """
    names = {token: name for name, token in tokenizer.vocabulary.control.items()}
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) or names.get(token, "") for token in ids]
    pieces[-1] += stream.finish()
    return pieces


def make_label(piece: str) -> str:
    """How a token is shown: spaces before a word are kept, and what cannot be seen has a sign."""
    if not piece:
        return NO_TEXT
    word = piece.lstrip(" ") or piece
    inner = word.rstrip(" ")
    shown = "".join(map(show_character, inner)) + "␣" * (len(word) - len(inner))
    cut = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
    return " " * (len(piece) - len(word)) + cut


def show_character(character: str) -> str:
    escaped = character.encode("unicode_escape").decode()
    return {"\n": "↵", "\t": "⇥"}.get(character, character if character.isprintable() else escaped)


def rank_experts(routing: Routing) -> list[list[tuple[int, float]]]:
    """Of each token: its experts and their shares of its weights, the strongest first."""
    weights_NK, E = routing.weights_NK.abs().cpu(), routing.scores_NE.shape[-1]
    shares_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    shares_NK, order_NK = shares_NK.sort(dim=-1, descending=True, stable=True)
    experts_NK = routing.experts_NK.cpu().gather(1, order_NK)
    return [
        [(expert, share) for expert, share in zip(*row, strict=True) if expert < E]
        for row in zip(experts_NK.tolist(), shares_NK.tolist(), strict=True)
    ]


def draw_pictures(
    folder: Path, subject: str, pieces: list[str], seen: Observation, heads: list[int]
) -> list[Path]:
    """Write the pictures into a folder, all or none; a warning tells which there cannot be."""
    from . import draw

    labels, pictures = [make_label(piece) for piece in pieces], {}
    if NO_TEXT in labels:
        subject += f" ({NO_TEXT}: a part of a character)"
    with draw.drawing_style("".join(pieces)):
        if seen.routings:
            experts = {name: rank_experts(routing) for name, routing in seen.routings.items()}
            loads = {name: expert_load(routing).tolist() for name, routing in seen.routings.items()}
            pictures["experts"] = draw.draw_experts(subject, labels, experts)
            pictures["load"] = draw.draw_load(subject, loads)
        else:
            warnings.warn("no sparse layers: no experts.png, no load.png", stacklevel=2)
        if seen.attention is not None:
            weights, sinks = pick_heads(seen.attention, heads)
            shown = labels[: seen.attention.weights_BHTS.shape[2]]
            of_layer = f"{subject}, {seen.layer}"
            pictures["attention"] = draw.draw_attention(of_layer, shown, weights, sinks)
        for name in ("experts", "load", "attention"):
            if name not in pictures and (folder / f"{name}.png").exists():
                problem = f"{name}.png was there before and is not of this model"
                warnings.warn(f"{folder}: {problem}", stacklevel=2)
        ends = [min(piece.count("\n"), 2) for piece in pieces]  # more empty lines than one: one
        pictures["surprise"] = draw.draw_surprise(subject, labels, ends, seen.bits_n.tolist())
        return draw.write_figures(folder, pictures)


def pick_heads(
    attention: AttentionWeights, heads: list[int]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """By head: its weights, (T, T), and the shares of its sink, (T,); no shares without sinks."""
    weights_HTT, sinks = attention.weights_BHTS[0].cpu().numpy(), {}
    if attention.sinks_BHT is not None:
        sinks = {head: attention.sinks_BHT[0, head].cpu().numpy() for head in heads}
    return {head: weights_HTT[head] for head in heads}, sinks
