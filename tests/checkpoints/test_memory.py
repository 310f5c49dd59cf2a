"""What loading and converting need in memory, on checkpoints of gigabytes, and what kill -9 leaves.

`pytest -m slow tests/checkpoints/test_memory.py -rP` runs them and prints the figures: ten minutes,
and 25 GB of disk.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from files import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import read_config, save_model, verify
from modeling import Transformer
from tools.make_tiny import CONFIGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts as Linux does"),
]
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 6,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
LATENT = {
    "n_routed_experts": 64,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": 384,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_group": 8,
    "topk_group": 4,
}
LOAD = """
model = load_model(sys.argv[2], progress=False)
held = sum({id(t): t.nbytes for t in model.state_dict().values()}.values())
"""
CONVERT = """
convert(sys.argv[2], sys.argv[3], torch.bfloat16, max_shard_bytes=10**9, progress=False)
held = 0
"""


def model_of(path: Path, family: str, **changes) -> Transformer:
    """A model of the family in bfloat16, every weight the same number."""
    file = path / "config.json"
    file.write_text(json.dumps(CONFIGS[family] | SIZES | changes))
    with torch.device("meta"):
        model = Transformer(read_config(file)).to(torch.bfloat16)
    model = model.to_empty(device="cpu").requires_grad_(False)
    for tensor in model.state_dict().values():
        tensor.fill_(0.01)
    return model


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    """More than 4 GB in FP8 blocks, in shards of 1 GB."""
    path = tmp_path_factory.mktemp("fp8")
    model = model_of(path, "deepseek_v3", num_hidden_layers=30, **LATENT)
    save_model(model, path / "model", max_shard_bytes=10**9, dtype=torch.float8_e4m3fn)
    assert sum(file.stat().st_size for file in (path / "model").iterdir()) > 4 * 10**9
    return path / "model"


def measured(code: str, *arguments: Path) -> tuple[int, int, int]:
    """Bytes in a process of its own: peak in all, what it held before, what the code calls held."""
    script = f"""
import sys
sys.path.insert(0, sys.argv[1])
import torch
from checkpoints import convert, load_model
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
before = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
{code}
print(status("VmHWM:"), before, held)
"""
    command = [sys.executable, "-c", script, str(ROOT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, before, held = map(int, done.stdout.split())
    print(f"peak {peak:,}  before {before:,}  held {held:,}")
    return peak, before, held


def test_converting_four_gigabytes_stays_within_two_gibibytes_in_all(fp8, tmp_path):
    peak, before, _ = measured(CONVERT, fp8, tmp_path / "plain")
    largest = 32000 * 1024 * 2
    assert peak < 2 * 2**30
    assert peak - before < 10**9 + 2 * largest + 64 * 2**20  # a shard, a tensor, what is mapped
    assert verify(tmp_path / "plain")[0] == []


def test_killed_at_any_moment_converting_leaves_nothing_or_what_verify_calls_incomplete(
    fp8, tmp_path
):
    random.seed(0)
    target = tmp_path / "plain"
    command = [sys.executable, "-m", "tools", "convert", str(fp8), str(target)]
    for _ in range(8):
        running = subprocess.Popen([*command, "--max-shard-size", "1GB"], cwd=ROOT)
        time.sleep(random.uniform(2, 40))
        running.kill()
        running.wait()
        for left in tmp_path.iterdir():
            errors, _ = verify(left)
            print(left.name, sorted(file.name for file in left.iterdir()), errors)
            assert left.name == target.name + ".partial"
            assert errors


def test_loading_holds_one_copy_of_experts_one_by_one_and_fused(tmp_path):
    sizes = {"num_hidden_layers": 8, "num_experts": 64, "head_dim": 64, "mlp_only_layers": []}
    model = model_of(tmp_path, "qwen3_moe", **sizes, decoder_sparse_step=1)
    save_model(model, tmp_path / "singly", max_shard_bytes=10**9)
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_text((tmp_path / "singly" / "config.json").read_text())
    tensors = {}
    for file in (tmp_path / "singly").glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names = [name for name in handle.keys() if ".experts." not in name]  # noqa: SIM118
            tensors |= {name: handle.get_tensor(name) for name in names}
    for i, layer in enumerate(model.layers):
        stem, experts = f"model.layers.{i}.mlp.experts.", layer.feed_forward.experts
        tensors[stem + "gate_up_proj"] = torch.cat([experts.gate, experts.up], dim=1)
        tensors[stem + "down_proj"] = experts.down
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    del model, tensors, experts, layer
    for path in (tmp_path / "singly", fused):
        peak, before, held = measured(LOAD, path)
        assert held > 2 * 10**9
        assert peak - before < 1.1 * held, path.name


def test_loading_fp8_holds_one_copy(fp8):
    peak, before, held = measured(LOAD, fp8)
    assert peak - before < 1.1 * held
