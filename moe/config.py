"""Configs: data that says what a part of a model is, checks itself, and builds the part.

A field's annotation is its rule: `Count` means a whole number >= 1, `Literal["max", "sum"]` one of
two words. A rule that several fields share stands in the method `check`.
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A configuration field has a value that no model can have; names field, value and rule."""


class Limit(NamedTuple):
    """A rule for one value, to stand in `Annotated[type, Limit(...)]`."""

    words: str  # what the value must be
    holds: Callable[[Any], bool]


def one_of(known: Collection[str]) -> Limit:
    """One of these words. Of a table: one of its keys, those added later included."""
    return Limit(f"one of {', '.join(known)}", lambda value: value in known)


Count = Annotated[int, Limit("a whole number >= 1", lambda value: value >= 1)]
Size = Annotated[int, Limit("a whole number >= 0", lambda value: value >= 0)]
Positive = Annotated[float, Limit("a number > 0", lambda value: value > 0)]

PLAIN = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}


def find_broken_rule(value: object, hint: Any) -> str | None:
    """What `value` must be to have the type `hint`, in words; None if it is."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [limit for limit in parts[1:] if isinstance(limit, Limit)]
        broken = find_broken_rule(value, parts[0])
        if broken is None:
            return next((limit.words for limit in limits if not limit.holds(value)), None)
        return limits[0].words if limits else broken
    if origin in (Union, UnionType):
        each = [find_broken_rule(value, part) for part in parts]
        return None if None in each else " or ".join(filter(None, each))
    if origin is Literal:
        known = (type(value), value) in [(type(part), part) for part in parts]
        return None if known else f"one of {', '.join(map(str, parts))}"
    if origin is tuple and parts[1:] == (...,) and isinstance(value, tuple):
        each = [find_broken_rule(element, parts[0]) for element in value]
        return next((f"a tuple, each {broken}" for broken in each if broken), None)
    if hint in PLAIN:
        return None if has_plain_type(value, hint) else PLAIN[hint]
    if hint is Any or isinstance(value, origin or hint):
        return None
    return "None" if hint is NoneType else f"of type {getattr(hint, '__name__', hint)}"


def has_plain_type(value: object, hint: type) -> bool:
    """Like `isinstance`, but a bool is no number, and a float may be an int and must be finite."""
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def name_in_errors(value: object, own: str) -> str:
    """How errors call a value: by its published key if it was read from a file, else by `own`."""
    return getattr(value, "published_name", own)


def check_types(config: Any) -> None:
    """Raise `ConfigError` unless every field of a dataclass has the type of its annotation."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        broken = find_broken_rule(value, hints[field.name])
        if broken is not None:
            own = f"{type(config).__name__}.{field.name}"
            raise ConfigError(f"{name_in_errors(value, own)} = {value!r:.80}: must be {broken}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config: subclasses are frozen, keyword-only dataclasses, and most have a `build`.

    A frozen dataclass that does not derive from this takes part too, but has to check itself.
    """

    def __post_init__(self) -> None:
        check_types(self)
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where fields do not fit each other; by default they always do."""

    def require(self, holds: bool, field: str, rule: str) -> None:
        """Raise `ConfigError` unless `holds`. `rule` may name fields: "divide {num_heads}"."""
        if not holds:
            value, own = getattr(self, field), f"{type(self).__name__}.{field}"
            others = {name: f"{name_in_errors(v, name)} = {v!r}" for name, v in vars(self).items()}
            named = f"{name_in_errors(value, own)} = {value!r}"
            raise ConfigError(f"{named}: must {rule.format_map(others)}")
