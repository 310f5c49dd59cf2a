"""Mapped experts compute what resident ones do, from a cache that keeps its limit."""

import json
import os
import pickle
import time
from copy import deepcopy
from threading import Barrier, Event

import pytest
import torch
from files import edit_json, shards_of, tensors_of, write_tensors
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import CheckpointError, expert_statistics, load_model, save_model
from checkpoints.mapped import THREADS, Expert, ExpertCache, MappedExperts, check_layout
from checkpoints.mapping import Entry
from modeling import generate, generate_batch
from moe import record_routing
from tools.__main__ import main
from tools.generate import parse_bytes

LIMITS = {"none": 0, "a few": 30_000, "all": None}


def mapped(path, memory=None, **options):
    return load_model(path, experts="mapped", expert_memory=memory, progress=False, **options)


def resident(path, **options):
    return load_model(path, progress=False, **options)


def outputs(model):
    """Logits of a prefill of two rows, of two decoded tokens, and of all MTP depths."""
    tokens_BT = torch.arange(34).remainder(model.config.vocab_size).view(2, 17)
    cache = model.make_cache(1, 17)
    found = [model(tokens_BT), model(tokens_BT[:1, :15], cache=cache)]
    found += [model(tokens_BT[:1, t : t + 1], cache=cache) for t in (15, 16)]
    return found + (model.mtp_logits(tokens_BT) if len(model.mtp) else [])


def expect_same(path, memory, **options):
    expected, found = outputs(resident(path, **options)), outputs(mapped(path, memory, **options))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, MappedExperts)]


# --- the same numbers


FAMILIES = {
    "one by one, MTP": "deepseek_v3",
    "one by one": "kimi_k2",
    "gate and up as one": "granitemoe",
    "transposed, interleaved, biases": "gpt_oss",
}


@pytest.mark.parametrize("memory", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_experts_left_in_files_give_the_same_bits(pristine, family, dtype, memory):
    expect_same(pristine(family), memory, dtype=dtype)


def write_packed(path, suffixes, quantization, is_quantised, pack):
    """Replace weights of experts by random numbers of a quantised format."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in tensors_of(path).items():
        if is_quantised(name):
            parts = pack(tensor, generator)
            base = name.removesuffix(".weight") + ".weight" if ".weight" in name else name
            tensors |= {base + s: part for s, part in zip(suffixes, parts, strict=True)}
        else:
            tensors[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    write_tensors(path, tensors)
    edit_json(path / "config.json", quantization_config=quantization)
    return path


def random_bytes(shape, generator, low=0, high=256):
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def mxfp4(tiny):
    def pack(tensor, generator):
        E, K, N = tensor.shape
        blocks = random_bytes((E, N, K // 32, 16), generator)
        return blocks, random_bytes((E, N, K // 32), generator, 120, 126)

    path = tiny("gpt_oss", hidden_size=64, intermediate_size=32)
    suffixes, config = ("_blocks", "_scales"), {"quant_method": "mxfp4"}
    return write_packed(
        path, suffixes, config, lambda n: n.endswith("_proj") and "experts" in n, pack
    )


def int4(tiny):
    def pack(tensor, generator):
        (N, K), words = tensor.shape, -(-tensor.shape[1] // 8)
        packed = torch.randint(-(2**31), 2**31 - 1, (N, words), generator=generator)
        scale = torch.rand(N, K // 8, generator=generator).bfloat16() / 30
        return packed.int(), scale, torch.tensor([N, K])

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"symmetric": True}}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config |= {"config_groups": groups, "ignore": ["lm_head"]}
    suffixes = ("_packed", "_scale", "_shape")
    return write_packed(tiny("deepseek_v3"), suffixes, config, lambda n: ".experts." in n, pack)


def fp8(tiny, to=None):
    path = tiny("deepseek_v3")
    save_model(resident(path), path / "fp8", dtype=torch.float8_e4m3fn, to=to, progress=False)
    return path / "fp8"


FORMATS = {
    "FP8": fp8,
    "FP8 of all experts": lambda tiny: fp8(tiny, "abacus"),
    "MXFP4": mxfp4,
    "INT4": int4,
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_quantised_experts_give_the_same_bits(tiny, write):
    path = write(tiny)
    for memory, dtype in ((0, torch.bfloat16), (30_000, None), (None, torch.float32)):
        expect_same(path, memory, dtype=dtype)


def test_text_with_drafts_and_in_batches_is_the_same(pristine):
    path, prompts = pristine("deepseek_v3"), [[5, 9, 2], [7], [3, 3, 8, 1, 4]]
    texts = []
    for model in (resident(path), mapped(path, 30_000)):
        texts.append([list(generate(model, prompts[0], 8, draft_tokens=2))])
        texts[-1] += generate_batch(model, prompts, 8, draft_tokens=1)
    assert texts[0] == texts[1]


def test_plain_experts_are_views_of_the_file_where_nothing_is_kept(pristine, tmp_path):
    save_model(resident(pristine()), tmp_path / "half", dtype=torch.bfloat16, progress=False)
    for layer in experts_of(mapped(tmp_path / "half", 0)):
        files = {file.bytes.data_ptr() for file in layer.stored.files.values()}
        for copied in (False, True):
            parts = layer.stored.read(2, copied).parts.values()
            starts = {part.untyped_storage().data_ptr() for part in parts}
            assert starts.isdisjoint(files) if copied else starts <= files


# --- the cache


class FakeFile:
    def __init__(self):
        self.released = []

    def release(self, start, nbytes):
        self.released.append((start, nbytes))


class FakeLayer:
    """Experts of so many bytes, which are read at once unless a test says otherwise."""

    def __init__(self, nbytes=10, on_read=lambda expert: None):
        self.nbytes, self.on_read, self.file = nbytes, on_read, FakeFile()

    def read(self, expert, copied):
        self.on_read(expert)
        return Expert({"number": torch.tensor(expert)}, [(self.file, expert, 7)])


def plain_lru(uses, sizes, limit):
    """(hits, misses, what is kept at the end, the one used last last), use by use."""
    kept, hits = [], 0
    for use in uses:
        if use in kept:
            hits += 1
            kept.remove(use)
        elif sizes[use[0]] > limit:
            continue
        kept.append(use)
        while sum(sizes[layer] for layer, _ in kept) > limit:
            kept.pop(0)
    return hits, len(uses) - hits, kept


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=40),
    st.lists(st.integers(1, 30), min_size=3, max_size=3),
    st.integers(0, 100),
)
def test_the_cache_keeps_those_used_last(uses, sizes, limit):
    cache, layers = ExpertCache(limit), [FakeLayer(size) for size in sizes]
    for layer, expert in uses:
        [(number, found)] = cache.fetch(layers[layer], [expert])
        assert number == expert == found.parts["number"]
        assert cache.nbytes <= limit
    hits, misses, kept = plain_lru(uses, sizes, limit)
    assert [(layers.index(layer), expert) for layer, expert in cache._experts] == kept
    assert cache.nbytes == sum(sizes[layer] for layer, _ in kept)
    counted = cache.statistics
    assert (counted.hits, counted.misses, counted.bytes_read) == (hits, misses, 7 * misses)


@given(st.lists(st.lists(st.integers(0, 9), unique=True), max_size=6), st.integers(0, 120))
def test_all_that_are_asked_for_come_in_order_within_the_limit(batches, limit):
    cache, layer = ExpertCache(limit), FakeLayer()
    for experts in batches:
        found = []
        for number, expert in cache.fetch(layer, experts):
            assert expert.parts["number"] == number
            found.append(number)
            assert cache.nbytes <= limit
        assert found == experts
    counted, asked = cache.statistics, sum(map(len, batches))
    assert counted.hits + counted.misses == asked
    assert layer.file.released == ([(e, 7) for es in batches for e in es] if limit < 10 else [])


def test_experts_that_are_needed_next_make_room_last():
    reads = []
    cache, layer = ExpertCache(30), FakeLayer(on_read=reads.append)
    for experts in ([1, 2], [3], [0, 1]):
        list(cache.fetch(layer, experts))
    assert sorted(reads) == [0, 1, 2, 3]
    assert {expert for _, expert in cache._experts} == {3, 0, 1}


def test_reads_run_together_and_a_slow_one_holds_back_those_after_it_alone():
    together, slow, ahead = Barrier(THREADS, timeout=10), Event(), Event()

    def on_read(expert):
        if expert < THREADS:
            together.wait()  # fails unless so many reads are on the way
        if expert == 1:
            assert slow.wait(timeout=10)
        if expert == THREADS:
            ahead.set()

    arriving = ExpertCache(1000).fetch(FakeLayer(on_read=on_read), list(range(THREADS + 3)))
    assert next(arriving)[0] == 0
    assert ahead.wait(timeout=5)  # the next is read while the first is used
    slow.set()
    assert [number for number, _ in arriving] == list(range(1, THREADS + 3))


@pytest.mark.parametrize("limit", [0, 1000])
def test_no_more_are_read_ahead_than_there_are_threads(limit):
    reads = []
    arriving = ExpertCache(limit).fetch(FakeLayer(on_read=reads.append), list(range(20)))
    for used, _ in enumerate(arriving, start=1):
        time.sleep(0.001)
        assert len(reads) <= used + THREADS


def test_statistics_count_what_the_router_chose(pristine):
    path = pristine("kimi_k2")
    model, tokens = mapped(path), torch.arange(12).view(1, 12)
    experts, chosen = experts_of(model), []
    for t in range(12):
        with record_routing(model) as routings:
            model(tokens[:, : t + 1])
        chosen += [
            (layer, e) for layer, r in routings.items() for e in r.experts_NK.unique().tolist()
        ]
    found, distinct = expert_statistics(model), set(chosen)
    assert found.misses == len(distinct)
    assert found.hits == len(chosen) - len(distinct)
    sizes = {name: tensor.nbytes for name, tensor in tensors_of(path).items()}
    of_one = [nbytes for name, nbytes in sizes.items() if ".experts.0." in name]
    assert found.bytes_read == len(distinct) * sum(of_one) / len(experts)
    assert found.hit_rate == found.hits / (found.hits + found.misses)
    assert expert_statistics(resident(path)) is None


# --- the module


def test_hooks_and_copies_work(pristine):
    model = mapped(pristine("kimi_k2"))
    expected, copied = outputs(model), deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(copied), strict=True))
    experts_of(copied)[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not torch.equal(outputs(copied)[0], expected[0])
    assert torch.equal(outputs(model)[0], expected[0])


REFUSED = {
    "state_dict": lambda model, path: model.state_dict(),
    "save_model": lambda model, path: save_model(model, path, progress=False),
    "another dtype": lambda model, path: model.double(),
    "another device": lambda model, path: model.to("meta"),
    "pickle": lambda model, path: pickle.dumps(model),
    "training": lambda model, path: model.requires_grad_()(torch.tensor([[1, 2]])),
}


@pytest.mark.parametrize("act", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_in_one_line(pristine, tmp_path, act):
    model = mapped(pristine("kimi_k2"))
    with pytest.raises(ValueError, match="mapped") as caught:
        act(model, tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_what_changes_nothing_is_no_conversion(pristine):
    model = mapped(pristine("kimi_k2"))
    expected = outputs(model)[0]
    assert torch.equal(outputs(model.float().to("cpu"))[0], expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"experts": "maped"}, "experts = 'maped': must be resident or mapped"),
        ({"expert_memory": 5}, "expert_memory = 5: .* experts='mapped'"),
        ({"experts": "mapped", "expert_memory": -1}, "expert_memory = -1: .* bytes"),
        ({"experts": "mapped", "expert_memory": 1.5}, "expert_memory = 1.5: .* bytes"),
        (
            {"experts": "mapped", "quantize": "int8"},
            "quantize = 'int8', experts = 'mapped': .* one",
        ),
    ],
)
def test_wrong_options_are_refused(pristine, options, told):
    with pytest.raises(ValueError, match=told):
        load_model(pristine("kimi_k2"), **options)


def test_a_layout_without_single_experts_is_refused():
    entry = Entry("experts.all", (4, 6), ("experts.gate",), None, "D E -> 1 E D")
    with pytest.raises(CheckpointError, match="experts.all holds experts.gate .*resident"):
        check_layout(entry)


# --- files


def shortened(file):
    os.truncate(file, file.stat().st_size // 2)


def overwritten(file):
    with file.open("r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write(b"12345678")
    os.utime(file, ns=(0, 0))  # some file systems count time in coarse steps


@pytest.mark.parametrize("memory", [0, None])
@pytest.mark.parametrize("change", [shortened, overwritten])
def test_a_file_that_was_written_to_is_an_error(tiny, change, memory):
    path = tiny("kimi_k2")
    model = mapped(path, memory)
    for file in shards_of(path):
        change(file)
    with pytest.raises(CheckpointError, match="safetensors: was written to"):
        outputs(model)


def test_a_file_that_was_deleted_can_still_be_read(tiny):
    path = tiny("kimi_k2")
    expected, model = outputs(resident(path)), mapped(path, 0)
    for file in shards_of(path):
        file.unlink()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))


# --- the command line


def run(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def test_generate_prints_the_same_text_and_how_often_experts_were_there(pristine, capsys):
    ask = "generate", "--model", pristine("deepseek_v3"), "--prompt", "a king", "--max-tokens", 9
    expected = json.loads(run(capsys, *ask, "--json")[1])
    more = "--experts", "mapped", "--expert-memory", "0.5MiB"
    found = json.loads(run(capsys, *ask, *more, "--json")[1])
    for key in ("ids", "total_parameters", "active_parameters"):
        assert found[key] == expected[key]
    assert 0 < found["expert_hit_rate"] < 1
    assert found["expert_bytes_read"] > 0
    code, _, told = run(capsys, *ask, *more)
    share = 100 * found["expert_hit_rate"]
    assert code == 0
    assert f"{share:.1f} % in memory when needed, {found['expert_bytes_read']:,} bytes" in told


SIZES = {"4096": 4096, "512MiB": 2**29, "4GiB": 2**32, "1.5GiB": 3 * 2**29, "0": 0, "3KiB": 3072}


def test_sizes_are_read_as_they_are_written():
    assert {text: parse_bytes(text) for text in SIZES} == SIZES


@pytest.mark.parametrize("text", ["", "1.5", "-1", "4GB", "4 GiB", "GiB", "nan", "1e9", "٣"])
def test_a_wrong_size_is_one_line(capsys, text):
    more = "--experts", "mapped", f"--expert-memory={text}"
    code, out, told = run(capsys, "generate", "--prompt", "a", *more)
    assert (code, out, told.count("\n")) == (2, "", 1)
    assert "--expert-memory" in told
    assert "GiB" in told


def test_memory_for_experts_needs_mapped_ones(capsys):
    code, out, told = run(capsys, "generate", "--prompt", "a", "--expert-memory", "1GiB")
    assert (code, out) == (2, "")
    assert told == "error: --expert-memory is for mapped experts: it needs --experts mapped\n"
