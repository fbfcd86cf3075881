"""The stage `captions`: captions of a shard's segments from tags, from an audio language model, and other wordings."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from data_prep.shard_task import Counts
from data_prep.stages.captions.captions import CaptionOptions, describe
from data_prep.stages.segments import Segments, write_segments
from data_prep.tables import write_rejected
from ssmttm import audio


def caption_shard(describing: CaptionOptions, segments: Segments, folder: Path) -> Counts:
    """Write the rows with their captions. A segment of which the model has nothing to say keeps the others."""
    rows = segments.read()

    def sounds() -> Iterator[tuple[Tensor, int]]:
        return (audio.read(segments.audio / row["audio"]) for row in rows)

    columns = ([row[name] or [] for row in rows] for name in ("captions", "tags"))
    captions, rejected = describe([row["id"] for row in rows], *columns, describing, sounds())
    write_segments(folder, [row | {"captions": said} for row, said in zip(rows, captions, strict=True)])
    write_rejected(folder, "captions", rejected)
    return {"segments": len(rows), "rejected": len(rejected), "captions": sum(map(len, captions))}
