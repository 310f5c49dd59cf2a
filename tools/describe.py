"""describe: what a checkpoint is: layers, parameters, formats, sizes; reads no weights."""

import argparse
import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from checkpoints import (
    CheckpointError,
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
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    facts = description(args.path)
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


def description(path: Path) -> dict[str, Any]:
    """Everything that `describe` shows, as data that JSON can hold."""
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
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
        "wiring of the MTP modules": wiring_words(config.mtp),
        "bytes in memory (bfloat16)": 2 * (counted["total"] + counted["mtp"]),
        "cache bytes per token (bfloat16)": cache.bytes_per_token,
        "cache bytes that stay constant": cache.constant_bytes,
        "with plain multi-head attention": plain_cache_bytes(config, torch.bfloat16.itemsize),
        "stored tensors": len(stored),
        "bytes on disk": sum(tensor.nbytes for tensor in stored.values()),
        "weights stored as": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "tokenizer": tokenizer_words(path),
        "config keys not used": ", ".join(unread_keys(path)),
        "layers": layer_runs(config),
        "tensors": {name: [tensor.dtype, *tensor.shape] for name, tensor in stored.items()},
    }


def count_parameters(model: Transformer) -> dict[str, int]:
    """Parameters in all, those that one token uses, and those of the MTP modules (in neither)."""
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


def wiring_words(mtp: MTPConfig) -> str:
    """What `probe-mtp` would vary, and what is not shared with the main model."""
    if not mtp.blocks:
        return "none"
    own = {"embedding": mtp.own_embedding, "head": mtp.own_head}
    kept = "".join(f"; {name} of its own" for name, there in own.items() if there)
    return (
        f"reads {mtp.input} states, hands on {mtp.carry} ones, {mtp.first} first, "
        f"final norm: {mtp.final_norm}{kept}"
    )


def tokenizer_words(path: Path) -> str:
    try:
        tokenizer = load_tokenizer(path)
    except CheckpointError as error:
        return f"none that can be read ({error})"
    return f"{tokenizer.vocab_size} ids, {len(tokenizer.templates.names) or 'no'} chat template(s)"


def plain_cache_bytes(config: ModelConfig, bytes_per_number: int) -> int | None:
    """Per token, if every head's key and value were kept; None if an attention does not say."""
    widths = [getattr(layer.attention, "uncompressed_width", None) for layer in config.layers]
    known = [width for width in widths if width is not None]
    return sum(known) * bytes_per_number if len(known) == len(widths) else None


def layer_runs(config: ModelConfig) -> dict[str, str]:
    """What the layers are, equal neighbours together; MTP modules after the main ones."""
    runs = {}
    start = 0
    for kind, layers in (("layer", config.layers), ("mtp", config.mtp.blocks)):
        for layer, group in groupby(layers):
            end = start + len(list(group)) - 1
            where = f"{kind} {start}" if start == end else f"{kind}s {start} to {end}"
            runs[where] = f"{attention_words(layer)}; {feed_forward_words(layer)}"
            start = end + 1
    return runs


def attention_words(layer: LayerConfig) -> str:
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
            there = [f", {words}" for words, holds in details.items() if holds]
            heads = f"GQA: {gqa.num_heads} heads of {gqa.head_width} over {gqa.kv_heads}"
            return heads + "".join(there)
        case other:
            return repr(other)


def feed_forward_words(layer: LayerConfig) -> str:
    match layer.feed_forward:
        case DenseConfig(width=width):
            return f"dense feed-forward of {width}"
        case MoEConfig() as moe:
            gated = "gated " if moe.shared_gate else ""
            shared = f", {gated}shared expert of {moe.shared_width}" if moe.shared_width else ""
            return router_words(moe.router, moe.expert_width) + shared
        case other:
            return repr(other)


def router_words(router: RouterConfig, width: int) -> str:
    match router:
        case TopK() as top_k:
            kept, groups = top_k.groups_kept, top_k.num_groups
            grouped = f", {kept} of {groups} groups" if groups > 1 else ""
            of = f"{top_k.top_k} of {top_k.num_experts} experts of {width}"
            return f"{of} by {top_k.scoring}{grouped}"
        case TopP() as top_p:
            of = f"up to {top_p.max_experts} of {top_p.num_experts} experts of {width}"
            return f"{of}, as many as reach a probability of {top_p.mass:g}"
        case ExpertChoice() as choice:
            mean = f"{choice.capacity:g} a token on average"
            return f"{choice.num_experts} experts of {width} that choose their tokens, {mean}"
        case other:
            return f"experts of {width} by {other!r}"
