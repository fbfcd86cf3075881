#!/bin/bash
# transformers' CLAP feature extractor with the settings of a fused checkpoint (truncation="fusion") draws from numpy's
# global generator: the same clips give other features at each call.
# A guess would be that features are a function of the audio, as they are with every other audio extractor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import transformers
from transformers import ClapFeatureExtractor

extractor = ClapFeatureExtractor(truncation="fusion", padding="repeatpad")
rng = np.random.default_rng(0)
short = [rng.normal(size=48_000 * 3).astype(np.float32) * 0.1 for _ in range(4)]
long = rng.normal(size=48_000 * 15).astype(np.float32) * 0.1


def features(clips):
    return extractor(clips, sampling_rate=48_000, return_tensors="np")


marks = {tuple(np.ravel(features(short)["is_longer"]).tolist()) for _ in range(12)}
mels = [features(long)["input_features"] for _ in range(3)]
print(f"transformers {transformers.__version__}, ClapFeatureExtractor(truncation='fusion')")
print(f"four clips of 3 s, twelve calls: {len(marks)} different values of is_longer (none of them is longer than 10 s)")
difference = max(float(np.abs(mel - mels[0]).max()) for mel in mels)
print(f"one clip of 15 s, three calls: mel spectrograms differ by up to {difference:.1f} dB")
sys.exit(0 if len(marks) > 1 and difference > 1 else 1)
PYTHON
