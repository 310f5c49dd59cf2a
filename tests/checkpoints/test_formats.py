"""A quantised file gives the logits that transformers gives on the weights it stands for.

The files are made by other means than those that read them: compressed-tensors packs integers,
transformers unpacks MXFP4, FP8 blocks are multiplied out one by one.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from files import edit_json, tensors_of, write_tensors
from published import peer_of, relative_difference, reload, save
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from checkpoints import CheckpointError, convert, load_model, save_model, verify

BOUND = 1e-4
SIZES = {
    "vocab_size": 103,
    "hidden_size": 60,
    "intermediate_size": 92,
    "moe_intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
DEEPSEEK = SIZES | {
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 22,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
    "v_head_dim": 18,
}
QWEN = SIZES | {"num_experts": 6, "head_dim": 24, "norm_topk_prob": True}
GPT_OSS = SIZES | {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_local_experts": 5,
    "head_dim": 16,
    "sliding_window": 9,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
MATRICES = ("_proj.weight", "_proj_with_mqa.weight")
BLOCK = (16, 32)  # that of the releases, 128 x 128, is larger than these matrices


def is_quantised(name: str) -> bool:
    return name.endswith(MATRICES) and "lm_head" not in name


def write_in_two_files(path: Path, tensors: dict, quantization: dict) -> None:
    """Weights and scales apart, as a weight's scale may be in the next file of a release."""
    for file in path.glob("*.safetensors*"):
        file.unlink()
    files = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for name, tensor in tensors.items():
        second = "scale" in name
        files[sorted(files)[second]][name] = tensor.contiguous()
    for file, content in files.items():
        save_file(content, path / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_json(path / "config.json", quantization_config=quantization)


def in_blocks(weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype):
    """(FP8, scales, what they stand for), one block after the other."""
    (rows, columns), (N, K) = block, weight.shape
    packed = torch.empty(N, K, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(N / rows), math.ceil(K / columns))
    meant = torch.empty(N, K)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            place = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
            scale = weight[place].abs().max() / 448
            if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
                scale = 2.0 ** scale.log2().ceil()
            scales[r, c] = scale = scale.to(torch.bfloat16).float()
            packed[place] = (weight[place] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            meant[place] = packed[place].float() * scale
    if scale_dtype == torch.uint8:
        return packed, (scales.log2() + 127).to(torch.uint8), meant
    return packed, scales.to(scale_dtype), meant


def fp8_blocks(scale_dtype: torch.dtype):
    def quantise(name: str, weight: torch.Tensor):
        packed, scales, meant = in_blocks(weight, BLOCK, scale_dtype)
        return {name: packed, name + "_scale_inv": scales}, meant

    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    return quantise, config | {"activation_scheme": "dynamic"}


def fp8_channels():
    def quantise(name: str, weight: torch.Tensor):
        packed, scales, meant = in_blocks(weight, (1, weight.shape[1]), torch.bfloat16)
        return {name: packed, name + "_scale": scales}, meant

    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return quantise, config | {"config_groups": groups, "ignore": ["lm_head"]}


def int4_groups():
    """Experts in groups of 8 columns, everything else in groups of 16: chosen by name."""

    def quantise(name: str, weight: torch.Tensor):
        size, (N, K) = (8 if "experts" in name else 16), weight.shape
        grouped = torch.nn.functional.pad(weight, (0, -K % size)).unflatten(1, (-1, size))
        scales = (grouped.abs().amax(dim=-1) / 7).to(torch.bfloat16)
        whole = scales.float().repeat_interleave(size, dim=1)[:, :K]
        integers = (weight / whole).round().clamp(-8, 7)
        stem = name.removesuffix("weight")
        stored = {
            stem + "weight_packed": pack_to_int32(integers.to(torch.int8), 4),
            stem + "weight_scale": scales,
            stem + "weight_shape": torch.tensor([N, K]),
        }
        return stored, integers * whole

    def group(target: str, size: int):
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size}
        return {"targets": [target], "weights": weights | {"symmetric": True}}

    groups = {"group_0": group("Linear", 16), "group_1": group("re:.*mlp.*experts.*", 8)}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return quantise, config | {"config_groups": groups, "ignore": ["lm_head"]}


FORMATS = {
    "FP8 blocks, float32 scales": fp8_blocks(torch.float32),
    "FP8 blocks, bfloat16 scales": fp8_blocks(torch.bfloat16),
    "FP8 blocks, e8m0 scales": fp8_blocks(torch.float8_e8m0fnu),
    "FP8 blocks, e8m0 scales as bytes": fp8_blocks(torch.uint8),
    "FP8 per channel": fp8_channels(),
    "INT4": int4_groups(),
}
PEERS = {"deepseek_v3": DEEPSEEK, "qwen3_moe": QWEN}


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(103, (2, 23), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def quantised(path: Path, family: str, kind: str) -> Path:
    """A peer's checkpoint in that format at path/packed; what it stands for at path/meant."""
    quantise, config = FORMATS[kind]
    save(peer_of(family, PEERS[family]), path / "packed")
    save(peer_of(family, PEERS[family]), path / "meant")
    packed, meant = {}, {}
    for name, weight in tensors_of(path / "meant").items():
        stored, meant[name] = quantise(name, weight) if is_quantised(name) else ({}, weight)
        packed |= stored or {name: weight}
    assert len(packed) > 1.5 * len(meant)
    for file in (path / "meant").glob("*.safetensors*"):
        file.unlink()
    save_file(meant, path / "meant" / "model.safetensors", metadata={"format": "pt"})
    write_in_two_files(path / "packed", packed, config)
    return path


@pytest.mark.filterwarnings("ignore:the config announces")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", PEERS)
@torch.no_grad()
def test_logits_are_those_of_the_weights_the_file_stands_for(tmp_path, tokens_BT, family, kind):
    path = quantised(tmp_path, family, kind)
    expected_BTV = reload(path / "meant")[0](tokens_BT).logits
    model = load_model(path / "packed", dtype=torch.float32, progress=False)
    found = {"loaded": relative_difference(model(tokens_BT), expected_BTV)}
    convert(path / "packed", path / "plain", dtype=torch.float32, progress=False)
    peer, info = reload(path / "plain")
    assert not any(info.values()), info
    found["converted"] = relative_difference(peer(tokens_BT).logits, expected_BTV)
    print("".join(f"{way} {difference:.1e}  " for way, difference in found.items()))
    assert max(found.values()) < BOUND
    assert verify(path / "packed", values=True)[0] == []


@pytest.mark.filterwarnings("ignore:the config announces")
@pytest.mark.parametrize("kind", ["FP8 blocks, float32 scales", "INT4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantised_weights_load_in_the_dtype_of_the_embedding(tmp_path, kind, dtype):
    path = quantised(tmp_path, "qwen3_moe", kind)
    tensors = tensors_of(path / "packed")
    embedding = tensors["model.embed_tokens.weight"].to(dtype)
    write_tensors(path / "packed", tensors | {"model.embed_tokens.weight": embedding})
    model = load_model(path / "packed", progress=False)
    wide = load_model(path / "packed", dtype=torch.float32, progress=False)
    for (name, narrow), exact in zip(
        model.state_dict().items(), wide.state_dict().values(), strict=True
    ):
        plain = "norm" in name or "router" in name or name == "head.weight"
        assert narrow.dtype == (torch.float32 if plain else dtype), name
        assert narrow.equal(exact.to(narrow.dtype)), name


@torch.no_grad()
def test_mxfp4_experts_are_those_that_transformers_unpacks(tmp_path, tokens_BT):
    generator = torch.Generator().manual_seed(5)
    peer = peer_of("gpt_oss", GPT_OSS)
    path = save(peer, tmp_path / "packed")
    tensors = tensors_of(path)
    for i, layer in enumerate(peer.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(layer.mlp.experts, name)
            E, K, N = parameter.shape  # transformers holds (experts, in, out)
            bytes_ = torch.randint(256, (E, N, K // 32, 16), generator=generator)
            scales = torch.randint(123, 126, (E, N, K // 32), generator=generator)
            blocks, scales = bytes_.to(torch.uint8), scales.to(torch.uint8)
            meant = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            parameter.copy_(meant)
            stem = f"model.layers.{i}.mlp.experts.{name}"
            del tensors[stem]
            tensors |= {stem + "_blocks": blocks, stem + "_scales": scales}
    excluded = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": excluded}
    write_in_two_files(path, tensors, config)
    expected_BTV = peer(tokens_BT).logits
    model = load_model(path, dtype=torch.float32, progress=False)
    assert relative_difference(model(tokens_BT), expected_BTV) < BOUND
    convert(path, tmp_path / "plain", dtype=torch.float32, progress=False)
    again, info = reload(tmp_path / "plain")
    assert not any(info.values()), info
    assert relative_difference(again(tokens_BT).logits, expected_BTV) < BOUND


@torch.no_grad()
def test_what_is_saved_in_fp8_blocks_is_what_transformers_reads(tmp_path):
    """At sizes of whole blocks: its routine refuses partial ones, which we write and read too."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 128}
    peer = peer_of("qwen3_moe", QWEN | sizes | {"num_hidden_layers": 1})
    model = load_model(save(peer, tmp_path / "peer"), progress=False)
    save_model(model, tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    convert(tmp_path / "fp8", tmp_path / "plain", torch.float32, progress=False)
    packed, plain = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "plain")
    theirs = Fp8Dequantize(None)
    scaled = [name for name in plain if name + "_scale_inv" in packed]
    assert len(scaled) == 4 + 6 * 3
    for name in scaled:
        scales = packed[name + "_scale_inv"]
        assert theirs._dequantize_one(packed[name], scales, torch.float32).equal(plain[name]), name


def test_experts_in_one_tensor_cannot_be_saved_in_fp8_blocks(pristine, tmp_path):
    model = load_model(pristine("granitemoe"), progress=False)
    with pytest.raises(CheckpointError, match=r"input_linear.weight holds .* in one tensor"):
        save_model(model, tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    assert not (tmp_path / "fp8").exists()


@pytest.mark.filterwarnings("ignore:the config announces")
def test_fp8_survives_partial_blocks_and_mtp(pristine, tmp_path):
    model = load_model(pristine(), progress=False)
    save_model(model, tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    again = load_model(tmp_path / "fp8", dtype=torch.float32, progress=False)
    for (name, ours), exact in zip(
        again.state_dict().items(), model.state_dict().values(), strict=True
    ):
        changed = not ours.equal(exact)
        inside = "attention." in name or "feed_forward." in name
        kept = "norm" in name or "router" in name or "q.norm" in name
        assert changed == (inside and not kept), name
        assert (ours - exact).abs().max() <= exact.abs().max() / 14, name
