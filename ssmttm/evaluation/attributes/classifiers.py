"""Small trained detectors: which family leads, how fast, in which key and mode a piece of music is.

The `networks` over `features`, trained by `train_detectors` on the built-in corpus and shipped under
`ssmttm/assets/detectors`. They measure whether generated music follows its prompt (`adherence`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmttm.audio import features
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.networks import FamilyNet, KeyNet, TempoNet
from ssmttm.evaluation.pretrained import load_network, network_fingerprint, save_network

ASSETS = Path(__file__).parents[2] / "assets" / "attribute_classifiers"
MODES = ("major", "minor", "dorian", "mixolydian")
TONICS = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
TEMPO_CLASSES = ("slow", "medium", "fast")
SLOW_BELOW, FAST_ABOVE = 90.0, 130.0  # beats per minute
WINDOW = 10.0  # seconds of the training crops; longer audio is heard window by window
SHORTEST = 4.0  # seconds


def tempo_class(bpm: float) -> str:
    """slow (under 90), medium, or fast (over 130)."""
    return "slow" if bpm < SLOW_BELOW else "fast" if bpm > FAST_ABOVE else "medium"


def pitch_class(tonic: str) -> int:
    """The pitch class (C = 0) of a tonic's name, such as "F#" or "Bb"."""
    return ("C D EF G A B".index(tonic[0]) + tonic.count("#") - tonic[1:].count("b")) % 12


def third(mode: str) -> str:
    """Whether a mode's third is major or minor."""
    return "major" if mode in ("major", "mixolydian") else "minor"


@dataclass(frozen=True)
class AttributePrediction:
    """What was heard in one piece of audio; each probability table sums to 1."""

    family: str
    family_probs: dict[str, float]
    bpm: float
    tempo_class: str
    tempo_probs: dict[str, float]
    key: str
    mode: str
    mode_probs: dict[str, float]

    @property
    def third(self) -> str:
        """major or minor, by the mode's third."""
        return max(("major", "minor"), key=lambda name: sum(p for m, p in self.mode_probs.items() if third(m) == name))


class AttributeClassifiers(nn.Module):
    """The three networks, with what they answer. Built by `from_pretrained`, or untrained from a list of families.

    Attributes:
        families: the answers of the family detector.
        card: how they were trained and how often they were right on held-out audio (config.json).
    """

    def __init__(self, families: list[str], card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.families = list(families)
        self.card = card or {}
        self.family = FamilyNet(len(families))
        self.key = KeyNet(len(MODES))
        self.tempo = TempoNet()

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> "AttributeClassifiers":
        """Load detectors from a folder, by default the embedded ones; ready to `detect`.

        Raises:
            UserError: the folder holds none, or damaged ones.
        """
        mend = "train them with `python -m ssmttm.cli.train_attribute_classifiers`"
        return load_network(Path(path or ASSETS), lambda card: cls(card["families"], card), "classifiers", mend)

    def save(self, folder: str | Path) -> None:
        """Write config.json (the card) and model.safetensors (float16 weights) into a folder."""
        save_network(self, {**self.card, "families": self.families}, Path(folder))

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the weights as stored (float16) and the families."""
        return network_fingerprint(self, self.families)

    @torch.inference_mode()
    def predict(self, wav: Tensor, sample_rate: int) -> list[AttributePrediction]:
        """Listen to each row of wav [B, S], or [S].

        Audio longer than a window of 10 s is heard window by window and the log-probabilities are averaged.

        Raises:
            UserError: less than 4 s of audio.
        """
        wav = wav[None] if wav.ndim == 1 else wav
        if sample_rate != features.SAMPLE_RATE:
            from ssmttm.audio import resample

            wav = resample(wav, sample_rate, features.SAMPLE_RATE)
        seconds = wav.shape[-1] / features.SAMPLE_RATE
        if seconds < SHORTEST:
            raise UserError(f"{seconds:.1f} s of audio are too short to hear tempo and key: give {SHORTEST:.0f} s")
        family, tempo, tonality = (
            torch.stack([parts[i] for parts in map(self._predict, windows(wav))]).mean(0) for i in range(3)
        )
        rows = zip(family.softmax(-1), tempo.softmax(-1), tonality.softmax(-1), strict=True)
        return [self._describe(*row) for row in rows]

    def _predict(self, wav: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of family [B, F], tempo [B, answers] and tonality [B, 48] for one window [B, S]."""
        wav = features.level(wav)
        pitches = features.pitch_class_bands(features.log_frequency_spectrum(wav))
        gram = features.tempogram(features.onset_strength(wav))
        logits = self.family(features.log_mel(wav)), self.tempo(gram), self.key(pitches).flatten(1)
        return logits[0].log_softmax(-1), logits[1].log_softmax(-1), logits[2].log_softmax(-1)

    def _describe(self, family: Tensor, tempo: Tensor, tonality: Tensor) -> AttributePrediction:
        """Read the probabilities of one piece out."""
        answers = self.tempo.answers
        peak = int(functional.avg_pool1d(tempo[None], 5, 1, 2).argmax())
        near = slice(max(0, peak - 3), peak + 4)
        bpm = round(float(2 ** ((tempo[near] * answers[near].log2()).sum() / tempo[near].sum())), 1)
        shares = dict.fromkeys(TEMPO_CLASSES, 0.0)
        for value, probability in zip(answers.tolist(), tempo.tolist(), strict=True):
            shares[tempo_class(value)] += probability
        tonality = tonality.view(12, len(MODES))
        modes = dict(zip(MODES, tonality.sum(0).tolist(), strict=True))
        families = dict(zip(self.families, family.tolist(), strict=True))
        return AttributePrediction(
            family=max(families, key=families.__getitem__),
            family_probs=families,
            bpm=bpm,
            tempo_class=tempo_class(bpm),
            tempo_probs=shares,
            key=TONICS[int(tonality.sum(1).argmax())],
            mode=max(modes, key=modes.__getitem__),
            mode_probs=modes,
        )


def windows(wav: Tensor) -> list[Tensor]:
    """Cut [B, S] into windows of `WINDOW` seconds that overlap as little as they can and reach both ends."""
    size, length = int(WINDOW * features.SAMPLE_RATE), wav.shape[-1]
    if length <= size:
        return [wav]
    count = -(-length // size)
    return [wav[:, start : start + size] for start in (round(i * (length - size) / (count - 1)) for i in range(count))]
