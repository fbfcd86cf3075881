"""Students of a codec's decoder against that decoder: held-out music, parameters, FLOPs, and time on one thread.

    python benchmarks/codec_students.py --store STORE transfer=exported/student scratch=exported/other

Quality: the first clips of the store's test split, encoded by the teacher and decoded by each codec; bootstrap 95 %
intervals of the mean difference of two decoders on the same clips. Time: whole clips, and streams in chunks of five
frames.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import environment, paired, summary
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.codecs import Codec, StudentCodec, load_codec
from ssmttm.codecs.metrics import codec_quality
from ssmttm.codecs.students.cost import decoding_cost
from ssmttm.data import open_store

TEACHER = "teacher"
QUALITY = ("mel_distance", "chroma_similarity", "onset_f")
SECONDS, CHUNK = 10.0, 5  # clip length; frames per streamed chunk


def held_out(store_path: str, clips: int, sample_rate: int) -> list[Tensor]:
    """The first seconds of test segments, [1, 1, S] each."""
    store = open_store(store_path)
    rows = store.indices("test")[:clips]
    length = round(SECONDS * sample_rate)
    parts = (audio.read_part(store.audio_path(int(row)), 0, length)[0] for row in rows)
    return [torch.from_numpy(part)[None, None] for part in parts]


def quality(codecs: dict[str, Codec], clips: list[Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of every clip, [n], by codec."""
    metrics: dict[str, list[dict[str, float]]] = {name: [] for name in codecs}
    for clip in tqdm(clips, desc="held-out clips", leave=False):
        for name, codec in codecs.items():
            metrics[name].append(codec_quality(codec, clip, codecs[TEACHER]))
    return {name: {key: np.array([row[key] for row in rows]) for key in QUALITY} for name, rows in metrics.items()}


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(0).integers(len(values), size=(4000, len(values)))
    return [float(end) for end in np.percentile(values[draws].mean(1), (2.5, 97.5))]


def compare(metrics: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Means, and differences of each codec from each one before it."""
    names = list(metrics)
    means = {name: {key: float(values.mean()) for key, values in rows.items()} for name, rows in metrics.items()}
    pairs = [(a, b) for i, b in enumerate(names) for a in names[:i]]
    differences = {
        f"{b} - {a}": {key: interval(metrics[b][key] - metrics[a][key]) for key in QUALITY} for a, b in pairs
    }
    return {"means": means, "differences_95": differences}


def decode_case(codec: Codec, codes: Tensor) -> Callable[[], object]:
    return lambda: codec.decode(codes)


def stream_case(codec: Codec, codes: Tensor) -> Callable[[], object]:
    return lambda: list(codec.decode_stream(codes.split(CHUNK, dim=-1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", metavar="NAME=FOLDER", help="exported students of one teacher")
    parser.add_argument("--store", required=True, help="a store, of which the test split is decoded")
    parser.add_argument("--teacher", default="tiny", help="their codec (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/codec_students.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    codecs: dict[str, Codec] = {TEACHER: load_codec(arguments.teacher)}
    for student in arguments.students:
        name, _, folder = student.partition("=")
        codecs[name] = load_codec(folder)
    teacher = codecs[TEACHER]
    for codec in codecs.values():
        assert codec is teacher or (isinstance(codec, StudentCodec) and codec.fingerprint == teacher.fingerprint)

    cost = {name: decoding_cost(codec)._asdict() for name, codec in codecs.items()}
    clips = held_out(arguments.store, arguments.clips, teacher.sample_rate)
    codes = teacher.encode(clips[0])  # [1, K, T]
    seconds = codes.shape[-1] / teacher.frame_rate
    timed = {}
    for kind, make_case in (("whole", decode_case), ("stream", stream_case)):
        times = paired({name: make_case(codec, codes) for name, codec in codecs.items()}, arguments.rounds, kind)
        timed[kind] = summary(times, TEACHER)
        for name, metrics in timed[kind].items():
            metrics["times_real_time"] = 1e3 * seconds / metrics["median_ms"]
            metrics["times_the_teacher"] = 1 / metrics.pop("ratio")
            if kind == "stream":
                metrics["look_ahead_ms"] = codecs[name].look_ahead_ms
                metrics["ms_per_chunk"] = metrics["median_ms"] * CHUNK / codes.shape[-1]
    document = {
        "environment": environment(), "clips": len(clips), "clip_seconds": SECONDS, "chunk_frames": CHUNK,
        "quality": compare(quality(codecs, clips)), "cost": cost, "time": timed,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
