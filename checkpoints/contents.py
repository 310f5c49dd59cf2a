"""What a checkpoint's files hold, compared with what its config says they should.

Reads headers only. Loading, converting and checking all start from here: loading raises if there is
any error, checking tells all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from modeling import ModelConfig, Transformer

from .config_file import CheckpointError
from .mapping import Entry, Family, Shape, correspondences, filled_in, num_blocks
from .published_config import family_of, read_config
from .storage.shards import Shards, StoredTensor, open_shards, raise_any, some
from .storage.weights import Weight, weights_of


@dataclass
class Contents:
    """Which tensor of the files goes where in the model."""

    model: Transformer  # on the meta device, with the layers and MTP modules to be loaded
    weights: dict[str, Weight]  # all that the files hold, by the names they have unquantised
    entries: list[Entry] = field(default_factory=list)  # what the model is made of
    copies: list[Entry] = field(default_factory=list)  # what may repeat one of those
    heads: list[Entry] = field(default_factory=list)  # of a tied model, where the embedding is one
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # worth telling, and no obstacle

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def shapes(self) -> dict[str, Shape]:
        return shapes_of(self.model)


def compare(
    directory: Path,
    config: ModelConfig,
    shards: Shards,
    mtp: bool = True,
    layers: int | None = None,
) -> Contents:
    """The files of a directory against the config that was read from it.

    mtp: expect the MTP modules; if the files hold none of their tensors, a note says so.
    layers: the model is to have the first so many layers, and no MTP modules. What the files hold
    of the others is left out.
    """
    family = family_of(config, directory)
    weights, errors = weights_of(shards, quantization_in(config))
    model = hollow(config)
    contents = Contents(model, weights, errors=errors)
    if far_too_large := size_error(contents.shapes, shards, directory):
        contents.errors.append(far_too_large)
        return contents
    announced = entries_of(family, model, weights)
    wanted = part_wanted(contents, announced, mtp, layers)
    if wanted is not config:
        contents.model = hollow(wanted)
    contents.entries = correspondences(family.rules, contents.shapes, wanted, weights)
    contents.copies = copied_entries(family, wanted, contents.shapes)
    contents.heads = tied_head_entries(family, wanted, contents.shapes)
    missing, unexpected = name_differences(contents, announced, family)
    if errors or shards.problems:  # what is damaged counts as missing
        missing = []
    if missing or unexpected:
        contents.errors.append(
            f"{directory}: the weights do not fit config.json: "
            f"{len(missing)} tensors are missing ({some(missing)}), "
            f"{len(unexpected)} are unexpected ({some(unexpected)})"
        )
    contents.errors += shape_errors(contents)
    return contents


def hollow(config: ModelConfig) -> Transformer:
    """The model of a description, without memory."""
    with torch.device("meta"):
        return Transformer(config)


def entries_of(
    family: Family, model: Transformer, present: Mapping[str, Weight] | None = None
) -> list[Entry]:
    """Every tensor of a file that holds this model, those that repeat another included.

    present: the weights in the file, which decide between layouts; None for the one to save in.
    """
    shapes = shapes_of(model)
    entries = correspondences(family.rules, shapes, model.config, present)
    return entries + copied_entries(family, model.config, shapes)


def part_wanted(
    contents: Contents, announced: Sequence[Entry], mtp: bool, layers: int | None
) -> ModelConfig:
    """The description of what is to be loaded of what config.json announces."""
    config, count = contents.config, len(contents.config.layers)
    if layers is not None:
        if not 1 <= layers <= count:
            raise ValueError(f"layers = {layers}: the model has 1 to {count} layers to load")
        return replace(without_mtp(config), layers=config.layers[:layers])
    if not config.mtp.blocks:
        return config
    of_modules = {entry.published for entry in announced if is_of_mtp(entry)}
    if mtp and not of_modules.isdisjoint(contents.weights):
        return config
    if mtp:
        contents.notes.append(
            f"the config announces {len(config.mtp.blocks)} MTP module(s) and the files hold none: "
            "loading the model without"
        )
    return without_mtp(config)


def is_of_mtp(entry: Entry) -> bool:
    """A tensor of an MTP module, or one that a module repeats of the main model."""
    return entry.ours[0].startswith("mtp.") or entry.repeats


def read_headers(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, Weight]]:
    """The tensors of a checkpoint as they stand in its files, and the weights that they make up."""
    directory = Path(path)
    config = read_config(directory)
    with open_shards(directory) as shards:
        weights, errors = weights_of(shards, quantization_in(config))
        raise_any(errors)
        return shards.tensors, weights


def quantization_in(config: ModelConfig) -> Mapping:
    published = config.published
    text = published.get("text_config") or {}
    return published.get("quantization_config") or text.get("quantization_config") or {}


def own_state(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors by our names, a shared one once."""
    state = dict(model.state_dict())
    if model.config.tied_embeddings:
        del state["head.weight"]
    return state


def untied(config: ModelConfig) -> ModelConfig:
    published = dict(config.published) | {"tie_word_embeddings": False}
    return replace(config, tied_embeddings=False, published=published)


def shapes_of(model: Transformer) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in own_state(model).items()}


MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")


def without_mtp(config: ModelConfig) -> ModelConfig:
    published = {key: 0 if key in MTP_COUNTS else v for key, v in config.published.items()}
    return replace(config, mtp=replace(config.mtp, blocks=()), published=published)


def copied_entries(family: Family, config: ModelConfig, shapes: dict[str, Shape]) -> list[Entry]:
    """Embedding and head as files repeat them in every MTP module that has none of its own."""
    own = {"embed.weight": config.mtp.own_embedding, "head.weight": config.mtp.own_head}
    copies = []
    for rule in family.copies:
        ours = "embed.weight" if config.tied_embeddings else rule.names[0]
        for layer in range(len(config.layers), num_blocks(config)):
            if not own[rule.names[0]]:
                published = filled_in(rule.published, layer, config)
                copies.append(Entry(published, shapes[ours], (ours,), repeats=True))
    return copies


def tied_head_entries(family: Family, config: ModelConfig, shapes: dict[str, Shape]) -> list[Entry]:
    """The head that a file may hold although the embedding serves as one."""
    rules = family.rules or ()
    heads = [rule.published for rule in rules if rule.names == ("head.weight",)]
    tied = heads if config.tied_embeddings else []
    return [Entry(published, shapes["embed.weight"], ("embed.weight",)) for published in tied]


def size_error(shapes: Mapping[str, Shape], shards: Shards, directory: Path) -> str | None:
    """The config describes vastly more than the files hold: told before every expert is named."""
    described = sum(prod(shape) for shape in shapes.values())
    stored = sum(prod(tensor.shape) for tensor in shards.tensors.values())
    if described <= 1000 * max(stored, 1000):
        return None
    return (
        f"{directory}: config.json describes {described:,} parameters, "
        f"the weight files hold {stored:,}"
    )


def name_differences(
    contents: Contents, announced: Sequence[Entry], family: Family
) -> tuple[list[str], list[str]]:
    """Expected tensors that are not there, and those that are there and not even announced."""
    needed = {entry.published for entry in contents.entries}
    stored = contents.weights.keys()
    missing = sorted(needed - stored)
    besides = {entry.published for entry in [*announced, *contents.copies, *contents.heads]}
    unexpected = [
        name
        for name in sorted(stored - needed - besides)
        if not any(fnmatchcase(name, known) for known in family.ignored)
    ]
    return missing, unexpected


def shape_errors(contents: Contents) -> list[str]:
    """Every tensor has the shape that the config gives it."""
    errors = []
    for entry in contents.entries + contents.copies + contents.heads:
        weight = contents.weights.get(entry.published)
        try:
            if weight is not None and weight.shape != entry.shape:
                errors.append(
                    f"{weight.file}: {entry.published} has shape {list(weight.shape)}, "
                    f"config.json makes it {list(entry.shape)}"
                )
        except CheckpointError as error:  # packed integers keep theirs in a tensor
            errors.append(str(error))
    return errors
