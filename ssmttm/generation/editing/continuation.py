"""Audio that generation starts from: read, encoded, and cut to whole frames at its end.

Shapes: C channels, S samples, K codebooks, P frames.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm import audio
from ssmttm.audio.defects import check_music
from ssmttm.audio.stereo import with_channels
from ssmttm.codecs import Codec
from ssmttm.errors import UserError

AudioInput = Tensor | tuple[Tensor, int] | str | Path  # [S] or [C, S] at the codec's rate, with its rate, or a file


@dataclass(frozen=True)
class EncodedClip:
    """codes: int64 [1, K, P], whose last frame ends with the clip. wav: the clip at the codec's rate, [C, S]; the codes
    hold `n_padding` samples more before it."""

    codes: Tensor
    wav: Tensor
    n_padding: int

    @property
    def n_samples(self) -> int:
        return self.wav.shape[-1]


def read_audio_input(source: AudioInput, sample_rate: int, channels: int = 1) -> Tensor:
    """Audio [channels, S] at a rate: mixed down, or mono doubled. Raises UserError if there is none, it is silent,
    constant, out of scale, no AudioInput, or has more than two channels where two are wanted."""
    if isinstance(source, str | Path):
        wav, _ = audio.read_music(source, sample_rate, mono=channels == 1)
        return _on_channels(wav, channels)
    wav, rate = source if isinstance(source, tuple) and len(source) == 2 else (source, sample_rate)
    if not isinstance(wav, Tensor) or not isinstance(rate, int | float) or not rate > 0:
        raise UserError("audio is a file, a tensor, or a tensor and its sample rate: use torch.from_numpy for an array")
    wav = wav.detach().cpu()
    wav = wav[None] if wav.ndim == 1 else wav
    if wav.ndim != 2 or not wav.is_floating_point():
        raise UserError(f"audio must be float [channels, samples], got {wav.dtype} {list(wav.shape)}")
    check_music(wav, rate, f"the audio of {wav.shape[-1] / rate:.2f} s")
    return audio.resample(_on_channels(wav.float(), channels), rate, sample_rate)


def _on_channels(wav: Tensor, channels: int) -> Tensor:
    """Audio [C, S] on so many channels."""
    return torch.from_numpy(with_channels(wav.numpy(), channels, "the audio"))


def encode_clip(source: AudioInput, codec: Codec) -> EncodedClip:
    """Encode the audio that generation starts from. Raises UserError if it is shorter than a frame, or as
    `read_audio_input`.

    Args:
        codec: one that encodes, with the codebooks of the model.
    """
    wav, hop = read_audio_input(source, codec.sample_rate, codec.channels), codec.hop_length
    n_samples = wav.shape[-1]
    if n_samples < hop:
        seconds = f"{n_samples / codec.sample_rate:.3f} s"
        raise UserError(f"the audio of {seconds} is shorter than a frame of {1 / codec.frame_rate:.3f} s: give more")
    n_padding = -n_samples % hop
    padded = F.pad(wav[None], (n_padding, 0))  # [1, C, P * hop]
    device = next(codec.parameters()).device
    with torch.inference_mode():
        codes = codec.encode(padded.to(device))
    return EncodedClip(codes, wav, n_padding)
