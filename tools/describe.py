"""describe: a checkpoint's layers, parameters, formats and sizes; reads no weights."""

import argparse
import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from checkpoints import (
    CheckpointError,
    build_on_meta,
    load_tokenizer,
    read_config,
    read_headers,
    unread_keys,
)
from modeling import GQAConfig, LayerConfig, MLAConfig, ModelConfig, MTPConfig, Transformer
from moe import DenseConfig, ExpertChoice, MoEConfig, RouterConfig, TopK, TopP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="checkpoint directory, or a config.json")
    parser.add_argument("--tensors", action="store_true", help="list every stored tensor")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the lines"
    )


def run(args: argparse.Namespace) -> int:
    facts = describe_checkpoint(args.path)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    layers, tensors = facts.pop("layers"), facts.pop("tensors")
    for name, value in (facts | layers).items():
        print(f"{name:36} {value:,}" if isinstance(value, int) else f"{name:36} {value}")
    if args.tensors:
        for name, (dtype, *shape) in tensors.items():
            print(f"{name:68} {dtype:5} {shape}")
    return 0


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Everything that `describe` shows, as data for JSON."""
    config = read_config(path)
    model = build_on_meta(config).to(torch.bfloat16)
    counted = count_parameters(model)
    stored, weights = read_headers(path) if path.is_dir() else ({}, {})
    kinds = Counter(weight.stored_as for weight in weights.values())
    cache = model.make_cache(1, config.max_length)
    return {
        "family": config.published["model_type"],
        "vocabulary": config.vocab_size,
        "width": config.d_model,
        "positions": config.max_length,
        "parameters": counted["total"],
        "of them used per token": counted["active"],
        "used, without the input embedding": counted["active_without_embedding"],
        "parameters of the MTP modules": counted["mtp"],
        "wiring of the MTP modules": describe_wiring(config.mtp),
        "bytes in memory (bfloat16)": 2 * (counted["total"] + counted["mtp"]),
        "cache bytes per token (bfloat16)": cache.bytes_per_token,
        "cache bytes that stay constant": cache.constant_bytes,
        "with plain multi-head attention": count_plain_cache_bytes(config, torch.bfloat16.itemsize),
        "stored tensors": len(stored),
        "bytes on disk": sum(tensor.nbytes for tensor in stored.values()),
        "weights stored as": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "tokenizer": describe_tokenizer(path),
        "config keys not used": ", ".join(unread_keys(path)),
        "layers": describe_layers(config),
        "tensors": {name: [tensor.dtype, *tensor.shape] for name, tensor in stored.items()},
    }


def count_parameters(model: Transformer) -> dict[str, int]:
    """Numbers of parameters: in total, used by one token (active), and of the MTP modules.

    The total and the active parameters leave the MTP modules out.
    """
    counts = Counter[str]()
    for name, parameter in model.named_parameters():
        counts["mtp" if name.startswith("mtp.") else "total"] += parameter.numel()
    layers = (layer.feed_forward for layer in model.layers)
    idle = sum(getattr(feed_forward, "idle_parameters", 0) for feed_forward in layers)
    embedding = 0 if model.config.tied_embeddings else model.embed.weight.numel()
    active = counts["total"] - idle
    return {
        "total": counts["total"],
        "active": active,
        "active_without_embedding": active - embedding,
        "mtp": counts["mtp"],
    }


def describe_wiring(mtp: MTPConfig) -> str:
    """The wiring of the MTP modules, and what they do not share with the main model."""
    if not mtp.blocks:
        return "none"
    own = {"embedding": mtp.own_embedding, "head": mtp.own_head}
    own_parts = "".join(f"; own {name}" for name, is_own in own.items() if is_own)
    return (
        f"reads {mtp.input} states, passes on {mtp.carry} states, concatenates {mtp.first} first, "
        f"final norm: {mtp.final_norm}{own_parts}"
    )


def describe_tokenizer(path: Path) -> str:
    try:
        tokenizer = load_tokenizer(path)
    except CheckpointError as error:
        return f"none that can be read ({error})"
    return f"{tokenizer.vocab_size} ids, {len(tokenizer.templates.names) or 'no'} chat template(s)"


def count_plain_cache_bytes(config: ModelConfig, bytes_per_number: int) -> int | None:
    """Bytes per token of a cache with every head's key and value.

    None if an attention config has no `uncompressed_width`.
    """
    all_widths = [getattr(layer.attention, "uncompressed_width", None) for layer in config.layers]
    widths = [width for width in all_widths if width is not None]
    return sum(widths) * bytes_per_number if len(widths) == len(all_widths) else None


def describe_layers(config: ModelConfig) -> dict[str, str]:
    """One line for each run of equal layers; the MTP modules follow the main layers."""
    runs = {}
    start = 0
    for kind, layers in (("layer", config.layers), ("mtp", config.mtp.blocks)):
        for layer, group in groupby(layers):
            end = start + len(list(group)) - 1
            name = f"{kind} {start}" if start == end else f"{kind}s {start} to {end}"
            runs[name] = f"{describe_attention(layer)}; {describe_feed_forward(layer)}"
            start = end + 1
    return runs


def describe_attention(layer: LayerConfig) -> str:
    match layer.attention:
        case MLAConfig() as mla:
            queries = f"queries from rank {mla.query_rank}, " if mla.query_rank else ""
            return (
                f"MLA: {mla.num_heads} heads of {mla.nope_width} + {mla.rope.width} rotary, "
                f"values of {mla.value_width}, {queries}keys and values from rank {mla.kv_rank}"
            )
        case GQAConfig() as gqa:
            rotated = gqa.rope.width
            details = {
                f"{rotated} of them rotated": rotated < gqa.head_width,
                f"a window of {gqa.window}": gqa.window,
                "sinks": gqa.sinks,
                "q/k norms": gqa.qk_norm,
            }
            present = [f", {words}" for words, is_present in details.items() if is_present]
            heads = f"GQA: {gqa.num_heads} heads of {gqa.head_width} over {gqa.kv_heads}"
            return heads + "".join(present)
        case other:
            return repr(other)


def describe_feed_forward(layer: LayerConfig) -> str:
    match layer.feed_forward:
        case DenseConfig(width=width):
            return f"dense feed-forward of {width}"
        case MoEConfig() as moe:
            gated = "gated " if moe.shared_gate else ""
            shared = f", {gated}shared expert of {moe.shared_width}" if moe.shared_width else ""
            return describe_router(moe.router, moe.expert_width) + shared
        case other:
            return repr(other)


def describe_router(router: RouterConfig, width: int) -> str:
    match router:
        case TopK() as top_k:
            kept, groups = top_k.groups_kept, top_k.num_groups
            grouped = f", {kept} of {groups} groups" if groups > 1 else ""
            experts = f"{top_k.top_k} of {top_k.num_experts} experts of {width}"
            return f"{experts} by {top_k.scoring}{grouped}"
        case TopP() as top_p:
            experts = f"up to {top_p.max_experts} of {top_p.num_experts} experts of {width}"
            return f"{experts}, as many as reach a probability of {top_p.mass:g}"
        case ExpertChoice() as choice:
            mean = f"{choice.capacity:g} a token on average"
            return f"{choice.num_experts} experts of {width} that choose their tokens, {mean}"
        case other:
            return f"experts of {width} by {other!r}"
