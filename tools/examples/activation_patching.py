"""Activation patching: where the word that decides between " he" and " she" acts.

`python -m tools.examples.activation_patching`, in the root of the repository, prints:

    logit of ' he' over ' she': king 2.94, queen -1.37
    patched       Then     the   queen    went    into     the  forest       ,     and    when
    into 0          0%      0%    100%      0%      0%      0%      0%      0%      0%      0%
    into 1          0%      0%    100%      0%      0%      0%      0%      0%      0%      0%
    into 2          0%      0%     99%      0%      0%      1%      0%      0%      0%      0%
    into 3          0%      0%      2%      0%      0%      0%      0%      0%      0%     97%

A share is what one state of the king's run brings back of the difference. Up to the input of layer
2 it is all in the state of the word itself, behind that layer in the state of the last token.
"""

import torch
from torch import Tensor, nn

from checkpoints import load_model, load_tokenizer
from modeling import record_states


def main() -> None:
    model = load_model("checkpoints/pretrained", dtype=torch.float32)
    tokenizer = load_tokenizer("checkpoints/pretrained")
    (he,), (she,) = tokenizer.encode(" he"), tokenizer.encode(" she")
    king, queen = (
        tokenizer.encode(f"Then the {who} went into the forest, and when")
        for who in ("king", "queen")
    )

    def difference(ids: list[int]) -> float:
        logits_V = model(torch.tensor([ids]))[0, -1]
        return (logits_V[he] - logits_V[she]).item()

    with record_states(model) as clean:
        best = difference(king)
    worst = difference(queen)

    def recovered(layer: int, position: int) -> float:
        """Which share of the difference one state of the king's run brings back."""

        def patch(block: nn.Module, inputs: tuple) -> tuple:
            x_BTD: Tensor = inputs[0].clone()
            x_BTD[:, position] = clean[layer].before_BTD[:, position]
            return x_BTD, *inputs[1:]

        with model.layers[layer].register_forward_pre_hook(patch):
            return (difference(queen) - worst) / (best - worst)

    print(f"logit of ' he' over ' she': king {best:.2f}, queen {worst:.2f}")
    print("patched   " + "".join(f"{tokenizer.decode([token]):>8}" for token in queen))
    for layer in clean:
        shares = [recovered(layer, position) for position in range(len(queen))]
        print(f"into {layer}    " + "".join(f"{share:z8.0%}" for share in shares))


if __name__ == "__main__":
    main()
