"""bench: the same text at every number of drafts, and figures that agree with each other."""

import json

import pytest
import torch
from tiny import agreeable, gqa, model_config

from tools.__main__ import main
from tools.bench import format_table, run_passages, summarize_runs
from tools.make_tiny import SAMPLE_TEXT


def test_figures_are_sums_over_the_passages():
    model, prompts = agreeable(model_config(gqa(), 1)), [[5, 2, 8], [3, 1, 4], [7, 7, 1], [9, 2, 6]]
    runs = run_passages(model, prompts, 12, [0, 2, "auto"])
    assert [len(found) for found in runs.values()] == [4, 4, 4]
    rows = [summarize_runs(count, runs[count], runs[0]) for count in runs]
    for row, found in zip(rows, runs.values(), strict=True):
        assert all(run.generated_tokens == 12 for run in found)
        forwards = sum(run.forwards for run in found)
        assert row["tokens_per_forward"] == round((4 * 12 - 4) / (forwards - 4), 3)
        speeds = sorted(run.generation_tokens_per_second for run in found)
        assert row["tokens_per_second"] == pytest.approx(sum(speeds[1:3]) / 2, abs=0.06)
    plain, two, _ = rows
    assert (plain["speed_ratio"], plain["tokens_per_forward"], plain["acceptance"]) == (1, 1, [])
    assert plain["drafting_share"] == 0
    assert 0 < two["drafting_share"] < 1
    drafted, kept = (
        sum(torch.tensor(getattr(run, name)) for run in runs[2]) for name in ("drafted", "accepted")
    )
    assert two["acceptance"] == [round(x, 4) for x in (kept / drafted).tolist()]
    ratios = [
        own.generation_tokens_per_second / other.generation_tokens_per_second
        for own, other in zip(runs[2], runs[0], strict=True)
    ]
    low, high = two["speed_ratio_quartiles"]
    assert min(ratios) - 1e-3 < low < high < max(ratios) + 1e-3
    assert low <= two["speed_ratio"] <= high


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text(SAMPLE_TEXT)
    return tmp_path / "words.txt"


SMALL = ("--passages", "2", "--prompt-tokens", "6", "--new-tokens", "5")


def test_the_table_and_the_object_show_every_number_of_drafts(pristine, words, capsys):
    counts = ["--draft-tokens", "1", "auto", "1"]  # one is enough
    arguments = ["bench", str(pristine()), str(words), *SMALL, *counts]
    assert main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "2 passages of 6 tokens, each continued by 5" in shown[0]
    assert [line.split()[0] for line in shown[3:]] == ["0", "1", "auto"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["draft_tokens"] for row in report["runs"]] == [0, 1, "auto"]
    assert format_table(report).splitlines()[:3] == shown[:3]


@pytest.mark.parametrize(
    ("family", "flags", "told"),
    [
        ("deepseek_v3", ("--passages", "1"), "--passages 1: must be >= 2"),
        ("deepseek_v3", ("--new-tokens", "1"), "--new-tokens 1: must be >= 2"),
        ("deepseek_v3", ("--prompt-tokens", "9999"), "too few for passages of 9999"),
        ("deepseek_v3", ("--new-tokens", "9999"), "exceed the model's 256 positions"),
        ("kimi_k2", (), "needs MTP modules"),
    ],
)
def test_what_cannot_be_measured_is_one_line(pristine, words, capsys, family, flags, told):
    assert main(["bench", str(pristine(family)), str(words), *SMALL, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
