"""Fine-tuning: plain torch on another kind of text, the MTP module trained along.

`python -m tools.examples.fine_tune`, in the root of the repository, prints:

    step  loss  of the MTP module  of unseen clauses
       0  4.91               4.96               4.73
       4  2.71               3.06               4.13
       8  1.53               1.92               3.96
    > The Congress shall have Power To make the Priest and the Water of the Water;  To make the P

Eight steps help with unseen clauses, too; what the model then writes mixes law and tale.
"""

from pathlib import Path

import torch

from checkpoints import load_model, load_tokenizer
from modeling import generate, mtp_loss, next_token_loss


def main() -> None:
    model = load_model("checkpoints/pretrained", dtype=torch.float32).requires_grad_()
    tokenizer = load_tokenizer("checkpoints/pretrained")
    clauses = Path("tools/examples/law.txt").read_text().split("\n\n")
    law_BT, unseen_BT = (
        torch.tensor([tokenizer.encode("\n\n".join(half))[:320]])
        for half in (clauses[::2], clauses[1::2])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    print("step  loss  of the MTP module  of unseen clauses")
    for step in range(9):
        states = model.hidden_states(law_BT)
        loss = next_token_loss(states.normed_BTD, model.head, law_BT)
        drafts = model.mtp_hidden_states(states, law_BT)
        loss_of_mtp = mtp_loss(drafts, model.mtp_heads, law_BT, depth_weights=[1.0])
        if step % 4 == 0:
            with torch.no_grad():
                unseen_BTD = model.hidden_states(unseen_BT).normed_BTD
                unseen = next_token_loss(unseen_BTD, model.head, unseen_BT)
            print(f"{step:4}  {loss:.2f}  {loss_of_mtp:17.2f}  {unseen:17.2f}")
        optimizer.zero_grad()
        (loss + 0.3 * loss_of_mtp).backward()
        optimizer.step()
    prompt = "The Congress shall have Power"
    ids = list(generate(model, tokenizer.encode(prompt), max_new_tokens=20, draft_tokens=1))
    print("> " + prompt + tokenizer.decode(ids).replace("\n", " "))


if __name__ == "__main__":
    main()
