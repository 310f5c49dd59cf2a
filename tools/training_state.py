"""A training run on disk: what it starts from, checkpoints that are whole or absent, its result.

A checkpoint `step-N/` holds the weights, the optimizer's moments and the settings. It is written
under another name, flushed to the disk and renamed, so the last good one survives anything.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import Tokenizer, companions, load_tokenizer, own_state, save_model
from modeling import Transformer

from .corpus import train_vocabulary

KEPT = 2  # checkpoints


def checkpoints_in(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(out.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(
    out: Path,
    step: int,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    schedule: tuple[int, int],
) -> None:
    """Write step-N, then remove all but the newest checkpoints.

    schedule: the step from which on the learning rate falls, and the step at which the run ends.
    """
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
    training = {"step": step, "schedule": schedule, "settings": settings}
    (partial / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    for file in partial.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in checkpoints_in(out)[:-KEPT]:
        shutil.rmtree(old)


def restore(
    checkpoint: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    schedule: tuple[int, int],
) -> int:
    """Put a checkpoint's state into model and optimizer; returns the step to go on with.

    Before its learning rate falls a run may be given another end, and a finished one may be
    lengthened (its learning rate then rises again and falls once more). Raises ValueError if the
    checkpoint was made with other settings, or in the middle of another fall.
    """
    saved = json.loads((checkpoint / "training.json").read_text())
    fell, end = saved["schedule"]
    if schedule != (fell, end) and saved["step"] > min(fell, schedule[0]) and saved["step"] < end:
        raise ValueError(
            f"{checkpoint}: its learning rate falls from step {fell} to {end}, and would from "
            f"{schedule[0]} to {schedule[1]}: give the same --steps and --decay-steps"
        )
    for name, value in saved["settings"].items():
        if settings.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{checkpoint}: made with {flag} {value}, not {settings.get(name)}")
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
    return saved["step"]


def vocabulary(out: Path, text: str, num_pieces: int) -> Tokenizer:
    """The run's tokenizer, trained on its first start."""
    path = out / "tokenizer.model"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_bytes(train_vocabulary(text, num_pieces))
        # the text is one long stream: no sequence of it begins with a BOS
        (out / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}) + "\n")
        partial.replace(path)
    return load_tokenizer(out)


def keep_lines(path: Path, num_lines: int) -> None:
    """Drop log lines of steps that a resumed run will take again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:num_lines]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)


@torch.no_grad()
def take_over(model: Transformer, there: Transformer, start: Path) -> dict[str, torch.dtype]:
    """Put the weights of the checkpoint at `start` into a model that may have more MTP modules.

    Returns the dtypes that they are stored in.
    """
    if replace(there.config, mtp=model.config.mtp) != model.config:
        raise ValueError(f"{start}: is another model than --config: only MTP modules may differ")
    state = there.state_dict()
    result = model.load_state_dict(state, strict=False)
    if result.unexpected_keys:
        raise ValueError(f"{start}: has MTP modules or tensors of them that --config has not")
    if result.missing_keys:
        print(f"note: {len(result.missing_keys)} tensors of MTP modules are new", file=sys.stderr)
    own = there.dtype
    return {**dict.fromkeys(result.missing_keys, own), **{n: x.dtype for n, x in state.items()}}


def write_model(
    out: Path,
    model: Transformer,
    dtypes: Mapping[str, torch.dtype],
    start: Path | None,
    to: str | None,
) -> Path:
    """The trained model with its tokenizer.

    dtypes: those that parameters are stored in; bfloat16 where nothing is said. to: as of
    `save_model`.
    """
    final, fresh = out / "model", out / "model.new"
    shutil.rmtree(fresh, ignore_errors=True)
    stored = copy.deepcopy(model)
    for name, parameter in stored.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, torch.bfloat16))
    save_model(stored, fresh, to=to)
    ours = [out / name for name in ("tokenizer.model", "tokenizer_config.json")]
    for file in ours if start is None else companions(start):
        shutil.copy(file, fresh)
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
    return final
