"""The interface of all codecs: waveform <-> codes <-> latents, with streaming decoding."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.errors import UserError


class CodecOutput(NamedTuple):
    """Output of a codec's training forward."""

    audio: Tensor  # [B, C, S], of the input's length
    codes: Tensor  # int64 [B, K, T]
    losses: dict[str, Tensor]  # scalars `codebook` and `commitment` (DAC, arXiv 2306.06546, section 3.2)


class Codec(nn.Module, ABC):
    """A neural audio codec of C = `channels` audio channels, 1 or 2 (left, right).

    Its latents are its codebook vectors, concatenated over the codebooks (DAC's "projected latents", C = K times the
    codebook width). Unlike the sum over codebooks, they can be mapped back to the same codes.

    Attributes:
        channels: C of the audio that it takes and returns.
        context: past and future frames that one decoded frame depends on; None if unbounded.
        similarity: how the nearest codebook entry is found.
    """

    name: str
    channels: int = 1
    sample_rate: int
    hop_length: int
    n_codebooks: int
    codebook_size: int
    context: tuple[int, int] | None
    similarity: Literal["cosine", "euclidean"]
    _hash: str = ""
    _hashed_version: list[tuple[Any, ...]] | None = None  # of the weights that `_hash` is of

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.n_codebooks * self.codebook_vectors().shape[2]

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

    def keep_codebooks(self, n: int) -> "Codec":
        """Use only the first n codebooks (a lower bit rate). Returns self."""
        available = len(self.codebook_vectors())
        if not 1 <= n <= available:
            raise UserError(f"codec {self.name} has {available} codebooks: n_codebooks must be in [1, {available}]")
        self.n_codebooks = n
        return self

    def decoder_stages(self) -> list[nn.Module]:
        """Decoder modules, in order, whose outputs can be distilled: [B, D, T'] each, or [B, T', D] of a `Stack`."""
        return []

    @abstractmethod
    def codebook_vectors(self) -> Tensor:
        """All codebooks, float [K or more, V, c]."""

    @abstractmethod
    def _encode(self, wav: Tensor) -> Tensor:
        """[B, C, T * hop] -> codes [B, K, T]."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] -> [B, C, T * hop]."""

    def _decode_at(self, codes: Tensor, first: int) -> Tensor:
        """`_decode` of codes that begin at frame `first` of a stream, for codecs whose output depends on it."""
        return self._decode(codes)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav float [B, C, S] at `sample_rate`, S >= 1 -> codes int64 [B, K, T], T = ceil(S / hop_length).

        Autocast is disabled, so the codes are the same inside it.

        Raises:
            UserError: the waveform has a wrong shape or dtype, or is not finite.
        """
        self.check_wav(wav)
        with no_autocast(wav):
            return self._encode(self.pad(wav))[:, : self.n_codebooks]

    @torch.no_grad()
    def decode(self, codes: Tensor, first: int = 0) -> Tensor:
        """Codes [B, K, T] in [0, codebook_size) -> wav float [B, C, T * hop_length]. Autocast is disabled.

        Args:
            first: position of the first frame in a stream, on which the output of some codecs depends.

        Raises:
            UserError: the codes have a wrong shape or dtype, or are out of range.
        """
        self._check_codes(codes)
        with no_autocast(codes):
            return self._decode_at(codes.long(), first)

    def to_latents(self, codes: Tensor) -> Tensor:
        """Codebook vectors of codes [B, K, T], concatenated over the codebooks: [B, C, T]."""
        self._check_codes(codes)
        return self._look_up(codes)

    def _look_up(self, codes: Tensor) -> Tensor:
        """`to_latents` without checks."""
        books = self.codebook_vectors()
        rows = [books[k][codes[:, k].long()] for k in range(codes.shape[1])]  # K x [B, T, c]
        return torch.cat(rows, dim=-1).transpose(1, 2)

    def from_latents(self, latents: Tensor) -> Tensor:
        """Nearest codes of latents [B, C, T], per codebook: int64 [B, K, T]."""
        books = self.codebook_vectors()[: self.n_codebooks]
        if latents.dim() != 3 or latents.shape[1] != self.latent_channels:
            raise UserError(f"latents must be [batch, {self.latent_channels}, frames], got {list(latents.shape)}")
        if not bool(latents.isfinite().all()):
            raise UserError("the latents contain NaN or infinite values")
        vectors = latents.transpose(1, 2).float().chunk(len(books), dim=-1)
        with no_autocast(latents):
            codes = [
                nearest(vector, book, self._similarity_of(k))
                for k, (vector, book) in enumerate(zip(vectors, books, strict=True))
            ]
        return torch.stack(codes, dim=1)

    def _similarity_of(self, k: int) -> str:
        """`similarity` of codebook k."""
        return self.similarity

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode chunks of codes [B, K, t >= 0] into audio [B, C, s] whose concatenation equals `decode` of all codes.

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
                f"codec {self.name} takes a {kind} waveform [batch, {self.channels}, samples], got {list(wav.shape)}: "
                f"{advice} first"
            )
        if not wav.is_floating_point():
            raise UserError(f"codec {self.name} takes a float waveform in [-1, 1], got {wav.dtype}: convert it first")
        if not torch.isfinite(wav).all():
            raise UserError(f"codec {self.name}: the waveform contains NaN or infinite samples: fix or drop that audio")

    def check_channels(self, channels: int, whose: str) -> None:
        """Raise UserError if audio of another number of channels is to be encoded; `whose` is its name."""
        if channels != self.channels:
            raise UserError(f"{whose}: {self.channel_mismatch(channels)}")

    def channel_mismatch(self, channels: int) -> str:
        """Why this codec does not fit audio of another number of channels."""
        if self.channels == 1:
            return (
                f"codec {self.name} is mono, and the audio has {channels} channels: use a stereo codec, such as "
                f"tiny_stereo or mid_side:NAME, or mono audio (--channels 1)"
            )
        return f"codec {self.name} is stereo, and the audio is mono: prepare it with --channels 2, or use a mono codec"

    def check_sample_rate(self, sample_rate: int) -> None:
        """Raise UserError if audio of another sample rate is to be encoded."""
        if sample_rate != self.sample_rate:
            raise UserError(f"codec {self.name} takes audio at {self.sample_rate} Hz, got {sample_rate}: resample it")

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dim() != 3 or codes.shape[1] != self.n_codebooks or codes.is_floating_point():
            raise UserError(
                f"codec {self.name} takes integer codes [batch, {self.n_codebooks}, frames], "
                f"got {codes.dtype} {list(codes.shape)}"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise UserError(
                f"codec {self.name}: codes must be in [0, {self.codebook_size}), got {int(codes.min())} to "
                f"{int(codes.max())}: remove special tokens first"
            )


class DecodeStream:
    """A decoding in progress: `Codec.decode_stream`, one chunk at a time."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.buffer: Tensor | None = None  # codes [B, K, t] that audio to come depends on
        self.first = 0  # the first frame of the buffer whose audio was not returned yet
        self.start = 0  # position of the buffer in the stream

    def push(self, codes: Tensor) -> Tensor:
        """Codes [B, K, t >= 0] -> the audio that is ready, [B, C, s], s >= 0."""
        codec = self.codec
        codec._check_codes(codes)
        self.buffer = buffer = codes if self.buffer is None else torch.cat([self.buffer, codes], dim=-1)
        history, look_ahead = codec.context or (0, buffer.shape[-1])  # unbounded: nothing is ready before the end
        ready = buffer.shape[-1] - look_ahead
        if ready <= self.first:
            return torch.zeros(len(codes), codec.channels, 0, device=codes.device)
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


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device: a residual quantiser's codes need full precision."""
    return torch.autocast(tensor.device.type, enabled=False)


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


def nearest(vectors: Tensor, book: Tensor, similarity: str) -> Tensor:
    """Index of the entry of `book` [V, c] nearest to each vector [..., c] by "cosine" (DAC) or "euclidean": [...]."""
    if similarity == "cosine":
        return (vectors @ F.normalize(book, dim=-1).T).argmax(dim=-1)
    return (2 * vectors @ book.T - book.square().sum(dim=-1)).argmax(dim=-1)
