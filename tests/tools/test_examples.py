"""Every example is short, prints what its docstring shows, and leaves nothing behind."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tempfile
import textwrap

import pytest
import torch
from files import ROOT

FOLDER = ROOT / "tools" / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
NUMBER = re.compile(r"(?<!\w)([+-]?\d[\d,]*(?:\.\d+)?%?)(?!\w)")
every_example = pytest.mark.parametrize("name", EXAMPLES)


def docstring_of(name):
    return ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))


def shown_output(docstring):
    """The indented lines below the one that ends with "prints:"."""
    return textwrap.dedent(re.search(r"prints:\n\n((?:    .*\n)+)", docstring)[1])


def agree(shown, printed):
    """Whether two words are the same, or computed numbers that lie close together.

    A number with a sign, a decimal point or a percent sign was computed, and rounding differs from
    one processor to another; any other counts or names something.
    """
    if not (NUMBER.fullmatch(shown) and NUMBER.fullmatch(printed) and re.search("[+.%-]", shown)):
        return shown == printed
    a, b = (float(number.rstrip("%").replace(",", "")) for number in (shown, printed))
    last_digit = 10.0 ** -len(shown.rstrip("%").partition(".")[2])
    return abs(a - b) <= 0.02 * abs(a) + 1.01 * last_digit


def differences(shown, printed):
    """The lines that differ. Of a line that begins with >, generated text, only its start counts,
    since a small difference in training grows with every token."""
    lines = [text.rstrip("\n").split("\n") for text in (shown, printed)]
    if len(lines[0]) != len(lines[1]):
        return [f"{len(lines[0])} lines are shown, {len(lines[1])} printed"]
    found = []
    for pair in zip(*lines, strict=True):
        if pair[0].startswith("> ") and pair[1].startswith("> "):
            pair = (pair[0][:20], pair[1][:20])
        words = [NUMBER.sub(r" \1 ", line).split() for line in pair]
        if len(words[0]) != len(words[1]) or not all(map(agree, *words)):
            found.append(pair)
    return found


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory that looks like the root of the repository, for what a script writes."""
    for folder in ("checkpoints", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_of(clone):
    folders = clone, clone / "temporary", FOLDER, ROOT / "tools", ROOT / "checkpoints/pretrained"
    found = {path for folder in folders for path in folder.iterdir()}
    # the caches of Python and torch, which are made on import
    return {path for path in found if not path.name.startswith(("__pycache__", "torchinductor"))}


@every_example
def test_an_example_prints_what_its_docstring_shows_and_leaves_no_files(name, clone, capsys):
    before = files_of(clone)
    with torch.random.fork_rng(devices=[]):
        runpy.run_module(f"tools.examples.{name}", run_name="__main__")
    assert differences(shown_output(docstring_of(name)), capsys.readouterr().out) == []
    assert files_of(clone) == before


@every_example
def test_an_example_is_short_and_says_how_to_run_it(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60
    assert f"`python -m tools.examples.{name}`" in docstring_of(name)


def test_there_are_examples():
    assert len(EXAMPLES) >= 8


def test_the_command_runs_in_the_root_of_the_repository():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "tools.examples.logit_lens"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert differences(shown_output(docstring_of("logit_lens")), done.stdout) == []


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("loss 3.537", "loss 3.540"),
        ("loss 3.537, 16%", "loss  3.536, 17%"),
        ("row 1  +9 -0", "row 1 +10  +1"),
        ("> The Congress shall have", "> The Congress shall do"),
    ],
)
def test_numbers_may_differ_a_little(shown, printed):
    assert differences(shown, printed) == []


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("loss 3.537", "loss 3.637"),
        ("loss 3.537", "loss of 3.537"),
        ("1,000 parameters", "1,001 parameters"),
        ("layer 1 -9", "layer 2 -9"),
        ("layer 1 -9", "layer 1 +9"),
        ("16%", "19%"),
        ("a\nb", "a"),
        ("> The Congress shall", "The Congress shall"),
        ("' king' 2%", "' queen' 2%"),
    ],
)
def test_other_differences_are_found(shown, printed):
    assert differences(shown, printed) != []
