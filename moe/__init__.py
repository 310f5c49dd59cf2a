"""Sparse mixture-of-experts feed-forward layers. Needs torch only and knows no transformer."""

from .balance import (
    expert_balance_loss,
    expert_load,
    router_z_loss,
    sequence_balance_loss,
    updated_selection_bias,
)
from .config import (
    Clamp,
    ConfigError,
    MoEConfig,
    require,
    require_choice,
    require_flag,
    require_int,
    require_number,
)
from .experts import Biases, Experts, experts_grouped, experts_loop
from .feed_forward import FeedForward
from .layer import MoE
from .record import record_routing, routers
from .routing import Router, Routing, route

__all__ = [
    "Biases",
    "Clamp",
    "ConfigError",
    "Experts",
    "FeedForward",
    "MoE",
    "MoEConfig",
    "Router",
    "Routing",
    "expert_balance_loss",
    "expert_load",
    "experts_grouped",
    "experts_loop",
    "record_routing",
    "require",
    "require_choice",
    "require_flag",
    "require_int",
    "require_number",
    "route",
    "router_z_loss",
    "routers",
    "sequence_balance_loss",
    "updated_selection_bias",
]
