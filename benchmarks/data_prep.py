"""Speed and memory of data_prep: python -m benchmarks.data_prep

stages   all stages but the codec on FLAC and WAV files (44.1 kHz stereo), in seconds of audio per second of CPU time of
         the process and its decoder
codec    the stage `codes` against the codec alone on the same windows, on one core and with a second one for reading
memory   peak of a run over folders of 1, 2, 4 and 8 times the files
rows     a million tracks: plan, select; a store of a million rows: open, filter, split, sample

Writes benchmarks/results/data_prep.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile as sf
import torch

from benchmarks.paired import environment
from data_prep.builtin import compose, render
from data_prep.stages.captions.stage import CaptionOptions, caption_shard
from data_prep.stages.cut import Cut, cut_shard
from data_prep.stages.embed import TextOptions, embed_shard
from data_prep.stages.encode import CodecOptions, Windows, encode_shard
from data_prep.stages.pack import Parts, pack
from data_prep.stages.plan import write_plan
from data_prep.stages.segments import ROWS_FILE, Segments
from data_prep.stages.select import select_shards
from data_prep.stages.selection.tracks import select_tracks
from data_prep.tables import RECORDINGS, TRACKS
from data_prep.track import Track
from ssmttm import audio
from ssmttm.data import CodesLoader, StoreWriter, open_store

OUT = Path(__file__).parent / "results" / "data_prep.json"
RATE, CODEC_RATE, SEGMENT = 44_100, 24_000, 30.0
MILLION = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"stages": stages, "codec": codec, "memory": memory, "rows": rows}
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="parts to run (default: all)")
    names = parser.parse_args().parts or list(parts)
    torch.set_num_threads(1)
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = parts[name](Path(folder)) | {"environment": environment()}
            print(name, json.dumps(results[name], indent=1))
    OUT.write_text(json.dumps(results, indent=1) + "\n")


def write_music(folder: Path, files: int, seconds: int, suffix: str, first: int = 0) -> list[Track]:
    """Write stereo files of built-in music, of joined pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    tracks = []
    for index in range(first, first + files):
        pieces = [render(compose(91, index * 8 + part)) for part in range(-(-seconds // 40))]
        mono = audio.resample(torch.from_numpy(np.concatenate(pieces)), CODEC_RATE, RATE).numpy()[: seconds * RATE]
        name = f"{index:04d}.{suffix}"
        sf.write(folder / name, np.stack([mono, 0.8 * np.roll(mono, 11)], axis=1), RATE)
        tags = ("genre---rock", "instrument---guitar", "mood/theme---happy")
        tracks.append(Track(name, name, "CC-BY-4.0", f"Title {index}", "Somebody", artist=f"a{index % 7}", tags=tags))
    return tracks


def cpu() -> float:
    """CPU seconds of this process and its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed(function: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = cpu()
    function()
    return cpu() - start


def stages(folder: Path) -> dict[str, Any]:
    """All stages but the codec on one shard."""
    results = {}
    for suffix in ("flac", "wav"):
        root = folder / suffix
        tracks = write_music(root, 4, 300, suffix)
        results[suffix] = one_shard(root, tracks, folder / f"{suffix} work", TextOptions("minilm", "cpu"))
    return results


def one_shard(root: Path, tracks: list[Track], work: Path, text_options: TextOptions) -> dict[str, Any]:
    """Seconds of audio per CPU second, of each stage and of all; the models are loaded before."""
    plan, shard, selected, captions, text = (work / name for name in ("plan", "00000", "select", "captions", "text"))
    for path in (plan, shard, selected, captions, text):
        path.mkdir(parents=True)
    text_options.encoder.encode(["warm-up"])
    cut = Cut(CODEC_RATE, SEGMENT)
    seconds_of = {
        "plan": timed(lambda: write_plan(tracks, root, None, "open", plan)),
        "cut": timed(lambda: cut_shard(root, plan, 0, cut, shard)),
        "select": timed(lambda: select_shards([shard], [], "cut", selected)),
    }
    segments = Segments("00000", selected / "00000" / ROWS_FILE, shard, "")
    seconds_of["captions"] = timed(lambda: caption_shard(CaptionOptions(), segments, captions))
    captioned = Segments("00000", captions / ROWS_FILE, shard, "")
    seconds_of["text"] = timed(lambda: embed_shard(text_options, captioned, text))
    parts = Parts([captioned], None, [text], [])
    seconds_of["pack"] = timed(lambda: pack(parts, work / "store", {}, None, text_options.metadata(), CODEC_RATE))
    seconds = sum(row["duration"] for row in captioned.read())
    rates = {name: round(seconds / value) for name, value in seconds_of.items()}
    speed = round(seconds / sum(seconds_of.values()), 1)
    return {"seconds": seconds, "x real time per core": speed, "of each stage": rates}


def codec(folder: Path) -> dict[str, Any]:
    """The stage against the codec alone: wall time of five alternating rounds."""
    root = folder / "music"
    tracks = write_music(root, 4, 300, "flac")
    segments = cut_segments(root, tracks, folder)
    options = CodecOptions("tiny", Windows(SEGMENT), "cpu")
    wavs = [audio.read(segments.audio / row["audio"], CODEC_RATE)[0] for row in segments.read()]
    size, batch = options.windows.batch, torch.stack([wav[:, : wavs[0].shape[1]] for wav in wavs])  # [n, 1, S]

    def codec_alone() -> None:
        for first in range(0, len(batch), size):
            options.codec.encode(batch[first : first + size])

    def stage() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as target:
            encode_shard(options, segments, Path(target))

    results: dict[str, Any] = {"seconds": len(batch) * SEGMENT}
    cores = sorted(os.sched_getaffinity(0))
    with torch.inference_mode():
        for name, allowed in {"one core": cores[:1], "a second core for reading": cores[:2]}.items():
            os.sched_setaffinity(0, allowed)
            stage(), codec_alone()
            rounds = [(wall(codec_alone), wall(stage)) for _ in range(5)]
            ratios = sorted(with_stage / alone for alone, with_stage in rounds)
            results[name] = {"codec alone": round(min(a for a, _ in rounds), 3),
                             "stage": round(min(b for _, b in rounds), 3),
                             "ratio, median": round(ratios[len(ratios) // 2], 3)}  # fmt: skip
    os.sched_setaffinity(0, cores)
    return results


def wall(function: Callable[[], Any]) -> float:
    """Wall time of one call in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cut_segments(root: Path, tracks: list[Track], folder: Path) -> Segments:
    plan, shard, selected = folder / "plan", folder / "00000", folder / "select"
    for path in (plan, shard, selected):
        path.mkdir()
    write_plan(tracks, root, None, "open", plan)
    cut_shard(root, plan, 0, Cut(CODEC_RATE, SEGMENT), shard)
    select_shards([shard], [], "cut", selected)
    return Segments("00000", selected / "00000" / ROWS_FILE, shard, "")


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory in MiB of the largest process of `python -m data_prep folder`."""
    source = write_music(folder / "source", 8, 120, "flac")
    results = {}
    for times in (1, 2, 4, 8):
        root = folder / f"{times}"
        root.mkdir()
        for copy in range(times):
            for track in source:
                shifted, rate = sf.read(folder / "source" / track.path, dtype="int16")
                shifted = np.roll(shifted, copy * rate * 7, axis=0)
                sf.write(root / f"{copy}-{track.path}", shifted, rate)
        words = ["folder", "--root", root, "--out", folder / f"store {times}", "--licence", "CC0-1.0", "--workers", "2"]
        program = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        command = [sys.executable, "-c", program, sys.executable, "-m", "data_prep", *map(str, words)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        results[f"{times * len(source)} files"] = round(int(output[-1]) / 1024)
    return results


def rows(folder: Path) -> dict[str, Any]:
    """Wall time in seconds of operations on a million tracks, or rows of a store."""
    results: dict[str, float] = {}
    plan = folder / "plan"
    plan.mkdir()
    results["plan"] = round(wall(lambda: write_plan(many_tracks(), folder, None, "open-sa", plan)), 1)
    results["select"] = round(wall(partial(select_tracks, *many_tables(), [np.empty(0, np.uint32)] * MILLION)), 1)
    path = folder / "store"
    results["write"] = round(wall(lambda: write_store(path)), 1)
    results["open"] = round(wall(lambda: open_store(path)), 2)
    store = open_store(path)
    free = pc.is_in(store.manifest["licence"], pa.array(["CC0-1.0", "CC-BY-4.0"]))
    results["filter by licence"] = round(wall(lambda: store.manifest.filter(free)), 2)
    results["filter by tag"] = round(wall(partial(by_tag, store.manifest)), 2)
    results["rows of a split"] = round(wall(lambda: store.indices("train")), 3)
    loader = CodesLoader(store, "train", 64, 10, 0)
    results["rows of 1,000 batches of 64"] = round(wall(lambda: [loader.sample(n) for n in range(1000)]), 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": results, "peak MiB": round(peak)}


def by_tag(manifest: pa.Table) -> pa.Table:
    """Rows with the tag `genre---rock`."""
    tags = manifest["tags"].combine_chunks()
    parents = pc.list_parent_indices(tags).filter(pc.equal(pc.list_flatten(tags), "genre---rock"))
    return manifest.take(pc.unique(parents))


def many_tracks() -> Iterator[Track]:
    licences = ("CC-BY-4.0", "http://creativecommons.org/licenses/by-sa/3.0/", "CC0-1.0", "CC BY-ND 4.0")
    for index in range(MILLION):
        yield Track(
            f"set:{index}", f"{index % 100:02d}/{index}.mp3", licences[index % 4], f"Title {index}",
            f"Author {index % 5000}", f"https://example.org/{index}", f"set:artist:{index % 5000}", f"set:{index}",
            "list line 1", (), ("genre---rock", "mood/theme---happy"),
        )  # fmt: skip


def many_tables() -> tuple[pa.Table, pa.Table]:
    """TRACKS and RECORDINGS of a million tracks, of which one in a thousand is a copy."""
    numbers = pa.array(range(MILLION)).cast(pa.string())
    kinds = np.arange(MILLION)
    hashes = pa.array(np.where(kinds % 1000 == 0, kinds // 2, kinds)).cast(pa.string())
    texts = {"id": numbers, "path": numbers, "artist": pa.array(kinds % 5000).cast(pa.string()), "work": numbers,
             "licence": pa.array(["CC-BY-4.0"] * MILLION), "captions": pa.array([[]] * MILLION, pa.list_(pa.string())),
             "tags": pa.array([["genre---rock"]] * MILLION)}  # fmt: skip
    empty = pa.array([""] * MILLION)
    tracks = pa.table({name: texts.get(name, empty) for name in TRACKS.names}, TRACKS)
    seconds = pa.array(np.full(MILLION, 180.0))
    return tracks, pa.table(
        {"id": numbers, "file_sha256": hashes, "pcm_sha256": hashes, "seconds": seconds}, RECORDINGS
    )


def write_store(path: Path) -> None:
    """A million rows with ten frames of codes each."""
    codec = {"name": "synthetic", "fingerprint": "0" * 16, "sample_rate": CODEC_RATE, "frame_rate": 10.0,
             "n_codebooks": 2, "codebook_size": 1024}  # fmt: skip
    writer, codes = StoreWriter(path, {"source": "benchmark"}, codec, CODEC_RATE), np.zeros((2, 10), np.uint16)
    licences = ("CC-BY-4.0", "CC-BY-SA-3.0", "CC0-1.0")
    for index in range(MILLION):
        row = {"id": f"{index:07d}", "split": "valid" if index % 20 == 0 else "train", "licence": licences[index % 3],
               "duration": 30.0, "captions": [f"caption {index % 1000}"], "title": f"Title {index}",
               "tags": [("genre---rock", "genre---jazz")[index % 2]], "author": f"Author {index % 5000}"}  # fmt: skip
        writer.add(row, codes)
    writer.finish()


if __name__ == "__main__":
    main()
