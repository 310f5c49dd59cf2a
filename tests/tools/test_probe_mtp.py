"""probe-mtp: what it counts, which wiring it finds, and what it says where something is wrong."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from files import SHIPPED, TALE, edit_json
from tiny import gqa, model_config, plain_mtp_states, plain_states, random_tokens, transformer

from tools.__main__ import main
from tools.make_tiny import SAMPLE_TEXT
from tools.probe_mtp import Result, probe_wirings


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "tale.txt").write_text(TALE.replace("\n", " "))
    return tmp_path / "tale.txt"


def probed(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["probe-mtp", *map(str, arguments)])
    return code, *capsys.readouterr()


def plain_hits(model, tokens_T, depths: int) -> list[list[bool]]:
    """Per depth and position: is the draft what the model itself finds likeliest there?"""
    own_T = (plain_states(model, tokens_T) @ model.head.weight.T).argmax(dim=-1)
    hits = []
    for k, states_TD in enumerate(plain_mtp_states(model, tokens_T)[:depths], start=1):
        drafts_T = (states_TD @ model.head.weight.T).argmax(dim=-1)
        hits.append([bool(draft == own_T[i + k]) for i, draft in enumerate(drafts_T)])
    return hits


@pytest.mark.parametrize("piece", [7, 20])
def test_it_counts_drafts_that_the_model_itself_would_choose(piece):
    config = model_config(gqa(), 2, vocab_size=3)
    model, tokens_N = transformer(config), random_tokens(1, 20, vocab_size=3)[0]
    results = probe_wirings(model, tokens_N, 2, piece)
    wirings = [(result.wiring.input, result.wiring.carry) for result in results]
    assert wirings == list(product(("normed", "raw"), ("normed", "raw", "main")))
    for result in results:
        model.config = replace(config, mtp=result.wiring)
        pieces = [plain_hits(model, part_T, 2) for part_T in tokens_N.split(piece)]
        for k in range(2):
            hits = [hit for part in pieces for hit in part[k]]
            assert result.hits_KN[k].sum() == sum(hits)
            assert result.counts_K[k] == len(hits)
            assert result.acceptance[k] == pytest.approx(sum(hits) / len(hits))
    assert len({tuple(result.hits_KN.flatten().tolist()) for result in results}) > 3


def test_tokens_per_forward_and_the_distance_in_standard_errors():
    hits_KN = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
    fewer_KN = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.bool)
    counts_K = torch.tensor([4, 4])
    wiring = model_config(gqa(), 1).mtp
    best, worse = (Result(wiring, x_KN, counts_K) for x_KN in (hits_KN, fewer_KN))
    assert best.tokens_per_forward == 1 + 0.75 + 0.75 * 0.5
    assert best.standard_errors_behind(best) == 0
    # one draft less at two positions
    assert worse.standard_errors_behind(best) == pytest.approx(2 / 2**0.5)
    assert best.standard_errors_behind(worse) == -worse.standard_errors_behind(best)


def test_the_shipped_model_is_wired_as_it_was_trained(text, capsys):
    code, out, err = probed(capsys, SHIPPED, text, "--dtype", "float32", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["modules"], len(report["wirings"])) == (1, 6)
    for row in report["wirings"]:
        assert len(row["acceptance"]) == 4
        assert row["acceptance"][0] > 0.4
        assert row["configured"] == (row["input"] == row["carry"] == "normed")
        held = row["carry"] == "main"
        assert (row["standard_errors_behind_best"] > 3) == held


def test_the_table_shows_every_wiring_and_the_one_that_is_used(text, capsys):
    code, out, _ = probed(capsys, SHIPPED, text, "--draft-tokens", 2, "--piece", 40)
    head, empty, columns, *rows = out.splitlines()
    assert code == 0
    assert "40 at once" in head
    assert empty == ""
    assert columns.split()[:6] == ["input", "carry", "draft", "1", "draft", "2"]
    assert [row.split()[:2] for row in rows] == [
        [state, carry] for state in ("normed", "raw") for carry in ("normed", "raw", "main")
    ]
    assert [row.endswith("configured") for row in rows] == [True, *[False] * 5]


def test_a_wiring_that_is_not_the_best_is_told_with_the_keys_to_write(text, tmp_path, capsys):
    shutil.copytree(SHIPPED, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", mtp_carry="main")
    code, out, err = probed(capsys, tmp_path / "model", text, "--dtype", "float32")
    assert code == 0
    assert out.splitlines()[5].endswith("configured")
    assert err.startswith("note: another wiring than the configured one gives better drafts")
    assert '"mtp_carry": "normed"' in err


def test_what_one_draft_cannot_tell_apart_is_not_advised(text, tmp_path, capsys):
    shutil.copytree(SHIPPED, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", mtp_carry="main")
    arguments = (tmp_path / "model", text, "--dtype", "float32", "--draft-tokens", 1)
    code, _, err = probed(capsys, *arguments)
    assert (code, err) == (0, "")


def test_a_head_that_was_not_loaded_is_noticed(pristine, tmp_path, capsys):
    (tmp_path / "words.txt").write_text(SAMPLE_TEXT)
    code, _, err = probed(capsys, pristine(), tmp_path / "words.txt")
    assert code == 0
    assert "of first drafts are accepted: the head is probably not loaded" in err


@pytest.mark.parametrize(
    ("family", "text", "flags", "told"),
    [
        ("kimi_k2", SAMPLE_TEXT, (), "has no MTP modules to probe"),
        ("deepseek_v3", "A", (), "at least 6 needed"),
        ("deepseek_v3", SAMPLE_TEXT, ("--draft-tokens", "0"), "--draft-tokens 0: must be >= 1"),
        ("deepseek_v3", SAMPLE_TEXT, ("--piece", "5"), "pieces of 5 tokens are too short"),
        ("deepseek_v3", SAMPLE_TEXT, ("--max-tokens", "-1"), "--max-tokens -1: must be >= 1"),
        ("deepseek_v3", SAMPLE_TEXT, ("--device", "abacus"), "--device abacus"),
        ("deepseek_v3", None, (), "missing.txt"),
    ],
)
def test_what_cannot_be_probed_is_one_line(pristine, tmp_path, capsys, family, text, flags, told):
    path = tmp_path / ("missing.txt" if text is None else "text.txt")
    if text is not None:
        path.write_text(text)
    code, out, err = probed(capsys, pristine(family), path, *flags)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert told in err
