"""TinyCodec: a spectral codec that trains and decodes on a CPU."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmttm.codecs.base import Codec, CodecOutput, no_autocast
from ssmttm.codecs.folder import read_codec_folder, write_codec_folder
from ssmttm.codecs.quantiser import ResidualQuantiser
from ssmttm.codecs.spectral import STFT, InverseSTFTHead, Stack, decoder_context, spectral_features
from ssmttm.config.codec import TinyCodecConfig

MODEL_TYPE = "ssmttm_tiny_codec"
_TRAINING_ONLY = ("quantiser.usage", "quantiser.seeded")


class TinyCodec(Codec):
    """STFT -> ConvNeXt -> residual quantiser -> ConvNeXt -> inverse STFT, at the frame rate and twice it.

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
        self.quantiser = ResidualQuantiser(
            c.encoder_width, c.n_codebooks, c.codebook_size, c.codebook_dim, c.quantiser_dropout
        )
        self.widen = nn.Linear(c.encoder_width, c.decoder_width)
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
        return CodecOutput(self._decode_latent(z)[..., : wav.shape[-1]], codes, losses)

    @torch.no_grad()
    def restart_unused_codes(self, wav: Tensor) -> dict[str, Tensor]:
        """Re-seed unused codebook entries from the encoder output of a training batch [B, 1, S].

        Returns the re-seeded entries, a bool mask over the leading axes of each parameter that holds codebooks, by its
        name; see `ResidualQuantiser.restart_unused`.
        """
        with no_autocast(wav):
            return {"quantiser.codebooks": self.quantiser.restart_unused(self._encode_latent(self.pad(wav)))}

    def decoder_stages(self) -> list[nn.Module]:
        return [self.decoder_coarse, self.decoder_fine]

    def codebook_vectors(self) -> Tensor:
        return self.quantiser.codebooks

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state_dict().items() if name not in _TRAINING_ONLY}

    def _encode(self, wav: Tensor) -> Tensor:
        return self.quantiser.encode(self._encode_latent(wav))

    def _decode(self, codes: Tensor) -> Tensor:
        return self._decode_latent(self.quantiser.decode(codes))

    def _encode_latent(self, wav: Tensor) -> Tensor:
        x = self.encoder_fine(self.embed(spectral_features(self.stft(wav[:, 0].float()))))  # [B, 2T, D]
        x = self.down(x.unflatten(1, (-1, 2)).flatten(2))  # [B, T, D]
        return self.encoder_norm(self.encoder_coarse(x))

    def _decode_latent(self, z: Tensor) -> Tensor:
        x = self.decoder_coarse(self.widen(z))  # [B, T, D]
        x = self.up(x).unflatten(2, (2, -1)).flatten(1, 2)  # [B, 2T, D]
        return self.head(self.decoder_fine(x))[:, None]

    def save(self, folder: Path | str, half: bool = True) -> None:
        """Write config.json and model.safetensors (float16 if `half`) to a folder."""
        write_codec_folder(folder, MODEL_TYPE, dataclasses.asdict(self.config), self.weights(), half)

    @classmethod
    def load(cls, folder: Path | str, name: str | None = None) -> "TinyCodec":
        """Load a folder written by `save`, in float32 and eval mode. Raises UserError if it is missing or damaged."""
        codec = read_codec_folder(folder, lambda config: cls(TinyCodecConfig(**config), name or Path(folder).name))
        codec.quantiser.seeded.fill_(True)
        return codec
