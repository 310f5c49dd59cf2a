"""make-tiny: write a small, seeded random checkpoint of a family in its published layout.

For tests and for trying tools: everything that a published checkpoint has, in a few hundred
kilobytes: config.json, several weight shards with their index, MTP modules where the family has
them, a sentencepiece tokenizer. All values are finite, and none is a default: norms, biases and
selection biases are random too, so that leaving one out shows.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from checkpoints import CheckpointError, read_config, save_model
from modeling import Transformer

from .corpus import train_vocabulary

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
V3 = SIZES | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": SIZES
    | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": V3,
    "kimi_k2": V3
    | {
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000.0,
        "rope_scaling": YARN
        | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", choices=sorted(CONFIGS), help="model_type of the checkpoint")
    parser.add_argument("path", type=Path, help="directory to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    write_tiny(args.family, args.path, args.seed)
    print(args.path)
    return 0


def write_tiny(family: str, path: Path, seed: int = 0, **changes: Any) -> None:
    """A tiny checkpoint at `path`; `changes` to its config.json keys."""
    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it or choose another path")
    config = CONFIGS[family] | changes
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.json"
        file.write_text(json.dumps(config))
        model = Transformer(read_config(file))
    randomize(model, seed)
    fresh = path.with_name(path.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_model(model, fresh, max_shard_bytes=200_000)
    vocabulary = train_vocabulary(WORDS, config["vocab_size"])
    (fresh / "tokenizer.model").write_bytes(vocabulary)
    fresh.rename(path)


@torch.no_grad()
def randomize(model: Transformer, seed: int) -> None:
    """Draw every parameter and selection bias: matrices so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(1 + drawn / 4)
        elif tensor.dim() == 1:
            tensor.copy_(drawn / 4)
        else:
            tensor.copy_(drawn * tensor.shape[-1] ** -0.5 * 1.5)


WORDS = """\
Once upon a time there lived an old king who had three sons and a garden with a golden tree.
Every night one apple was stolen, and every morning the king was sadder than the day before.
So the eldest son said: let me watch tonight, father, and I shall catch the thief.
"""
