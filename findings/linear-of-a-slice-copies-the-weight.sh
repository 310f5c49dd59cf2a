#!/usr/bin/env bash
# torch 2.13.0 (CPU): F.linear of a slice x[:, -1:] takes tens of times as long as of its copy.
#
# A language model computes logits for the last position only: head(states[:, -1:]). The slice of
# (B, T, D) has the right shape, (B, 1, D), and yet its strides cannot be merged into (B, D), so torch
# runs the product as a batch of matrices and first copies the whole weight, once for each row. A row
# count of 1 does not help, and neither does .contiguous(): torch calls a slice of one row contiguous
# and returns it as it is.
#
# Seen with Python 3.11, two CPU cores, bfloat16, a weight of 32000 x 2048, x of 512 positions:
#   1 row:  x[:, -1:] 348 ms, .contiguous() 348 ms, x[:, -1:].flatten(0, 1) 7 ms
#   8 rows: x[:, -1:] 2428 ms, .contiguous() 8 ms, x[:, -1:].flatten(0, 1) 9 ms
#
# Multiply x[:, -1:].clone(memory_format=torch.contiguous_format), or rows flattened to two dimensions.
# Exits with 1 unless the slice takes at least five times as long as its rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"

cat > "$folder/slices.py" <<'PYTHON'
import sys
import time

import torch
from torch.nn import functional as F


def milliseconds(product):
    times = []
    for _ in range(4):
        start = time.perf_counter()
        product()
        times.append(1000 * (time.perf_counter() - start))
    return min(times[1:])


as_seen = True
weight = torch.randn(32000, 2048).bfloat16()
with torch.no_grad():
    for rows in (1, 8):
        x = torch.randn(rows, 512, 2048).bfloat16()
        forms = {
            "slice": x[:, -1:],
            "contiguous": x[:, -1:].contiguous(),
            "flattened": x[:, -1:].flatten(0, 1),
            "cloned": x[:, -1:].clone(memory_format=torch.contiguous_format),
        }
        took = {name: milliseconds(lambda form=form: F.linear(form, weight)) for name, form in forms.items()}
        print(f"{rows} rows:", ", ".join(f"{name} {ms:.0f} ms" for name, ms in took.items()))
        as_seen &= took["slice"] > 5 * took["flattened"] and took["slice"] > 5 * took["cloned"]
        as_seen &= (took["contiguous"] > 5 * took["flattened"]) == (rows == 1)
sys.exit(0 if as_seen else 1)
PYTHON
cd "$folder"
venv/bin/python slices.py
