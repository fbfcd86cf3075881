"""Pieces of the built-in corpus, rendered on the spot, and what can be done to spoil them."""

from functools import cache

import torch
from torch import Tensor

from data_prep.builtin import compose, render
from data_prep.builtin.captions import write_captions
from ssmttm import audio

RATE, SECONDS = 24_000, 10


@cache
def clips(first: int, n: int) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Three clips of 10 s, [1, S], of each of n pieces, side by side, and the caption of each clip."""
    wavs, captions = [], []
    for index in range(first, first + n):
        piece = compose(77, index)
        wav = torch.from_numpy(render(piece))[None]
        wavs += [wav[:, start * RATE : (start + SECONDS) * RATE].clone() for start in (2, 12, 22)]
        captions += [write_captions(piece.truth, piece.id)[1]] * 3
    return tuple(wavs), tuple(captions)


def with_noise(wav: Tensor, decibel: float = 10.0) -> Tensor:
    """White noise that much below the music."""
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    return wav + noise * wav.square().mean().sqrt() * 10 ** (-decibel / 20)


def low_passed(wav: Tensor) -> Tensor:
    """Nothing above 2 kHz."""
    return audio.resample(audio.resample(wav, RATE, 4_000), 4_000, RATE)


def shuffled(wav: Tensor) -> Tensor:
    """Pieces of a quarter of a second in another order."""
    size = RATE // 4
    cut = wav[0].unfold(0, size, size)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))].reshape(1, -1)


SPOILT = {
    "noise": with_noise,
    "low-pass": low_passed,
    "silence": torch.zeros_like,
    "shuffled": shuffled,
    "white noise": lambda wav: with_noise(torch.zeros_like(wav) + 1e-3, -40.0),
}
