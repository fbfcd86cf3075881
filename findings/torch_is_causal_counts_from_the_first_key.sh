#!/bin/bash
# torch's scaled_dot_product_attention with is_causal=True lines queries up with the first keys, not the last: a query
# for the newest position, beside cached keys, attends to the first key only, without an error.
# A guess would be that the last query sees all keys, as in flash-attn, so that decoding with a cache may keep the flag.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 2, 6, 8).unbind()  # [B, H, T, D] each
whole = scaled_dot_product_attention(query, key, value, is_causal=True)
print(f"torch {torch.__version__}: the last n of 6 queries with all 6 keys, against the whole causal attention")
errors = {}
for n in (6, 2, 1):
    last = query[:, :, -n:]
    by_flag = scaled_dot_product_attention(last, key, value, is_causal=True)
    by_mask = scaled_dot_product_attention(last, key, value, attn_mask=causal_lower_right(n, 6))
    errors[n] = [float((found - whole[:, :, -n:]).abs().max()) for found in (by_flag, by_mask)]
    print(f"n {n}: largest difference {errors[n][0]:.1e} with is_causal=True, {errors[n][1]:.1e} with causal_lower_right")
first_only = torch.allclose(by_flag, value[:, :, :1], atol=1e-6)
print(f"the one query's result is the first value: {first_only}")
right = errors[6][0] < 1e-5 and all(error[1] < 1e-5 for error in errors.values())
sys.exit(0 if right and errors[2][0] > 0.1 and errors[1][0] > 0.1 and first_only else 1)
PYTHON
