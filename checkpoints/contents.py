"""Compares what the files of a checkpoint hold with what its config describes.

Only headers are read. Loading, converting and verifying start from this comparison: loading and
converting raise its errors, and `verify` lists them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling import ModelConfig, Transformer

from .config_file import CheckpointError, Fields
from .mapping import Entry, Family, Shape, apply_rules, count_blocks, fill_template
from .published_config import find_family, find_quantization_config, read_config
from .storage.shards import Shards, StoredTensor, list_some, open_shards, raise_any
from .storage.weights import Weight, find_weights


@dataclass
class Contents:
    """Which tensor of the files belongs where in the model, and what does not fit."""

    model: Transformer  # on the meta device, with the layers and MTP modules to be loaded
    weights: dict[str, Weight]  # all weights in the files, by the names they have unquantised
    entries: list[Entry] = field(default_factory=list)  # the tensors that the model needs
    copies: list[Entry] = field(default_factory=list)  # tensors that may repeat one of those
    heads: list[Entry] = field(default_factory=list)  # heads that a tied model may be stored with
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # findings that do not prevent loading

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def shapes(self) -> dict[str, Shape]:
        return list_shapes(self.model)


def compare_files(
    directory: Path,
    config: ModelConfig,
    shards: Shards,
    mtp: bool = True,
    layers: int | None = None,
) -> Contents:
    """Compare the files of a directory with the config that was read from it.

    mtp: include the MTP modules; if the files hold no tensor of them, a note says so.
    layers: include only the first `layers` layers, and no MTP modules; tensors of the other layers
    may be in the files.
    """
    family = find_family(config, directory)
    try:
        model = build_on_meta(config)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    quantization = find_quantization_config(Fields(config.published))
    weights, errors = find_weights(shards, quantization, find_integers(model))
    contents = Contents(model, weights, errors=errors)
    if far_too_large := check_size(contents.shapes, shards, directory):
        contents.errors.append(far_too_large)
        return contents
    announced = list_entries(family, model, weights)
    wanted = select_part(contents, announced, mtp, layers)
    if wanted is not config:
        contents.model = build_on_meta(wanted)
    contents.entries = apply_rules(family.rules, contents.shapes, wanted, weights)
    contents.copies = list_copies(family, wanted, contents.shapes)
    contents.heads = list_tied_heads(family, wanted, contents.shapes)
    missing, unexpected = compare_names(contents, announced, family)
    if errors or shards.problems:  # a damaged tensor is reported once, not as missing too
        missing = []
    if missing or unexpected:
        contents.errors.append(
            f"{directory}: the weights do not fit config.json: "
            f"{len(missing)} tensors are missing ({list_some(missing)}), "
            f"{len(unexpected)} are unexpected ({list_some(unexpected)})"
        )
    contents.errors += check_shapes(contents)
    return contents


def build_on_meta(config: ModelConfig) -> Transformer:
    """Build the model on the meta device, where it takes no memory.

    Raises CheckpointError if it cannot be built there, or has tensors that no file would hold.
    """
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"the model cannot be built on the meta device, where no value can be read: {reason}"
        ) from error
    saved = model.state_dict()
    for path, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        if not module._forward_pre_hooks:  # which may set attributes anew, as weight_norm does
            own |= vars(module)
        for name, value in own.items():
            if isinstance(value, Tensor) and f"{path}.{name}".lstrip(".") not in saved:
                raise CheckpointError(
                    f"{path}.{name} is in no file, so it cannot be loaded: make it a persistent "
                    "buffer, or compute it in forward"
                )
    return model


def find_shared_parameters(model: Transformer) -> dict[str, str]:
    """{a name: the first name} of parameters that several modules share, as a tied head."""
    first: dict[nn.Parameter, str] = {}
    shared = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if first.setdefault(parameter, full) != full:
                shared[full] = first[parameter]
    return shared


def find_integers(model: Transformer) -> dict[str, torch.dtype]:
    """The dtypes, by our names, of the tensors that hold whole numbers or flags."""
    state = own_state(model)
    return {name: x.dtype for name, x in state.items() if not x.is_floating_point()}


def list_entries(
    family: Family, model: Transformer, present: Mapping[str, Weight] | None = None
) -> list[Entry]:
    """An entry for every tensor of a file that holds this model, and for those that repeat one.

    present: the weights in the file, which decide between layouts; None: the layout to save in.
    """
    shapes = list_shapes(model)
    entries = apply_rules(family.rules, shapes, model.config, present)
    return entries + list_copies(family, model.config, shapes)


def select_part(
    contents: Contents, announced: Sequence[Entry], mtp: bool, layers: int | None
) -> ModelConfig:
    """The config of the part to load: all of it, its first layers, or all but the MTP modules."""
    config, count = contents.config, len(contents.config.layers)
    if layers is not None:
        if not 1 <= layers <= count:
            raise ValueError(f"layers = {layers}: must be from 1 to {count}, which the model has")
        return replace(remove_mtp(config), layers=config.layers[:layers])
    if not config.mtp.blocks:
        return config
    of_modules = {entry.published for entry in announced if belongs_to_mtp(entry)}
    if mtp and not of_modules.isdisjoint(contents.weights):
        return config
    if mtp:
        contents.notes.append(
            f"the config announces {len(config.mtp.blocks)} MTP module(s) and the files hold none: "
            "the model is loaded without them"
        )
    return remove_mtp(config)


def belongs_to_mtp(entry: Entry) -> bool:
    """Whether an entry is a tensor of an MTP module, or a copy that is stored with one."""
    return entry.ours[0].startswith("mtp.") or entry.repeats


def read_headers(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, Weight]]:
    """Read the tensors of a checkpoint as stored, and the weights that they make up."""
    directory = Path(path)
    config = read_config(directory)
    with open_shards(directory) as shards:
        quantization = find_quantization_config(Fields(config.published))
        integers = find_integers(build_on_meta(config))
        weights, errors = find_weights(shards, quantization, integers)
        raise_any(errors)
        return shards.tensors, weights


def own_state(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors by our names; a shared tensor appears once."""
    state = dict(model.state_dict())
    if model.config.tied_embeddings:
        del state["head.weight"]
    return state


def list_shapes(model: Transformer) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in own_state(model).items()}


MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")


def remove_mtp(config: ModelConfig) -> ModelConfig:
    published = {key: 0 if key in MTP_COUNTS else v for key, v in config.published.items()}
    return replace(config, mtp=replace(config.mtp, blocks=()), published=published)


def list_copies(family: Family, config: ModelConfig, shapes: dict[str, Shape]) -> list[Entry]:
    """Entries for the embedding and head that files repeat in MTP modules without their own."""
    own = {"embed.weight": config.mtp.own_embedding, "head.weight": config.mtp.own_head}
    copies = []
    for rule in family.copies:
        ours = "embed.weight" if config.tied_embeddings else rule.names[0]
        for layer in range(len(config.layers), count_blocks(config)):
            if not own[rule.names[0]]:
                published = fill_template(rule.published, layer, config)
                copies.append(Entry(published, shapes[ours], (ours,), repeats=True))
    return copies


def list_tied_heads(family: Family, config: ModelConfig, shapes: dict[str, Shape]) -> list[Entry]:
    """Entries for the head that a file may hold although the model is tied to its embedding."""
    rules = family.rules or ()
    heads = [rule.published for rule in rules if rule.names == ("head.weight",)]
    tied = heads if config.tied_embeddings else []
    return [Entry(published, shapes["embed.weight"], ("embed.weight",)) for published in tied]


def check_size(shapes: Mapping[str, Shape], shards: Shards, directory: Path) -> str | None:
    """An error if the config describes far more than the files hold, before experts are listed."""
    described = sum(prod(shape) for shape in shapes.values())
    stored = sum(prod(tensor.shape) for tensor in shards.tensors.values())
    if described <= 1000 * max(stored, 1000):
        return None
    return (
        f"{directory}: config.json describes {described:,} parameters, "
        f"the weight files hold {stored:,}"
    )


def compare_names(
    contents: Contents, announced: Sequence[Entry], family: Family
) -> tuple[list[str], list[str]]:
    """The missing tensors, and those in the files that the config does not announce."""
    needed = {entry.published for entry in contents.entries}
    stored = contents.weights.keys()
    missing = sorted(needed - stored)
    allowed = {entry.published for entry in [*announced, *contents.copies, *contents.heads]}
    unexpected = [
        name
        for name in sorted(stored - needed - allowed)
        if not any(fnmatchcase(name, known) for known in family.ignored)
    ]
    return missing, unexpected


def check_shapes(contents: Contents) -> list[str]:
    """An error for each tensor whose shape is not the one that the config gives it."""
    errors = []
    for entry in contents.entries + contents.copies + contents.heads:
        weight = contents.weights.get(entry.published)
        try:
            if weight is not None and weight.shape != entry.shape:
                errors.append(
                    f"{weight.file}: {entry.published} has shape {list(weight.shape)}, "
                    f"config.json makes it {list(entry.shape)}"
                )
        except CheckpointError as error:  # the shape of packed integers is stored in a tensor
            errors.append(str(error))
    return errors
