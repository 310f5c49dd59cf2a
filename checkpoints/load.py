"""A published checkpoint directory -> a Transformer. Strict: every tensor is there, fits, is used.

Tensor by tensor: each is read from the mapped file into its place, dequantised on the way, so
memory peaks at the weights plus one tensor.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modeling import Transformer

from .contents import Contents, compare, untied
from .mapping import Entry
from .published_config import read_config
from .storage.shards import READABLE, Shards, open_shards, raise_any


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    progress: bool = True,
) -> Transformer:
    """The model in a checkpoint directory, in eval mode and without gradients.

    dtype: of the weights; None keeps what is stored, and makes bfloat16 of quantised weights. A
    selection bias stays in float32 at least.
    mtp: load the MTP modules. A checkpoint whose config announces them and which holds none of
    their tensors loads without, with a warning.
    Raises CheckpointError (a ValueError) for anything missing, unexpected, misshapen or unknown.
    """
    directory = Path(path)
    config = read_config(directory)
    with open_shards(directory) as shards:
        contents = compare(directory, config, shards, mtp)
        raise_any(contents.errors)
        for note in contents.notes:
            warnings.warn(note, stacklevel=2)
        state = fill(contents, shards, torch.device(device), dtype, progress)
        for copy in contents.copies:
            if differing(copy, contents, shards, state) is not None:
                told = (
                    f"{copy.published} differs from the tensor it repeats: not used; "
                    "mtp_own_embedding or mtp_own_head in config.json would"
                )
                warnings.warn(told, stacklevel=2)
        config = contents.config
        for entry in contents.heads:
            if (head := differing(entry, contents, shards, state)) is not None:
                told = f"{entry.published} differs from the embedding that config.json ties it to: "
                warnings.warn(told + "used as it is stored", stacklevel=2)
                config, state["head.weight"] = untied(config), head
    with torch.device("meta"):
        model = Transformer(config)
    state.setdefault("head.weight", state["embed.weight"])
    model.load_state_dict(state, strict=True, assign=True)
    if config.tied_embeddings:
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
    state = {
        name: torch.empty(contents.shapes[name], dtype=kept, device=device)
        for name, kept in kept_dtypes(contents, shards, dtype).items()
    }
    bar = tqdm(contents.entries, desc="loading", unit="tensor", disable=None if progress else True)
    for entry in bar:
        weight = contents.weights[entry.published]
        wanted = state[entry.ours[0]].dtype if weight.quantized else None
        # what is stored plainly is converted while it is copied, what is packed on the device
        place = device if weight.quantized else torch.device("cpu")
        entry.put(weight.read(shards, wanted, place), state)
    return state


def kept_dtypes(
    contents: Contents, shards: Shards, wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Of each tensor of ours: the one wanted, else what holds all that it is stored in."""
    dtypes: dict[str, torch.dtype] = {}
    for entry in contents.entries:
        weight = contents.weights[entry.published]
        stored = READABLE.get(shards.tensors[weight.names[0]].dtype, torch.bfloat16)
        kept = torch.bfloat16 if weight.quantized else stored
        kept = kept if wanted is None else wanted
        for name in entry.ours:
            least = torch.float32 if name.endswith("selection_bias") else kept
            dtypes[name] = torch.promote_types(dtypes.get(name, least), kept)
    return dtypes


def differing(
    copy: Entry, contents: Contents, shards: Shards, state: dict[str, Tensor]
) -> Tensor | None:
    """A stored tensor that should repeat another one and does not; None if it does or is absent."""
    if copy.published not in contents.weights:
        return None
    (own,) = copy.parts(state)
    stored = contents.weights[copy.published].read(shards, own.dtype, own.device)
    return None if torch.equal(stored, own) else stored.clone()
