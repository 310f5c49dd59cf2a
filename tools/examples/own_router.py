"""A router of one's own: trained from scratch against top-k, with two seeds each.

`python -m tools.examples.own_router`, in the root of the repository, prints:

    TopK          loss 2.62, greatest load 4.0
    TopK          loss 2.62, greatest load 4.0
    Standardized  loss 2.56, greatest load 1.5
    Standardized  loss 2.58, greatest load 1.6

An expert's logits get mean 0 and deviation 1 over the tokens, so experts share the work (4: all use
the same two). A token's experts depend on later ones: that may help, and `generate` refuses it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from modeling import GQAConfig, LayerConfig, ModelConfig, RopeConfig, Transformer, next_token_loss
from moe import MoEConfig, Routing, TopK, expert_load, record_routing


@dataclass(frozen=True, kw_only=True)
class Standardized(TopK):
    sees_other_tokens: ClassVar[bool] = True

    def route(self, logits_NE: torch.Tensor, bias_E: torch.Tensor | None = None) -> Routing:
        even_NE = torch.nn.functional.layer_norm(logits_NE.T, logits_NE.shape[:1]).T
        return super().route(even_NE, bias_E)


def train(router: TopK, seed: int) -> None:
    """40 steps on the bytes of a tale; prints means over the last 20."""
    bytes_N = torch.tensor(list(Path("tools/examples/tale.txt").read_bytes()))
    attention = GQAConfig(num_heads=2, kv_heads=2, head_width=32, rope=RopeConfig(width=32))
    layer = LayerConfig(attention=attention, feed_forward=MoEConfig(router=router, expert_width=64))
    model = Transformer(ModelConfig(vocab_size=256, d_model=64, layers=(layer,) * 2, max_length=64))
    model.initialize(std=0.02, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, figures = torch.Generator().manual_seed(seed), []
    for _ in range(40):
        starts_B1 = torch.randint(len(bytes_N) - 64, (8, 1), generator=generator)
        tokens_BT = bytes_N[starts_B1 + torch.arange(64)]
        with record_routing(model) as routings:
            states_BTD = model.hidden_states(tokens_BT).normed_BTD
        loss = next_token_loss(states_BTD, model.head, tokens_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        figures.append((loss.item(), max(expert_load(r).max().item() for r in routings.values())))
    mean_loss, load = torch.tensor(figures[20:]).mean(dim=0)
    print(f"{type(router).__name__:13} loss {mean_loss:.2f}, greatest load {load:.1f}")


if __name__ == "__main__":
    for kind in (TopK, Standardized):
        for seed in (0, 1):
            train(kind(num_experts=8, top_k=2, scoring="softmax", normalize=True), seed)
