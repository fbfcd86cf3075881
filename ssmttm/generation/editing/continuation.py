"""Audio that generation starts from: read, encoded, and cut to whole frames at its end.

Shapes: C channels, S samples, P frames.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm import audio
from ssmttm.audio.defects import check_music
from ssmttm.audio.stereo import with_channels
from ssmttm.codecs import Autoencoder, Codec
from ssmttm.errors import UserError
from ssmttm.generation.clip_codes import ClipCodes

AudioInput = Tensor | tuple[Tensor, int] | str | Path  # [S] or [C, S] at the model's rate, with its rate, or a file


@dataclass(frozen=True)
class EncodedClip:
    """codes: of one clip, P frames of which the last ends with it. wav: the clip at the rate of what decodes them, [C,
    S]; the codes hold `n_padding` samples more before it."""

    codes: ClipCodes
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


def encode_clip(source: AudioInput, codec: Codec, n_coarse: int, vae: Autoencoder | None = None) -> EncodedClip:
    """Encode the audio that generation starts from. Raises UserError if it is shorter than a frame, or as
    `read_audio_input`.

    Args:
        codec: one that encodes, with the codebooks of the model, of which the first `n_coarse` are the language
            model's.
        vae: that of a model that generates its latents. The audio is then read at its rate and with its channels, and
            the codec encodes the same samples, at its own.
    """
    encoder = codec if vae is None else vae
    wav, hop = read_audio_input(source, encoder.sample_rate, encoder.channels), encoder.hop_length
    n_samples = wav.shape[-1]
    if n_samples < hop:
        seconds = f"{n_samples / encoder.sample_rate:.3f} s"
        raise UserError(f"the audio of {seconds} is shorter than a frame of {1 / encoder.frame_rate:.3f} s: give more")
    n_padding = -n_samples % hop
    padded = F.pad(wav, (n_padding, 0))  # [C, P * hop]
    of_codec = audio.resample(_on_channels(padded, codec.channels), encoder.sample_rate, codec.sample_rate)
    device = next(codec.parameters()).device
    with torch.inference_mode():
        codes = codec.encode(of_codec[None].to(device))  # [1, K, P]
        full = codes if vae is None else vae.encode(padded[None].to(device))
    return EncodedClip(ClipCodes(codes[:, :n_coarse], full), wav, n_padding)
