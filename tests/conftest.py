"""How hypothesis searches here, and the checkpoints that tests of files share."""

import shutil

import pytest
import torch
from hypothesis import settings

from tools.make_tiny import write_tiny

settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("quick")
# a second thread does not help models this small, and waits for the first where cores are busy
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """pristine(family, **config_changes): a tiny checkpoint, written once and never altered."""
    written = {}

    def checkpoint(family="deepseek_v3", **changes):
        key = (family, repr(changes))
        if key not in written:
            written[key] = tmp_path_factory.mktemp("pristine") / family
            write_tiny(family, written[key], 0, **changes)
        return written[key]

    return checkpoint


@pytest.fixture
def tiny(pristine, tmp_path):
    """tiny(family, **config_changes): a copy to alter."""

    def copy(family="deepseek_v3", **changes):
        return shutil.copytree(pristine(family, **changes), tmp_path / "tiny", dirs_exist_ok=True)

    return copy
