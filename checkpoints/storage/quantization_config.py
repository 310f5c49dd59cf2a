"""The quantization_config of a published config: what is supported, and the scheme of a weight."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from modeling import Format
from moe import ConfigError

from ..config_file import CheckpointError, Fields

METHODS = ("fp8", "mxfp4", "compressed-tensors")
FORMATS = ("float-quantized", "pack-quantized", "mixed-precision")  # of compressed-tensors
BITS = {"int": (4, 8), "float": (8,)}
STRATEGIES = {"int": ("group", "channel"), "float": ("tensor", "channel", "block")}
FP8_SPELLINGS = ("e4m3", "float8_e4m3fn")
CONVERT = "convert the weights to bfloat16 first"


def check_method(quantization: Mapping[str, Any]) -> None:
    """Raise CheckpointError, without a file name, for an unsupported quantization_config."""
    fields = Fields(quantization, "quantization_config.")
    try:
        method = fields.choice("quant_method", known=METHODS)
        if method == "fp8":
            fields.choice("fmt", known=FP8_SPELLINGS, default=FP8_SPELLINGS[0])
        if method == "compressed-tensors":
            fields.choice("format", known=FORMATS)
        check_block(fields, "weight_block_size")
        if groups := fields.section("config_groups"):
            for name in groups.raw:
                check_group(groups.section(name))
    except ConfigError as error:
        raise CheckpointError(f"{error}; {CONVERT}") from None


def check_group(group: Fields | None) -> None:
    """Check a config group of compressed-tensors; one without weights is for activations."""
    if not group or not (weights := group.section("weights")):
        return
    group.choice("format", known=FORMATS, default=FORMATS[0])
    kind = weights.choice("type", known=tuple(BITS))
    bits, known = weights.integer("num_bits"), BITS[kind]
    weights.check(bits in known, "num_bits", bits, f"one of {known} for {kind}")
    strategy = weights.choice("strategy", known=STRATEGIES[kind])
    if strategy == "group":
        size, in_word = weights.integer("group_size"), 32 // bits
        weights.check(size % in_word == 0, "group_size", size, f"a multiple of {in_word}")
    symmetric = weights.flag("symmetric", default=True)
    weights.check(symmetric, "symmetric", symmetric, "true; there is no support for zero points")
    check_block(weights, "block_structure")
    _, targets = group.find(["targets"], None)
    names = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    group.check(names, "targets", targets, "a list of names")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            group.check(False, "targets", target, f"a regular expression ({error})")


def check_block(fields: Fields, key: str) -> None:
    if fields.has(key):
        _, value = fields.find([key], None)
        pair = isinstance(value, list) and len(value) == 2
        whole = pair and all(type(size) is int and size > 0 for size in value)
        fields.check(whole, key, value, "two whole numbers above 0")


def find_scheme(weight: str, quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scheme of a weight's config group; empty if there is none.

    It is the first group that names the weight's module, or else the first one for a class. Files
    do not name classes, so a quantised weight counts as a member of every class.
    """
    module = weight.removesuffix(".weight")
    by_class: Mapping[str, Any] = {}
    for group in (quantization.get("config_groups") or {}).values():
        if not group or not group.get("weights"):
            continue
        patterns = [target[3:] for target in group["targets"] if target.startswith("re:")]
        if module in group["targets"] or any(re.match(p, module) for p in patterns):
            return group["weights"]
        if any(target[:1].isupper() for target in group["targets"]):
            by_class = by_class or group["weights"]
    return by_class


def make_config(formats: Mapping[str, Format], plain: Collection[str]) -> dict[str, Any]:
    """The quantization_config of compressed-tensors for packed weights of these formats.

    plain: the names of the matrices that are stored as they are. The most frequent format is that
    of the class of linear layers; the modules of others are listed, in groups that come first.
    """
    groups = []
    for form, _ in reversed(Counter(formats.values()).most_common()):
        names = [w.removesuffix(".weight") for w, other in formats.items() if other == form]
        groups.append((names, make_scheme(form)))
    groups[-1] = (["Linear"], groups[-1][1])
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[1],
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": scheme}
            for i, (targets, scheme) in enumerate(groups)
        },
        "ignore": sorted(name.removesuffix(".weight") for name in plain),
    }


def make_scheme(form: Format) -> dict[str, Any]:
    grouped = form.group_size is not None
    scheme = {"num_bits": form.bits, "type": "int", "symmetric": True, "dynamic": False}
    scheme["strategy"] = "group" if grouped else "channel"
    return scheme | ({"group_size": form.group_size} if grouped else {})
