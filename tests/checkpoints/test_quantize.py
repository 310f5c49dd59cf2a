"""Models loaded as integer codes: what is held so, what they compute, and files that keep it."""

import json
from copy import deepcopy

import pytest
import torch
from files import edit_json, tensors_of, write_tensors
from torch import nn

from checkpoints import CheckpointError, load_model, save_model, verify
from checkpoints.storage.quantized import pack_integers, unpack_integers
from modeling import QuantizedExperts, QuantizedWeight, compile_decoding, generate
from moe import record_routing
from tools.__main__ import main

KINDS = ("int8", "int4")
every_kind = pytest.mark.parametrize("kind", KINDS)
WIDE = {  # rows that kernels read
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 96,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
}


def quantised(path, kind, **options):
    return load_model(path, quantize=kind, **{"progress": False, "dtype": torch.float32} | options)


def held(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}


def dequantised(model, path):
    """The plain model with the numbers that a quantised one holds."""
    plain = load_model(path, dtype=torch.float32, progress=False)
    for name, weight in held(model).items():
        matrices = [weight[e] for e in range(len(weight.codes))] if len(weight.shape) == 3 else None
        numbers = [m.dequantize(torch.float32) for m in matrices or [weight.matrix]]
        plain.get_parameter(name).copy_(torch.stack(numbers).view(weight.shape))
    return plain


def tokens(model):
    return torch.arange(60).remainder(model.config.vocab_size).view(2, 30)


def same_codes(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# --- what is held, and what it computes


@every_kind
def test_matrices_of_attention_and_feed_forward_and_the_head_are_held_as_codes(pristine, kind):
    model = quantised(pristine(**WIDE), kind)
    bits = {name: weight.form.bits for name, weight in held(model).items()}
    expected = int(kind[3:])
    assert bits["layers.0.feed_forward.down.weight"] == expected
    assert bits["layers.1.feed_forward.experts.gate"] == expected
    assert bits["layers.2.attention.q.weight"] == bits["mtp.3.block.attention.o.weight"] == expected
    assert bits["head.weight"] == 8
    plain = {name for name, p in model.named_parameters() if p.dim() > 1}
    layers = [*(f"layers.{i}" for i in range(3)), "mtp.3.block"]
    assert plain == {
        "embed.weight",
        "mtp.3.projection.weight",
        *(f"{layer}.attention.kv_expand.weight" for layer in layers),
        *(f"{layer}.feed_forward.router.weight" for layer in layers[1:]),
    }
    assert model.head.weight.form.bits == 8


@every_kind
def test_logits_are_those_of_the_dequantised_weights(pristine, kind):
    path = pristine(**WIDE)
    model = quantised(path, kind)
    plain, tokens_BT = dequantised(model, path), tokens(model)
    for found, expected in (
        (model(tokens_BT), plain(tokens_BT)),
        (model.mtp_logits(tokens_BT)[0], plain.mtp_logits(tokens_BT)[0]),
    ):
        assert torch.allclose(found, expected, atol=1e-4)
    assert list(generate(model, [5, 6], 8)) == list(generate(plain, [5, 6], 8))
    with record_routing(model) as routings, record_routing(plain) as expected:
        model(tokens_BT)
        plain(tokens_BT)
    assert all(routings[i].experts_NK.equal(expected[i].experts_NK) for i in expected)


FAMILIES = {
    "stacked, transposed, interleaved, biases": (
        "gpt_oss",
        {"hidden_size": 64, "intermediate_size": 32},
    ),
    "gate and up as one, tied": (
        "granitemoe",
        {"hidden_size": 192, "intermediate_size": 32},
    ),
}


@every_kind
@pytest.mark.parametrize(("family", "widths"), FAMILIES.values(), ids=FAMILIES)
def test_stacked_experts_are_quantised_and_not_saved(pristine, tmp_path, family, widths, kind):
    path = pristine(family, **widths)
    model = quantised(path, kind)
    assert any(isinstance(module, QuantizedExperts) for module in model.modules())
    assert isinstance(model.head, nn.Linear) == model.config.tied_embeddings
    plain, tokens_BT = dequantised(model, path), tokens(model)
    assert torch.allclose(model(tokens_BT), plain(tokens_BT), atol=1e-4)
    with pytest.raises(CheckpointError, match=r"several matrices.*without quantize"):
        save_model(model, tmp_path / "saved", progress=False)
    assert not (tmp_path / "saved").exists()


def test_codes_are_nearer_with_more_bits(pristine):
    path = pristine("qwen3_moe", hidden_size=64, moe_intermediate_size=32, intermediate_size=64)
    plain = load_model(path, dtype=torch.float32, progress=False)
    errors = []
    for kind in KINDS:
        held_ = held(quantised(path, kind))
        weight = held_["layers.0.attention.q.weight"]
        found = weight.matrix.dequantize(torch.float32)
        errors.append((found - plain.get_parameter("layers.0.attention.q.weight")).norm())
    assert 0 < errors[0] < errors[1] / 5


def test_matrices_of_other_widths_stay_and_a_warning_says_how_many(pristine):
    with pytest.warns(UserWarning, match=r"int4' holds [\d,]+ of [\d,]+ weights"):
        model = quantised(pristine(), "int4")  # widths of 24 and 20
    assert not any(isinstance(m, QuantizedExperts) for m in model.modules())
    assert torch.isfinite(model(tokens(model))).all()


def test_experts_are_held_as_codes_all_or_none(pristine):
    path = pristine(**WIDE | {"moe_intermediate_size": 24})  # rows of gate and up fit
    with pytest.warns(UserWarning, match="int4' holds"):
        model = quantised(path, "int4")
    assert not any(isinstance(m, QuantizedExperts) for m in model.modules())
    plain, tokens_BT = dequantised(model, path), tokens(model)
    assert torch.allclose(model(tokens_BT), plain(tokens_BT), atol=1e-4)


@every_kind
def test_copies_and_compiled_decoding_give_the_same_text(pristine, kind, monkeypatch):
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph)
    model = quantised(pristine(**WIDE), kind, mtp=False)
    expected = list(generate(model, [5, 6], 6))
    copied = deepcopy(model)
    assert same_codes(copied, model)
    compile_decoding(copied)
    assert list(generate(copied, [5, 6], 6)) == expected


# --- files


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_has_the_same_codes(pristine, tmp_path, kind, dtype):
    path, saved = pristine(**WIDE), tmp_path / "saved"
    model = quantised(path, kind, dtype=dtype)
    save_model(model, saved, progress=False)
    assert same_codes(quantised(saved, kind, dtype=None), model)
    assert verify(saved)[0] == []
    plain = load_model(saved, progress=False)
    for name, weight in held(model).items():
        matrix = weight[1] if len(weight.shape) == 3 else weight.matrix
        found = plain.get_parameter(name)
        found = found[1] if len(weight.shape) == 3 else found
        assert torch.allclose(found, matrix.dequantize(dtype), rtol=0.01)
    described = json.loads((saved / "config.json").read_text())["quantization_config"]
    bits = {group["weights"]["num_bits"] for group in described["config_groups"].values()}
    assert bits == {8, int(kind[3:])}
    *others, usual = described["config_groups"].values()
    assert usual["targets"] == ["Linear"]
    assert usual["weights"]["num_bits"] == int(kind[3:])
    assert all("Linear" not in group["targets"] for group in others)
    assert "model.layers.1.mlp.gate" in described["ignore"]
    assert not {"lm_head", "model.layers.1.mlp.experts.0.up_proj"} & set(described["ignore"])
    with pytest.raises(CheckpointError, match="the model is quantised"):
        save_model(model, tmp_path / "other", dtype=torch.bfloat16, progress=False)


PACKED = {
    "4 bits, groups of 32": (4, 32),
    "4 bits, groups of 64": (4, 64),
    "4 bits, rows": (4, None),
    "8 bits, rows": (8, None),
}


@pytest.mark.parametrize(("bits", "size"), PACKED.values(), ids=PACKED)
def test_packed_integers_keep_their_codes(tiny, bits, size):
    path = tiny(**WIDE | {"moe_intermediate_size": 128})
    generator, tensors, expected = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in tensors_of(path).items():
        tensors[name] = tensor.bfloat16() if "bias" not in name else tensor
        if ".experts." in name:
            codes = torch.randint(
                -(2 ** (bits - 1)), 2 ** (bits - 1), tensor.shape, generator=generator
            )
            scale = torch.rand(len(codes), codes.shape[1] // (size or codes.shape[1]))
            parts = pack_integers(codes.to(torch.int8), bits), scale.bfloat16()
            del tensors[name]
            tensors |= {name + "_packed": parts[0], name + "_scale": parts[1]}
            tensors[name + "_shape"] = torch.tensor(codes.shape)
            expected[name] = codes
    write_tensors(path, tensors)
    scheme = {"num_bits": bits, "type": "int", "symmetric": True}
    scheme |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    edit_json(path / "config.json", quantization_config=config | {"config_groups": groups})
    model = quantised(path, f"int{bits}", dtype=None)
    plain = load_model(path, progress=False)
    ours = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    for e in range(8):
        for part, theirs in ours.items():
            name = f"layers.1.feed_forward.experts.{part}"
            matrix = held(model)[name][e]
            found = expected[f"model.layers.1.mlp.experts.{e}.{theirs}.weight"]
            assert matrix.codes.codes_OI.equal(found.to(torch.int8))
            assert matrix.dequantize(torch.bfloat16).equal(plain.get_parameter(name)[e])


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_packed_as_they_are_unpacked(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).repeat(3, 2).to(torch.int8)
    assert unpack_integers(pack_integers(codes, bits), bits).equal(codes)


# --- mistakes


def test_what_cannot_be_is_told(pristine, tiny, capsys):
    path = pristine(**WIDE)
    with pytest.raises(ValueError, match="quantize = 'int3': must be None, int8 or int4"):
        load_model(path, quantize="int3")
    with pytest.raises(ValueError, match="device = 'meta'.*for the CPU"):
        load_model(path, quantize="int8", device="meta")
    model = quantised(path, "int8").requires_grad_()
    with pytest.raises(ValueError, match="no gradients"):
        model(tokens(model))
    damaged = tiny(**WIDE)
    stored = tensors_of(damaged)
    stored["lm_head.weight"][3, 3] = float("nan")
    write_tensors(damaged, stored)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has numbers that are not finite"):
        quantised(damaged, "int4")


def test_the_command_line_quantises(pristine, capsys):
    path = str(pristine(**WIDE))
    assert main(["generate", "--model", path, "--prompt", "a", "--quantize", "int4"]) == 0
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--model", path, "--prompt", "a", "--quantize", "int3"])
    assert caught.value.code == 2
    assert "--quantize" in capsys.readouterr().err
