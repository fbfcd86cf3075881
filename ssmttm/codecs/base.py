"""The interface of all codecs: waveform <-> codes <-> latents."""

from abc import abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.codecs.autoencoder import Autoencoder
from ssmttm.errors import UserError


class CodecOutput(NamedTuple):
    """Output of a codec's training forward."""

    audio: Tensor  # [B, C, S], of the input's length
    codes: Tensor  # int64 [B, K, T]; of a VAE its latents, float [B, c, T]
    losses: dict[str, Tensor]  # scalars `codebook` and `commitment` (DAC, arXiv 2306.06546, section 3.2); a VAE's `kl`


class Codec(Autoencoder):
    """A neural audio codec of C = `channels` audio channels, 1 or 2 (left, right).

    Its latents are its codebook vectors, concatenated over the codebooks (DAC's "projected latents", C = K times the
    codebook width). Unlike the sum over codebooks, they can be mapped back to the same codes.

    Attributes:
        similarity: how the nearest codebook entry is found.
    """

    n_codebooks: int
    codebook_size: int
    similarity: Literal["cosine", "euclidean"]

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.n_codebooks * self.codebook_vectors().shape[2]

    def keep_codebooks(self, n: int) -> "Codec":
        """Use only the first n codebooks (a lower bit rate). Returns self."""
        available = len(self.codebook_vectors())
        if not 1 <= n <= available:
            raise UserError(f"codec {self.name} has {available} codebooks: n_codebooks must be in [1, {available}]")
        self.n_codebooks = n
        return self

    def zeros(self, n_frames: int) -> Tensor:
        return torch.zeros(1, self.n_codebooks, n_frames, dtype=torch.int64)

    def decoder_stages(self) -> list[nn.Module]:
        """Decoder modules, in order, whose outputs can be distilled: [B, D, T'] each, or [B, T', D] of a `Stack`."""
        return []

    @abstractmethod
    def codebook_vectors(self) -> Tensor:
        """All codebooks, float [K or more, V, c]."""

    @abstractmethod
    def _encode(self, wav: Tensor) -> Tensor:
        """[B, C, T * hop] -> codes [B, K, T]."""

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
        self.check_frames(codes)
        with no_autocast(codes):
            return self._decode_at(codes.long(), first)

    def to_latents(self, codes: Tensor) -> Tensor:
        """Codebook vectors of codes [B, K, T], concatenated over the codebooks: [B, C, T]."""
        self.check_frames(codes)
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

    def check_frames(self, codes: Tensor) -> None:  # type: ignore[override]
        """Raise UserError unless these are codes [B, K, T] in [0, codebook_size)."""
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


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device: a residual quantiser's codes need full precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def nearest(vectors: Tensor, book: Tensor, similarity: str) -> Tensor:
    """Index of the entry of `book` [V, c] nearest to each vector [..., c] by "cosine" (DAC) or "euclidean": [...]."""
    if similarity == "cosine":
        return (vectors @ F.normalize(book, dim=-1).T).argmax(dim=-1)
    return (2 * vectors @ book.T - book.square().sum(dim=-1)).argmax(dim=-1)
