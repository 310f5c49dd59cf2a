"""TRAPS.md and the tests name each other: none is missing on either side."""

import ast
import re
from fnmatch import fnmatchcase

import pytest
from files import ROOT

from checkpoints.families import FAMILIES

TESTS = ROOT / "tests"
HEADING = re.compile(r"^### (\d\d) \S.*$", re.MULTILINE)
FIELD = re.compile(r"^- (.+?): (.+(?:\n  .+)*)$", re.MULTILINE)


def existing_tests() -> set[tuple[str, str]]:
    """(file, function) of every test below tests/."""
    return {
        (path.relative_to(TESTS).as_posix(), node.name)
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def read_entries(text: str) -> list[tuple[str, dict[str, str]]]:
    """(number, fields) of every entry, in order."""
    _, *parts = HEADING.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [(number, dict(FIELD.findall(entry.split("\n## ")[0]))) for number, entry in pairs]


def quoted(field: str) -> list[str]:
    return re.findall(r"`([^`]*)`", field)


def find_faults(text: str, tests: set[tuple[str, str]]) -> list[str]:
    """What is wrong with a list of traps beside these tests."""
    entries, faults = read_entries(text), []
    numbers = [number for number, _ in entries]
    if numbers != [f"{i:02}" for i in range(1, len(numbers) + 1)]:
        faults.append(f"numbers are not consecutive: {numbers}")
    named: set[tuple[str, tuple[str, str]]] = set()
    for number, fields in entries:
        references = [reference.partition(": ") for reference in quoted(fields.get("Held by", ""))]
        if not references and "Not written yet" not in fields:
            faults.append(f"{number} names no test and does not say what is not written yet")
        for file, _, name in references:
            matching = {t for t in tests if fnmatchcase(t[0], file) and fnmatchcase(t[1], name)}
            named |= {(number, test) for test in matching}
            if not matching:
                faults.append(f"{number} names {file}: {name}, which does not exist")
        missing = {"Models", "Reported"} - fields.keys()
        faults += [f"{number} does not say: {field}" for field in missing]
        unknown = set(quoted(fields.get("Models", ""))) - FAMILIES.keys()
        faults += [f"{number} names {name}, which is no model type that loads" for name in unknown]
    for file, name in sorted(tests):
        trap = re.match(r"test_trap_(\d*)", name)
        if trap and (trap[1], (file, name)) not in named:
            faults.append(f"{file}: {name} is not named by the entry of its number")
    return faults


def test_every_trap_names_its_tests_and_is_named_by_them():
    text = (TESTS / "TRAPS.md").read_text()
    assert len(read_entries(text)) >= 50
    assert find_faults(text, existing_tests()) == []


SOUND = """
## Positions

### 01 One
What goes wrong.
- Models: `mixtral`; Llama 4
- Reported: -
- Held by: `a/test_*.py: test_trap_01_*`,
  `b/test_y.py: test_other`

### 02 Two
- Models: none
- Reported: -
- Not written yet: something

## Comparing

- Held by: `none: none`
"""
THERE = {("a/test_x.py", "test_trap_01_it"), ("b/test_y.py", "test_other"), ("b/c.py", "test_z")}


def test_a_sound_list_has_no_faults():
    assert find_faults(SOUND, THERE) == []


@pytest.mark.parametrize(
    ("part", "other", "said"),
    [
        ("### 02 Two", "### 03 Two", "not consecutive"),
        ("### 02 Two", "### 01 Two", "not consecutive"),
        ("test_other", "test_another", "01 names b/test_y.py: test_another, which does not exist"),
        ("b/test_y.py", "b/c.py", "01 names b/c.py: test_other, which does not exist"),
        ("test_y.py: ", "test_y.py:", "does not exist"),
        ("a/test_*", "b/test_*", "test_trap_01_it is not named by the entry of its number"),
        ("- Not written yet", "- Not", "02 names no test"),
        ("`mixtral`", "`mistral`", "01 names mistral, which is no model type"),
        ("- Models: none", "", "02 does not say: Models"),
    ],
)
def test_a_fault_in_a_list_is_found(part, other, said):
    faults = find_faults(SOUND.replace(part, other), THERE)
    assert any(said in fault for fault in faults)


@pytest.mark.parametrize("name", ["test_trap_02_it", "test_trap_03_it", "test_trap_1_it"])
def test_a_trap_test_that_its_entry_does_not_name_is_found(name):
    (fault,) = find_faults(SOUND, THERE | {("a/test_x.py", name)})
    assert fault == f"a/test_x.py: {name} is not named by the entry of its number"
