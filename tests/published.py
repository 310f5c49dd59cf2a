"""Published checkpoints for tests: what transformers writes, and what the family modules say.

`family_tests` are the modules of tests/checkpoints/families, one for each adapter. Each says in
data what is known of its family (see test_families.py) and may say how its checkpoints are written
and read by transformers where that is not the usual way (`write_peer`, `reload_peer`).
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from files import tensors_of, write_tensors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import MtpModel
from transformers.utils.logging import disable_progress_bar

from checkpoints.contents import list_copies, own_state
from checkpoints.mapping import Entry, apply_rules
from checkpoints.published_config import find_family
from modeling import ModelConfig, RopeConfig, Step, Transformer
from modeling.rope import rotate

disable_progress_bar()

TINY_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}


def family_tests() -> list[ModuleType]:
    """The modules of tests/checkpoints/families."""
    folder = Path(__file__).parent / "checkpoints" / "families"
    return [import_module(file.stem) for file in sorted(folder.glob("test_*.py"))]


def modern(published: Mapping, **renamed: str) -> dict:
    """The same config in the spelling of newer files: one dict for rope, other names for keys."""
    renamed = {"torch_dtype": "dtype", "num_nextn_predict_layers": "num_mtp_layers"} | renamed
    scaling = dict(published.get("rope_scaling") or {"type": "default"})
    rope = {"rope_type": scaling.pop("type"), "rope_theta": published["rope_theta"], **scaling}
    kept = {k: v for k, v in published.items() if k not in ("rope_theta", "rope_scaling")}
    return {renamed.get(k, k): v for k, v in kept.items()} | {"rope_parameters": rope}


def entries_of(config: ModelConfig, present=None) -> list[Entry]:
    """What the files of such a model hold: what is loaded, and what MTP modules repeat.

    present: the names in the file; None for a file that `save_model` writes.
    """
    with torch.device("meta"):
        state = own_state(Transformer(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    family = find_family(config, "a test")
    entries = apply_rules(family.rules, shapes, config, present)
    return entries + list_copies(family, config, shapes)


def partners_of_the_first(rope: RopeConfig) -> set[int]:
    """The dimensions that a vector along the first one has after it was rotated."""
    x_1P = torch.eye(1, rope.width)[None, None]
    turned_1P = rotate(x_1P, rope, Step(torch.tensor([[1]])))
    return set(turned_1P.flatten().nonzero().flatten().tolist())


def with_frequencies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the rotary frequencies that older files hold beside the weights."""
    layers = {name.split("self_attn.")[0] for name in tensors if ".self_attn." in name}
    return {**tensors, **{f"{x}self_attn.rotary_emb.inv_freq": torch.ones(3) for x in layers}}


@torch.no_grad()
def peer_of(
    family: str, overrides: Mapping, seed: int = 0, auto=AutoModelForCausalLM
) -> PreTrainedModel:
    """A transformers model in float32, eager throughout, with nothing left at its default."""
    config = AutoConfig.for_model(family, **deepcopy(overrides))  # it writes into dicts it is given
    for part in (config, config.get_text_config()):
        part._attn_implementation = part._experts_implementation = "eager"
    torch.manual_seed(seed)  # of the values that stay where they are drawn, around their mean
    peer = auto.from_config(config, attn_implementation="eager").float().eval()
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


def write_peer(family: ModuleType, variant: str, path: Path) -> PreTrainedModel:
    """The transformers model of one of a family's variants, saved at `path`."""
    if hasattr(family, "write_peer"):
        return family.write_peer(path, family.PEERS[variant])
    peer = peer_of(family.MODEL_TYPES[0], family.PEERS[variant])
    save(peer, path)
    return peer


def reload_peer(family: ModuleType, path: Path) -> tuple[PreTrainedModel, dict]:
    """A directory as transformers loads it, and what it says was missing or left over."""
    return family.reload_peer(path) if hasattr(family, "reload_peer") else reload(path)


def reload(path: Path, auto=AutoModelForCausalLM) -> tuple[PreTrainedModel, dict]:
    return auto.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in units of the peer's standard deviation."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


@torch.no_grad()
def difference(peer: PreTrainedModel, model: Transformer) -> float:
    """Between the logits of random tokens."""
    tokens_BT = torch.arange(46).remainder(model.config.vocab_size).view(2, 23)
    return relative_difference(model(tokens_BT), peer(tokens_BT).logits)


@torch.no_grad()
def add_mtp(peer: PreTrainedModel, path: Path, num_modules: int, seed: int = 1) -> MtpModel:
    """Add random MTP modules to a saved checkpoint under their published names; returns them.

    transformers never writes them, so the names around the block are spelled out here: the layers
    that follow the last one, embedding and head repeated. The block is a layer like the others.
    """
    config = peer.config
    config.dtype, config.num_mtp_layers = torch.float32, num_modules
    if getattr(config, "layer_types", None) is not None:
        config.mtp_layer_types = ["full_attention"] * num_modules
    if getattr(config, "mlp_layer_types", None) is not None:
        config.mtp_mlp_layer_types = ["sparse"] * num_modules
    modules = MtpModel(peer, num_modules).float().eval()
    generator = torch.Generator().manual_seed(seed)
    tensors, held = tensors_of(path), {}
    for name, tensor in modules.layers.state_dict().items():
        randomize(tensor, generator)
        index, rest = name.split(".", 1)
        prefix = f"model.layers.{config.num_hidden_layers + int(index)}."
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        held[prefix + rest] = tensor
        tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    published = revert_weight_conversion(peer, held)
    write_tensors(path, tensors | {name: tensor.clone() for name, tensor in published.items()})
    changed = json.loads((path / "config.json").read_text())
    changed["num_nextn_predict_layers"] = num_modules
    changed.pop("num_mtp_layers", None)
    (path / "config.json").write_text(json.dumps(changed))
    return modules
