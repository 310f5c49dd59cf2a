"""Published names and ours correspond one to one, and loading undoes saving to the bit."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from files import tensors_of, write_tensors
from hypothesis import given
from hypothesis import strategies as st
from layouts import fused
from torch import Tensor

from checkpoints import CheckpointError, load_model
from checkpoints.config_file import Fields
from checkpoints.contents import list_copies, own_state
from checkpoints.families import FAMILIES
from checkpoints.mapping import Family, Rule, apply_rules
from modeling import ModelConfig, Transformer
from tools.make_tiny import CONFIGS

NAMES = ("deepseek_v2", "deepseek_v3", "kimi_k2")  # whose configs have the same keys


@dataclass(repr=False)
class Drawn:
    family: Family
    config: ModelConfig
    state: dict[str, Tensor]


@st.composite
def models(draw):
    """A family and a model of it, every tensor filled with numbers that occur nowhere else."""
    name = draw(st.sampled_from(NAMES))
    changes = {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "first_k_dense_replace": draw(st.integers(0, 1)),
        "q_lora_rank": draw(st.sampled_from([None, 6])),
        "attention_bias": draw(st.booleans()),
        "n_shared_experts": draw(st.sampled_from([None, 0, 1, 2])),
        "num_nextn_predict_layers": draw(st.integers(0, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        **{"vocab_size": 11, "hidden_size": 10, "intermediate_size": 7, "kv_lora_rank": 5},
        **{"moe_intermediate_size": 3, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2},
        **{"v_head_dim": 4, "num_attention_heads": 2},
    }
    config = FAMILIES[name].read_config(Fields(CONFIGS[name] | changes))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in own_state(Transformer(config)).items()}
    numbers = itertools.count()
    state = {
        name: torch.tensor([next(numbers) for _ in range(shape.numel())]).reshape(shape).double()
        for name, shape in shapes.items()
    }
    return Drawn(FAMILIES[name], config, state)


def entries_of(model, present=None):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state.items()}
    return apply_rules(model.family.rules, shapes, model.config, present)


def blank(state):
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.equal(other[name]), name


@given(models())
def test_every_tensor_has_a_published_name_of_its_own(model):
    entries = entries_of(model)
    names = [entry.published for entry in entries]
    assert len(set(names)) == len(names)
    assert not any("{" in name for name in names)
    assert {ours for entry in entries for ours in entry.ours} == model.state.keys()


@given(models())
def test_putting_what_was_taken_changes_nothing(model):
    entries = entries_of(model)
    file = {entry.published: entry.take(model.state) for entry in entries}
    state = blank(model.state)
    for entry in entries:
        assert file[entry.published].shape == entry.shape
        entry.put(file[entry.published], state)
    same(state, model.state)
    same({entry.published: entry.take(state) for entry in entries}, file)


@given(models(), st.data())
def test_both_layouts_of_the_experts_fill_the_same_model(model, data):
    file = {entry.published: entry.take(model.state) for entry in entries_of(model)}
    experts = sorted({name.split(".experts.")[0] for name in file if ".experts." in name})
    for prefix in data.draw(st.lists(st.sampled_from(experts), unique=True)) if experts else []:
        file = fused_under(prefix, file)
    entries = entries_of(model, file.keys())
    assert sorted(entry.published for entry in entries) == sorted(file)
    state = blank(model.state)
    for entry in entries:
        entry.put(file[entry.published], state)
    same(state, model.state)
    same({entry.published: entry.take(state) for entry in entries}, file)


def fused_under(prefix, tensors):
    """With the experts of one layer stacked as transformers keeps them."""
    here = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
    others = {name: tensor for name, tensor in tensors.items() if name not in here}
    return others | fused(here)


@pytest.mark.parametrize("layers", [(1,), (2, 3), (1, 2, 3)])
def test_fused_experts_load_to_the_same_logits_and_swapped_ones_do_not(tiny, layers):
    path = tiny()
    expected = load_model(path, progress=False).state_dict()
    tokens_BT = torch.arange(40)[None]
    logits_BTV = load_model(path, progress=False)(tokens_BT)
    tensors = tensors_of(path)
    for layer in layers:
        tensors = fused_under(f"model.layers.{layer}.mlp", tensors)
    write_tensors(path, tensors)
    same(load_model(path, progress=False).state_dict(), expected)
    for name in list(tensors):
        if name.endswith("mlp.experts.gate_up_proj"):
            tensors[name] = tensors[name].roll(24, dims=1)
    write_tensors(path, tensors)
    swapped = load_model(path, progress=False)
    if layers != (3,):
        assert (swapped(tokens_BT) - logits_BTV).abs().max() > 0.01 * logits_BTV.std()


def test_a_layer_in_both_layouts_at_once_is_refused(tiny):
    path = tiny()
    tensors = tensors_of(path)
    once = fused_under("model.layers.1.mlp", tensors)
    write_tensors(path, tensors | once)
    with pytest.raises(
        CheckpointError, match=r"2 are unexpected \(model.layers.1.mlp.experts.down"
    ):
        load_model(path, progress=False)


def test_one_missing_expert_is_named_in_either_layout(tiny):
    path = tiny()
    tensors = tensors_of(path)
    del tensors["model.layers.2.mlp.experts.7.gate_proj.weight"]
    tensors = fused_under("model.layers.1.mlp", tensors)
    del tensors["model.layers.1.mlp.experts.gate_up_proj"]
    write_tensors(path, tensors)
    with pytest.raises(CheckpointError, match=r"17 tensors are missing .*0 are unexpected"):
        load_model(path, progress=False)


@given(models(), st.data())
def test_a_tensor_that_no_rule_knows_is_an_error_with_its_name(model, data):
    name = data.draw(st.sampled_from(sorted(model.state)))
    stem = name.split(".", 2)[-1] if name.startswith(("layers", "mtp")) else name
    stem = stem.removeprefix("block.")
    rules = [rule for rule in model.family.rules if not knows(rule, stem)]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state.items()}
    with pytest.raises(ValueError, match=r"no rule of the family maps") as caught:
        apply_rules(rules, shapes, model.config)
    assert name in str(caught.value)


def knows(rule: Rule, stem: str) -> bool:
    ours = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
    return any(name.endswith(stem) for name in ours)


@given(models())
def test_copies_repeat_a_tensor_under_a_name_of_their_own(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state.items()}
    copies = list_copies(model.family, model.config, shapes)
    own = {entry.published for entry in entries_of(model)}
    assert own.isdisjoint(copy.published for copy in copies)
    assert len(copies) == 2 * len(model.config.mtp.blocks)
    for copy in copies:
        ours = "embed" if "embed" in copy.published or model.config.tied_embeddings else "head"
        assert copy.ours == (f"{ours}.weight",)


ATTENTION = """
    input_layernorm.weight post_attention_layernorm.weight
    self_attn.q_a_proj.weight self_attn.q_a_layernorm.weight self_attn.q_b_proj.weight
    self_attn.kv_a_proj_with_mqa.weight self_attn.kv_a_layernorm.weight
    self_attn.kv_b_proj.weight self_attn.o_proj.weight
"""
SPARSE = """
    mlp.gate.weight mlp.gate.e_score_correction_bias mlp.shared_experts.gate_proj.weight
    mlp.shared_experts.up_proj.weight mlp.shared_experts.down_proj.weight
    mlp.experts.0.gate_proj.weight mlp.experts.0.up_proj.weight mlp.experts.0.down_proj.weight
    mlp.experts.1.gate_proj.weight mlp.experts.1.up_proj.weight mlp.experts.1.down_proj.weight
"""
LAYERS = {
    0: ATTENTION + "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight",
    1: ATTENTION + SPARSE,
    2: ATTENTION
    + SPARSE
    + "enorm.weight hnorm.weight eh_proj.weight embed_tokens.weight"
    + " shared_head.norm.weight shared_head.head.weight",
}
GOLDEN = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} | {
    f"model.layers.{layer}.{name}" for layer, names in LAYERS.items() for name in names.split()
}


def test_the_names_in_a_file_are_the_published_ones(tiny):
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    assert tensors_of(tiny(num_hidden_layers=2, **experts)).keys() == GOLDEN
