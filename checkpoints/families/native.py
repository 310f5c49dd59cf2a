"""Our own format, `"model_type": "abacus"`: the config's dataclasses spelled out, our own names.

{"model_type": "abacus", "format_version": 1, "model": {"class": "ModelConfig", "vocab_size": ...}}

Every config is an object with the name of its class and all of its fields. Whatever a config can
say can be written, and nothing is guessed: a field more or less, a value of another type or a class
that is not known is refused by name. Classes from outside the package are named by whoever loads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import modeling
import moe
from modeling import ModelConfig
from moe import Config, ConfigError, check_types

from ..config_file import Fields
from ..mapping import Family

MODEL_TYPE = "abacus"
VERSION = 1  # of the format
# What stands in a file, besides ids of tokens.
BESIDE = "model_type", "format_version", "model", "dtype", "torch_dtype", "quantization_config"


def family(classes: Sequence[type] = ()) -> Family:
    """The format, for files that hold configs of these classes too."""
    return Family(partial(read_config, classes=classes), rules=None)


def spell_out(config: ModelConfig) -> dict[str, Any]:
    """A model's config.json in this format. Raises ConfigError for what no file can say."""
    model = spelled(config, "ModelConfig")
    return {"model_type": MODEL_TYPE, "format_version": VERSION, "model": model}


def spelled(value: object, where: str) -> Any:
    """A field's value as JSON holds it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [spelled(element, f"{where}[{i}]") for i, element in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: spelled(getattr(value, f.name), f"{where}.{f.name}") for f in said(value)}
        return {"class": type(value).__name__} | own
    raise ConfigError(
        f"{where} = {value!r}: a {type(value).__name__} cannot be written; config fields hold "
        "numbers, strings, flags, None, tuples and dataclasses of those"
    )


def said(config: Any) -> list[Field]:
    """The fields that make a description: those that count when two are compared."""
    return [field for field in fields(config) if field.compare]


def read_config(json: Fields, classes: Sequence[type] = ()) -> ModelConfig:
    """The model that a config.json describes."""
    version = json.integer("format_version")
    known = f"at most {VERSION}: a newer version of this program wrote it"
    json.check(version <= VERSION, "format_version", version, known)
    for key in json.raw.keys() - set(BESIDE):
        if not key.endswith("_token_id"):
            raise ConfigError(f"{key} is not known in this format, which has {', '.join(BESIDE)}")
    model = json.section("model")
    if model is None:
        raise ConfigError("model is missing")
    model.choice("class", known=[ModelConfig.__name__])
    return build(model.raw, "model", known_classes(classes), published=dict(json.raw))


def known_classes(classes: Sequence[type]) -> dict[str, type]:
    """{name: class} of all configs of the package, and of those that were named."""
    public = [*vars(moe).values(), *vars(modeling).values()]
    kinds: list[type] = [kind for kind in public if isinstance(kind, type)]
    known: dict[str, type] = {kind.__name__: kind for kind in kinds if issubclass(kind, Config)}
    for kind in classes:
        if not isinstance(kind, type) or not is_dataclass(kind):
            raise ValueError(f"classes: {kind!r} is not a dataclass")
        if known.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(f"classes: there is another class of the name {kind.__name__}")
    return known


def build(data: Mapping[str, Any], where: str, known: Mapping[str, type], **more: Any) -> Any:
    """The config that an object describes; `more`: fields that no file says."""
    kind = known.get(name) if isinstance(name := data.get("class"), str) else None
    if kind is None:
        near = " or ".join(get_close_matches(str(name), known, cutoff=0.8))
        hint = f"did you mean {near}? " if near else ""
        others = "load_model(..., classes=[...]) names those from outside"
        raise ConfigError(f"{where}.class = {name!r} is no config of this package; {hint}{others}")
    wanted = [field.name for field in said(kind)]
    for key in wanted:
        if key not in data:
            raise ConfigError(f"{where}.{key} is missing: every field of a {name} is written down")
    for key in data:
        if key not in ("class", *wanted):
            own = ", ".join(wanted)
            raise ConfigError(f"{where}.{key} is no field of a {name}, which has {own}")
    values = {key: built(data[key], f"{where}.{key}", known) for key in wanted}
    try:
        config = kind(**values, **more)
        if not isinstance(config, Config):  # those check themselves
            check_types(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def built(value: Any, where: str, known: Mapping[str, type]) -> Any:
    """A field's value from what JSON holds."""
    if isinstance(value, list):
        return tuple(built(element, f"{where}[{i}]", known) for i, element in enumerate(value))
    return build(value, where, known) if isinstance(value, dict) else value
