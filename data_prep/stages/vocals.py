"""The stage `vocals`: the voices of a shard's segments taken out, or the segments with voices refused."""

from pathlib import Path
from typing import Any

from data_prep.audio.quality import Filters, judge, measure
from data_prep.audio.vocals import VocalDetection, VocalRemoval
from data_prep.shard_task import Counts
from data_prep.stages.segments import Segments, write_segments, write_sound
from data_prep.tables import write_rejected
from data_prep.track import Rejection
from ssmttm import audio


def detect_shard(detection: VocalDetection, segments: Segments, folder: Path) -> Counts:
    """Keep the segments in which nobody is heard."""
    kept, rejected = [], []
    for row in segments.read():
        rejection = detection.rejection(*audio.read(segments.audio / row["audio"]))
        if rejection is None:
            kept.append(row)
        else:
            rejected.append(rejection.of(row["id"]))
    return _finish(folder, kept, rejected)


def remove_shard(removal: VocalRemoval, filters: Filters, segments: Segments, folder: Path) -> Counts:
    """Take the voices out of every segment; one of which too little is left is refused."""
    kept, rejected = [], []
    for row in segments.read():
        wav, rate = audio.read(segments.audio / row["audio"])
        rest = removal.remove(wav, rate)  # [1, S]
        quality = measure(rest.numpy(), rate)
        rejection = judge(quality, filters)
        if rejection is not None:
            rejected.append(rejection.of(row["id"]))
            continue
        facts = write_sound(folder / row["audio"], rest[0], rate)
        done = f"{row['modifications']}; {removal.modification}"
        kept.append(row | facts | {"loudness": quality.loudness, "modifications": done})
    return _finish(folder, kept, rejected)


def _finish(folder: Path, kept: list[dict[str, Any]], rejected: list[Rejection]) -> Counts:
    write_segments(folder, kept)
    write_rejected(folder, "vocals", rejected)
    seconds = sum(row["duration"] for row in kept)
    return {"segments": len(kept), "rejected": len(rejected), "seconds": seconds}
