"""Our own format, `"model_type": "abacus"`: the config's dataclasses as JSON, and our own names.

{"model_type": "abacus", "format_version": 1, "model": {"class": "ModelConfig", "vocab_size": ...}}

Every config is an object with the name of its class and all of its fields. Nothing is guessed: a
missing or unknown field or class and a value of another type are refused by name.
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from json import dumps, loads
from typing import Any

import modeling
import moe
from modeling import ModelConfig
from moe import Config, ConfigError, check_types

from ..config_file import Fields
from ..mapping import Family

MODEL_TYPE = "abacus"
VERSION = 1  # of the format
# All keys of a file, besides token ids.
KNOWN_KEYS = "model_type", "format_version", "model", "dtype", "torch_dtype", "quantization_config"


def make_family(classes: Sequence[type] = ()) -> Family:
    """The format, for files that may also hold configs of these classes."""
    return Family(partial(read_config, classes=classes), rules=None)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A model's config.json; ConfigError for a config that would not be read back as it is."""
    classes: set[type] = set()
    model = loads(dumps(to_json(config, "ModelConfig", classes)))
    try:
        known = collect_classes(list(classes))
        again = build_config(model, "ModelConfig", known, published=config.published)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{error}: the config would not be read back as it is") from error
    if to_json(again, "ModelConfig", set()) != model:
        raise ConfigError(f"{config!r:.80}: is read back as another config")
    return {"model_type": MODEL_TYPE, "format_version": VERSION, "model": model}


def to_json(value: object, where: str, classes: set[type]) -> Any:
    """Convert the value of a field to JSON; add the classes of its configs to `classes`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value}: JSON has no such number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [to_json(element, f"{where}[{i}]", classes) for i, element in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        classes.add(type(value))
        own = {"class": type(value).__name__}
        for field in fields(value):
            held, place = getattr(value, field.name), f"{where}.{field.name}"
            made = field.default if field.default_factory is MISSING else field.default_factory()
            if field.compare:
                own[field.name] = to_json(held, place, classes)
            elif repr(held) != repr(made) and not isinstance(value, ModelConfig):
                raise ConfigError(f"{place} = {held!r:.80}: compare=False, so it is not saved")
        return own
    kinds = "numbers, strings, flags, None, tuples and dataclasses of those"
    raise ConfigError(f"{where} = {value!r:.80}: cannot be written; config fields hold {kinds}")


def read_config(json: Fields, classes: Sequence[type] = ()) -> ModelConfig:
    """Read the model's config from a config.json in this format."""
    version = json.integer("format_version")
    json.check(version <= VERSION, "format_version", version, f"<= {VERSION}, or a newer program")
    for key in json.raw.keys() - set(KNOWN_KEYS):
        if not key.endswith("_token_id"):
            raise ConfigError(f"{key} is no key of this format: {', '.join(KNOWN_KEYS)}")
    model = json.section("model") or Fields({}, "model.")
    model.choice("class", known=[ModelConfig.__name__])
    return build_config(
        dict(model.raw), "model", collect_classes(classes), published=dict(json.raw)
    )


def collect_classes(classes: Sequence[type]) -> dict[str, type]:
    """All config classes of the package, and those named by the caller, by their name."""
    if not isinstance(classes, Sequence):
        raise ValueError(f"classes = {classes!r}: expected a list of config classes")
    public = [kind for kind in (vars(moe) | vars(modeling)).values() if isinstance(kind, type)]
    known: dict[str, type] = {kind.__name__: kind for kind in public if issubclass(kind, Config)}
    for kind in classes:
        if not isinstance(kind, type) or not is_dataclass(kind):
            raise ValueError(f"classes: {kind!r} is not a dataclass")
        if known.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(f"classes: there is another class of the name {kind.__name__}")
    return known


def build_config(data: dict[str, Any], where: str, known: dict[str, type], **more: Any) -> Any:
    """Build the config that an object describes; `more`: fields that no file holds."""
    kind = known.get(name) if isinstance(name := data.get("class"), str) else None
    if kind is None:
        near = " or ".join(get_close_matches(str(name), known, cutoff=0.8))
        hint = f"did you mean {near}? " if near else ""
        others = "load_model(..., classes=[...]) names those from outside"
        raise ConfigError(f"{where}.class = {name!r} is no config of this package; {hint}{others}")
    wanted = [field.name for field in fields(kind) if field.compare]
    for key in wanted:
        if key not in data:
            raise ConfigError(f"{where}.{key} is missing: a file holds every field of a {name}")
    for key in data:
        if key not in ("class", *wanted):
            raise ConfigError(f"{where}.{key} is no field of a {name}: {', '.join(wanted)}")
    values = {key: from_json(data[key], f"{where}.{key}", known) for key in wanted}
    try:
        config = kind(**values, **more)
        if not isinstance(config, Config):  # a Config checks itself
            check_types(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def from_json(value: Any, where: str, known: dict[str, type]) -> Any:
    """Convert the JSON value of a field back."""
    if isinstance(value, list):
        return tuple(from_json(element, f"{where}[{i}]", known) for i, element in enumerate(value))
    return build_config(value, where, known) if isinstance(value, dict) else value
