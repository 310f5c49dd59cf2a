"""What the README shows runs as it stands there."""

import re
import shlex
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from files import ROOT

from checkpoints.families import FAMILIES
from tools.__main__ import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m tools (.+)$", README, flags=re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [word.replace("/tmp/", f"{tmp_path}/") for word in shlex.split(command)]
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    else:
        assert main(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, monkeypatch):
    """In a module of their own, which classes need; families that they add are forgotten."""
    module = ModuleType("readme_program")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(ROOT)
    known = dict(FAMILIES)
    try:
        with torch.random.fork_rng(devices=[]):
            exec(compile(program, "README.md", "exec"), module.__dict__)
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)


def test_a_program_runs_by_itself():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[0]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_there_is_something_to_run():
    assert len(COMMANDS) >= 4
    assert len(PROGRAMS) >= 9


def test_paths_in_the_file_map_exist():
    folder = ROOT
    for cell in re.findall(r"^\| (`.+?) \|", README, flags=re.MULTILINE):
        for name in re.findall(r"`\s*([\w./]+)`", cell):
            if "`  " not in cell:
                folder = ROOT / name
            path = folder if "`  " not in cell else folder / name.strip()
            assert path.exists() or (folder / name).exists(), name
