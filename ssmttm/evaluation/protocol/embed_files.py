"""Embeddings of audio files, cached by the content of the files."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.evaluation.embedders import mono_at
from ssmttm.evaluation.embedders.base import Classifier, Embedder, JointEmbedder
from ssmttm.files import atomic_write, file_sha256

_WRITE_EVERY = 50  # clips between two writes of the cache


class ClipEmbeddings(NamedTuple):
    """Embeddings of n files."""

    vectors: Tensor  # [n, W, D], W windows of the first seconds of each file
    posteriors: Tensor  # [n, N] of a Classifier, else empty
    joint: Tensor  # [n, E] of a JointEmbedder, else empty


def readable(paths: Sequence[Path], seconds: float) -> tuple[list[Path], dict[str, str]]:
    """Files with at least `seconds` of audio whose first `seconds` hold music, and the reason for each other file."""
    good, bad = [], {}
    for path in tqdm(paths, desc="checking files", unit="clip"):
        try:
            wav, rate = audio.read_music(path, mono=False, seconds=seconds)
            if wav.shape[-1] < round(seconds * rate):
                raise UserError(f"{path} has {wav.shape[-1] / rate:.2f} s of audio, less than {seconds:g} s")
            good.append(path)
        except UserError as error:
            bad[str(path)] = str(error)
    return good, bad


def embed_clips(embedder: Embedder, paths: Sequence[Path], seconds: float, cache: Path) -> ClipEmbeddings:
    """Embed the first `seconds` of each file, using the cache folder."""
    file = cache / f"{embedder.name}-{embedder.fingerprint}-{seconds:g}.safetensors"
    tensors, unsaved, found = _read_cache(file), 0, []
    for path in tqdm(paths, desc=f"embedding ({embedder.name})", unit="clip"):
        key = content_hash(path)
        if f"{key}.joint" not in tensors:
            embeddings = _embed_clip(embedder, path, seconds)
            tensors |= {f"{key}.{name}": value.contiguous() for name, value in embeddings._asdict().items()}
            unsaved += 1
        if unsaved == _WRITE_EVERY:
            _write_cache(file, tensors)
            unsaved = 0
        found.append([tensors[f"{key}.{name}"] for name in ClipEmbeddings._fields])
    if unsaved:
        _write_cache(file, tensors)
    return ClipEmbeddings(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def set_hash(paths: Sequence[Path]) -> str:
    """16 hex digits over the contents of a set of files; order and names do not matter."""
    return hashlib.sha256("".join(sorted(map(content_hash, paths))).encode()).hexdigest()[:16]


def content_hash(path: Path) -> str:
    """The file's sha256, computed again only if the file changes."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    return file_sha256(path)


def _embed_clip(embedder: Embedder, path: Path, seconds: float) -> ClipEmbeddings:
    wav, rate = audio.read(path)
    wav = mono_at(wav[:, : round(seconds * rate)], rate, embedder)
    empty = torch.empty(0)
    posteriors = embedder.posteriors(wav)[0] if isinstance(embedder, Classifier) else empty
    joint = embedder.joint_audio(wav)[0] if isinstance(embedder, JointEmbedder) else empty
    return ClipEmbeddings(embedder.embed(wav)[0].clone(), posteriors.clone(), joint.clone())


def _read_cache(path: Path) -> dict[str, Tensor]:
    """Tensors named KEY.vectors, KEY.posteriors, KEY.joint; a damaged file counts as empty."""
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError:
        return {}


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)
