"""Quantised weights against the routines of others, loops by hand, and damaged files."""

import json
import re
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import checkpoints.storage.quantized
from checkpoints import CheckpointError
from checkpoints.storage.quantization_config import check_method
from checkpoints.storage.quantized import (
    dequantize_blocks,
    dequantize_groups,
    dequantize_mxfp4,
    quantize_blocks,
    unpack_integers,
)
from checkpoints.storage.shards import Shards, StoredTensor, open_shards
from checkpoints.storage.weights import find_weights
from moe.testing import watch_names

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
sizes, edges, seeds = st.integers(1, 13), st.integers(1, 7), st.integers(0, 10**6)


def rough_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-6, 7, shape, generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), exponents)


def random_bytes(*shape: int, seed: int = 0, below: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(below, shape, generator=generator).to(torch.uint8)


def random_words(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    return rough_noise(*shape, seed=seed).to(E4M3)


def scales(*shape: int, seed: int = 1) -> torch.Tensor:
    return rough_noise(*shape, seed=seed).abs() + 0.01


def counted(length: int, block: int) -> int:
    return len(range(0, length, block))


def plain_blocks(weight, scale, block) -> torch.Tensor:
    """One product after the other. In float64 they are exact: 28 bits at most."""
    out = torch.zeros(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = float(weight[i, j]) * float(scale[i // block[0], j // block[1]])
    return out


# --- the formats ---------------------------------------------------------------------------------


@given(sizes, sizes, edges, edges, seeds)
def test_blocks_are_multiplied_by_their_scales_the_partial_ones_too(N, K, rows, columns, seed):
    weight, scale = fp8(N, K, seed=seed), scales(counted(N, rows), counted(K, columns), seed=seed)
    expected = plain_blocks(weight, scale, (rows, columns))
    assert torch.equal(dequantize_blocks(weight, scale, (rows, columns)), expected)


def test_trap_31_576_rows_are_four_blocks_of_128_and_one_of_64():
    ones = torch.ones(576, 200).to(E4M3)
    out = dequantize_blocks(ones, torch.arange(10.0).view(5, 2), (128, 128))
    assert out[[0, 127, 128, 511, 512, 575], 0].tolist() == [0, 0, 2, 6, 8, 8]
    assert out[0, [0, 127, 128, 199]].tolist() == [0, 0, 1, 1]


@given(sizes, sizes, seeds)
def test_channel_and_tensor_scales_in_every_shape_they_come_in(N, K, seed):
    weight, scale, one = fp8(N, K, seed=seed), scales(N, 1, seed=seed), scales(1, 1, seed=seed)
    for shape in ((N, 1), (N,)):
        out = dequantize_blocks(weight, scale.view(shape), (1, K))
        assert torch.equal(out, plain_blocks(weight, scale, (1, K)))
    for shape in ((1, 1), (1,), ()):
        out = dequantize_blocks(weight, one.view(shape), (N, K))
        assert torch.equal(out, plain_blocks(weight, one, (N, K)))


def test_leading_dimensions_are_matrices_by_themselves():
    weight, scale = fp8(2, 3, 5, 7), scales(2, 3, 2, 3)
    out = dequantize_blocks(weight, scale, (4, 3), torch.bfloat16)
    for a in range(2):
        for b in range(3):
            expected = plain_blocks(weight[a, b], scale[a, b], (4, 3)).to(torch.bfloat16)
            assert torch.equal(out[a, b], expected)
    per_expert = dequantize_blocks(weight[0], scale[0, :, :1, :1], (5, 7))
    assert torch.equal(per_expert, weight[0].float() * scale[0, :, :1, :1])


@pytest.mark.parametrize("shape", [(3, 2), (2,), (6,), (1, 2, 3), (2, 4), (3, 3), (1, 1), ()])
def test_scales_of_another_shape_are_refused(shape):
    with pytest.raises(AssertionError, match="scale"):
        dequantize_blocks(fp8(6, 9), scales(*shape), (3, 3))  # 2 x 3 blocks


def test_trap_32_scale_bytes_are_powers_of_two():
    every_byte = torch.arange(256).to(torch.uint8).view(256, 1)
    expected = torch.tensor([2.0 ** (b - 127) for b in range(255)])
    for scale in (every_byte, every_byte.view(E8M0)):
        out = dequantize_blocks(torch.ones(256, 3).to(E4M3), scale, (1, 3))
        assert torch.equal(out[:255], expected[:, None].expand(255, 3))
        assert out[255].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_lower_precision_are_taken_as_they_are(dtype):
    weight, scale = fp8(5, 7), scales(3, 2).to(dtype)
    out = dequantize_blocks(weight, scale, (2, 4))
    assert torch.equal(out, plain_blocks(weight, scale.float(), (2, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_rounded_once_from_float32(dtype):
    weight, scale = fp8(40, 30), scales(20, 8)
    out = dequantize_blocks(weight, scale, (2, 4), dtype)
    assert out.dtype == dtype
    assert torch.equal(out, dequantize_blocks(weight, scale, (2, 4)).to(dtype))


def test_the_arguments_stay_as_they_were():
    weight, scale = rough_noise(4, 6), scales(4, 6)
    before = weight.clone(), scale.clone()
    dequantize_blocks(weight, scale, (1, 1))
    quantize_blocks(weight, (2, 2))
    assert torch.equal(weight, before[0])
    assert torch.equal(scale, before[1])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8, E8M0])
def test_transformers_dequantises_blocks_alike_where_it_can(kind):
    weight = fp8(2, 256, 384)
    scale = random_bytes(2, 2, 3, below=200)
    scale = scales(2, 2, 3).to(kind) if kind not in (torch.uint8, E8M0) else scale.view(kind)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(dequantize_blocks(weight, scale, (128, 128)), theirs)


@pytest.mark.parametrize(
    ("strategy", "block", "shape"),
    [("block", (4, 5), (3, 3)), ("channel", (1, 11), (9, 1)), ("tensor", (9, 11), (1,))],
)
def test_compressed_tensors_dequantises_fp8_alike(strategy, block, shape):
    weight, scale = fp8(9, 11), scales(*shape)
    structure = {"block_structure": list(block)} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **structure)
    theirs = dequantize(weight.float(), scale, args=args)
    assert torch.equal(dequantize_blocks(weight, scale, block), theirs)


def plain_fp4(code: int) -> float:
    """E2M1: a sign, two bits of exponent with bias 1, one bit of fraction."""
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    size = 2 ** (exponent - 1) * (1 + fraction / 2) if exponent else fraction / 2
    return -size if sign else size


def test_trap_34_every_byte_of_mxfp4_with_every_scale():
    blocks = torch.arange(256).to(torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    scale = torch.arange(255).to(torch.uint8).view(255, 1).repeat(1, 16)
    numbers = [plain_fp4(code) for b in range(256) for code in (b & 15, b >> 4)]
    powers = torch.tensor([2.0 ** (b - 127) for b in range(255)], dtype=torch.float64)
    expected = powers[:, None] * torch.tensor(numbers, dtype=torch.float64)
    out = dequantize_mxfp4(blocks, scale)
    assert out.shape == (255, 512)
    assert torch.equal(out, expected.float())
    assert out.signbit().equal(expected.signbit())
    assert dequantize_mxfp4(blocks[:1], scale[:1] * 0 + 255).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_converts_mxfp4_alike(dtype):
    blocks = random_bytes(3, 40, 5, 16)
    scale = random_bytes(3, 40, 5, seed=1, below=250)
    blocks.view(-1)[:256] = torch.arange(256).to(torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scale, dtype=dtype)
    ours = dequantize_mxfp4(blocks, scale, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours.transpose(1, 2), theirs)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 1), (2, 0), (0, 3)])
def test_mxfp4_takes_any_leading_dimensions(shape):
    blocks, scale = random_bytes(*shape, 16), random_bytes(*shape, seed=1, below=250)
    out = dequantize_mxfp4(blocks, scale)
    assert out.shape == (*shape[:-1], 32 * shape[-1])
    lows = out.unflatten(-1, (-1, 16, 2))[..., 0].flatten()
    powers = [2.0 ** (b - 127) for b in scale.flatten().tolist() for _ in range(16)]
    codes = [b & 15 for b in blocks.flatten().tolist()]
    assert lows.tolist() == [plain_fp4(c) * p for c, p in zip(codes, powers, strict=True)]


class Largest(TorchDispatchMode):
    """The bytes of the largest tensors that were made."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            place, size = out.untyped_storage().data_ptr(), out.untyped_storage().nbytes()
            self.bytes[place] = max(size, self.bytes.get(place, 0))
        return out


def test_what_is_needed_meanwhile_does_not_grow_with_the_tensor(monkeypatch):
    monkeypatch.setattr(checkpoints.storage.quantized, "SLICE", 100)
    blocks, scale = random_bytes(7, 150, 16), random_bytes(7, 150, seed=1, below=250)
    weight, weight_scale = fp8(30, 40, 50), scales(30, 10, 10)
    with Largest() as made:
        out = dequantize_mxfp4(blocks, scale, torch.bfloat16)
    ends = {t.untyped_storage().data_ptr() for t in (blocks, scale, out)}
    assert max(n for p, n in made.bytes.items() if p not in ends) <= 100 * 32 * 4
    monkeypatch.setattr(checkpoints.storage.quantized, "SLICE", 10**6)
    assert torch.equal(out, dequantize_mxfp4(blocks, scale, torch.bfloat16))
    with Largest() as made:
        stack = dequantize_blocks(weight, weight_scale, (4, 5), torch.bfloat16)
    ends = {t.untyped_storage().data_ptr() for t in (weight, weight_scale, stack)}
    assert max(n for p, n in made.bytes.items() if p not in ends) <= 30 * 40 * 50 * 4 // 10


def test_trap_33_numbers_lie_in_a_word_from_its_lowest_bits_up():
    word = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32]]).to(torch.int32)
    assert unpack_integers(word, 4).tolist() == [[n - 8 for n in range(16)]]
    found = unpack_integers(torch.tensor([[0x7F80FF00]], dtype=torch.int32), 8)
    assert found.tolist() == [[-128, 127, 0, -1]]


@pytest.mark.parametrize("bits", [4, 8])
@given(N=sizes, K=st.integers(1, 70), seed=seeds)
def test_what_compressed_tensors_packs_is_unpacked(bits, N, K, seed):
    half = 2 ** (bits - 1)
    numbers = (random_bytes(N, K, seed=seed).int() % (2 * half) - half).to(torch.int8)
    packed = pack_to_int32(numbers, bits)
    unpacked = unpack_integers(packed, bits)
    assert unpacked.dtype == torch.int8
    assert unpacked.shape == (N, packed.shape[1] * 32 // bits)
    assert torch.equal(unpacked[:, :K], numbers)
    words = random_words(2, N, 3, seed=seed)
    theirs = unpack_from_int32(words, bits, torch.Size((2, N, 96 // bits)))
    assert torch.equal(unpack_integers(words, bits), theirs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_tensors_dequantises_groups_alike(bits, dtype):
    words, scale = random_words(6, 24 * bits // 8), scales(6, 3).to(dtype)
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32)
    integers = unpack_from_int32(words, bits, torch.Size((6, 96)))
    theirs = dequantize(integers, scale, args=args)
    assert theirs.dtype == dtype
    assert torch.equal(dequantize_groups(words, scale, (6, 96), bits, 32, dtype), theirs)


@pytest.mark.parametrize("bits", [4, 8])
@given(N=sizes, K=st.integers(1, 70), words_in_group=st.integers(1, 4), seed=seeds)
def test_groups_and_words_may_be_cut_short_by_the_row(bits, N, K, words_in_group, seed):
    size, half = 32 // bits * words_in_group, 2 ** (bits - 1)
    numbers = (random_bytes(N, K, seed=seed).int() % (2 * half) - half).to(torch.int8)
    scale = scales(N, counted(K, size), seed=seed)
    out = dequantize_groups(pack_to_int32(numbers, bits), scale, (N, K), bits, size)
    assert torch.equal(out, plain_blocks(numbers, scale, (1, size)))


def half_a_step(weight, scale) -> torch.Tensor:
    """float8_e4m3fn has three bits after the leading one, and its smallest step is 2^-9."""
    return torch.maximum(weight.abs() / 16, scale * 2.0**-10) * (1 + 1e-6)


@pytest.mark.parametrize("factor", [1e-44, 1e-41, 1e-38, 1, 1e36])
@given(N=sizes, K=sizes, rows=edges, columns=edges, seed=seeds)
def test_quantising_is_off_by_half_a_step_at_most(factor, N, K, rows, columns, seed):
    weight, block = rough_noise(2, N, K, seed=seed) * factor, (rows, columns)
    quantized, scale = quantize_blocks(weight, block)
    assert (quantized.dtype, quantized.shape) == (E4M3, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (2, counted(N, rows), counted(K, columns)))
    assert quantized.is_contiguous()
    spread = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[:, :N, :K]
    error = (dequantize_blocks(quantized, scale, block) - weight).abs()
    assert (error <= half_a_step(weight, spread)).all()


@pytest.mark.parametrize("factor", [2.0**-90, 1, 2.0**100])
@given(N=sizes, K=sizes, rows=edges, columns=edges, seed=seeds)
def test_the_largest_of_every_block_becomes_448_and_zeros_stay(factor, N, K, rows, columns, seed):
    weight = rough_noise(N, K, seed=seed) * factor
    weight[:rows, :columns] = 0
    quantized, scale = quantize_blocks(weight, (rows, columns))
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            place = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
            zeros = (r, c) == (0, 0)
            largest = weight[place].abs().max()
            assert scale[r, c] == (1 if zeros else largest / 448)
            assert quantized[place].float().abs().max() == (0 if zeros else 448)


def test_128_by_128_is_the_block_to_quantise_in():
    quantized, scale = quantize_blocks(rough_noise(576, 200))
    assert scale.shape == (5, 2)
    assert torch.equal(
        quantize_blocks(dequantize_blocks(quantized, scale, (128, 128)))[0].float(),
        quantized.float(),
    )


def test_names_tell_the_shapes():
    with watch_names(checkpoints.storage.quantized.__file__.__eq__) as found:
        quantize_blocks(rough_noise(2, 5, 7), (2, 3))
        dequantize_blocks(fp8(2, 5, 7), scales(2, 3, 3), (2, 3))
        dequantize_mxfp4(random_bytes(2, 3, 16), random_bytes(2, 3))
        dequantize_groups(random_words(3, 5), scales(3, 2), (3, 37), 4, 32)
    assert len(found) > 5
    assert not set().union(*found.values())


# --- how files store a weight --------------------------------------------------------------------


def write(path, *files: dict) -> None:
    """A checkpoint's weight files with these tensors, and their index."""
    listed = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number}.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / file)
        listed |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def described(tensors: dict[str, torch.Tensor]) -> Shards:
    """What `open_shards` gives for these tensors, without files."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", E4M3: "F8_E4M3", E8M0: "F8_E8M0"}
    names |= {torch.float8_e5m2: "F8_E5M2", torch.uint8: "U8", torch.int8: "I8"}
    names |= {torch.int32: "I32", torch.int64: "I64"}
    file = "1.safetensors"
    stored = {n: StoredTensor(file, names[t.dtype], (*t.shape,)) for n, t in tensors.items()}
    shards = Shards(stored, [])
    shards.read = tensors.__getitem__
    return shards


def group(*targets: str, **weights) -> dict:
    plain = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {"targets": list(targets), "weights": plain | weights}


def compressed(*groups: dict, **changes) -> dict:
    method = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    return method | {"config_groups": named, "ignore": ["lm_head"]} | changes


def packed(name: str, N: int, K: int, bits: int = 4, size: int = 32) -> dict[str, torch.Tensor]:
    numbers = (random_bytes(N, K).int() % 2**bits - 2 ** (bits - 1)).to(torch.int8)
    return {
        f"{name}.weight_packed": pack_to_int32(numbers, bits),
        f"{name}.weight_scale": scales(N, counted(K, size)).bfloat16(),
        f"{name}.weight_shape": torch.tensor([N, K]),
    }


def unpacked(tensors: dict, bits: int = 4, size: int = 32) -> torch.Tensor:
    """What `packed` made, by other routines than those under test."""
    words, scale, shape = tensors.values()
    numbers = unpack_from_int32(words, bits, torch.Size(shape.tolist()))
    return plain_blocks(numbers, scale.float(), (1, size))


FLOAT = {"num_bits": 8, "type": "float"}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 3]}
LINEAR = compressed(group("Linear"))
MIXED = compressed(
    group("Linear", num_bits=8, group_size=16),
    group("re:.*experts.*up"),
    group("q", strategy="block", block_structure=[2, 5], **FLOAT),
    group("re:[klvw]$|experts.down", strategy="channel", **FLOAT),
    weight_block_size=[4, 3],
)
M, BYTES, SCALE = fp8(9, 11), random_bytes(3, 4, below=140), scales(3, 4)
STACK, STACK_SCALE = fp8(2, 9, 11, seed=1), scales(2, 3, 4).bfloat16()
ROWS, STACK_ROWS = scales(9, 1), scales(2, 9, 1)
X, X_SCALE = random_bytes(2, 6, 3, 16), random_bytes(2, 6, 3, seed=1, below=140)
INT4, INT8 = packed("experts.0.up", 3, 75), packed("up", 5, 18, bits=8, size=16)


def in_blocks(weight, scale, *block: int) -> torch.Tensor:
    if scale.dtype == torch.uint8:
        scale = 2.0 ** (scale.float() - 127)
    if weight.dim() == 2:
        return plain_blocks(weight, scale, block)
    return torch.stack([in_blocks(*pair, *block) for pair in zip(weight, scale, strict=True)])


WAYS = [  # the names of the tensors, the tensors, the weight when not quantised, in words
    ("a.weight", "_scale_inv", M, SCALE, in_blocks(M, SCALE, 4, 3), "FP8 in blocks of 4 x 3"),
    ("b.weight", "_scale_inv", M, BYTES, in_blocks(M, BYTES, 4, 3), "FP8 in blocks of 4 x 3"),
    ("c.weight", "_scale_inv", M, BYTES.view(E8M0), in_blocks(M, BYTES, 4, 3), "blocks of 4 x 3"),
    ("e.up", "_scale_inv", STACK, STACK_SCALE, in_blocks(STACK, STACK_SCALE, 4, 3), "of 4 x 3"),
    ("q.weight", "_scale", M, scales(5, 3), in_blocks(M, scales(5, 3), 2, 5), "blocks of 2 x 5"),
    ("k.weight", "_scale", M, ROWS, in_blocks(M, ROWS, 1, 11), "FP8 per channel"),
    ("l.weight", "_scale", M, ROWS[:, 0], in_blocks(M, ROWS, 1, 11), "FP8 per channel"),
    ("experts.down", "_scale", STACK, STACK_ROWS, STACK.float() * STACK_ROWS, "FP8 per channel"),
    ("v.weight", "_scale", M, ROWS[0, 0], M.float() * ROWS[0], "FP8 per tensor"),
    ("w.weight", "_scale", M, ROWS[0], M.float() * ROWS[0], "FP8 per tensor"),
]


def all_ways() -> list[tuple[dict[str, torch.Tensor], torch.Tensor, str]]:
    """The tensors of a weight, what it is when not quantised, and in words."""
    plain = rough_noise(5).bfloat16(), rough_noise(1), rough_noise(3).double()
    return [
        *(({name: w, name + end: s}, made, words) for name, end, w, s, made, words in WAYS),
        ({"x_blocks": X, "x_scales": X_SCALE}, convert_moe_packed_tensors(X, X_SCALE), "MXFP4"),
        (INT4, unpacked(INT4), "INT4 in groups of 32"),
        (INT8, unpacked(INT8, 8, 16), "INT8 in groups of 16"),
        ({"norm.weight": plain[0]}, plain[0], "BF16"),
        ({"logit_scale": plain[1]}, plain[1], "F32"),
        ({"bias": plain[2]}, plain[2], "F64"),
    ]


def test_all_ways_of_storing_in_one_checkpoint_with_the_scales_in_another_file(tmp_path):
    first, second = {}, {"q.input_scale": scales(1), "a.activation_scale": scales(1)}
    for tensors, _, _ in all_ways():
        name, *others = tensors
        first[name] = tensors[name]
        second |= {name: tensors[name] for name in others}
    write(tmp_path, first, second)
    with open_shards(tmp_path) as shards:
        weights, problems = find_weights(shards, MIXED)
        assert problems == []
        assert len(weights) == len(all_ways())
        for tensors, expected, words in all_ways():
            parts = tuple(tensors)
            weight = weights[parts[0].removesuffix("_blocks").removesuffix("_packed")]
            assert weight.names == parts
            assert weight.file.name == "model-1.safetensors"
            assert weight.shape == expected.shape
            assert weight.stored_as.endswith(words)
            assert weight.quantized == (len(parts) > 1)
            exact = weight.read(shards, torch.float32, "cpu")
            assert torch.equal(exact, expected.float()), words
            usual = expected.bfloat16() if weight.quantized else expected
            read = weight.read(shards, None, torch.device("cpu"))
            assert read.dtype == usual.dtype
            assert torch.equal(read, usual), words
            meta = weight.read(shards, torch.float16, "meta")  # all is done on the device
            assert (meta.device.type, meta.dtype) == ("meta", torch.float16)
            assert meta.shape == weight.shape


def test_nothing_is_read_before_it_is_asked_for():
    shards = described(packed("p", 3, 12) | {"a.weight": rough_noise(4, 3)})
    asked, read = [], shards.read
    shards.read = lambda name: asked.append(name) or read(name)
    weights, _ = find_weights(shards, LINEAR)
    assert weights["p.weight"].stored_as == "INT4 in groups of 32"
    assert asked == []
    assert weights["p.weight"].shape == weights["p.weight"].shape == (3, 12)
    assert asked == ["p.weight_shape"]


@pytest.mark.parametrize(
    ("targets", "others", "chosen"),
    [
        (["Linear"], ["re:.*experts.*"], 1),
        (["re:.*experts.*"], ["Linear"], 0),
        (["Linear"], ["layers.3.experts.7.up"], 1),
        (["re:layers.3.*"], ["layers.3.experts.7.up"], 0),  # the first that names it
        (["re:experts"], ["Linear"], 1),  # a pattern starts where the name does
        (["layers.3"], ["Linear"], 1),  # a name is a whole name
        (["experts"], ["lm_head", "re:.*up"], 1),
        (["lm_head"], ["Linear"], 1),
        (["Linear"], ["Linear"], 0),
    ],
)
def test_trap_33_the_config_group_is_chosen_by_its_targets(targets, others, chosen):
    bits, size = [(4, 32), (8, 16)][chosen]
    tensors = packed("layers.3.experts.7.up", 3, 64, bits, size)
    groups = group(*targets), group(*others, num_bits=8, group_size=16)
    quantization = compressed(*groups, ignore=["re:.*experts.*"])  # which is not believed
    check_method(quantization)
    weights, problems = find_weights(shards := described(tensors), quantization)
    assert problems == []
    made = weights["layers.3.experts.7.up.weight"].read(shards, torch.float32, "cpu")
    assert torch.equal(made, unpacked(tensors, bits, size))


def test_groups_about_activations_only_are_passed_over():
    silent = {"targets": ["Linear"], "weights": None, "input_activations": {"num_bits": 8}}
    check_method(quantization := compressed(silent, group("Linear")))
    weights, problems = find_weights(described(packed("up", 3, 64)), quantization)
    assert list(weights) == ["up.weight"]
    assert problems == []


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_may_have_a_scale_per_channel(bits):
    tensors = packed("up", 5, 18, bits, size=18)
    per_channel = group("Linear", num_bits=bits, strategy="channel", group_size=-1)
    check_method(quantization := compressed(per_channel))
    weights, problems = find_weights(shards := described(tensors), quantization)
    assert problems == []
    assert weights["up.weight"].stored_as == f"INT{bits} per channel"
    made = weights["up.weight"].read(shards, torch.float32, "cpu")
    assert torch.equal(made, unpacked(tensors, bits, 18))


@pytest.mark.parametrize(
    ("quantization", "scale", "words"),
    [
        (None, scales(2, 2), "FP8 in blocks of 128 x 128"),
        ({"quant_method": "fp8"}, scales(2, 2), "FP8 in blocks of 128 x 128"),
        ({"quant_method": "mxfp4"}, scales(2, 2), "FP8 in blocks of 128 x 128"),
        (BLOCKS | {"weight_block_size": [64, 256]}, scales(3, 1), "FP8 in blocks of 64 x 256"),
        (BLOCKS | {"weight_block_size": None}, scales(1), "FP8 per tensor"),
        (BLOCKS | {"weight_block_size": None}, scales(130, 1), "FP8 per channel"),
    ],
)
def test_the_block_of_fp8_weights_is_the_one_stated(quantization, scale, words):
    tensors = {"up.weight": fp8(130, 200), "up.weight_scale_inv": scale}
    weights, problems = find_weights(described(tensors), quantization)
    assert problems == []
    assert weights["up.weight"].stored_as == words


UP, BIG = packed("up", 5, 64), fp8(576, 200)
UNLIKE = "is not supported with"


def a(weight=BIG, **parts: torch.Tensor) -> dict:
    return {"a.weight": weight} | {f"a.weight_{part}": value for part, value in parts.items()}


def x(blocks, its_scales) -> dict:
    return {"x_blocks": blocks, "x_scales": its_scales}


def up(**parts: torch.Tensor | None) -> dict:
    changed = UP | {f"up.weight_{part}": value for part, value in parts.items()}
    return {name: value for name, value in changed.items() if value is not None}


PROBLEMS = [  # the tensors, and how the sentence goes on after the file; ~ is anything
    (
        a(),
        "a.weight is F8_E4M3 and no file holds a.weight_scale_inv or a.weight_scale; download",
    ),
    ({"x": BIG}, "x is F8_E4M3 and no file holds x_scale_inv or x_scale; download"),
    (a(scale_inv=scales(4, 2)), "a.weight_scale_inv is F32 [4, 2], expected ~[5, 2] in blocks of"),
    (a(scale_inv=scales(2, 5)), "a.weight_scale_inv is F32 [2, 5], expected ~ of 128 x 128 of a"),
    (a(scale_inv=scales(1)), "a.weight_scale_inv is F32 [1], expected ~: [5, 2] in ~; download"),
    (a(scale_inv=scales(5, 2).int()), "a.weight_scale_inv is I32 [5, 2], expected F32, BF16"),
    (a(scale=scales(5, 2)), "a.weight_scale is F32 [5, 2], expected ~[1, 1] per tensor or [576"),
    (a(scale=scales(5, 2)), "a.weight_scale is F32 ~; add its block size to config.json or"),
    (a(fp8(9), scale=scales(1)), "a.weight is F8_E4M3 [9], expected a matrix; convert"),
    (a(BIG[:, :0], scale=scales(1)), "a.weight is F8_E4M3 [576, 0], expected a matrix; convert"),
    (
        a(scale_inv=scales(5, 2), scale=scales(1)),
        f"a.weight_scale {UNLIKE} a.weight stored as FP8 in",
    ),
    (
        a(rough_noise(3, 3), scale_inv=scales(1, 1)),
        f"a.weight_scale_inv {UNLIKE} a.weight stored as F32;",
    ),
    (a(BIG.to(torch.float8_e5m2)), "a.weight is F8_E5M2, expected F64, F32, F16, BF16, F8_E4M3;"),
    (a(BIG.char(), scale=scales(576, 1)), "a.weight is I8, expected F64, F32, F16, BF16, F8_E4M3"),
    ({"a.weight_scale_inv": ROWS}, "a.weight_scale_inv is present without a.weight;"),
    ({"a.weight_scale": ROWS}, "a.weight_scale is present without a.weight; download"),
    ({"x_scale_inv": STACK_SCALE}, "x_scale_inv is present without x; download"),
    ({"a.weight_shape": ROWS}, "a.weight_shape is present without a.weight; download"),
    (up(scale=None), "up.weight_packed needs up.weight_scale, which is in no file; download"),
    (up(shape=None), "up.weight_packed needs up.weight_shape, which is in no file; download"),
    (up(scale=scales(5, 4)), "up.weight_scale is F32 [5, 4], expected F32 or ~ [5, 2]; download"),
    (up(scale=scales(5, 2).char()), "up.weight_scale is I8 [5, 2], expected F32 or"),
    (up(packed=random_words(5, 8).long()), "up.weight_packed is I64 [5, 8], expected I32 [any,"),
    (up(packed=random_words(2, 5, 8)), "up.weight_packed is I32 [2, 5, 8], expected I32 [any,"),
    (up(packed=random_words(5, 0)), "up.weight_packed is I32 [5, 0], expected I32 [any, any];"),
    (up(shape=torch.tensor([1, 5, 64])), "up.weight_shape is I64 [3], expected I64 or I32 [2];"),
    (
        up() | {"up.weight": M.float()},
        f"up.weight {UNLIKE} up.weight_packed stored as INT4 in groups of",
    ),
    (
        up(zero_point=random_words(1, 2)),
        f"up.weight_zero_point {UNLIKE} up.weight_packed stored as INT4",
    ),
    (
        up(g_idx=random_words(64)),
        f"up.weight_g_idx {UNLIKE} up.weight_packed stored as INT4 in groups of",
    ),
    (
        up(packed=random_bytes(5, 32), global_scale=rough_noise(1)),
        "up.weight_packed is U8, as in NVFP4",
    ),
    (x(X[..., :15], X_SCALE), "x_blocks is U8 [2, 6, 3, 15], expected U8 [any, any, any, 16];"),
    (x(X[0], X_SCALE[0]), "x_blocks is U8 [6, 3, 16], expected U8 [any, any, any, 16]; download"),
    (x(X, X_SCALE[..., :2]), "x_scales is U8 [2, 6, 2], expected U8 [2, 6, 3]; download"),
    (x(X, X_SCALE.float()), "x_scales is F32 [2, 6, 3], expected U8 [2, 6, 3]; download"),
    ({"x_blocks": X}, "x_blocks needs x_scales, which is in no file; download"),
    ({"x_scales": X_SCALE}, "x_scales is present without x; download"),
    (x(X, X_SCALE) | {"x": M.float()}, f"x {UNLIKE} x_blocks stored as MXFP4; convert"),
]


@pytest.mark.parametrize(("tensors", "said"), PROBLEMS)
def test_what_is_wrong_with_a_weight_is_told_in_one_sentence(tensors, said):
    sound = packed("sound", 3, 64)
    weights, problems = find_weights(described(sound | tensors), LINEAR)
    assert list(weights) == ["sound.weight"]
    (problem,) = problems
    pattern = re.escape(said).replace("\\~", ".*")
    assert re.match(f"1.safetensors: {pattern}", problem)
    _, advice = problem.split("; ")
    assert advice.startswith(("download", "convert", "add its block"))


def test_all_problems_are_told_at_once_with_their_files(tmp_path):
    write(tmp_path, up(zero_point=random_words(1, 2)) | a(), {"x_blocks": X} | {"y.weight": M})
    with open_shards(tmp_path) as shards:
        weights, problems = find_weights(shards, LINEAR)
    assert weights == {}
    assert sorted(" ".join(problem.split(" ")[:2]) for problem in problems) == [
        f"{tmp_path}/model-1.safetensors: a.weight",
        f"{tmp_path}/model-1.safetensors: up.weight_zero_point",
        f"{tmp_path}/model-2.safetensors: x_blocks",
        f"{tmp_path}/model-2.safetensors: y.weight",
    ]


FLOATS = compressed(group("Linear", strategy="channel", **FLOAT))
ELSEWHERE = compressed(group("lm_head"), group("re:experts"))


@pytest.mark.parametrize("quantization", [None, BLOCKS, compressed(), ELSEWHERE, FLOATS])
def test_packed_weights_need_a_config_group_that_targets_them(quantization):
    weights, (problem,) = find_weights(described(UP), quantization)
    assert weights == {}
    assert "up.weight_packed: no config group of integers in config.json targets up; add" in problem


@pytest.mark.parametrize("shape", [[5, 65], [5, 56], [4, 64], [5, 0], [5, -64], [64, 5]])
def test_a_packed_shape_that_does_not_fit_the_words_is_told_when_it_is_read(shape):
    shards = described(up(shape=torch.tensor(shape)))
    weights, problems = find_weights(shards, LINEAR)
    assert problems == []
    said = re.escape(f"1.safetensors: up.weight_shape holds {shape}, expected 5 and a number")
    with pytest.raises(CheckpointError, match=said):
        _ = weights["up.weight"].shape
    with pytest.raises(CheckpointError, match=said):
        weights["up.weight"].read(shards, None, "cpu")


def test_known_methods_pass():
    check_method(BLOCKS | {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]})
    check_method(BLOCKS | {"fmt": "float8_e4m3fn", "weight_block_size": None})
    check_method({"quant_method": "fp8"})
    check_method({"quant_method": "mxfp4", "modules_to_not_convert": []})
    check_method(MIXED)
    integers = group("Linear") | {"format": "pack-quantized"}
    check_method(compressed(integers, format="pack-quantized"))
    floats = group("re:.*[qk]$", strategy="tensor", group_size=None, **FLOAT)
    check_method(compressed(floats, format="float-quantized"))


def linear(**weights) -> dict:
    return compressed(group("Linear", **weights))


UNKNOWN = [
    ({"quant_method": "awq"}, "quant_method = 'awq', expected one of fp8, mxfp4, compressed-"),
    ({}, "quant_method is missing"),
    ({"quant_method": 3}, "quant_method = 3, expected one of fp8"),
    ({"quant_method": ["fp8"]}, "quant_method = ['fp8'], expected one of fp8"),
    (BLOCKS | {"fmt": "e5m2"}, "fmt = 'e5m2', expected one of e4m3"),
    (BLOCKS | {"weight_block_size": 128}, "weight_block_size = 128, expected two whole numbers"),
    (BLOCKS | {"weight_block_size": [1, 2, 3]}, "weight_block_size = [1, 2, 3], expected two"),
    (BLOCKS | {"weight_block_size": [0, 128]}, "weight_block_size = [0, 128], expected two"),
    (BLOCKS | {"weight_block_size": [True, 128]}, "weight_block_size = [True, 128], expected two"),
    (compressed(format="nvfp4-pack-quantized"), "format = 'nvfp4-pack-quantized', expected one of"),
    (compressed(group() | {"format": "dense"}), "group_0.format = 'dense', expected one of float-"),
    (compressed(group("q"), group(num_bits=3)), "group_1.weights.num_bits = 3, expected one of (4"),
    (linear(type="float"), "weights.num_bits = 4, expected one of (8,) for float"),
    (linear(type="nf4"), "weights.type = 'nf4', expected one of int, float"),
    (linear(strategy="tensor_group"), "strategy = 'tensor_group', expected one of group, channel"),
    (linear(strategy=None), "weights.strategy is missing"),
    (linear(group_size=-1), "weights.group_size = -1, expected a whole number"),
    (linear(group_size=12), "weights.group_size = 12, expected a multiple of 8"),
    (linear(symmetric=False), "weights.symmetric = False, expected true; there is no support for"),
    (linear(block_structure="2x2"), "weights.block_structure = '2x2', expected two whole numbers"),
    (compressed(config_groups=["Linear"]), "config_groups = ['Linear'], expected an object"),
    (compressed(config_groups={"W4A16": ["Linear"]}), "W4A16 = ['Linear'], expected an object"),
    (compressed(group() | {"targets": "Linear"}), "group_0.targets = 'Linear', expected a list"),
    (compressed(group("re:(.*")), "group_0.targets = 're:(.*', expected a regular expression"),
]


@pytest.mark.parametrize(("quantization", "said"), UNKNOWN)
def test_unknown_methods_are_refused_by_name(quantization, said):
    pattern = rf"^quantization_config\..*{re.escape(said)}.*; convert the weights to bfloat16 first"
    with pytest.raises(CheckpointError, match=pattern):
        check_method(quantization)


ENDS = ["", "_scale", "_scale_inv", "_scales", "_blocks", "_packed", "_shape", "_zero_point"]
DTYPES = [torch.float32, E4M3, E8M0, torch.float8_e5m2]
DTYPES += [torch.uint8, torch.int8, torch.int32, torch.int64]
any_name = st.builds(str.__add__, st.sampled_from(["a.weight", "experts.b"]), st.sampled_from(ENDS))
any_shape = st.lists(st.integers(0, 3) | st.just(16), max_size=4)
any_tensor = st.builds(torch.ones, any_shape, dtype=st.sampled_from(DTYPES))


@settings(max_examples=300)
@given(st.dictionaries(any_name, any_tensor, min_size=1, max_size=6), st.booleans())
def test_any_headers_give_weights_that_can_be_read_or_problems(tensors, linear):
    shards = described(tensors)
    weights, problems = find_weights(shards, LINEAR if linear else BLOCKS)
    assert weights or problems
    for weight in weights.values():
        if weight.stored_as.startswith("INT"):  # 1 x 1 by the data
            fits = shards.tensors[weight.names[0]].shape == (1, 1)
            with nullcontext() if fits else pytest.raises(CheckpointError, match="_shape holds"):
                assert weight.shape == (1, 1)
        else:
            assert weight.read(shards, torch.float32, "cpu").shape == weight.shape


any_value = st.sampled_from(
    [None, True, 0, 4, 8, -1, 32, 4.0, 1e99, 10**30, "", "int", "float", "block", "channel"]
    + [[], {}, ["Linear"], [4, 3], ["re:.*"], [None], {"a": {}}, {"a": None}]
)


@settings(max_examples=300)
@given(st.data())
def test_any_accepted_config_can_be_used(data):
    place = quantization = deepcopy(data.draw(st.sampled_from([BLOCKS, LINEAR, MIXED])))
    while isinstance(place[key := data.draw(st.sampled_from(sorted(place)))], dict):
        if not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = deepcopy(data.draw(any_value))
    try:
        check_method(quantization)
    except CheckpointError:
        return
    tensors = UP | {"q.weight": M, "q.weight_scale": scales(5, 3)} | a(M, scale_inv=SCALE)
    weights, problems = find_weights(shards := described(tensors), quantization)
    assert len(weights) + len(problems) == 3
    for name, weight in weights.items():
        if name != "up.weight" or weight.stored_as.startswith("INT4"):
            assert weight.read(shards, None, "cpu").shape == weight.shape
        else:  # another number of bits: the words hold another number of columns
            with pytest.raises(CheckpointError, match="up.weight_shape holds"):
                weight.read(shards, None, "cpu")
