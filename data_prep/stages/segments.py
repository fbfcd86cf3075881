"""What passes from stage to stage after the selection: a shard of manifest rows, and where their audio lies."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data_prep.shard_task import ShardResult
from ssmttm import audio
from ssmttm.data.store import SCHEMA

ROWS_FILE = "rows.parquet"


@dataclass(frozen=True)
class Segments:
    """A shard's segments.

    Attributes:
        key: the shard's name.
        rows: a Parquet table with a store's columns; `audio` is a path inside `audio`.
        audio: the folder with the sound.
        inputs: a hash of rows and sound.
    """

    key: str
    rows: Path
    audio: Path
    inputs: str

    def read(self) -> list[dict[str, Any]]:
        """The rows, in order."""
        return pq.read_table(self.rows).to_pylist()


def write_segments(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write a shard's rows into its folder."""
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / ROWS_FILE)


def write_sound(path: Path, wav: Tensor, sample_rate: int) -> dict[str, Any]:
    """Write a segment's waveform [S] as 16-bit FLAC, scaled down where it goes beyond full scale.

    Returns:
        Its row's `id`, `duration`, `audio` (in a folder of that name) and `content_hash`.
    """
    scaled = wav / max(1.0, float(wav.abs().max())) * 32768  # what was 16 bit stays as it is
    pcm = scaled.round().clamp(-32768, 32767).to(torch.int16)
    audio.write(path, pcm, sample_rate)
    return {
        "id": path.stem,
        "duration": len(pcm) / sample_rate,
        "audio": f"{path.parent.name}/{path.name}",
        "content_hash": hashlib.sha256(pcm.numpy().astype("<i2").tobytes()).hexdigest(),
    }


def with_results(segments: Sequence[Segments], done: Sequence[ShardResult], audio: bool) -> list[Segments]:
    """The same shards after a stage that wrote their rows anew, and their audio too where `audio` is true."""
    return [
        Segments(old.key, new.folder / ROWS_FILE, new.folder if audio else old.audio, new.outputs if audio else
                 f"{new.outputs} {old.inputs}")
        for old, new in zip(segments, done, strict=True)
    ]  # fmt: skip
