#!/bin/bash
# snac's decoder, in eval mode too, adds noise that it draws anew at each call: two decodes of the same codes differ.
# A guess would be that eval mode makes it a function of the codes, as in EnCodec or DAC.
# The weights here are random: how much a trained model's decodes differ is not measured.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet snac==1.2.1 einops==0.8.2 numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import snac
import torch

sizes = {"sampling_rate": 8_000, "encoder_dim": 8, "encoder_rates": [2, 4], "decoder_dim": 64, "decoder_rates": [4, 2]}
levels = {"codebook_size": 64, "codebook_dim": 4, "vq_strides": [4, 2, 1], "attn_window_size": None}
print(f"snac {snac.__version__}, torch {torch.__version__}; a small model of random weights in eval mode")
differences = {}
for noise in (True, False):
    torch.manual_seed(0)
    model = snac.SNAC(**sizes, **levels, noise=noise).eval()
    with torch.inference_mode():
        codes = model.encode(0.3 * torch.randn(1, 1, 8_000))
        first, second = model.decode(codes), model.decode(codes)
    differences[noise] = float((first - second).abs().max())
    peak = float(first.abs().max())
    default = " (the default)" if noise else ""
    print(f"noise={noise}{default}: decodes of equal codes differ by up to {differences[noise]:.2f} (peak {peak:.2f})")
sys.exit(0 if differences[True] > 0.01 and differences[False] == 0 else 1)
PYTHON
