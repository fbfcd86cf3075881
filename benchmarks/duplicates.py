"""Accuracy and speed of near-duplicate detection: python -m benchmarks.duplicates

Accuracy: altered copies of built-in pieces must match the pieces; pieces, clips of them and pieces of one style must
not match each other. Speed: a fingerprint, the quality measurements of a segment, and the search among synthetic
fingerprints of which one in a hundred is a copy with 5 % of bit errors. One thread. Writes
benchmarks/results/duplicates.json.
"""

import argparse
import io
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.paired import environment
from data_prep.audio.duplicates import SAME, near_pairs
from data_prep.audio.quality import measure
from data_prep.builtin import compose, render
from ssmttm import audio
from ssmttm.audio.fingerprint import RATE, bit_error_rate, fingerprint

OUT = Path(__file__).parent / "results" / "duplicates.json"
HERTZ, COPIED = 44_100, 60
MIN_OVERLAP = 0.8  # fraction of the shorter recording that must match
CLIP = 10 * RATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=300, help="built-in pieces (default: %(default)s)")
    parser.add_argument("--fingerprints", type=int, nargs="*", default=[10_000, 30_000, 100_000],
                        help="numbers of synthetic fingerprints to search (default: %(default)s)")  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "speed": speed(),
        "recognition": recognition(options.pieces),
        "search": [search_in_new_process(n) for n in options.fingerprints],
    }
    for name, milliseconds in results["speed"].items():
        print(f"{name:24} {milliseconds:6.2f} ms per second of audio")
    recognised = results["recognition"]
    print(f"\n{'treatment':24} {'median':>7} {'99 %':>7} {'worst':>7} {'found':>7}")
    for name, row in recognised["copies"].items():
        print(f"{name:24} {row['median']:7.3f} {row['p99']:7.3f} {row['worst']:7.3f} {row['found']:7.1%}")
    print(f"\n{'not the same':24} {'pairs':>7} {'median':>7} {'0.1 %':>7} {'lowest':>7}")
    for name, row in recognised["others"].items():
        print(f"{name:24} {row['pairs']:7} {row['median']:7.3f} {row['p01']:7.3f} {row['lowest']:7.3f}")
    wrong, wrong_clips = recognised["wrong"], recognised["wrong_clips"]
    print(f"false duplicates: {wrong} pairs of pieces, {wrong_clips} of a clip and a piece\n")
    for row in results["search"]:
        print(f"{row['sounds']:8,} fingerprints of 2,000 words: {row['seconds']:.1f} s, {row['memory_mb']:.0f} MB, "
              f"{row['found']} of {row['planted']} copies found, {row['wrong']} pairs wrong")  # fmt: skip
    OUT.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    print(f"\n{OUT}")


def treatments() -> dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]]:
    """Alterations of float32 [S] at HERTZ."""
    return {
        "MP3 64 kb/s": lambda wav, rng: encoded(wav, "MP3", 0.88),
        "Vorbis 64 kb/s": lambda wav, rng: encoded(wav, "OGG", 0.95),
        "6 dB louder, clipped": lambda wav, rng: np.clip(2 * wav, -1, 1),
        "20 dB quieter, 16 bit": lambda wav, rng: np.round(0.1 * wav * 32767).astype(np.float32) / 32767,
        "trimmed at both ends": trimmed,
        "half a hop later": lambda wav, rng: wav[round((3.5 / RATE) * HERTZ) :],
        "22.05 kHz": lambda wav, rng: through_rate(wav, 22_050),
        "8 kHz": lambda wav, rng: through_rate(wav, 8_000),
        "noise, 30 dB below": noisy,
        "trimmed, MP3 64 kb/s": lambda wav, rng: encoded(trimmed(wav, rng), "MP3", 0.88),
        "10 s of it, MP3 128 kb/s": lambda wav, rng: encoded(clipped(wav, rng), "MP3", 0.7),
    }


def encoded(wav: np.ndarray, kind: str, level: float) -> np.ndarray:
    """Encode and decode; `level` is libsndfile's compression level, 0 the best quality."""
    import soundfile as sf

    file = io.BytesIO()
    constant = {"bitrate_mode": "CONSTANT"} if kind == "MP3" else {}
    with sf.SoundFile(file, "w", HERTZ, 1, format=kind, compression_level=level, **constant) as out:
        for first in range(0, len(wav), 1 << 16):
            out.write(wav[first : first + (1 << 16)])
    file.seek(0)
    return sf.read(file, dtype="float32")[0]


def trimmed(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    first, last = rng.integers(0, 8 * HERTZ, 2)
    return wav[first : len(wav) - last]


def clipped(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    first = int(rng.integers(0, len(wav) - 12 * HERTZ))
    return wav[first : first + 10 * HERTZ]


def through_rate(wav: np.ndarray, rate: int) -> np.ndarray:
    resampled = audio.resample(torch.from_numpy(wav), HERTZ, rate)
    return audio.resample(resampled, rate, HERTZ).numpy()


def noisy(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return wav + (rng.standard_normal(len(wav)) * wav.std() * 10 ** (-30 / 20)).astype(np.float32)


def recognition(pieces: int) -> dict[str, Any]:
    """Bit error rates of copies and of other music, and the duplicates at the threshold."""
    prints: list[np.ndarray] = []
    styles: list[str] = []
    copies: dict[str, list[np.ndarray]] = {name: [] for name in treatments()}
    for index in tqdm(range(pieces), desc="pieces", unit="piece", leave=False):
        piece = compose(5, index)
        wav = audio.resample(torch.from_numpy(render(piece)), 24_000, HERTZ).numpy()
        prints.append(fingerprint(wav, HERTZ))
        styles.append(piece.truth["style"])
        if index < COPIED:
            rng = np.random.default_rng(index)
            for name, treat in treatments().items():
                copies[name].append(fingerprint(np.ascontiguousarray(treat(wav, rng), np.float32), HERTZ))
    copy_rates = {name: of_copies(prints, treated) for name, treated in copies.items()}
    pairs = list(combinations(range(pieces), 2))
    clips = [words[150 : 150 + CLIP] for words in prints]
    others = {
        "pieces": [bit_error_rate(prints[a], prints[b], 200).rate for a, b in pairs],
        "of one style": [bit_error_rate(prints[a], prints[b], 200).rate for a, b in pairs if styles[a] == styles[b]],
        "10 s against a piece": [bit_error_rate(prints[a], clips[b], 80).rate for a, b in pairs],
    }
    return {
        "threshold": SAME,
        "copies": copy_rates,
        "others": {name: of_others(rates) for name, rates in others.items()},
        "wrong": len(duplicate_pairs(prints)),
        "wrong_clips": sum(a < pieces <= b and a != b - pieces for a, b in duplicate_pairs([*prints, *clips])),
    }


def duplicate_pairs(prints: list[np.ndarray]) -> set[tuple[int, int]]:
    """The pairs that track selection treats as duplicates."""
    found = near_pairs(prints, limit=SAME)
    rows = zip(found.a.tolist(), found.b.tolist(), found.overlap.tolist(), strict=True)
    return {(a, b) for a, b, overlap in rows
            if overlap >= MIN_OVERLAP * min(np.count_nonzero(prints[a]), np.count_nonzero(prints[b]))}  # fmt: skip


def of_copies(prints: list[np.ndarray], treated: list[np.ndarray]) -> dict[str, float]:
    rates = [bit_error_rate(words, copy, round(MIN_OVERLAP * min(np.count_nonzero(words), np.count_nonzero(copy)))).rate
             for words, copy in zip(prints, treated, strict=False)]  # fmt: skip
    same = duplicate_pairs([*prints, *treated])
    found = sum((i, len(prints) + i) in same for i in range(len(treated)))
    return {"median": float(np.median(rates)), "p99": float(np.quantile(rates, 0.99)), "worst": max(rates),
            "found": found / len(treated)}  # fmt: skip


def of_others(rates: list[float]) -> dict[str, float]:
    return {"pairs": len(rates), "median": float(np.median(rates)), "p01": float(np.quantile(rates, 0.001)),
            "lowest": min(rates)}  # fmt: skip


def speed() -> dict[str, float]:
    """CPU milliseconds per second of audio at 44.1 kHz, the lowest of eight rounds."""
    stereo = (np.random.default_rng(0).standard_normal((2, 30 * HERTZ)) * 0.1).astype(np.float32)
    mono = stereo.mean(axis=0)
    calls = {"fingerprint, mono": lambda: fingerprint(mono, HERTZ), "measure, stereo": lambda: measure(stereo, HERTZ)}
    return {name: min(processor_time(call) for _ in range(8)) / 30 * 1e3 for name, call in calls.items()}


def processor_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def search_in_new_process(sounds: int) -> dict[str, float]:
    """`search` in a new process, to measure its memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(search, (sounds,))


def search(sounds: int, length: int = 2_000) -> dict[str, float]:
    """Search synthetic fingerprints whose words match by chance as often as those of music."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words"
        with path.open("wb") as file:
            for block in synthetic(sounds, length):
                block.tofile(file)
        words = np.memmap(path, np.uint32, "r")
        prints = [words[first : first + length] for first in range(0, len(words), length)]
        with peak_memory() as peak:
            before, start = peak[0], time.process_time()
            found = near_pairs(prints)
            seconds = time.process_time() - start
        rows = zip(found.a.tolist(), found.b.tolist(), strict=True)
        right = sum(a % 100 == 0 and b == a + 1 for a, b in rows)
        return {"sounds": sounds, "seconds": seconds, "memory_mb": (peak[0] - before) / 1e6, "planted": sounds // 100,
                "found": right, "wrong": len(found) - right}  # fmt: skip


def synthetic(sounds: int, length: int) -> Iterator[np.ndarray]:
    """Blocks of 100 fingerprints, uint32; the second of each is a copy of the first.

    The lowest 20 bits have 2**14 values, so that two words match as rarely as two words 0.4 s apart in music.
    """
    rng = np.random.default_rng(0)
    known = rng.integers(0, 1 << 20, 1 << 14, dtype=np.uint32)
    for _ in range(sounds // 100):
        block = known[rng.integers(0, 1 << 14, (100, length))]
        block |= rng.integers(0, 1 << 12, block.shape, dtype=np.uint32) << np.uint32(20)
        wrong = np.packbits(rng.random((length, 32)) < 0.05, axis=1, bitorder="little").view("<u4")[:, 0]
        block[1] = block[0] ^ np.where(rng.random(length) < 0.7, wrong, 0).astype(np.uint32)
        yield block


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list with the peak memory of the process in bytes, sampled every 50 ms."""
    peak, stop = [own_memory()], threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], own_memory())

    watch = threading.Thread(target=sample)
    watch.start()
    try:
        yield peak
    finally:
        stop.set()
        watch.join()


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
