#!/usr/bin/env bash
# torch 2.13.0 (CPU): building an nn.Embedding on the meta device imports torch's compiler.
#
# The meta device computes shapes without memory, and is used to build a model before its weights are
# loaded. Building an nn.Linear there costs nothing. An nn.Embedding draws its weight from a normal
# distribution, and on the meta device this goes through Python code that imports torch._dynamo with
# all it needs: the first embedding takes a second or more, later ones microseconds. torch.stack
# on the meta device does the same.
#
# Seen with Python 3.11, two CPU cores:
#   nn.Linear on meta      imports torch._dynamo: False
#   nn.Embedding on meta   imports torch._dynamo: True
#   torch.stack on meta    imports torch._dynamo: True
#   nn.Embedding on the CPU imports torch._dynamo: False
#
# Where loading must be quick, give the embedding its weight (nn.Embedding.from_pretrained) and use
# no torch.stack on meta tensors. Exits with 1 if torch behaves in another way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"

cat > "$folder/imports.py" <<'PYTHON'
import subprocess
import sys

BUILD = {
    "nn.Linear on meta": ("torch.nn.Linear(4, 4, device='meta')", False),
    "nn.Embedding on meta": ("torch.nn.Embedding(4, 4, device='meta')", True),
    "torch.stack on meta": ("torch.stack([torch.empty(2, device='meta')] * 2)", True),
    "nn.Embedding on the CPU": ("torch.nn.Embedding(4, 4)", False),
}
as_seen = True
for name, (build, expected) in BUILD.items():
    program = f"import sys, torch\n{build}\nprint('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    print(f"{name:24} imports torch._dynamo: {done.stdout.strip()}")
    as_seen &= done.stdout.strip() == str(expected)
sys.exit(0 if as_seen else 1)
PYTHON
cd "$folder"
venv/bin/python imports.py
