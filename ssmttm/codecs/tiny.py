"""TinyCodec: a spectral codec that trains and decodes on a CPU."""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmttm.codecs.base import Codec, CodecOutput, no_autocast
from ssmttm.codecs.folder import read_codec_folder, write_codec_folder
from ssmttm.codecs.notes import NoteSpectrum, OscillatorHead, frequencies
from ssmttm.codecs.quantiser import ResidualQuantiser, principal_axes
from ssmttm.codecs.spectral import STFT, InverseSTFTHead, Stack, decoder_context, spectral_features
from ssmttm.config.codec import TinyCodecConfig
from ssmttm.errors import UserError

MODEL_TYPE = "ssmttm_tiny_codec"
_GROWING = ("n_codebooks", "note_window", "note_width", "quantiser_dropout", "quantiser_gradient")
_TRAINING_ONLY = ("quantiser.usage", "quantiser.seeded")


class TinyCodec(Codec):
    """STFT -> ConvNeXt -> residual quantiser -> ConvNeXt -> inverse STFT, at the frame rate and twice it.

    With `note_window` the encoder also reads magnitudes in semitone bands, of that window, into latents of their own,
    and the decoder adds sinusoids at the frequencies of notes (`ssmttm.codecs.notes`).

    The decoder follows Vocos (arXiv 2306.00814), the quantiser DAC (arXiv 2306.06546). The encoder is bidirectional;
    the decoder's look-ahead is bounded (`look_ahead_ms`), so it streams.
    """

    similarity = "cosine"

    def __init__(self, config: TinyCodecConfig | None = None, name: str = "tiny") -> None:
        super().__init__()
        self.config = c = config or TinyCodecConfig()
        self.name = name
        self.sample_rate, self.hop_length = c.sample_rate, c.hop_length
        self.n_codebooks, self.codebook_size = c.n_codebooks, c.codebook_size
        self.stft = STFT(c.window, c.hop_length // 2)
        half_kernel = c.kernel // 2
        self.embed = nn.Linear(3 * (c.window // 2 + 1), c.encoder_width)
        self.encoder_fine = Stack(c.encoder_blocks[0], c.encoder_width, c.expansion, c.kernel, half_kernel)
        self.down = nn.Linear(2 * c.encoder_width, c.encoder_width)  # stride-2 convolution of two taps
        self.encoder_coarse = Stack(c.encoder_blocks[1], c.encoder_width, c.expansion, c.kernel, half_kernel)
        self.encoder_norm = nn.LayerNorm(c.encoder_width)
        latent_width = c.encoder_width
        if c.note_window:
            latent_width += c.note_width
            hop = c.hop_length // 2
            self.note_spectrum = NoteSpectrum(c.sample_rate, c.note_window, hop)
            self.oscillators = OscillatorHead(c.decoder_width, c.note_width, c.sample_rate, hop)
            self.embed_notes = nn.Linear(self.oscillators.read.out_features + c.encoder_width, c.note_width)
        self.quantiser = ResidualQuantiser(
            latent_width, c.n_codebooks, c.codebook_size, c.codebook_dim, c.quantiser_dropout, c.quantiser_gradient
        )
        self.widen = nn.Linear(latent_width, c.decoder_width)
        ahead_coarse, ahead_fine = c.decoder_look_ahead
        self.decoder_coarse = Stack(c.decoder_blocks[0], c.decoder_width, c.expansion, c.kernel, ahead_coarse)
        self.up = nn.Linear(c.decoder_width, 2 * c.decoder_width)  # transposed convolution of two taps, stride 2
        self.decoder_fine = Stack(c.decoder_blocks[1], c.decoder_width, c.expansion, c.kernel, ahead_fine)
        self.head = InverseSTFTHead(c.decoder_width, self.stft)
        self.context = decoder_context(c.decoder_blocks, c.decoder_look_ahead, c.kernel, 2, self.stft)

    def forward(self, wav: Tensor) -> CodecOutput:
        """Reconstruct a waveform [B, 1, S], with gradients; in training with quantiser dropout and usage counts."""
        z = self._encode_latent(self.pad(wav))
        with no_autocast(z):
            z, codes, losses = self.quantiser(z.float())
        first = int(torch.randint(1 << 20, ())) if self.training and self.config.note_window else 0
        return CodecOutput(self._decode_latent(z, first)[..., : wav.shape[-1]], codes, losses)

    @torch.no_grad()
    def restart_unused_codes(self, wav: Tensor) -> dict[str, Tensor]:
        """Re-seed unused codebook entries from the encoder output of a training batch [B, 1, S].

        Returns the re-seeded entries, a bool mask over the leading axes of each parameter that holds codebooks, by its
        name; see `ResidualQuantiser.restart_unused`.
        """
        with no_autocast(wav):
            return {"quantiser.codebooks": self.quantiser.restart_unused(self._encode_latent(self.pad(wav)))}

    @torch.no_grad()
    def grow_from(self, smaller: "TinyCodec", wav: Tensor) -> None:
        """Start from the weights of a codec without notes.

        Every other codebook, from the first on, is fitted to the notes of wav [B, 1, S] (a few minutes are enough):
        their latents are principal components of the note spectrum, the codebooks clusters. The codebooks between
        them are the first ones of `smaller`. The inverse STFT starts 20 dB quieter where the sinusoids play.

        Raises:
            UserError: the configs differ in other fields than these, or `smaller` has too few codebooks.
        """
        for field in dataclasses.fields(TinyCodecConfig):
            ours, theirs = getattr(self.config, field.name), getattr(smaller.config, field.name)
            if ours != theirs and field.name not in _GROWING:
                raise UserError(
                    f"codec {smaller.name} has {field.name}={theirs} and this one {ours}: they must be equal"
                )
        of_notes, copied = range(0, self.n_codebooks, 2), range(1, self.n_codebooks, 2)
        if smaller.config.note_window or not self.config.note_window or smaller.n_codebooks < len(copied):
            raise UserError(
                f"codec {smaller.name} cannot start this one: it must have no note_window and at least {len(copied)} "
                f"codebooks, and this one must have a note_window"
            )
        width = self.config.encoder_width
        own = self.state_dict()  # shares memory with the weights
        for name, theirs in smaller.state_dict().items():
            if not name.startswith(("quantiser.", "widen.weight")):
                own[name].copy_(theirs)
        own["widen.weight"][:, :width] = smaller.widen.weight
        own["widen.weight"][:, width:] = 0
        lowest = int(frequencies(self.sample_rate)[-1] * self.config.window / self.sample_rate)
        own["head.project.bias"][:lowest] -= math.log(10)
        with no_autocast(wav):
            self._fit_notes(self.note_spectrum(self.pad(wav)[:, 0].float()))
            z = self._encode_latent(self.pad(wav))
            notes_only = torch.cat([torch.zeros_like(z[..., :width]), z[..., width:]], dim=-1)
            self.quantiser.fit(notes_only, of_notes)
            self.quantiser.copy_from(smaller.quantiser, copied, width)

    @torch.no_grad()
    def _fit_notes(self, spectrum: Tensor) -> None:
        """Set the note latents to scaled principal components of note spectra [B, 2T, N], and their reading back."""
        pairs = spectrum.unflatten(1, (-1, 2)).flatten(2).flatten(0, 1)  # [B T, 2N]
        mean, axes, variances = principal_axes(pairs, self.config.note_width)
        scale = variances.mean().clamp_min(1e-6).rsqrt()  # unit variance on average, like the other latents
        inputs = pairs.shape[1]
        self.embed_notes.weight[:, :inputs] = scale * axes
        self.embed_notes.weight[:, inputs:] = 0
        self.embed_notes.bias.copy_(-scale * axes @ mean)
        self.oscillators.read.weight.copy_(axes.T / scale)
        self.oscillators.read.bias.copy_(mean)

    def decoder_stages(self) -> list[nn.Module]:
        return [self.decoder_coarse, self.decoder_fine]

    def codebook_vectors(self) -> Tensor:
        return self.quantiser.codebooks

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state_dict().items() if name not in _TRAINING_ONLY}

    def _encode(self, wav: Tensor) -> Tensor:
        return self.quantiser.encode(self._encode_latent(wav))

    def _decode(self, codes: Tensor) -> Tensor:
        return self._decode_at(codes, 0)

    def _decode_at(self, codes: Tensor, first: int) -> Tensor:
        return self._decode_latent(self.quantiser.decode(codes), first)

    def _encode_latent(self, wav: Tensor) -> Tensor:
        mono = wav[:, 0].float()
        x = self.encoder_fine(self.embed(spectral_features(self.stft(mono))))  # [B, 2T, D]
        x = self.down(x.unflatten(1, (-1, 2)).flatten(2))  # [B, T, D]
        x = self.encoder_norm(self.encoder_coarse(x))
        if not self.config.note_window:
            return x
        pairs = self.note_spectrum(mono).unflatten(1, (-1, 2)).flatten(2)  # [B, T, 2N]
        return torch.cat([x, self.embed_notes(torch.cat([pairs, x], dim=-1))], dim=-1)  # [B, T, D + note_width]

    def _decode_latent(self, z: Tensor, first: int = 0) -> Tensor:
        x = self.decoder_coarse(self.widen(z))  # [B, T, D]
        x = self.up(x).unflatten(2, (2, -1)).flatten(1, 2)  # [B, 2T, D]
        x = self.decoder_fine(x)
        wav = self.head(x)  # [B, S]
        if self.config.note_window:
            wav = wav + self.oscillators(z[..., self.config.encoder_width :], x, 2 * first)
        return wav[:, None]

    def save(self, folder: Path | str, half: bool = True) -> None:
        """Write config.json and model.safetensors (float16 if `half`) to a folder."""
        write_codec_folder(folder, MODEL_TYPE, dataclasses.asdict(self.config), self.weights(), half)

    @classmethod
    def load(cls, folder: Path | str, name: str | None = None) -> "TinyCodec":
        """Load a folder written by `save`, in float32 and eval mode. Raises UserError if it is missing or damaged."""
        codec = read_codec_folder(folder, lambda config: cls(TinyCodecConfig(**config), name or Path(folder).name))
        codec.quantiser.seeded.fill_(True)
        return codec
