"""Forced routing: what the loss becomes when tokens are sent to other experts than their own.

`python -m tools.examples.forced_routing`, in the root of the repository, prints:

    its own two              3.537
    the best four            3.526
    the best one             3.601
    third and fourth best    3.948
    0 and 1 for every token  3.900
    two at random            4.010

Experts are specialised: others than the chosen two cost 0.3 nats or more, and the runners-up are
hardly better than random ones. Two more of the best, or one less, change little.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from checkpoints import load_model, load_tokenizer
from modeling import next_token_loss
from moe import MoE, Routing

RULES = {  # the experts of each token, (N, K)
    "its own two": lambda routing: routing.experts_NK,
    "the best four": lambda routing: routing.scores_NE.topk(4).indices,
    "the best one": lambda routing: routing.scores_NE.topk(1).indices,
    "third and fourth best": lambda routing: routing.scores_NE.topk(4).indices[:, 2:],
    "0 and 1 for every token": lambda routing: torch.tensor([0, 1]).expand_as(routing.experts_NK),
    "two at random": lambda routing: torch.rand(routing.scores_NE.shape).topk(2).indices,
}


def force(name: str, router: torch.nn.Module, inputs: tuple, routing: Routing) -> Routing:
    """Other experts, weighed by their own scores as the model would: a router's forward hook."""
    experts_NK = RULES[name](routing)
    weights_NK = routing.scores_NE.gather(1, experts_NK)
    weights_NK = weights_NK / weights_NK.sum(dim=1, keepdim=True)
    return replace(routing, experts_NK=experts_NK, weights_NK=weights_NK)


def main() -> None:
    torch.manual_seed(0)
    model = load_model("checkpoints/pretrained", dtype=torch.float32, mtp=False)
    tokenizer = load_tokenizer("checkpoints/pretrained")
    tale_BT = torch.tensor([tokenizer.encode(Path("tools/examples/tale.txt").read_text())[:512]])
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    for name in RULES:
        hooks = [router.register_forward_hook(partial(force, name)) for router in routers]
        states_BTD = model.hidden_states(tale_BT).normed_BTD
        print(f"{name:24} {next_token_loss(states_BTD, model.head, tale_BT):.3f}")
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    main()
