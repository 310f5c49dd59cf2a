"""config.json of a checkpoint -> ModelConfig, through the adapter of its family."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from modeling import ModelConfig
from moe import ConfigError

from .config_file import CheckpointError, Fields, read_json
from .families import FAMILIES, MECHANISMS, NOT_YET, native
from .mapping import Family
from .storage.quantization_config import check_method
from .storage.shards import list_some


def read_config(path: str | Path, classes: Sequence[type] = ()) -> ModelConfig:
    """Read the config.json of a checkpoint directory, or such a file.

    classes: config classes from outside the package that a file in our own format may name.
    """
    return interpret(Path(path), classes)[0]


def unread_keys(path: str | Path) -> list[str]:
    """The keys of a config.json that nothing reads: unknown ones, or not about the architecture."""
    return interpret(Path(path))[1].unread()


def interpret(path: Path, classes: Sequence[type] = ()) -> tuple[ModelConfig, Fields]:
    """Read a config.json through the adapter of its family."""
    file = find_config_file(path)
    fields = Fields(read_json(file))
    name = str(fields.find(["model_type"], "")[1])
    if not name:
        raise CheckpointError(f"{file}: model_type is missing")
    if name in NOT_YET:
        raise CheckpointError(f"{file}: model_type {name} is not supported: {NOT_YET[name]}")
    if name not in FAMILIES:
        near = get_close_matches(name, FAMILIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{file}: model_type {name!r} is not one of {known}{hint}")
    family = native.make_family(classes) if name == native.MODEL_TYPE else FAMILIES[name]
    try:
        if quantization := find_quantization_config(fields):
            check_method(quantization)
        config = read_by_family(family, fields)
        refuse_unread_mechanisms(fields, name)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{file}: nested too deeply") from None
    return config, fields


def read_by_family(family: Family, fields: Fields) -> ModelConfig:
    """Read a config through its adapter; a ConfigError names the published key if there is one."""
    try:
        return family.read_config(fields)
    except ConfigError:
        family.read_config(Fields(fields.raw, fields.where, named=True))
        raise


def find_quantization_config(fields: Fields) -> dict[str, Any]:
    """The quantization_config, which multimodal files have in text_config; {} if there is none."""
    for section in (fields, fields.section("text_config")):
        if section is not None and (found := section.section("quantization_config")):
            return dict(found.raw)
    return {}


def refuse_unread_mechanisms(fields: Fields, family: str) -> None:
    """Raise ConfigError for a key that changes the model and that the adapter did not read."""
    for part in (fields, *fields.parts):
        for key in part.unread():
            value, without = part.raw[key], MECHANISMS.get(key)
            if without is not None and (value is True or value not in without):
                found = f"{part.where}{key} = {value!r}"
                raise ConfigError(f"{found} changes the model in a way {family} does not have")


def find_config_file(path: Path) -> Path:
    """The path of the config.json; without one, a CheckpointError lists what is there instead."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_file():
        return path
    file = path / "config.json"
    if not file.is_file():
        found = list_some(sorted(entry.name for entry in path.iterdir()))
        raise CheckpointError(f"{path}: not a model directory: no config.json; found {found}")
    return file


def find_family(config: ModelConfig, where: object) -> Family:
    """The family that a config was read from; our own format if it was not read from a file."""
    name = str(config.published.get("model_type", native.MODEL_TYPE))
    if name not in FAMILIES:
        raise CheckpointError(
            f"{where}: the model's config.published names no family (model_type {name!r}); "
            f"set it to a config.json of {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]
