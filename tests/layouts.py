"""A checkpoint's tensors in the other layouts and spellings that files come in.

Every function takes tensors by their published names and returns new ones; what it does not
concern it passes on.
"""

import re

import torch
from torch import Tensor

GATED = ("gate_proj", "up_proj", "down_proj")


def fused(tensors: dict[str, Tensor], names: tuple[str, str, str] = GATED) -> dict[str, Tensor]:
    """Experts that stand one by one, stacked: those of gate and up as one, gate's rows first.

    names: of an expert's matrices for gate, up and down.
    """
    single = re.compile(rf"(.*\.experts\.)\d+\.({'|'.join(names)})\.weight")
    matched = {name: single.fullmatch(name) for name in tensors}
    out = {name: tensors[name] for name, match in matched.items() if match is None}
    for prefix in sorted({match[1] for match in matched.values() if match is not None}):
        gate, up, down = (stacked(tensors, prefix, name) for name in names)
        out[prefix + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        out[prefix + "down_proj"] = down
    return out


def stacked(tensors: dict[str, Tensor], prefix: str, name: str) -> Tensor:
    count = sum(
        bool(re.fullmatch(rf"\d+\.{name}\.weight", n.removeprefix(prefix))) for n in tensors
    )
    return torch.stack([tensors[f"{prefix}{expert}.{name}.weight"] for expert in range(count)])


def split(tensors: dict[str, Tensor], names: tuple[str, str, str] = GATED) -> dict[str, Tensor]:
    """The inverse of `fused`."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".experts.gate_up_proj"):
            pieces = dict(zip(names[:2], tensor.chunk(2, dim=1), strict=True))
        elif name.endswith(".experts.down_proj"):
            pieces = {names[2]: tensor}
        else:
            out[name] = tensor
            continue
        prefix = name.rsplit(".", 1)[0]
        for part, weight in pieces.items():
            for expert, matrix in enumerate(weight):
                out[f"{prefix}.{expert}.{part}.weight"] = matrix
    return out


def renamed(tensors: dict[str, Tensor], spellings: dict[str, str]) -> dict[str, Tensor]:
    """Each name with the first of these parts that it has in the other spelling."""
    return {respelled(name, spellings): tensor for name, tensor in tensors.items()}


def respelled(name: str, spellings: dict[str, str]) -> str:
    for part, other in spellings.items():
        if part in name:
            return name.replace(part, other)
    return name
