"""MTP modules: transformers' logits, tensors that survive load and save, lossless speculation.

Of every family that publishes such modules, in the first variant of its peers. Where a family
spells their names otherwise than DeepSeek-V3, its test file has a function `published` for that.
"""

import pytest
import torch
from files import tensors_of, write_tensors
from published import add_mtp, family_tests, peer_of, relative_difference, save
from traps import read

from checkpoints import load_model, save_model
from modeling import generate, generate_batch

FAMILIES = {
    family.MODEL_TYPES[0]: family
    for family in family_tests()
    if any(read(raw).mtp.blocks for raw in family.PUBLISHED.values())
}
V3 = "deepseek_v3"
every_family = pytest.mark.parametrize("family", FAMILIES)
CASES = [(family, 1) for family in FAMILIES] + [(V3, 2), (V3, 3)]


def sizes_of(family: str) -> dict:
    return next(iter(FAMILIES[family].PEERS.values()))


def checkpoint(path, family: str, num_modules: int):
    peer = peer_of(family, sizes_of(family))
    modules = add_mtp(peer, save(peer, path), num_modules)
    respelled = getattr(FAMILIES[family], "published", dict)
    write_tensors(path, respelled(tensors_of(path)))
    return peer, modules


def random_tokens(peer, *shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(peer.config.vocab_size, shape, generator=generator)


def test_there_are_families_with_modules():
    assert V3 in FAMILIES


@pytest.mark.parametrize(("family", "num_modules"), CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(tmp_path, family, num_modules):
    peer, modules = checkpoint(tmp_path / "peer", family, num_modules)
    model = load_model(tmp_path / "peer", progress=False)
    tokens_BT = random_tokens(peer, 2, 23, seed=3)
    state_BTD = peer(tokens_BT, output_hidden_states=True).hidden_states[-1]
    ours = model.mtp_logits(tokens_BT)
    assert len(ours) == num_modules
    for depth in range(1, num_modules + 1):
        shifted_BT = tokens_BT[:, depth:]
        position_BT = torch.arange(depth, 23).expand_as(shifted_BT)
        state_BTD = state_BTD[:, : shifted_BT.shape[1]]
        state_BTD = modules.forward_layer(
            depth - 1, state_BTD, position_BT, None, input_ids=shifted_BT
        )
        expected_BTV = peer.lm_head(state_BTD)
        assert ours[depth - 1].shape == expected_BTV.shape
        difference = relative_difference(ours[depth - 1], expected_BTV)
        print(f"{family}, depth {depth}: {difference:.1e}")
        assert difference < 1e-4


@pytest.mark.parametrize(("family", "num_modules"), CASES[:-1])
def test_every_tensor_survives_load_and_save(tmp_path, family, num_modules):
    peer, _ = checkpoint(tmp_path / "peer", family, num_modules)
    save_model(load_model(tmp_path / "peer", progress=False), tmp_path / "ours")
    before, after = tensors_of(tmp_path / "peer"), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert f"model.layers.{peer.config.num_hidden_layers}.eh_proj.weight" in after
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].equal(tensor), name


@pytest.mark.parametrize(
    ("family", "num_modules", "length", "drafts"),
    [
        (V3, 1, 30, (1, 2, 4)),
        (V3, 2, 30, (1, 2, 4)),
        *((family, 1, 12, (1, 3)) for family in FAMILIES if family != V3),
    ],
)
def test_speculation_changes_no_token_in_float64(tmp_path, family, num_modules, length, drafts):
    peer, _ = checkpoint(tmp_path / "peer", family, num_modules)
    model = load_model(tmp_path / "peer", dtype=torch.float64, progress=False)
    prompts = [random_tokens(peer, n, seed=n).tolist() for n in (1, 2, 9, 17)]
    plain = [list(generate(model, prompt, length)) for prompt in prompts]
    for draft_tokens in drafts:
        for prompt, expected in zip(prompts, plain, strict=True):
            assert list(generate(model, prompt, length, draft_tokens=draft_tokens)) == expected
        assert generate_batch(model, prompts, length, draft_tokens=draft_tokens) == plain


def test_a_checkpoint_without_the_announced_modules_loads_without_them_and_says_so(tmp_path):
    peer = peer_of(V3, sizes_of(V3) | {"num_mtp_layers": 1})
    with pytest.warns(UserWarning, match="announces 1 MTP module"):
        model = load_model(save(peer, tmp_path), progress=False)
    assert len(model.mtp) == 0
    with pytest.raises(ValueError, match="MTP modules"):
        generate(model, [1], 3, draft_tokens=1)


@every_family
def test_modules_can_be_left_out(tmp_path, family):
    checkpoint(tmp_path / "peer", family, 1)
    model = load_model(tmp_path / "peer", mtp=False, progress=False)
    assert len(model.mtp) == 0
    save_model(model, tmp_path / "ours")
    assert load_model(tmp_path / "ours", progress=False).config.mtp.blocks == ()
