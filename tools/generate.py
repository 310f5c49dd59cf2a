"""generate: continue a text with a model, streaming it as it comes."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from checkpoints import TextStream, Tokenizer, load_model, load_tokenizer
from modeling import GenerationStatistics, Transformer, generate

from .describe import count_parameters, plain_cache_bytes

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "pretrained"
DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue; - reads it from stdin")
    source.add_argument("--prompt-file", type=Path, help="a UTF-8 file with the text to continue")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message, and the text an answer to it"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the text as it comes"
    )
    add_generation_arguments(parser)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how its tokens are chosen."""
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=SHIPPED,
        help="checkpoint directory (default: the shipped one)",
    )
    add("--system", help="the message before the first, which says how to answer (in a chat)")
    add("--max-new-tokens", "--max-tokens", type=int, default=200)
    add("--temperature", "--temp", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-k", type=int, help="draw from the k likeliest tokens only")
    add("--top-p", type=float, help="draw from the likeliest that together reach this probability")
    add(
        "--min-p", type=float, help="draw from those at least this share as likely as the likeliest"
    )
    add("--seed", type=int, help="makes the draws repeatable")
    add(
        "--draft-tokens",
        type=draft_tokens,
        default=0,
        help="tokens the MTP modules guess per round; auto: the number that proves fastest",
    )
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded: what `load_asked` reads."""
    add = parser.add_argument
    add("--device", default="cpu", help="any device torch knows: cpu, cuda, cuda:1, mps ...")
    add("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    add("--layers", type=int, help="load the first so many layers only, without MTP modules")


def load_asked(args: argparse.Namespace, mtp: bool = True) -> Transformer:
    """The model that the arguments name, on the device and in the dtype that they name."""
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    return load_model(args.model, usable_device(args.device), dtype, mtp, args.layers)


def draft_tokens(text: str) -> int | str:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def run(args: argparse.Namespace) -> int:
    if args.system is not None and not args.chat:
        raise ValueError("--system is a message of a chat: it needs --chat")
    prompt = read_prompt(args)
    tokenizer = load_tokenizer(args.model)
    if args.chat:
        prompt_ids = tokenizer.chat([*system_message(args), {"role": "user", "content": prompt}])
    else:
        prompt_ids = tokenizer.encode(prompt)
    model = load_for(tokenizer, args)
    tokens = generate(model, prompt_ids, args.max_new_tokens, **choices(tokenizer, args))
    if args.json:
        ids = list(tokens)
        answer = {"prompt": prompt, "text": text_of(tokenizer, prompt_ids, ids), "ids": ids}
        print(json.dumps(answer | figures(model, tokens.statistics), ensure_ascii=False))
        return 0
    print("" if args.chat else prompt, end="", flush=True)
    print_text(tokenizer, prompt_ids, tokens)
    print(summary(figures(model, tokens.statistics)), file=sys.stderr)
    return 0


def system_message(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def load_for(tokenizer: Tokenizer, args: argparse.Namespace) -> Transformer:
    """The model that the arguments ask for, if the tokenizer can be its own."""
    model = load_asked(args, mtp=args.draft_tokens != 0)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{args.model}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return model


def choices(tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, Any]:
    """How `generate` chooses tokens and when it stops."""
    return {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": args.seed,
        "stop_ids": tokenizer.stop_ids,
        "draft_tokens": args.draft_tokens,
    }


def print_text(tokenizer: Tokenizer, prompt_ids: list[int], tokens: Iterable[int]) -> None:
    """Print what continues the prompt, as it comes; what came before an interruption, too."""
    stream = TextStream(tokenizer, prompt_ids)
    try:
        for token in tokens:
            print(stream.push(token), end="", flush=True)
    finally:
        print(stream.finish(), flush=True)


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is not None:
        raw = args.prompt_file.read_bytes()
    elif args.prompt == "-":
        raw = sys.stdin.buffer.read()
    else:
        return args.prompt
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text ({error.reason})") from None


def usable_device(name: str) -> torch.device:
    """A device that tensors can be made on, or an error that lists those that there are."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" makes tensors too, with nothing in them
    except (RuntimeError, AssertionError, NotImplementedError):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        there = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise ValueError(f"--device {name}: not available here; there is {there}") from None
    return device


def text_of(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> str:
    stream = TextStream(tokenizer, prompt_ids)
    return "".join([stream.push(token) for token in ids] + [stream.finish()])


def figures(model: Transformer, statistics: GenerationStatistics) -> dict[str, Any]:
    """What the run did and cost."""
    counted = count_parameters(model)
    return {
        "total_parameters": counted["total"],
        "active_parameters": counted["active"],
        "prompt_tokens": statistics.prompt_tokens,
        "prompt_tokens_per_second": round(statistics.prompt_tokens_per_second, 1),
        "generated_tokens": statistics.generated_tokens,
        "generation_tokens_per_second": round(statistics.generation_tokens_per_second, 1),
        "cache_bytes_per_token": statistics.cache_bytes_per_token,
        "cache_constant_bytes": statistics.cache_constant_bytes,
        "plain_attention_cache_bytes_per_token": plain_cache_bytes(
            model.config, model.dtype.itemsize
        ),
        "forwards": statistics.forwards,
        "forwards_saved": statistics.forwards_saved,
        "drafted_tokens": statistics.drafted,
        "accepted_tokens": statistics.accepted,
        "mean_accepted_length": round(statistics.mean_accepted_length, 3),
        "drafting_seconds": round(statistics.drafting_seconds, 4),
        "verifying_seconds": round(statistics.verifying_seconds, 4),
    }


def summary(figures: dict[str, Any]) -> str:
    constant = figures["cache_constant_bytes"]
    plain = figures["plain_attention_cache_bytes_per_token"]
    lines = [
        f"parameters   {figures['total_parameters']:,} in all, "
        f"{figures['active_parameters']:,} used per token",
        f"prompt       {figures['prompt_tokens']} tokens, "
        f"{figures['prompt_tokens_per_second']} a second",
        f"generation   {figures['generated_tokens']} tokens, "
        f"{figures['generation_tokens_per_second']} a second",
        f"cache        {figures['cache_bytes_per_token']:,} bytes per token"
        + (f" and {constant:,} constant" if constant else "")
        + (f"; plain multi-head attention: {plain:,}" if plain is not None else ""),
    ]
    if any(figures["drafted_tokens"]):
        lines += draft_lines(figures)
    return "\n" + "\n".join(lines)


def draft_lines(figures: dict[str, Any]) -> list[str]:
    """What the MTP modules guessed, position by position, what was kept, and what it saved."""
    drafted, accepted = figures["drafted_tokens"], figures["accepted_tokens"]
    pairs = [(kept, made) for kept, made in zip(accepted, drafted, strict=True) if made]
    shares = ", ".join(f"{kept} of {made} ({100 * kept / made:.0f} %)" for kept, made in pairs)
    forwards, saved = figures["forwards"], figures["forwards_saved"]
    return [
        f"drafts       accepted by position: {shares}",
        f"             {figures['mean_accepted_length']:.2f} tokens a round; {forwards} forwards "
        f"instead of {forwards + saved}",
        f"             {figures['drafting_seconds']:.2f} s in drafting, "
        f"{figures['verifying_seconds']:.2f} s in verifying",
    ]
