"""What codecs and VAEs share: waveform <-> frames (codes, or continuous latents), with streaming decoding."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.errors import UserError


class Autoencoder(nn.Module, ABC):
    """An autoencoder of C = `channels` audio channels, 1 or 2 (left, right), by frames of `hop_length` samples.

    Attributes:
        kind: a codec or a VAE, for the messages.
        channels: C of the audio that it takes and returns.
        context: past and future frames that one decoded frame depends on; None if unbounded.
    """

    kind = "codec"
    name: str
    channels: int = 1
    sample_rate: int
    hop_length: int
    context: tuple[int, int] | None
    _hash: str = ""
    _hashed_version: list[tuple[Any, ...]] | None = None  # of the weights that `_hash` is of

    @property
    def title(self) -> str:
        """How the messages call it."""
        return f"{self.kind} {self.name}"

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def look_ahead_ms(self) -> float | None:
        """Latency of streaming in milliseconds; None if the codec cannot stream."""
        return None if self.context is None else 1000 * self.context[1] / self.frame_rate

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the weights (names and float32 values)."""
        return self._hashed_weights()

    def _hashed_weights(self) -> str:
        """`weights_fingerprint` of the weights, computed again only once they have changed."""
        weights = self.weights()
        version = [(name, tensor.data_ptr(), *_version(tensor)) for name, tensor in weights.items()]
        if version != self._hashed_version:
            self._hash, self._hashed_version = weights_fingerprint(weights), version
        return self._hash

    def weights(self) -> dict[str, Tensor]:
        """The state dict without training-only buffers."""
        return self.state_dict()

    @abstractmethod
    def encode(self, wav: Tensor) -> Tensor:
        """wav float [B, C, S] at `sample_rate`, S >= 1 -> frames [B, ..., T], T = ceil(S / hop_length)."""

    @abstractmethod
    def decode(self, frames: Tensor, first: int = 0) -> Tensor:
        """Frames [B, ..., T], the first at position `first` of a stream -> wav float [B, C, T * hop_length]."""

    @abstractmethod
    def zeros(self, n_frames: int) -> Tensor:
        """Frames [1, ..., T] of zeros that `decode` takes."""

    @abstractmethod
    def _decode(self, frames: Tensor) -> Tensor:
        """`decode` with gradients, without checks."""

    @abstractmethod
    def check_frames(self, frames: Tensor) -> None:
        """Raise UserError unless `decode` takes these frames."""

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode chunks of frames [B, ..., t >= 0] into audio [B, C, s]; joined they equal `decode` of all frames.

        A frame is yielded as soon as its look-ahead is available; a codec with unbounded `context` (None) yields all
        audio at the end.
        """
        stream = DecodeStream(self)
        for chunk in chunks:
            if (wav := stream.push(chunk)).shape[-1]:
                yield wav
        if (last := stream.finish()) is not None:
            yield last

    def pad(self, wav: Tensor) -> Tensor:
        """Pad the waveform with zeros to whole frames: [B, C, S] -> [B, C, ceil(S / hop) * hop]."""
        return F.pad(wav, (0, -wav.shape[-1] % self.hop_length))

    def check_wav(self, wav: Tensor) -> None:
        """Raise UserError unless the waveform is a finite float [B, C, S], S >= 1."""
        if wav.dim() != 3 or wav.shape[1] != self.channels or wav.shape[-1] < 1:
            kind, advice = ("mono", "downmix it") if self.channels == 1 else ("stereo", "give it two channels")
            raise UserError(
                f"{self.title} takes a {kind} waveform [batch, {self.channels}, samples], got {list(wav.shape)}: "
                f"{advice} first"
            )
        if not wav.is_floating_point():
            raise UserError(f"{self.title} takes a float waveform in [-1, 1], got {wav.dtype}: convert it first")
        if not torch.isfinite(wav).all():
            raise UserError(f"{self.title}: the waveform contains NaN or infinite samples: fix or drop that audio")

    def check_channels(self, channels: int, whose: str) -> None:
        """Raise UserError if audio of another number of channels is to be encoded; `whose` is its name."""
        if channels != self.channels:
            raise UserError(f"{whose}: {self.channel_mismatch(channels)}")

    def channel_mismatch(self, channels: int) -> str:
        """Why this codec does not fit audio of another number of channels."""
        if self.channels == 1:
            return (
                f"{self.title} is mono, and the audio has {channels} channels: use a stereo codec, such as "
                f"tiny_stereo or mid_side:NAME, or mono audio (--channels 1)"
            )
        return f"{self.title} is stereo, and the audio is mono: prepare it with --channels 2, or use a mono codec"

    def check_sample_rate(self, sample_rate: int) -> None:
        """Raise UserError if audio of another sample rate is to be encoded."""
        if sample_rate != self.sample_rate:
            raise UserError(f"{self.title} takes audio at {self.sample_rate} Hz, got {sample_rate}: resample it")


class DecodeStream:
    """A decoding in progress: `Autoencoder.decode_stream`, one chunk at a time."""

    def __init__(self, codec: Autoencoder) -> None:
        self.codec = codec
        self.buffer: Tensor | None = None  # frames [B, ..., t] that audio to come depends on
        self.first = 0  # the first frame of the buffer whose audio was not returned yet
        self.start = 0  # position of the buffer in the stream

    def push(self, frames: Tensor) -> Tensor:
        """Frames [B, ..., t >= 0] -> the audio that is ready, [B, C, s], s >= 0."""
        codec = self.codec
        codec.check_frames(frames)
        self.buffer = buffer = frames if self.buffer is None else torch.cat([self.buffer, frames], dim=-1)
        history, look_ahead = codec.context or (0, buffer.shape[-1])  # unbounded: nothing is ready before the end
        ready = buffer.shape[-1] - look_ahead
        if ready <= self.first:
            return torch.zeros(len(frames), codec.channels, 0, device=frames.device)
        wav = codec.decode(buffer, self.start)[..., self.first * codec.hop_length : ready * codec.hop_length]
        drop = max(0, ready - history)
        self.buffer, self.first, self.start = buffer[..., drop:], ready - drop, self.start + drop
        return wav

    def finish(self) -> Tensor | None:
        """The rest of the audio, [B, C, s]; None if there is none."""
        buffer, self.buffer = self.buffer, None
        if buffer is None or buffer.shape[-1] <= self.first:
            return None
        return self.codec.decode(buffer, self.start)[..., self.first * self.codec.hop_length :]

    def clone(self) -> "DecodeStream":
        """A copy that goes on independently."""
        return copy.copy(self)  # the buffer is replaced, not changed in place


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes when the values do: torch's count of in-place writes, which leaves out fused optimisers and `.data`, and
    the sum of the bytes, which leaves out exchanged values but reads some 15 times faster than a hash."""
    count = 0 if tensor.is_inference() else tensor._version
    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    words = len(data) // 8 * 8
    return count, int(data[:words].view("int64").sum()) + int(data[words:].sum())


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 of names and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
