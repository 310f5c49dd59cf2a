"""LoRA: adapters of peft on attention and on the stacked experts, trained, merged and saved.

`python -m tools.examples.lora`, in the root of the repository, prints:

    233,728 parameters are trained, those of the adapters
    before: loss 4.83
    after 8 steps: loss 2.71
    merged, saved and loaded: same logits, True

Merged into the weights, the adapters leave a plain model, which is saved like any other.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from checkpoints import load_model, load_tokenizer, save_model
from modeling import Transformer, next_token_loss

LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q", "kv_compress", "kv_expand", "o"],  # linear layers of attention
    target_parameters=["experts.gate", "experts.up", "experts.down"],  # (E, F, D) or (E, D, F)
)


def loss(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    return next_token_loss(model.hidden_states(tokens_BT).normed_BTD, model.head, tokens_BT)


def main() -> None:
    torch.manual_seed(0)
    model = load_model("checkpoints/pretrained", dtype=torch.float32, mtp=False)
    tokenizer = load_tokenizer("checkpoints/pretrained")
    law_BT = torch.tensor([tokenizer.encode(Path("tools/examples/law.txt").read_text())[:256]])
    adapters = get_peft_model(model, LORA)  # changes the model itself
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} parameters are trained, those of the adapters")
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    print(f"before: loss {loss(model, law_BT):.2f}")
    for _ in range(8):
        optimizer.zero_grad()
        loss(model, law_BT).backward()
        optimizer.step()
    print(f"after 8 steps: loss {loss(model, law_BT):.2f}")
    logits_BTV = model(law_BT)
    adapters.merge_and_unload()  # adds them to the weights and leaves a plain model behind
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/merged")
        merged = load_model(f"{folder}/merged")
    same = torch.allclose(merged(law_BT), logits_BTV, atol=1e-3)
    print(f"merged, saved and loaded: same logits, {same}")


if __name__ == "__main__":
    main()
