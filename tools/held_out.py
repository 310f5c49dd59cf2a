"""Measures a trained model on text that it was not trained on: bits per byte, load, drafts.

Shapes: N tokens of the text, B rows (1 here), T tokens of a piece.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modeling import Transformer, find_non_causal, generate, next_token_loss

from .corpus import cut_passages
from .evaluate import Measures, measure_text

NUM_PROMPTS, MAX_PROMPT = 32, 96  # tokens of a prompt, and as many tokens to generate after it
MAX_PIECES = 16  # that an estimate reads


def measure_held_out(model: Transformer, tokens_N: Tensor, num_bytes: int) -> dict[str, Any]:
    """All figures, for a text of these tokens and this many UTF-8 bytes."""
    measures = measure_without_overlap(model, tokens_N)
    loads = {layer: use.load_E for layer, use in measures.experts.items()}
    report: dict[str, Any] = {
        "held_out_bits_per_byte": round(measures.bits_per_byte(num_bytes), 4),
        "held_out_tokens": len(tokens_N),
        "expert_load": {
            layer: {
                "least": round(load_E.min().item(), 3),
                "greatest": round(load_E.max().item(), 3),
            }
            for layer, load_E in loads.items()
        },
    }
    if model.mtp and find_non_causal(model) is None:
        drafted, accepted = count_drafts(model, tokens_N)
        report |= {"drafted": drafted, "accepted": accepted}
        report["draft_acceptance"] = round(accepted / max(1, drafted), 4)
    return report


def measure_without_overlap(model: Transformer, tokens_N: Tensor) -> Measures:
    """Read windows of the model's maximal length, without context before a window."""
    length = model.config.max_length
    return measure_text(model, tokens_N, length, length - 1, depths=len(model.mtp))


@torch.no_grad()
def estimate_bits_per_byte(
    model: Transformer, tokens_N: Tensor, num_bytes: int, length: int
) -> float:
    """The bits per byte of `measure_held_out`, from at most 16 evenly spaced pieces of the text.

    length: tokens of a piece. The bytes that the pieces stand for are their share of the tokens.
    The model is in eval mode meanwhile.
    """
    starts = range(0, len(tokens_N) - 1, length - 1)
    count = min(len(starts), MAX_PIECES)
    nats, predicted, was_training = 0.0, 0, model.training
    model.eval()
    for start in (starts[i * len(starts) // count] for i in range(count)):
        tokens_BT = tokens_N[None, start : start + length].to(model.device)
        states = model.hidden_states(tokens_BT)
        targets = tokens_BT.shape[1] - 1
        nats += next_token_loss(states.normed_BTD, model.head, tokens_BT).item() * targets
        predicted += targets
    model.train(was_training)
    return nats / math.log(2) / predicted * (len(tokens_N) - 1) / num_bytes


def count_drafts(model: Transformer, tokens_N: Tensor) -> tuple[int, int]:
    """(drafted, accepted) tokens in greedy continuations of passages, with one draft per round."""
    drafted = accepted = 0
    length = min(MAX_PROMPT, model.config.max_length // 2, len(tokens_N))
    prompts = cut_passages(tokens_N, NUM_PROMPTS, length)
    for prompt in tqdm(prompts, desc="drafting", unit="passage", file=sys.stderr, disable=None):
        generation = generate(model, prompt, length, draft_tokens=1)
        for _ in generation:
            pass
        drafted += sum(generation.statistics.drafted)
        accepted += sum(generation.statistics.accepted)
    return drafted, accepted
