"""train: the plain loop that made the shipped model.

The loss of a step is the sum of the next-token loss, the MTP loss and a small sequence-wise balance
loss. AdamW updates the weights; then every router's selection bias is updated without a loss, in
MTP modules too. Documents are packed one after the other, and attention may cross their borders
(DeepSeek-V3, section 4.1), but no MTP module has to predict a token of another document. With
--only-mtp the modules are trained, and the rest of the model does not change.

The learning rate warms up, stays constant, and falls linearly to zero over the last steps. From any
checkpoint before this fall, a run can be continued with another end. A finished run can be
lengthened: its learning rate then rises again and falls once more.

A resumed run equals an uninterrupted one bit for bit: the tokens of a step depend on (seed, step)
only, and a checkpoint holds everything else. Text, config and weights that a run starts from are
compared by their contents, so they may be moved.

Shapes: B sequences, T positions, D model width, N tokens.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
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

from .corpus import choose_batch, hold_out, pack_documents, read_text
from .generate import find_device
from .held_out import estimate_bits_per_byte, measure_held_out
from .training_state import (
    Run,
    check_tokens,
    find_checkpoints,
    find_step,
    flag_of,
    hash_contents,
    hash_tokens,
    load_start_weights,
    make_tokenizer,
    restore_checkpoint,
    save_checkpoint,
    truncate_log,
    write_model,
)

REPORT_SECONDS = 30.0  # least time between two lines, where progress is no bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        required=True,
        help="UTF-8 text, plain or .xz, or - for stdin; documents are separated by two blank lines",
    )
    add(
        "--config",
        type=Path,
        help="config.json of the model, with the keys that its family publishes (default: that "
        "of --start-from)",
    )
    add(
        "--start-from",
        type=Path,
        help="checkpoint directory whose weights training starts from; MTP modules that it lacks "
        "start at random",
    )
    add("--only-mtp", action="store_true", help="train the MTP modules and change nothing else")
    add(
        "--out",
        type=Path,
        required=True,
        help="directory for checkpoints, log.jsonl and the trained model/",
    )
    add("--steps", type=int, required=True, help="number of steps of the whole run")
    add(
        "--warm-up-steps",
        type=int,
        default=200,
        help="number of first steps in which the learning rate rises to its full value",
    )
    add(
        "--decay-steps",
        type=int,
        default=0,
        help="number of last steps in which the learning rate falls to zero",
    )
    add("--batch-size", type=int, default=8, help="sequences per step")
    add("--sequence-length", type=int, default=512, help="tokens of a sequence")
    add("--learning-rate", type=float, default=2e-3, help="full value of the learning rate")
    add("--weight-decay", type=float, default=0.1, help="for matrices; norms and biases have none")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add(
        "--mtp-weight",
        type=float,
        nargs="+",
        default=[0.3],
        help="weight of the MTP loss: one number, shared by all depths, or one for each depth",
    )
    add(
        "--mtp-share",
        type=float,
        default=1.0,
        help="share of positions with MTP losses, rounded to 1/n; a smaller one is faster",
    )
    add("--balance-weight", type=float, default=1e-4, help="weight of the sequence-wise loss")
    add("--bias-rate", type=float, default=1e-3, help="step size of the selection bias")
    add("--initial-std", type=float, default=0.02, help="deviation of the matrices' first values")
    add("--hold-out", type=int, default=2, help="number of last documents that are not trained on")
    add(
        "--evaluate-every",
        type=int,
        default=250,
        help="steps between estimates of the held-out bits per byte, each from at most 16 "
        "sequences of held-out text; 0: only the measurement of all of it at the end",
    )
    add(
        "--seed", type=int, default=0, help="seed of the first weights and of the order of the text"
    )
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of matrix products; bfloat16 is faster on processors with instructions for it",
    )
    add("--device", default="cpu", help="any device torch knows: cpu, cuda, mps ...")
    add(
        "--to",
        choices=("abacus",),
        help="write the trained model in our own format (default: the format of its family)",
    )
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")


def run(args: argparse.Namespace) -> int:
    check_settings(args)
    device = find_device(args.device)
    newest = find_newest_checkpoint(args)
    text = read_text(args.text)
    parts = hold_out(text, args.hold_out)
    described = describe_run(args, text)
    first_step = 0 if newest is None else find_step(newest, described)
    model, stored_dtypes = prepare_model(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    packed, held_out_N = prepare_tokens(args, *parts, model.config.vocab_size)
    described = replace(described, tokens=hash_tokens(packed[0]))
    if newest is not None:
        check_tokens(newest, described)
    held_out = held_out_N.to(device), len(parts[1].encode())
    optimizer = make_optimizer(model, args.weight_decay)
    if newest is not None:
        restore_checkpoint(newest, model, optimizer)
    log_path = args.out / "log.jsonl"
    truncate_log(log_path, first_step)
    progress = Progress(first_step, args)
    with progress.bar, log_path.open("a", encoding="utf-8") as log:
        for figures in take_steps(model, optimizer, *packed, first_step, args):
            done = figures["step"] + 1
            if args.evaluate_every and done % args.evaluate_every == 0:
                bits = estimate_bits_per_byte(model, *held_out, args.sequence_length)
                figures["held_out_bits_per_byte"] = round(bits, 4)
            log.write(json.dumps(figures) + "\n")
            progress.update(figures)
            if done % args.save_every == 0 or done == args.steps:
                log.flush()
                save_checkpoint(args.out, done, model, optimizer, described)
    final = write_model(args.out, model, stored_dtypes, args.start_from, args.to)
    written = load_model(final, device, torch.float32)
    report = {"steps": args.steps, "tokens": args.steps * args.batch_size * args.sequence_length}
    report |= measure_held_out(written, *held_out)
    print(json.dumps(report, indent=2))
    return 0


class Progress:
    """Shows a run on stderr: a bar on a terminal; elsewhere a line now and then, for a log file."""

    def __init__(self, first_step: int, args: argparse.Namespace) -> None:
        self.first_step, self.steps = first_step, args.steps
        self.tokens_per_step = args.batch_size * args.sequence_length
        self.started, self.reported = time.perf_counter(), -math.inf
        self.held_out: float | None = None  # the last estimate
        self.bar = tqdm(
            total=args.steps, initial=first_step, unit="step", file=sys.stderr, disable=None
        )

    def update(self, figures: dict[str, Any]) -> None:
        """Count a step, with the figures that are logged."""
        self.held_out = figures.get("held_out_bits_per_byte", self.held_out)
        held_out = {} if self.held_out is None else {"held_out": f"{self.held_out:.3f}"}
        self.bar.set_postfix(loss=f"{figures['loss']:.3f}", **held_out)
        self.bar.update()
        now, is_last = time.perf_counter(), figures["step"] + 1 == self.steps
        if self.bar.disable and (is_last or now - self.reported >= REPORT_SECONDS):
            print(self.describe(figures, now - self.started), file=sys.stderr, flush=True)
            self.reported = now

    def describe(self, figures: dict[str, Any], seconds: float) -> str:
        """The line after a step, these seconds after the start."""
        done = figures["step"] + 1
        rate = (done - self.first_step) / seconds
        left = tqdm.format_interval((self.steps - done) / rate)
        held_out = "" if self.held_out is None else f", held-out {self.held_out} bits per byte"
        return (
            f"step {done:,} of {self.steps:,}: loss {figures['loss']:.3f}, "
            f"{rate * self.tokens_per_step:,.0f} tokens a second, {left} left{held_out}"
        )


def find_newest_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to resume from; ValueError if there is one without --resume, or vice versa."""
    newest = next(reversed(find_checkpoints(args.out)), None)
    if newest is not None and not args.resume:
        raise ValueError(f"{args.out}: has {newest.name}; add --resume, or choose another --out")
    if newest is None and args.resume:
        raise ValueError(f"{args.out}: has no checkpoint to resume from")
    return newest


def prepare_model(
    args: argparse.Namespace, device: torch.device
) -> tuple[Transformer, dict[str, torch.dtype]]:
    """The model before its first step, and the stored dtypes that `load_start_weights` returns."""
    if args.start_from is None:
        start_model, config = None, read_config(args.config)
    else:
        start_model = load_model(args.start_from)
        config = start_model.config if args.config is None else read_config(args.config)
    if args.sequence_length > config.max_length:
        raise ValueError(
            f"--sequence-length {args.sequence_length}: the model has {config.max_length} "
            "positions; give at most as many, or a --config of a model with more"
        )
    model, stored_dtypes = Transformer(config), {}
    model.initialize(args.initial_std, args.seed)
    if start_model is not None:
        stored_dtypes = load_start_weights(model, start_model, args.start_from)
    if args.only_mtp:
        if not model.mtp:
            raise ValueError("--only-mtp: there are no MTP modules; give a --config that has some")
        model.requires_grad_(False).mtp.requires_grad_(True)
    split_mtp_weight(args, len(model.mtp))  # these two raise errors now, not after the training
    plan_checkpoint(model, to=args.to)
    return model.to(device), stored_dtypes


def check_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for a setting outside its range or without another that it needs."""
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
        ("evaluate_every", args.evaluate_every >= 0, "at least 0"),
    ]
    if args.config is None and args.start_from is None:
        raise ValueError("--config or --start-from is needed, to define the model")
    if args.only_mtp and args.start_from is None:
        raise ValueError("--only-mtp needs --start-from, the model of the modules")
    for name, holds, rule in rules:
        if not holds:
            raise ValueError(f"{flag_of(name)} {getattr(args, name)}: must be {rule}")


def prepare_tokens(
    args: argparse.Namespace, training_text: str, held_out_text: str, vocab_size: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The tokens of the training text, (N,), with each one's document, and those held out.

    Without --start-from, a tokenizer of `vocab_size` ids is trained first. Raises ValueError if
    too few tokens are held out.
    """
    if args.start_from is None:
        tokenizer = make_tokenizer(args.out, training_text, vocab_size, args.resume)
    else:
        tokenizer = load_tokenizer(args.start_from)
    packed = pack_documents(tokenizer, training_text)
    held_out_N, _ = pack_documents(tokenizer, held_out_text)
    if len(held_out_N) < 4:
        raise ValueError(f"{args.text}: {len(held_out_N)} tokens are held out, too few to measure")
    return packed, held_out_N


def take_steps(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    tokens_N: Tensor,
    documents_N: Tensor,
    first_step: int,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Take the steps from `first_step` on, and yield the figures of each for the log."""
    for step in range(first_step, args.steps):
        started = time.perf_counter()
        sizes = args.batch_size, args.sequence_length
        places_BT = choose_batch(len(tokens_N), step, *sizes, args.seed)
        tokens_BT, documents_BT = (
            x_N[places_BT].to(model.device) for x_N in (tokens_N, documents_N)
        )
        figures = train_step(model, optimizer, tokens_BT, documents_BT, step, args)
        yield figures | {"step": step, "seconds": round(time.perf_counter() - started, 4)}


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    tokens_BT: Tensor,
    documents_BT: Tensor,
    step: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Update the weights and the selection biases once; return the figures for the log.

    tokens_BT: ids; documents_BT: the number of each token's document. ValueError if the loss is not
    finite.
    """
    rate = learning_rate(args, step)
    in_bfloat16 = args.precision == "bfloat16"
    autocast = torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=in_bfloat16)
    with record_routing(model) as routings, autocast:
        states = model.hidden_states(tokens_BT)
        loss = next_token_loss(states.normed_BTD, model.head, tokens_BT)
        loss_of_mtp = torch.zeros_like(loss)
        if model.mtp:
            loss_of_mtp = mtp_loss(
                model.mtp_hidden_states(states, tokens_BT),
                model.mtp_heads,
                tokens_BT,
                split_mtp_weight(args, len(model.mtp)),
                share_of_positions(tokens_BT, args.mtp_share, step),
                documents_BT,
            )
        total = loss + loss_of_mtp
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
        "mtp_loss": round(loss_of_mtp.item(), 5),
        "learning_rate": rate,
        "gradient_norm": round(norm.item(), 4),
        "least_load": round(min((load.min().item() for load in loads.values()), default=1.0), 3),
        "greatest_load": round(max((load.max().item() for load in loads.values()), default=1.0), 3),
    }


def split_mtp_weight(args: argparse.Namespace, num_mtp: int) -> list[float]:
    """The MTP loss weight of each depth; a single number is divided by their number D (lambda / D).

    Raises ValueError if there are several numbers, but not one for each depth.
    """
    if len(args.mtp_weight) == 1:
        return [args.mtp_weight[0] / max(1, num_mtp)] * num_mtp
    if len(args.mtp_weight) != num_mtp:
        raise ValueError(
            f"--mtp-weight: {len(args.mtp_weight)} numbers for {num_mtp} MTP modules: give one "
            "number, or one for each module"
        )
    return args.mtp_weight


def share_of_positions(tokens_BT: Tensor, share: float, step: int) -> Tensor | None:
    """A mask, (B, T), of evenly spaced positions, which move with the step; None: all positions."""
    if share >= 1:
        return None
    stride = round(1 / share)
    kept_T = (torch.arange(tokens_BT.shape[1], device=tokens_BT.device) + step) % stride == 0
    return kept_T.expand_as(tokens_BT)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """The rate of a step: it warms up linearly, stays constant, and falls linearly to zero."""
    warm = min(1.0, (step + 1) / max(1, args.warm_up_steps))
    fall = min(1.0, (args.steps - step) / (args.decay_steps + 1))
    return args.learning_rate * warm * fall


def make_optimizer(model: Transformer, weight_decay: float) -> torch.optim.AdamW:
    """AdamW for the parameters that require gradients; weight decay for matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)


def describe_run(args: argparse.Namespace, text: str) -> Run:
    """What must not change when a run is resumed; text: the contents of --text."""
    free = ("out", "to", "resume", "command", "run", "save_every", "evaluate_every")
    compared_otherwise = ("text", "config", "start_from", "steps", "decay_steps")
    left_out = {*free, *compared_otherwise}
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    contents = hash_contents(text, args.config or args.start_from, args.start_from)
    return Run(settings, contents, (args.steps - args.decay_steps, args.steps))
