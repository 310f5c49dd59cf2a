"""A checkpoint directory -> a Transformer. Strict: every tensor is present, fits and is used.

Tensors are read one by one from the mapped file into their place, and dequantised on the way, so
memory peaks at the weights plus one tensor.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modeling import ModelConfig, QuantizedWeight, Transformer, widen_products

from .contents import (
    Contents,
    build_on_meta,
    compare_files,
    find_integers,
    find_shared_parameters,
)
from .mapped import (
    DEFAULT_MEMORY,
    StoredExperts,
    check_expert_options,
    map_experts,
    take_experts,
)
from .mapping import Entry
from .precision import check_dtype, find_exact
from .published_config import read_config
from .quantize import check_quantize, place_quantized, read_quantized
from .storage.shards import INTEGERS, READABLE, Shards, open_shards, raise_any
from .storage.weights import Weight


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    experts: str = "resident",
    quantize: str | None = None,
    layers: int | None = None,
    classes: Sequence[type] = (),
    progress: bool = True,
    expert_memory: int | None = None,
) -> Transformer:
    """Load the model of a checkpoint directory, in eval mode and without gradients.

    dtype: of the weights; None keeps the stored dtypes, and gives quantised weights that of the
    embedding. The tensors that a module calls `exact`, such as a selection bias, stay in float32 at
    least, and integers stay as they are.
    mtp: load the MTP modules. If the config announces modules and the files hold no tensor of
    them, the model is loaded without modules, with a warning.
    experts: "resident" loads the routed experts like everything else; "mapped" leaves each in its
    file until a token needs it, for models larger than memory. Mapped experts give the same
    results, bit for bit on a CPU, and cannot be trained, converted or saved. Those of
    `moe.Experts` are meant; experts of other classes are loaded.
    quantize: "int8" or "int4" holds matrices of attention and feed-forward as integer codes, each
    quantised while it is read, and a head in int8. Such a model only runs, on CPUs. Routers, norms,
    embedding, a tied head, MLA's `kv_expand` and modules of other classes stay as they are, and so
    do matrices whose rows are no multiple of 32 numbers.
    layers: load only the first `layers` layers, without MTP modules.
    classes: config classes from outside the package that a file in our own format may name.
    expert_memory: bytes for the mapped experts used last, of all layers; None: 4 GiB; 0: keep none.
    While experts are read, up to five more are in memory. `expert_statistics` tells how it went.
    Raises CheckpointError (a ValueError) for any missing, unexpected, misshapen or unknown tensor
    or config field, and ValueError for a dtype that weights cannot have and for other arguments
    that do not fit.
    """
    check_expert_options(experts, expert_memory, quantize)
    check_quantize(quantize, torch.device(device))
    check_dtype(dtype, READABLE.values())
    directory = Path(path)
    config = read_config(directory, classes)
    with open_shards(directory) as shards:
        contents = compare_files(directory, config, shards, mtp, layers)
        raise_any(contents.errors)
        for note in contents.notes:
            warnings.warn(note, stacklevel=2)
        mapped: dict[str, StoredExperts] = {}
        quantized: dict[str, QuantizedWeight] = {}
        dtypes, rest = choose_dtypes(contents, shards, dtype), contents
        if experts == "mapped":
            mapped, rest = take_experts(contents, shards, dtypes, torch.device(device))
        if quantize is not None:
            quantized, rest = read_quantized(contents, shards, dtypes, quantize, progress)
        state = read_entries(rest, shards, torch.device(device), dtype, progress)
        warn_of_unused_copies(contents, shards, state)
        model = untie_stored_head(contents, shards, state)
    map_experts(model, mapped, DEFAULT_MEMORY if expert_memory is None else expert_memory)
    state |= place_quantized(model, quantized)
    if model.config.tied_embeddings:
        state["head.weight"] = state["embed.weight"]
    shared = find_shared_parameters(model)
    model.load_state_dict(state, strict=True, assign=True)  # which separates them
    for name, other in shared.items():
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, model.get_parameter(other))
    widen_products(model)
    return model.requires_grad_(False).eval()


def warn_of_unused_copies(contents: Contents, shards: Shards, state: dict[str, Tensor]) -> None:
    """Warn of each tensor that should repeat one of ours and does not."""
    for copy in contents.copies:
        if read_if_different(copy, contents, shards, state.get(copy.ours[0])) is not None:
            message = (
                f"{copy.published} differs from the tensor it repeats and is not used; "
                "set mtp_own_embedding or mtp_own_head in config.json to use it"
            )
            warnings.warn(message, stacklevel=3)


def untie_stored_head(contents: Contents, shards: Shards, state: dict[str, Tensor]) -> Transformer:
    """The model to fill; if a tied model stores its own head, untied, with the head in `state`."""
    model, embedding = contents.model, state["embed.weight"]
    for entry in contents.heads:
        if (head := read_if_different(entry, contents, shards, embedding)) is not None:
            message = (
                f"{entry.published} differs from the embedding that config.json ties it to: "
                "used as it is stored"
            )
            warnings.warn(message, stacklevel=3)
            state["head.weight"] = head.to(embedding)
            model = build_on_meta(untie_head(model.config))
    return model


def read_entries(
    contents: Contents,
    shards: Shards,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: bool,
) -> dict[str, Tensor]:
    """Make the tensors of the model, by our names, and read every entry into its place."""
    shapes = contents.shapes
    state = {
        name: torch.empty(shapes[name], dtype=kept, device=device)
        for name, kept in choose_dtypes(contents, shards, dtype).items()
    }
    bar = tqdm(contents.entries, desc="loading", unit="tensor", disable=None if progress else True)
    for entry in bar:
        weight = contents.weights[entry.published]
        wanted = state[entry.ours[0]].dtype if weight.quantized else None
        # a plain weight is converted while it is copied; a quantised one is unpacked on the device
        place = device if weight.quantized and device.type != "meta" else torch.device("cpu")
        entry.put(weight.read(shards, wanted, place), state)
    return state


def choose_dtypes(
    contents: Contents, shards: Shards, wanted: torch.dtype | None = None
) -> dict[str, torch.dtype]:
    """The dtype of each of our tensors: `wanted`, or one that holds all dtypes it is stored in."""
    model_dtype, exact = find_model_dtype(contents, shards), find_exact(contents.model)
    integers = find_integers(contents.model)
    dtypes = dict(integers)
    for entry in contents.entries:
        kept = wanted or find_dtype(contents.weights[entry.published], shards, model_dtype)
        for name in set(entry.ours) - integers.keys():
            least = torch.float32 if name in exact else kept
            dtypes[name] = torch.promote_types(dtypes.get(name, least), kept)
    return dtypes


def find_dtype(weight: Weight, shards: Shards, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a weight is read in by default: as it is stored, or that of the model."""
    stored = shards.tensors[weight.names[0]].dtype
    return model_dtype if weight.quantized else (READABLE | INTEGERS)[stored]


def find_model_dtype(contents: Contents, shards: Shards) -> torch.dtype:
    """The dtype of the embedding, which no format quantises."""
    names = [entry.published for entry in contents.entries if entry.ours == ("embed.weight",)]
    return find_dtype(contents.weights[names[0]], shards, torch.bfloat16)


def read_if_different(
    copy: Entry, contents: Contents, shards: Shards, own: Tensor | None
) -> Tensor | None:
    """Read a stored tensor that should equal one of ours; None if it does, or if it is absent.

    own: our tensor, if it is in memory; otherwise it is read too.
    """
    if copy.published not in contents.weights:
        return None
    if own is None or own.is_meta:
        (first,) = [entry for entry in contents.entries if entry.ours == copy.ours]
        own = contents.weights[first.published].read(shards, None, "cpu")
    stored = contents.weights[copy.published].read(shards, own.dtype, own.device)
    return None if torch.equal(stored, own) else stored.clone()


def untie_head(config: ModelConfig) -> ModelConfig:
    """The same description with a head of its own, also in `published`."""
    published = dict(config.published) | {"tie_word_embeddings": False}
    return replace(config, tied_embeddings=False, published=published)
