"""Maps published tensor names to ours and back, by rules that are data.

A rule pairs our name with the published one. In both, `{layer}` stands for the number of a layer,
where MTP modules follow the main layers, and `{mtp}` for the number of an MTP module. `{expert}` in
the published name means that the file stores each expert of our stacked tensor separately. Where
the published tensor is not equal to ours, an einops pattern says how to make ours from it; if it
makes several of ours, they are stacked along the first axis, P.

If the files of a family come in several layouts, there is a rule for each. Loading uses the one
whose names are in the files; saving uses the first.
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
    """Maps one published tensor to ours; `ours` is one name, or several that are stored as one."""

    ours: str | tuple[str, ...]
    published: str
    pattern: str | None = None  # published -> ours: "E (P F) D -> P E F D"; None: equal

    @property
    def names(self) -> tuple[str, ...]:
        """`ours` as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def under(self, ours: str, published: str) -> "Rule":
        """The same rule with a prefix before our names and one before the published name."""
        names = tuple(ours + name for name in self.names)
        return Rule(names, published + self.published, self.pattern)


@dataclass(frozen=True)
class Family:
    """All that the project knows about a published family."""

    read_config: Callable[[Fields], ModelConfig]
    rules: tuple[Rule, ...] | None  # None: the published names are ours
    copies: tuple[Rule, ...] = ()  # published tensors that repeat one that has its own rule
    ignored: tuple[str, ...] = ()  # patterns of published tensors that are not loaded: "vision.*"


@dataclass(frozen=True)
class Entry:
    """One published tensor and its place in our tensors."""

    published: str
    shape: Shape
    ours: tuple[str, ...]
    expert: int | None = None  # the index into the first dimension of `ours`
    pattern: str | None = None
    repeats: bool = False  # whether it repeats a tensor that has its own entry

    def parts(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Views of our tensors that this entry fills."""
        return [
            state[name] if self.expert is None else state[name][self.expert] for name in self.ours
        ]

    def put(self, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
        """Copy the published tensor into its place in `state`."""
        for part, piece in zip(self.parts(state), self.split(tensor), strict=True):
            part.copy_(piece)

    def split(self, tensor: Tensor) -> Tensor:
        """What the published tensor holds of each of `ours`, stacked along a new first axis."""
        if self.pattern is None:
            return tensor[None]
        return unpack(tensor, self.pattern, len(self.ours))

    def take(self, state: Mapping[str, Tensor]) -> Tensor:
        """Make the published tensor from `state`, as a new tensor: the inverse of `put`."""
        parts = self.parts(state)
        if self.pattern is None:
            return parts[0].clone()
        return pack(self.pattern, torch.stack(tuple(parts))).contiguous()


def unpack(tensor: Tensor, pattern: str, count: int) -> Tensor:
    """Make so many of our tensors, stacked, from a published one."""
    return rearrange(tensor, pattern, **({"P": count} if "P" in pattern else {}))


def pack(pattern: str, stacked: Tensor) -> Tensor:
    """Make the published tensor from ours, stacked: the pattern backwards."""
    theirs, ours = pattern.split("->")
    return rearrange(stacked, f"{ours} -> {theirs}")


def apply_rules(
    rules: Sequence[Rule] | None,
    shapes: Mapping[str, Shape],
    config: ModelConfig,
    present: Collection[str] | None = None,
) -> list[Entry]:
    """An entry for every tensor of a file that holds a model of this config and these shapes.

    present: the names in the file, which decide between layouts; None: the layout to save in.
    Raises ValueError if no rule maps one of our names.
    """
    if rules is None:
        return [Entry(name, shape, (name,)) for name, shape in shapes.items()]
    candidates = [entries for rule in rules for entries in expand_rule(rule, shapes, config)]
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
        raise ValueError(f"no rule of the family maps {', '.join(unknown)}")
    return found


def count_blocks(config: ModelConfig) -> int:
    return len(config.layers) + len(config.mtp.blocks)


def fill_template(template: str, layer: int, config: ModelConfig) -> str:
    """The name of a tensor, ours or published, in one layer or MTP module."""
    mtp = layer - len(config.layers)
    return template.replace("{layer}", str(layer)).replace("{mtp}", str(mtp))


def expand_rule(rule: Rule, shapes: Mapping[str, Shape], config: ModelConfig) -> list[list[Entry]]:
    """The entries of one rule, in groups that fill the same tensors of ours."""
    layered = "{layer}" in rule.names[0]
    groups = []
    for layer in range(count_blocks(config) if layered else 1):
        ours = tuple(fill_template(template, layer, config) for template in rule.names)
        if any(name not in shapes for name in ours):
            continue
        published = fill_template(rule.published, layer, config)
        shape = shapes[ours[0]]
        if "{expert}" in published:
            names = [published.replace("{expert}", str(expert)) for expert in range(shape[0])]
            groups.append([Entry(name, shape[1:], ours, e) for e, name in enumerate(names)])
        else:
            shape = (
                shape if rule.pattern is None else compute_packed_shape(rule.pattern, ours, shapes)
            )
            groups.append([Entry(published, shape, ours, None, rule.pattern)])
    return groups


def compute_packed_shape(pattern: str, ours: tuple[str, ...], shapes: Mapping[str, Shape]) -> Shape:
    (shape,) = {shapes[name] for name in ours}  # what is stacked is alike
    return tuple(pack(pattern, torch.empty(len(ours), *shape, device="meta")).shape)
