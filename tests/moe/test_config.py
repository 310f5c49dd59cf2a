"""The description of one sparse layer: what it accepts, and how it refuses."""

import dataclasses
import re

import pytest

from moe import Clamp, ConfigError, MoEConfig

PLAIN = {"num_experts": 8, "top_k": 2, "expert_width": 16, "scoring": "softmax"}
GROUPED = PLAIN | {"num_groups": 4, "groups_kept": 2, "group_score": "top2_sum"}
COUNTS = ["num_experts", "top_k", "expert_width", "num_groups", "groups_kept"]


def refusal(**fields):
    """The message with which a config of these fields is refused."""
    with pytest.raises(ConfigError) as caught:
        MoEConfig(**fields)
    return str(caught.value)


def test_the_four_fields_without_a_default_make_a_layer_without_extras():
    config = MoEConfig(**PLAIN)
    assert (config.num_groups, config.groups_kept, config.shared_width) == (1, 1, 0)
    assert (config.selection_bias, config.normalize) == (False, False)
    assert (config.normalize_epsilon, config.scale) == (0.0, 1.0)
    assert config.router_precision == "float32"
    assert (config.expert_biases, config.router_bias, config.clamp) == (False, False, None)
    assert (config.shared_gate, config.normalize_minimum) == (False, 0.0)


@pytest.mark.parametrize("missing", PLAIN)
def test_what_defines_the_architecture_has_no_default(missing):
    with pytest.raises(TypeError, match=missing):
        MoEConfig(**{field: value for field, value in PLAIN.items() if field != missing})


def test_a_config_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig(**PLAIN).top_k = 3


@pytest.mark.parametrize("value", [0, -1, True, False, "2", 2.0, None])
@pytest.mark.parametrize("field", COUNTS)
def test_a_count_that_is_no_positive_whole_number_is_refused_by_name(field, value):
    message = refusal(**PLAIN | {field: value})
    assert message.startswith(f"{field} = {value!r}:")
    assert "whole number >= 1" in message


@pytest.mark.parametrize("value", [-1, True, "0", 1.5, None])
def test_a_shared_width_that_is_no_whole_number_is_refused_by_name(value):
    message = refusal(**PLAIN, shared_width=value)
    assert message.startswith(f"shared_width = {value!r}:")
    assert "whole number >= 0" in message


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("scoring", ["softmax", "sigmoid"]),
        ("router_precision", ["float32", "weights"]),
        ("group_score", ["max", "top2_sum"]),
    ],
)
@pytest.mark.parametrize("value", ["noaux_tc", "", None, 1, ["softmax"]])
def test_an_unknown_choice_is_refused_with_the_list_of_known_ones(field, known, value):
    message = refusal(**PLAIN | {field: value})
    assert message.startswith(f"{field} = {value!r}:")
    assert all(name in message for name in known)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k": 9}, "top_k = 9: must be <= num_experts = 8"),
        ({"num_groups": 3}, "num_groups = 3: must divide num_experts = 8"),
        ({"num_groups": 4, "groups_kept": 5}, "groups_kept = 5: must be <= num_groups = 4"),
        ({"num_groups": 4, "groups_kept": 2, "top_k": 5}, "top_k = 5: must be <= the 4 experts"),
        (
            {"num_groups": 8, "groups_kept": 8, "group_score": "top2_sum"},
            "group_score = 'top2_sum'",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes, said):
    assert said in refusal(**PLAIN | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 8},
        {"num_groups": 8, "groups_kept": 8},
        {"num_groups": 4, "groups_kept": 4, "top_k": 8},
        {"num_groups": 4, "groups_kept": 2, "top_k": 4, "group_score": "top2_sum"},
        {"num_experts": 1, "top_k": 1, "group_score": "top2_sum"},
    ],
)
def test_the_largest_value_that_fits_is_accepted(changes):
    assert dataclasses.replace(MoEConfig(**PLAIN | changes)) == MoEConfig(**PLAIN | changes)


@pytest.mark.parametrize("value", [0, 0.0, -2.5, float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_not_positive_and_finite_is_refused_by_name(value):
    assert refusal(**PLAIN, scale=value).startswith(f"scale = {value!r}:")


@pytest.mark.parametrize("value", [-1e-20, 1, 1.0, float("nan"), float("inf"), True, "0", None])
@pytest.mark.parametrize("field", ["normalize_epsilon", "normalize_minimum"])
def test_an_epsilon_or_minimum_outside_zero_to_one_is_refused_by_name(field, value):
    assert refusal(**PLAIN | {field: value}).startswith(f"{field} = {value!r}:")


@pytest.mark.parametrize("value", [0, 1, None, "false"])
@pytest.mark.parametrize(
    "field", ["expert_biases", "router_bias", "selection_bias", "normalize", "shared_gate"]
)
def test_a_flag_that_is_neither_true_nor_false_is_refused_by_name(field, value):
    said = refusal(**PLAIN | {"shared_width": 4, field: value})
    assert said == f"{field} = {value!r}: must be True or False"


def test_a_gate_needs_a_shared_expert():
    assert refusal(**PLAIN, shared_gate=True).startswith("shared_gate = True: there is no shared")
    assert MoEConfig(**PLAIN, shared_gate=True, shared_width=1).shared_gate


@pytest.mark.parametrize(
    "value", [0, 0.0, -1.0, float("inf"), float("-inf"), float("nan"), "7", None, True]
)
@pytest.mark.parametrize("field", ["limit", "alpha"])
def test_a_bound_of_the_activation_that_is_not_positive_and_finite_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"^{field} = {re.escape(repr(value))}:"):
        Clamp(**{"limit": 7.0, "alpha": 1.702} | {field: value})


@pytest.mark.parametrize("missing", ["limit", "alpha"])
def test_a_clamp_has_no_defaults_and_cannot_be_changed(missing):
    numbers = {"limit": 7.0, "alpha": 1.702}
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Clamp(**numbers), missing, 1.0)
    del numbers[missing]
    with pytest.raises(TypeError, match=missing):
        Clamp(**numbers)


def test_a_config_error_is_a_value_error():
    with pytest.raises(ValueError, match=re.escape("top_k = 0")):
        MoEConfig(**PLAIN | {"top_k": 0})


def test_replacing_a_field_checks_the_config_again():
    with pytest.raises(ConfigError, match="groups_kept = 1|top_k = 4"):
        dataclasses.replace(MoEConfig(**GROUPED), top_k=4, groups_kept=1)
