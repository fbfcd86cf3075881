"""Vocal removal: the sum of all stems of a source separator except the vocals.

Shapes: B windows, C channels, S samples.
"""

import inspect
import json
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmttm import audio
from ssmttm.errors import UserError, first_line
from ssmttm.hub import checkpoint_folder, fingerprint_of, split_revision

_VOCALS = "vocals"
OVERLAP = 0.25  # fraction of a window shared with the next one
# Separators whose output has the length of the window and depends on nothing else.
_SEPARATORS = {"demucs.htdemucs.HTDemucs", "demucs.hdemucs.HDemucs"}


class _Member(NamedTuple):
    """A model of a bag, and the weights of its stems."""

    model: Any
    weights: list[float]


class Separator:
    """Hybrid Demucs (arXiv 2111.03600, 2211.08553) through the package demucs: all stems but the vocals.

    demucs' own loaders unpickle, or import classes named in a file; this one reads safetensors into known classes only.

    Args:
        weights: a name of demucs, such as htdemucs, htdemucs_ft, htdemucs_6s or hdemucs_mmi, fetched from the hub; a
            .safetensors file as demucs exports it; or a folder with such files and the .yaml of a bag.
        device: where it runs.
        batch: windows per forward pass.

    Raises:
        UserError: demucs is not installed; the weights are missing, pickled or quantised, or lack the stem `vocals`.
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
            raise UserError(f"the models of the bag {weights} differ in stems, rate or channels")
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
        """The music without vocals: float32 [C, S] at `rate` Hz -> the same shape; C is 1 or that of the separator.

        Windows of fixed length that overlap by a quarter are separated and cross-faded. The result depends on the audio
        alone.
        """
        if len(wav) not in (1, self.channels):
            raise ValueError(f"the separator takes 1 or {self.channels} channels, got {len(wav)}")
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
        starts = window_starts(length, self.window, int(OVERLAP * self.window))
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


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Starts of windows of `size` that cover `length` and overlap by `overlap`, the last one by more if needed."""
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def _bag_of(weights: str) -> tuple[dict[str, Any], list[Path]]:
    """The content of a bag's .yaml, and the files of its models."""
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
            raise UserError(f"{folder} holds {len(files)} .safetensors files and no .yaml that names one: name a file")
        return {}, files
    return _read_bag(folder / f"{path.name}.yaml" if len(bags) > 1 else bags[0])


def _read_bag(file: Path) -> tuple[dict[str, Any], list[Path]]:
    import yaml

    try:
        bag = yaml.safe_load(file.read_text(encoding="utf-8"))
        names = [str(name) for name in bag["models"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a list of separators: it needs `models: [name, ...]`") from error
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
    name, revision = split_revision(name)
    namespace, _, model = name.rpartition("/")
    repository = f"{namespace or hub.DEFAULT_NAMESPACE}/{hub.hf_repo_name(model)}"
    return checkpoint_folder(repository, ("*.yaml", "*.safetensors"), "separator", "name htdemucs", revision)


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
            raise UserError(f"{file} names the class {name or '(none)'}, expected one of {known}: use htdemucs")
        if "structure" in metadata:
            raise UserError(f"{file} is quantised: use a separator that is not, such as htdemucs")
        module, _, kind = name.removeprefix("demucs.").rpartition(".")
        maker = getattr(_demucs(module), kind)
        arguments, named = (json.loads(metadata[key], object_hook=_fraction) for key in ("args", "kwargs"))
        known_names = inspect.signature(maker).parameters  # older exports hold arguments that no longer exist
        model = maker(*arguments, **{key: value for key, value in named.items() if key in known_names})
        model.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"the separator {file} cannot be loaded: {reason}") from error
    if getattr(model, "crosstransformer", None) is not None:
        model.crosstransformer.sin_random_shift = 0  # otherwise its positions are random at every call
    return model


def _fraction(value: dict[str, Any]) -> Any:
    """Fractions as demucs writes them in JSON."""
    return Fraction(value["numerator"], value["denominator"]) if value.get("_type") == "fraction" else value


def _weighted(models: list[Any], bag: dict[str, Any], weights: str, stems: list[str]) -> list[_Member]:
    """The models with a weight in any stem but the vocals, with the weights of the bag's .yaml."""
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
