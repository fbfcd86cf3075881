"""Voices in music: told by an audio classifier, taken out by a source separator.

Both are settings first: frozen, picklable, with `facts()` for a corpus's config. The model behind them is loaded once a
process, when it is first needed. Shapes: C channels, S samples.
"""

import inspect
import json
import logging
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_prep.track import Refused
from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.evaluation.classifier import AudioClassifier
from ssmttm.hub import checkpoint_folder, fingerprint_of

_log = logging.getLogger(__name__)
_VOCALS = "vocals"
_OVERLAP = 0.25
# The separators that give each window as long as they got it, and predict from nothing but it.
_SEPARATORS = {"demucs.htdemucs.HTDemucs", "demucs.hdemucs.HDemucs"}
_VOICES = re.compile(
    r"\b(sing|sings|singing|singers?|vocals?|voices?|speech|speaking|talking|conversation|narration|rap|rapping|"
    r"rapper|choirs?|choral|chant|chanting|mantra|yodel+ing|humming|a cap+ella|beatboxing|shout|shouting|screaming|"
    r"whispering)\b"
)
_NO_VOICES = re.compile(r"\b(no|non|not|without|singing bowls?)\b")


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

    def refusal(self, wav: Tensor, rate: int) -> Refused | None:
        """Why a segment [C, S] is refused, or None if nobody is heard."""
        probability = self.probability(wav, rate)
        if probability < self.threshold:
            return None
        return Refused("vocals", f"somebody sings or speaks in it (probability {probability:.2f})")


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
            "overlap": _OVERLAP,
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
        self.labels = list(labels) or [name for name in known if speaks_of_voices(name)]
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
        starts = _starts(len(mono), size, 0)
        found = [self.classifier.probabilities(mono[None, first : first + size]) for first in starts]
        return float(torch.cat(found)[:, self._columns].max())


def speaks_of_voices(name: str) -> bool:
    """Whether a class of that name is a human voice: "Male singing" or "female_vocal", not "no vocals"."""
    words = re.sub(r"[\W_]+", " ", name.lower())
    return bool(_VOICES.search(words)) and not _NO_VOICES.search(words)


class _Member(NamedTuple):
    """A model of a bag, and how much its stems count."""

    model: Any
    weights: list[float]


class Separator:
    """Hybrid Demucs (arXiv 2111.03600, 2211.08553) through the package demucs: all stems but the vocals.

    demucs' own loaders unpickle, or import what a file names; here only safetensors are read, into known classes.

    Args:
        weights: a name of demucs, such as htdemucs, htdemucs_ft, htdemucs_6s or hdemucs_mmi, fetched from the hub; a
            .safetensors file as demucs exports it; or a folder with such files and the .yaml of a bag.
        device: where it runs.
        batch: windows at a time.

    Raises:
        UserError: demucs is not installed, no such weights, they are pickled or quantised, or have no stem `vocals`.
    """

    def __init__(self, weights: str = "htdemucs", device: str = "cpu", batch: int = 1) -> None:
        bag, files = _bag_of(weights)
        models = [_load(file) for file in files]
        first = models[0]
        self.stems, self.sample_rate, self.channels = list(first.sources), first.samplerate, first.audio_channels
        if _VOCALS not in self.stems or len(self.stems) < 2:
            raise UserError(f"the separator {weights} has the stems {', '.join(self.stems)}, not vocals and others")
        if any((list(m.sources), m.samplerate, m.audio_channels)
               != (self.stems, self.sample_rate, self.channels) for m in models):  # fmt: skip
            raise UserError(f"the models of {weights} differ in stems, rate or channels: they are no bag")
        self._members = _weighted(models, bag, weights, self.stems)
        self.window = int(min(member.model.segment for member in self._members) * self.sample_rate)
        if bag.get("segment"):
            self.window = min(self.window, int(bag["segment"] * self.sample_rate))
        self.fingerprint = fingerprint_of(files)
        self.device, self.batch = device, batch
        for member in self._members:
            member.model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def remove_vocals(self, wav: Tensor, rate: int) -> Tensor:
        """The music without its voices: float32 [C, S] at `rate` Hz -> the same shape, C 1 or the separator's own.

        Windows of fixed length, a quarter of which overlaps, are separated and faded into each other. The same audio
        gives the same result, whatever else was separated before.
        """
        if len(wav) not in (1, self.channels):
            raise ValueError(f"{len(wav)} channels where the separator takes 1 or {self.channels}")
        mix = audio.resample(wav, rate, self.sample_rate)
        level = mix.std(correction=0) + 1e-8
        rest = self._rest(mix.expand(self.channels, -1) / level) * level
        if len(wav) == 1:
            rest = rest.mean(0, keepdim=True)
        return audio.resample(rest, self.sample_rate, rate)[:, : wav.shape[1]]

    def _rest(self, mix: Tensor) -> Tensor:
        """All stems but the vocals, [C, S] -> [C, S]."""
        length = mix.shape[1]
        fade = torch.minimum(torch.arange(1, self.window + 1), torch.arange(self.window, 0, -1)) / self.window
        total, weight = torch.zeros_like(mix), torch.zeros(length)
        starts = _starts(length, self.window, int(_OVERLAP * self.window))
        for first in range(0, len(starts), self.batch):
            group = starts[first : first + self.batch]
            windows = torch.zeros(len(group), self.channels, self.window)
            for index, start in enumerate(group):
                part = mix[:, start : start + self.window]
                windows[index, :, : part.shape[1]] = part
            for start, made in zip(group, self._separate(windows.to(self.device)).cpu(), strict=True):
                end = min(start + self.window, length)
                total[:, start:end] += (made * fade)[:, : end - start]
                weight[start:end] += fade[: end - start]
        return total / weight

    def _separate(self, windows: Tensor) -> Tensor:
        """[B, C, window] -> the same of all stems but the vocals, the models' weighted mean of each."""
        rest = torch.zeros_like(windows)
        totals = [sum(member.weights[index] for member in self._members) for index in range(len(self.stems))]
        others = [index for index, stem in enumerate(self.stems) if stem != _VOCALS]
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for member in self._members:
                stems = member.model(windows)  # [B, stems, C, window]
                for index in others:
                    rest += stems[:, index] * (member.weights[index] / totals[index])
        return rest


@cache
def _detector(settings: VocalDetection) -> VocalDetector:
    return VocalDetector(settings.weights, settings.labels, settings.device)


@cache
def _separator(settings: VocalRemoval) -> Separator:
    return Separator(settings.weights, settings.device, settings.batch)


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Where windows of `size` begin that cover `length` and overlap by that much, the last one by more if need be."""
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def _bag_of(weights: str) -> tuple[dict[str, Any], list[Path]]:
    """What a bag's .yaml says, and the files of its models."""
    path = Path(weights)
    if path.is_file() or path.suffix in (".th", ".pt", ".pth", ".ckpt"):
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is a pickle, which can run any program: name a .safetensors file, or a hub name")
        return {}, [path]
    folder = path if path.is_dir() else _fetched(weights)
    bags = sorted(folder.glob("*.yaml"))
    if not bags:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"{folder} holds {len(files)} .safetensors files and no .yaml that says which: name one")
        return {}, files
    return _read_bag(folder / f"{path.name}.yaml" if len(bags) > 1 else bags[0])


def _read_bag(file: Path) -> tuple[dict[str, Any], list[Path]]:
    import yaml

    try:
        bag = yaml.safe_load(file.read_text(encoding="utf-8"))
        names = [str(name) for name in bag["models"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no list of separators: it needs `models: [name, ...]`") from error
    files = [file.parent / f"{name}.safetensors" for name in names]
    for name, path in zip(names, files, strict=True):
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{file} names the model {name!r}, but there is no {name}.safetensors beside it")
    if not files:
        raise UserError(f"{file} names no model")
    return bag, files


def _fetched(name: str) -> Path:
    """The folder of a name of demucs, such as htdemucs or NAMESPACE/htdemucs, from the hub."""
    hub = _demucs("hf")
    if name.startswith((".", "/", "~")):
        raise UserError(f"there is no separator {name}: check the path")
    namespace, _, model = name.rpartition("/")
    repository = f"{namespace or hub.DEFAULT_NAMESPACE}/{hub.hf_repo_name(model)}"
    return checkpoint_folder(repository, ("*.yaml", "*.safetensors"), "separator", "name htdemucs")


def _load(file: Path) -> Any:
    """A model of demucs from its safetensors file, whose metadata name the class and its arguments."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        name = metadata.get("klass", "")
        if name not in _SEPARATORS:
            known = ", ".join(sorted(_SEPARATORS))
            raise UserError(f"{file} says it is a {name or 'nameless thing'}, not one of {known}: use htdemucs")
        if "structure" in metadata:
            raise UserError(f"{file} is quantised: use a separator that is not, such as htdemucs")
        module, _, kind = name.removeprefix("demucs.").rpartition(".")
        maker = getattr(_demucs(module), kind)
        arguments, named = (json.loads(metadata[key], object_hook=_fraction) for key in ("args", "kwargs"))
        known_names = inspect.signature(maker).parameters  # older exports hold some that are gone
        model = maker(*arguments, **{key: value for key, value in named.items() if key in known_names})
        model.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the separator {file} cannot be loaded: {reason}") from error
    if getattr(model, "crosstransformer", None) is not None:
        model.crosstransformer.sin_random_shift = 0  # else its positions are drawn anew at every call
    return model


def _fraction(value: dict[str, Any]) -> Any:
    """Fractions as demucs writes them in JSON."""
    return Fraction(value["numerator"], value["denominator"]) if value.get("_type") == "fraction" else value


def _weighted(models: list[Any], bag: dict[str, Any], weights: str, stems: list[str]) -> list[_Member]:
    """The models that have a say in any stem but the vocals, with what a bag's .yaml says of it."""
    table = bag.get("weights") or [[1.0] * len(stems)] * len(models)
    good = len(table) == len(models) and all(len(row) == len(stems) for row in table)
    others = [index for index, stem in enumerate(stems) if stem != _VOCALS]
    if not good or any(sum(row[index] for row in table) <= 0 for index in others):
        raise UserError(f"the weights of the bag {weights} do not fit its {len(models)} models of {len(stems)} stems")
    members = [_Member(model, [float(w) for w in row]) for model, row in zip(models, table, strict=True)]
    return [member for member in members if any(member.weights[index] for index in others)]


def _demucs(module: str) -> Any:
    try:
        return import_module(f"demucs.{module}")
    except ImportError as error:
        raise UserError("removing vocals needs the package demucs: pip install 'ssmttm[vocals]'") from error
