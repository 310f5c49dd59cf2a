"""Sparse mixture-of-experts feed-forward layers. Needs torch only and knows no transformer."""

from .balance import (
    count_tokens,
    expert_balance_loss,
    expert_load,
    router_z_loss,
    sequence_balance_loss,
    updated_selection_bias,
)
from .config import Config, ConfigError, Count, Limit, Positive, Size, check_types, one_of
from .experts import Biases, Experts, experts_grouped, experts_loop
from .feed_forward import Clamp, DenseConfig, FeedForward
from .layer import MoE, MoEConfig
from .record import Recorded, in_backward, keep_hooks, layer_numbers, record_routing, routers
from .routing import ExpertChoice, Router, RouterConfig, Routing, TopK, TopP, exact_products
from .segments import is_traced, product_of_rows, register_operation
