"""What one sparse layer is, as data. Says what the architecture is, never whose it is."""

from dataclasses import dataclass

from .scoring import GROUP_SCORES, SCORING


class ConfigError(ValueError):
    """A configuration field has a value that no model can have; names field, value and rule."""


def require(holds: bool, field: str, value: object, rule: str) -> None:
    """Raise `ConfigError` naming `field`, `value` and `rule` unless `holds`."""
    if not holds:
        raise ConfigError(f"{field} = {value!r}: {rule}")


def require_int(field: str, value: object, *, at_least: int = 1) -> None:
    """Raise `ConfigError` unless `value` is a whole number (and no bool) of at least `at_least`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= at_least, field, value, f"must be a whole number >= {at_least}")  # type: ignore[operator]


def require_number(field: str, value: object, above: float, below: float) -> None:
    """Raise `ConfigError` unless `value` is a number (and no bool) strictly between the two."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    rule = f"must be a number between {above} and {below}"
    require(real and above < value < below, field, value, rule)  # type: ignore[operator]


def require_flag(field: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is True or False."""
    require(isinstance(value, bool), field, value, "must be True or False")


def require_choice(field: str, value: object, known: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `known`."""
    require(value in known, field, value, f"must be one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """Bounds inside a gated activation: see `feed_forward.clamped_swiglu`."""

    limit: float  # of gate (from above) and up (from both sides)
    alpha: float  # slope of the sigmoid that gates

    def __post_init__(self) -> None:
        require_number("limit", self.limit, 0, float("inf"))
        require_number("alpha", self.alpha, 0, float("inf"))


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One mixture-of-experts layer.

    The order of the fields is the order of the computation: score, choose, weigh, run. Which
    published model uses which value is known to `checkpoints.families` alone.
    """

    # routed experts
    num_experts: int
    top_k: int
    expert_width: int  # hidden width F of one routed expert
    expert_biases: bool = False  # on all three of an expert's products
    clamp: Clamp | None = None  # of the routed experts' activation; None: plain SwiGLU

    # scoring
    scoring: str  # "softmax" or "sigmoid": a key of scoring.SCORING
    router_precision: str = "float32"  # of the router's matrix product: "float32" or "weights"
    router_bias: bool = False  # added to the logits, so it takes part in everything after

    # choosing
    selection_bias: bool = False  # a bias per expert that takes part in choosing, never in weighing
    num_groups: int = 1  # experts in equal, consecutive groups; 1: no group limit
    groups_kept: int = 1  # a token's experts come from this many groups
    group_score: str = "max"  # "max" or "top2_sum": a key of scoring.GROUP_SCORES

    # weighing
    # Divide the chosen weights by their sum. Of softmax scores that leaves the softmax over the
    # chosen logits alone, so a model that takes the top K first and the softmax after says this.
    normalize: bool = False
    normalize_epsilon: float = 0.0  # added to that sum
    normalize_minimum: float = 0.0  # what that sum counts as at least
    scale: float = 1.0  # multiplies the weights, normalised or not

    # the expert that every token uses
    shared_width: int = 0  # 0: none. Several shared experts are one of their summed width.
    shared_gate: bool = False  # its output counts as much as the sigmoid of a linear score says

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "expert_width", "num_groups", "groups_kept"):
            require_int(field, getattr(self, field))
        require_int("shared_width", self.shared_width, at_least=0)
        require_choice("scoring", self.scoring, tuple(SCORING))
        require_choice("router_precision", self.router_precision, ("float32", "weights"))
        require_choice("group_score", self.group_score, tuple(GROUP_SCORES))
        experts, groups = self.num_experts, self.num_groups
        require(self.top_k <= experts, "top_k", self.top_k, f"must be <= num_experts = {experts}")
        divides = f"must divide num_experts = {experts}"
        require(experts % groups == 0, "num_groups", groups, divides)
        at_most = f"must be <= num_groups = {groups}"
        require(self.groups_kept <= groups, "groups_kept", self.groups_kept, at_most)
        reachable = self.groups_kept * (experts // groups)
        fits = f"must be <= the {reachable} experts of {self.groups_kept} of {groups} groups"
        require(self.top_k <= reachable, "top_k", self.top_k, fits)
        pairs = groups == 1 or self.group_score != "top2_sum" or experts // groups >= 2
        require(pairs, "group_score", self.group_score, "needs at least two experts in a group")
        for field in ("expert_biases", "router_bias", "selection_bias", "normalize", "shared_gate"):
            require_flag(field, getattr(self, field))
        for field in ("normalize_epsilon", "normalize_minimum"):
            if getattr(self, field) != 0:
                require_number(field, getattr(self, field), 0, 1)
        gated = self.shared_width > 0 or not self.shared_gate
        require(gated, "shared_gate", self.shared_gate, "there is no shared expert to gate")
        require_number("scale", self.scale, 0, float("inf"))
