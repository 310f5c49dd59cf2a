"""How much faster a model generates with drafts, on this machine and this kind of text.

Each passage of a text is continued greedily with every number of drafts in turn, so that other load
on the machine slows all of them alike. The speedup is the ratio to plain decoding of the same
passage. The report shows its median over the passages, which a single slow run does not change.
"""

import argparse
import sys
from statistics import median, quantiles
from typing import Any

import torch
from tqdm import tqdm

from checkpoints import load_tokenizer
from modeling import DraftCount, GenerationStatistics, Transformer, generate

from .corpus import cut_passages, read_text
from .generate import load_requested_model, parse_draft_tokens


def add_drafting_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this section."""
    add = parser.add_argument
    add(
        "--draft-tokens",
        type=parse_draft_tokens,
        nargs="+",
        default=[1, 2, 3, 4, "auto"],
        help="numbers of drafts per round to compare with plain decoding; auto: chosen while "
        "generating",
    )
    add("--passages", type=int, default=16, help="number of passages, evenly spaced in --text")
    add("--prompt-tokens", type=int, default=64, help="length of each passage")
    add("--new-tokens", type=int, default=128, help="tokens to generate after each passage")


def measure_drafting(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model with its MTP modules, and measure every number of drafts on --text."""
    tokens_N = torch.tensor(load_tokenizer(args.model).encode(read_text(args.text)))
    prompts = cut_passages(tokens_N, args.passages, args.prompt_tokens)
    model = load_requested_model(args)
    counts: list[DraftCount] = list(dict.fromkeys([0, *args.draft_tokens]))
    runs = run_passages(model, prompts, args.new_tokens, counts)
    return {
        "passages": len(prompts),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "runs": [summarize_runs(count, runs[count], runs[0]) for count in counts],
    }


Runs = dict[DraftCount, list[GenerationStatistics]]


def run_passages(
    model: Transformer, prompts: list[list[int]], new_tokens: int, counts: list[DraftCount]
) -> Runs:
    """The statistics of every passage with every number of drafts, which take turns."""
    runs: Runs = {count: [] for count in counts}
    list(generate(model, prompts[0], min(8, new_tokens)))  # warm-up, not measured
    for number, prompt in enumerate(tqdm(prompts, unit="passage", file=sys.stderr, disable=None)):
        shift = number % len(counts)
        for count in counts[shift:] + counts[:shift]:
            generation = generate(model, prompt, new_tokens, draft_tokens=count)
            for _ in generation:
                pass
            runs[count].append(generation.statistics)
    return runs


def summarize_runs(
    count: DraftCount, runs: list[GenerationStatistics], plain: list[GenerationStatistics]
) -> dict[str, Any]:
    """The figures of one number of drafts; runs and plain: of each passage, with it and with 0."""
    ratios = [
        run.generation_tokens_per_second / plain_run.generation_tokens_per_second
        for run, plain_run in zip(runs, plain, strict=True)
    ]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    drafted, accepted = (
        [sum(position) for position in zip(*(getattr(run, name) for run in runs), strict=True)]
        for name in ("drafted", "accepted")
    )
    seconds = sum(run.generation_seconds for run in runs)
    return {
        "draft_tokens": count,
        "tokens_per_second": round(median(run.generation_tokens_per_second for run in runs), 1),
        "speed_ratio": round(middle, 3),
        "speed_ratio_quartiles": [round(low, 3), round(high, 3)],
        "tokens_per_forward": round(
            sum(run.generated_tokens - 1 for run in runs) / sum(run.forwards - 1 for run in runs), 3
        ),
        "acceptance": [round(a / d, 4) for a, d in zip(accepted, drafted, strict=True) if d],
        "drafting_share": round(sum(run.drafting_seconds for run in runs) / seconds, 3),
    }


def format_drafting(report: dict[str, Any]) -> str:
    lines = [
        f"{report['passages']} passages of {report['prompt_tokens']} tokens, each continued by "
        f"{report['new_tokens']}, greedily",
        "",
        "drafts  tokens/s   speedup  (quartiles)     tokens/forward  in drafting  acceptance",
    ]
    for row in report["runs"]:
        low, high = row["speed_ratio_quartiles"]
        shares = ", ".join(f"{100 * share:.0f} %" for share in row["acceptance"])
        cells = [
            f"{row['draft_tokens']!s:<6}",
            f"{row['tokens_per_second']:>8.1f}",
            f"{row['speed_ratio']:>8.2f}",
            f"({low:.2f} to {high:.2f})",
            f"{row['tokens_per_forward']:>14.2f}",
            f"{100 * row['drafting_share']:>9.0f} %",
            shares,
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
