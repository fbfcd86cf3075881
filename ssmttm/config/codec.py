"""The keys of a config's `codec` section for the tiny codec: types, defaults and checks."""

from dataclasses import dataclass

from ssmttm.errors import UserError

QUANTISER_GRADIENTS = ("straight_through", "rotation")


@dataclass
class TinyCodecConfig:
    """Sizes of a TinyCodec.

    Attributes:
        sample_rate: in Hz.
        hop_length: samples per code frame; the STFT hop is half of it.
        window: STFT window in samples, an even multiple of half the hop.
        note_window: STFT window of the encoder's note spectrum in samples, a multiple of the hop; with it the decoder
            has a head of sinusoids at the frequencies of notes. 0: neither.
        note_width: latents of notes, at most as many as two frames have notes (138).
        encoder_blocks: ConvNeXt blocks of the encoder at twice the frame rate, and at the frame rate.
        decoder_blocks: ConvNeXt blocks of the decoder at the frame rate, and at twice the frame rate.
        decoder_look_ahead: future taps of each decoder block, at the frame rate and at twice the frame rate.
        quantiser_dropout: fraction of training items that keep only their first few codebooks.
        quantiser_gradient: how gradients pass the quantiser, "straight_through" or "rotation".
    """

    sample_rate: int = 24000
    hop_length: int = 960
    window: int = 1920
    note_window: int = 0
    note_width: int = 64
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
    quantiser_gradient: str = "straight_through"

    def __post_init__(self) -> None:
        for field in ("encoder_blocks", "decoder_blocks", "decoder_look_ahead"):
            setattr(self, field, tuple(getattr(self, field)))
        if self.hop_length % 2 or self.window % self.hop_length or self.window < 2 * self.hop_length:
            raise UserError(
                f"codec: hop_length must be even and window a multiple of it (at least 2 times), got "
                f"hop_length={self.hop_length} and window={self.window}"
            )
        if self.note_window % self.hop_length or not 1 <= self.note_width <= 2 * 69:
            raise UserError(
                f"codec: note_window must be a multiple of hop_length={self.hop_length}, or 0, and note_width in "
                f"[1, 138]; got {self.note_window} and {self.note_width}"
            )
        if self.quantiser_gradient not in QUANTISER_GRADIENTS:
            raise UserError(
                f"codec: quantiser_gradient must be {' or '.join(QUANTISER_GRADIENTS)}, got {self.quantiser_gradient}"
            )
        if max(self.decoder_look_ahead) >= self.kernel or self.kernel % 2 == 0:
            raise UserError(f"codec: kernel must be odd and above decoder_look_ahead, got {self.kernel}")
