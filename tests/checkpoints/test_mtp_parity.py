"""MTP modules: transformers' logits, tensors that survive load and save, lossless speculation.

Of every family that publishes such modules, in the first variant of its peers. Where a family
spells their names otherwise than DeepSeek-V3, its test file has a function `published` for that;
where transformers does not know its modules it says `MTP_WITHOUT_PEER`, and its test file compares
them with written equations.
"""

import warnings

import pytest
import torch
from files import REMOVED, edit_json, tensors_of, write_tensors
from published import add_mtp, family_tests, peer_of, relative_difference, save
from traps import read

from checkpoints import CheckpointError, load_model, save_model
from modeling import generate, generate_batch
from tools.make_tiny import CONFIGS, write_tiny

FAMILIES = {
    family.MODEL_TYPES[0]: family
    for family in family_tests()
    if any(read(raw).mtp.blocks for raw in family.PUBLISHED.values())
    and not hasattr(family, "MTP_WITHOUT_PEER")
}
WITH_MODULES = [name for name, config in CONFIGS.items() if "num_nextn_predict_layers" in config]
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


def test_every_family_with_modules_has_a_tiny_config_that_says_so():
    published = {
        name
        for family in family_tests()
        for name in family.MODEL_TYPES
        if any(read(raw | {"model_type": name}).mtp.blocks for raw in family.PUBLISHED.values())
    }
    assert published - {"kimi_k2"} <= set(WITH_MODULES)


@pytest.mark.parametrize("family", WITH_MODULES)
@pytest.mark.parametrize(("num_layers", "num_modules"), [(2, 1), (3, 2), (5, 3)])
def test_every_module_of_every_family_survives_at_whatever_index(
    tmp_path, family, num_layers, num_modules
):
    kinds = ["dense", *["sparse"] * (num_layers - 1)]
    sizes = {"num_hidden_layers": num_layers, "num_nextn_predict_layers": num_modules}
    listed = {"mlp_layer_types": kinds} if "mlp_layer_types" in CONFIGS[family] else {}
    write_tiny(family, tmp_path / "first", seed=num_layers, **sizes, **listed)
    model = load_model(tmp_path / "first", progress=False)
    assert list(model.mtp) == [str(num_layers + j) for j in range(num_modules)]
    assert all(tensor.any() for tensor in model.mtp.state_dict().values())
    save_model(model, tmp_path / "second")
    again = load_model(tmp_path / "second", progress=False)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    first, second = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(second[name].equal(tensor) for name, tensor in first.items())
    without = load_model(tmp_path / "first", mtp=False, progress=False)
    tokens_BT = torch.arange(12)[None]
    assert without(tokens_BT).equal(model(tokens_BT))


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("mtp_input", "raw", "input"),
        ("mtp_carry", "main", "carry"),
        ("mtp_hidden_states_first", True, "first"),
        ("mtp_own_embedding", True, "own_embedding"),
        ("mtp_own_head", True, "own_head"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_may_say_how_its_modules_are_wired(tmp_path, family, key, value, field):
    """It is read, computed with, and written back."""
    write_tiny(family, tmp_path / "tiny", num_nextn_predict_layers=2, **{key: value})
    model = load_model(tmp_path / "tiny", progress=False)
    assert getattr(model.config.mtp, field) == ("state" if field == "first" else value)
    save_model(model, tmp_path / "again")
    again = load_model(tmp_path / "again", progress=False)
    assert again.config.mtp == model.config.mtp
    tokens_BT = torch.arange(3, 17)[None]
    depths = again.mtp_logits(tokens_BT)
    assert all(map(torch.equal, depths, model.mtp_logits(tokens_BT)))
    edit_json(tmp_path / "again" / "config.json", **{key: REMOVED})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a copy that differs is then told
        usual = load_model(tmp_path / "again", progress=False)
    assert (usual.mtp_logits(tokens_BT)[1] - depths[1]).abs().max() > 1e-4


@pytest.mark.parametrize("key", ["mtp_input", "mtp_carry", "mtp_own_head"])
def test_a_wiring_that_is_none_is_refused_with_the_key(tmp_path, key):
    write_tiny(V3, tmp_path / "tiny")
    edit_json(tmp_path / "tiny" / "config.json", **{key: "both"})
    with pytest.raises(CheckpointError, match=f"{key} = 'both', expected"):
        load_model(tmp_path / "tiny", progress=False)


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
