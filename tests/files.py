"""Checkpoint directories for tests, and what is done to their files."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints" / "pretrained"
REMOVED = object()
# from the public domain: the Brothers Grimm, Household Tales, translated by Margaret Hunt
TALE = """\
Hard by a great forest dwelt a poor wood-cutter with his wife and his two children. The boy was
called Hansel and the girl Grethel. He had little to bite and to break, and once when great scarcity
fell on the land, he could no longer procure daily bread. Now when he thought over this by night in
his bed, and tossed about in his anxiety, he groaned and said to his wife, "What is to become of us?
How are we to feed our poor children, when we no longer have anything even for ourselves?" """


def edit_json(file: Path, **changes) -> None:
    """Set keys of a JSON file, or remove those given as REMOVED."""
    value = json.loads(file.read_text()) | changes
    kept = {key: item for key, item in value.items() if item is not REMOVED}
    file.write_text(json.dumps(kept))


def shards_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in shards_of(path) for name, tensor in load_file(file).items()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Make these the directory's only weights, in one file."""
    for file in [*shards_of(path), path / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, single(path))


def single(path: Path) -> Path:
    return path / "model.safetensors"
