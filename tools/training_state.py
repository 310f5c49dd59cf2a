"""A training run on disk: checkpoints that are whole or absent, and going on from them.

A checkpoint `step-N/` holds the weights, the optimizer's moments and the settings. It is written
under another name, flushed to the disk and renamed, so the last good one survives anything.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling import Transformer

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
    save_file(dict(model.state_dict()), partial / "weights.safetensors")
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
    model.load_state_dict(load_file(checkpoint / "weights.safetensors"))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return saved["step"]
