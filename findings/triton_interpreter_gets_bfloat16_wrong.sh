#!/bin/bash
# Triton's interpreter computes bfloat16 on its bits as if they were integers, and says nothing: 1 + 1.5 gives 2.6e38.
# It also cuts float32 off to bfloat16 instead of rounding to nearest even. float32 and float16 are right.
# A guess would be that TRITON_INTERPRET=1 computes bfloat16 as a GPU does, or refuses it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 triton==3.7.1
cat > "$folder/kernels.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def to_bfloat16(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


print(f"triton {triton.__version__}, torch {torch.__version__}, TRITON_INTERPRET=1")
x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 2.5, 0.5, -1.0])
right = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    out = torch.zeros(4, dtype=dtype)
    add[(1,)](x.to(dtype), y.to(dtype), out, 4)
    right[dtype] = torch.equal(out.float(), x + y)
    print(f"{x.tolist()} + {y.tolist()} in {dtype}: {out.tolist()}")
fine = 1 + torch.tensor([0.0, 0.25, 0.75, 1.0]) * 2**-7  # bfloat16 has steps of 2**-7 from 1 to 2
cut = torch.zeros(4, dtype=torch.bfloat16)
to_bfloat16[(1,)](fine, cut, 4)
print(f"{fine.tolist()} to bfloat16: {cut.tolist()}, by torch {fine.bfloat16().tolist()}")
stands = right[torch.float32] and right[torch.float16] and not right[torch.bfloat16]
sys.exit(0 if stands and cut[2] == 1 and fine.bfloat16()[2] > 1 else 1)
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernels.py"
