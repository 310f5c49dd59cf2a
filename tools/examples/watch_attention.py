"""Attention: where each head looks while the model writes.

`python -m tools.examples.watch_attention`, in the root of the repository, prints:

    Once upon a time there was a king, and the king's son, and he was a king's son.
    layer  the token before      behind the same token  the last token looks at
    0       16%  8%  8% 17%         5%  5%  5%  5%  'Once' 'Once' ',' ' was'
    1       15% 11% 24%  6%         8% 12% 11%  2%  ' there' ' and' ' was' ' was'
    2       10% 44% 21% 13%         7%  3%  7%  5%  'Once' 's' ' king' ' there'
    3       11% 25% 46% 65%         6%  8%  6%  0%  ' was' ' was' 's' ' a'
    even    12%                     7%

Columns are heads 0 to 3; "even": even attention. Head 3 of layer 3 looks at the token before. No
head looks mainly at what stood behind an earlier copy of its token, as an induction head would.
"""

import torch

from checkpoints import load_model, load_tokenizer
from modeling import generate, record_attention


def main() -> None:
    model = load_model("checkpoints/pretrained", dtype=torch.float32)
    tokenizer = load_tokenizer("checkpoints/pretrained")
    prompt = tokenizer.encode("Once upon a time there was a king, and the king")
    with record_attention(model) as recorded:
        ids = prompt + list(generate(model, prompt, max_new_tokens=13))
    print(tokenizer.decode(ids))
    read_T = torch.tensor(ids[:-1])  # the model has not read the last token
    copies_TS = (read_T[:, None] == read_T).tril(-1)  # which earlier tokens are the same
    followers_TS = copies_TS.roll(1, dims=1)  # and which stand behind such a one
    repeated_T = copies_TS.any(dim=1)

    def show(name: str, weights_HTS: torch.Tensor, last: str = "") -> None:
        before_H = weights_HTS.diagonal(-1, 1, 2).mean(dim=1)
        copied_H = (weights_HTS * followers_TS).sum(dim=2)[:, repeated_T].mean(dim=1)
        shares = ("".join(f"{share:4.0%}" for share in x_H) for x_H in (before_H, copied_H))
        print(f"{name:7}" + "     ".join(f"{share:18}" for share in shares) + last)

    print("layer  the token before      behind the same token  the last token looks at")
    for layer, attention in recorded.items():
        weights_HTS = attention.weights_BHTS[0]
        seen = [tokenizer.decode([ids[s]]) for s in weights_HTS[:, -1].argmax(dim=1).tolist()]
        show(str(layer), weights_HTS, " ".join(map(repr, seen)))
    even_TS = torch.ones_like(copies_TS).tril() / (torch.arange(len(read_T)) + 1)[:, None]
    show("even", even_TS[None])


if __name__ == "__main__":
    main()
