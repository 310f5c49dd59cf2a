"""MTP modules: transformers' logits, tensors that survive load and save, lossless speculation."""

import pytest
import torch
from published import YARN, add_mtp, random_peer, relative_difference, save
from safetensors.torch import load_file

from checkpoints import load_model, save_model
from modeling import generate, generate_batch

V3 = {"n_group": 4, "topk_group": 2, "q_lora_rank": 22, "rope_parameters": YARN}


def checkpoint(path, num_modules: int):
    peer = random_peer("deepseek_v3", num_mtp_layers=num_modules, **V3)
    return peer, add_mtp(peer, save(peer, path), num_modules)


@pytest.mark.parametrize("num_modules", [1, 2, 3])
@torch.no_grad()
def test_logits_equal_those_of_transformers(tmp_path, num_modules):
    peer, modules = checkpoint(tmp_path / "peer", num_modules)
    model = load_model(tmp_path / "peer", progress=False)
    tokens_BT = torch.randint(103, (2, 23), generator=torch.Generator().manual_seed(3))
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
        print(f"depth {depth}: {difference:.1e}")
        assert difference < 1e-4


@pytest.mark.parametrize("num_modules", [1, 2])
def test_every_tensor_survives_load_and_save(tmp_path, num_modules):
    checkpoint(tmp_path / "peer", num_modules)
    save_model(load_model(tmp_path / "peer", progress=False), tmp_path / "ours")
    before = load_file(tmp_path / "peer" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(name.startswith("model.layers.3.eh_proj") for name in after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].equal(tensor), name


@pytest.mark.parametrize("num_modules", [1, 2])
def test_speculation_changes_no_token_in_float64(tmp_path, num_modules):
    checkpoint(tmp_path / "peer", num_modules)
    model = load_model(tmp_path / "peer", dtype=torch.float64, progress=False)
    random = torch.Generator().manual_seed(5)
    prompts = [torch.randint(103, (n,), generator=random).tolist() for n in (1, 2, 9, 17)]
    plain = [list(generate(model, prompt, 30)) for prompt in prompts]
    for draft_tokens in (1, 2, 4):
        for prompt, expected in zip(prompts, plain, strict=True):
            assert list(generate(model, prompt, 30, draft_tokens=draft_tokens)) == expected
        assert generate_batch(model, prompts, 30, draft_tokens=draft_tokens) == plain


def test_a_checkpoint_without_the_announced_modules_loads_without_them_and_says_so(tmp_path):
    peer = random_peer("deepseek_v3", num_mtp_layers=1, **V3)
    with pytest.warns(UserWarning, match="announces 1 MTP module"):
        model = load_model(save(peer, tmp_path), progress=False)
    assert len(model.mtp) == 0
    with pytest.raises(ValueError, match="MTP modules"):
        generate(model, [1], 3, draft_tokens=1)


def test_modules_can_be_left_out(tmp_path):
    checkpoint(tmp_path / "peer", 1)
    model = load_model(tmp_path / "peer", mtp=False, progress=False)
    assert len(model.mtp) == 0
    save_model(model, tmp_path / "ours")
    assert load_model(tmp_path / "ours", progress=False).config.mtp == ()
