"""Producing the corpus: pieces to 20 s FLAC segments, 16 pieces per shard, the same however shards are distributed."""

import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.audio.quality import measure
from data_prep.builtin.captions import tags, write_captions
from data_prep.builtin.composition.annotations import excerpt
from data_prep.builtin.composition.compose import DURATION, VERSION, compose
from data_prep.builtin.composition.score import Piece
from data_prep.builtin.synth import render, render_stereo
from data_prep.shard_task import Counts, ShardTask, stage_folder
from data_prep.stages.segments import write_audio
from data_prep.stages.shard import Shard
from ssmttm.audio.fingerprint import Fingerprinter
from ssmttm.audio.stereo import mix_down
from ssmttm.data.splits import split_by_hash
from ssmttm.files import config_hash

SAMPLE_RATE = 24_000
SEGMENT = 20.0  # seconds
SHARD_PIECES = 16
_LICENCE_URL = "https://creativecommons.org/publicdomain/zero/1.0/"


def segments(piece: Piece) -> list[tuple[int, int]]:
    """The piece's 20 s segments at 24 kHz as (first sample, number of samples)."""
    length = round(SEGMENT * SAMPLE_RATE)
    return [(start, length) for start in range(0, round(piece.duration * SAMPLE_RATE), length)]


def shard_tasks(root: Path, hours: float, seed: int, channels: int = 1) -> list[ShardTask]:
    """The shards of at least `hours` of music of 1 or 2 channels. Another number of hours changes only the last one."""
    pieces = math.ceil(round(hours * 3600 / DURATION, 6))
    settings = {"version": VERSION, "seed": seed} | ({} if channels == 1 else {"channels": channels})
    folder = stage_folder(root, "render", settings)
    made = []
    for number, first in enumerate(range(0, pieces, SHARD_PIECES)):
        count = min(SHARD_PIECES, pieces - first)
        make = partial(render_shard, seed, first, count, channels=channels)
        made.append(ShardTask(folder / f"{number:05d}", config_hash({"first": first, "pieces": count}), make))
    return made


def render_shard(seed: int, first: int, pieces: int, folder: Path, channels: int = 1) -> Counts:
    """Compose, render and cut pieces `first`, `first` + 1, ... into `folder`, in the layout of the stage `cut`."""
    shard = Shard()
    for index in range(first, first + pieces):
        _add_piece(compose(seed, index), folder, shard, channels)
    return shard.write(folder, "render")


def _add_piece(piece: Piece, folder: Path, shard: Shard, channels: int) -> None:
    sound = render(piece, SAMPLE_RATE) if channels == 1 else render_stereo(piece, SAMPLE_RATE)  # [S] or [2, S]
    for index, (start, length) in enumerate(segments(piece)):
        shard.segments.append(_segment(piece, index, sound[..., start : start + length], folder))
    fingerprinter = Fingerprinter(SAMPLE_RATE)
    fingerprinter.add(sound if channels == 1 else mix_down(sound))
    shard.fingerprints.append(fingerprinter.finish())
    digest, seconds = hashlib.sha256(sound.T.astype("<f4").tobytes()).hexdigest(), sound.shape[-1] / SAMPLE_RATE
    shard.recordings.append({"id": piece.id, "file_sha256": digest, "pcm_sha256": digest, "seconds": seconds})
    shard.tracks.append({
        "id": piece.id, "path": "", "licence": "CC0-1.0", "licence_url": _LICENCE_URL, "title": piece.title,
        "author": "ssmttm", "source_url": "", "artist": "", "work": piece.id, "evidence": "composed by this program",
        "captions": [], "tags": [], "split": split_by_hash(piece.id)})  # fmt: skip


def _segment(piece: Piece, index: int, sound: np.ndarray, folder: Path) -> dict[str, Any]:
    """Write samples [S] or [2, S] as FLAC; returns the segment's row."""
    name, start = f"{piece.id}-{index}", index * SEGMENT
    truth = excerpt(piece, start, min(start + SEGMENT, piece.duration)) | {"segment": index}
    return {
        **write_audio(folder / f"audio/{name}.flac", torch.from_numpy(sound), SAMPLE_RATE),
        "track": piece.id,
        "start": start,
        "track_duration": piece.duration,
        "loudness": measure(np.atleast_2d(sound), SAMPLE_RATE, mixed=sound.ndim == 1).loudness,
        "truth": json.dumps(truth, ensure_ascii=False),
        "captions": write_captions(truth, name),
        "tags": tags(truth),
    }
