"""Pruning: the experts that a text uses least are dropped, and the smaller model is saved.

`python -m tools.examples.prune_experts`, in the root of the repository, prints:

    whole  7,174,784 parameters, loss of the tale 3.537, of the law 4.926
    pruned 5,399,168 parameters, loss of the tale 3.618, of the law 5.229

The tale, whose use of experts decided, loses 0.08 nats; the other text loses 0.30.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints import load_model, load_tokenizer, save_model
from modeling import Transformer, next_token_loss
from moe import count_tokens, record_routing

KEPT = 8  # experts of a sparse layer, of 16
STACKED = "router.weight", "router.selection_bias", "experts.gate", "experts.up", "experts.down"


def main() -> None:
    model = load_model("checkpoints/pretrained", dtype=torch.float32, mtp=False)
    tokenizer = load_tokenizer("checkpoints/pretrained")
    files = [Path(f"tools/examples/{name}.txt") for name in ("tale", "law")]
    tale_BT, law_BT = (torch.tensor([tokenizer.encode(f.read_text())[:512]]) for f in files)

    def show(name: str, model: Transformer) -> None:
        tale, law = (
            next_token_loss(model.hidden_states(text_BT).normed_BTD, model.head, text_BT)
            for text_BT in (tale_BT, law_BT)
        )
        count = sum(p.numel() for p in model.parameters())
        print(f"{name:6} {count:,} parameters, loss of the tale {tale:.3f}, of the law {law:.3f}")

    show("whole", model)
    with record_routing(model) as routings:
        model(tale_BT)
    layers, state = list(model.config.layers), model.state_dict()
    for layer, routing in routings.items():
        kept = count_tokens(routing)[0].topk(KEPT).indices
        for name in (f"layers.{layer}.feed_forward.{part}" for part in STACKED):
            state[name] = state[name][kept]
        sparse: Any = layers[layer].feed_forward
        sparse = replace(sparse, router=replace(sparse.router, num_experts=KEPT))
        layers[layer] = replace(layers[layer], feed_forward=sparse)
    pruned = Transformer(replace(model.config, layers=tuple(layers)))
    pruned.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder:
        save_model(pruned, f"{folder}/pruned", to="abacus")  # fits no published config any more
        show("pruned", load_model(f"{folder}/pruned"))


if __name__ == "__main__":
    main()
