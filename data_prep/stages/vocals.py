"""The stage `vocals`: the voices of a shard's segments taken out, or the segments with voices refused."""

from pathlib import Path
from typing import Any

from data_prep.audio.quality import Filters, judge, measure
from data_prep.audio.vocals import VocalDetection, VocalRemoval
from data_prep.shard_task import Counts
from data_prep.stages.segments import Segments, write_segments, write_sound
from data_prep.tables import write_quarantine
from data_prep.track import Refusal
from ssmttm import audio


def detect_shard(detection: VocalDetection, segments: Segments, folder: Path) -> Counts:
    """Keep the segments in which nobody is heard."""
    kept, refused = [], []
    for row in segments.read():
        refusal = detection.refusal(*audio.read(segments.audio / row["audio"]))
        if refusal is None:
            kept.append(row)
        else:
            refused.append(refusal.of(row["id"]))
    return _finish(folder, kept, refused)


def remove_shard(removal: VocalRemoval, filters: Filters, segments: Segments, folder: Path) -> Counts:
    """Take the voices out of every segment; one of which too little is left is refused."""
    kept, refused = [], []
    for row in segments.read():
        wav, rate = audio.read(segments.audio / row["audio"])
        rest = removal.remove(wav, rate)  # [1, S]
        quality = measure(rest.numpy(), rate)
        refusal = judge(quality, filters)
        if refusal is not None:
            refused.append(refusal.of(row["id"]))
            continue
        facts = write_sound(folder / row["audio"], rest[0], rate)
        done = f"{row['modifications']}; {removal.modification}"
        kept.append(row | facts | {"loudness": quality.loudness, "modifications": done})
    return _finish(folder, kept, refused)


def _finish(folder: Path, kept: list[dict[str, Any]], refused: list[Refusal]) -> Counts:
    write_segments(folder, kept)
    write_quarantine(folder, "vocals", refused)
    seconds = sum(row["duration"] for row in kept)
    return {"segments": len(kept), "refused": len(refused), "seconds": seconds}
