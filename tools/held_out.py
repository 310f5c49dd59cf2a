"""Measures a trained model on text that it was not trained on: bits per byte, load, drafts.

Shapes: N tokens of the text, B rows, T positions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from modeling import Transformer, find_non_causal, generate, next_token_loss
from moe import expert_load, record_routing

from .corpus import cut_passages

NUM_PROMPTS, MAX_PROMPT = 32, 96  # tokens of a prompt, and as many tokens to generate after it


def measure_held_out(model: Transformer, tokens_N: Tensor, num_bytes: int) -> dict[str, Any]:
    """All figures, for a text of these tokens and this many UTF-8 bytes."""
    with record_routing(model) as routings:
        bits = measure_bits_per_byte(model, tokens_N, num_bytes)
    loads = {layer: expert_load(routing) for layer, routing in routings.items()}
    report: dict[str, Any] = {
        "held_out_bits_per_byte": round(bits, 4),
        "held_out_tokens": len(tokens_N),
        "expert_load": {
            layer: {"least": round(load.min().item(), 3), "greatest": round(load.max().item(), 3)}
            for layer, load in loads.items()
        },
    }
    if model.mtp and find_non_causal(model) is None:
        drafted, accepted = count_drafts(model, tokens_N)
        report |= {"drafted": drafted, "accepted": accepted}
        report["draft_acceptance"] = round(accepted / max(1, drafted), 4)
    return report


@torch.no_grad()
def measure_bits_per_byte(model: Transformer, tokens_N: Tensor, num_bytes: int) -> float:
    """-log2 of the probability of the text, divided by its bytes.

    The model reads pieces of its maximal length, without context before a piece. Each piece starts
    with the last token of the piece before it, so every token but the first of the text is
    predicted once. The MTP modules read the text too, so that their routing is recorded.
    """
    nats, length = 0.0, model.config.max_length
    for start in range(0, len(tokens_N) - 1, length - 1):
        tokens_BT = tokens_N[None, start : start + length]
        states = model.hidden_states(tokens_BT)
        mean_nats = next_token_loss(states.normed_BTD, model.head, tokens_BT).item()
        nats += mean_nats * (tokens_BT.shape[1] - 1)
        model.mtp_hidden_states(states, tokens_BT)
    return nats / math.log(2) / num_bytes


def count_drafts(model: Transformer, tokens_N: Tensor) -> tuple[int, int]:
    """(drafted, accepted) tokens in greedy continuations of passages, with one draft per round."""
    drafted = accepted = 0
    length = min(MAX_PROMPT, model.config.max_length // 2, len(tokens_N))
    for prompt in cut_passages(tokens_N, NUM_PROMPTS, length):
        generation = generate(model, prompt, length, draft_tokens=1)
        for _ in generation:
            pass
        drafted += sum(generation.statistics.drafted)
        accepted += sum(generation.statistics.accepted)
    return drafted, accepted
