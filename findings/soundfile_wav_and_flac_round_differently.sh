#!/bin/bash
# soundfile (libsndfile) rounds float samples in another way for FLAC than for WAV, both 16-bit PCM.
# A guess would be that two lossless 16-bit files of one array hold the same samples.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 soundfile==0.14.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import soundfile as sf

wave = (0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)).astype(np.float32)
sf.write("a.wav", wave, 48_000, subtype="PCM_16")
sf.write("a.flac", wave, 48_000, subtype="PCM_16")
wav, flac = (sf.read(name, dtype="int16")[0].astype(int) for name in ("a.wav", "a.flac"))
exact = wave.astype(float)
print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}: one float32 tone as 16-bit WAV and as 16-bit FLAC")
print(f"samples that differ: {np.mean(wav != flac):.1%}, by at most {np.abs(wav - flac).max()} step")
for scale in (32767, 32768):
    for name, samples in (("WAV", wav), ("FLAC", flac)):
        error = samples - exact * scale
        print(f"{name} minus {scale} x: mean {error.mean():+.3f}, from {error.min():+.3f} to {error.max():+.3f} steps")
sys.exit(0 if np.mean(wav != flac) > 0.2 else 1)
PYTHON
