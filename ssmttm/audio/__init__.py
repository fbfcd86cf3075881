"""Audio files and signal processing: reading, writing, resampling, loudness, features, fingerprints.

Names are imported on first use: the decoder process of `data_prep` needs `ssmttm.audio.containers` without torch.
"""

from typing import TYPE_CHECKING, Any

from ssmttm.errors import import_attribute

if TYPE_CHECKING:
    from ssmttm.audio.defects import check_music, defect, read_music
    from ssmttm.audio.io import (
        WRITERS,
        check_file,
        read,
        read_comment,
        read_crop,
        read_part,
        read_segments,
        resample,
        to_mono,
        write,
    )
    from ssmttm.audio.loudness import integrated_loudness, normalise_loudness

__all__ = [
    "WRITERS",
    "check_file",
    "check_music",
    "defect",
    "integrated_loudness",
    "normalise_loudness",
    "read",
    "read_comment",
    "read_crop",
    "read_music",
    "read_part",
    "read_segments",
    "resample",
    "to_mono",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ssmttm.audio' has no attribute {name!r}")
    if name in ("check_music", "defect", "read_music"):
        return import_attribute("ssmttm.audio.defects", name)
    if name in ("integrated_loudness", "normalise_loudness"):
        return import_attribute("ssmttm.audio.loudness", name)
    return import_attribute("ssmttm.audio.io", name)
