"""Configs check themselves: what they accept, and how they refuse."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import sparse
from torch import nn

from moe import (
    Clamp,
    Config,
    ConfigError,
    Count,
    DenseConfig,
    ExpertChoice,
    Limit,
    MoEConfig,
    Positive,
    Size,
    TopK,
    TopP,
    one_of,
)

PLAIN = {"num_experts": 8, "top_k": 2, "scoring": "softmax"}
GROUPED = PLAIN | {"num_groups": 4, "groups_kept": 2, "group_score": "top2_sum"}
COUNTS = ["num_experts", "top_k", "num_groups", "groups_kept"]
CHOICE = {"num_experts": 8, "capacity": 2}


def refusal(kind, **fields):
    """The message with which a config of these fields is refused."""
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    return str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Everything(Config):
    """A field of every kind of annotation."""

    whole: int = 0
    count: Count = 1
    size: Size = 0
    number: float = 0.5
    positive: Positive = 2
    flag: bool = False
    word: str = "any"
    chosen: Annotated[str, one_of(["a", "b"])] = "a"
    literal: Literal["x", "y"] = "x"
    even: Annotated[int, Limit("an even number", lambda value: value % 2 == 0)] = 2
    maybe: Count | None = None
    clamp: Clamp | None = None
    clamps: tuple[Clamp, ...] = ()
    counts: tuple[Count, ...] = (1, 2)
    anything: Any = None


CLAMP = Clamp(limit=1.0, alpha=1.0)
RIGHT = {
    "whole": [-3, 0, 10**20],
    "count": [1, 7],
    "size": [0, 7],
    "number": [0.0, -1.5, 3],
    "positive": [1e-300, 3],
    "flag": [True, False],
    "word": ["", "x"],
    "chosen": ["a", "b"],
    "literal": ["y"],
    "even": [0, -2],
    "maybe": [None, 3],
    "clamp": [None, CLAMP],
    "clamps": [(), (CLAMP, CLAMP)],
    "counts": [(), (5,)],
    "anything": [None, [], object()],
}
WRONG = {
    "whole": ([True, 1.0, "1", None, [1]], "a whole number"),
    "count": ([0, -1, True, 1.0, "1", None], "a whole number >= 1"),
    "size": ([-1, False, 0.0, None], "a whole number >= 0"),
    "number": ([True, "1", None, float("nan"), float("inf")], "a finite number"),
    "positive": ([0, -1.0, False, float("inf"), "2", None], "a number > 0"),
    "flag": ([0, 1, None, "true"], "True or False"),
    "word": ([1, None, b"x"], "a string"),
    "chosen": (["c", "", 1, None, ["a"]], "one of a, b"),
    "literal": (["z", None, 1], "one of x, y"),
    "even": ([1, "2", None], "an even number"),
    "maybe": ([0, "3", 1.5], "a whole number >= 1 or None"),
    "clamp": ([1, "clamp", (CLAMP,)], "of type Clamp or None"),
    "clamps": ([None, [CLAMP], CLAMP], "of type tuple"),
    "counts": ([(1, 0), ("1",), (None,)], "a tuple, each a whole number >= 1"),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in RIGHT.items() for v in vs])
def test_a_value_of_the_annotated_type_is_accepted_as_it_is(field, value):
    assert getattr(Everything(**{field: value}), field) is value


@pytest.mark.parametrize(
    ("field", "value", "rule"), [(f, v, rule) for f, (vs, rule) in WRONG.items() for v in vs]
)
def test_any_other_is_refused_by_class_field_value_and_rule(field, value, rule):
    said = refusal(Everything, **{field: value})
    assert said.startswith(f"Everything.{field} = {value!r}: must be {rule}")


def test_a_number_that_knows_its_published_name_is_named_so_in_its_own_rule_and_in_others():
    class Named(int):
        published_name = "n_routed_experts"

    experts = Named(8)
    assert refusal(TopK, **PLAIN | {"num_experts": experts, "top_k": 9}) == (
        "TopK.top_k = 9: must be <= n_routed_experts = 8"
    )
    groups = refusal(TopK, **PLAIN | {"num_groups": experts, "num_experts": 12})
    assert groups == "n_routed_experts = 8: must divide num_experts = 12"
    assert refusal(TopK, **PLAIN | {"num_experts": Named(0)}).startswith("n_routed_experts = 0:")


def test_what_defines_the_architecture_has_no_default_and_the_rest_is_off():
    config = MoEConfig(router=TopK(**PLAIN), expert_width=16)
    router = config.router
    assert (router.num_groups, router.groups_kept, config.shared_width) == (1, 1, 0)
    assert (router.selection_bias, router.normalize) == (False, False)
    assert (router.normalize_epsilon, router.normalize_minimum, router.scale) == (0.0, 0.0, 1.0)
    assert (router.router_precision, router.router_bias) == ("float32", False)
    assert (config.expert_biases, config.clamp, config.shared_gate) == (False, None, False)
    for kind, needed in (
        (TopK, PLAIN),
        (TopP, {"num_experts": 4, "mass": 0.5, "max_experts": 4}),
        (ExpertChoice, CHOICE),
        (MoEConfig, {"router": TopK(**PLAIN), "expert_width": 1}),
        (Clamp, {"limit": 7.0, "alpha": 1.702}),
        (DenseConfig, {"width": 3}),
    ):
        for missing in needed:
            with pytest.raises(TypeError, match=missing):
                kind(**{field: value for field, value in needed.items() if field != missing})
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(**needed), next(iter(needed)), 3)


@pytest.mark.parametrize("value", [0, -1, True, False, "2", 2.0, None])
@pytest.mark.parametrize("field", COUNTS)
def test_a_count_that_is_no_positive_whole_number_is_refused_by_name(field, value):
    message = refusal(TopK, **PLAIN | {field: value})
    assert message.startswith(f"TopK.{field} = {value!r}: must be a whole number >= 1")


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
    message = refusal(TopK, **PLAIN | {field: value})
    assert message.startswith(f"TopK.{field} = {value!r}:")
    assert all(name in message for name in known)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (TopK, PLAIN | {"top_k": 9}, "top_k = 9: must be <= num_experts = 8"),
        (TopK, PLAIN | {"num_groups": 3}, "num_groups = 3: must divide num_experts = 8"),
        (
            TopK,
            PLAIN | {"num_groups": 4, "groups_kept": 5},
            "groups_kept = 5: must be <= num_groups = 4",
        ),
        (
            TopK,
            PLAIN | {"num_groups": 4, "groups_kept": 2, "top_k": 5},
            "top_k = 5: must be <= the 4 experts of groups_kept = 2 of num_groups = 4",
        ),
        (
            TopK,
            PLAIN | {"num_groups": 8, "groups_kept": 8, "group_score": "top2_sum"},
            "num_groups = 8: must leave two experts in a group for group_score = 'top2_sum'",
        ),
        (
            TopP,
            {"num_experts": 4, "mass": 0.5, "max_experts": 5},
            "max_experts = 5: must be <= num_experts = 4",
        ),
        (ExpertChoice, CHOICE | {"capacity": 9}, "capacity = 9: must be <= num_experts = 8"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(kind, fields, said):
    assert refusal(kind, **fields) == f"{kind.__name__}.{said}"


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
    assert dataclasses.replace(TopK(**PLAIN | changes)) == TopK(**PLAIN | changes)


@pytest.mark.parametrize("value", [0, 0.0, -2.5, float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_not_positive_and_finite_is_refused_by_name(value):
    assert refusal(TopK, **PLAIN, scale=value).startswith(f"TopK.scale = {value!r}:")


@pytest.mark.parametrize("value", [-1e-20, 1, 1.0, float("nan"), float("inf"), True, "0", None])
@pytest.mark.parametrize("field", ["normalize_epsilon", "normalize_minimum"])
def test_an_epsilon_or_minimum_outside_zero_to_one_is_refused_by_name(field, value):
    assert refusal(TopK, **PLAIN | {field: value}).startswith(f"TopK.{field} = {value!r}:")


@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan"), True, "1", None])
def test_a_mass_outside_zero_to_one_is_refused_by_name(value):
    said = refusal(TopP, num_experts=4, max_experts=4, mass=value)
    assert said.startswith(f"TopP.mass = {value!r}: must be a number above 0, at most 1")


@pytest.mark.parametrize("value", [0, 1, None, "false"])
@pytest.mark.parametrize(
    "field", ["expert_biases", "router_bias", "selection_bias", "normalize", "shared_gate"]
)
def test_a_flag_that_is_neither_true_nor_false_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"\.{field} = {value!r}: must be True or False$"):
        sparse(**PLAIN | {"expert_width": 2, "shared_width": 4, field: value})


def test_a_gate_needs_a_shared_expert():
    said = refusal(MoEConfig, router=TopK(**PLAIN), expert_width=1, shared_gate=True)
    assert said == "MoEConfig.shared_gate = True: must be False: there is no shared expert to gate"
    assert sparse(**PLAIN, expert_width=1, shared_gate=True, shared_width=1).shared_gate


@pytest.mark.parametrize("value", [None, TopK, "top_k", Clamp(limit=1.0, alpha=1.0)])
def test_a_router_that_cannot_be_built_is_refused(value):
    said = refusal(MoEConfig, router=value, expert_width=1)
    assert said.startswith("MoEConfig.router = ")
    assert said.endswith("must be of type RouterConfig")


def test_a_router_that_breaks_the_contract_is_refused_when_it_is_built():
    class Careless:
        num_experts, experts_per_token = 4, 2

        def build(self, d_model):
            return nn.Linear(d_model, 4)

    with pytest.raises(TypeError, match="Careless builds a Linear without num_experts or sel"):
        MoEConfig(router=Careless(), expert_width=2).build(8)


@pytest.mark.parametrize(
    "value", [0, 0.0, -1.0, float("inf"), float("-inf"), float("nan"), "7", None, True]
)
@pytest.mark.parametrize("field", ["limit", "alpha"])
def test_a_bound_of_the_activation_that_is_not_positive_and_finite_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"^Clamp\.{field} = {re.escape(repr(value))}:"):
        Clamp(**{"limit": 7.0, "alpha": 1.702} | {field: value})


def test_a_config_error_is_a_value_error():
    with pytest.raises(ValueError, match=re.escape("top_k = 0")):
        TopK(**PLAIN | {"top_k": 0})


def test_replacing_a_field_checks_the_config_again():
    with pytest.raises(ConfigError, match="top_k = 4"):
        dataclasses.replace(TopK(**GROUPED), top_k=4, groups_kept=1)


@given(st.integers(-3, 12), st.integers(-3, 12), st.integers(-3, 5), st.integers(-3, 5))
def test_whatever_is_accepted_can_be_built_and_routes(experts, top_k, groups, kept):
    fields = {"num_experts": experts, "top_k": top_k, "num_groups": groups, "groups_kept": kept}
    try:
        config = TopK(**fields, scoring="softmax")
    except ConfigError as error:
        named = re.match(r"TopK\.(\w+) = (-?\d+):", str(error))
        assert fields[named[1]] == int(named[2])
        return
    assert config.build(4)(torch.randn(3, 4)).experts_NK.shape == (3, top_k)
