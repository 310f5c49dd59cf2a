"""train: the plain loop that made the shipped model.

One step: next-token loss + MTP loss + a small sequence-wise balance loss, AdamW, then the
auxiliary-loss-free update of every router's selection bias (MTP modules included). The learning
rate warms up, stays, and falls linearly to zero over the last steps, so a run can be lengthened
from any checkpoint before its fall.

A run resumes bit for bit: what a step sees is a function of (seed, step) alone, and a checkpoint
holds everything else.

Shapes: B sequences, T positions, D model width, N tokens.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from checkpoints import Tokenizer, load_tokenizer, read_config, save_model
from modeling import Transformer, mtp_loss, next_token_loss
from moe import (
    expert_load,
    record_routing,
    routers,
    sequence_balance_loss,
    updated_selection_bias,
)

from .corpus import batch, hold_out, read_text, train_vocabulary

KEPT_CHECKPOINTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", type=Path, required=True, help="UTF-8 text, plain or .xz; documents are separated by two blank lines")
    add("--config", type=Path, required=True, help="config.json of the model, in its family's published spelling")
    add("--out", type=Path, required=True, help="directory for checkpoints, log.jsonl and the trained model/")
    add("--steps", type=int, required=True)
    add("--warm-up-steps", type=int, default=200)
    add("--decay-steps", type=int, default=0, help="the last so many steps: the learning rate falls to zero")
    add("--batch-size", type=int, default=8, help="sequences a step")
    add("--sequence-length", type=int, default=512)
    add("--learning-rate", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.1, help="of matrices; norms have none")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--mtp-weight", type=float, default=0.3, help="of the MTP losses together")
    add("--mtp-share", type=float, default=1.0, help="of the positions that the MTP losses look at; fewer are faster")
    add("--balance-weight", type=float, default=1e-4, help="of the sequence-wise balance loss")
    add("--bias-rate", type=float, default=1e-3, help="step of the selection bias")
    add("--initial-std", type=float, default=0.02)
    add("--hold-out", type=int, default=2, help="documents at the end of the text never trained on")
    add("--seed", type=int, default=0)
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of matrix products; bfloat16 pays where the processor has instructions for it")
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")


def run(args: argparse.Namespace) -> int:
    config = read_config(args.config)
    settings = comparable(args)
    newest = newest_checkpoint(args.out)
    if newest is not None and not args.resume:
        raise ValueError(f"{args.out}: holds {newest.name}; add --resume, or choose another --out")
    if newest is None and args.resume:
        raise ValueError(f"{args.out}: holds no checkpoint to resume from")
    args.out.mkdir(parents=True, exist_ok=True)
    training_text, held_out_text = hold_out(read_text(args.text), args.hold_out)
    tokenizer = vocabulary(args.out, training_text, config.vocab_size)
    tokens_N = torch.tensor(tokenizer.encode(training_text, bos=False))
    held_out_N = torch.tensor(tokenizer.encode(held_out_text, bos=False))

    model = Transformer(config)
    model.initialize(args.initial_std, args.seed)
    optimizer = make_optimizer(model, args.weight_decay)
    first_step = 0
    if newest is not None:
        first_step = restore(newest, model, optimizer, settings)
    log_path = args.out / "log.jsonl"
    keep_lines(log_path, first_step)
    progress = tqdm(total=args.steps, initial=first_step, unit="step", file=sys.stderr, disable=None)
    with progress, log_path.open("a", encoding="utf-8") as log:
        for step in range(first_step, args.steps):
            started = time.perf_counter()
            tokens_BT = batch(tokens_N, step, args.batch_size, args.sequence_length, args.seed)
            figures = train_step(model, optimizer, tokens_BT, step, args)
            figures |= {"step": step, "seconds": round(time.perf_counter() - started, 4)}
            log.write(json.dumps(figures) + "\n")
            progress.set_postfix(loss=f"{figures['loss']:.3f}")
            progress.update()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                log.flush()
                save_checkpoint(args.out, step + 1, model, optimizer, settings)
    write_model(args.out, model)
    bits = bits_per_byte(model, held_out_N, len(held_out_text.encode()), args.sequence_length)
    print(json.dumps({"held_out_bits_per_byte": round(bits, 4), "steps": args.steps}))
    return 0


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    tokens_BT: Tensor,
    step: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One update of the weights and of the selection biases; returns what the log shows."""
    head_VD, num_mtp, rate = model.head.weight, len(model.mtp), learning_rate(args, step)
    reduced = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16")
    with record_routing(model) as routings, reduced:
        states_BTD = model.hidden_states(tokens_BT)
        loss = next_token_loss(states_BTD, head_VD, tokens_BT)
        total = loss
        further = torch.zeros(())
        if num_mtp:
            depths = model.mtp_hidden_states(states_BTD, tokens_BT)
            looked_at_BT = share_of_positions(tokens_BT, args.mtp_share, step)
            further = mtp_loss(depths, head_VD, tokens_BT, [1 / num_mtp] * num_mtp, looked_at_BT)
            total = total + args.mtp_weight * further
        balance = sum(sequence_balance_loss(r, len(tokens_BT)) for r in routings.values())
        total = total + args.balance_weight * balance
    if not math.isfinite(total.item()):
        raise ValueError("the loss is not finite: lower --learning-rate, or resume with other data")
    optimizer.zero_grad()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    loads = {layer: expert_load(routing) for layer, routing in routings.items()}
    for layer, router in routers(model).items():
        if router.selection_bias is not None:
            router.selection_bias.copy_(
                updated_selection_bias(router.selection_bias, loads[layer], args.bias_rate)
            )
    return {
        "loss": round(loss.item(), 5),
        "mtp_loss": round(further.item(), 5),
        "learning_rate": rate,
        "gradient_norm": round(norm.item(), 4),
        "least_load": round(min((load.min().item() for load in loads.values()), default=1.0), 3),
        "greatest_load": round(max((load.max().item() for load in loads.values()), default=1.0), 3),
    }


def share_of_positions(tokens_BT: Tensor, share: float, step: int) -> Tensor | None:
    """A mask of evenly spaced positions, other ones each step; None for all of them."""
    if share >= 1:
        return None
    stride = round(1 / share)
    kept_T = (torch.arange(tokens_BT.shape[1]) + step) % stride == 0
    return kept_T.expand_as(tokens_BT)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, constant, linear fall to zero."""
    warm = min(1.0, (step + 1) / max(1, args.warm_up_steps))
    fall = min(1.0, (args.steps - step) / (args.decay_steps + 1))
    return args.learning_rate * warm * fall


def make_optimizer(model: Transformer, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)


def vocabulary(out: Path, text: str, num_pieces: int) -> Tokenizer:
    """The run's tokenizer, trained on its first start."""
    path = out / "tokenizer.model"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_bytes(train_vocabulary(text, num_pieces))
        partial.replace(path)
    return load_tokenizer(out)


@torch.no_grad()
def bits_per_byte(model: Transformer, tokens_N: Tensor, num_bytes: int, length: int) -> float:
    """-log2 of the probability of the text, per byte of it; sequences of `length` from no context.

    Each sequence begins with the last token of the one before it, so every token but the very
    first is predicted once.
    """
    nats = 0.0
    for start in range(0, len(tokens_N) - 1, length - 1):
        tokens_BT = tokens_N[None, start : start + length]
        mean = next_token_loss(model.hidden_states(tokens_BT), model.head.weight, tokens_BT)
        nats += mean.item() * (tokens_BT.shape[1] - 1)
    return nats / math.log(2) / num_bytes


def comparable(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that two halves of one run must share."""
    free = ("out", "resume", "command", "save_every", "steps", "decay_steps", "run")
    shared = {name: value for name, value in vars(args).items() if name not in free}
    return {name: str(value) if isinstance(value, Path) else value for name, value in shared.items()}


def newest_checkpoint(out: Path) -> Path | None:
    return max(out.glob("step-*[0-9]"), default=None, key=lambda path: int(path.name[5:]))


def save_checkpoint(
    out: Path,
    step: int,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> None:
    """Write step-N whole or not at all, then remove checkpoints older than the last ones."""
    partial = out / f"step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(dict(model.state_dict()), partial / "weights.safetensors")
    moments = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "training.json").write_text(json.dumps({"step": step, "settings": settings}))
    for file in partial.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    final = out / f"step-{step}"
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    done = sorted(out.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    for old in done[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def restore(
    checkpoint: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> int:
    """Put a checkpoint's state into model and optimizer; returns the step to go on with."""
    saved = json.loads((checkpoint / "training.json").read_text())
    for name, value in saved["settings"].items():
        if settings.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{checkpoint}: was made with {flag} {value}, not {settings.get(name)}")
    model.load_state_dict(load_file(checkpoint / "weights.safetensors"))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return saved["step"]


def keep_lines(path: Path, num_lines: int) -> None:
    """Drop log lines of steps that a resumed run will take again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:num_lines]
        path.write_text("".join(lines), encoding="utf-8")


def write_model(out: Path, model: Transformer) -> None:
    """The trained model in bfloat16 in its family's published layout, with its tokenizer."""
    final = out / "model"
    shutil.rmtree(final, ignore_errors=True)
    save_model(model.to(torch.bfloat16), final)
    shutil.copy(out / "tokenizer.model", final)
