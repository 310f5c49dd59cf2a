"""Long work shows a bar on a terminal, and control characters nowhere else."""

import io
import json
import sys

import pytest

from tools import floor, held_out
from tools.__main__ import main
from tools.make_tiny import CONFIGS

STORY = "Once there was a king, {i} years old, who had {i} sons and as many golden apples.\n\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def folder(pristine, tmp_path, monkeypatch):
    """A model, a text and the config of a model to train."""
    monkeypatch.setattr(held_out, "NUM_PROMPTS", 2)
    monkeypatch.setattr(floor, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(floor, "PRODUCT_WIDTH", 64)
    books = ["".join(STORY.format(i=10 * book + i) for i in range(20)) for book in range(4)]
    (tmp_path / "text.txt").write_text("\n\n\n".join(books), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["deepseek_v3"]))
    (tmp_path / "model").symlink_to(pristine())
    return tmp_path


BRIEF = "--new-tokens 4 --passages 2 --draft-tokens 1"
DECODING = "--contexts 8 --batches 1 --steps 3"
TRAINING = "--steps 2 --batch-size 2 --sequence-length 24"
COMMANDS = [
    ("generate --model MODEL --prompt Once --max-new-tokens 2", {"loading"}),
    ("convert MODEL OUT", {"writing"}),
    ("verify MODEL --values", {"reading"}),
    ("make-tiny mixtral OUT", {"writing"}),
    (
        f"bench MODEL --text TEXT --sections decode drafts {DECODING} {BRIEF}",
        {"loading", "round/s", "decoding 1 after 8", "passage/s"},
    ),
    ("probe-mtp MODEL TEXT --max-tokens 64", {"loading", "piece/s"}),
    (
        f"train --text TEXT --out OUT --start-from MODEL {TRAINING}",
        {"hashing", "loading", "tokenizing", "step/s", "loss=", "writing", "token/s", "drafting"},
    ),
]


def run(folder, command: str) -> int:
    names = {"MODEL": "model", "TEXT": "text.txt", "OUT": "out"}
    words = [str(folder / names[word]) if word in names else word for word in command.split()]
    return main(words)


@pytest.mark.parametrize(("command", "bars"), COMMANDS, ids=[row[0].split()[0] for row in COMMANDS])
def test_long_work_shows_a_bar_on_a_terminal(folder, monkeypatch, command, bars):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert run(folder, command) == 0
    assert {bar for bar in bars if bar not in terminal.getvalue()} == set()
    assert "tokens a second, " not in terminal.getvalue()


def test_training_writes_nothing_but_lines_elsewhere(folder, capsys):
    assert run(folder, COMMANDS[-1][0]) == 0
    written = capsys.readouterr().err
    assert "\r" not in written
    assert [line.split(":")[0] for line in written.splitlines()] == ["step 1 of 2", "step 2 of 2"]
