"""LatentDenoiser: the second stage. It predicts the latents of the remaining codebooks, or those of a VAE, from the
latents of the first codebooks.

The latents of a codec are its codebook vectors, one group of channels per codebook (`Codec.to_latents`), normalised by
each codebook's mean and standard deviation. The first `n_coarse_codebooks` groups are given: the coarse codes that a
TokenLM predicts. The network denoises the others, as DiscoDiff's second network does (IEEE 10888056).
`ssmttm.diffusion` defines the noise and the prediction target.

With `vae_channels` it denoises the continuous latents of a VAE in place of other codebooks, each channel normalised by
its own mean and standard deviation. Where there are several in a code frame, they are its patch: [c, T * r] is read as
[c * r, T], so that the network works at the frame rate of the codes.
Shapes: B batch, K codebooks, c channels per codebook, S = n_coarse_codebooks * c, C = (K - n_coarse_codebooks) * c, or
of a VAE vae_channels * vae_frames, G = K + vae_channels groups, T frames, L text tokens, D model width, E width of the
timestep embedding.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ssmttm.config.model import LatentDenoiserConfig
from ssmttm.errors import UserError
from ssmttm.models.conditioning import SinusoidalEmbedding, TextProjection
from ssmttm.models.controls import ControlledModel, Controls
from ssmttm.models.denoiser_stack import DenoiserStack
from ssmttm.models.unet import UNet
from ssmttm.text.condition import TextCondition

_TIME_SCALE = 1_000.0  # of times and noise levels in [0, 1] before their sinusoids


@dataclass(frozen=True)
class Conditions:
    """What the denoiser is conditioned on."""

    coarse_latents: Tensor  # [B, S, T], normalised latents of the coarse codes
    text: TextCondition  # B captions; the null condition is the embedding of the empty caption
    has_coarse: Tensor | None = None  # [B] bool, False where the coarse latents are dropped; None: all are given
    coarse_noise_aug: Tensor | None = None  # [B], standard deviation of the noise in the coarse latents; None: 0
    controls: Controls = field(default_factory=Controls)  # by frame
    mask: Tensor | None = None  # [B, T] bool, True at valid frames; None: all are valid

    def with_text(self, text: TextCondition) -> "Conditions":
        return replace(self, text=text)

    def without_controls(self) -> "Conditions":
        """Drop the controls of every item."""
        dropped = torch.ones(len(self.coarse_latents), dtype=torch.bool, device=self.coarse_latents.device)
        return replace(self, controls=self.controls.drop(dropped))

    def without_coarse(self) -> "Conditions":
        """Drop the coarse latents of every item."""
        latents = self.coarse_latents
        return replace(self, has_coarse=torch.zeros(len(latents), dtype=torch.bool, device=latents.device))


class LatentDenoiser(ControlledModel):
    """The model. Call `set_statistics` or load weights that hold the statistics before its first use."""

    latent_mean: Tensor
    latent_std: Tensor
    channel_groups: Tensor

    def __init__(self, config: LatentDenoiserConfig) -> None:
        super().__init__()
        self.config = c = config
        self.register_buffer("latent_mean", torch.full((len(c.group_sizes),), torch.nan))
        self.register_buffer("latent_std", torch.full((len(c.group_sizes),), torch.nan))
        groups = [group for group, size in enumerate(c.group_sizes) for _ in range(size)]
        self.register_buffer("channel_groups", torch.tensor(groups), persistent=False)  # [S + C]
        self.input = nn.Linear(c.noisy_channels + c.coarse_channels, c.d_model)
        self.null_coarse = nn.Parameter(torch.zeros(c.coarse_channels))
        self.text = TextProjection(c.text_dim, c.d_model, c.text_norm)
        self.time = SinusoidalEmbedding(c.time_dim)
        self.coarse_noise_aug = SinusoidalEmbedding(c.time_dim)
        self.text_vector = nn.Linear(c.d_model, c.time_dim)
        self.add_control_embeddings(c, c.d_model, c.time_dim)
        self.network = self._network()
        self.norm = nn.RMSNorm(c.d_model, eps=1e-5)
        self.output = nn.Linear(c.d_model, c.noisy_channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """The prediction of the diffusion objective: noisy [B, C, T], time [B] (0 is clean, 1 is noise) -> [B, C, T].

        Raises:
            UserError: shapes do not fit, or the model was not built for one of the controls.
        """
        self._check(noisy, conditions)
        mask = conditions.mask
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):  # a GPU would have to be waited for
            mask = None
        coarse = conditions.coarse_latents.transpose(1, 2)  # [B, T, S]
        if conditions.has_coarse is not None:
            coarse = torch.where(conditions.has_coarse[:, None, None], coarse, self.null_coarse)
        x = self.input(torch.cat([noisy.transpose(1, 2), coarse], -1))  # [B, T, D]
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # the residual stream is float32 under autocast too
        for embedding in self.embed_frames(conditions.controls):
            x = x + embedding
        text = self.text(conditions.text)
        x = self.network(x, self._embed_time(time, text.mean(), conditions), text, mask)
        return self.output(self.norm(x)).transpose(1, 2)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and standard deviation of each codebook's latents and of each channel of a VAE, [G] each."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def normalise(self, latents: Tensor, first: int = 0) -> Tensor:
        """Scale latents [B, n * c, T] of the codebooks from `first` on, and patches of a VAE's after those of all
        codebooks, to mean 0 and standard deviation 1."""
        mean, std = self._statistics(latents, first)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor, first: int = 0) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._statistics(latents, first)
        return latents * std + mean

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        """Forward FLOPs of one item of `n_frames` frames and `n_text_tokens` text tokens."""
        flops = 2 * n_frames * (self.input.weight.numel() + self.output.weight.numel())
        flops += self.control_flops(n_frames) + self.text.flops(n_text_tokens)
        return flops + self.network.flops(n_frames, n_text_tokens)

    def _network(self) -> UNet | DenoiserStack:
        c = self.config
        if c.network == "unet":
            return UNet(c.d_model, c.unet_mults, c.unet_blocks, c.time_dim, c.n_heads, c.dropout)
        return DenoiserStack(c.d_model, c.n_layers, c.layer_names, c.time_dim, c.mlp_ratio, c.mixer_options)

    def _embed_time(self, time: Tensor, text_mean: Tensor, conditions: Conditions) -> Tensor:
        """The timestep embedding with all that is constant over frames, [B, E]."""
        noise = torch.zeros_like(time) if conditions.coarse_noise_aug is None else conditions.coarse_noise_aug
        embedding = self.time(time * _TIME_SCALE) + self.coarse_noise_aug(noise * _TIME_SCALE)
        embedding = embedding + self.text_vector(text_mean)
        for control in self.embed_items(conditions.controls):
            embedding = embedding + control
        return embedding

    def _statistics(self, latents: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by channel, [n * c, 1] each."""
        start = sum(self.config.group_sizes[:first])
        groups = self.channel_groups[start : start + latents.shape[1]]
        mean, std = (values[groups][:, None].to(latents.dtype) for values in (self.latent_mean, self.latent_std))
        return mean, std

    def _check(self, noisy: Tensor, conditions: Conditions) -> None:
        c, batch, length = self.config, len(noisy), noisy.shape[-1]
        expected = {
            "noisy": (noisy, (batch, c.noisy_channels, length)),
            "coarse": (conditions.coarse_latents, (batch, c.coarse_channels, length)),
        }
        for name, (latents, shape) in expected.items():
            if tuple(latents.shape) != shape or latents.shape[-1] < 1:
                raise UserError(f"the denoiser takes {name} latents of shape {list(shape)}, got {list(latents.shape)}")
        if len(conditions.text.mask) != batch:
            raise UserError(f"got {len(conditions.text.mask)} captions for a batch of {batch}: give one per item")
        mask = conditions.mask
        if mask is not None and tuple(mask.shape) != (batch, length):
            raise UserError(f"the denoiser takes a mask of shape {[batch, length]}, got {list(mask.shape)}")
        conditions.controls.check(c, "denoiser", batch, length)
