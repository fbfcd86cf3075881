#!/bin/bash
# FFmpeg decodes only the first of two joined WavPack or TTA files and exits with 0; for TTA it says nothing of the rest.
# A guess would be that it plays all of them, as it does of joined FLAC, MP3 and Ogg files, or fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet imageio-ffmpeg==0.8.1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg

ffmpeg, folder, rate = imageio_ffmpeg.get_ffmpeg_exe(), Path(sys.argv[1]), 48_000
print(f"imageio-ffmpeg {imageio_ffmpeg.__version__}, ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}: two files of 1 s, joined")
seconds, codes, said = {}, {}, {}
for kind in ("flac", "mp3", "ogg", "wv", "tta"):
    joined = folder / f"joined.{kind}"
    with joined.open("wb") as both:
        for hertz in (440, 880):
            part = folder / f"{hertz}.{kind}"
            tone = f"sine=frequency={hertz}:duration=1:sample_rate={rate}"
            subprocess.run([ffmpeg, "-v", "error", "-f", "lavfi", "-i", tone, part], check=True)
            both.write(part.read_bytes())
    command = [ffmpeg, "-v", "warning", "-guess_layout_max", "0", "-i", joined, "-f", "f32le", "-"]
    done = subprocess.run(command, capture_output=True)
    seconds[kind], codes[kind], said[kind] = len(done.stdout) / 4 / rate, done.returncode, done.stderr.decode().strip()
    print(f"{kind}: {seconds[kind]:.2f} s decoded, exit {codes[kind]}, {len(said[kind].splitlines())} line(s) of warnings")
print(f"wv said: {said['wv'].splitlines()[-1] if said['wv'] else 'nothing'}")
whole = all(seconds[kind] > 1.9 for kind in ("flac", "mp3", "ogg"))
first = all(abs(seconds[kind] - 1) < 0.01 and codes[kind] == 0 for kind in ("wv", "tta"))
sys.exit(0 if whole and first and not said["tta"] else 1)
PYTHON
