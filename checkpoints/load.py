"""A checkpoint directory -> a Transformer. Strict: every tensor is there, fits, is used.

Tensor by tensor: each is read from the mapped file into its place, dequantised on the way, so
memory peaks at the weights plus one tensor.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modeling import ModelConfig, Transformer

from .contents import Contents, compare, hollow
from .mapping import Entry
from .precision import exact_names
from .published_config import read_config
from .storage.shards import READABLE, Shards, open_shards, raise_any


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    layers: int | None = None,
    classes: Sequence[type] = (),
    progress: bool = True,
) -> Transformer:
    """The model in a checkpoint directory, in eval mode and without gradients.

    dtype: of the weights; None keeps what is stored, and makes bfloat16 of quantised weights. What
    a part of the model calls `exact`, like a selection bias, stays in float32 at least.
    mtp: load the MTP modules. A checkpoint whose config announces them and which holds none of
    their tensors loads without, with a warning.
    layers: load the first so many layers only, without MTP modules.
    classes: config classes from outside the package that a file in our own format may name.
    Raises CheckpointError (a ValueError) for anything missing, unexpected, misshapen or unknown.
    """
    directory = Path(path)
    config = read_config(directory, classes)
    with open_shards(directory) as shards:
        contents = compare(directory, config, shards, mtp, layers)
        raise_any(contents.errors)
        for note in contents.notes:
            warnings.warn(note, stacklevel=2)
        state = fill(contents, shards, torch.device(device), dtype, progress)
        for copy in contents.copies:
            if differing(copy, contents, shards, state[copy.ours[0]]) is not None:
                told = (
                    f"{copy.published} differs from the tensor it repeats: not used; "
                    "mtp_own_embedding or mtp_own_head in config.json would"
                )
                warnings.warn(told, stacklevel=2)
        model = contents.model
        for entry in contents.heads:
            if (head := differing(entry, contents, shards, state["embed.weight"])) is not None:
                told = f"{entry.published} differs from the embedding that config.json ties it to: "
                warnings.warn(told + "used as it is stored", stacklevel=2)
                embed = state["embed.weight"]
                model, state["head.weight"] = hollow(untied(model.config)), head.to(embed)
    state.setdefault("head.weight", state["embed.weight"])
    model.load_state_dict(state, strict=True, assign=True)
    if model.config.tied_embeddings:
        model.head.weight = model.embed.weight
    return model.requires_grad_(False).eval()


def fill(
    contents: Contents,
    shards: Shards,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: bool,
) -> dict[str, Tensor]:
    """Read every entry into its place among newly made tensors of ours."""
    shapes = contents.shapes
    state = {
        name: torch.empty(shapes[name], dtype=kept, device=device)
        for name, kept in kept_dtypes(contents, shards, dtype).items()
    }
    bar = tqdm(contents.entries, desc="loading", unit="tensor", disable=None if progress else True)
    for entry in bar:
        weight = contents.weights[entry.published]
        wanted = state[entry.ours[0]].dtype if weight.quantized else None
        # what is stored plainly is converted while it is copied, what is packed on the device
        place = device if weight.quantized and device.type != "meta" else torch.device("cpu")
        entry.put(weight.read(shards, wanted, place), state)
    return state


def kept_dtypes(
    contents: Contents, shards: Shards, wanted: torch.dtype | None = None
) -> dict[str, torch.dtype]:
    """Of each tensor of ours: the one wanted, else what holds all that it is stored in."""
    dtypes: dict[str, torch.dtype] = {}
    exact = exact_names(contents.model)
    for entry in contents.entries:
        weight = contents.weights[entry.published]
        stored = READABLE.get(shards.tensors[weight.names[0]].dtype, torch.bfloat16)
        kept = torch.bfloat16 if weight.quantized else stored
        kept = kept if wanted is None else wanted
        for name in entry.ours:
            least = torch.float32 if name in exact else kept
            dtypes[name] = torch.promote_types(dtypes.get(name, least), kept)
    return dtypes


def differing(copy: Entry, contents: Contents, shards: Shards, own: Tensor | None) -> Tensor | None:
    """A stored tensor that should repeat another one and does not; None if it does or is absent.

    own: the other one, if it is in memory; else it is read too.
    """
    if copy.published not in contents.weights:
        return None
    if own is None or own.is_meta:
        (first,) = [entry for entry in contents.entries if entry.ours == copy.ours]
        own = contents.weights[first.published].read(shards, None, "cpu")
    stored = contents.weights[copy.published].read(shards, own.dtype, own.device)
    return None if torch.equal(stored, own) else stored.clone()


def untied(config: ModelConfig) -> ModelConfig:
    published = dict(config.published) | {"tie_word_embeddings": False}
    return replace(config, tied_embeddings=False, published=published)
