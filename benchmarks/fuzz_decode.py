"""Fuzz the decoder with damaged audio files for a given time: the outcomes, the worst time and memory.

    python -m benchmarks.fuzz_decode --minutes 5 --seed 0

Small valid files of every format are mutated (bytes overwritten, bits flipped, pieces cut, doubled, swapped between
files, numbers replaced by extreme ones) and decoded. Anything but samples or a rejection is an error of the program and
ends the run; the file stays in the working folder.
"""

import argparse
import collections
import re
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf

from data_prep.audio import decoder_process
from data_prep.audio.decode import Decoder, Limits
from data_prep.track import Rejected

FORMATS = {
    "wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III", "aiff": "PCM_24", "au": "FLOAT",
    "caf": "PCM_16", "w64": "PCM_16", "rf64": "PCM_16",
}  # fmt: skip
BY_FFMPEG = ("m4a", "mka", "wma", "aac", "wv", "tta", "ac3")
EXTREMES = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x80", b"\xff" * 8]


def samples(seconds: float = 0.6, channels: int = 2, rate: int = 44_100) -> np.ndarray:
    """A tone in noise, float32 [s, C]."""
    time = np.arange(round(seconds * rate))[:, None] / rate
    random = np.random.default_rng(0).uniform(-0.2, 0.2, (len(time), channels))
    return (random + 0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def valid_files(folder: Path) -> dict[str, bytes]:
    """A small valid file of each format that can be made here, by extension."""
    for suffix, subtype in FORMATS.items():
        sf.write(folder / f"x.{suffix}", samples(), 44_100, subtype=subtype)
    sf.write(folder / "opus.ogg", samples(rate=48_000), 48_000, format="OGG", subtype="OPUS")
    if program := decoder_process._ffmpeg():
        for suffix in BY_FFMPEG:
            command = [program, "-v", "error", "-nostdin", "-y", "-i", folder / "x.wav", folder / f"x.{suffix}"]
            subprocess.run(command, check=True, timeout=60)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """`data` with one to four changes, half of them near its beginning, where the headers are."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        reach = len(changed) if rng.random() < 0.5 else min(len(changed), 200)
        place = int(rng.integers(0, max(1, reach)))
        size = int(2 ** rng.uniform(0, 12))
        match rng.integers(0, 7):
            case 0:
                changed[place : place + size] = rng.bytes(min(size, 64))
            case 1 if place < len(changed):
                changed[place] ^= 1 << int(rng.integers(0, 8))
            case 2:
                del changed[place : place + size]
            case 3:
                changed[place:place] = changed[place : place + size]
            case 4:
                start = int(rng.integers(0, max(1, len(other))))
                changed[place : place + size] = other[start : start + size]
            case 5:
                extreme = EXTREMES[rng.integers(0, len(EXTREMES))]
                changed[place : place + len(extreme)] = extreme
            case _:
                del changed[max(1, len(changed) - size) :]
    return bytes(changed)


def main() -> None:
    """Parse the arguments, mutate and decode until the time is up, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-decode-"))
    files = valid_files(folder)
    counts: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    worst = (0.0, "")
    end = time.monotonic() + 60 * arguments.minutes
    with Decoder(Limits(wall_seconds=20, memory_bytes=1 << 30)) as decoder:
        while time.monotonic() < end:
            name, other = rng.choice(list(files), 2)
            path = folder / f"mutated-{name}"
            path.write_bytes(mutated(files[name], files[other], rng))
            begun = time.monotonic()
            try:
                for block, _ in decoder.blocks(path):
                    assert np.isfinite(block).all()
                counts["accepted"] += 1
            except Rejected as rejection:
                counts[f"rejected: {rejection.kind}"] += 1
                reasons[re.sub(r"\d+", "N", rejection.reason)] += 1
                if "signal" in rejection.reason:
                    shutil.copy(path, folder / f"crash-{counts.total()}-{name}")
            worst = max(worst, (time.monotonic() - begun, name))
    for name, count in [*counts.most_common(), *reasons.most_common()]:
        print(f"{count:8d}  {name}")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"worst: {worst[0]:.2f} s ({worst[1]}), {memory:.0f} MB resident in a child; files in {folder}")


if __name__ == "__main__":
    main()
