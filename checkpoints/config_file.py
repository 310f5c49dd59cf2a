"""Reads config.json and similar files: strict JSON, and fields with checked types and ranges."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moe import ConfigError


class CheckpointError(ValueError):
    """An error in a checkpoint: names the file, what was found and what was expected."""


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Duplicate keys, NaN and infinities are errors (RFC 8259)."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{path}: the key {twice!r} occurs twice in one object")
        return dict(pairs)

    def refuse_constant(name: str) -> NoReturn:
        raise CheckpointError(f"{path}: {name} is not a JSON number, or exceeds float64")

    def read_float(digits: str) -> float:
        value = float(digits)
        return refuse_constant(digits) if math.isinf(value) else value

    check_regular(path)
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
            parse_float=read_float,
        )
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CheckpointError(f"{path}: not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply") from None
    except CheckpointError:
        raise
    except ValueError as error:  # an integer with thousands of digits
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def check_regular(path: Path) -> None:
    """Refuse directories, and pipes, from which reading would block."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: not a regular file")


class NamedInt(int):
    """An integer with the key that it was read from."""

    published_name: str


class NamedFloat(float):
    """A float with the key that it was read from."""

    published_name: str


class Fields:
    """Typed access to a published config. Records the keys that were read, to list the others.

    Every reader takes the key, or several spellings of it, of which the first present one is read.
    Without a default the key is required. A null counts as absent.
    named: return numbers with their keys, so that a `ConfigError` about a number names its key.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "", named: bool = False) -> None:
        self.raw, self.where, self.named = raw, where, named
        self.asked: set[str] = set()
        self.parts: list[Fields] = []  # sections that are the config of a model

    def integer(
        self,
        *keys: str,
        default: int | None = None,
        at_least: int = 1,
        at_most: int = 10**6,
    ) -> int:
        key, value = self.find(keys, default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        expected = f"a whole number from {at_least} to {at_most}"
        self.check(whole and at_least <= value <= at_most, key, value, expected)
        return self.attach_key(NamedInt, key, value)

    def number(
        self,
        *keys: str,
        default: float | None = None,
        at_least: float = -sys.float_info.max,
        above: float = -math.inf,
        at_most: float = sys.float_info.max,
    ) -> float:
        key, value = self.find(keys, default)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        limits = [
            f"{sign} {bound:g}" for sign, bound in ((">=", at_least), (">", above)) if bound > -1
        ]
        limits += [f"<= {at_most:g}"] if at_most < sys.float_info.max else []
        expected = " ".join(["a finite number", " and ".join(limits)]).strip()
        self.check(real and above < value and at_least <= value <= at_most, key, value, expected)
        return self.attach_key(NamedFloat, key, float(value))

    def flag(self, *keys: str, default: bool | None = None) -> bool:
        key, value = self.find(keys, default)
        self.check(isinstance(value, bool), key, value, "true or false")
        return value

    def require_flag(self, key: str, expected: bool) -> None:
        """Refuse another value than that of all releases; the key may be absent."""
        value = self.flag(key, default=expected)
        self.check(value is expected, key, value, str(expected).lower())

    def integers(
        self, *keys: str, default: Sequence[int] | None = None, at_least: int = 1
    ) -> tuple[int, ...]:
        """A list of whole numbers."""
        key, value = self.find(keys, default)
        whole = isinstance(value, list | tuple) and all(
            isinstance(v, int) and not isinstance(v, bool) and v >= at_least for v in value
        )
        self.check(whole, key, value, f"a list of whole numbers >= {at_least}")
        return tuple(
            self.attach_key(NamedInt, f"{key}[{i}]", number) for i, number in enumerate(value)
        )

    def per_layer(self, num_layers: int, *keys: str, default: int | None = None) -> list[int]:
        """A whole number for each layer, from one number for all of them or a list."""
        key, value = self.find(keys, default)
        if not isinstance(value, list):
            return [self.integer(*keys, default=default)] * num_layers
        values = self.integers(*keys)
        self.check(len(values) >= num_layers, key, value, f"one for each of {num_layers} layers")
        return list(values[:num_layers])

    def layer_kinds(self, key: str, known: Sequence[str], default: Sequence[str]) -> list[str]:
        """The kind of each layer; there are as many layers as kinds in `default`."""
        _, value = self.find([key], default)
        right = isinstance(value, list | tuple) and len(value) >= len(default)
        kinds = ", ".join(known)
        expected = f"a list of at least {len(default)} of {kinds}"
        self.check(right and all(kind in known for kind in value), key, value, expected)
        return list(value[: len(default)])

    def choice(self, *keys: str, known: Sequence[str], default: str | None = None) -> str:
        key, value = self.find(keys, default)
        self.check(value in known, key, value, "one of " + ", ".join(known))
        return value

    def optional_integer(self, *keys: str, at_least: int = 1) -> int | None:
        return self.integer(*keys, at_least=at_least) if self.has(*keys) else None

    def section(self, *keys: str) -> "Fields | None":
        """The object under the first present key; None if there is none."""
        key, value = self.find(keys, {})
        self.check(isinstance(value, dict), key, value, "an object")
        return Fields(value, f"{self.where}{key}.", self.named) if value else None

    def has(self, *keys: str) -> bool:
        self.asked.update(keys)
        return any(self.raw.get(key) is not None for key in keys)

    def ignore(self, *keys: str) -> None:
        """Count keys as read that change nothing here."""
        self.asked.update(keys)

    def unread(self) -> list[str]:
        """The keys that were not read."""
        return sorted(set(self.raw) - self.asked)

    def attach_key(self, kind: type, key: str, value: Any) -> Any:
        """A number with its key, or with the expression of keys that it was computed from."""
        if not self.named:
            return value
        named = kind(value)
        named.published_name = self.where + key
        return named

    def find(self, keys: Sequence[str], default: Any) -> tuple[str, Any]:
        self.asked.update(keys)
        for key in keys:
            if self.raw.get(key) is not None:
                return key, self.raw[key]
        if default is None:
            raise ConfigError(f"{self.where}{' or '.join(keys)} is missing")
        return keys[0], default

    def check(self, holds: bool, key: str, value: Any, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{self.where}{key} = {value!r}, expected {expected}")
