"""What is installed is complete: every package, and the marks that their annotations are meant."""

import tomllib

import pytest
from files import ROOT

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
TOPS = ["moe", "modeling", "checkpoints"]


def test_every_folder_with_source_is_a_package_that_is_installed():
    sources = [file.relative_to(ROOT) for top in TOPS for file in ROOT.glob(f"{top}/**/*.py")]
    folders = {".".join(source.parent.parts) for source in sources}
    assert len(folders) > len(TOPS)
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    assert all((ROOT / folder.replace(".", "/") / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize("top", TOPS)
def test_annotations_are_installed_as_meant_for_users(top):
    assert "py.typed" in SETUPTOOLS["package-data"][top]
    assert (ROOT / top / "py.typed").read_bytes() == b""
