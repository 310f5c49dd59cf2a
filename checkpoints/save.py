"""A Transformer -> a checkpoint directory, in the layout of its family or in our own format.

All tensors, with their names and dtypes, are planned before anything is written, so a model that
cannot be saved leaves nothing behind.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling import ModelConfig, QuantizedMatrix, QuantizedWeight, Transformer
from moe import ConfigError

from .config_file import CheckpointError, Fields
from .contents import build_on_meta, find_shared_parameters, list_entries, own_state
from .families import native
from .mapping import Entry, Family
from .precision import Precision
from .published_config import find_family
from .storage.quantization_config import make_config
from .storage.shards import INTEGERS, READABLE, list_some
from .storage.writing import FP8, FP8_CONFIG, PlannedTensor, plan_packed, write_checkpoint

NATIVE_HINT = f'save_model(model, path, to="{native.MODEL_TYPE}") writes it in our own format'


def save_model(
    model: Transformer,
    path: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    to: str | None = None,
    progress: bool = True,
) -> None:
    """Write the model, with its MTP modules, to a new directory.

    dtype: of the stored weights; None keeps theirs. torch.float8_e4m3fn stores every matrix inside
    the blocks (not routers, embedding and head) in FP8, with a scale per block of 128 x 128. The
    tensors that a module calls `exact` keep their dtype.
    to: "abacus" for our own format, which can hold every model; None for the layout of the family
    in `config.published`, or for our own format if that is empty.
    A model that was loaded with `quantize` keeps its codes, as packed integers of compressed-
    tensors; layouts that hold all experts in one tensor cannot store those.
    Raises CheckpointError if `path` exists and is not empty, or if the model differs from what its
    config or `config.published` describes.
    """
    config_json, tensors = plan_checkpoint(model, dtype, to)
    directory = Path(path).resolve()
    write_checkpoint(directory, config_json, tensors, max_shard_bytes, progress=progress)


def plan_checkpoint(
    model: Transformer, dtype: torch.dtype | None = None, to: str | None = None
) -> tuple[dict[str, Any], list[PlannedTensor]]:
    """The config.json and the tensors that `save_model` writes; raises the same errors."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    family, config_json = choose_layout(model.config, to)
    described, (state, quantized) = build_on_meta(model.config), split_state(model)
    check_tensors(state, own_state(described))
    check_shared_parameters(model, described)
    precision = Precision(described, dtype, stacks=family.rules is None)
    whole = WholeTensors(state)
    try:
        entries = list_entries(family, described)
    except ValueError as error:
        raise CheckpointError(f"{error}; {NATIVE_HINT}") from None
    tensors: list[PlannedTensor] = []
    schemes = {}
    for entry in entries:
        ours = entry.ours[0]
        if ours in quantized:
            weight = take_matrix(entry, quantized[ours], dtype)
            schemes[entry.published] = weight.form
            tensors += plan_packed(entry.published, weight)
            continue
        kept = precision.choose(ours, entry.published, entry.shape, state[ours].dtype)
        make = partial(entry.take, whole)
        tensors.append(PlannedTensor(entry.published, entry.shape, kept, make))
    config_json = update_dtype(config_json, model.dtype, dtype)
    if schemes:
        plain = {e.published for e in entries if len(e.shape) == 2} - schemes.keys()
        config_json["quantization_config"] = make_config(schemes, plain)
    return config_json, tensors


def split_state(model: Transformer) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """The model's tensors by our names, quantised ones on the meta device; and those, as held."""
    modules = model.named_modules()
    held = {path: module for path, module in modules if isinstance(module, QuantizedWeight)}
    state = own_state(model)
    for name, weight in held.items():
        for part in weight.state_dict():
            del state[f"{name}.{part}"]
        state[name] = torch.empty(weight.shape, dtype=weight.scale.dtype, device="meta")
    return state, held


def take_matrix(
    entry: Entry, weight: QuantizedWeight, dtype: torch.dtype | None
) -> QuantizedMatrix:
    """The matrix of an entry; CheckpointError if its codes cannot be stored as they are."""
    advice = "load the model without quantize and save that"
    if dtype is not None:
        raise CheckpointError(f"dtype = {dtype}: the model is quantised: {advice}")
    if weight.scale.dtype == torch.float64:
        raise CheckpointError(f"{entry.published} has scales in float64: {advice}")
    if len(entry.shape) != 2 or entry.pattern is not None:
        raise CheckpointError(
            f"{entry.published} holds several matrices in one tensor, which packed integers cannot "
            f"store: {advice}"
        )
    return weight.matrix if entry.expert is None else weight[entry.expert]


def check_format(to: str | None) -> None:
    if to not in (None, native.MODEL_TYPE):
        raise ValueError(f"to = {to!r}: expected None or {native.MODEL_TYPE!r}")


def choose_layout(config: ModelConfig, to: str | None) -> tuple[Family, dict[str, Any]]:
    """The family whose layout a model is written in, and its config.json."""
    check_format(to)
    family = (
        native.make_family() if to or not config.published else find_family(config, "save_model")
    )
    if family.rules is None:
        return family, make_native_json(config)
    try:
        described = family.read_config(Fields(config.published))
    except ConfigError as error:
        raise CheckpointError(f"the model's config.published: {error}; {NATIVE_HINT}") from None
    if found := list(find_differences(config, described)):
        raise CheckpointError(
            f"config.published describes another model: {list_some(found, separator='; ')}. "
            f"Make them agree, or {NATIVE_HINT}"
        )
    return family, dict(config.published)


def make_native_json(config: ModelConfig) -> dict[str, Any]:
    """config.json in our own format, with the token ids of the published one."""
    try:
        described = native.write_config(config)
    except ConfigError as error:
        raise CheckpointError(f"the model's config: {error}") from None
    text = config.published.get("text_config") or {}
    ids = {key: value for key, value in text.items() if key.endswith("_token_id")}
    ids |= {key: value for key, value in config.published.items() if key.endswith("_token_id")}
    return described | ids


def find_differences(mine: object, other: object, where: str = "") -> Iterator[str]:
    """Yield each field in which two descriptions differ."""
    if is_dataclass(mine) and type(mine) is type(other):
        for field in fields(mine):
            if field.compare:
                pair = getattr(mine, field.name), getattr(other, field.name)
                yield from find_differences(*pair, f"{where}.{field.name}".lstrip("."))
    elif isinstance(mine, tuple) and isinstance(other, tuple) and len(mine) == len(other):
        for i, pair in enumerate(zip(mine, other, strict=True)):
            yield from find_differences(*pair, f"{where}[{i}]")
    elif isinstance(mine, tuple) and isinstance(other, tuple):
        yield f"{where} has {len(mine)} elements here and {len(other)} as published"
    elif mine != other:
        yield f"{where} is {mine!r:.80} here and {other!r:.80} as published"


def check_tensors(state: Mapping[str, Tensor], described: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the model has the tensors that its config describes."""
    found = [f"{name} is not in the config" for name in sorted(state.keys() - described.keys())]
    found += [f"{name} is missing" for name in sorted(described.keys() - state.keys())]
    found += [
        f"{name} has shape {list(tensor.shape)}, expected {list(described[name].shape)}"
        for name, tensor in state.items()
        if name in described and tensor.shape != described[name].shape
    ]
    found += [
        f"{name} is {tensor.dtype}, built as {described[name].dtype}"
        for name, tensor in state.items()
        if name in described and not has_stored_dtype(tensor, described[name])
    ]
    if found:
        raise CheckpointError(
            f"the model differs from model.config: {list_some(found, separator='; ')}. "
            "Merge adapters before saving; if you changed the model's parts, change its config too "
            "(MTP modules are numbered on from the main layers: mtp.3 follows layers.2)"
        )


def has_stored_dtype(tensor: Tensor, described: Tensor) -> bool:
    """Whether a tensor can be stored, and loaded into one like `described`."""
    if tensor.is_floating_point():
        return tensor.dtype in READABLE.values() and described.is_floating_point()
    return tensor.dtype in INTEGERS.values() and tensor.dtype == described.dtype


def check_shared_parameters(model: Transformer, described: Transformer) -> None:
    """Raise CheckpointError if loading would separate parameters that are one, or join others.

    described: the model as it is built for loading.
    """
    if model.device.type == "meta":
        raise CheckpointError("the model is on the meta device: it has no weights to save")
    rebuilt = find_shared_parameters(described)
    for name, other in find_shared_parameters(model).items():
        if name not in rebuilt:
            raise CheckpointError(
                f"{name} and {other} are one parameter, and would be two when loaded: give each "
                "module its own"
            )
    state = model.state_dict(keep_vars=True)
    for name, other in rebuilt.items():
        one = state[name] is state[other]
        if not one and not torch.equal(state[name], state[other]):
            raise CheckpointError(
                f"{name} differs from {other}, and would be the same when loaded: if this is the "
                "head, set tied_embeddings=False in model.config"
            )


class WholeTensors(Mapping[str, Tensor]):
    """A model's tensors; those that `fully_shard` has sharded are gathered when they are read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self._gathered: tuple[str, Tensor] | None = None  # the last: experts share one

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.state[name]
        if not hasattr(tensor, "full_tensor"):
            return tensor
        if self._gathered is None or self._gathered[0] != name:
            self._gathered = name, tensor.full_tensor()
        return self._gathered[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def update_dtype(
    published: Mapping[str, Any], own: torch.dtype, wanted: torch.dtype | None
) -> dict[str, Any]:
    """A config.json with the dtype and the quantisation that the weights are stored in."""
    changed = {key: value for key, value in published.items() if key != "quantization_config"}
    plain = own if wanted in (None, FP8) else wanted
    known = [key for key in ("dtype", "torch_dtype") if key in published]
    changed |= dict.fromkeys(known or ["torch_dtype"], str(plain).removeprefix("torch."))
    if isinstance(text := published.get("text_config"), dict):
        changed["text_config"] = update_dtype(text, own, None if wanted == FP8 else wanted)
    if wanted == FP8:
        changed["quantization_config"] = FP8_CONFIG
    return changed
