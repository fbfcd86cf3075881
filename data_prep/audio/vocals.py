"""Voices in music: told by an audio classifier, taken out by a source separator.

Both are settings first: frozen, picklable, with `facts()` for a corpus's config. The model behind them is loaded once a
process, when it is first needed. Shapes: C channels, S samples.
"""

import logging
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.audio.separator import OVERLAP, Separator, starts_of
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
    """Whether somebody sings or speaks in a segment.

    Attributes:
        weights: of an audio classifier: a folder, or a hub name.
        threshold: a segment is refused from this probability on; calibrate it on some segments of the corpus.
        labels: the classes that count as a voice; empty: those whose names speak of singing, speech, rap, choirs ...
        device: where the classifier runs.
    """

    weights: str = "MIT/ast-finetuned-audioset-10-10-0.4593"
    threshold: float = 0.1
    labels: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"the threshold of vocals must be above 0 and at most 1, not {self.threshold:g}")

    def facts(self) -> dict[str, Any]:
        """What decides which segments are refused, as JSON; loads the classifier, and raises UserError if it cannot."""
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
        """Why a segment [C, S] is refused, or None if nobody is heard."""
        probability = self.probability(wav, rate)
        if probability < self.threshold:
            return None
        return Rejected("vocals", f"somebody sings or speaks in it (probability {probability:.2f})")


@dataclass(frozen=True)
class VocalRemoval:
    """Taking the voices out of a segment.

    Attributes:
        weights: as `Separator`.
        device: where the separator runs.
        batch: windows at a time; bounds memory. More than one is slower on a CPU.
    """

    weights: str = "htdemucs"
    device: str = "cpu"
    batch: int = 1

    def facts(self) -> dict[str, Any]:
        """What decides the sound that is left, as JSON; loads the separator, and raises UserError if it cannot."""
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
        """What was done to the work, for its attribution."""
        return f"vocals removed with {Path(self.weights).stem}"

    def remove(self, wav: Tensor, rate: int) -> Tensor:
        """As `Separator.remove_vocals`."""
        return _separator(self).remove_vocals(wav, rate)


class VocalDetector:
    """An audio classifier that is asked for voices only.

    Args:
        weights, labels, device: as in `VocalDetection`.

    Attributes:
        labels: the names of the classes that count.

    Raises:
        UserError: no such classifier, it has no class of `labels`, or none that speaks of voices.
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
            raise UserError(f"no class of {weights} speaks of voices ({', '.join(known[:8])} ...): name those that do")
        _log.info("classes of %s that count as a voice: %s", weights, ", ".join(self.labels))
        self._columns = [known.index(label) for label in self.labels]

    def probability(self, wav: Tensor, rate: int) -> float:
        """The highest probability of a voice in any window of 10 s.

        Args:
            wav: float32 [C, S], S >= 1; windows cover it wholly, the last one overlaps where S is no multiple.
            rate: Hz.
        """
        mono = audio.resample(audio.to_mono(wav), rate, self.classifier.sample_rate)[0]
        size = round(self.seconds * self.classifier.sample_rate)
        starts = starts_of(len(mono), size, 0)
        found = [self.classifier.probabilities(mono[None, first : first + size]) for first in starts]
        return float(torch.cat(found)[:, self._columns].max())


def mentions_vocals(name: str) -> bool:
    """Whether a class of that name is a human voice: "Male singing" or "female_vocal", not "no vocals"."""
    words = re.sub(r"[\W_]+", " ", name.lower())
    return bool(_VOCALS.search(words)) and not _NO_VOCALS.search(words)


@cache
def _detector(settings: VocalDetection) -> VocalDetector:
    return VocalDetector(settings.weights, settings.labels, settings.device)


@cache
def _separator(settings: VocalRemoval) -> Separator:
    return Separator(settings.weights, settings.device, settings.batch)
