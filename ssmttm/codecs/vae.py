"""VAEs of audio: waveform <-> continuous latents, which have no codes.

Shapes: B items, C audio channels, S samples, c latent channels, T frames, r latent frames in a patch.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderOobleck
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ssmttm.codecs.autoencoder import Autoencoder
from ssmttm.codecs.base import CodecOutput, no_autocast
from ssmttm.codecs.receptive_field import upsampling_context
from ssmttm.errors import UserError, first_line
from ssmttm.hub import checkpoint_folder, split_revision, with_commit

CLASS_NAME = "AutoencoderOobleck"  # in config.json
WEIGHTS = "diffusion_pytorch_model.safetensors"
SUBFOLDER = "vae"  # of a whole pipeline's folder


class OobleckVAE(Autoencoder):
    """diffusers' AutoencoderOobleck (the VAE of Stable Audio Open, arXiv 2407.14358, and of ACE-Step 1.5), mono or
    stereo. It can be trained by the codec task. Raises UserError if the sizes of its config do not fit each other.

    Attributes:
        latent_channels: c.
    """

    kind = "VAE"

    def __init__(self, model: AutoencoderOobleck, name: str = "oobleck") -> None:
        super().__init__()
        config: Any = model.config
        self.model, self.name = model, name
        self.channels, self.latent_channels = config.audio_channels, config.decoder_input_channels
        self.sample_rate, self.hop_length = config.sampling_rate, math.prod(config.downsampling_ratios)
        if self.channels not in (1, 2):
            raise UserError(f"{self.title} has {self.channels} channels: only mono and stereo are supported")
        if config.encoder_hidden_size != 2 * self.latent_channels:
            raise UserError(
                f"{self.title}: encoder_hidden_size {config.encoder_hidden_size} must be twice decoder_input_channels "
                f"{self.latent_channels}, a mean and a scale each"
            )
        self.context = upsampling_context(config.downsampling_ratios[::-1])

    def forward(self, wav: Tensor) -> CodecOutput:
        """Reconstruct a waveform [B, C, S], with gradients: from a sample of the latents in training, else from their
        mean. The loss `kl` is the divergence from a standard normal, summed over channels, mean over frames."""
        posterior = OobleckDiagonalGaussianDistribution(self.model.encoder(self.pad(wav)).float())
        latents = posterior.sample() if self.training else posterior.mean  # [B, c, T]
        audio = self._pad_to_frames(self.model.decoder(latents), latents.shape[-1])
        kl = 0.5 * posterior.kl()  # diffusers leaves out the half
        return CodecOutput(audio[..., : wav.shape[-1]], latents, {"kl": kl})

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav float [B, C, S] at `sample_rate`, S >= 1 -> the mean of the latents, float32 [B, c, ceil(S / hop)].

        Raises:
            UserError: the waveform has a wrong shape or dtype, or is not finite.
        """
        self.check_wav(wav)
        with no_autocast(wav):
            return self.model.encode(self.pad(wav)).latent_dist.mean

    @torch.no_grad()
    def decode(self, frames: Tensor, first: int = 0) -> Tensor:
        """Latents float [B, c, T] -> wav float [B, C, T * hop]. Raises UserError as `check_frames`."""
        self.check_frames(frames)
        with no_autocast(frames):
            return self._decode(frames.float())

    def zeros(self, n_frames: int) -> Tensor:
        return torch.zeros(1, self.latent_channels, n_frames)

    def check_frames(self, frames: Tensor) -> None:
        """Raise UserError unless these are finite latents, float [B, c, T]."""
        check_latents(frames, self.latent_channels, self.title)

    def save(self, folder: Path | str, half: bool = False) -> None:
        """Write config.json and the weights (float16 if `half`) as diffusers does; it can be loaded by either."""
        model = self.model
        if half:
            model = AutoencoderOobleck.from_config(model.config)
            model.load_state_dict(self.model.state_dict())
            model.half()
        model.save_pretrained(folder)

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def _decode(self, frames: Tensor) -> Tensor:
        return self._pad_to_frames(self.model.decode(frames).sample, frames.shape[-1])

    def _pad_to_frames(self, wav: Tensor, frames: int) -> Tensor:
        """Pad with zeros to full frames: with odd ratios the model's output is a few samples short."""
        return F.pad(wav, (0, frames * self.hop_length - wav.shape[-1]))


class PatchedVAE(Autoencoder):
    """A VAE by patches [B, c * r, T] of r latent frames each, so that its frame rate is that of coarse codes."""

    kind = "VAE"

    def __init__(self, vae: OobleckVAE, patch: int) -> None:
        super().__init__()
        self.vae, self.patch = vae, patch
        self.name, self.channels, self.sample_rate = vae.name, vae.channels, vae.sample_rate
        self.hop_length = vae.hop_length * patch
        self.context = None if vae.context is None else tuple(-(-frames // patch) for frames in vae.context)

    def encode(self, wav: Tensor) -> Tensor:
        """As `OobleckVAE.encode`, [B, c * r, T]."""
        return to_patches(self.vae.encode(self.pad(wav)), self.patch)

    def decode(self, frames: Tensor, first: int = 0) -> Tensor:
        """As `OobleckVAE.decode`."""
        self.check_frames(frames)
        return self.vae.decode(from_patches(frames, self.patch))

    def zeros(self, n_frames: int) -> Tensor:
        return to_patches(self.vae.zeros(n_frames * self.patch), self.patch)

    def check_frames(self, frames: Tensor) -> None:
        check_latents(frames, self.vae.latent_channels * self.patch, self.title)

    def weights(self) -> dict[str, Tensor]:
        return self.vae.weights()

    def _decode(self, frames: Tensor) -> Tensor:
        return self.vae._decode(from_patches(frames, self.patch))


def to_patches(latents: Tensor, patch: int) -> Tensor:
    """Latents [B, c, T * r] as patches [B, c * r, T]."""
    return rearrange(latents, "b c (t r) -> b (c r) t", r=patch)


def from_patches(patches: Tensor, patch: int) -> Tensor:
    """The inverse of `to_patches`."""
    return rearrange(patches, "b (c r) t -> b c (t r)", r=patch)


def check_latents(latents: Tensor, channels: int, title: str) -> None:
    """Raises UserError unless these are finite floats [B, channels, T]."""
    if latents.dim() != 3 or latents.shape[1] != channels or not latents.is_floating_point():
        raise UserError(
            f"{title} takes float latents [batch, {channels}, frames], got {latents.dtype} {list(latents.shape)}"
        )
    if not bool(latents.isfinite().all()):
        raise UserError(f"{title}: the latents contain NaN or infinite values")


def frames_per_code(vae_rate: float, codec_rate: float, vae: str, codec: str) -> int:
    """Latent frames per code frame, r, from the frames per second of both. Raises UserError unless it is a whole number
    of at least 1; `vae` and `codec` are their names."""
    ratio = vae_rate / codec_rate
    if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-9:
        raise UserError(
            f"VAE {vae} has {vae_rate:g} latents a second and codec {codec} {codec_rate:g} frames: the first must be a "
            "whole multiple of the second; choose another codec or VAE"
        )
    return round(ratio)


def from_config(fields: dict[str, Any]) -> OobleckVAE:
    """A VAE with random weights, from the fields of diffusers' class. Raises UserError for sizes that do not fit, and
    TypeError for an unknown field."""
    ratios, multiples = fields.get("downsampling_ratios"), fields.get("channel_multiples")
    if ratios is None or multiples is None or len(ratios) != len(multiples):
        raise UserError("codec: kind oobleck needs downsampling_ratios and channel_multiples of the same length")
    return OobleckVAE(AutoencoderOobleck(**fields))


def load_vae(name_or_path: str | Path, revision: str | None = None) -> OobleckVAE:
    """Load a VAE in eval mode and float32.

    Args:
        name_or_path: a folder with config.json and diffusion_pytorch_model.safetensors, as diffusers and `ssmttm
            export` write them, or whose subfolder `vae` has these; or a hub name.
        revision: branch, tag or commit of a hub name; `name` of the VAE has the commit that was found.

    Raises:
        UserError: there is none, its files are missing or damaged, or it is of another class.
    """
    name = str(name_or_path)
    if not Path(name).is_dir() and (split_revision(name)[0].count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"VAE {name}: no such folder, nor a hub name such as ACE-Step/Ace-Step1.5")
    files = [f"{place}{file}" for place in ("", f"{SUBFOLDER}/") for file in ("config.json", WEIGHTS)]
    folder = checkpoint_folder(name, files, "VAE", revision=revision)
    name = name if Path(name).is_dir() else with_commit(name, folder)
    if not (folder / WEIGHTS).is_file() and (folder / SUBFOLDER / WEIGHTS).is_file():
        folder = folder / SUBFOLDER
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not is_vae_config(config):
            raise UserError(f"VAE {name}: its config.json is not that of diffusers' {CLASS_NAME}: give another folder")
        vae = OobleckVAE(AutoencoderOobleck.from_config(config), name)
        vae.model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"VAE {name} cannot be loaded ({reason}): give a folder with config.json and {WEIGHTS}"
        ) from error
    return vae.float().eval()


def is_vae_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a VAE that `load_vae` loads."""
    return config.get("_class_name") == CLASS_NAME
