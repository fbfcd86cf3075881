"""Time of the metrics without embedders, on one thread: python -m benchmarks.music_metrics

Music metrics of a clip of ten seconds, in parts and as a whole, including reading the file; and all distances of 1,000
clips from 1,000 references with their intervals, for each shipped embedder. Processor time, which other load on the
machine hardly changes. Writes benchmarks/results/music_metrics.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.paired import environment
from data_prep.builtin import compose, render
from ssmttm import audio
from ssmttm.audio import features
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.evaluation.metrics.compute import set_distances
from ssmttm.evaluation.music import key, signal_stats, tempo
from ssmttm.evaluation.music.music_metrics import measure_clip
from ssmttm.evaluation.music.repetition import repetition
from ssmttm.evaluation.protocol.embed_files import ClipEmbeddings

OUT = Path(__file__).parent / "results" / "music_metrics.json"
SECONDS, CLIPS = 10, 4
N = 1_000
EMBEDDERS = ("tiny", "codec", "log_mel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="repetitions per clip (default: %(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for name, rate, channels in (("24 kHz mono", 24_000, 1), ("44.1 kHz stereo", 44_100, 2)):
            paths = [write_clip(Path(folder) / f"{rate}-{i}.wav", i, rate, channels) for i in range(CLIPS)]
            whole = timed([lambda p=p: measure_clip(*audio.read(p, mono=False)) for p in paths], rounds)
            results[name] = {"whole": whole, **parts(paths[0], rounds)}
    set_times = {name: distances(name) for name in EMBEDDERS}
    for name, metrics in results.items():
        print(f"\n{name}: {60_000 / metrics['whole']['median_ms']:.0f} clips a minute")
        for part, times in metrics.items():
            print(f"  {part:20} {times['median_ms']:8.2f} ms   p10 {times['p10_ms']:8.2f} ms")
    print(f"\nall distances of {N:,} clips from {N:,} references")
    for name, found in set_times.items():
        print(f"  {name:20} {found['seconds']:8.2f} s    {found['windows']} windows of {found['width']} values a clip")
    totals = {
        name: {e: N * metrics["whole"]["median_ms"] / 1e3 + found["seconds"] for e, found in set_times.items()}
        for name, metrics in results.items()
    }
    print(f"\nmusic metrics and distances of {N:,} clips")
    for name, seconds in totals.items():
        print(f"  {name:20} {', '.join(f'{embedder} {total:.1f} s' for embedder, total in seconds.items())}")
    found = {"results": results, "distances": set_times, "thousand_clips_s": totals}
    OUT.write_text(json.dumps({"environment": environment(), **found}, indent=1) + "\n")
    print(f"\n{OUT}")


def distances(name: str) -> dict[str, float]:
    """Seconds for all distances and intervals of random embeddings with the shape of an embedder's."""
    torch.manual_seed(0)
    none = torch.zeros(0)
    embedder = load_embedder(name)
    windows = int(SECONDS / embedder.seconds)
    sets = [ClipEmbeddings(torch.randn(N, windows, embedder.dim) + shift, none, none) for shift in (0.0, 0.1)]
    start = time.process_time()
    set_distances(*sets)
    return {"seconds": time.process_time() - start, "windows": windows, "width": embedder.dim}


def write_clip(path: Path, index: int, rate: int, channels: int) -> Path:
    """Write ten seconds of a built-in piece; a second channel is slightly delayed."""
    mono = torch.from_numpy(render(compose(11, index)))[None, : SECONDS * 24_000]
    wav = audio.resample(torch.cat([mono.roll(20 * c, 1) for c in range(channels)]), 24_000, rate)
    return audio.write(path, wav.clamp(-1, 1), rate)


def timed(calls: list[Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median and tenth percentile of a call, over all calls and rounds."""
    spans = []
    for _ in range(rounds):
        for call in calls:
            start = time.process_time()
            call()
            spans.append(1e3 * (time.process_time() - start))
    return {"median_ms": float(np.median(spans)), "p10_ms": float(np.quantile(spans, 0.1))}


def parts(path: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Times of each group of metrics."""
    wav, rate = audio.read(path, mono=False)
    mono = features.rms_normalise(audio.resample(audio.to_mono(wav), rate, features.SAMPLE_RATE))
    curve = tempo.envelope(features.onset_strength(mono)[0])
    bpm = tempo.tempo(curve)
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: audio.read(path, mono=False),
        "resample": lambda: audio.resample(audio.to_mono(wav), rate, features.SAMPLE_RATE),
        "loudness": lambda: audio.integrated_loudness(wav, rate),
        "true peak": lambda: signal_stats.true_peak(wav),
        "spectrum": lambda: signal_stats.brightness(signal_stats.spectrum(wav), rate),
        "onsets, tempo, beats": lambda: tempo.beats(tempo.envelope(features.onset_strength(mono)[0]), bpm),
        "key": lambda: key.key(features.chroma_log_frequency(mono)[0]),
        "repetition": lambda: repetition(features.log_mel(mono)[0]),
    }
    return {name: timed([call], rounds) for name, call in calls.items()}


if __name__ == "__main__":
    main()
