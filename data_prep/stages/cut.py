"""The stage `cut`: decode audio files to mono or stereo FLAC segments, with hashes and fingerprints."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.audio.decode import Decoder, Limits
from data_prep.audio.quality import Filters, check_quality, measure
from data_prep.paths import inside
from data_prep.shard_task import Counts
from data_prep.stages.plan import read_shard
from data_prep.stages.segments import write_audio
from data_prep.stages.shard import Row, Shard
from data_prep.track import Rejected, Rejection
from ssmttm import audio
from ssmttm.audio.fingerprint import Fingerprinter
from ssmttm.audio.stereo import STEREO, mix_down, with_channels
from ssmttm.errors import UserError
from ssmttm.files import file_sha256

TAILS = {
    "keep": "keep a shorter last segment of 3 s or more",
    "drop": "full-length segments only",
    "overlap": "start the last segment earlier, so that it has full length",
}
MIN_SECONDS = 3.0


@dataclass(frozen=True)
class Cut:
    """How files are cut to segments."""

    sample_rate: int  # of the segments, in Hz
    segment: float = 30.0  # length in seconds
    tail: str = "keep"  # a key of TAILS
    filters: Filters = field(default_factory=Filters)
    limits: Limits = field(default_factory=Limits)
    channels: int = 1  # of the segments, 1 or 2; one channel is the mean of a file's channels

    def settings(self) -> dict[str, Any]:
        """Everything that decides the segments, as JSON."""
        settings = asdict(self)
        if self.channels == 1:
            del settings["channels"]  # as before there was a choice
        return settings

    @property
    def min_seconds(self) -> float:
        """Length of the shortest segment."""
        return self.segment if self.tail == "drop" else min(MIN_SECONDS, self.segment)

    @property
    def modifications(self) -> str:
        """The modifications of the works, for attribution."""
        mix = "mixed down to mono" if self.channels == 1 else "kept in stereo"
        return f"{mix}, resampled to {self.sample_rate} Hz, cut to segments of {self.segment:g} s"


def cut_shard(root: Path, plan: Path, index: int, cut: Cut, folder: Path) -> Counts:
    """Cut the tracks of one shard of a plan."""
    shard = Shard()
    with Decoder(cut.limits) as decoder:
        for track in read_shard(plan, index):
            try:
                _cut_track(track, inside(root, track["path"]), decoder, cut, folder, shard)
            except Rejected as error:
                shard.rejected.append(error.for_item(track["id"]))
    return shard.write(folder, "cut")


def _cut_track(track: Row, path: Path, decoder: Decoder, cut: Cut, folder: Path, shard: Shard) -> None:
    """Add a track to the shard. Raises Rejected if it cannot be used, and removes its segments."""
    statistics, name = _StreamStatistics(), hashlib.sha256(track["id"].encode()).hexdigest()[:16]
    segments: list[Row] = []
    rejected: list[Rejection] = []
    try:
        blocks = statistics.pass_through(decoder.blocks(path))
        if cut.channels == STEREO:
            blocks = _in_stereo(blocks)
        for index, (start, channels) in enumerate(split_segments(blocks, cut)):
            quality = measure(channels, statistics.rate, mixed=cut.channels == 1)
            rejection = check_quality(quality, cut.filters)
            if rejection is not None:
                rejected.append(rejection.for_item(f"{track['id']} segment {index}"))
                continue
            if cut.channels == 1:
                channels = channels.mean(axis=0)
            wav = audio.resample(torch.from_numpy(channels), statistics.rate, cut.sample_rate)  # [S] or [2, S]
            columns = write_audio(folder / f"audio/{name}-{index:04d}.flac", wav, cut.sample_rate)
            truth = segment_truth(track["truth"], start / statistics.rate, columns["duration"])
            segments.append({"track": track["id"], "start": start / statistics.rate, "loudness": quality.loudness,
                             "truth": truth, **columns})  # fmt: skip
        if not segments:
            raise _no_segments(rejected, cut)
        file_hash = _file_hash(path)
    except Rejected:
        for segment in segments:
            (folder / segment["audio"]).unlink()
        raise
    shard.tracks.append(track)
    shard.recordings.append({"id": track["id"], "file_sha256": file_hash, **statistics.columns()})
    shard.fingerprints.append(statistics.fingerprint())
    shard.segments += [segment | {"track_duration": statistics.seconds} for segment in segments]
    shard.rejected += rejected


def _file_hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise Rejected("missing", f"it disappeared while it was read ({error.strerror or error})") from error


def _in_stereo(blocks: Iterable[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks [C, s] as [2, s]: one channel is doubled. Raises Rejected for more than two."""
    for block, rate in blocks:
        try:
            yield with_channels(block, STEREO, "it"), rate
        except UserError as error:
            raise Rejected("channels", str(error)) from error


class _StreamStatistics:
    """Length, hash of the samples and fingerprint of a stream of audio blocks."""

    def __init__(self) -> None:
        self.rate = 0
        self._samples = 0
        self._hash = hashlib.sha256()
        self._fingerprinter: Fingerprinter | None = None

    def pass_through(self, blocks: Iterable[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the blocks [C, s] and their rate unchanged."""
        for block, rate in blocks:
            if self._fingerprinter is None:
                self.rate, self._fingerprinter = rate, Fingerprinter(rate)
            self._samples += block.shape[1]
            self._hash.update(block.T.tobytes())
            self._fingerprinter.add(mix_down(block))
            yield block, rate

    @property
    def seconds(self) -> float:
        return self._samples / self.rate

    def columns(self) -> Row:
        return {"pcm_sha256": self._hash.hexdigest(), "seconds": self.seconds}

    def fingerprint(self) -> np.ndarray:
        """uint32 [T]."""
        assert self._fingerprinter is not None
        return self._fingerprinter.finish()


def segment_truth(truth: str | None, start: float, seconds: float) -> str | None:
    """The annotations of a track for a segment that begins at `start`: bars are counted from there, with the last line
    before the segment and the first one after it."""
    if not truth:
        return None
    found = json.loads(truth)
    if "bars" in found:
        lines = np.array(found["bars"])
        first, last = np.searchsorted(lines, (start, start + seconds))
        found["bars"] = [round(float(line) - start, 4) for line in lines[max(0, first - 1) : last + 1]]
    return json.dumps(found)


def split_segments(blocks: Iterable[tuple[np.ndarray, int]], cut: Cut) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first sample and the samples [C, S] of segments, at the file's rate, from its blocks [C, s]."""
    buffer: list[np.ndarray] = []
    length, buffered, rate, start, previous = 0, 0, 0, 0, None
    for block, rate in blocks:
        length = round(cut.segment * rate)
        buffer.append(block)
        buffered += block.shape[1]
        while buffered >= length:
            joined = np.concatenate(buffer, axis=1)
            previous, rest = joined[:, :length], joined[:, length:]
            buffer, buffered = [rest], rest.shape[1]
            yield start, previous
            start += length
    if buffered == 0 or buffered < cut.min_seconds * rate:
        return
    tail = np.concatenate(buffer, axis=1)
    if cut.tail == "overlap" and previous is not None:
        tail, start = np.concatenate([previous, tail], axis=1)[:, -length:], start + tail.shape[1] - length
    yield start, tail


def _no_segments(rejected: list[Rejection], cut: Cut) -> Rejected:
    if not rejected:
        return Rejected("short", f"it is shorter than {cut.min_seconds:g} s")
    if len(rejected) == 1:
        return Rejected(rejected[0].kind, rejected[0].reason)
    reason = f"all {len(rejected)} segments are rejected; the first: {rejected[0].reason}"
    return Rejected(rejected[0].kind, reason)
