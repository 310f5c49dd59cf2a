"""Ablation: what a text loses without an expert, and when two experts swap their tokens.

`python -m tools.examples.ablate_experts`, in the root of the repository, prints:

    loss 3.472; thousandths more without each expert, and with each pair swapped:
    layer 1, without:  +2  +4  -4  +0  +3  +2 +10  +1  +0  +5  -2  +6  +0  -3  -9  +0
    layer 1, swapped:      +2      -5      +3     +10      +4      +8      -2      -8
    layer 2, without:  -2  -2 +20  +2  +5  -5  -2  -1  -2  -5  +9 +13 +11  +0  +4  +5
    layer 2, swapped:      +7     +15      -2      +3      -6     +26     +10      +8
    layer 3, without:  +6 +16  +1 +24  +3  -1  +7 +13 +10  +5  +5 +28 +21 +44 +18 +11
    layer 3, swapped:     +34     +39      +9     +13     +16     +39     +71     +44

In layer 3, which matters most, seven of eight swaps cost more than both losses together.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints import load_model, load_tokenizer
from modeling import next_token_loss
from moe import MoE, Routing, layer_numbers


def reroute(targets_E: Tensor, router: nn.Module, inputs: tuple, routing: Routing) -> Routing:
    """A forward hook: the tokens of expert e go to targets[e]; to no expert if that is E."""
    experts_NK = targets_E[routing.experts_NK]
    weights_NK = routing.weights_NK.where(experts_NK < len(targets_E), 0)
    return replace(routing, experts_NK=experts_NK, weights_NK=weights_NK)


def main() -> None:
    model = load_model("checkpoints/pretrained", dtype=torch.float32, mtp=False)
    tokenizer = load_tokenizer("checkpoints/pretrained")
    tale_BT = torch.tensor([tokenizer.encode(Path("tools/examples/tale.txt").read_text())[:256]])

    def loss() -> float:
        states_BTD = model.hidden_states(tale_BT).normed_BTD
        return next_token_loss(states_BTD, model.head, tale_BT).item()

    whole, every_E = loss(), torch.arange(16)
    removed = [every_E.where(every_E != expert, 16) for expert in range(16)]
    swapped = [every_E.where(every_E // 2 != pair, every_E ^ 1) for pair in range(8)]
    print(f"loss {whole:.3f}; thousandths more without each expert, and with each pair swapped:")
    for module, layer in layer_numbers(model).items():
        if isinstance(module, MoE):
            for name, width, changes in (("without", 4, removed), ("swapped", 8, swapped)):
                row = f"layer {layer}, {name}:"
                for targets_E in changes:
                    with module.router.register_forward_hook(partial(reroute, targets_E)):
                        row += f"{1000 * (loss() - whole):+z{width}.0f}"
                print(row)


if __name__ == "__main__":
    main()
