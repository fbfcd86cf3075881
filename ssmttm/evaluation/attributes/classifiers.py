"""Attribute classifiers: family of the lead instrument, tempo, key and mode.

Small networks on audio features, trained by `ssmttm.cli.train_attribute_classifiers` on the built-in corpus and shipped
under `ssmttm/assets/attribute_classifiers`. They measure prompt adherence (`adherence`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmttm.audio import features, resample
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.networks import FamilyNet, KeyNet, TempoNet
from ssmttm.evaluation.pretrained import load_network, network_fingerprint, save_network

ASSETS = Path(__file__).parents[2] / "assets" / "attribute_classifiers"
MODES = ("major", "minor", "dorian", "mixolydian")
TONICS = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
TEMPO_CLASSES = ("slow", "medium", "fast")
SLOW_BELOW, FAST_ABOVE = 90.0, 130.0  # beats per minute
WINDOW = 10.0  # seconds of the training crops; longer audio is classified window by window
MIN_SECONDS = 4.0  # seconds


def tempo_class(bpm: float) -> str:
    """slow (under 90), medium, or fast (over 130); of a measured tempo, that of the nearest whole number."""
    bpm = round(bpm)
    return "slow" if bpm < SLOW_BELOW else "fast" if bpm > FAST_ABOVE else "medium"


def pitch_class(tonic: str) -> int:
    """The pitch class (C = 0) of a tonic's name, such as "F#" or "Bb"."""
    return ("C D EF G A B".index(tonic[0]) + tonic.count("#") - tonic[1:].count("b")) % 12


def third(mode: str) -> str:
    """Whether a mode's third is major or minor."""
    return "major" if mode in ("major", "mixolydian") else "minor"


@dataclass(frozen=True)
class AttributePrediction:
    """Predicted attributes of one clip; each table of probabilities sums to 1."""

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
        """major or minor, the third of the mode."""
        return max(("major", "minor"), key=lambda name: sum(p for m, p in self.mode_probs.items() if third(m) == name))


class AttributeClassifiers(nn.Module):
    """The three networks; `from_pretrained` loads the shipped ones. `card`: training settings and held-out accuracy."""

    def __init__(self, families: list[str], card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.families = list(families)
        self.card = card or {}
        self.family = FamilyNet(len(families))
        self.key = KeyNet(len(MODES))
        self.tempo = TempoNet()

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> "AttributeClassifiers":
        """Load classifiers from a folder, by default the shipped ones."""
        fix = "train them with `python -m ssmttm.cli.train_attribute_classifiers`"
        return load_network(Path(path or ASSETS), lambda card: cls(card["families"], card), "classifiers", fix)

    def save(self, folder: str | Path) -> None:
        """Write config.json (the card) and model.safetensors (float16 weights) into a folder."""
        save_network(self, {**self.card, "families": self.families}, Path(folder))

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the weights as stored (float16) and the families."""
        return network_fingerprint(self, self.families)

    @torch.inference_mode()
    def predict(self, wav: Tensor, sample_rate: int) -> list[AttributePrediction]:
        """Predict the attributes of each clip of wav [B, S], or [S].

        Log-probabilities are averaged over windows of 10 s.
        """
        wav = wav[None] if wav.ndim == 1 else wav
        wav = resample(wav, sample_rate, features.SAMPLE_RATE)
        seconds = wav.shape[-1] / features.SAMPLE_RATE
        if seconds < MIN_SECONDS:
            raise UserError(f"{seconds:.1f} s of audio are too short: give at least {MIN_SECONDS:.0f} s")
        per_window = [self._log_probabilities(window) for window in windows(wav)]
        family, tempo, key = (torch.stack(outputs).mean(0).softmax(-1) for outputs in zip(*per_window, strict=True))
        return [self._prediction(*row) for row in zip(family, tempo, key, strict=True)]

    def _log_probabilities(self, wav: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of family [B, F], tempo [B, tempi] and key and mode [B, 48] for one window [B, S]."""
        wav = features.rms_normalise(wav)
        bands = features.pitch_class_bands(features.log_frequency_spectrum(wav))
        gram = features.tempogram(features.onset_strength(wav))
        family, tempo, key = self.family(features.log_mel(wav)), self.tempo(gram), self.key(bands).flatten(1)
        return family.log_softmax(-1), tempo.log_softmax(-1), key.log_softmax(-1)

    def _prediction(self, family: Tensor, tempo: Tensor, key: Tensor) -> AttributePrediction:
        """Classes of one clip from the probabilities."""
        grid = self.tempo.bpm
        peak = int(functional.avg_pool1d(tempo[None], 5, 1, 2).argmax())
        near = slice(max(0, peak - 3), peak + 4)
        bpm = round(float(2 ** ((tempo[near] * grid[near].log2()).sum() / tempo[near].sum())), 1)
        tempo_classes = dict.fromkeys(TEMPO_CLASSES, 0.0)
        for value, probability in zip(grid.tolist(), tempo.tolist(), strict=True):
            tempo_classes[tempo_class(value)] += probability
        key = key.view(12, len(MODES))
        modes = dict(zip(MODES, key.sum(0).tolist(), strict=True))
        families = dict(zip(self.families, family.tolist(), strict=True))
        return AttributePrediction(
            family=max(families, key=families.__getitem__),
            family_probs=families,
            bpm=bpm,
            tempo_class=tempo_class(bpm),
            tempo_probs=tempo_classes,
            key=TONICS[int(key.sum(1).argmax())],
            mode=max(modes, key=modes.__getitem__),
            mode_probs=modes,
        )


def windows(wav: Tensor) -> list[Tensor]:
    """Split [B, S] into windows of `WINDOW` seconds that cover both ends with the least overlap."""
    size, length = int(WINDOW * features.SAMPLE_RATE), wav.shape[-1]
    if length <= size:
        return [wav]
    count = -(-length // size)
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    return [wav[:, start : start + size] for start in starts]
