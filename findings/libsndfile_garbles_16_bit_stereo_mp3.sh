#!/bin/bash
# libsndfile's MP3 encoder garbles stereo given as 16-bit integers: the same tone as floats, or in mono, comes back right.
# A guess would be that the sample type of the input makes no difference beyond rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 soundfile==0.14.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np
import soundfile

rate, folder = 24_000, sys.argv[1]
tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
print(f"soundfile {soundfile.__version__}, libsndfile {soundfile.__libsndfile_version__}: a tone of 440 Hz, amplitude 0.5, as MP3")
errors = {}
for channels in (1, 2):
    floats = np.repeat(tone[:, None], channels, 1).astype(np.float32)
    for name, samples in (("float32", floats), ("int16", np.rint(floats * 32767).astype(np.int16))):
        path = f"{folder}/{channels}_{name}.mp3"
        soundfile.write(path, samples, rate)
        back, _ = soundfile.read(path, always_2d=True)
        errors[channels, name] = float(np.abs(back - floats)[2_000:-2_000].max())
        print(f"{channels} channel(s) written from {name}: largest error {errors[channels, name]:.2f}")
right = all(errors[key] < 0.1 for key in ((1, "float32"), (1, "int16"), (2, "float32")))
sys.exit(0 if right and errors[2, "int16"] > 0.5 else 1)
PYTHON
