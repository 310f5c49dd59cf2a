"""generate: continue a text with a model, and print it while it is generated."""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from checkpoints import (
    TextStream,
    Tokenizer,
    build_on_meta,
    check_vocabulary,
    expert_statistics,
    load_model,
    load_tokenizer,
)
from modeling import GenerationStatistics, Transformer, compile_decoding, generate

from .corpus import read_text
from .describe import count_parameters, count_plain_cache_bytes

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "pretrained"
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt",
        help="the text to continue; - reads it from stdin; an empty one begins with the BOS token",
    )
    source.add_argument("--prompt-file", type=Path, help="UTF-8 file, plain or .xz, to continue")
    add = parser.add_argument
    add("--model", type=Path, default=SHIPPED, help="checkpoint directory")
    add(
        "--chat",
        action="store_true",
        help="answer the prompt as a message of a chat; the checkpoint needs a chat template, such "
        "as instruct models have (the shipped model has none)",
    )
    add("--json", action="store_true", help="print one JSON object at the end instead of the text")
    add_generation_arguments(parser)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options about choosing tokens, drafting and loading."""
    add = parser.add_argument
    add("--system", help="system message of a chat, which tells the model how to answer")
    add("--max-new-tokens", "--max-tokens", type=int, default=200, help="largest number of tokens")
    add("--temperature", "--temp", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, help="draw from the k most likely tokens only")
    add("--top-p", type=float, help="draw from the most likely tokens whose sum reaches this")
    add(
        "--min-p",
        type=float,
        help="draw from tokens with at least this share of the highest probability",
    )
    add("--seed", type=int, help="makes the random draws repeatable")
    add(
        "--draft-tokens",
        type=parse_draft_tokens,
        default=0,
        help="tokens that the MTP modules draft per round; auto: the number measured as fastest",
    )
    add(
        "--prefill-chunk",
        type=int,
        default=2048,
        help="the most tokens of a prompt that one forward reads, which bounds its memory",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the decoding of one row first: some seconds, and up to twice the speed of a "
        "model of a billion parameters on a CPU; needs a C++ compiler",
    )
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `load_requested_model` reads."""
    add = parser.add_argument
    add("--device", default="cpu", help="any device torch knows: cpu, cuda, cuda:1, mps ...")
    add("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    add(
        "--quantize",
        choices=("int8", "int4"),
        help="hold matrices as integer codes of so many bits, which a CPU reads faster",
    )
    add("--layers", type=int, help="load only this many first layers, without MTP modules")
    add(
        "--experts",
        choices=("resident", "mapped"),
        default="resident",
        help="mapped: leave each expert in its file until a token needs it, for models larger than "
        "memory",
    )
    add(
        "--expert-memory",
        type=parse_bytes,
        help="bytes for the mapped experts that were used last, as 512MiB or 1.5GiB (default: "
        "4GiB); 0: keep none",
    )


def load_requested_model(args: argparse.Namespace, mtp: bool = True) -> Transformer:
    """Load the model of the arguments, on their device and in their dtype."""
    if args.expert_memory is not None and args.experts != "mapped":
        raise ValueError("--expert-memory is for mapped experts: it needs --experts mapped")
    return load_model(
        args.model,
        device=find_device(args.device),
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        mtp=mtp,
        experts=args.experts,
        quantize=args.quantize,
        layers=args.layers,
        expert_memory=args.expert_memory,
    )


def parse_bytes(text: str) -> int:
    """A size as 4096, 512MiB or 1.5GiB, in bytes."""
    found = re.fullmatch(r"(\d+|\d+\.\d+(?=.))([KMGT]iB|)", text, re.ASCII)
    if found is None:
        told = "is no size: expected bytes, or a number and KiB, MiB, GiB or TiB, as 1.5GiB"
        raise argparse.ArgumentTypeError(f"{text!r} {told}")
    return int(float(found[1]) * UNITS[found[2]])


def parse_draft_tokens(text: str) -> int | str:
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
        check_chat_template(tokenizer, args.model)
        question = {"role": "user", "content": prompt}
        prompt_ids = tokenizer.chat([*make_system_message(args), question])
    else:
        prompt_ids = tokenizer.encode(prompt) or begin_with_bos(tokenizer, args.model)
    model = load_model_for(tokenizer, args)
    options = make_generation_options(tokenizer, args)
    tokens = generate(model, prompt_ids, args.max_new_tokens, **options)
    if args.json:
        ids = list(tokens)
        answer = {"prompt": prompt, "text": text_of(tokenizer, prompt_ids, ids), "ids": ids}
        print(json.dumps(answer | collect_figures(model, tokens.statistics), ensure_ascii=False))
        return 0
    print("" if args.chat else prompt, end="", flush=True)
    print_text(tokenizer, prompt_ids, tokens)
    print(format_figures(collect_figures(model, tokens.statistics)), file=sys.stderr)
    return 0


def check_chat_template(tokenizer: Tokenizer, path: Path) -> None:
    """Raise ValueError, before the weights of the model at `path` are read, if it cannot chat."""
    if not tokenizer.templates.names:
        raise ValueError(
            f"{path}: no chat template, neither a chat_template.jinja nor a chat_template in "
            "tokenizer_config.json: choose a model with a chat template, such as an instruct "
            "model, or continue a text with `generate`, without --chat"
        )
    tokenizer.templates.find()


def begin_with_bos(tokenizer: Tokenizer, path: Path) -> list[int]:
    """The BOS token, for a prompt without tokens; ValueError if the tokenizer has none."""
    if tokenizer.bos_id is None:
        raise ValueError(
            f"{path}: the prompt has no token, and the tokenizer no BOS token to begin with: "
            "give a prompt with some text"
        )
    if not tokenizer.adds_bos:
        warnings.warn(
            "the text begins with a BOS token, which this tokenizer does not put before other "
            "texts: the model may not have been trained with it",
            stacklevel=2,
        )
    return [tokenizer.bos_id]


def make_system_message(args: argparse.Namespace) -> list[dict[str, str]]:
    """The messages that come before the first one of the user: one or none."""
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def load_model_for(tokenizer: Tokenizer, args: argparse.Namespace) -> Transformer:
    """Load the model of the arguments; CheckpointError if it has fewer ids than the tokenizer."""
    model = load_requested_model(args, mtp=args.draft_tokens != 0)
    check_vocabulary(args.model, tokenizer, model.config.vocab_size)
    if args.compile:
        compile_decoding(model)
    return model


def make_generation_options(tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` about choosing tokens, stopping and drafting."""
    return {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": args.seed,
        "stop_ids": tokenizer.stop_ids,
        "draft_tokens": args.draft_tokens,
        "prefill_chunk": args.prefill_chunk,
    }


def print_text(tokenizer: Tokenizer, prompt_ids: list[int], tokens: Iterable[int]) -> None:
    """Print tokens after the prompt while they are generated; an interruption loses none."""
    stream = TextStream(tokenizer, prompt_ids)
    try:
        for token in tokens:
            print(stream.push(token), end="", flush=True)
    finally:
        print(stream.finish(), flush=True)


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    return read_text(Path("-")) if args.prompt == "-" else args.prompt


def find_device(name: str) -> torch.device:
    """The device of this name; ValueError, with the available devices, if it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # .cpu() fails on "meta", whose tensors have no data
    except (RuntimeError, AssertionError, NotImplementedError):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        devices = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise ValueError(f"--device {name}: not available; available: {devices}") from None
    return device


def text_of(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> str:
    """The text of the ids as a continuation of the prompt."""
    stream = TextStream(tokenizer, prompt_ids)
    return "".join([stream.push(token) for token in ids] + [stream.finish()])


def collect_figures(model: Transformer, statistics: GenerationStatistics) -> dict[str, Any]:
    """The sizes, counts and times that --json prints beside the text."""
    parameters = count_parameters(build_on_meta(model.config))  # mapped experts are no parameters
    figures = {
        "total_parameters": parameters["total"],
        "active_parameters": parameters["active"],
        "prompt_tokens": statistics.prompt_tokens,
        "prompt_tokens_per_second": round(statistics.prompt_tokens_per_second, 1),
        "generated_tokens": statistics.generated_tokens,
        "generation_tokens_per_second": round(statistics.generation_tokens_per_second, 1),
        "cache_bytes_per_token": statistics.cache_bytes_per_token,
        "cache_constant_bytes": statistics.cache_constant_bytes,
        "plain_attention_cache_bytes_per_token": count_plain_cache_bytes(
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
    if experts := expert_statistics(model):
        figures["expert_hit_rate"] = round(experts.hit_rate, 4)
        figures["expert_bytes_read"] = experts.bytes_read
        figures["expert_seconds_waited"] = round(experts.seconds_waited, 4)
    return figures


def format_figures(figures: dict[str, Any]) -> str:
    """The summary that follows a text, as several lines."""
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
    if "expert_hit_rate" in figures:
        lines.append(
            f"experts      {100 * figures['expert_hit_rate']:.1f} % in memory when needed, "
            f"{figures['expert_bytes_read']:,} bytes read, "
            f"{figures['expert_seconds_waited']:.2f} s of waiting"
        )
    if any(figures["drafted_tokens"]):
        lines += format_draft_figures(figures)
    return "\n" + "\n".join(lines)


def format_draft_figures(figures: dict[str, Any]) -> list[str]:
    """Drafted and accepted tokens of each position, saved forwards, and seconds."""
    drafted, accepted = figures["drafted_tokens"], figures["accepted_tokens"]
    pairs = [(a, d) for a, d in zip(accepted, drafted, strict=True) if d]
    shares = ", ".join(f"{a} of {d} ({100 * a / d:.0f} %)" for a, d in pairs)
    forwards, saved = figures["forwards"], figures["forwards_saved"]
    return [
        f"drafts       accepted by position: {shares}",
        f"             {figures['mean_accepted_length']:.2f} tokens a round; {forwards} forwards "
        f"instead of {forwards + saved}",
        f"             {figures['drafting_seconds']:.2f} s in drafting, "
        f"{figures['verifying_seconds']:.2f} s in verifying",
    ]
