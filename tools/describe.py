"""describe: what a checkpoint is: layers, parameters, formats, sizes; reads no weights."""

import argparse
import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any, assert_never

import torch

from checkpoints import (
    CheckpointError,
    load_tokenizer,
    read_config,
    read_headers,
    unread_keys,
)
from modeling import (
    DenseConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MTPConfig,
    Transformer,
)
from moe import MoEConfig


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
    growing, windows = cache_bytes(model)
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
        "cache bytes per token (bfloat16)": growing,
        "cache bytes of all windows": windows,
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
    idle = sum(idle_parameters(layer, model.config.d_model) for layer in model.config.layers)
    embedding = 0 if model.config.tied_embeddings else model.embed.weight.numel()
    active = counts["total"] - idle
    return {
        "total": counts["total"],
        "active": active,
        "active_without_embedding": active - embedding,
        "mtp": counts["mtp"],
    }


def cache_bytes(model: Transformer) -> tuple[int, int]:
    """What a cached token adds in layers without a window, and what all the windows take."""
    growing = windows = 0
    of_one_token, full = model.make_cache(1, 1), model.make_cache(1, model.config.max_length)
    for i, layer in enumerate(model.config.layers):
        match layer.attention:
            case GQAConfig(window=int()):
                windows += full.layers[i].nbytes
            case _:
                growing += of_one_token.layers[i].nbytes
    return growing, windows


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


def idle_parameters(layer: LayerConfig, d_model: int) -> int:
    """Of the experts that a token does not use."""
    match layer.feed_forward:
        case MoEConfig() as moe:
            biases = (2 * moe.expert_width + d_model) * moe.expert_biases
            return (moe.num_experts - moe.top_k) * (3 * d_model * moe.expert_width + biases)
        case _:
            return 0


def plain_cache_bytes(config: ModelConfig, bytes_per_number: int) -> int:
    """Per token, if every head's key and value were kept: plain multi-head attention."""
    numbers = 0
    for layer in config.layers:
        match layer.attention:
            case MLAConfig() as mla:
                key_width = mla.nope_width + mla.rope.width
                numbers += mla.num_heads * (key_width + mla.value_width)
            case GQAConfig() as gqa:
                numbers += gqa.num_heads * 2 * gqa.head_width
            case other:
                assert_never(other)
    return numbers * bytes_per_number


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
            assert_never(other)


def feed_forward_words(layer: LayerConfig) -> str:
    match layer.feed_forward:
        case DenseConfig(width=width):
            return f"dense feed-forward of {width}"
        case MoEConfig() as moe:
            grouped = (
                f", {moe.groups_kept} of {moe.num_groups} groups" if moe.num_groups > 1 else ""
            )
            gated = "gated " if moe.shared_gate else ""
            shared = f", {gated}shared expert of {moe.shared_width}" if moe.shared_width else ""
            return (
                f"{moe.top_k} of {moe.num_experts} experts of {moe.expert_width} "
                f"by {moe.scoring}{grouped}{shared}"
            )
        case other:
            assert_never(other)
