"""Imports point one way, packages meet at their front doors, and the token path stays short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from files import ROOT

ALLOWED = {  # besides the package itself and the standard library
    "moe": {"torch", "einops"},
    "modeling": {"torch", "einops", "moe"},
    "checkpoints": {
        *("torch", "einops", "moe", "modeling"),
        *("jinja2", "safetensors", "sentencepiece", "tiktoken", "tokenizers", "tqdm"),
    },
}
OWN = {*ALLOWED, "tools", "tests"}
OUTSIDE_THE_MODEL = {"jinja2", "safetensors", "sentencepiece", "tiktoken", "tokenizers", "tqdm"}
TOKEN_PATH = [
    "modeling/model.py",
    "modeling/attention/mla.py",
    "modeling/attention/dot_product.py",
    "modeling/rope.py",
    "modeling/norm.py",
    "moe/layer.py",
    "moe/routing.py",
    "moe/experts.py",
]

SOURCES = sorted(
    path.relative_to(ROOT)
    for package in [*ALLOWED, "tools"]
    for path in ROOT.glob(f"{package}/**/*.py")
)
every_source = pytest.mark.parametrize("source", SOURCES, ids=str)


def tree_of(source: Path) -> ast.Module:
    return ast.parse((ROOT / source).read_text())


def absolute_imports(tree: ast.AST) -> list[str]:
    """Dotted names of the modules imported, relative ones left out."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module)
    return found


def broken_rules(source: Path, tree: ast.Module) -> list[str]:
    """What the file's imports do that its package may not."""
    package, broken = source.parts[0], []
    for name in absolute_imports(tree):
        top = name.split(".")[0]
        if package in ALLOWED and top not in ALLOWED[package] | sys.stdlib_module_names:
            inside = "its own package by its full name" if top == package else f"{name}"
            broken.append(f"imports {inside}")
        if package not in ALLOWED and top == "tests":
            broken.append("imports tests")
        kits_meet = source.name == "testing.py" and name == f"{top}.testing"
        if top in OWN - {package} and name != top and not kits_meet:
            broken.append(f"reaches into {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0 and node.module == "testing":
            broken.append("imports the test kit, which is for tests")
        if isinstance(node, ast.ImportFrom) and node.level > len(source.parts) - 1:
            broken.append(f"line {node.lineno}: a relative import that leaves the package")
        if package in ALLOWED and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom))
            broken += [f"line {n.lineno}: an import inside {node.name}" for n in inner]
    return broken


@every_source
def test_a_file_imports_only_what_its_package_may(source):
    assert broken_rules(source, tree_of(source)) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("moe/x.py", "from modeling import RopeConfig"),
        ("moe/x.py", "import numpy"),
        ("moe/x.py", "from moe import Router"),
        ("modeling/x.py", "from moe.routing import Router"),
        ("modeling/x.py", "import moe.routing"),
        ("modeling/x.py", "from moe.testing import noise"),
        ("modeling/testing.py", "from moe.routing import Router"),
        ("moe/x.py", "from .testing import noise"),
        ("modeling/x.py", "from checkpoints import load_model"),
        ("modeling/x.py", "import safetensors.torch"),
        ("modeling/x.py", "from ..moe import Router"),
        ("modeling/x.py", "def f():\n    import torch"),
        ("checkpoints/x.py", "import tools"),
        ("checkpoints/families/x.py", "from ...modeling import RopeConfig"),
        ("checkpoints/x.py", "from tests import tiny"),
        ("checkpoints/x.py", "import transformers"),
        ("tools/x.py", "from modeling.attention.mla import absorbing_pays"),
        ("tools/x.py", "import tests"),
    ],
)
def test_the_rules_catch_a_wrong_import(source, line):
    assert broken_rules(Path(source), ast.parse(line)) != []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("moe/x.py", "import torch.nn.functional\nfrom .routing import Router\nimport math"),
        ("modeling/x.py", "from moe import Router"),
        ("modeling/testing.py", "from moe.testing import noise"),
        ("checkpoints/families/x.py", "from ..mapping import Rule\nfrom modeling import MLAConfig"),
        ("checkpoints/x.py", "from safetensors.torch import save_file"),
        ("tools/x.py", "def f():\n    import numpy"),
    ],
)
def test_the_rules_allow_a_right_import(source, line):
    assert broken_rules(Path(source), ast.parse(line)) == []


@every_source
def test_libraries_for_files_appear_only_behind_checkpoints(source):
    if source.parts[0] not in ("checkpoints", "tools"):
        assert not OUTSIDE_THE_MODEL & {
            name.split(".")[0] for name in absolute_imports(tree_of(source))
        }


@every_source
def test_names_imported_from_another_package_are_its_public_ones(source):
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in ALLOWED:
            front_door = tree_of(Path(node.module, "__init__.py")).body
            imports = [line for line in front_door if isinstance(line, ast.ImportFrom)]
            public = {alias.asname or alias.name for line in imports for alias in line.names}
            assert {alias.name for alias in node.names} <= public


def closure(source: Path) -> set[Path]:
    """The files of moe and modeling that importing `source` leads to: what its imports name, the
    door of another package, and everything behind that."""
    found, waiting = set(), [source]
    while waiting:
        found.add(current := waiting.pop())
        for node in ast.walk(tree_of(current)):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                folder = current.parents[node.level - 1]
                waiting.append(folder / f"{node.module.replace('.', '/')}.py")
            elif isinstance(node, ast.ImportFrom) and node.module in OWN:
                waiting.append(Path(node.module, "__init__.py"))
        waiting = [path for path in waiting if path not in found]
    return found


def lines_of(paths: set[Path]) -> int:
    return sum(len((ROOT / path).read_text().splitlines()) for path in paths)


def test_a_token_is_followed_from_id_to_logits_in_eight_files():
    path = {Path(name) for name in TOKEN_PATH}
    assert len(path) == 8
    kinds = closure(Path("modeling/attention/mla.py"))
    assert path <= closure(Path("modeling/model.py")) | kinds
    assert lines_of(path) <= 1200


def test_what_a_forward_pass_imports_is_small():
    """The kinds of attention are not among it: a block knows their contract alone."""
    found = closure(Path("modeling/model.py"))
    assert len(found) <= 16, sorted(map(str, found))
    assert lines_of(found) <= 1700


@pytest.mark.parametrize("names", ["checkpoints", "tools.generate, tools.bench, tools.train"])
def test_what_a_program_starts_with_is_not_torchs_compiler(names):
    """It takes as long to import as the rest of torch."""
    program = f"import sys, {names}; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
