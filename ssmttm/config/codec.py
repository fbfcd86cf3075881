"""The keys of a config's `codec` section for the tiny codec: types, defaults and checks."""

from dataclasses import dataclass

from ssmttm.errors import UserError


@dataclass
class TinyCodecConfig:
    """Sizes of a TinyCodec.

    Attributes:
        sample_rate: in Hz.
        hop_length: samples per code frame; the STFT hop is half of it.
        window: STFT window in samples, an even multiple of half the hop.
        encoder_blocks: ConvNeXt blocks of the encoder at twice the frame rate, and at the frame rate.
        decoder_blocks: ConvNeXt blocks of the decoder at the frame rate, and at twice the frame rate.
        decoder_look_ahead: future taps of each decoder block, at the frame rate and at twice the frame rate.
        quantiser_dropout: fraction of training items that keep only their first few codebooks.
    """

    sample_rate: int = 24000
    hop_length: int = 960
    window: int = 1920
    n_codebooks: int = 8
    codebook_size: int = 1024
    codebook_dim: int = 8
    encoder_width: int = 256
    encoder_blocks: tuple[int, int] = (2, 3)
    decoder_width: int = 384
    decoder_blocks: tuple[int, int] = (4, 3)
    decoder_look_ahead: tuple[int, int] = (1, 0)
    expansion: int = 2
    kernel: int = 7
    quantiser_dropout: float = 0.25

    def __post_init__(self) -> None:
        for field in ("encoder_blocks", "decoder_blocks", "decoder_look_ahead"):
            setattr(self, field, tuple(getattr(self, field)))
        if self.hop_length % 2 or self.window % self.hop_length or self.window < 2 * self.hop_length:
            raise UserError(
                f"codec: hop_length must be even and window a multiple of it (at least 2 times), got "
                f"hop_length={self.hop_length} and window={self.window}"
            )
        if max(self.decoder_look_ahead) >= self.kernel or self.kernel % 2 == 0:
            raise UserError(f"codec: kernel must be odd and above decoder_look_ahead, got {self.kernel}")
