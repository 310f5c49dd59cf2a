"""Loads matrices as integer codes: each is quantised when it is read, so that no more than one
tensor of a file is in memory unquantised.

Packed integers of compressed-tensors keep their codes where the kind asked for can hold them. FP8
and MXFP4 are dequantised and quantised again: their numbers are no multiples of a scale.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import gcd, prod

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modeling import (
    Codes,
    Format,
    MLAConfig,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedWeight,
    Transformer,
    choose_format,
    quantize_matrix,
)
from moe import Experts

from .config_file import CheckpointError
from .contents import Contents
from .mapping import Entry
from .precision import find_quantizable
from .storage.quantized import scale_to_float32, unpack_integers
from .storage.shards import Shards
from .storage.weights import PackedWeight, Weight

KINDS = ("int8", "int4")
HEAD_KIND = "int8"
EXPERT_PARTS = ("gate", "up", "down")


def check_quantize(quantize: str | None, device: torch.device) -> None:
    """Raise ValueError for a value of `quantize`, or with it a device, that cannot be."""
    if quantize not in (None, *KINDS):
        raise ValueError(f"quantize = {quantize!r}: must be None, {' or '.join(KINDS)}")
    if quantize is not None and device.type != "cpu":
        raise ValueError(
            f"quantize = {quantize!r}, device = {str(device)!r}: the kernels for quantised "
            "matrices are for the CPU: load the model there, or without quantize"
        )


# --- which matrices, and in which format


def find_kinds(model: Transformer, kind: str) -> dict[str, str]:
    """{our name of a matrix, or of a stack of them: the kind that it is to be held in}.

    They are those that formats of 8 bits and fewer may hold, in modules that have a quantised twin.
    `kv_expand` of MLA stays, since decoding puts its matrix elsewhere in the computation. A head is
    `HEAD_KIND`; a tied one has no entry in files, and stays: the embedding needs its matrix, which
    would be held a second time.
    """
    found: dict[str, str] = {}
    quantizable = find_quantizable(model)
    for path, module in model.named_modules():
        if isinstance(getattr(module, "config", None), MLAConfig):
            quantizable.discard(f"{path}.kv_expand.weight")
        stacks = [f"{path}.{part}" for part in EXPERT_PARTS]
        if type(module) is Experts and quantizable.issuperset(stacks):
            found |= dict.fromkeys(stacks, kind)
        if type(module) is nn.Linear and module in (model.head, *model.mtp_heads):
            found[f"{path}.weight"] = HEAD_KIND
        elif type(module) is nn.Linear and f"{path}.weight" in quantizable:
            found[f"{path}.weight"] = kind
    return found


def choose_formats(contents: Contents, kind: str) -> dict[str, Format]:
    """The format of each matrix, or stack, that is to be quantised and has entries.

    Matrices whose rows no format takes stay as they are, and with one of its stacks the others of a
    module; a warning says so if they are more than half.
    """
    kinds = find_kinds(contents.model, kind)
    entries: dict[str, list[Entry]] = {name: [] for name in kinds}
    for entry in contents.entries:
        for name in entry.ours:
            entries.get(name, []).append(entry)
    wanted = {name: found for name, found in entries.items() if found}
    formats = {
        name: choose_format(kinds[name], find_row_unit(found, contents, kinds[name]))
        for name, found in wanted.items()
    }
    owners = {name: name.rpartition(".")[0] for name in wanted}
    plain = {owners[name] for name, form in formats.items() if form is None}
    fitting = {n: form for n, form in formats.items() if form and owners[n] not in plain}
    total, held = (sum(prod(contents.shapes[n]) for n in names) for names in (wanted, fitting))
    if 2 * held < total:
        warnings.warn(
            f"quantize = {kind!r} holds {held:,} of {total:,} weights: the rows of the other "
            "matrices are no multiple of 32 numbers",
            stacklevel=4,
        )
    return fitting


def find_row_unit(entries: list[Entry], contents: Contents, kind: str) -> int:
    """The numbers of a row that a group of columns must divide: a row, or a group in the files."""
    row = entries[0].shape[-1]
    if entries[0].pattern is not None:
        return contents.shapes[entries[0].ours[0]][-1]
    sizes = {find_group(contents.weights[entry.published], kind) or row for entry in entries}
    unit = gcd(row, *sizes)
    return unit if choose_format(kind, unit) else row


def find_group(weight: Weight, kind: str) -> int | None:
    """The numbers that share a scale in the file, if it holds codes of this kind and groups."""
    same = isinstance(weight, PackedWeight) and f"int{weight.bits}" == kind
    return weight.group_size if isinstance(weight, PackedWeight) and same else None


# --- reading


def read_quantized(
    contents: Contents,
    shards: Shards,
    dtypes: Mapping[str, torch.dtype],
    kind: str,
    progress: bool,
) -> tuple[dict[str, QuantizedWeight], Contents]:
    """Read what is to be quantised, by our names; also returns the contents without it.

    dtypes: of the tensors unquantised, and so of the scales.
    """
    formats = choose_formats(contents, kind)
    held = {
        name: QuantizedWeight(form, contents.shapes[name], dtypes[name])
        for name, form in formats.items()
    }
    entries = [entry for entry in contents.entries if entry.ours[0] in held]
    for entry in tqdm(
        entries, desc="quantising", unit="tensor", disable=None if progress else True
    ):
        weight = contents.weights[entry.published]
        if entry.pattern is None and keeps_codes(weight, formats[entry.ours[0]]):
            target = held[entry.ours[0]]
            target.put(read_codes(weight, shards, target), entry.expert)
        else:
            quantize_entry(entry, weight, shards, held)
    others = [entry for entry in contents.entries if entry.ours[0] not in held]
    return held, replace(contents, entries=others)


def keeps_codes(weight: Weight, form: Format) -> bool:
    """Whether the format can hold the codes that a file has."""
    if not isinstance(weight, PackedWeight) or weight.bits != form.bits:
        return False
    row = weight.shape[-1]
    return (weight.group_size or row) % (form.group_size or row) == 0


def read_codes(weight: Weight, shards: Shards, target: QuantizedWeight) -> Codes:
    """The codes of a packed weight, a scale repeated for each of our groups in one of the file."""
    packed, scale_OG = (shards.read(name) for name in weight.names[:2])
    row = weight.shape[-1]
    size = target.form.group_size or row
    assert isinstance(weight, PackedWeight)
    repeated = scale_OG.repeat_interleave((weight.group_size or row) // size, dim=1)
    scale_OG = scale_to_float32(repeated[:, : row // size]).to(target.scale.dtype)
    return Codes(unpack_integers(packed, weight.bits)[:, :row], scale_OG)


def quantize_entry(
    entry: Entry, weight: Weight, shards: Shards, held: Mapping[str, QuantizedWeight]
) -> None:
    """Read a tensor and quantise each matrix in it into its place."""
    dtype = held[entry.ours[0]].scale.dtype if weight.quantized else None
    tensor = weight.read(shards, dtype, "cpu")
    for name, piece in zip(entry.ours, entry.split(tensor), strict=True):
        target = held[name]
        matrices = dict(enumerate(piece)) if piece.dim() == 3 else {entry.expert: piece}
        for expert, matrix in matrices.items():
            codes = quantize_matrix(matrix, target.form, target.scale.dtype)
            if not codes.scale_OG.isfinite().all():
                raise CheckpointError(
                    f"{weight.file}: {entry.published} has numbers that are not finite, which "
                    "cannot be quantised"
                )
            target.put(codes, expert)


# --- the model


def place_quantized(model: Transformer, held: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Put quantised modules into the places of plain ones; returns their tensors by name."""
    for path, module in list(model.named_modules()):
        twin: nn.Module | None = None
        if type(module) is nn.Linear and f"{path}.weight" in held:
            twin = QuantizedLinear(held[f"{path}.weight"], module.bias)
        if type(module) is Experts and f"{path}.gate" in held:
            twin = QuantizedExperts(module, *(held[f"{path}.{part}"] for part in EXPERT_PARTS))
        if twin is not None:
            model.set_submodule(path, twin)
    return {
        f"{name}.{part}": tensor
        for name, weight in held.items()
        for part, tensor in weight.state_dict().items()
    }
