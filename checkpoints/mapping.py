"""How published tensor names and ours correspond: rules as data, read in both directions.

A rule pairs a template of ours with one of theirs. `{layer}` runs over all layers, MTP modules
continuing the count of the main ones, and `{mtp}` is their number among themselves; `{expert}` in
the published name says that the file keeps each expert of our stacked tensor by itself. Where their
tensor is not simply ours, an einops pattern says how it becomes ours, several of which are stacked
along the first axis, P.

Where the files of a family come in several layouts there is a rule for each: the one whose names
are there is used for loading, the first for saving.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from modeling import ModelConfig

from .config_file import Fields

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One correspondence; `ours` names one tensor, or several that are stored as one."""

    ours: str | tuple[str, ...]
    published: str
    pattern: str | None = None  # theirs -> ours, as in "E (P F) D -> P E F D"; None: the same

    @property
    def names(self) -> tuple[str, ...]:
        """`ours` as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def under(self, ours: str, published: str) -> "Rule":
        """The same rule with a prefix before the names of either side."""
        names = tuple(ours + name for name in self.names)
        return Rule(names, published + self.published, self.pattern)


@dataclass(frozen=True)
class Family:
    """What is known of a published family, and nothing of it anywhere else."""

    read_config: Callable[[Fields], ModelConfig]
    rules: tuple[Rule, ...] | None  # None: files have our own names
    copies: tuple[Rule, ...] = ()  # published names that repeat a tensor which has its own rule
    ignored: tuple[str, ...] = ()  # patterns of published names that are not loaded: "vision.*"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file and where it belongs."""

    published: str
    shape: Shape
    ours: tuple[str, ...]
    expert: int | None = None  # the index into the first dimension of `ours`
    pattern: str | None = None
    repeats: bool = False  # a tensor that has an entry of its own

    def parts(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Views of our tensors that this entry fills."""
        return [
            state[name] if self.expert is None else state[name][self.expert] for name in self.ours
        ]

    def put(self, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
        """Copy the file's tensor into its places in `state`."""
        parts = self.parts(state)
        pieces = tensor[None] if self.pattern is None else unpacked(tensor, self.pattern, parts)
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece)

    def take(self, state: Mapping[str, Tensor]) -> Tensor:
        """What `put` would have to be given for `state` to be as it is; a tensor of its own."""
        parts = self.parts(state)
        if self.pattern is None:
            return parts[0].clone()
        return packed(self.pattern, parts).contiguous()


def unpacked(tensor: Tensor, pattern: str, parts: Sequence[Tensor]) -> Tensor:
    """A published tensor as ours, stacked."""
    return rearrange(tensor, pattern, **({"P": len(parts)} if "P" in pattern else {}))


def packed(pattern: str, parts: Sequence[Tensor]) -> Tensor:
    """Ours as the published tensor: the pattern backwards."""
    theirs, ours = pattern.split("->")
    return rearrange(torch.stack(tuple(parts)), f"{ours} -> {theirs}")


def correspondences(
    rules: Sequence[Rule] | None,
    shapes: Mapping[str, Shape],
    config: ModelConfig,
    present: Collection[str] | None = None,
) -> list[Entry]:
    """An entry for every tensor of a file that holds a model of this config and these shapes.

    present: the names in the file, which decide between layouts; None for the layout to save in.
    Raises ValueError if the rules say nothing about one of our names.
    """
    if rules is None:
        return [Entry(name, shape, (name,)) for name, shape in shapes.items()]
    candidates = [entries for rule in rules for entries in instances(rule, shapes, config)]
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


def num_blocks(config: ModelConfig) -> int:
    return len(config.layers) + len(config.mtp.blocks)


def filled_in(template: str, layer: int, config: ModelConfig) -> str:
    """A name of either side for one layer, or one MTP module."""
    mtp = layer - len(config.layers)
    return template.replace("{layer}", str(layer)).replace("{mtp}", str(mtp))


def instances(rule: Rule, shapes: Mapping[str, Shape], config: ModelConfig) -> list[list[Entry]]:
    """The entries of one rule, grouped by the tensors of ours that they fill together."""
    layered = "{layer}" in rule.names[0]
    groups = []
    for layer in range(num_blocks(config) if layered else 1):
        ours = tuple(filled_in(template, layer, config) for template in rule.names)
        if any(name not in shapes for name in ours):
            continue
        published = filled_in(rule.published, layer, config)
        shape = shapes[ours[0]]
        if "{expert}" in published:
            names = [published.replace("{expert}", str(expert)) for expert in range(shape[0])]
            groups.append([Entry(name, shape[1:], ours, e) for e, name in enumerate(names)])
        else:
            shape = shape if rule.pattern is None else shape_of_packed(rule.pattern, ours, shapes)
            groups.append([Entry(published, shape, ours, None, rule.pattern)])
    return groups


def shape_of_packed(pattern: str, ours: tuple[str, ...], shapes: Mapping[str, Shape]) -> Shape:
    hollow = [torch.empty(shapes[name], device="meta") for name in ours]
    return tuple(packed(pattern, hollow).shape)
