"""How published tensor names and ours correspond: rules as data, read in both directions.

A rule pairs a template of ours with one of theirs. `{layer}` runs over all layers, MTP modules
continuing the count of the main ones; `{expert}` in the published name says that the file keeps
each expert of our stacked tensor by itself. Several of our names against one of theirs are that
one's rows, one after the other.

Where the files of a family come in two layouts there is a rule for each: the one whose names are
there is used for loading, the first for saving.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling import ModelConfig

from .config_file import Fields

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One correspondence; `ours` names one tensor or several that are stored as one."""

    ours: str | tuple[str, ...]
    published: str


@dataclass(frozen=True)
class Family:
    """What is known of a published family, and nothing of it anywhere else."""

    read_config: Callable[[Fields], ModelConfig]
    rules: tuple[Rule, ...]
    copies: tuple[Rule, ...] = ()  # published names that repeat a tensor which has its own rule
    ignored: tuple[str, ...] = ()  # published names that hold nothing to load, with {layer}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file and where it belongs."""

    published: str
    shape: Shape
    ours: tuple[str, ...]
    expert: int | None = None  # the index into the first dimension of `ours`

    def parts(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Views of our tensors that this entry fills, in the order of its rows."""
        return [
            state[name] if self.expert is None else state[name][self.expert] for name in self.ours
        ]

    def put(self, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
        """Copy the file's tensor into its places in `state`."""
        parts = self.parts(state)
        rows = [part.shape[-2] for part in parts] if len(parts) > 1 else []
        pieces = tensor.split(rows, dim=-2) if rows else (tensor,)
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece)

    def take(self, state: Mapping[str, Tensor]) -> Tensor:
        """What `put` would have to be given for `state` to be as it is; a tensor of its own."""
        parts = self.parts(state)
        return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0].clone()


def correspondences(
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    num_layers: int,
    present: Collection[str] | None = None,
) -> list[Entry]:
    """An entry for every tensor of a file that holds a model of these shapes.

    present: the names in the file, which decide between layouts; None for the layout to save in.
    Raises ValueError if the rules say nothing about one of our names.
    """
    candidates = [entries for rule in rules for entries in instances(rule, shapes, num_layers)]
    found: list[Entry] = []
    covered: set[str] = set()

    def cover(entries: list[Entry]) -> None:
        if covered.isdisjoint(entries[0].ours):
            covered.update(entries[0].ours)
            found.extend(entries)

    for entries in candidates:
        if present is None or any(entry.published in present for entry in entries):
            cover(entries)
    for entries in candidates:
        cover(entries)
    unknown = sorted(set(shapes) - covered)
    if unknown:
        raise ValueError(f"no rule says how the family publishes {', '.join(unknown)}")
    return found


def instances(rule: Rule, shapes: Mapping[str, Shape], num_layers: int) -> list[list[Entry]]:
    """The entries of one rule, grouped by the tensors of ours that they fill together."""
    templates = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
    layered = "{layer}" in rule.published
    groups = []
    for layer in range(num_layers if layered else 1):
        ours = tuple(template.replace("{layer}", str(layer)) for template in templates)
        if any(name not in shapes for name in ours):
            continue
        published = rule.published.replace("{layer}", str(layer))
        shape = stacked(tuple(shapes[name] for name in ours))
        if "{expert}" in published:
            names = [published.replace("{expert}", str(expert)) for expert in range(shape[0])]
            groups.append([Entry(name, shape[1:], ours, e) for e, name in enumerate(names)])
        else:
            groups.append([Entry(published, shape, ours)])
    return groups


def stacked(shapes: tuple[Shape, ...]) -> Shape:
    """The shape of tensors stored as one: their rows one after the other."""
    if len(shapes) == 1:
        return shapes[0]
    *leading, _, columns = shapes[0]
    return (*leading, sum(shape[-2] for shape in shapes), columns)
