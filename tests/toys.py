"""Toy parts that are right and plainly written; tests plant one bug at a time into them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe import Config


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    """Builds the module of a class, right or wrong. The other fields are those of routers."""

    module: Any
    num_experts: int = 5
    experts_per_token: float = 2

    def build(self, d_model):
        return self.module(d_model)


class ToyLayer(nn.Module):
    """A feed-forward layer."""

    def __init__(self, d_model):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, 7), nn.Linear(7, d_model)

    def forward(self, x_BTD):
        return self.down(torch.tanh(self.up(x_BTD)))
