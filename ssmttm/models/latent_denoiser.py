"""LatentDenoiser: the second stage. Given the latents of the first codebooks, it finds those of all others.

The latents of a codec are its codebook vectors, one group of channels a codebook (`Codec.to_latents`), normalised by a
mean and a spread of each codebook. The first `n_coarse_codebooks` groups are known, the sketch that a TokenLM writes; the
network takes noise off the others, as DiscoDiff's second network does (IEEE 10888056). What "noise" and "prediction"
mean is the business of `ssmttm.diffusion`.
Shapes: B batch, K codebooks, c channels a codebook, S = n_coarse_codebooks * c, C = (K - n_coarse_codebooks) * c, T frames,
L text tokens, D model width, E width of the time vector.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers.base import check_sizes
from ssmttm.models.conditioning import SinusoidalEmbedding, TextProjection
from ssmttm.models.controls import ChromaEmbedding, Controls, TempoEmbedding
from ssmttm.models.denoiser_stack import DenoiserStack
from ssmttm.models.unet import UNet
from ssmttm.text.condition import TextCondition

_PERIODS = 1_000.0  # what times and noise levels in [0, 1] are multiplied with before their sinusoids


@dataclass
class LatentDenoiserConfig:
    """What a LatentDenoiser is built from; the keys of a config's `model` section.

    n_codebooks, codebook_dim: of the codec. n_coarse_codebooks: how many of them are given. network: "stack" (blocks of
    two-way mixers) or "unet". layers: of a stack, a mixer's name or a list that is repeated over the depth. n_heads: of
    attention and cross-attention. time_dim: width of the vector that tells time, noise of the sketch, mean of the text
    and tempo. unet_mults: width of each level of a U-Net, each at half the frame rate of the one before, as a multiple
    of d_model; unet_blocks: residual blocks a level. chroma, tempo: whether it can be told a melody, a tempo.
    """

    n_codebooks: int = 8
    codebook_dim: int = 8
    n_coarse_codebooks: int = 1
    d_model: int = 192
    network: str = "stack"
    n_layers: int = 6
    layers: str | list[str] = "mamba2"
    d_state: int = 64
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 64
    n_heads: int = 6
    mlp_ratio: float = 2.0
    text_dim: int = 384
    text_norm: bool = True
    time_dim: int = 128
    dropout: float = 0.0
    unet_mults: list[int] = field(default_factory=lambda: [1, 1, 2])
    unet_blocks: int = 2
    chroma: bool = False
    tempo: bool = False

    def __post_init__(self) -> None:
        check_sizes(n_codebooks=self.n_codebooks, codebook_dim=self.codebook_dim, n_layers=self.n_layers)
        if not 1 <= self.n_coarse_codebooks < self.n_codebooks:
            raise UserError(
                f"model.n_coarse_codebooks={self.n_coarse_codebooks} of {self.n_codebooks} codebooks: give at least 1, and "
                "leave at least 1 to the denoiser"
            )
        if self.network not in ("stack", "unet"):
            raise UserError(f"unknown model.network {self.network!r}: choose from stack, unet")
        for name in ("layers", "unet_mults"):
            if not getattr(self, name):
                raise UserError(f"model.{name} is empty: name at least one")
        if self.time_dim % 2:
            raise UserError(f"model.time_dim={self.time_dim} is odd: choose an even one")

    @property
    def coarse_channels(self) -> int:
        """S."""
        return self.n_coarse_codebooks * self.codebook_dim

    @property
    def noisy_channels(self) -> int:
        """C."""
        return (self.n_codebooks - self.n_coarse_codebooks) * self.codebook_dim


@dataclass(frozen=True)
class Conditions:
    """What the denoiser is told, one row an item.

    Attributes:
        sketch: [B, S, T], normalised latents of the first codebooks.
        text: B captions; the null condition is the embedding of the empty one.
        has_coarse: [B] bool, False where the sketch is withheld; None: it is there.
        coarse_noise_aug: [B], the spread of the noise that was added to the sketch; None: none.
        wishes: a melody by the T frames and a tempo, where it was built for them.
        mask: [B, T] bool, True where a frame is real; None: all are.
    """

    coarse_codes: Tensor
    text: TextCondition
    has_coarse: Tensor | None = None
    coarse_noise_aug: Tensor | None = None
    controls: Controls = field(default_factory=Controls)
    mask: Tensor | None = None

    def with_text(self, text: TextCondition) -> "Conditions":
        """The same under other captions."""
        return replace(self, text=text)

    def without_coarse(self) -> "Conditions":
        """The same with every sketch withheld."""
        return replace(self, has_coarse=torch.zeros(len(self.coarse_codes), dtype=torch.bool, device=self.coarse_codes.device))


class LatentDenoiser(nn.Module):
    """The model. `set_statistics` must be called before its first use, or weights be loaded that hold them."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: LatentDenoiserConfig) -> None:
        super().__init__()
        self.config = c = config
        self.register_buffer("latent_mean", torch.full((c.n_codebooks,), torch.nan))
        self.register_buffer("latent_std", torch.full((c.n_codebooks,), torch.nan))
        self.input = nn.Linear(c.noisy_channels + c.coarse_channels, c.d_model)
        self.null_coarse = nn.Parameter(torch.zeros(c.coarse_channels))
        self.text = TextProjection(c.text_dim, c.d_model, c.text_norm)
        self.time = SinusoidalEmbedding(c.time_dim)
        self.coarse_noise_aug = SinusoidalEmbedding(c.time_dim)
        self.text_vector = nn.Linear(c.d_model, c.time_dim)
        self.chroma = ChromaEmbedding(c.d_model) if c.chroma else None
        self.tempo = TempoEmbedding(c.time_dim) if c.tempo else None
        self.network = self._network()
        self.norm = nn.RMSNorm(c.d_model, eps=1e-5)
        self.output = nn.Linear(c.d_model, c.noisy_channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """What the process asks of the network at this noise.

        Args:
            noisy: [B, C, T], any T.
            time: [B], 0 is clean and 1 is noise.

        Returns:
            [B, C, T].

        Raises:
            UserError: sizes do not fit, or it is told a melody or a tempo that it was not built for.
        """
        self._check(noisy, conditions)
        mask = conditions.mask
        if mask is not None and bool(mask.all()):
            mask = None
        coarse_codes = conditions.coarse_codes.transpose(1, 2)  # [B, T, S]
        if conditions.has_coarse is not None:
            coarse_codes = torch.where(conditions.has_coarse[:, None, None], coarse_codes, self.null_coarse)
        x = self.input(torch.cat([noisy.transpose(1, 2), coarse_codes], -1))  # [B, T, D]
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # the residual stream, under autocast too
        if self.chroma is not None:
            x = x + self.chroma(conditions.controls.chroma)
        text = self.text(conditions.text)
        x = self.network(x, self._vector(time, text.mean(), conditions), text, mask)
        return self.output(self.norm(x)).transpose(1, 2)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and spread of the latents of each codebook, [K] each."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def normalised(self, latents: Tensor, first: int = 0) -> Tensor:
        """Latents [B, n * c, T] of the codebooks from `first` on, each codebook with mean 0 and spread 1."""
        mean, std = self._statistics(latents, first)
        return (latents - mean) / std

    def denormalised(self, latents: Tensor, first: int = 0) -> Tensor:
        """The inverse of `normalised`."""
        mean, std = self._statistics(latents, first)
        return latents * std + mean

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        """Forward FLOPs of one item of `n_frames` frames and `n_text_tokens` tokens of text."""
        around = 2 * n_frames * (self.input.weight.numel() + self.output.weight.numel())
        if self.chroma is not None:
            around += self.chroma.flops(n_frames)
        return around + self.text.flops(n_text_tokens) + self.network.flops(n_frames, n_text_tokens)

    def _network(self) -> nn.Module:
        c = self.config
        if c.network == "unet":
            return UNet(c.d_model, c.unet_mults, c.unet_blocks, c.time_dim, c.n_heads, c.dropout)
        sizes = ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size", "n_heads", "dropout")
        layers = [c.layers] if isinstance(c.layers, str) else c.layers
        options: dict[str, Any] = {key: getattr(c, key) for key in sizes}
        return DenoiserStack(c.d_model, c.n_layers, layers, c.time_dim, c.mlp_ratio, options)

    def _vector(self, time: Tensor, text_mean: Tensor, conditions: Conditions) -> Tensor:
        """What holds for all frames alike, [B, E]."""
        noise = torch.zeros_like(time) if conditions.coarse_noise_aug is None else conditions.coarse_noise_aug
        vector = self.time(time * _PERIODS) + self.coarse_noise_aug(noise * _PERIODS) + self.text_vector(text_mean)
        return vector if self.tempo is None else vector + self.tempo(conditions.controls.tempo)

    def _statistics(self, latents: Tensor, first: int) -> tuple[Tensor, Tensor]:
        count = latents.shape[1] // self.config.codebook_dim
        part = slice(first, first + count)
        return tuple(
            values[part].repeat_interleave(self.config.codebook_dim)[:, None].to(latents.dtype)
            for values in (self.latent_mean, self.latent_std)
        )

    def _check(self, noisy: Tensor, conditions: Conditions) -> None:
        c, batch, length = self.config, len(noisy), noisy.shape[-1]
        wanted = {"noisy": (batch, c.noisy_channels, length), "coarse_codes": (batch, c.coarse_channels, length)}
        for name, given in (("noisy", noisy), ("coarse_codes", conditions.coarse_codes)):
            if tuple(given.shape) != wanted[name] or given.shape[-1] < 1:
                raise UserError(f"the {name} latents are {list(given.shape)}, the denoiser takes {list(wanted[name])}")
        if len(conditions.text.mask) != batch:
            raise UserError(f"there are {len(conditions.text.mask)} captions for a batch of {batch}: give one each")
        mask = conditions.mask
        if mask is not None and tuple(mask.shape) != (batch, length):
            raise UserError(f"the mask is {list(mask.shape)}, the denoiser takes {[batch, length]}")
        conditions.controls.check(c, "denoiser", batch, length)
