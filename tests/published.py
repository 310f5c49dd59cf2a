"""Checkpoints as transformers writes them: tiny, every parameter and buffer random."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
SIZES = {
    "vocab_size": 103,
    "hidden_size": 60,
    "intermediate_size": 92,
    "moe_intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
    "v_head_dim": 18,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def random_peer(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A transformers model of the DeepSeek kind: `SIZES` with changes."""
    return peer_of(family, SIZES | changes, seed)


@torch.no_grad()
def peer_of(family: str, overrides: dict, seed: int = 0) -> PreTrainedModel:
    """A transformers model in float32, eager throughout, with nothing left at its default."""
    config = AutoConfig.for_model(family, **overrides)
    config._attn_implementation = config._experts_implementation = "eager"
    peer = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    persistent = peer.state_dict().keys()
    for name, tensor in [*peer.named_parameters(), *peer.named_buffers()]:
        if name in persistent:
            randomize(tensor, generator)
    return peer


def randomize(tensor: Tensor, generator: torch.Generator) -> None:
    """Noise around a vector's own mean; matrices so that activations keep their size."""
    drawn = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() == 1:
        tensor.copy_(tensor.mean() + drawn / 3)
    else:
        tensor.copy_(drawn * tensor.shape[-1] ** -0.5 * 1.5)


def save(peer: PreTrainedModel, path: Path) -> Path:
    peer.save_pretrained(path, max_shard_size="100KB")
    return path


def reload(path: Path) -> tuple[PreTrainedModel, dict]:
    """A directory as transformers loads it, and what it says was missing or left over."""
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in units of the peer's standard deviation."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


def add_mtp(peer: PreTrainedModel, path: Path, num_modules: int, seed: int = 1):
    """Add random MTP modules to a saved checkpoint under their published names; returns them.

    transformers never writes them, so the names are spelled out here: the layers that follow the
    last one, experts one by one, embedding and head repeated.
    """
    peer.config.dtype = torch.float32
    modules = MtpModel(peer, num_modules).float().eval()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink()
    with torch.no_grad():
        for name, tensor in modules.layers.state_dict().items():
            randomize(tensor, generator)
            index, rest = name.split(".", 1)
            prefix = f"model.layers.{peer.config.num_hidden_layers + int(index)}."
            rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            if rest.endswith("experts.gate_up_proj"):
                for expert, gate_up in enumerate(tensor):
                    gate, up = gate_up.chunk(2)
                    tensors[f"{prefix}mlp.experts.{expert}.gate_proj.weight"] = gate.clone()
                    tensors[f"{prefix}mlp.experts.{expert}.up_proj.weight"] = up.clone()
            elif rest.endswith("experts.down_proj"):
                for expert, down in enumerate(tensor):
                    tensors[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = down.clone()
            else:
                tensors[prefix + rest] = tensor.clone()
            tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["num_nextn_predict_layers"] = num_modules
    config.pop("num_mtp_layers", None)
    (path / "config.json").write_text(json.dumps(config))
    return modules
