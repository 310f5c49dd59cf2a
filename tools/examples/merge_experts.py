"""Merging: the experts of two models, averaged, or side by side in one model.

`python -m tools.examples.merge_experts`, in the root of the repository, prints:

    first         loss of the tale 3.537, of the law 4.926
    second        loss of the tale 3.552, of the law 3.188
    average       loss of the tale 3.543, of the law 3.934
    side by side  loss of the tale 3.543, of the law 3.912

"second" is "first" with experts trained on the law. Averaged, or side by side (each expert is
chosen together with its trained copy), half of what was learnt is kept; the tale is hardly worse.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints import load_model, load_tokenizer
from modeling import Transformer, next_token_loss


def loss(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    return next_token_loss(model.hidden_states(tokens_BT).normed_BTD, model.head, tokens_BT)


def main() -> None:
    first = load_model("checkpoints/pretrained", dtype=torch.float32, mtp=False)
    tokenizer = load_tokenizer("checkpoints/pretrained")
    files = [Path(f"tools/examples/{name}.txt") for name in ("tale", "law")]
    tale_BT, law_BT = (torch.tensor([tokenizer.encode(f.read_text())[:512]]) for f in files)
    second = deepcopy(first)  # its experts learn the law, and nothing else changes
    trained = [p.requires_grad_() for name, p in second.named_parameters() if ".experts." in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        loss(second, law_BT).backward()
        optimizer.step()
    one, other = first.state_dict(), second.state_dict()
    average = deepcopy(first)
    average.load_state_dict({name: (one[name] + other[name]) / 2 for name in one})
    layers: list[Any] = list(first.config.layers)
    for i, layer in enumerate(layers):
        if f"layers.{i}.feed_forward.router.weight" in one:  # of a sparse layer
            router = replace(layer.feed_forward.router, num_experts=32, top_k=4)
            layers[i] = replace(layer, feed_forward=replace(layer.feed_forward, router=router))
    both = Transformer(replace(first.config, layers=tuple(layers)))
    stacked = [name for name in one if ".experts." in name or ".router." in name]
    both.load_state_dict(one | {name: torch.cat([one[name], other[name]]) for name in stacked})
    models = {"first": first, "second": second, "average": average, "side by side": both}
    for name, model in models.items():
        tale, law = loss(model, tale_BT), loss(model, law_BT)
        print(f"{name:13} loss of the tale {tale:.3f}, of the law {law:.3f}")


if __name__ == "__main__":
    main()
