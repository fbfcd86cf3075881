#!/bin/bash
# transformers' bare DacConfig() reports 16 kHz, but its strides and sizes are those of the 44.1 kHz model.
# A guess would be that the defaults of a config describe one model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

import transformers
from transformers import DacConfig

config = DacConfig()
hop = math.prod(config.downsampling_ratios)
print(f"transformers {transformers.__version__}, DacConfig(): sampling_rate {config.sampling_rate} Hz")
print(f"downsampling_ratios {list(config.downsampling_ratios)}, that is {hop} samples a frame; n_codebooks {config.n_codebooks}")
print("the released models (arXiv 2306.06546): 16 kHz has strides 2, 4, 5, 8 (320), 44.1 kHz has 2, 4, 8, 8 (512)")
print(f"codes a second: {config.sampling_rate / hop:.2f} as configured, {44_100 / hop:.2f} in the model of these strides")
sys.exit(0 if config.sampling_rate == 16_000 and hop == 512 else 1)
PYTHON
