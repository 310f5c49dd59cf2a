"""probe-mtp: find the wiring that MTP modules were trained with, by the quality of their drafts.

At every position of a text the modules draft as if the text ended there. A draft counts as accepted
if it is the token that the model itself finds most likely at that place. One pass of the model
tries every combination of `MTPConfig.input` and `MTPConfig.carry`, whatever `config.json` says.

Shapes: B rows of a batch (1 here), N tokens of the text, n positions of one piece of it, K draft
positions, V vocabulary.
"""

import argparse
import json
import sys
import warnings
from dataclasses import dataclass, replace
from itertools import accumulate, product
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import load_tokenizer
from modeling import MTPConfig, Transformer, forced_states

from .corpus import read_text
from .generate import add_loading_arguments, load_requested_model

INPUTS, CARRIES = ("normed", "raw"), ("normed", "raw", "main")
MIN_ACCEPTANCE = 0.1  # of first drafts; half of the lowest value reported for a trained head
MIN_STANDARD_ERRORS = 3.0  # a smaller difference between two wirings is not reported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="checkpoint directory with MTP modules")
    add(
        "text",
        type=Path,
        help="UTF-8 text, plain or .xz, or - for stdin, of the kind that the model was trained for",
    )
    add("--draft-tokens", type=int, default=4, help="number of draft positions to measure")
    add("--max-tokens", type=int, default=4096, help="read only this many first tokens of the text")
    add("--piece", type=int, default=512, help="tokens that one forward reads")
    add_loading_arguments(parser)
    add("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    for name in ("draft_tokens", "max_tokens", "piece"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be >= 1")
    text, tokenizer = read_text(args.text), load_tokenizer(args.model)
    tokens_N = torch.tensor(tokenizer.encode(text)[: args.max_tokens], dtype=torch.int64)
    least = args.draft_tokens + 2
    if len(tokens_N) < least:
        raise ValueError(f"{args.text}: {len(tokens_N)} tokens of text, at least {least} needed")
    model = load_requested_model(args)
    if not model.mtp:
        raise ValueError(f"{args.model}: has no MTP modules to probe")
    piece, own = min(args.piece, model.config.max_length), model.config.mtp
    if piece < least:
        raise ValueError(f"pieces of {piece} tokens are too short: at least {least} needed")
    results = probe_wirings(model, tokens_N, args.draft_tokens, piece)

    def rank(result: Result) -> tuple[float, bool, bool]:
        """Between equal results, prefer the configured wiring, then one with the same carry."""
        wiring = result.wiring
        return result.tokens_per_forward, wiring == own, wiring.carry == own.carry

    best = max(results, key=rank)
    warn(results, best, own)
    report = {
        "tokens": len(tokens_N),
        "piece": piece,
        "modules": len(model.mtp),
        "wirings": [summarize_result(result, best, own) for result in results],
    }
    print(json.dumps(report) if args.json else format_table(report))
    return 0


@dataclass(frozen=True)
class Result:
    """Which drafts of one wiring were accepted."""

    wiring: MTPConfig
    hits_KN: Tensor  # whether each draft was accepted; False where the end of a piece left none
    counts_K: Tensor  # number of drafts

    @property
    def acceptance(self) -> list[float]:
        return (self.hits_KN.sum(dim=1) / self.counts_K).tolist()

    @property
    def tokens_per_forward(self) -> float:
        """Expected tokens, if each draft is accepted independently of those before it."""
        return sum(accumulate(self.acceptance, mul, initial=1.0))

    def standard_errors_behind(self, best: "Result") -> float:
        """How many fewer drafts were accepted than with another wiring, in standard errors.

        Compares the two at each position, so that places that are hard for both cancel out.
        """
        difference_N = (best.hits_KN.int() - self.hits_KN.int()).sum(dim=0).double()
        spread = difference_N.square().sum().sqrt().item()
        return difference_N.sum().item() / spread if spread else 0.0


@torch.no_grad()
def probe_wirings(model: Transformer, tokens_N: Tensor, depths: int, piece: int) -> list[Result]:
    """Measure every combination of input and carry on the text, cut into independent pieces."""
    wirings = [
        replace(model.config.mtp, input=state, carry=carry)
        for state, carry in product(INPUTS, CARRIES)
    ]
    hits: list[list[Tensor]] = [[] for _ in wirings]
    counts_K = torch.zeros(depths, dtype=torch.int64)
    pieces = tokens_N.to(model.device).split(piece)
    for tokens_n in tqdm(pieces, unit="piece", file=sys.stderr, disable=None):
        tokens_Bn = tokens_n[None]
        states = model.hidden_states(tokens_Bn)
        own_n = model.logits(states.normed_BTD[0]).argmax(dim=-1)
        for wiring_hits, wiring in zip(hits, wirings, strict=True):
            drafts = choose_drafts(model, forced_states(model, states, tokens_Bn, depths, wiring))
            hits_Kn = torch.zeros(depths, len(tokens_n), dtype=torch.bool)
            for depth, draft_n in enumerate(drafts, start=1):
                hits_Kn[depth - 1, : len(draft_n)] = draft_n == own_n[depth:]
            wiring_hits.append(hits_Kn)
        counts_K += torch.tensor([max(0, len(tokens_n) - k) for k in range(1, depths + 1)])
    return [
        Result(wiring, torch.cat(wiring_hits, dim=1), counts_K)
        for wiring, wiring_hits in zip(wirings, hits, strict=True)
    ]


def choose_drafts(model: Transformer, depths: list[Tensor]) -> list[Tensor]:
    """The draft of each position, (n,), at each depth; depths: of `forced_states`, (1, n, D)."""
    modules = model.mtp_modules
    return [
        model.logits(normed_BnD[0], modules[min(k, len(modules) - 1)]).argmax(dim=-1)
        for k, normed_BnD in enumerate(depths)
    ]


def warn(results: list[Result], best: Result, configured: MTPConfig) -> None:
    """Warn if the drafts show an error in loading or in the configured wiring."""
    highest = max(result.acceptance[0] for result in results)
    if highest < MIN_ACCEPTANCE:
        warnings.warn(
            f"at most {100 * highest:.1f} % of first drafts are accepted: the head is probably not "
            "loaded, or it reads the output of the wrong norm",
            stacklevel=2,
        )
        return
    (own,) = [result for result in results if result.wiring == configured]
    if own.standard_errors_behind(best) > MIN_STANDARD_ERRORS:
        warnings.warn(
            f"another wiring than the configured one gives better drafts: to use it, write "
            f'"mtp_input": "{best.wiring.input}", "mtp_carry": "{best.wiring.carry}" into '
            "config.json",
            stacklevel=2,
        )


def summarize_result(result: Result, best: Result, configured: MTPConfig) -> dict[str, Any]:
    return {
        "input": result.wiring.input,
        "carry": result.wiring.carry,
        "acceptance": [round(share, 4) for share in result.acceptance],
        "tokens_per_forward": round(result.tokens_per_forward, 3),
        "standard_errors_behind_best": round(result.standard_errors_behind(best), 1),
        "configured": result.wiring == configured,
    }


def format_table(report: dict[str, Any]) -> str:
    depths = range(1, len(report["wirings"][0]["acceptance"]) + 1)
    head = "input   carry  " + "".join(f"  draft {k:<2}" for k in depths)
    lines = [
        f"{report['tokens']:,} tokens of text, {report['piece']} at once; a draft is accepted if "
        "the model itself finds it most likely",
        "",
        head + "  tokens/forward  standard errors behind the best",
    ]
    for row in report["wirings"]:
        shares = "".join(f"  {100 * share:6.2f} %" for share in row["acceptance"])
        marks = "  configured" if row["configured"] else ""
        lines.append(
            f"{row['input']:<8}{row['carry']:<7}{shares}  {row['tokens_per_forward']:14.3f}  "
            f"{row['standard_errors_behind_best']:10.1f}{marks}"
        )
    return "\n".join(lines)
