"""Every family has a tiny checkpoint with all that its releases have, which every tool can use."""

import json
import re

import pytest
import torch
from files import tensors_of
from published import family_tests

from checkpoints import load_model, load_tokenizer
from checkpoints.families import FAMILIES
from modeling import generate
from tools.__main__ import main
from tools.make_tiny import CONFIGS

NAMES = {name: family.NAMES for family in family_tests() for name in family.MODEL_TYPES}
every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


def test_every_family_has_one():
    assert CONFIGS.keys() == FAMILIES.keys() - {"abacus"}


@every_family
def test_it_loads_to_a_model_whose_tensors_and_logits_are_finite_and_its_own(pristine, family):
    model = load_model(pristine(family), progress=False)
    for name, tensor in tensors_of(pristine(family)).items():
        assert tensor.isfinite().all(), name
        assert tensor.std() > 0, name
    tokens = load_tokenizer(pristine(family)).encode("Once upon a time there lived an old king")
    logits_BTV = model(torch.tensor([tokens]))
    assert logits_BTV.isfinite().all()
    assert logits_BTV.shape[2] == 320
    assert logits_BTV.std() > 0.1
    drafts = {"draft_tokens": 1} if model.mtp else {}
    assert len(list(generate(model, tokens, 5, **drafts))) == 5


@every_family
def test_describe_tells_of_it(pristine, capsys, family):
    assert main(["describe", str(pristine(family)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    stored = tensors_of(pristine(family))
    assert facts["family"] == family
    assert facts["stored tensors"] == len(stored)
    assert 0 < facts["of them used per token"] < facts["parameters"]
    cached = "cache bytes per token (bfloat16)", "cache bytes that stay constant"
    assert sum(facts[kind] for kind in cached) > 0
    assert main(["describe", str(pristine(family)), "--tensors"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in stored)


@every_family
def test_it_has_every_kind_of_tensor_that_the_releases_have(pristine, family):
    def kinds(names) -> set[str]:
        return {re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names}

    here, released = set(tensors_of(pristine(family))), set(NAMES[family])
    if family == "kimi_k2":  # the names are those of DeepSeek-V3, of whose modules it has none
        released = {name for name in released if "layers.61." not in name}
    assert kinds(released) <= kinds(here)


@every_family
def test_its_config_is_in_published_spelling(family):
    config = CONFIGS[family].get("text_config", CONFIGS[family])
    assert config["vocab_size"] == 320
    assert "rope_theta" in config
    assert not {"rope_parameters", "num_mtp_layers", "dtype"} & config.keys()
    assert "torch_dtype" in CONFIGS[family]
