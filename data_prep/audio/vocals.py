"""Vocals in music: detection by an audio classifier, removal by a source separator.

Both are settings: frozen, picklable, with `metadata()` for a corpus's config. The model is loaded once per process, at
first use. Shapes: C channels, S samples.
"""

import logging
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.audio.separator import OVERLAP, Separator, window_starts
from data_prep.track import Rejected
from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.evaluation.embedders.audio_classifier import AudioClassifier

_log = logging.getLogger(__name__)
_VOCALS = re.compile(
    r"\b(sing|sings|singing|singers?|vocals?|voices?|speech|speaking|talking|conversation|narration|rap|rapping|"
    r"rapper|choirs?|choral|chant|chanting|mantra|yodel+ing|humming|a cap+ella|beatboxing|shout|shouting|screaming|"
    r"whispering)\b"
)
_NO_VOCALS = re.compile(r"\b(no|non|not|without|singing bowls?)\b")


@dataclass(frozen=True)
class VocalDetection:
    """Detection of singing or speech in a segment.

    Attributes:
        weights: of an audio classifier: a folder, or a hub name.
        threshold: segments with this probability or more are rejected; calibrate it on the corpus.
        labels: the classes that count as vocals; empty: those whose names mention singing, speech, rap, choirs ...
        device: where the classifier runs.
    """

    weights: str = "MIT/ast-finetuned-audioset-10-10-0.4593"
    threshold: float = 0.1
    labels: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"the threshold of vocals must be above 0 and at most 1, got {self.threshold:g}")

    def metadata(self) -> dict[str, Any]:
        """What decides which segments are rejected, as JSON. Raises UserError if the classifier does not load."""
        detector = _detector(replace(self, device="cpu"))
        return {
            "weights": self.weights,
            "fingerprint": detector.classifier.fingerprint,
            "threshold": self.threshold,
            "labels": detector.labels,
            "window_seconds": VocalDetector.seconds,
        }

    def probability(self, wav: Tensor, rate: int) -> float:
        """As `VocalDetector.probability`."""
        return _detector(self).probability(wav, rate)

    def rejection(self, wav: Tensor, rate: int) -> Rejected | None:
        """Why a segment [C, S] is rejected, or None if no vocals are found."""
        probability = self.probability(wav, rate)
        if probability < self.threshold:
            return None
        return Rejected("vocals", f"it has singing or speech (probability {probability:.2f})")


@dataclass(frozen=True)
class VocalRemoval:
    """Removal of the vocals of a segment.

    Attributes:
        weights: as `Separator`.
        device: where the separator runs.
        batch: windows per forward pass; bounds memory. More than one is slower on a CPU.
    """

    weights: str = "htdemucs"
    device: str = "cpu"
    batch: int = 1

    def metadata(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON. Raises UserError if the separator does not load."""
        separator = _separator(replace(self, device="cpu"))
        return {
            "weights": self.weights,
            "fingerprint": separator.fingerprint,
            "window_seconds": separator.window / separator.sample_rate,
            "overlap": OVERLAP,
            "batch": self.batch,
        }

    @property
    def modification(self) -> str:
        """The modification of the work, for its attribution."""
        return f"vocals removed with {Path(self.weights).stem}"

    def remove(self, wav: Tensor, rate: int) -> Tensor:
        """As `Separator.remove_vocals`."""
        return _separator(self).remove_vocals(wav, rate)


class VocalDetector:
    """An audio classifier, restricted to vocals.

    Args:
        weights, labels, device: as in `VocalDetection`.

    Attributes:
        labels: the names of the classes that count as vocals.

    Raises:
        UserError: no such classifier, it has no class of `labels`, or none that mentions vocals.
    """

    seconds = 10.0

    def __init__(self, weights: str, labels: tuple[str, ...] = (), device: str = "cpu") -> None:
        self.classifier = AudioClassifier(weights, device)
        known = self.classifier.classes
        if unknown := [label for label in labels if label not in known]:
            shown = ", ".join(known[:8]) + ", ..." * (len(known) > 8)
            raise UserError(f"the classifier {weights} has no class {unknown[0]!r}: it has {shown}")
        self.labels = list(labels) or [name for name in known if mentions_vocals(name)]
        if not self.labels:
            raise UserError(f"no class of {weights} mentions vocals ({', '.join(known[:8])} ...): name the classes")
        _log.info("classes of %s that count as vocals: %s", weights, ", ".join(self.labels))
        self._columns = [known.index(label) for label in self.labels]

    def probability(self, wav: Tensor, rate: int) -> float:
        """The highest probability of vocals in any window of 10 s.

        Args:
            wav: float32 [C, S], S >= 1; windows cover it, the last one overlaps if S is not a multiple.
            rate: Hz.
        """
        mono = audio.resample(audio.to_mono(wav), rate, self.classifier.sample_rate)[0]
        size = round(self.seconds * self.classifier.sample_rate)
        starts = window_starts(len(mono), size, 0)
        found = [self.classifier.probabilities(mono[None, first : first + size]) for first in starts]
        return float(torch.cat(found)[:, self._columns].max())


def mentions_vocals(name: str) -> bool:
    """Whether a class name means a human voice: "Male singing" or "female_vocal", not "no vocals"."""
    words = re.sub(r"[\W_]+", " ", name.lower())
    return bool(_VOCALS.search(words)) and not _NO_VOCALS.search(words)


@cache
def _detector(settings: VocalDetection) -> VocalDetector:
    return VocalDetector(settings.weights, settings.labels, settings.device)


@cache
def _separator(settings: VocalRemoval) -> Separator:
    return Separator(settings.weights, settings.device, settings.batch)
