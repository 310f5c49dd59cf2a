"""Logit lens: what the state at each depth would predict if it went straight to the head.

`python -m tools.examples.logit_lens`, in the root of the repository, prints:

    state after                loss  next token of "Once upon a"
    embedding                 8.330  ' See' 2%
    attention of layer 0      8.312  'le' 2%
    feed-forward of layer 0   5.037  ' little' 8%
    attention of layer 1      4.684  ' little' 12%
    feed-forward of layer 1   4.699  ' little' 13%
    attention of layer 2      4.508  ' little' 11%
    feed-forward of layer 2   4.378  ' great' 11%
    attention of layer 3      4.040  ' great' 8%
    feed-forward of layer 3   3.537  ' time' 93%

The first feed-forward layer makes most of the guess (8.3 to 5.0 nats); that "time" follows "Once
upon a" appears with the last one alone.
"""

from pathlib import Path

import torch
from torch import Tensor

from checkpoints import load_model, load_tokenizer
from modeling import next_token_loss, record_states


def main() -> None:
    model = load_model("checkpoints/pretrained", dtype=torch.float32)
    tokenizer = load_tokenizer("checkpoints/pretrained")
    tale_BT = torch.tensor([tokenizer.encode(Path("tools/examples/tale.txt").read_text())[:512]])
    prompt_BT = torch.tensor([tokenizer.encode("Once upon a")])
    with record_states(model) as of_tale:
        model(tale_BT)
    with record_states(model) as of_prompt:
        model(prompt_BT)

    def show(name: str, tale_BTD: Tensor, prompt_BTD: Tensor) -> None:
        loss = next_token_loss(model.norm(tale_BTD), model.head, tale_BT)
        probability_V = model.head(model.norm(prompt_BTD[0, -1])).softmax(dim=-1)
        best = int(probability_V.argmax())
        print(f"{name:23}{loss:8.3f}  {tokenizer.decode([best])!r} {probability_V[best]:.0%}")

    print('state after                loss  next token of "Once upon a"')
    show("embedding", of_tale[0].before_BTD, of_prompt[0].before_BTD)
    for layer, tale in of_tale.items():
        show(f"attention of layer {layer}", tale.between_BTD, of_prompt[layer].between_BTD)
        show(f"feed-forward of layer {layer}", tale.after_BTD, of_prompt[layer].after_BTD)


if __name__ == "__main__":
    main()
