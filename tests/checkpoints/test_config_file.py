"""Fields of a published config are read with their type, range and spellings; defaults apply."""

import pytest

from checkpoints.config_file import Fields
from moe import ConfigError


def test_the_first_spelling_that_is_present_wins():
    fields = Fields({"old": 3, "new": 4, "null": None})
    assert fields.integer("new", "old") == 4
    assert fields.integer("absent", "old") == 3
    assert fields.integer("null", "old") == 3


def test_null_and_absence_give_the_default_and_zero_does_not():
    fields = Fields({"null": None, "zero": 0, "no": False})
    assert fields.integer("null", default=7) == fields.integer("absent", default=7) == 7
    assert fields.integer("zero", default=7, at_least=0) == 0
    assert fields.flag("no", default=True) is False
    assert fields.number("zero", default=1.0) == 0.0
    assert fields.optional_integer("null") is None
    assert fields.section("null") is None


def test_a_required_key_is_missing_under_all_of_its_names():
    with pytest.raises(ConfigError, match=r"^here\.a or b is missing$"):
        Fields({"a": None}, "here.").integer("a", "b")


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        ("integer", 0, "a whole number from 1 to 1000000"),
        ("integer", 1.0, "a whole number"),
        ("integer", True, "a whole number"),
        ("integer", "1", "a whole number"),
        ("integer", 10**6 + 1, "a whole number"),
        ("optional_integer", 0, "a whole number"),
        ("number", "1", "a finite number"),
        ("number", False, "a finite number"),
        ("number", float("nan"), "a finite number"),
        ("number", float("-inf"), "a finite number"),
        ("number", 10**400, "a finite number"),
        ("flag", 1, "true or false"),
        ("flag", "true", "true or false"),
        ("section", [], "an object"),
        ("section", "yarn", "an object"),
    ],
)
def test_a_value_of_another_type_or_range_is_named_with_what_was_expected(read, value, expected):
    with pytest.raises(ConfigError) as caught:
        getattr(Fields({"key": value}), read)("key")
    assert str(caught.value).startswith(f"key = {value!r}, expected {expected}")


@pytest.mark.parametrize("value", ["c", 1, [], {}, "A"])
def test_a_choice_outside_the_known_lists_them(value):
    with pytest.raises(ConfigError, match=r"expected one of a, b$"):
        Fields({"key": value}).choice("key", known=["a", "b"])


def test_an_error_inside_a_section_names_the_section():
    section = Fields({"rope_scaling": {"factor": "4"}}).section("rope_parameters", "rope_scaling")
    with pytest.raises(ConfigError, match=r"^rope_scaling.factor = '4', expected"):
        section.number("factor")


def test_what_nothing_asked_for_can_be_listed():
    fields = Fields({"c": 1, "a": 2, "b": None, "d": 3})
    fields.integer("a")
    fields.has("b")
    assert fields.unread() == ["c", "d"]


def test_trap_40_a_list_counts_as_far_as_there_are_layers_and_is_never_shorter():
    fields = Fields({"kinds": ["a", "b", "b", "a"], "sizes": [3, 5, 7, 9]})
    assert fields.layer_kinds("kinds", ["a", "b"], default=["a"] * 3) == ["a", "b", "b"]
    assert fields.per_layer(3, "sizes") == [3, 5, 7]
    with pytest.raises(ConfigError, match=r"^kinds = .*expected a list of at least 5 of a, b$"):
        fields.layer_kinds("kinds", ["a", "b"], default=["a"] * 5)
    with pytest.raises(ConfigError, match=r"^sizes = .*expected one for each of 5 layers$"):
        fields.per_layer(5, "sizes")
