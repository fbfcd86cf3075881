"""Uploaded clips that music can go on from, kept in memory."""

import secrets
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.web.limits import Limits

_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Clip:
    """Audio [1, S] at its rate, and the name of the file it came from."""

    name: str
    wav: Tensor
    sample_rate: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.wav.shape[-1] / self.sample_rate


class Clips:
    """The last `limits.clips` uploads, by an id that cannot be guessed. Safe in several threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._clips: OrderedDict[str, Clip] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, file: BinaryIO, name: str, sample_rate: int) -> tuple[str, Clip]:
        """Decode a file and keep it. Raises UserError as `read_clip`.

        Returns:
            The id and the clip, at `sample_rate`.
        """
        clip = read_clip(file, name, sample_rate, self._limits.clip_seconds)
        key = secrets.token_urlsafe(9)
        with self._lock:
            self._clips[key] = clip
            while len(self._clips) > self._limits.clips:
                self._clips.popitem(last=False)
        return key, clip

    def get(self, key: str) -> Clip:
        """The clip of an id. Raises UserError if there is none, or it was dropped for newer ones."""
        with self._lock:
            if key not in self._clips:
                raise UserError("there is no clip of this id (only the newest are kept): upload it again")
            self._clips.move_to_end(key)
            return self._clips[key]


def read_clip(file: BinaryIO, name: str, sample_rate: int, longest: float) -> Clip:
    """Decode an audio file second by second and stop at the limit, so that memory stays bounded whatever the file
    claims or unpacks to. Raises UserError if it is not audio, is damaged, or is longer than `longest` seconds."""
    name = Path(name).name or "clip"
    with tempfile.TemporaryDirectory(prefix="ssmttm-") as folder:
        path = Path(folder) / f"upload{Path(name).suffix}"
        with path.open("wb") as copy:
            while piece := file.read(_PIECE):
                copy.write(piece)
        segments: list[Tensor] = []
        try:
            for segment in audio.read_segments(path, sample_rate, 1.0):
                segments.append(segment)
                if len(segments) > longest + 1:
                    raise UserError(f"{path} is longer than {longest:g} s: cut it")
        except UserError as error:
            raise UserError(str(error).replace(str(path), name)) from error
    return Clip(name, torch.cat(segments, dim=-1), sample_rate)
