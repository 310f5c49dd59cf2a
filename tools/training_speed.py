"""How fast a model trains: the step of `train` with its default settings, on random tokens.

Weights, gradients and the two moments of AdamW are in float32; products are in bfloat16 if the
checkpoint is. The floor of a step is that of its products: a forward, and twice as much backward.

Shapes: B sequences, T positions, R rounds.
"""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import build_on_meta, read_config
from modeling import MTPConfig, Transformer

from .contexts import random_tokens
from .floor import Machine, Work, count_training_operations
from .generate import find_device, load_requested_model
from .peer import Peer
from .speed import OURS, describe_rounds
from .timing import Contender, available_memory, clock, take_turns
from .train import add_arguments, make_optimizer, train_step

BYTES_PER_PARAMETER = 16  # weight, gradient and two moments, in float32
WITH_MTP = "abacus, with MTP losses"


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this section."""
    add = parser.add_argument
    add("--training-batch", type=int, default=4, help="sequences of a training step")
    add("--training-length", type=int, default=512, help="tokens of each of its sequences")


def check_training(args: argparse.Namespace) -> None:
    """Raise ValueError if the model has too few positions, or the memory cannot hold a step."""
    config = read_config(args.model)
    if args.layers is not None:
        config = replace(config, layers=config.layers[: args.layers], mtp=MTPConfig())
    if args.training_length > config.max_length:
        asked = f"--training-length {args.training_length}"
        raise ValueError(f"{asked}: the model has positions for {config.max_length} at most")
    count = sum(parameter.numel() for parameter in build_on_meta(config).parameters())
    needed = BYTES_PER_PARAMETER * count * (2 if args.against else 1)
    available = available_memory(find_device(args.device))
    if available is not None and needed > available:
        raise ValueError(
            f"{args.model}: weights, gradients and moments of training take {needed / 1e9:.1f} GB; "
            f"{available / 1e9:.1f} GB are available: choose fewer --layers"
        )


def measure_training(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of a step with the next-token loss, and with MTP losses if there are modules."""
    model = load_requested_model(args)
    stored = model.dtype
    model = model.to(torch.float32).train().requires_grad_(True)
    settings = default_settings("bfloat16" if stored == torch.bfloat16 else "float32")
    size = args.training_batch, args.training_length
    tokens_RBT = random_tokens(model, args.steps, *size, seed=0)
    machine = Machine(stored, model.device)
    contenders = machine.contenders() | training_contenders(model, tokens_RBT, settings)
    if args.against:
        peer = Peer(args.model, model.device, torch.float32)
        contenders |= peer.training_contenders(tokens_RBT, make_autocast(model.device, stored))
    rounds = take_turns(contenders, args.steps, "training")
    speed, figures = machine.speed(rounds), []
    plain, with_mtp = [n for n in rounds if n != WITH_MTP], [n for n in rounds if n == WITH_MTP]
    for mtp, names in ((False, plain), (True, with_mtp)):
        if names:
            work = Work(0.0, 0.0, count_training_operations(model.config, *size, mtp))
            runs = describe_rounds(rounds.only(names), speed, work, tokens_RBT[0].numel())
            figures.append({"batch": size[0], "length": size[1], "mtp": mtp} | runs)
    return figures


def make_autocast(device: torch.device, stored: torch.dtype) -> torch.autocast:
    """Products in bfloat16 if the checkpoint is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=stored == torch.bfloat16)


def default_settings(precision: str) -> argparse.Namespace:
    """The settings of `train`, with a learning rate at which random tokens do no harm."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    required = ["--text", "-", "--out", "-", "--steps", "1000000"]
    return parser.parse_args([*required, "--precision", precision, "--learning-rate", "1e-9"])


def training_contenders(
    model: Transformer, tokens_RBT: Tensor, settings: argparse.Namespace
) -> dict[str, Contender]:
    """The step without MTP losses, which transformers has not, and if possible with them."""
    optimizer = make_optimizer(model, settings.weight_decay)
    documents_BT = torch.zeros_like(tokens_RBT[0])
    modules = model.mtp

    def contender(used: nn.ModuleDict) -> Contender:
        def step(i: int) -> float:
            update = partial(train_step, model, optimizer, tokens_RBT[i], documents_BT, i, settings)
            model.mtp = used
            seconds = clock(model.device, update)
            model.mtp = modules
            return seconds

        return Contender(step)

    with_mtp = {WITH_MTP: contender(modules)} if modules else {}
    return {OURS: contender(nn.ModuleDict())} | with_mtp
