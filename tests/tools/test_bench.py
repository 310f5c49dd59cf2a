"""bench: figures that agree with each other, tables and objects that show all of them."""

import argparse
import json

import pytest
import torch

from checkpoints import load_model
from modeling import Transformer
from tools import bench, floor, peer, speed, training_speed
from tools.__main__ import main
from tools.bench_table import format_report
from tools.make_tiny import SAMPLE_TEXT

SIZES = ["--prefills", "9", "--contexts", "6", "20", "--batches", "1", "3", "--steps", "3"]
BRIEF = ["--passages", "2", "--prompt-tokens", "6", "--new-tokens", "5"]
RUN = {"name", "tokens_per_second", "share_of_floor", "steps"}


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    monkeypatch.setattr(floor, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(floor, "PRODUCT_WIDTH", 64)


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text(SAMPLE_TEXT)
    return str(tmp_path / "words.txt")


@pytest.fixture
def measure(capsys):
    """measure(path, *flags): the report."""

    def run(path, *flags):
        assert main(["bench", str(path), *flags, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def check_figure(figure, tokens):
    """Shares and floors follow from what they are made of."""
    best = figure["floor"]
    reading = (best["weight_bytes"] + best["cache_bytes"]) / best["read_bytes_per_second"]
    multiplying = best["operations"] / best["operations_per_second"]
    assert best["tokens_per_second"] == pytest.approx(tokens / max(reading, multiplying), rel=2e-3)
    assert best["bound"] == ("reading" if reading >= multiplying else "products")
    for run in figure["runs"]:
        low, high = run["tokens_per_second"]["quartiles"]
        median = run["tokens_per_second"]["median"]
        assert low <= median <= high
        assert run["share_of_floor"] == pytest.approx(median / best["tokens_per_second"], rel=3e-3)


def test_figures_follow_from_each_other(pristine, measure):
    report = measure(pristine(), *SIZES)
    model = load_model(pristine(), mtp=False)
    assert report["weight_bytes"] == report["load"]["bytes"] == floor.count_bytes(model)
    assert (report["dtype"], report["device"]) == ("float32", "cpu")
    (prefill,) = report["prefill"]
    assert prefill["tokens"] == 9
    assert prefill["floor"]["operations"] == floor.count_operations(model.config, 1, 9, 0, 1)
    check_figure(prefill, 9)
    sizes = [(figure["context"], figure["batch"]) for figure in report["decode"]]
    assert sizes == [(6, 1), (6, 3), (20, 1), (20, 3)]
    for figure, (context, rows) in zip(report["decode"], sizes, strict=True):
        check_figure(figure, rows)
        (run,) = figure["runs"]
        assert run.keys() == RUN
        assert (run["name"], run["steps"]) == ("abacus", 3)
        assert figure["floor"]["cache_bytes"] == rows * context * 3 * (20 + 8) * 4
        assert all(3 <= chosen <= 3 * rows for chosen in figure["distinct_experts"].values())
    assert report["decode"][0]["distinct_experts"] == {"1": 3, "2": 3}
    assert report["load"]["peak_before"]["process"] <= report["load"]["peak"]["process"]
    assert report["load"]["peak"]["process"] <= report["peak"]["process"]
    assert {run["name"]: run["steps"] for run in report["load"]["runs"]} == {"abacus": 3, "copy": 3}
    assert [line.split(":")[0] for line in report["skipped"]] == ["drafts"]


def test_the_table_shows_every_figure(pristine, capsys):
    flags = ["bench", str(pristine()), *SIZES]
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[:3] for line in lines]
    for cells in (
        ["9", "abacus"],
        ["6", "1", "abacus"],
        ["6", "3", "abacus"],
        ["20", "3", "abacus"],
    ):
        assert cells in [line[: len(cells)] for line in shown]
    assert sum(line[:1] == ["floor"] for line in shown) == 5
    assert not any("times transformers" in line for line in lines if "(quartiles)" in line)
    assert lines[-1] == "not measured: drafts: needs a text to draft on: give --text FILE"


def test_transformers_takes_turns(pristine, measure):
    report = measure(
        pristine(), *SIZES[:3], "6", "--batches", "2", *SIZES[-2:], "--against", "transformers"
    )
    loaded = {run["name"]: run for run in report["load"]["runs"]}
    assert loaded["transformers"]["steps"] == 3
    assert loaded["abacus"]["ratio_to_transformers"]["median"] > 0
    for figure in report["prefill"] + report["decode"]:
        ours, theirs = figure["runs"]
        assert theirs["name"].startswith("transformers, ")
        assert theirs.keys() == RUN
        low, high = ours["ratio_to_transformers"]["quartiles"]
        assert low <= ours["ratio_to_transformers"]["median"] <= high
        assert theirs["name"] in figure["tried"]
        assert len(figure["tried"]) == 4
    assert "times transformers" in format_report(report)


def test_one_row_decodes_compiled_too(pristine, measure, monkeypatch):
    calls = []

    def compile_decoding(model: Transformer) -> None:
        model.call = lambda module, *rest: calls.append(module) or module(*rest)

    monkeypatch.setattr(speed, "compile_decoding", compile_decoding)
    report = measure(pristine(), "--sections", "decode", "--compile", *SIZES)
    runs = [[run["name"] for run in figure["runs"]] for figure in report["decode"]]
    assert runs == [["abacus", "abacus, compiled"], ["abacus"]] * 2
    assert "ratio_to_abacus" in report["decode"][0]["runs"][1]
    assert len(calls) == 2 * 5 * 4  # contexts; compiling, warm-up and three steps; blocks and head


def test_what_does_not_fit_into_memory_is_left_out(pristine, measure, monkeypatch):
    flags = ["--sections", "decode", *SIZES[:3], "6", "--batches", "1", "2", *SIZES[-2:]]
    one_row = 7 * 3 * (20 + 8) * 4
    monkeypatch.setattr(speed, "available_memory", lambda device: one_row)
    report = measure(pristine(), *flags)
    first, second = report["decode"]
    assert "skipped" not in first
    assert second.keys() == {"context", "batch", "skipped"}
    assert "abacus: takes 0.0 GB" in second["skipped"][0]
    compared = measure(pristine(), *flags, "--against", "transformers")["decode"][0]
    assert [run["name"] for run in compared["runs"]] == ["abacus"]
    assert "transformers: takes" in compared["skipped"][0]
    assert "not measured: transformers: takes" in format_report({"decode": [compared]})


def test_drafts_are_measured_on_a_text(pristine, words, measure):
    counts = ["--draft-tokens", "1", "auto", "1"]  # one is enough
    report = measure(pristine(), "--sections", "drafts", "--text", words, *BRIEF, *counts)
    assert [row["draft_tokens"] for row in report["drafts"]["runs"]] == [0, 1, "auto"]
    table = format_report(report).splitlines()
    assert table[0] == "drafts: 2 passages of 6 tokens, each continued by 5, greedily"
    assert [line.split()[0] for line in table[3:]] == ["0", "1", "auto"]


def test_sections_are_those_that_can_be_measured(pristine, words):
    def chosen(*flags):
        parser = bench_parser()
        skipped = []
        return bench.choose_sections(parser.parse_args(list(flags)), skipped), skipped

    path, default = str(pristine()), {"load", "prefill", "decode"}
    assert chosen(path, "--text", words, "--training")[0] == default | {"drafts", "training"}
    without, skipped = chosen(str(pristine("mixtral")), "--text", words)
    assert without == default
    assert skipped == ["drafts: needs MTP modules, and none are loaded of this model"]
    assert chosen(path, "--sections", "decode")[0] == {"decode"}


def bench_parser():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser


def test_sizes_of_the_default_that_do_not_fit_are_told(pristine, measure):
    report = measure(pristine(), "--sections", "prefill", "--steps", "3")
    assert report["prefill"] == []
    sizes = [line.split(":")[0] for line in report["skipped"]]
    assert sizes == [
        "--prefills 512",
        "--prefills 2048",
        *(f"--contexts {n}" for n in (2048, 8192, 32768)),
    ]


def test_a_profile_is_shown_beside_other_sections(pristine, measure, tmp_path):
    flags = ["--sections", "load", "--profile", str(tmp_path / "traces"), *SIZES]
    report = measure(pristine(), *flags)
    assert [phase["phase"] for phase in report["profile"]] == ["prefill", "decode"]
    table = format_report(report)
    for phase in report["profile"]:
        assert phase["trace"] in table
    assert sorted(file.name for file in (tmp_path / "traces").iterdir()) == [
        "decode-6.json",
        "prefill-9.json",
    ]


def test_a_training_step_is_measured_with_and_without_mtp(pristine, measure):
    sizes = ["--training-batch", "2", "--training-length", "12", "--steps", "3"]
    report = measure(pristine(), "--sections", "training", *sizes, "--against", "transformers")
    plain, with_mtp = report["training"]
    assert [plain["mtp"], with_mtp["mtp"]] == [False, True]
    for figure in (plain, with_mtp):
        check_figure(figure, 24)
    assert [run["name"].split(", ")[0] for run in plain["runs"]] == ["abacus", "transformers"]
    assert [run["name"] for run in with_mtp["runs"]] == ["abacus, with MTP losses"]
    assert with_mtp["floor"]["operations"] > 1.1 * plain["floor"]["operations"]


def test_training_uses_the_modules_where_it_says_so(pristine):
    model = load_model(pristine()).requires_grad_(True)
    settings = training_speed.default_settings("float32")
    tokens_RBT = torch.randint(300, (1, 2, 9))
    contenders = training_speed.training_contenders(model, tokens_RBT, settings)
    for name, uses in (("abacus", False), ("abacus, with MTP losses", True)):
        model.zero_grad()
        contenders[name].step(0)
        assert (model.mtp["3"].projection.weight.grad is not None) == uses
        assert model.layers[0].attention.o.weight.grad is not None


@pytest.mark.parametrize(
    ("family", "flags", "told"),
    [
        ("deepseek_v3", "--steps 2", "--steps 2: must be >= 3"),
        ("deepseek_v3", "--contexts 5 0", "--contexts 0: must be >= 1"),
        ("deepseek_v3", "--batches 0", "--batches 0: must be >= 1"),
        ("deepseek_v3", "--passages 1", "--passages 1: must be >= 2"),
        ("deepseek_v3", "--new-tokens 1", "--new-tokens 1: must be >= 2"),
        ("deepseek_v3", "--prefills 8 257", "--prefills 257: the model has positions for 256"),
        ("deepseek_v3", "--contexts 256", "--contexts 256: the model has positions for 255"),
        ("deepseek_v3", "--sections drafts", "give --text FILE"),
        ("mixtral", "--sections drafts --text TEXT", "needs MTP modules"),
        ("deepseek_v3", "--sections drafts --text TEXT --prompt-tokens 9999", "too few for"),
        ("deepseek_v3", "--sections drafts --text TEXT --new-tokens 9999", "256 positions"),
        ("deepseek_v3", "--training --training-length 999", "positions for 256 at most"),
        ("deepseek_v3", "--against transformers --layers 2", "leave out --against"),
    ],
)
def test_what_cannot_be_measured_is_one_line(pristine, words, capsys, family, flags, told):
    chosen = [words if word == "TEXT" else word for word in flags.split()]
    assert main(["bench", str(pristine(family)), *chosen]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


def test_what_training_needs_is_told_before_anything_is_loaded(pristine, capsys, monkeypatch):
    monkeypatch.setattr(training_speed, "available_memory", lambda device: 1000)
    monkeypatch.setattr(bench, "load_requested_model", None)
    assert main(["bench", str(pristine()), "--training", "--training-length", "9"]) == 2
    assert "weights, gradients and moments of training take" in capsys.readouterr().err


def test_transformers_is_asked_for_before_anything_is_loaded(pristine, capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(peer.importlib, "import_module", missing)
    monkeypatch.setattr(bench, "load_requested_model", None)
    assert main(["bench", str(pristine()), "--against", "transformers"]) == 2
    assert "pip install 'transformers>=5.23'" in capsys.readouterr().err
