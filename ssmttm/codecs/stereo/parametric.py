"""Stereo from a mono codec and a few codes: how much side there is in each band, and how it relates to the mid.

The mono codec codes the mid; what the side has of it is described, not coded as a waveform (as in parametric stereo:
Breebaart and others, Parametric Coding of Stereo Audio, EURASIP 2005). So it serves codecs whose phases are free, where
a side with a waveform of its own would not fit the mid. In each band and frame there are two parameters of mid M and
side S:

    angle = atan(|S| / |M|)                 0: equal channels, pi / 4: as much side as mid, pi / 2: they cancel
    relation = <M, S> / (|M| |S|)           at pi / 4: 1 is left only, -1 right only, 0 unrelated channels

The decoder makes the side of the mid times the relation, and of a delayed mid (Lauridsen 1954) for the part that is
unrelated to it. In bands where the channels cancel (|M|^2 < 0.2 |S|^2) mid and side change places. What is quantised
are (related, unrelated) = angle * (relation, sqrt(1 - relation^2)), whose errors are those of the side's amplitude.

Shapes: B items, S samples, T frames, n spectra (two a frame), F bins, N bands, K codebooks, V entries, c their width.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmttm.audio.stereo import CANCEL
from ssmttm.codecs.base import Codec, nearest
from ssmttm.codecs.folder import read_codec_folder, write_codec_folder
from ssmttm.codecs.quantiser import principal_axes
from ssmttm.codecs.spectral import STFT
from ssmttm.errors import UserError

MODEL_TYPE = "ssmttm_parametric_stereo"
_SPECTRA = 2  # a frame; each spans two hops
_DELAY = 2  # spectra that the unrelated part lags behind
_UNRELATED = 0.5  # of the part of the side that is unrelated to the mid: all of it would cost level and phase more
_SPREAD = 1e-3  # of the energy of a frame, which decides on bands that hold less
_FLOOR = 1e-2  # energy of a band (a sine of full scale has 6e4) below which the channels count as equal
_SNAP = 0.04  # angles (28 dB) as near to equal or cancelling channels count as these
_SWAP = math.atan(CANCEL**-0.5)  # angle above which mid and side change places


@dataclasses.dataclass(frozen=True)
class ParametricStereoConfig:
    """The mono codec by name and fingerprint, and the sizes of the side's quantiser."""

    mono: str
    mono_fingerprint: str
    n_codebooks: int  # of the side
    n_bands: int = 20


class StereoParameters(NamedTuple):
    """angle in [0, pi / 2] and relation in [-1, 1], float [B, T, N] each."""

    angle: Tensor
    relation: Tensor

    def vectors(self) -> Tensor:
        """What is quantised: [B, T, 2 N]."""
        unrelated = (1 - self.relation.square()).clamp_min(0).sqrt()
        return torch.cat([self.angle * self.relation, self.angle * unrelated], dim=-1)

    @classmethod
    def from_vectors(cls, vectors: Tensor) -> "StereoParameters":
        """Those of vectors [B, T, 2 N], which need not be exact."""
        related, unrelated = vectors.chunk(2, dim=-1)
        unrelated = unrelated.clamp_min(0)
        length = torch.hypot(related, unrelated)
        angle = torch.where(length < _SNAP, 0.0, length)
        angle = torch.where(angle > math.pi / 2 - _SNAP, math.pi / 2, angle)
        return cls(angle, related / length.clamp_min(1e-9))


class SideQuantiser(nn.Module):
    """K codebooks, each of the principal components of what the ones before it leave of vectors [.., 2 N]."""

    codebooks: Tensor  # [K, V, c]
    axes: Tensor  # [K, c, 2 N], orthonormal rows
    means: Tensor  # [K, 2 N]

    def __init__(self, n_codebooks: int, codebook_size: int, width: int, n_bands: int) -> None:
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(n_codebooks, codebook_size, width))
        self.register_buffer("axes", torch.zeros(n_codebooks, width, 2 * n_bands))
        self.register_buffer("means", torch.zeros(n_codebooks, 2 * n_bands))

    def encode(self, vectors: Tensor) -> Tensor:
        """[B, T, 2 N] -> codes int64 [B, K, T]."""
        codes = []
        for book, axes, mean in zip(self.codebooks, self.axes, self.means, strict=True):
            vectors = vectors - mean
            codes.append(nearest(vectors @ axes.T, book, "euclidean"))
            vectors = vectors - book[codes[-1]] @ axes
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, <= K, T] -> [B, T, 2 N]."""
        total = torch.zeros(1, device=codes.device)
        for k in range(codes.shape[1]):
            total = total + self.means[k] + self.codebooks[k][codes[:, k]] @ self.axes[k]
        return total

    @torch.no_grad()
    def fit(self, vectors: Tensor, rounds: int = 12) -> None:
        """Fit all codebooks to vectors [n, 2 N] by `rounds` of k-means each. Uses torch's global generator."""
        for k, book in enumerate(self.codebooks):
            mean, axes, _ = principal_axes(vectors, book.shape[1])
            self.means[k], self.axes[k] = mean, axes
            vectors = vectors - mean
            z = vectors @ axes.T  # [n, c]
            book.copy_(z[torch.randperm(len(z))[: len(book)]])
            for _ in range(rounds):
                index = nearest(z, book, "euclidean")
                counts = torch.bincount(index, minlength=len(book))[:, None]
                sums = torch.zeros_like(book).index_add_(0, index, z)
                spare = z[torch.randint(len(z), (len(book),))]
                book.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), spare))
            vectors = vectors - book[nearest(z, book, "euclidean")] @ axes


class ParametricStereoCodec(Codec):
    """Stereo from a mono codec: the module's docstring. The codebooks of the mid come first, then those of the side, so
    the first ones alone are the mono codec, whose sound is then on both channels.

    Args:
        config: see there.
        mono: the codec that it names.

    Raises:
        UserError: `mono` is another codec.
    """

    channels = 2
    bank: Tensor  # 1 where a bin is in a band [F, N]

    def __init__(self, config: ParametricStereoConfig, mono: Codec, name: str) -> None:
        super().__init__()
        if mono.fingerprint != config.mono_fingerprint:
            raise UserError(f"codec {name} is for {config.mono} {config.mono_fingerprint}, got {mono.fingerprint}")
        self.config, self.mono, self.name = config, mono, name
        self.sample_rate, self.hop_length = mono.sample_rate, mono.hop_length
        self.n_codebooks, self.codebook_size = mono.n_codebooks + config.n_codebooks, mono.codebook_size
        self.similarity = mono.similarity
        self.n_mono = mono.n_codebooks
        hop = self.hop_length // _SPECTRA
        self.stft = STFT(2 * hop, hop)
        bank = band_matrix(self.sample_rate, 2 * hop, config.n_bands)
        self.register_buffer("bank", bank, persistent=False)
        width = mono.codebook_vectors().shape[2]
        self.side = SideQuantiser(config.n_codebooks, self.codebook_size, width, config.n_bands)
        # A sample depends on spectra around it, whose windows reach two hops further, and on delayed ones.
        reach = math.ceil(2 * hop / self.hop_length)
        delay = math.ceil(_DELAY * hop / self.hop_length)
        own = mono.context
        self.context = None if own is None else (own[0] + reach + delay, own[1] + reach)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._hashed_weights()} {self.mono.fingerprint}".encode()).hexdigest()[:16]

    def weights(self) -> dict[str, Tensor]:
        """Those of the side; the mono codec has its own file."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith("side.")}

    def codebook_vectors(self) -> Tensor:
        return torch.cat([self.mono.codebook_vectors()[: self.n_mono], self.side.codebooks])

    def _similarity_of(self, k: int) -> str:
        return self.similarity if k < self.n_mono else "euclidean"

    def _encode(self, wav: Tensor) -> Tensor:
        left, right = wav.float().unbind(1)  # [B, S] each
        mid, side = (left + right) / 2, (left - right) / 2
        spectra = self.stft(mid), self.stft(side)
        codes = self.side.encode(self.measure(*spectra).vectors())
        swapped = self._decoded(codes).angle > _SWAP  # [B, T, N]
        if swapped.any():
            mid = mid + self.stft.inverse(self._in_bins(swapped.float()) * (spectra[1] - spectra[0]))
        return torch.cat([self.mono._encode(mid[:, None])[:, : self.n_mono], codes], dim=1)

    def _decode(self, codes: Tensor) -> Tensor:
        return self._decode_at(codes, 0)

    def _decode_at(self, codes: Tensor, first: int) -> Tensor:
        mid = self.mono._decode_at(codes[:, : self.n_mono], first)[:, 0]  # [B, S]
        if codes.shape[1] <= self.n_mono:
            return torch.stack([mid, mid], dim=1)
        mid, side = self.upmix(mid, self._decoded(codes[:, self.n_mono :]))
        return torch.stack([mid + side, mid - side], dim=1)

    def measure(self, mid: Tensor, side: Tensor) -> StereoParameters:
        """The parameters of spectra of mid and side, complex [B, n, F]."""
        energies = mid.abs().square(), side.abs().square(), (mid * side.conj()).real
        bands = [self._in_frames(energy @ self.bank) for energy in energies]
        mm, ss, ms = (band + _SPREAD * band.sum(-1, keepdim=True) for band in bands)  # [B, T, N] each
        relation = ms / (mm * ss).sqrt().clamp_min(1e-9)
        return StereoParameters(torch.atan2(ss.sqrt(), (mm + _FLOOR).sqrt()), relation.clamp(-1, 1))

    def upmix(self, sent: Tensor, parameters: StereoParameters) -> tuple[Tensor, Tensor]:
        """Mid and side [B, S] of the coded signal [B, S]."""
        angle, relation = parameters
        swapped = angle > _SWAP  # [B, T, N]
        gain = torch.where(swapped, math.pi / 2 - angle, angle).tan()
        related, unrelated = gain * relation, _UNRELATED * gain * (1 - relation.square()).clamp_min(0).sqrt()
        spectrum = self.stft(sent)  # [B, n, F]
        late = torch.cat([torch.zeros_like(spectrum[:, :_DELAY]), spectrum[:, :-_DELAY]], dim=1)
        other = self._in_bins(related) * spectrum + self._in_bins(unrelated) * late
        if not swapped.any():
            return sent, self.stft.inverse(other)
        swap = self._in_bins(swapped.float())
        mid = sent + self.stft.inverse(swap * (other - spectrum))
        return mid, self.stft.inverse(torch.lerp(other, spectrum, swap.to(other.dtype)))

    def _decoded(self, codes: Tensor) -> StereoParameters:
        """The parameters of codes of the side, [B, K, T]."""
        return StereoParameters.from_vectors(self.side.decode(codes))

    def _in_frames(self, energies: Tensor) -> Tensor:
        """Sums over the spectra of each frame and the one before and after it: [B, n, N] -> [B, T, N]."""
        return nn.functional.pad(energies, (0, 0, 1, 1)).unfold(1, _SPECTRA + 2, _SPECTRA).sum(-1)

    def _in_bins(self, values: Tensor) -> Tensor:
        """[B, T, N] -> [B, n, F]."""
        return values.repeat_interleave(_SPECTRA, dim=1) @ self.bank.T

    def save(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors (float16): of the side only."""
        write_codec_folder(folder, MODEL_TYPE, dataclasses.asdict(self.config), self.weights(), half=True)

    @classmethod
    def load(cls, folder: Path | str, mono: Codec, name: str | None = None) -> "ParametricStereoCodec":
        """Load a folder written by `save`. Raises UserError if it is damaged, or for another mono codec."""
        return read_codec_folder(
            folder, lambda config: cls(ParametricStereoConfig(**config), mono, name or Path(folder).name)
        )


def band_matrix(sample_rate: int, window: int, n_bands: int) -> Tensor:
    """1 where a bin is in a band: float32 [F, N]. Bands are equally wide on the scale of Glasberg and Moore (1990), of
    one bin at least.

    Raises:
        UserError: there are fewer bins than bands.
    """
    n_bins = window // 2 + 1
    if n_bands > n_bins:
        raise UserError(f"{n_bands} bands need as many bins, a window of {window} samples has {n_bins}")
    hertz = torch.arange(n_bins, dtype=torch.float64, device="cpu") * sample_rate / window
    position = (1 + 0.00437 * hertz).log()
    wanted = (position / position[-1] * n_bands).floor().long().clamp(max=n_bands - 1)
    band, used = [], 0
    for bin_, place in enumerate(wanted.tolist()):  # no band is left out, so low bands may be one bin wide
        used = min(place, used + 1) if bin_ else 0
        used = max(used, n_bands - (n_bins - bin_))
        band.append(used)
    return nn.functional.one_hot(torch.tensor(band, device="cpu"), n_bands).float()
