"""The stage `vocals`: remove vocals from the segments of a shard, or reject segments with vocals."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.audio.quality import Filters, check_quality, measure
from data_prep.audio.vocals import VocalDetection, VocalRemoval
from data_prep.shard_task import Counts
from data_prep.stages.segments import Segments, write_audio, write_segments
from data_prep.tables import write_rejected
from data_prep.track import Rejection
from ssmttm import audio
from ssmttm.audio.stereo import mix_down


def detect_shard(detection: VocalDetection, segments: Segments, folder: Path) -> Counts:
    """Keep the segments without vocals."""
    kept, rejected = [], []
    for row in segments.read():
        rejection = detection.rejection(*_read_mix(segments.audio / row["audio"]))
        if rejection is None:
            kept.append(row)
        else:
            rejected.append(rejection.for_item(row["id"]))
    return _write(folder, kept, rejected)


def remove_shard(removal: VocalRemoval, segments: Segments, folder: Path) -> Counts:
    """Remove the vocals of every segment; reject what is silent or defective afterwards."""
    kept, rejected = [], []
    for row in segments.read():
        wav, rate = audio.read(segments.audio / row["audio"], mono=False)
        instrumental = removal.remove(wav, rate)  # [C, S]
        is_mono = len(wav) == 1
        quality = measure(instrumental.numpy(), rate, mixed=is_mono)
        rejection = check_quality(quality, Filters(min_bandwidth=0.0, out_of_phase=not is_mono))
        if rejection is not None:
            rejected.append(rejection.for_item(row["id"]))
            continue
        columns = write_audio(folder / row["audio"], instrumental[0] if is_mono else instrumental, rate)
        modifications = f"{row['modifications']}; {removal.modification}"
        kept.append(row | columns | {"loudness": quality.loudness, "modifications": modifications})
    return _write(folder, kept, rejected)


def _read_mix(path: Path) -> tuple[Tensor, int]:
    """The audio of a segment, mixed to [1, S] without cancelling, and its rate."""
    wav, rate = audio.read(path, mono=False)
    return torch.from_numpy(mix_down(wav.numpy()))[None], rate


def _write(folder: Path, kept: list[dict[str, Any]], rejected: list[Rejection]) -> Counts:
    write_segments(folder, kept)
    write_rejected(folder, "vocals", rejected)
    seconds = sum(row["duration"] for row in kept)
    return {"segments": len(kept), "rejected": len(rejected), "seconds": seconds}
