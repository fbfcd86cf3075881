"""Audio files and what is computed from audio: reading, writing, resampling, loudness, features, fingerprints."""

from ssmttm.audio.io import (
    WRITERS,
    check_file,
    loudness,
    normalise,
    read,
    read_comment,
    read_crop,
    read_part,
    read_segments,
    resample,
    to_mono,
    write,
)

__all__ = [
    "WRITERS",
    "check_file",
    "loudness",
    "normalise",
    "read",
    "read_comment",
    "read_crop",
    "read_part",
    "read_segments",
    "resample",
    "to_mono",
    "write",
]
