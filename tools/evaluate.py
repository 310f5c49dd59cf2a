"""evaluate: measure a model on texts: bits per byte, next tokens, drafts, use of experts.

windows: The text is read in windows of --window tokens; a window starts --stride tokens after the
one before it. It predicts the tokens that earlier windows have not reached, each from the tokens
before it in the window. So every token but the first of the text is predicted exactly once; away
from the start of the text, it is predicted from at least (window - stride) tokens. Without overlap,
a window starts with the last token of the one before it. The first token of the text has no context
and is not predicted. If the tokenizer puts a BOS token first, that is the first token.

bits per byte: -log2 of the probability of all predicted tokens together, divided by the UTF-8 bytes
of the text that was read, the first token's bytes included.

perplexity: e to the mean of -ln p over the predicted tokens: per token, so it cannot be compared
between vocabularies. No number ("-", null) above e^700.

accuracy: Share of the predicted tokens that the model finds most likely.

agreement: A draft of depth k for token t is the most likely token by MTP depth k, which reads the
states up to position t - k - 1 and the tokens of the text (not earlier drafts) up to t - 1.
Agreement is the share of drafts that equal token t of the text: the accuracy of that depth. Token t
counts where it is predicted, if position t - k - 1 lies in the same window. So without overlap the
first k predicted tokens of a window have no draft of depth k. Depths beyond the last MTP module
come from the last module.

acceptance: Share of the same drafts that equal the token that the model itself finds most likely
at t. Greedy speculative decoding accepts such a draft if those before it were right.

load: How often an expert is chosen, relative to its fair share: 1 if all are chosen equally often.
The routing of a position counts where its prediction counts (in an MTP module: its draft), so no
position counts twice.

entropy: Mean entropy, in bits, of a position's scores over all experts, divided by their sum;
log2(experts) if all scores are equal. Selection bias and groups play no part. A position with a
negative score or with zeros only has none.

margin: Mean difference between the lowest choice score of a chosen expert and the highest of a
refused one. Choice scores are the scores plus the selection bias, if the router has one. Where a
top-k router keeps some groups of experts, experts of other groups are no candidates and do not
count as refused. A position that uses no expert, or all candidates, has no margin. No margin ("-",
null) if that holds everywhere, or if experts choose tokens instead.

Shapes: N tokens of the text or routed, T tokens of a window, t of them at some depth, n positions
that count, D model width, V vocabulary, E experts, e one more, K slots of a token.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from checkpoints import Tokenizer, check_vocabulary, load_tokenizer, read_config
from modeling import Transformer, find_non_causal, forced_states
from moe import Router, Routing, TopK, count_tokens, record_routing

from .corpus import read_text
from .generate import add_loading_arguments, load_requested_model

PIECE = 512  # positions whose logits exist at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="checkpoint directory")
    add(
        "text",
        type=Path,
        nargs="+",
        help="UTF-8 text, plain or .xz, or - for stdin; each is a column",
    )
    add("--window", type=int, help="tokens that one forward reads (default: the model's positions)")
    add(
        "--stride",
        type=int,
        help="tokens from the start of a window to that of the next; a smaller stride gives more "
        "context and takes longer (default: window - 1, no overlap)",
    )
    add("--max-tokens", type=int, help="read only this many first tokens of each text")
    add(
        "--draft-tokens",
        type=int,
        help="number of draft depths to measure; 0: do not run MTP modules (default: one depth "
        "for each module)",
    )
    add_loading_arguments(parser)
    add("--json", action="store_true", help="print one JSON object instead of the tables")
    for definition in (__doc__ or "").split("\n\n")[1:-1]:
        title, text = definition.split(": ", 1)
        parser.add_argument_group(title, " ".join(text.split()))


def run(args: argparse.Namespace) -> int:
    config, tokenizer = read_config(args.model), load_tokenizer(args.model)
    check_vocabulary(args.model, tokenizer, config.vocab_size)
    window, stride = choose_windows(args, config.max_length)
    texts = [read_tokens(tokenizer, path, args.max_tokens) for path in args.text]
    model = load_requested_model(args)
    depths = choose_depths(model, args.draft_tokens, window)
    columns = []
    for path, (tokens_N, num_bytes) in zip(args.text, texts, strict=True):
        measures = measure_text(model, tokens_N, window, stride, depths)
        columns.append({"text": str(path)} | summarize(measures, model, num_bytes))
    report = {
        "model": str(args.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "window": window,
        "stride": stride,
        "texts": columns,
    }
    print(json.dumps(report, ensure_ascii=False) if args.json else format_tables(report))
    return 0


def choose_windows(args: argparse.Namespace, max_length: int) -> tuple[int, int]:
    """(window, stride) of the arguments; ValueError for what the model or windows cannot have."""
    window = max_length if args.window is None else args.window
    if not 2 <= window <= max_length:
        raise ValueError(f"--window {window}: must be from 2 to the model's {max_length} positions")
    stride = window - 1 if args.stride is None else args.stride
    if not 1 <= stride < window:
        raise ValueError(
            f"--stride {stride}: must be from 1 to {window - 1}, which a window of {window} tokens "
            "predicts"
        )
    return window, stride


def read_tokens(tokenizer: Tokenizer, path: Path, max_tokens: int | None) -> tuple[Tensor, int]:
    """The first tokens of a text, (N,), and how many UTF-8 bytes they spell.

    A character of several tokens is read whole or not at all. Raises ValueError if fewer than two
    tokens, or no bytes, are left.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"--max-tokens {max_tokens}: must be >= 2")
    text = read_text(path)
    ids = tokenizer.encode(text)
    if max_tokens is not None and max_tokens < len(ids):
        whole, ids = text, ids[:max_tokens]
        text = tokenizer.decode(ids)
        while text.endswith("\N{REPLACEMENT CHARACTER}") and not whole.startswith(text):
            ids = ids[:-1]
            text = tokenizer.decode(ids)
    if len(ids) < 2 or not text:
        raise ValueError(f"{path}: {len(ids)} tokens of text, at least 2 needed")
    return torch.tensor(ids), len(text.encode())


def choose_depths(model: Transformer, requested: int | None, window: int) -> int:
    """The number of draft depths; ValueError if the model cannot draft as requested."""
    if requested is not None and not 0 <= requested <= window - 2:
        rule = f"must be from 0 to {window - 2}, the deepest in a window of {window} tokens"
        raise ValueError(f"--draft-tokens {requested}: {rule}")
    if requested and not model.mtp:
        raise ValueError(f"--draft-tokens {requested}: no MTP modules are loaded")
    if path := find_non_causal(model):
        problem = f"{path} routes each token by later ones too"
        if requested:
            raise ValueError(f"--draft-tokens {requested}: {problem}: such a model cannot draft")
        effect = "tokens help to predict themselves, and no drafts are shown"
        warnings.warn(f"{problem}: {effect}", stacklevel=2)
    return len(model.mtp) if requested is None else requested


class Window(NamedTuple):
    """Tokens `start` to `end` - 1 of a text, of which those from `first` on are predicted."""

    start: int
    first: int
    end: int


def cut_windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows of a text, with 1 <= stride < window; they predict each token but the first."""
    first = 1
    for start in range(0, num_tokens, stride):
        if first >= num_tokens:
            return
        end = min(start + window, num_tokens)
        yield Window(start, first, end)
        first = end


@dataclass
class Mean:
    """The mean of all values so far."""

    total: float = 0.0
    count: int = 0

    def add(self, values_n: Tensor) -> None:
        self.total += values_n.cpu().double().sum().item()
        self.count += len(values_n)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class ExpertUse:
    """What one router did with the positions so far."""

    counts_E: Tensor
    entropy: Mean = field(default_factory=Mean)
    margin: Mean = field(default_factory=Mean)

    @classmethod
    def empty(cls, routing: Routing) -> "ExpertUse":
        return cls(torch.zeros(routing.scores_NE.shape[-1], dtype=torch.int64))

    def add(self, routing: Routing, router: Router) -> None:
        self.counts_E += count_tokens(routing)[0].cpu()
        for mean, values_N in (
            (self.entropy, score_entropies(routing)),
            (self.margin, choice_margins(routing, router)),
        ):
            mean.add(values_N[values_N.isfinite()])

    @property
    def load_E(self) -> Tensor:
        """Zeros where no position counts."""
        return self.counts_E.double() * len(self.counts_E) / self.counts_E.sum().clamp(min=1)


def score_entropies(routing: Routing) -> Tensor:
    """Of each token, in bits: (N,); not finite where there is none."""
    shares_NE = routing.scores_NE / routing.scores_NE.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares_NE).sum(dim=-1) / math.log(2)


def choice_margins(routing: Routing, router: Router) -> Tensor:
    """How far each token's choice is from another one: (N,); not finite where there is none."""
    choice_NE, (N, E) = routing.scores_NE, routing.scores_NE.shape
    if getattr(router, "sees_other_tokens", False):  # its tokens do not choose
        return choice_NE.new_full((N,), math.inf)
    if router.selection_bias is not None:
        choice_NE = choice_NE + router.selection_bias
    if isinstance(config := getattr(router, "config", None), TopK):
        choice_NE = config.limit_to_groups(choice_NE)
    chosen_Ne = choice_NE.new_zeros(N, E + 1, dtype=torch.bool)  # the last: empty slots
    chosen_NE = chosen_Ne.scatter(1, routing.experts_NK, True)[:, :E]
    last_N = choice_NE.where(chosen_NE, math.inf).amin(dim=-1)
    refused_N = choice_NE.where(~chosen_NE, -math.inf).amax(dim=-1)
    return last_N - refused_N


@dataclass
class Measures:
    """All sums over a text."""

    nats: Mean = field(default_factory=Mean)
    accuracy: Mean = field(default_factory=Mean)
    agreement: dict[int, Mean] = field(default_factory=dict)  # by depth, which counts from 1
    acceptance: dict[int, Mean] = field(default_factory=dict)
    experts: dict[int, ExpertUse] = field(default_factory=dict)  # by layer

    def bits_per_byte(self, num_bytes: int) -> float:
        return self.nats.total / math.log(2) / num_bytes


@torch.no_grad()
def measure_text(
    model: Transformer, tokens_N: Tensor, window: int, stride: int, depths: int
) -> Measures:
    """Measure the model on a text of at least two tokens, with so many draft depths.

    1 <= stride < window. Without drafts the MTP modules do not run, and their routers have no
    figures. Raises ValueError for logits that are not finite.
    """
    measures, total = Measures(), len(tokens_N) - 1
    with tqdm(total=total, unit="token", file=sys.stderr, disable=None) as progress:
        for start, first, end in cut_windows(len(tokens_N), window, stride):
            tokens_1T = tokens_N[None, start:end].to(model.device)
            with record_routing(model) as routings:
                states = model.hidden_states(tokens_1T)
                drafted = forced_states(model, states, tokens_1T, depths, model.config.mtp)
            read = [normed_1tD[0] for normed_1tD in (states.normed_BTD, *drafted)]
            add_predictions(measures, model, read, tokens_1T[0], first - start)
            for layer, routing in routings.items():
                counted = find_positions(first - start, end - start, depth_of(model, layer))
                part = Routing(*(tensor[counted] for tensor in vars(routing).values()))
                use = measures.experts.setdefault(layer, ExpertUse.empty(part))
                use.add(part, routings.routers[layer])
            progress.update(end - first)
    return measures


def depth_of(model: Transformer, layer: int) -> int:
    """How many tokens further than the model a layer predicts: 0, or the depth of its module."""
    return max(0, layer - len(model.layers) + 1)


def find_positions(first: int, length: int, depth: int) -> slice:
    """The positions of a window whose targets, `first` to `length` - 1, are depth + 1 ahead."""
    return slice(max(0, first - depth - 1), max(0, length - depth - 1))


def add_predictions(
    measures: Measures, model: Transformer, states: list[Tensor], tokens_T: Tensor, first: int
) -> None:
    """Judge what a window predicts of its tokens from `first` on.

    states: what the head reads, (T - k, D), of the model (k = 0) and then of each draft depth k.
    """
    own_n, modules = tokens_T[:0], model.mtp_modules
    for depth, states_tD in enumerate(states):
        module = modules[min(depth, len(modules)) - 1] if depth else None
        counted = find_positions(first, len(tokens_T), depth)
        target_n = tokens_T[max(first, depth + 1) :]
        losses_n, best_n = judge_tokens(model, states_tD[counted], target_n, module)
        if depth == 0:
            own_n = best_n
            measures.nats.add(losses_n)
            measures.accuracy.add(best_n == target_n)
        else:
            measures.agreement.setdefault(depth, Mean()).add(best_n == target_n)
            accepted_n = best_n == own_n[len(own_n) - len(best_n) :]
            measures.acceptance.setdefault(depth, Mean()).add(accepted_n)


def judge_tokens(
    model: Transformer, states_nD: Tensor, target_n: Tensor, module: Any = None
) -> tuple[Tensor, Tensor]:
    """(-ln p of each target, the most likely token at each position), (n,) both.

    Logits are those of the model or of an MTP module; ValueError if they are not finite.
    """
    losses, best = [], []
    for piece_nD, piece_n in zip(states_nD.split(PIECE), target_n.split(PIECE), strict=True):
        logits_nV = model.logits(piece_nD, module)
        losses.append(F.cross_entropy(logits_nV, piece_n, reduction="none"))
        best.append(logits_nV.argmax(dim=-1))
    losses_n = torch.cat(losses)
    if not losses_n.isfinite().all():
        whose = "the model" if module is None else "an MTP module"
        raise ValueError(
            f"the logits of {whose} are not finite: `verify --values` finds wrong weights; float16 "
            "may overflow"
        )
    return losses_n, torch.cat(best)


def summarize(measures: Measures, model: Transformer, num_bytes: int) -> dict[str, Any]:
    """The figures of a text, not rounded."""
    mean_nats = measures.nats.total / measures.nats.count
    depths = [] if find_non_causal(model) else list(measures.agreement)
    return {
        "tokens": measures.nats.count + 1,
        "predicted_tokens": measures.nats.count,
        "bytes": num_bytes,
        "bits_per_byte": measures.bits_per_byte(num_bytes),
        "perplexity": math.exp(mean_nats) if mean_nats < 700 else None,
        "accuracy": measures.accuracy.value,
        "drafts": [
            {
                "depth": depth,
                "drafted": measures.agreement[depth].count,
                "agreement": measures.agreement[depth].value,
                "acceptance": measures.acceptance[depth].value,
            }
            for depth in depths
        ],
        "routers": [
            {"layer": layer, "mtp_depth": depth_of(model, layer)} | summarize_experts(use)
            for layer, use in measures.experts.items()
        ],
    }


def summarize_experts(use: ExpertUse) -> dict[str, Any]:
    return {
        "least_load": use.load_E.min().item() if use.counts_E.any() else None,
        "greatest_load": use.load_E.max().item() if use.counts_E.any() else None,
        "entropy_bits": use.entropy.value,
        "margin": use.margin.value,
        "load": use.load_E.tolist(),
    }


def format_tables(report: dict[str, Any]) -> str:
    """One column for each text: its figures, then those of each router."""
    texts = report["texts"]
    width = max(36, *(len(column["text"]) for column in texts))

    def line(label: str, cells: list[str]) -> str:
        return "  ".join([f"{label:<21}", *(f"{cell:>{width}}" for cell in cells)]).rstrip()

    head = f"windows of {report['window']:,} tokens, stride {report['stride']:,}, {report['dtype']}"
    names = [column["text"] for column in texts]
    rows = zip(*(list_figures(column) for column in texts), strict=True)
    lines = [head, "", line("", names)]
    lines += [line(row[0][0], [cell for _, cell in row]) for row in rows]
    if texts[0]["routers"]:
        columns = f"{'least load':>10}{'greatest':>9}{'entropy':>8}{'margin':>9}"
        lines += ["", line("", [columns] * len(texts))]
    for routers in zip(*(column["routers"] for column in texts), strict=True):
        mark = " (MTP)" if routers[0]["mtp_depth"] else ""
        lines.append(line(f"layer {routers[0]['layer']}{mark}", list(map(format_router, routers))))
    return "\n".join(lines)


def list_figures(column: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, figure) of each row of the first table."""
    rows = [
        ("tokens", f"{column['tokens']:,}"),
        ("bytes", f"{column['bytes']:,}"),
        ("bits per byte", f"{column['bits_per_byte']:.4f}"),
        ("perplexity", format_figure(column["perplexity"], ",.6g")),
        ("accuracy", format_figure(column["accuracy"], ".2%")),
    ]
    for draft in column["drafts"]:
        for name in ("agreement", "acceptance"):
            rows.append((f"{name}, depth {draft['depth']}", format_figure(draft[name], ".2%")))
    return rows


def format_router(router: dict[str, Any]) -> str:
    least, greatest = (
        format_figure(router[f"{name}_load"], ".3f") for name in ("least", "greatest")
    )
    entropy = format_figure(router["entropy_bits"], ".3f")
    return f"{least:>10}{greatest:>9}{entropy:>8}{format_figure(router['margin'], '.4f'):>9}"


def format_figure(figure: float | None, form: str) -> str:
    return "-" if figure is None else format(figure, form)
