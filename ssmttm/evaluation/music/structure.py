"""Structure of a clip: sections, and how it begins and ends.

Section boundaries are peaks of the novelty of a self-similarity matrix (Foote, Automatic Audio Segmentation Using a
Measure of Audio Novelty, ICME 2000), here of timbre (log-mel) and of rhythm (onset strength) alike; with chroma it
finds the changes of the chords. Shapes: T frames of a quarter of a second.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm import audio
from ssmttm.audio import features
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.classifiers import pitch_class
from ssmttm.evaluation.music import key, tempo
from ssmttm.evaluation.music.repetition import similarity_matrix

MIN_SECONDS = 12.0
_RATE = 4  # frames per second
_REACH = 8.0  # seconds to each side of a boundary that the kernel compares
_APART = 3.0  # seconds between two boundaries
_PROMINENT = 0.03  # novelty of a boundary: 0 within a section, 1 between two sections with nothing in common
_EDGE = 2.0  # seconds of the start and of the end, which are measured on their own
_RANGE = 60.0  # dB below the clip's level that levels are limited to


@dataclass(frozen=True)
class Structure:
    """Structure of one clip."""

    boundaries: tuple[float, ...]  # seconds
    novelty: float  # mean novelty of the boundaries, 0 without any
    start_level: float  # dB: level of the first 2 s over the clip's median level
    end_level: float  # dB: the same of the last half second
    last_onset: float  # seconds from the last onset to the end
    final_tonic: float  # fraction of the chroma that is the tonic's, in the 2 s after the last onset, over the clip's


def structure(wav: Tensor, sample_rate: int) -> Structure:
    """Structure of mono audio [1, S]. Raises UserError for audio under 12 s."""
    if wav.shape[-1] < MIN_SECONDS * sample_rate:
        raise UserError(f"{wav.shape[-1] / sample_rate:.1f} s are too short for sections: give {MIN_SECONDS:.0f} s")
    wav = features.rms_normalise(audio.resample(wav.float(), sample_rate, features.SAMPLE_RATE))
    onsets = features.onset_strength(wav)[0]  # [bands, T at ONSET_RATE]
    curve = novelty(features.log_mel(wav)[0], onsets)
    boundaries = _peaks(curve)
    level, onset = _levels(wav[0]), _last_onset(onsets)
    return Structure(
        boundaries=tuple(float(peak / _RATE) for peak in boundaries),
        novelty=float(curve[boundaries].mean()) if len(boundaries) else 0.0,
        start_level=float(level[: int(2 * _EDGE)].mean() - level.median()),
        end_level=float(level[-1] - level.median()),
        last_onset=wav.shape[-1] / features.SAMPLE_RATE - onset,
        final_tonic=_final_tonic(features.chroma_log_frequency(wav)[0], onset),
    )


def novelty(mel: Tensor, onsets: Tensor) -> Tensor:
    """Novelty [T] of log-mel [M, T'] at MEL_RATE and onset strength [N, T''] at ONSET_RATE."""
    length = int(min(mel.shape[-1] / features.MEL_RATE, onsets.shape[-1] / features.ONSET_RATE) * _RATE)
    parts = [F.adaptive_avg_pool1d(part, length) for part in (mel, onsets)]
    similarity = torch.stack([similarity_matrix(part) for part in parts]).mean(0)  # [T, T]
    reach = round(_REACH * _RATE)
    offsets = torch.arange(-reach, reach) + 0.5
    taper = torch.exp(-0.5 * (2 * offsets / reach).square())
    kernel = torch.outer(offsets.sign() * taper, offsets.sign() * taper)
    compared = F.conv2d(similarity[None, None], kernel[None, None], padding=reach)[0, 0]  # [T + 1, T + 1]
    return compared.diagonal()[:length] / kernel.abs().sum()


def _peaks(curve: Tensor) -> Tensor:
    """Frames of the boundaries: the highest within `_APART` to each side, above `_PROMINENT`, not at the edges."""
    found = features.pick_peaks(curve[None], round(_APART * _RATE), _PROMINENT)[0].nonzero()[:, 0]
    edge = int(_EDGE * _RATE)
    return found[(found >= edge) & (found < len(curve) - edge)]


def _levels(wav: Tensor) -> Tensor:
    """Level in dB of each half second of [S]."""
    frames = wav.unfold(0, features.SAMPLE_RATE // 2, features.SAMPLE_RATE // 2)
    level = 10 * frames.square().mean(1).clamp_min(1e-12).log10()
    return level.clamp_min(float(level.median()) - _RANGE)


def _last_onset(onsets: Tensor) -> float:
    """Seconds of the last onset above a tenth of the strongest; 0 without onsets. [N, T] at ONSET_RATE."""
    times = tempo.onsets(tempo.envelope(onsets))
    return float(times[-1]) if len(times) else 0.0


def _final_tonic(chroma: Tensor, onset: float) -> float:
    """How much more of the tonic the last chord has than the whole clip; 0 in silence."""
    found = key.key(chroma)
    if found is None:
        return 0.0
    first = min(int(onset * features.PITCH_RATE), chroma.shape[-1] - 1)
    tonic = chroma[pitch_class(found.tonic)]
    return float(tonic[first : first + int(_EDGE * features.PITCH_RATE)].mean() - tonic.mean())
