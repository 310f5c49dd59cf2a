"""A Transformer -> the published layout of its family: config.json, safetensors, an index."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modeling import Transformer
from moe import ConfigError

from .config_file import CheckpointError, Fields
from .contents import copied_entries, own_state
from .mapping import Entry, correspondences
from .published_config import family_of
from .storage.writing import FP8, FP8_CONFIG, Planned, write_checkpoint


def save_model(
    model: Transformer,
    path: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model, MTP modules included, as its family publishes it.

    dtype: None keeps that of the weights; torch.float8_e4m3fn stores every matrix inside the
    blocks (not routers, embedding and head) in FP8 with a scale per block of 128 x 128. A selection
    bias keeps its own. The family and every field that the model does not need are those of
    `config.published`. Raises CheckpointError if `path` exists and is not empty, or if
    `config.published` does not describe this model.
    """
    config_json = published_config(model, dtype)
    state = own_state(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    family = family_of(model.config, path)
    entries = correspondences(family.rules, shapes, model.config)
    entries += copied_entries(family, model.config, shapes)

    def planned(entry: Entry) -> Planned:
        ours, own = entry.ours[0], state[entry.ours[0]].dtype
        kept = stored_dtype(ours, entry.published, entry.shape, own, dtype)
        return Planned(entry.published, entry.shape, kept, lambda: entry.take(state))

    tensors = [planned(entry) for entry in entries]
    write_checkpoint(Path(path).resolve(), config_json, tensors, max_shard_bytes)


MATRICES = re.compile(  # of ours: what FP8 checkpoints store in blocks
    r".*\.(attention\.(q|k|v|o|q\.compress|q\.expand|kv_compress|kv_expand)\.weight"
    r"|feed_forward\.(shared\.)?(gate|up|down)\.weight"
    r"|experts\.(gate|up|down))"
)


def stored_dtype(
    ours: str | None,
    published: str,
    shape: tuple[int, ...],
    own: torch.dtype,
    wanted: torch.dtype | None,
) -> torch.dtype:
    """The dtype that a tensor is written in: `wanted`, where that makes sense for it.

    ours: our name of it, None for a tensor that is no part of the model.
    """
    if wanted is None or (ours or "").endswith("selection_bias") or not own.is_floating_point:
        return own
    if wanted != FP8:
        return wanted
    if ours is None or not MATRICES.fullmatch(ours):
        return own
    if len(shape) != 2:
        raise CheckpointError(
            f"{published} holds the matrices of all experts of a layer in one tensor: FP8 blocks "
            "are defined for one matrix; choose another dtype"
        )
    return FP8


def published_config(model: Transformer, dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json: what the model was read from, with the dtype that it is written in."""
    family = family_of(model.config, "save_model")
    try:
        described = family.read_config(Fields(model.config.published))
    except ConfigError as error:
        raise CheckpointError(f"the model's config.published: {error}") from None
    if described != model.config:
        raise CheckpointError("config.published does not describe this model: make them agree")
    return with_dtype(model.config.published, model.dtype, dtype)


def with_dtype(
    published: Mapping[str, Any], own: torch.dtype, wanted: torch.dtype | None
) -> dict[str, Any]:
    """A config.json that says how the weights are stored now: dtype, quantisation."""
    changed = {key: value for key, value in published.items() if key != "quantization_config"}
    plain = own if wanted in (None, FP8) else wanted
    known = [key for key in ("dtype", "torch_dtype") if key in published]
    changed |= dict.fromkeys(known or ["torch_dtype"], str(plain).removeprefix("torch."))
    if isinstance(text := published.get("text_config"), dict):
        changed["text_config"] = with_dtype(text, own, None if wanted == FP8 else wanted)
    if wanted == FP8:
        changed["quantization_config"] = FP8_CONFIG
    return changed
