"""bench: how fast a model loads, reads and writes, and how far that is from what is possible.

Random tokens are prefilled in one go, and decoded one by one after contexts of several lengths.
Beside each step the machine reads a large buffer and multiplies large matrices, as fast as torch
can. This gives the floor of a step: the bytes that it must read (of the weights only those that its
tokens use, and the cache), or the products that it must compute, whichever takes longer. With
--against, the same weights in transformers take turns, step by step, in the same process.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints import build_on_meta, read_config
from modeling import Transformer

from .bench_table import format_end, format_report
from .describe import count_parameters
from .drafting_speed import add_drafting_arguments, measure_drafting
from .floor import count_bytes
from .generate import add_loading_arguments, find_device, load_requested_model
from .mechanisms import profile_decoding, profile_prefill
from .peer import Peer, import_transformers
from .speed import Bench, measure_loading
from .timing import LEAST_ROUNDS, peak_memory
from .training_speed import add_training_arguments, check_training, measure_training

SECTIONS = "load", "prefill", "decode", "drafts", "training"
LISTS = "profile", "prefill", "decode"  # parts of the report that come in several pieces
PREFILLS = [512, 2048]
CONTEXTS = [128, 2048, 8192, 32768]
BATCHES = [1, 8]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="checkpoint directory")
    add(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        help="what to measure (default: load prefill decode, drafts with --text, training "
        "with --training)",
    )
    add("--prefills", type=int, nargs="+", help=f"numbers of tokens ({say_default(PREFILLS)})")
    add("--contexts", type=int, nargs="+", help=f"tokens in the cache ({say_default(CONTEXTS)})")
    add("--batches", type=int, nargs="+", default=BATCHES, help="rows that decode at once")
    add("--steps", type=int, default=10, help="steps of each figure; long ones take fewer")
    add("--against", choices=["transformers"], help="take turns with the same weights in it")
    add("--compile", action="store_true", help="measure the decoding of one row compiled, too")
    add("--text", type=Path, help="UTF-8 text, plain or .xz, or - for stdin, to draft on")
    add_drafting_arguments(parser)
    add("--training", action="store_true", help="measure a training step, too: four float32 copies")
    add_training_arguments(parser)
    add(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="show where the time of the first prefill "
        "and of decoding after the first context goes, and write their Chrome traces to FOLDER",
    )
    add_loading_arguments(parser)
    add("--json", action="store_true", help="print one JSON object instead of the tables")


def say_default(sizes: list[int]) -> str:
    return f"default: {' '.join(map(str, sizes))}, those that the model has positions for"


def run(args: argparse.Namespace) -> int:
    check_sizes(args)
    skipped: list[str] = []
    sections = choose_sections(args, skipped)
    if args.against is not None:
        check_comparison(args)
    if "training" in sections:
        check_training(args)
    report: dict[str, Any] = {}
    for part in measure_sections(args, sections, skipped):
        for name, figures in part.items():
            report[name] = report.get(name, []) + figures if name in LISTS else figures
        if not args.json:
            print(format_report(part), end="\n\n", flush=True)
    report["skipped"] = skipped
    print(json.dumps(report) if args.json else format_end(report))
    return 0


def measure_sections(
    args: argparse.Namespace, sections: set[str], skipped: list[str]
) -> Iterator[dict[str, Any]]:
    """The parts of the report, each as soon as it is measured."""
    if {"load", "prefill", "decode"} & sections or args.profile is not None:
        yield from measure_model(args, sections, skipped)
    if "drafts" in sections:
        yield {"drafts": measure_drafting(args)}
    if "training" in sections:
        yield {"training": measure_training(args)}


def choose_sections(args: argparse.Namespace, skipped: list[str]) -> set[str]:
    """The sections to measure: those asked for, or all that can be; others are told in `skipped`.

    Raises ValueError if drafts are asked for and there is no text or no MTP module.
    """
    lacking = None
    if args.text is None:
        lacking = "needs a text to draft on: give --text FILE"
    elif not read_config(args.model).mtp.blocks or args.layers is not None:
        lacking = "needs MTP modules, and none are loaded of this model"
    if args.sections is not None:
        if "drafts" in args.sections and lacking is not None:
            raise ValueError(f"--sections drafts: {lacking}")
        return set(args.sections)
    sections = {"load", "prefill", "decode", *(["training"] if args.training else [])}
    if lacking is None:
        return sections | {"drafts"}
    skipped.append(f"drafts: {lacking}")
    return sections


def check_sizes(args: argparse.Namespace) -> None:
    """Raise ValueError for sizes that are too small."""
    least = {"steps": LEAST_ROUNDS, "passages": 2, "new_tokens": 2, "training_length": 4}
    others = "prefills", "contexts", "batches", "prompt_tokens", "training_batch"
    for name in (*least, *others):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if value is not None and min(values) < least.get(name, 1):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {min(values)}: must be >= {least.get(name, 1)}")


def check_comparison(args: argparse.Namespace) -> None:
    """Raise ValueError if the same weights cannot be measured in transformers."""
    import_transformers()
    if args.layers is not None:
        raise ValueError("--layers: transformers would load every layer: leave out --against")


def choose_sizes(
    name: str, asked: list[int] | None, default: list[int], longest: int, skipped: list[str]
) -> list[int]:
    """The sizes asked for, or those of the default that fit; the others are told in `skipped`.

    Raises ValueError for a size asked for that the model has too few positions for.
    """
    if asked is not None and max(asked) > longest:
        raise ValueError(f"--{name} {max(asked)}: the model has positions for {longest} at most")
    for size in default if asked is None else []:
        if size > longest:
            skipped.append(f"--{name} {size}: the model has positions for {longest} at most")
    return [size for size in asked or default if size <= longest]


def measure_model(
    args: argparse.Namespace, sections: set[str], skipped: list[str]
) -> Iterator[dict[str, Any]]:
    """Load the model without its MTP modules; the figures of loading and speed, part by part."""
    longest = read_config(args.model).max_length
    prefills = choose_sizes("prefills", args.prefills, PREFILLS, longest, skipped)
    contexts = choose_sizes("contexts", args.contexts, CONTEXTS, longest - 1, skipped)
    load, device = partial(load_requested_model, args, mtp=False), find_device(args.device)
    load_peer = partial(Peer, args.model, device) if args.against else None
    if "load" in sections:
        model, peer, loading = measure_loading(load, load_peer, device)
    else:
        model, loading = load(), None
        peer = None if load_peer is None else load_peer(model.dtype)
    yield {"model": str(args.model)} | describe_model(model)
    if loading is not None:
        yield {"load": loading}
    if args.profile is not None:
        for length in prefills[:1]:
            yield {"profile": [profile_prefill(model, length, args.profile)]}
        for length in contexts[:1]:
            yield {"profile": [profile_decoding(model, length, args.profile)]}
    bench = Bench(model, peer, args.steps, args.compile)
    if "prefill" in sections:
        yield {"prefill": [bench.measure_prefill(length) for length in prefills]}
    for length in contexts if "decode" in sections else []:
        yield {"decode": bench.measure_decoding(length, args.batches)}
    yield {"peak": peak_memory(device)}


def describe_model(model: Transformer) -> dict[str, Any]:
    """What is measured, and where."""
    counted = count_parameters(build_on_meta(model.config))
    return {
        "parameters": counted["total"],
        "active_parameters": counted["active"],
        "weight_bytes": count_bytes(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }
