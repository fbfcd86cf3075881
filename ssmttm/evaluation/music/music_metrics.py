"""All musical measures of a clip, and of a folder of clips, without any network.

What each figure means, and what it cannot tell, stands in docs/measures.md.
"""

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
from ssmttm.evaluation.music import key, signal_stats, tempo
from ssmttm.evaluation.music.repetition import repetition

SHORTEST = 0.5  # seconds
_DRAWS = 1_000
_NOT_SUMMED = ("seconds", "sample_rate", "channels", "tonic", "mode")


@dataclass(frozen=True)
class ClipMeasures:
    """Figures of one clip; NaN or None where it has none.

    Attributes:
        seconds, sample_rate, channels: of the file.
        loudness: LUFS. true_peak: dBTP. clipped, silent: shares. dc_offset: of full scale.
        centroid, rolloff, bandwidth: Hz. stereo_width, stereo_correlation: of two channels.
        tempo: beats a minute. beat_variation: of the time between beats. onset_density: a second.
        tonic, mode, key_clarity, chroma_entropy (bits). repeated: share. longest_repeat: seconds.
    """

    seconds: float
    sample_rate: int
    channels: int
    loudness: float
    true_peak: float
    clipped: float
    silent: float
    dc_offset: float
    centroid: float
    rolloff: float
    bandwidth: float
    stereo_width: float | None
    stereo_correlation: float | None
    tempo: float
    beat_variation: float
    onset_density: float
    tonic: str | None
    mode: str | None
    key_clarity: float
    chroma_entropy: float
    repeated: float
    longest_repeat: float


def measure_clip(wav: Tensor, sample_rate: int) -> ClipMeasures:
    """Measure audio [C, S].

    Raises:
        UserError: under half a second, or NaN or infinite samples.
    """
    seconds = wav.shape[-1] / sample_rate
    if wav.ndim != 2 or seconds < SHORTEST:
        raise UserError(f"{seconds:.2f} s of audio, shape {list(wav.shape)}: give [C, S] of {SHORTEST} s or more")
    if not bool(wav.abs().max().isfinite()):
        raise UserError("the audio holds NaN or infinite samples: leave it out")
    wav = wav.float()
    width = signal_stats.stereo(wav)
    centroid, rolloff, bandwidth = signal_stats.brightness(signal_stats.spectrum(wav), sample_rate)
    mono = features.level(audio.resample(audio.to_mono(wav), sample_rate, features.SAMPLE_RATE))  # [1, s]
    curve = tempo.envelope(features.onset_strength(mono)[0])
    bpm, chroma = tempo.tempo(curve), features.chroma(mono)[0]
    found_key, repeats = key.key(chroma), repetition(features.log_mel(mono)[0])
    return ClipMeasures(
        seconds=seconds,
        sample_rate=sample_rate,
        channels=len(wav),
        loudness=audio.loudness(wav, sample_rate),
        true_peak=signal_stats.true_peak(wav),
        clipped=signal_stats.clipped_share(wav),
        silent=signal_stats.silent_share(wav, sample_rate),
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
        repeated=repeats.share,
        longest_repeat=repeats.longest,
    )


@dataclass(frozen=True)
class FolderMeasures:
    """Measures of many files.

    Attributes:
        clips: by path. unreadable: path and reason of each file that was left out.
    """

    clips: dict[str, ClipMeasures]
    unreadable: dict[str, str]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, median, 95 % bootstrap interval of the mean and n of each figure, over the clips that have it.

        Stereo figures are left out if mono and stereo clips stand side by side: they would speak of some only.
        """
        rows = [asdict(clip) for clip in self.clips.values()]
        told = {}
        for name in (field.name for field in fields(ClipMeasures) if field.name not in _NOT_SUMMED):
            values = np.array([row[name] for row in rows if row[name] is not None], dtype=float)
            values = values[np.isfinite(values)]
            if len(values) == 0 or (name.startswith("stereo") and len(values) < len(rows)):
                continue
            low, high = _interval(values)
            mean, median = float(values.mean()), float(np.median(values))
            told[name] = {"mean": mean, "low": low, "high": high, "median": median, "n": len(values)}
        return told

    def notes(self) -> list[str]:
        """What a reader of the figures must know: files left out, rates and channels that are mixed."""
        notes = [f"{path}: left out, {reason}" for path, reason in self.unreadable.items()]
        rates = sorted({clip.sample_rate for clip in self.clips.values()})
        channels = sorted({clip.channels for clip in self.clips.values()})
        if len(rates) > 1:
            listed = ", ".join(map(str, rates))
            notes.append(f"mixed sample rates ({listed} Hz): centroid, roll-off and bandwidth are not comparable")
        if len(channels) > 1:
            notes.append("mono and stereo files are mixed: there are no figures of stereo")
        return notes

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        clips = {path: asdict(clip) for path, clip in self.clips.items()}
        return {"summary": self.summary(), "notes": self.notes(), "clips": clips, "unreadable": self.unreadable}


def unlike_rates(folders: Mapping[str, FolderMeasures]) -> list[str]:
    """A note if the clips of some folders, each with a name, have other sample rates than those of others."""
    rates = {name: sorted({clip.sample_rate for clip in folder.clips.values()}) for name, folder in folders.items()}
    if len(set(map(tuple, rates.values()))) < 2:
        return []
    told = "; ".join(f"{name} {', '.join(map(str, found))} Hz" for name, found in rates.items())
    return [f"other sample rates ({told}): centroid, roll-off and bandwidth are not comparable"]


def measure_files(paths: Sequence[Path]) -> FolderMeasures:
    """Measure audio files one by one; what cannot be read is listed, not dropped in silence.

    Raises:
        UserError: there is none, or none can be read.
    """
    clips, unreadable = {}, {}
    for path in tqdm(paths, desc="musical measures", unit="clip"):
        try:
            clips[str(path)] = measure_clip(*audio.read(path, mono=False))
        except UserError as error:
            unreadable[str(path)] = str(error)
    if not clips:
        why = f"; the first: {next(iter(unreadable.values()))}" if unreadable else ""
        raise UserError(f"none of {len(paths)} files can be measured{why}: give a folder with audio")
    return FolderMeasures(clips, unreadable)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(_DRAWS, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
