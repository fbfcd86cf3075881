"""All music metrics of a clip, and of a set of files. docs/music_metrics.md explains each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio import features
from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.bootstrap import mean_interval
from ssmttm.evaluation.music import key, signal_stats, tempo
from ssmttm.evaluation.music.repetition import lag_similarity, repetition

MIN_SECONDS = 0.5
_NOT_AVERAGED = ("seconds", "sample_rate", "channels", "tonic", "mode")


@dataclass(frozen=True)
class ClipMetrics:
    """Metrics of one clip; NaN or None where undefined."""

    seconds: float
    sample_rate: int
    channels: int
    loudness: float  # LUFS
    true_peak: float  # dBTP
    clipped: float  # fraction
    silent: float  # fraction
    clicks: float  # per second
    dc_offset: float  # of full scale
    centroid: float  # Hz
    rolloff: float
    bandwidth: float
    stereo_width: float | None
    stereo_correlation: float | None
    tempo: float  # bpm
    beat_variation: float  # of the intervals between beats
    onset_density: float  # per second
    tonic: str | None
    mode: str | None
    key_clarity: float
    chroma_entropy: float  # bits
    repeated: float  # fraction
    longest_repeat: float  # seconds
    bar_similarity: float  # -1 to 1
    phrase_similarity: float


def measure_clip(wav: Tensor, sample_rate: int) -> ClipMetrics:
    """Metrics of audio [C, S]."""
    seconds = wav.shape[-1] / sample_rate
    if wav.ndim != 2 or seconds < MIN_SECONDS:
        raise UserError(f"audio must be [C, S] of at least {MIN_SECONDS} s, got {list(wav.shape)}, {seconds:.2f} s")
    if not bool(wav.abs().max().isfinite()):
        raise UserError("the audio contains NaN or infinite samples: remove it")
    wav = wav.float()
    width = signal_stats.stereo(wav)
    centroid, rolloff, bandwidth = signal_stats.brightness(signal_stats.spectrum(wav), sample_rate)
    mono = features.rms_normalise(audio.resample(audio.to_mono(wav), sample_rate, features.SAMPLE_RATE))  # [1, s]
    curve = tempo.envelope(features.onset_strength(mono)[0])
    bpm, chroma, mel = tempo.tempo(curve), features.chroma_log_frequency(mono)[0], features.log_mel(mono)[0]
    found_key, repeats, at_lags = key.key(chroma), repetition(mel), lag_similarity(mel, chroma)
    return ClipMetrics(
        seconds=seconds,
        sample_rate=sample_rate,
        channels=len(wav),
        loudness=audio.integrated_loudness(wav, sample_rate),
        true_peak=signal_stats.true_peak(wav),
        clipped=signal_stats.clipped_fraction(wav),
        silent=signal_stats.silent_fraction(wav, sample_rate),
        clicks=signal_stats.clicks(wav, sample_rate),
        dc_offset=signal_stats.dc_offset(wav),
        centroid=centroid,
        rolloff=rolloff,
        bandwidth=bandwidth,
        stereo_width=width and width[0],
        stereo_correlation=width and width[1],
        tempo=bpm or math.nan,
        beat_variation=tempo.beat_variation(tempo.beats(curve, bpm)),
        onset_density=tempo.onset_density(curve),
        tonic=found_key and found_key.tonic,
        mode=found_key and found_key.mode,
        key_clarity=found_key.clarity if found_key else math.nan,
        chroma_entropy=key.chroma_entropy(chroma),
        repeated=repeats.fraction,
        longest_repeat=repeats.longest,
        bar_similarity=at_lags.bar,
        phrase_similarity=at_lags.phrase,
    )


@dataclass(frozen=True)
class FolderMetrics:
    """Metrics of many files."""

    clips: dict[str, ClipMetrics]  # by path
    unreadable: dict[str, str]  # path and reason

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, 95 % bootstrap interval of the mean, median and n of each metric, over the clips where it is defined.

        Stereo metrics are omitted if mono and stereo clips are mixed.
        """
        rows = [asdict(clip) for clip in self.clips.values()]
        summary = {}
        for name in (field.name for field in fields(ClipMetrics) if field.name not in _NOT_AVERAGED):
            values = np.array([row[name] for row in rows if row[name] is not None], dtype=float)
            values = values[np.isfinite(values)]
            if len(values) == 0 or (name.startswith("stereo") and len(values) < len(rows)):
                continue
            mean, low, high = mean_interval(values)
            median = float(np.median(values))
            summary[name] = {"mean": mean, "low": low, "high": high, "median": median, "n": len(values)}
        return summary

    def notes(self) -> list[str]:
        """Skipped files, and mixed sample rates or channels."""
        notes = [f"{path}: skipped, {reason}" for path, reason in self.unreadable.items()]
        rates = sorted({clip.sample_rate for clip in self.clips.values()})
        channels = sorted({clip.channels for clip in self.clips.values()})
        if len(rates) > 1:
            listed = ", ".join(map(str, rates))
            notes.append(f"mixed sample rates ({listed} Hz): centroid, roll-off and bandwidth are not comparable")
        if len(channels) > 1:
            notes.append("mixed mono and stereo files: no stereo metrics")
        return notes

    def document(self) -> dict[str, Any]:
        """The metrics as JSON."""
        clips = {path: asdict(clip) for path, clip in self.clips.items()}
        return {"summary": self.summary(), "notes": self.notes(), "clips": clips, "unreadable": self.unreadable}


def sample_rate_notes(folders: Mapping[str, FolderMetrics]) -> list[str]:
    """A note if named sets of clips have different sample rates."""
    rates = {name: sorted({clip.sample_rate for clip in folder.clips.values()}) for name, folder in folders.items()}
    if len(set(map(tuple, rates.values()))) < 2:
        return []
    listed = "; ".join(f"{name} {', '.join(map(str, found))} Hz" for name, found in rates.items())
    return [f"different sample rates ({listed}): centroid, roll-off and bandwidth are not comparable"]


def measure_files(paths: Sequence[Path], seconds: float | None = None) -> FolderMetrics:
    """Metrics of audio files, of their first `seconds` if given: repetition and others depend on the length.

    Files that are unreadable or hold no music are listed in the result.
    """
    clips, unreadable = {}, {}
    for path in tqdm(paths, desc="music metrics", unit="clip"):
        try:
            clips[str(path)] = measure_clip(*audio.read_music(path, mono=False, seconds=seconds))
        except UserError as error:
            unreadable[str(path)] = str(error)
    if not clips:
        reason = f"; the first: {next(iter(unreadable.values()))}" if unreadable else ""
        raise UserError(f"none of {len(paths)} files can be measured{reason}: give a folder with audio")
    return FolderMetrics(clips, unreadable)
