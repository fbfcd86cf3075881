"""The stage `cut`: audio files to mono FLAC segments, with the hashes and fingerprints that duplicates are found by."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.audio.decode import Decoder, Limits
from data_prep.audio.quality import Filters, judge, measure
from data_prep.paths import inside
from data_prep.shard_task import Counts
from data_prep.stages.plan import read_shard
from data_prep.stages.segments import write_sound
from data_prep.stages.shard import Row, Shard
from data_prep.track import Rejected, Rejection
from ssmttm import audio
from ssmttm.audio.fingerprint import Fingerprinter
from ssmttm.files import file_sha256

TAILS = {
    "keep": "a shorter last segment stays, from 3 s on",
    "drop": "only whole segments",
    "overlap": "the last segment begins earlier, so that it is whole",
}
MIN_SECONDS = 3.0


@dataclass(frozen=True)
class Cut:
    """How files become segments.

    Attributes:
        sample_rate: of the segments, in Hz.
        segment: their length in seconds.
        tail: a key of TAILS.
        filters: what the segments must be like.
        limits: of time and memory for one file.
    """

    sample_rate: int
    segment: float = 30.0
    tail: str = "keep"
    filters: Filters = field(default_factory=Filters)
    limits: Limits = field(default_factory=Limits)

    def settings(self) -> dict[str, Any]:
        """All that decides what the segments are, for JSON."""
        return asdict(self)

    @property
    def shortest(self) -> float:
        """Seconds; what is shorter is no segment."""
        return self.segment if self.tail == "drop" else min(MIN_SECONDS, self.segment)

    @property
    def modifications(self) -> str:
        """What was done to the sound, for the attribution."""
        return f"mixed down to mono, resampled to {self.sample_rate} Hz, cut to segments of {self.segment:g} s"


def cut_shard(root: Path, plan: Path, index: int, cut: Cut, folder: Path) -> Counts:
    """Cut the tracks of a plan's shard into `folder`."""
    shard = Shard()
    with Decoder(cut.limits) as decoder:
        for track in read_shard(plan, index):
            try:
                _cut_track(track, inside(root, track["path"]), decoder, cut, folder, shard)
            except Rejected as rejection:
                shard.rejected.append(rejection.of(track["id"]))
    return shard.write(folder, "cut")


def _cut_track(track: Row, path: Path, decoder: Decoder, cut: Cut, folder: Path, shard: Shard) -> None:
    """Add one track to the shard. Raises Refused, and leaves nothing of it, if it cannot be used."""
    ear, name = _StreamStatistics(), hashlib.sha256(track["id"].encode()).hexdigest()[:16]
    segments: list[Row] = []
    rejected: list[Rejection] = []
    try:
        for index, channels in enumerate(pieces(ear.listen(decoder.blocks(path)), cut)):
            quality = measure(channels, ear.rate)
            rejection = judge(quality, cut.filters)
            if rejection is not None:
                rejected.append(rejection.of(f"{track['id']} segment {index}"))
                continue
            wav = audio.resample(torch.from_numpy(channels.mean(axis=0)), ear.rate, cut.sample_rate)  # [S]
            facts = write_sound(folder / f"audio/{name}-{index:04d}.flac", wav, cut.sample_rate)
            segments.append({"track": track["id"], "loudness": quality.loudness, **facts})
        if not segments:
            raise _nothing_left(rejected, cut)
        digest = _digest(path)
    except Rejected:
        for segment in segments:
            (folder / segment["audio"]).unlink()
        raise
    shard.tracks.append(track)
    shard.sounds.append({"id": track["id"], "file_sha256": digest, **ear.facts()})
    shard.words.append(ear.words())
    shard.segments += segments
    shard.rejected += rejected


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise Rejected("missing", f"it went away while it was read ({error.strerror or error})") from error


class _StreamStatistics:
    """Hears a track once: its length, the hash of its samples, its fingerprint."""

    def __init__(self) -> None:
        self.rate = 0
        self._samples = 0
        self._pcm = hashlib.sha256()
        self._fingerprinter: Fingerprinter | None = None

    def listen(self, blocks: Iterable[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
        """Pass blocks [C, s] and their rate on."""
        for block, rate in blocks:
            if self._fingerprinter is None:
                self.rate, self._fingerprinter = rate, Fingerprinter(rate)
            self._samples += block.shape[1]
            self._pcm.update(np.ascontiguousarray(block.T))
            self._fingerprinter.add(block.mean(axis=0))
            yield block, rate

    def facts(self) -> Row:
        return {"pcm_sha256": self._pcm.hexdigest(), "seconds": self._samples / self.rate}

    def words(self) -> np.ndarray:
        """uint32 [n]."""
        assert self._fingerprinter is not None
        return self._fingerprinter.finish()


def pieces(blocks: Iterable[tuple[np.ndarray, int]], cut: Cut) -> Iterator[np.ndarray]:
    """Segments [C, S] at the file's own rate from its blocks [C, s], the tail as `cut` says."""
    held: list[np.ndarray] = []
    length, size, rate, before = 0, 0, 0, None
    for block, rate in blocks:
        length = round(cut.segment * rate)
        held.append(block)
        size += block.shape[1]
        while size >= length:
            joined = np.concatenate(held, axis=1)
            before, rest = joined[:, :length], joined[:, length:]
            held, size = [rest], rest.shape[1]
            yield before
    if size == 0 or size < cut.shortest * rate:
        return
    tail = np.concatenate(held, axis=1)
    if cut.tail == "overlap" and before is not None:
        tail = np.concatenate([before, tail], axis=1)[:, -length:]
    yield tail


def _nothing_left(rejected: list[Rejection], cut: Cut) -> Rejected:
    if not rejected:
        return Rejected("short", f"it is shorter than {cut.shortest:g} s")
    if len(rejected) == 1:
        return Rejected(rejected[0].kind, rejected[0].reason)
    reason = f"none of its {len(rejected)} segments can be used; of the first, {rejected[0].reason}"
    return Rejected(rejected[0].kind, reason)
