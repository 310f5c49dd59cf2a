"""The first layers of a checkpoint, loaded on purpose: `layers=n` and `--layers n`."""

import json

import pytest
import torch
from files import tensors_of, write_tensors
from published import family_tests, relative_difference, write_peer

from checkpoints import CheckpointError, load_model, load_tokenizer, save_model
from modeling import generate
from tools.__main__ import main

QUIET = {"progress": False}
FAMILIES = [
    pytest.param(family, id=family.MODEL_TYPES[0]) for family in family_tests() if family.PEERS
]


@pytest.mark.filterwarnings("ignore:the config announces")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_logits_are_those_of_transformers_cut_to_as_many_layers(tmp_path, family):
    peer = write_peer(family, next(iter(family.PEERS)), tmp_path)
    decoder, tokens_BT = peer.get_decoder(), torch.arange(26).view(2, 13)
    for count in range(1, len(decoder.layers)):
        model = load_model(tmp_path, layers=count, **QUIET)
        assert len(model.layers) == len(model.config.layers) == count
        whole, decoder.layers = decoder.layers, decoder.layers[:count]
        expected_BTV = peer(tokens_BT).logits
        decoder.layers = whole
        assert relative_difference(model(tokens_BT), expected_BTV) < 1e-4


def test_all_layers_are_the_main_model_without_mtp_modules(pristine):
    path = pristine(num_nextn_predict_layers=1)
    tokens_BT = torch.arange(12)[None]
    part, whole = load_model(path, layers=3, **QUIET), load_model(path, **QUIET)
    assert len(whole.mtp) == 1
    assert len(part.mtp) == 0
    assert part(tokens_BT).equal(whole(tokens_BT))


@pytest.mark.parametrize("layers", [0, -1, 4, 1000])
def test_a_number_that_the_checkpoint_does_not_have_is_refused(pristine, layers):
    with pytest.raises(
        ValueError, match=rf"layers = {layers}: must be from 1 to 3, which the model has"
    ):
        load_model(pristine(), layers=layers, **QUIET)


def test_what_the_first_layers_need_is_still_checked(tiny):
    tensors = tensors_of(path := tiny())
    (lost,) = [name for name in tensors if name.endswith("layers.1.self_attn.o_proj.weight")]
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if name != lost})
    load_model(path, layers=1, **QUIET)
    with pytest.raises(CheckpointError, match=lost):
        load_model(path, layers=2, **QUIET)


def test_tensors_that_belong_to_no_layer_of_the_checkpoint_are_still_refused(tiny):
    path = tiny()
    write_tensors(path, tensors_of(path) | {"model.layers.7.stray": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"unexpected \(model\.layers\.7\.stray"):
        load_model(path, layers=1, **QUIET)


def test_a_part_is_saved_in_our_own_format_and_refused_in_the_published_one(pristine, tmp_path):
    part = load_model(pristine(), layers=2, **QUIET)
    with pytest.raises(CheckpointError, match=r'layers.*to="abacus"'):
        save_model(part, tmp_path / "published")
    assert not (tmp_path / "published").exists()
    save_model(part, tmp_path / "own", to="abacus")
    tokens_BT = torch.arange(12)[None]
    assert load_model(tmp_path / "own", **QUIET)(tokens_BT).equal(part(tokens_BT))


def test_the_command_line_generates_with_the_first_layers(pristine, capsys):
    path = pristine()
    options = ["--model", str(path), "--prompt", "a", "--max-new-tokens", "4", "--json"]
    assert main(["generate", *options, "--layers", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model(path, layers=1, **QUIET), load_tokenizer(path)
    tokens = generate(model, tokenizer.encode("a"), max_new_tokens=4)
    assert printed["ids"] == list(tokens)
    assert main(["generate", *options, "--layers", "9"]) == 2
    assert "layers = 9: must be from 1 to 3, which the model has" in capsys.readouterr().err
