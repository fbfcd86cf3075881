#!/bin/bash
# trackio.Audio scales an array of floats to a peak of 1 before it writes it, while 16-bit integers keep their level.
# A guess would be that samples in [-1, 1] are kept: a model that generates almost silence then sounds as loud as music.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 trackio==0.43.0
TRACKIO_DIR=$folder/runs "$folder/venv/bin/python" -W ignore - "$folder/runs" <<'PYTHON'
import contextlib
import io
import sys
import wave
from pathlib import Path

import numpy as np
import trackio

rate, folder = 8_000, Path(sys.argv[1])
tone = 0.01 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
print(f"trackio {trackio.__version__}: a tone of 440 Hz, peak 0.01")
with contextlib.redirect_stdout(io.StringIO()):
    trackio.init(project="any")
    trackio.log({"tone": trackio.Audio(tone.astype(np.float32), sample_rate=rate)}, step=0)
    trackio.log({"tone": trackio.Audio(np.rint(tone * 32767).astype(np.int16), sample_rate=rate)}, step=1)
    trackio.finish()
peaks = []
for step, name in ((0, "float32"), (1, "int16")):
    (path,) = folder.glob(f"media/any/*/{step}/*.wav")
    with wave.open(str(path)) as file:
        peaks.append(np.abs(np.frombuffer(file.readframes(rate), "<i2") / 32768).max())
    print(f"logged as {name}: the file's peak is {peaks[-1]:.3f}")
sys.exit(0 if peaks[0] > 0.99 and abs(peaks[1] - 0.01) < 1e-3 else 1)
PYTHON
