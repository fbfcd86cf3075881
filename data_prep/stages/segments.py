"""What the stages after `select` pass on: shards of manifest rows and their audio."""

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
from ssmttm.audio.stereo import STEREO, stereo_statistics
from ssmttm.data.store import STEREO_COLUMNS, manifest_schema

ROWS_FILE = "rows.parquet"


@dataclass(frozen=True)
class Segments:
    """The segments of a shard."""

    key: str  # name of the shard
    rows: Path  # Parquet table with the columns of a store's manifest
    audio: Path  # folder that the column `audio` is relative to
    inputs: str  # hash of rows and audio

    def read(self) -> list[dict[str, Any]]:
        """The rows, in order."""
        return pq.read_table(self.rows).to_pylist()


def write_segments(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a shard into its folder."""
    schema = manifest_schema(channels_of(rows))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / ROWS_FILE)


def channels_of(rows: Sequence[dict[str, Any]]) -> int:
    """1 or 2: whether segments have the columns of stereo audio."""
    return STEREO if any(row.get(STEREO_COLUMNS[0].name) is not None for row in rows) else 1


def write_audio(path: Path, wav: Tensor, sample_rate: int) -> dict[str, Any]:
    """Write a waveform, [S] or [2, S], as 16-bit FLAC, scaled down if it exceeds full scale.

    Returns:
        The columns `id`, `duration`, `audio` and `content_hash` of the segment's row; of stereo also STEREO_COLUMNS.
    """
    scaled = wav / max(1.0, float(wav.abs().max())) * 32768  # 16-bit input is unchanged
    pcm = scaled.round().clamp(-32768, 32767).to(torch.int16)
    audio.write(path, pcm, sample_rate)
    columns = {
        "id": path.stem,
        "duration": pcm.shape[-1] / sample_rate,
        "audio": f"{path.parent.name}/{path.name}",
        "content_hash": hashlib.sha256(pcm.numpy().T.astype("<i2").tobytes()).hexdigest(),  # interleaved
    }
    return columns if pcm.dim() == 1 else columns | stereo_statistics(wav.numpy())._asdict()


def with_results(segments: Sequence[Segments], results: Sequence[ShardResult], new_audio: bool) -> list[Segments]:
    """The shards after a stage that wrote new rows, and new audio if `new_audio`."""
    pairs = list(zip(segments, results, strict=True))
    if new_audio:
        return [Segments(old.key, new.folder / ROWS_FILE, new.folder, new.outputs) for old, new in pairs]
    return [Segments(old.key, new.folder / ROWS_FILE, old.audio, f"{new.outputs} {old.inputs}") for old, new in pairs]
