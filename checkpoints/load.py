"""A published checkpoint directory -> a Transformer. Strict: every tensor is there, fits, is used.

Tensor by tensor: each is read from the mapped file into its place, so memory peaks at the weights
plus one tensor.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modeling import ModelConfig, Transformer
from moe import ConfigError

from .config_file import CheckpointError, Fields, read_json
from .families import FAMILIES, MECHANISMS, NOT_YET
from .mapping import Entry, Family, Shape, correspondences
from .shards import READABLE, Shards, open_shards, some


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    progress: bool = True,
) -> Transformer:
    """The model in a checkpoint directory, in eval mode and without gradients.

    dtype: of the weights; None keeps what is stored. A selection bias stays in float32 at least.
    mtp: load the MTP modules. A checkpoint whose config announces them and which holds none of
    their tensors loads without, with a warning.
    Raises CheckpointError (a ValueError) for anything missing, unexpected, misshapen or unknown.
    """
    directory = Path(path)
    config = read_config(directory)
    family = family_of(config, directory)
    with open_shards(directory) as shards:
        config, skipped = with_mtp_as_stored(config, family, shards, mtp)
        with torch.device("meta"):
            model = Transformer(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in own_state(model).items()}
        check_size(shapes, shards, directory)
        entries = correspondences(family.rules, shapes, num_blocks(config), shards.tensors)
        copies = copied_entries(family, config, shapes)
        copies += tied_head_entries(family, config, shapes)
        check_names(entries, copies, skipped, family, shards, directory)
        check_tensors(entries + copies, shards)
        state = fill(entries, shapes, shards, torch.device(device), dtype, progress)
        for copy in copies:
            if copy.published in shards.tensors:
                check_copy(copy, shards.read(copy.published), state)
    if config.tied_embeddings:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if config.tied_embeddings:
        model.head.weight = model.embed.weight
    return model.requires_grad_(False).eval()


def read_config(path: str | Path) -> ModelConfig:
    """The description in a checkpoint directory's config.json, or in such a file."""
    return interpreted(Path(path))[0]


def unread_keys(path: str | Path) -> list[str]:
    """The keys of a config.json that say nothing about the architecture, or nothing we know of."""
    return interpreted(Path(path))[1].unread()


def interpreted(path: Path) -> tuple[ModelConfig, Fields]:
    """A config.json as its family reads it."""
    file = config_path(path)
    fields = Fields(read_json(file))
    name = str(fields.find(["model_type"], "")[1])
    if name in NOT_YET:
        raise CheckpointError(f"{file}: model_type {name} is not supported: {NOT_YET[name]}")
    if name not in FAMILIES:
        near = get_close_matches(name, FAMILIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{file}: model_type {name!r} is not one of {known}{hint}")
    try:
        if quantization := fields.section("quantization_config"):
            method = quantization.raw.get("quant_method")
            raise CheckpointError(
                f"{file}: quantization_config.quant_method {method!r} is not supported: "
                "convert the weights to bfloat16 first"
            )
        config = FAMILIES[name].read_config(fields)
        refuse_unread_mechanisms(fields, name)
        return config, fields
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def refuse_unread_mechanisms(fields: Fields, family: str) -> None:
    """A key that changes the architecture and that the family's adapter did not ask for."""
    for key in fields.unread():
        value = fields.raw[key]
        if key in MECHANISMS and not any(value is o or value == o for o in MECHANISMS[key]):
            raise ConfigError(
                f"{key} = {value!r} changes the model in a way {family} does not have"
            )


def config_path(path: Path) -> Path:
    """Where the config.json of a checkpoint is, or an error that says what is there instead."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_file():
        return path
    file = path / "config.json"
    if not file.is_file():
        found = some(sorted(entry.name for entry in path.iterdir()))
        raise CheckpointError(f"{path}: not a model directory: no config.json; found {found}")
    return file


def family_of(config: ModelConfig, where: object) -> Family:
    """The family that a description was read from."""
    name = str(config.published.get("model_type", ""))
    if name not in FAMILIES:
        raise CheckpointError(
            f"{where}: the model's config.published names no family (model_type {name!r}); "
            f"set it to a config.json of {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


def num_blocks(config: ModelConfig) -> int:
    return len(config.layers) + len(config.mtp)


def own_state(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors by our names, a shared one once."""
    state = dict(model.state_dict())
    if model.config.tied_embeddings:
        del state["head.weight"]
    return state


def without_mtp(config: ModelConfig) -> ModelConfig:
    counts = ("num_nextn_predict_layers", "num_mtp_layers")
    published = {key: 0 if key in counts else v for key, v in config.published.items()}
    return replace(config, mtp=(), published=published)


def with_mtp_as_stored(
    config: ModelConfig, family: Family, shards: Shards, wanted: bool
) -> tuple[ModelConfig, list[str]]:
    """The config with the MTP modules to load, and the names of those in the file to leave out."""
    if not config.mtp:
        return config, []
    prefixes = tuple(f"model.layers.{i}." for i in range(len(config.layers), num_blocks(config)))
    stored = [name for name in shards.tensors if name.startswith(prefixes)]
    if wanted and not stored:
        warnings.warn(
            f"the config announces {len(config.mtp)} MTP module(s) and the files hold none: "
            "loading the model without",
            stacklevel=3,
        )
    return (config, []) if wanted and stored else (without_mtp(config), stored)


def copied_entries(
    family: Family, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> list[Entry]:
    """Embedding and head as files repeat them in every MTP module."""
    copies = []
    for rule in family.copies:
        ours = "embed.weight" if config.tied_embeddings else rule.names[0]
        for layer in range(len(config.layers), num_blocks(config)):
            published = rule.published.replace("{mtp}", str(layer))
            copies.append(Entry(published, shapes[ours], (ours,)))
    return copies


def tied_head_entries(
    family: Family, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> list[Entry]:
    """The head that a file may hold although the embedding serves as one."""
    heads = [rule.published for rule in family.rules if rule.names == ("head.weight",)]
    tied = heads if config.tied_embeddings else []
    return [Entry(published, shapes["embed.weight"], ("embed.weight",)) for published in tied]


def check_size(shapes: Mapping[str, Shape], shards: Shards, directory: Path) -> None:
    """The config describes roughly what the files hold: before a name is made for every expert."""
    described = sum(prod(shape) for shape in shapes.values())
    stored = sum(prod(tensor.shape) for tensor in shards.tensors.values())
    if described > 1000 * max(stored, 1000):
        raise CheckpointError(
            f"{directory}: config.json describes {described:,} parameters, "
            f"the weight files hold {stored:,}"
        )


def check_names(
    entries: list[Entry],
    copies: list[Entry],
    skipped: Iterable[str],
    family: Family,
    shards: Shards,
    directory: Path,
) -> None:
    """Every expected tensor is there, and none besides."""
    needed = {entry.published for entry in entries}
    missing = sorted(needed - shards.tensors.keys())
    allowed = needed | set(skipped) | {copy.published for copy in copies}
    left = sorted(shards.tensors.keys() - allowed)
    unexpected = [n for n in left if not any(fnmatchcase(n, known) for known in family.ignored)]
    if missing or unexpected:
        raise CheckpointError(
            f"{directory}: the weights do not fit config.json: "
            f"{len(missing)} tensors are missing ({some(missing)}), "
            f"{len(unexpected)} are unexpected ({some(unexpected)})"
        )


def check_tensors(entries: list[Entry], shards: Shards) -> None:
    """Every tensor has the shape that the config gives it, and a dtype that can be read."""
    for entry in entries:
        stored = shards.tensors.get(entry.published)
        if stored is None:
            continue
        if stored.shape != entry.shape:
            raise CheckpointError(
                f"{stored.file}: {entry.published} has shape {list(stored.shape)}, "
                f"config.json makes it {list(entry.shape)}"
            )
        if stored.dtype not in READABLE:
            raise CheckpointError(
                f"{stored.file}: {entry.published} is stored as {stored.dtype}; "
                f"supported are {', '.join(READABLE)}"
            )


def fill(
    entries: list[Entry],
    shapes: dict[str, tuple[int, ...]],
    shards: Shards,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: bool,
) -> dict[str, Tensor]:
    """Read every entry into its place among newly made tensors of ours."""
    state = {
        name: torch.empty(shapes[name], dtype=kept, device=device)
        for name, kept in kept_dtypes(entries, shards, dtype).items()
    }
    for entry in tqdm(entries, desc="loading", unit="tensor", disable=None if progress else True):
        entry.put(shards.read(entry.published), state)
    return state


def kept_dtypes(
    entries: list[Entry], shards: Shards, wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Of each tensor of ours: the one wanted, else what holds all that it is stored in."""
    dtypes: dict[str, torch.dtype] = {}
    for entry in entries:
        kept = READABLE[shards.tensors[entry.published].dtype] if wanted is None else wanted
        for name in entry.ours:
            least = torch.float32 if name.endswith("selection_bias") else kept
            dtypes[name] = torch.promote_types(dtypes.get(name, least), kept)
    return dtypes


def check_copy(copy: Entry, stored: Tensor, state: dict[str, Tensor]) -> None:
    """Warn when a tensor that should repeat another one does not."""
    (own,) = copy.parts(state)
    if not torch.equal(stored.to(own), own):
        warnings.warn(
            f"{copy.published} differs from the tensor it repeats: not used", stacklevel=3
        )
