"""train: the plain loop that made the shipped model.

One step: next-token loss + MTP loss + a small sequence-wise balance loss, AdamW, then the
auxiliary-loss-free update of every router's selection bias (MTP modules included). Documents are
packed one behind the other and may see each other (DeepSeek-V3, section 4.1), but no MTP module is
asked for a token of another document. With --only-mtp the modules are trained on a model that stays
as it is.

The learning rate warms up, stays, and falls linearly to zero over the last steps. A run can be
given another end from any checkpoint before its fall, and a finished one can be lengthened: its
learning rate then rises again and falls once more.

A run resumes bit for bit: what a step sees is a function of (seed, step) alone, and a checkpoint
holds everything else.

Shapes: B sequences, T positions, D model width, N tokens.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import load_model, load_tokenizer, plan_checkpoint, read_config
from modeling import Transformer, mtp_loss, next_token_loss
from moe import (
    expert_load,
    record_routing,
    sequence_balance_loss,
    updated_selection_bias,
)

from .corpus import batch, hold_out, packed, read_text
from .generate import usable_device
from .held_out import held_out_report
from .training_state import (
    checkpoints_in,
    keep_lines,
    restore,
    save_checkpoint,
    take_over,
    vocabulary,
    write_model,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        required=True,
        help="UTF-8 text, plain or .xz; documents are separated by two blank lines",
    )
    add(
        "--config",
        type=Path,
        help="config.json of the model, in its family's published spelling (default: that of "
        "--start-from)",
    )
    add(
        "--start-from",
        type=Path,
        help="checkpoint directory to go on from; MTP modules that it has not begin at random",
    )
    add(
        "--only-mtp", action="store_true", help="train the MTP modules, and leave the rest as it is"
    )
    add(
        "--out",
        type=Path,
        required=True,
        help="directory for checkpoints, log.jsonl and the trained model/",
    )
    add("--steps", type=int, required=True)
    add("--warm-up-steps", type=int, default=200)
    add(
        "--decay-steps",
        type=int,
        default=0,
        help="the last so many steps: the learning rate falls to zero",
    )
    add("--batch-size", type=int, default=8, help="sequences a step")
    add("--sequence-length", type=int, default=512)
    add("--learning-rate", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.1, help="of matrices; norms have none")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add(
        "--mtp-weight",
        type=float,
        nargs="+",
        default=[0.3],
        help="of the MTP losses together, or one for each depth",
    )
    add(
        "--mtp-share",
        type=float,
        default=1.0,
        help="of the positions that the MTP losses look at; fewer are faster",
    )
    add("--balance-weight", type=float, default=1e-4, help="of the sequence-wise balance loss")
    add("--bias-rate", type=float, default=1e-3, help="step of the selection bias")
    add("--initial-std", type=float, default=0.02)
    add("--hold-out", type=int, default=2, help="documents at the end of the text never trained on")
    add("--seed", type=int, default=0)
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of matrix products; bfloat16 pays where the processor has instructions for it",
    )
    add("--device", default="cpu", help="any device torch knows: cpu, cuda, mps ...")
    add(
        "--to",
        choices=("abacus",),
        help="write the trained model in our own format (default: as the family publishes it)",
    )
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")


def run(args: argparse.Namespace) -> int:
    check(args)
    device = usable_device(args.device)
    settings, schedule = comparable(args), (args.steps - args.decay_steps, args.steps)
    newest = next(reversed(checkpoints_in(args.out)), None)
    if newest is not None and not args.resume:
        raise ValueError(f"{args.out}: holds {newest.name}; add --resume, or choose another --out")
    if newest is None and args.resume:
        raise ValueError(f"{args.out}: holds no checkpoint to resume from")
    model, stored_dtypes = prepared(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    training_text, held_out_text = hold_out(read_text(args.text), args.hold_out)
    if args.start_from is None:
        tokenizer = vocabulary(args.out, training_text, model.config.vocab_size)
    else:
        tokenizer = load_tokenizer(args.start_from)
    tokens_N, documents_N = packed(tokenizer, training_text)
    held_out_N, _ = packed(tokenizer, held_out_text)
    if len(held_out_N) < 4:
        raise ValueError(f"{args.text}: {len(held_out_N)} tokens are held out: too few to judge by")
    optimizer = make_optimizer(model, args.weight_decay)
    first_step = 0
    if newest is not None:
        first_step = restore(newest, model, optimizer, settings, schedule)
        if first_step > args.steps:
            raise ValueError(f"{newest}: is beyond --steps {args.steps}")
    log_path = args.out / "log.jsonl"
    keep_lines(log_path, first_step)
    progress = tqdm(
        total=args.steps, initial=first_step, unit="step", file=sys.stderr, disable=None
    )
    with progress, log_path.open("a", encoding="utf-8") as log:
        for step in range(first_step, args.steps):
            started = time.perf_counter()
            sizes = args.batch_size, args.sequence_length
            places_BT = batch(len(tokens_N), step, *sizes, args.seed)
            text = tokens_N[places_BT].to(device), documents_N[places_BT].to(device)
            figures = train_step(model, optimizer, *text, step, args)
            figures |= {"step": step, "seconds": round(time.perf_counter() - started, 4)}
            log.write(json.dumps(figures) + "\n")
            progress.set_postfix(loss=f"{figures['loss']:.3f}")
            progress.update()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                log.flush()
                save_checkpoint(args.out, step + 1, model, optimizer, settings, schedule)
    final = write_model(args.out, model, stored_dtypes, args.start_from, args.to)
    written = load_model(final, device, torch.float32, progress=False)
    report = {"steps": args.steps, "tokens": args.steps * args.batch_size * args.sequence_length}
    report |= held_out_report(written, held_out_N, len(held_out_text.encode()))
    print(json.dumps(report, indent=2))
    return 0


def prepared(
    args: argparse.Namespace, device: torch.device
) -> tuple[Transformer, dict[str, torch.dtype]]:
    """The model before its first step, and the dtypes of what it starts from, as `take_over`."""
    if args.start_from is None:
        there, config = None, read_config(args.config)
    else:
        there = load_model(args.start_from)
        config = there.config if args.config is None else read_config(args.config)
    model, stored_dtypes = Transformer(config), {}
    model.initialize(args.initial_std, args.seed)
    if there is not None:
        stored_dtypes = take_over(model, there, args.start_from)
    if args.only_mtp:
        if not model.mtp:
            raise ValueError("--only-mtp: there are no MTP modules; give a --config that has some")
        model.requires_grad_(False).mtp.requires_grad_(True)
    depth_weights(args, len(model.mtp))
    plan_checkpoint(model, to=args.to)  # what could not be saved is refused before it is trained
    return model.to(device), stored_dtypes


def check(args: argparse.Namespace) -> None:
    """Refuse settings that cannot be meant, before any work is done."""
    counts = ("steps", "batch_size", "save_every")
    rules = [(name, getattr(args, name) >= 1, "at least 1") for name in counts]
    rules += [
        ("warm_up_steps", args.warm_up_steps >= 0, "at least 0"),
        ("decay_steps", 0 <= args.decay_steps <= args.steps, "from 0 to --steps"),
        ("sequence_length", args.sequence_length >= 4, "at least 4"),
        ("learning_rate", 0 < args.learning_rate < math.inf, "positive and finite"),
        ("weight_decay", 0 <= args.weight_decay < math.inf, "at least 0 and finite"),
        ("clip", args.clip > 0, "positive"),
        ("mtp_weight", all(0 <= w < math.inf for w in args.mtp_weight), "at least 0 and finite"),
        ("mtp_share", 0 < args.mtp_share <= 1, "in (0, 1]"),
        ("balance_weight", 0 <= args.balance_weight < math.inf, "at least 0 and finite"),
        ("bias_rate", 0 <= args.bias_rate < math.inf, "at least 0 and finite"),
        ("initial_std", 0 < args.initial_std < math.inf, "positive and finite"),
        ("hold_out", args.hold_out >= 1, "at least 1"),
    ]
    if args.config is None and args.start_from is None:
        raise ValueError("--config or --start-from is needed: what is the model to be?")
    if args.only_mtp and args.start_from is None:
        raise ValueError("--only-mtp needs --start-from: what do the modules belong to?")
    for name, holds, rule in rules:
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {getattr(args, name)}: must be {rule}")


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    tokens_BT: Tensor,
    documents_BT: Tensor,
    step: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One update of the weights and of the selection biases; returns what the log shows."""
    rate = learning_rate(args, step)
    in_bfloat16 = args.precision == "bfloat16"
    reduced = torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=in_bfloat16)
    with record_routing(model) as routings, reduced:
        states = model.hidden_states(tokens_BT)
        loss = next_token_loss(states.normed_BTD, model.head, tokens_BT)
        further = torch.zeros_like(loss)
        if model.mtp:
            further = mtp_loss(
                model.mtp_hidden_states(states, tokens_BT),
                model.mtp_heads,
                tokens_BT,
                depth_weights(args, len(model.mtp)),
                share_of_positions(tokens_BT, args.mtp_share, step),
                documents_BT,
            )
        total = loss + further
        balance = sum(sequence_balance_loss(r, len(tokens_BT)) for r in routings.values())
        total = total + args.balance_weight * balance
    if not math.isfinite(total.item()):
        raise ValueError(f"the loss is not finite at step {step}: lower --learning-rate")
    optimizer.zero_grad()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    loads = {layer: expert_load(routing) for layer, routing in routings.items()}
    for layer, router in routings.routers.items():
        bias_E = router.selection_bias
        if bias_E is not None and any(
            p.requires_grad for p in cast(nn.Module, router).parameters()
        ):
            bias_E.copy_(updated_selection_bias(bias_E, loads[layer], args.bias_rate))
    return {
        "loss": round(loss.item(), 5),
        "mtp_loss": round(further.item(), 5),
        "learning_rate": rate,
        "gradient_norm": round(norm.item(), 4),
        "least_load": round(min((load.min().item() for load in loads.values()), default=1.0), 3),
        "greatest_load": round(max((load.max().item() for load in loads.values()), default=1.0), 3),
    }


def depth_weights(args: argparse.Namespace, num_mtp: int) -> list[float]:
    """One weight for each depth; a single one is shared by all of them (the paper's lambda / D)."""
    if len(args.mtp_weight) == 1:
        return [args.mtp_weight[0] / max(1, num_mtp)] * num_mtp
    if len(args.mtp_weight) != num_mtp:
        given = f"{len(args.mtp_weight)} numbers"
        raise ValueError(f"--mtp-weight: {given} for {num_mtp} MTP modules: give one each, or one")
    return args.mtp_weight


def share_of_positions(tokens_BT: Tensor, share: float, step: int) -> Tensor | None:
    """A mask of evenly spaced positions, other ones each step; None for all of them."""
    if share >= 1:
        return None
    stride = round(1 / share)
    kept_T = (torch.arange(tokens_BT.shape[1], device=tokens_BT.device) + step) % stride == 0
    return kept_T.expand_as(tokens_BT)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, constant, linear fall to zero."""
    warm = min(1.0, (step + 1) / max(1, args.warm_up_steps))
    fall = min(1.0, (args.steps - step) / (args.decay_steps + 1))
    return args.learning_rate * warm * fall


def make_optimizer(model: Transformer, weight_decay: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)


def comparable(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that two halves of one run must share."""
    free = ("out", "to", "resume", "command", "save_every", "steps", "decay_steps", "run")
    shared = {name: value for name, value in vars(args).items() if name not in free}
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in shared.items()
    }
