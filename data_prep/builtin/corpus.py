"""Producing the corpus: pieces to 20 s FLAC segments and manifest rows, in parallel, resumable, reproducible."""

import hashlib
import json
import math
import multiprocessing
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmttm import audio
from ssmttm.errors import UserError

from .captions import describe, tags
from .composer import DURATION, VERSION, compose
from .score import Piece
from .synth import render

SAMPLE_RATE = 24_000
SEGMENT = 20.0  # seconds
_LICENCE_URL = "https://creativecommons.org/publicdomain/zero/1.0/"
_SPLITS = ((90, "train"), (95, "valid"), (100, "test"))


def segments(piece: Piece) -> list[tuple[int, int]]:
    """The piece's 20 s segments at 24 kHz as (first sample, number of samples)."""
    length = round(SEGMENT * SAMPLE_RATE)
    return [(start, length) for start in range(0, round(piece.duration * SAMPLE_RATE), length)]


def split_of(piece_id: str) -> str:
    """The split of a piece, from its identity's hash: 90 % train, 5 % valid, 5 % test."""
    share = int.from_bytes(hashlib.sha256(piece_id.encode()).digest()[:8], "big") % 100
    return next(name for limit, name in _SPLITS if share < limit)


def _stamp(segment_id: str, digest: str) -> str:
    return f"ssmttm builtin v{VERSION} {segment_id} sha256:{digest}"


def _valid(path: Path, segment_id: str) -> str | None:
    """The PCM's hash where the file is whole and of this version, else None."""
    try:
        pcm = audio.read(path)[0][0].numpy() * 32768  # 16 bit: exact
    except UserError:
        return None
    digest = hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest()
    return digest if audio.read_comment(path) == _stamp(segment_id, digest) else None


def _save(path: Path, segment_id: str, pcm: np.ndarray) -> str:
    """Write int16 samples [S] as FLAC; returns their hash."""
    digest = hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest()
    audio.write(path, torch.from_numpy(pcm), SAMPLE_RATE, _stamp(segment_id, digest))
    return digest


def _produce_piece(index: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The manifest rows of one piece, its audio written where it is not there yet."""
    piece = compose(seed, index)
    cuts = segments(piece)
    names = [f"{piece.id}-{i}" for i in range(len(cuts))]
    digests = [_valid(folder / "audio" / f"{name}.flac", name) for name in names]
    if None in digests:
        pcm = np.round(render(piece, SAMPLE_RATE) * 32767).astype(np.int16)
        digests = [_save(folder / "audio" / f"{name}.flac", name, pcm[start : start + length])
                   for name, (start, length) in zip(names, cuts, strict=True)]
    rows = []
    for i, (name, digest) in enumerate(zip(names, digests, strict=True)):
        truth = piece.truth | {"segment": i}
        rows.append({
            "id": name, "shard": -1, "offset": 0, "frames": 0, "captions": describe(truth, name), "tags": tags(truth),
            "split": split_of(piece.id), "licence": "CC0-1.0",
            "licence_url": _LICENCE_URL, "title": piece.title, "author": "ssmttm",
            "source_url": "", "modifications": "20 s segment", "content_hash": digest, "duration": SEGMENT,
            "audio": f"audio/{name}.flac", "truth": json.dumps(truth, ensure_ascii=False)})
    return rows


def produce(hours: float, seed: int, out_dir: str | Path, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Write at least `hours` of audio as `out_dir`/audio/<id>.flac and yield one manifest row a segment, in order.

    The same seed gives the same files whatever the number of processes. Whole files of an earlier run are kept.
    """
    folder = Path(out_dir)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    indices = range(math.ceil(round(hours * 3600 / DURATION, 6)))
    work = partial(_produce_piece, seed=seed, folder=folder)
    if processes <= 1:
        for index in indices:
            yield from work(index)
        return
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with multiprocessing.get_context("spawn").Pool(processes, signal.signal, ignore_interrupt) as pool:
        for rows in pool.imap(work, indices, chunksize=4):
            yield from rows
