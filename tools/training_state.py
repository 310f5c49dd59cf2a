"""A training run on disk: its start, its checkpoints and its result.

A checkpoint `step-N/` holds the weights, the optimizer's moments and the description of the run:
its settings, and hashes of the contents that it began with. It is written under another name,
flushed to the disk and renamed, so it is never incomplete, and an interruption leaves the last one
intact.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from checkpoints import (
    Tokenizer,
    companions,
    load_tokenizer,
    own_state,
    read_config,
    save_model,
)
from modeling import Transformer

from .corpus import train_vocabulary

CHECKPOINTS_KEPT = 2  # the newest ones
READ_BYTES = 2**24  # at once, for a hash


@dataclass(frozen=True)
class Run:
    """What a checkpoint tells of its run, and what a resumed run is compared by.

    settings: those that must not change. contents: a hash for each option that names a file or a
    directory. schedule: the step at which the learning rate starts to fall, and that at which the
    run ends. tokens: a hash of the training text's tokens, which tells of another tokenizer.
    """

    settings: dict[str, Any]
    contents: dict[str, str | None]
    schedule: tuple[int, int]
    tokens: str = ""


def hash_tokens(tokens_N: Tensor) -> str:
    return sha256(tokens_N.numpy().tobytes()).hexdigest()


def hash_contents(text: str, config: Path, start: Path | None) -> dict[str, str | None]:
    """The SHA-256 of what a run begins with, wherever it is stored.

    text: decoded. config: a config.json or its directory; its values are hashed. start: a
    checkpoint directory, of which config.json and the weight files are hashed.
    """
    return {
        "text": sha256(text.encode()).hexdigest(),
        "start_from": None if start is None else hash_checkpoint(start),
        "config": hash_config(config),
    }


def hash_config(path: Path) -> str:
    values = dict(read_config(path).published)
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def hash_checkpoint(directory: Path) -> str:
    total = sha256(hash_config(directory).encode())
    files = sorted(directory.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    bar = tqdm(total=size, desc="hashing", unit="B", unit_scale=True, file=sys.stderr, disable=None)
    with bar:
        for file in files:
            own = sha256()
            with file.open("rb") as opened:
                while chunk := opened.read(READ_BYTES):
                    own.update(chunk)
                    bar.update(len(chunk))
            total.update(f"{file.name} {own.hexdigest()}\n".encode())
    return total.hexdigest()


def find_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(out.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(
    out: Path,
    step: int,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    run: Run,
) -> None:
    """Write step-N, then remove all but the newest checkpoints."""
    partial, final = out / f"step-{step}.partial", out / f"step-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(own_state(model), partial / "weights.safetensors")
    moments = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, partial / "optimizer.safetensors")
    training = {"step": step} | asdict(run)
    (partial / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    for file in partial.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in find_checkpoints(out)[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old)


def find_step(checkpoint: Path, run: Run) -> int:
    """The step with which `run` continues the run of a checkpoint.

    A run may get another schedule before its learning rate falls, or after its end, to lengthen it
    (the learning rate then rises again and falls once more). Raises ValueError if the settings or
    contents differ from those of the checkpoint, or if the schedule differs and the learning rate
    has begun to fall by one of the two.
    """
    saved = json.loads((checkpoint / "training.json").read_text())
    if "contents" not in saved:
        raise ValueError(
            f"{checkpoint}: its training.json lacks the hashes of text, config and weights: an "
            "older version wrote it, which alone can resume it; choose another --out"
        )
    (fall, end), step = saved["schedule"], saved["step"]
    if run.schedule != (fall, end) and min(fall, run.schedule[0]) < step < end:
        raise ValueError(
            f"{checkpoint}: its learning rate falls from step {fall} to {end}, but in these "
            f"settings from {run.schedule[0]} to {run.schedule[1]}: give the same --steps and "
            "--decay-steps"
        )
    if step > run.schedule[1]:
        raise ValueError(f"{checkpoint}: its step is larger than --steps {run.schedule[1]}")
    for name, value in saved["settings"].items():
        if run.settings.get(name) != value:
            found = run.settings.get(name)
            raise ValueError(f"{checkpoint}: made with {flag_of(name)} {value}, not {found}")
    for name, value in saved["contents"].items():
        if run.contents[name] != value:
            made = "without" if value is None else "with other contents of"
            raise ValueError(
                f"{checkpoint}: made {made} {flag_of(name)}, by the SHA-256 of what is given now: "
                "give what the run began with, or begin another run in another --out"
            )
    return step


def check_tokens(checkpoint: Path, run: Run) -> None:
    """Raise ValueError if the tokenizer gives other tokens than when the checkpoint was made."""
    saved = json.loads((checkpoint / "training.json").read_text())
    if saved["tokens"] != run.tokens:
        raise ValueError(
            f"{checkpoint}: the tokenizer gives other tokens than before: give the one that the "
            "run began with, or begin another run in another --out"
        )


def flag_of(name: str) -> str:
    """The option that sets an argument of this name."""
    return "--" + name.replace("_", "-")


def restore_checkpoint(
    checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer
) -> None:
    """Load the weights and the optimizer's moments of a checkpoint."""
    weights = load_file(checkpoint / "weights.safetensors")
    if model.config.tied_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    model.load_state_dict(weights)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def make_tokenizer(out: Path, text: str, num_pieces: int, resumed: bool) -> Tokenizer:
    """The run's tokenizer; it is trained on `text` unless a run is resumed."""
    path = out / "tokenizer.model"
    if not (resumed and path.exists()):
        partial = path.with_suffix(".partial")
        partial.write_bytes(train_vocabulary(text, num_pieces))
        # the text is one long stream: no sequence in it starts with a BOS token
        (out / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}) + "\n")
        partial.replace(path)
    return load_tokenizer(out)


def truncate_log(path: Path, num_lines: int) -> None:
    """Keep the first lines only: a resumed run repeats the steps of the others."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:num_lines]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)


@torch.no_grad()
def load_start_weights(
    model: Transformer, start_model: Transformer, start: Path
) -> dict[str, torch.dtype]:
    """Copy the weights of `start_model` into a model that may have more MTP modules.

    start: the checkpoint directory of `start_model`, for messages. Returns the dtype in which each
    tensor is to be stored. Raises ValueError if more than the MTP modules differs, or if `start`
    has MTP tensors that `model` lacks.
    """
    if replace(start_model.config, mtp=model.config.mtp) != model.config:
        raise ValueError(f"{start}: differs from --config; only the MTP modules may differ")
    state = start_model.state_dict()
    result = model.load_state_dict(state, strict=False)
    if result.unexpected_keys:
        raise ValueError(f"{start}: has MTP tensors that a model of --config does not have")
    if result.missing_keys:
        print(f"note: {len(result.missing_keys)} tensors of MTP modules are new", file=sys.stderr)
    dtypes = dict.fromkeys(result.missing_keys, start_model.dtype)
    return dtypes | {name: tensor.dtype for name, tensor in state.items()}


def write_model(
    out: Path,
    model: Transformer,
    dtypes: Mapping[str, torch.dtype],
    start: Path | None,
    to: str | None,
) -> Path:
    """Write the trained model with its tokenizer; return its directory.

    dtypes: of the stored parameters, by name; the others are stored in bfloat16. start: the
    checkpoint that training started from, whose tokenizer and other files are copied; None: the
    run's own tokenizer is copied. to: as in `save_model`.
    """
    final, partial = out / "model", out / "model.new"
    shutil.rmtree(partial, ignore_errors=True)
    stored = copy.deepcopy(model)
    for name, parameter in stored.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, torch.bfloat16))
    save_model(stored, partial, to=to)
    own_files = [out / name for name in ("tokenizer.model", "tokenizer_config.json")]
    for file in own_files if start is None else companions(start):
        shutil.copy(file, partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final
