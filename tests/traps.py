"""What the tests of several families check alike, each on tiny models of its own.

The numbers in `test_trap_<number>_...` are those of TRAPS.md, which says what each trap is, whom it
concerns and which tests hold it. transformers is the other side wherever it has the family.

Shapes: N tokens, D model width, E experts, T positions.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from files import REMOVED, edit_json, tensors_of, write_tensors
from published import add_mtp, peer_of, relative_difference, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from checkpoints import CheckpointError, load_model, read_config
from checkpoints.config_file import Fields
from checkpoints.families import FAMILIES
from modeling import ModelConfig, Transformer
from moe import MoE, MoEConfig

Layout = Callable[[dict[str, Tensor]], dict[str, Tensor]]

BOUND = 1e-4
TINY = {  # sizes that all families name alike; no two that could be mistaken for each other agree
    "vocab_size": 103,
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
V3_EXPERTS = {  # in groups
    "intermediate_size": 92,
    "moe_intermediate_size": 28,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.2,
}
ROPE = {"rope_type": "default", "rope_theta": 300.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def read(published: dict, **changes) -> ModelConfig:
    """What the family's adapter makes of a config.json."""
    raw = merged(published, changes)
    return FAMILIES[raw["model_type"]].read_config(Fields(raw))


def merged(published: dict, changes: dict) -> dict:
    return {key: value for key, value in (published | changes).items() if value is not REMOVED}


def experts_of(published: dict, **changes) -> MoEConfig:
    """Those of the last layer."""
    found = read(published, **changes).layers[-1].feed_forward
    assert isinstance(found, MoEConfig)
    return found


def build_on_meta(published: dict, **changes) -> Transformer:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Transformer(read(published, **changes))


def check_refused(path: Path, said: str, published: dict, **changes) -> None:
    """A config.json that cannot be read, by one line that says this."""
    file = path / "config.json"
    file.write_text(json.dumps(merged(published, changes)))
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        read_config(file)
    assert "\n" not in str(caught.value)


def pair(
    path: Path,
    family: str,
    overrides: dict,
    prepare: Callable[[PreTrainedModel], None] = lambda peer: None,
    **how,
) -> tuple[PreTrainedModel, Transformer]:
    """A random transformers model, prepared, and ours read from its files."""
    peer = peer_of(family, overrides)
    with torch.no_grad():
        prepare(peer)
    return peer, load_model(save(peer, path), progress=False, **how)


def random_tokens(length: int, batch: int = 1, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY["vocab_size"], (batch, length), generator=generator)


# routing


def named(peer: PreTrainedModel, ending: str) -> list[Tensor]:
    """Parameters and buffers whose names end so; at least one."""
    both = [*peer.named_parameters(), *peer.named_buffers()]
    found = [tensor for name, tensor in both if re.search(ending + "$", name)]
    assert found
    return found


ROUTER = r"\.(gate|router)(\.wg)?\.weight"
BIAS = r"\.e_score_correction_bias"


def set_bias(peer: PreTrainedModel, middle: float, spread: float) -> None:
    """Selection biases that lie around `middle`, no two alike."""
    generator = torch.Generator().manual_seed(5)
    for bias in named(peer, BIAS):
        drawn = torch.randn(bias.shape, generator=generator)
        bias.copy_(middle + spread * drawn)


def router_output(sparse: nn.Module, x_ND: Tensor) -> tuple[Tensor, ...]:
    """What the router in a sparse layer of transformers says: logits, weights, experts."""
    router = next(child for name, child in sparse.named_children() if name in ("gate", "router"))
    outputs: list[tuple[Tensor, ...]] = []
    hook = router.register_forward_hook(lambda module, given, out: outputs.append(out))
    sparse(x_ND[None])
    hook.remove()
    return outputs[0]


def sparse_of(layer: nn.Module) -> nn.Module:
    return layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe


def sparse_layers(model: Transformer) -> list[MoE]:
    feed_forwards = [layer.feed_forward for layer in model.layers]
    return [layer for layer in feed_forwards if isinstance(layer, MoE)]


def their_weights(sparse: nn.Module, x_ND: Tensor) -> Tensor:
    """What a sparse layer of transformers weighs each expert with, (N, E); 0: not chosen."""
    logits_NE, weights_NK, experts_NK = router_output(sparse, x_ND)
    return torch.zeros_like(logits_NE).scatter(-1, experts_NK, weights_NK)


def our_weights(moe: MoE, x_ND: Tensor) -> Tensor:
    routing = moe.router(x_ND)
    zeros_NE = torch.zeros_like(routing.logits_NE)
    return zeros_NE.scatter(-1, routing.experts_NK, routing.weights_NK)


@torch.no_grad()
def check_routing(peer: PreTrainedModel, model: Transformer, shift: float = 0.0) -> list[Tensor]:
    """The same experts with the same weights, in every sparse layer, for random tokens; (N, E).

    shift: added to all logits, through the first dimension of the tokens.
    """
    found = []
    for theirs, ours in zip(peer.model.layers, model.layers, strict=True):
        if not isinstance(ours.feed_forward, MoE):
            continue
        router_ED = ours.feed_forward.router.weight
        x_ND = torch.randn(200, router_ED.shape[1], generator=torch.Generator().manual_seed(1))
        if shift:
            assert (router_ED[:, 0] == 1).all()
            x_ND[:, 0] = shift
        expected_NE = their_weights(sparse_of(theirs), x_ND)
        weights_NE = our_weights(ours.feed_forward, x_ND)
        torch.testing.assert_close(weights_NE, expected_NE, rtol=1e-5, atol=0)
        found.append(weights_NE)
    assert found
    return found


def check_weights_without_the_bias(path: Path, family: str, overrides: dict) -> None:
    """Sigmoids of 1e-8 beside biases of 12: weights of biased scores would be all alike, and
    weights recovered by taking the bias off again would be 0 or noise."""

    def prepare(peer):
        set_bias(peer, 12.0, 1e-3)
        for weight_ED in named(peer, ROUTER):
            weight_ED[:, 0] = 1.0

    for weights_NE in check_routing(*pair(path, family, overrides, prepare), shift=-18.0):
        chosen = weights_NE[weights_NE > 0]
        assert chosen.max() > 3 * chosen.min()


def check_masked_groups(path: Path, family: str, overrides: dict) -> None:
    """Every biased score is below 0: a masked group of zeros would win."""
    check_routing(*pair(path, family, overrides, lambda peer: set_bias(peer, -3.0, 0.3)))


def check_bias_kept_wide(path: Path, family: str, overrides: dict) -> None:
    """In a bfloat16 model the selection bias is the file's, to the bit."""
    peer, model = pair(
        path, family, overrides, lambda peer: set_bias(peer, 12.0, 1e-3), dtype=torch.bfloat16
    )
    assert model.embed.weight.dtype == torch.bfloat16
    for moe, bias in zip(sparse_layers(model), named(peer, BIAS), strict=True):
        assert moe.router.selection_bias.dtype == torch.float32
        assert moe.router.selection_bias.equal(bias.flatten())
        assert bias.unique().numel() > bias.bfloat16().unique().numel()


# attention


@torch.no_grad()
def reach(logits_of: Callable[[Tensor], Tensor], length: int) -> int:
    """How many of the last tokens, the last one included, its logits depend on."""
    tokens_T = random_tokens(length)[0]
    others_TT = tokens_T.repeat(length, 1)  # row i: with another token at position i
    others_TT.diagonal().add_(1).remainder_(TINY["vocab_size"])
    last_V, *others = logits_of(torch.cat([tokens_T[None], others_TT]))[:, -1]
    # not to the bit: which tokens an expert gets together shows in how it rounds
    matters = [relative_difference(other_V, last_V) > BOUND for other_V in others]
    assert matters[-1]
    return length - matters.index(True)


def check_window(path: Path, family: str, overrides: dict, window: int) -> None:
    """A single layer sees `window` tokens, its own included: no more, no less; cached too."""
    peer, model = pair(path, family, overrides)

    def stepwise(tokens_BT: Tensor) -> Tensor:
        cache = model.make_cache(*tokens_BT.shape)
        return torch.cat([model(token, cache=cache) for token in tokens_BT.split(1, dim=1)], dim=1)

    for logits_of in (lambda tokens_BT: peer(tokens_BT).logits, model, stepwise):
        assert reach(logits_of, 2 * window + 3) == window


@torch.no_grad()
def check_rotated_part(
    path: Path, family: str, overrides: dict, queries: str, rotated: slice, rest: slice
) -> None:
    """Queries of a single layer see the order of earlier tokens by their rotated part alone.

    queries: how the names of the matrices end that make them; rotated, rest: rows of each head.
    """
    tokens_BT = random_tokens(12)
    other_BT = torch.cat([tokens_BT[:, :-1].flip(1), tokens_BT[:, -1:]], dim=1)

    def clear(rows: slice, peer: PreTrainedModel) -> None:
        for weight in named(peer, queries):
            weight.unflatten(0, (overrides["num_attention_heads"], -1))[:, rows] = 0

    for cleared, ordered in ((rotated, False), (rest, True)):
        peer, model = pair(path, family, overrides, partial(clear, cleared))
        for logits_of in (lambda tokens_BT, peer=peer: peer(tokens_BT).logits, model):
            last_V, other_V = logits_of(torch.cat([tokens_BT, other_BT]))[:, -1]
            assert (relative_difference(other_V, last_V) > BOUND) is ordered


def biases_in_a_layer(peer: PreTrainedModel, layer: int = 0) -> set[str]:
    """The linear layers of its attention that have a bias."""
    children = peer.model.layers[layer].self_attn.named_children()
    return {name for name, child in children if getattr(child, "bias", None) is not None}


# multi-token prediction


def with_mtp(path: Path, family: str, overrides: dict, count: int, layout: Layout = dict):
    """A peer saved with so many random MTP modules, and the modules.

    layout: of the file, of tensors under the names that transformers has inside a layer.
    """
    peer = peer_of(family, overrides)
    save(peer, path)
    peer.config.num_mtp_layers = count
    if hasattr(peer.config, "mlp_layer_types"):
        peer.config.mtp_mlp_layer_types = ["sparse"] * count
    modules = add_mtp(peer, path, count)
    write_tensors(path, layout(tensors_of(path)))
    return peer, modules


@torch.no_grad()
def mtp_differences(peer: PreTrainedModel, modules: nn.Module, model: Transformer) -> list[float]:
    """Of each depth's logits from those of transformers, whose states are carried normed."""
    tokens_BT = random_tokens(23, batch=2)
    state_BTD = peer(tokens_BT, output_hidden_states=True).hidden_states[-1]
    differences = []
    for k, ours_BtV in enumerate(model.mtp_logits(tokens_BT), start=1):
        shifted_Bt, positions_Bt = tokens_BT[:, k:], torch.arange(k, 23).expand(2, -1)
        state_BTD = modules.forward_layer(
            k - 1, state_BTD[:, : 23 - k], positions_Bt, None, input_ids=shifted_Bt
        )
        differences.append(relative_difference(ours_BtV, peer.lm_head(state_BTD)))
    return differences


def check_embedding_comes_first(
    path: Path, family: str, overrides: dict, layout: Layout = dict
) -> None:
    """Of what an MTP module projects: its logits are transformers', and not with halves swapped."""
    peer, modules = with_mtp(path, family, overrides, 1, layout)
    (difference,) = mtp_differences(peer, modules, load_model(path, progress=False))
    assert difference < BOUND
    tensors = tensors_of(path)
    name = f"model.layers.{peer.config.num_hidden_layers}.eh_proj.weight"
    swapped = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)
    write_tensors(path, tensors | {name: swapped})
    (difference,) = mtp_differences(peer, modules, load_model(path, progress=False))
    assert difference > 0.1


def check_states_are_normed(
    path: Path, family: str, overrides: dict, layout: Layout = dict
) -> None:
    """The second module reads what the first hands to the head, after the norm."""
    peer, modules = with_mtp(path, family, overrides, 2, layout)
    differences = mtp_differences(peer, modules, load_model(path, progress=False))
    assert len(differences) == 2
    assert max(differences) < BOUND


def check_mtp_layer_is_apart(
    path: Path, family: str, overrides: dict, layout: Layout = dict
) -> None:
    """The layer behind the last one is an MTP module, read or left out, and no main layer."""
    peer, _ = with_mtp(path, family, overrides, 1, layout)
    count = peer.config.num_hidden_layers
    tokens_BT = random_tokens(19, batch=2)
    for wanted, modules in ((True, [str(count)]), (False, [])):
        model = load_model(path, mtp=wanted, progress=False)
        assert (len(model.layers), list(model.mtp)) == (count, modules)
        with torch.no_grad():
            assert relative_difference(model(tokens_BT), peer(tokens_BT).logits) < BOUND
    edit_json(path / "config.json", num_nextn_predict_layers=REMOVED)
    with pytest.raises(CheckpointError, match=rf"0 tensors are missing .*model\.layers\.{count}\."):
        load_model(path, progress=False)


# layouts and precision


def check_gate_comes_first(
    path: Path,
    family: str,
    overrides: dict,
    layout: Layout,
    fused: str = "experts.gate_up_proj",
) -> None:
    """Of the rows of a file's fused tensors: those of gate, as transformers itself holds them.

    layout: what makes such a file's tensors of those that transformers saves.
    """
    peer, _ = pair(path, family, overrides)
    tensors = layout(tensors_of(path))
    write_tensors(path, tensors)
    check_gate_and_up(peer, load_model(path, progress=False))
    swapped = {
        name: torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1) if name.endswith(fused) else tensor
        for name, tensor in tensors.items()
    }
    write_tensors(path, swapped)
    tokens_BT = random_tokens(9)
    other_BTV = load_model(path, progress=False)(tokens_BT)
    with torch.no_grad():
        assert relative_difference(other_BTV, peer(tokens_BT).logits) > 0.05


def check_gate_and_up(peer: PreTrainedModel, model: Transformer) -> None:
    """Of all experts: those that transformers holds, gate's rows before up's, to the bit."""
    stacked = named(peer, r"experts\.gate_up_proj")
    for moe, gate_up in zip(sparse_layers(model), stacked, strict=True):
        gate_EFD, up_EFD = gate_up.chunk(2, dim=1)
        assert moe.experts.gate.equal(gate_EFD)
        assert moe.experts.up.equal(up_EFD)


@torch.no_grad()
def check_router_precision(
    path: Path, family: str, overrides: dict, wide: bool, wide_weights: bool = False
) -> None:
    """Of a bfloat16 model's router: its logits are those of transformers, wide products or not.

    wide_weights: the weights themselves stay float32 in transformers.
    """
    peer, model = pair(path, family, overrides, dtype=torch.bfloat16)
    peer = peer.bfloat16()
    if wide_weights:
        for layer in peer.model.layers:
            for name, child in layer.mlp.named_children():
                if name == "gate":
                    child.float()
    moe = model.layers[-1].feed_forward
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(50, moe.router.weight.shape[1], generator=generator).bfloat16()
    logits_NE = moe.router(x_ND).logits_NE
    expected_NE = router_output(sparse_of(peer.model.layers[-1]), x_ND)[0].float()
    torch.testing.assert_close(logits_NE, expected_NE, rtol=1e-5, atol=1e-5)
    rounded = logits_NE.equal(logits_NE.bfloat16().float())
    assert rounded is not wide
