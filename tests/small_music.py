"""Clips of the built-in corpus, and degradations of audio."""

from functools import cache

import torch
from torch import Tensor

from data_prep.builtin import compose, render
from data_prep.builtin.captions import write_captions
from ssmttm import audio

RATE, SECONDS = 24_000, 10


@cache
def clips(first: int, n: int) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Three adjacent clips of 10 s, [1, S], of each of n pieces, and the caption of each clip."""
    wavs, captions = [], []
    for index in range(first, first + n):
        piece = compose(77, index)
        wav = torch.from_numpy(render(piece))[None]
        wavs += [wav[:, start * RATE : (start + SECONDS) * RATE].clone() for start in (2, 12, 22)]
        captions += [write_captions(piece.truth, piece.id)[1]] * 3
    return tuple(wavs), tuple(captions)


def with_noise(wav: Tensor, decibel: float = 10.0) -> Tensor:
    """Add white noise that is so many dB below the music."""
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    return wav + noise * wav.square().mean().sqrt() * 10 ** (-decibel / 20)


def low_passed(wav: Tensor) -> Tensor:
    """Remove everything above 2 kHz."""
    return audio.resample(audio.resample(wav, RATE, 4_000), 4_000, RATE)


def shuffled(wav: Tensor) -> Tensor:
    """Shuffle segments of a quarter of a second."""
    size = RATE // 4
    segments = wav[0].unfold(0, size, size)
    return segments[torch.randperm(len(segments), generator=torch.Generator().manual_seed(0))].reshape(1, -1)


DEGRADATIONS = {
    "noise": with_noise,
    "low-pass": low_passed,
    "silence": torch.zeros_like,
    "shuffled": shuffled,
    "white noise": lambda wav: with_noise(torch.zeros_like(wav) + 1e-3, -40.0),
}
