"""Our own format, `"model_type": "abacus"`: the config's dataclasses as JSON, and our own names.

{"model_type": "abacus", "format_version": 1, "model": {"class": "ModelConfig", "vocab_size": ...}}

Every config is an object with the name of its class and all of its fields. Every config can be
written, and nothing is guessed on reading: a missing or unknown field, a value of another type and
an unknown class are refused by name. The caller names the classes from outside the package.
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
# All keys of a file, besides token ids.
KNOWN_KEYS = "model_type", "format_version", "model", "dtype", "torch_dtype", "quantization_config"


def make_family(classes: Sequence[type] = ()) -> Family:
    """The format, for files that may also hold configs of these classes."""
    return Family(partial(read_config, classes=classes), rules=None)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A model's config.json in this format; ConfigError for a value that JSON cannot hold."""
    model = to_json(config, "ModelConfig")
    return {"model_type": MODEL_TYPE, "format_version": VERSION, "model": model}


def to_json(value: object, where: str) -> Any:
    """Convert the value of a field to JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [to_json(element, f"{where}[{i}]") for i, element in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        own = {
            f.name: to_json(getattr(value, f.name), f"{where}.{f.name}") for f in list_fields(value)
        }
        return {"class": type(value).__name__} | own
    raise ConfigError(
        f"{where} = {value!r}: a {type(value).__name__} cannot be written; config fields hold "
        "numbers, strings, flags, None, tuples and dataclasses of those"
    )


def list_fields(config: Any) -> list[Field]:
    """The fields that describe a model: those that are compared."""
    return [field for field in fields(config) if field.compare]


def read_config(json: Fields, classes: Sequence[type] = ()) -> ModelConfig:
    """Read the model's config from a config.json in this format."""
    version = json.integer("format_version")
    known = f"at most {VERSION}: a newer version of this program wrote it"
    json.check(version <= VERSION, "format_version", version, known)
    for key in json.raw.keys() - set(KNOWN_KEYS):
        if not key.endswith("_token_id"):
            raise ConfigError(
                f"{key} is not known in this format, which has {', '.join(KNOWN_KEYS)}"
            )
    model = json.section("model")
    if model is None:
        raise ConfigError("model is missing")
    model.choice("class", known=[ModelConfig.__name__])
    return build_config(model.raw, "model", collect_classes(classes), published=dict(json.raw))


def collect_classes(classes: Sequence[type]) -> dict[str, type]:
    """All config classes of the package, and those named by the caller, by their name."""
    public = [*vars(moe).values(), *vars(modeling).values()]
    kinds: list[type] = [kind for kind in public if isinstance(kind, type)]
    known: dict[str, type] = {kind.__name__: kind for kind in kinds if issubclass(kind, Config)}
    for kind in classes:
        if not isinstance(kind, type) or not is_dataclass(kind):
            raise ValueError(f"classes: {kind!r} is not a dataclass")
        if known.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(f"classes: there is another class of the name {kind.__name__}")
    return known


def build_config(
    data: Mapping[str, Any], where: str, known: Mapping[str, type], **more: Any
) -> Any:
    """Build the config that an object describes; `more`: fields that no file holds."""
    kind = known.get(name) if isinstance(name := data.get("class"), str) else None
    if kind is None:
        near = " or ".join(get_close_matches(str(name), known, cutoff=0.8))
        hint = f"did you mean {near}? " if near else ""
        others = "load_model(..., classes=[...]) names those from outside"
        raise ConfigError(f"{where}.class = {name!r} is no config of this package; {hint}{others}")
    wanted = [field.name for field in list_fields(kind)]
    for key in wanted:
        if key not in data:
            raise ConfigError(f"{where}.{key} is missing: a file holds every field of a {name}")
    for key in data:
        if key not in ("class", *wanted):
            own = ", ".join(wanted)
            raise ConfigError(f"{where}.{key} is no field of a {name}, which has {own}")
    values = {key: from_json(data[key], f"{where}.{key}", known) for key in wanted}
    try:
        config = kind(**values, **more)
        if not isinstance(config, Config):  # a Config checks itself
            check_types(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def from_json(value: Any, where: str, known: Mapping[str, type]) -> Any:
    """Convert the JSON value of a field back."""
    if isinstance(value, list):
        return tuple(from_json(element, f"{where}[{i}]", known) for i, element in enumerate(value))
    return build_config(value, where, known) if isinstance(value, dict) else value
