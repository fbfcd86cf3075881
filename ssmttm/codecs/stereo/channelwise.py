"""A stereo codec from a mono one, which codes two signals: left and right, or mid and side.

Shapes: B items, S samples, K codebooks, T frames.
"""

import torch
from torch import Tensor

from ssmttm.codecs.base import Codec
from ssmttm.errors import UserError

CODINGS = ("left_right", "mid_side")


class ChannelwiseCodec(Codec):
    """A mono codec applied to two signals of stereo audio one by one.

    The codebooks of the two alternate: codebook 2k is codebook k of the first signal, 2k + 1 that of the second, so the
    first n of them are a lower rate of both. Mid is (left + right) / 2, side (left - right) / 2. Mid and side needs a
    codec that keeps the waveform, such as DAC: where its phases are free, left and right are mixed up.

    Args:
        mono: the codec of one channel.
        coding: one of CODINGS.
        name: of the whole codec.

    Raises:
        UserError: unknown coding, or `mono` is a stereo codec.
    """

    channels = 2

    def __init__(self, mono: Codec, coding: str, name: str) -> None:
        super().__init__()
        if coding not in CODINGS:
            raise UserError(f"codec {name}: unknown coding {coding!r}: choose from {', '.join(CODINGS)}")
        if mono.channels != 1:
            raise UserError(f"codec {name}: {mono.name} is a stereo codec already: use it by its own name")
        self.mono, self.coding, self.name = mono, coding, name
        self.sample_rate, self.hop_length = mono.sample_rate, mono.hop_length
        self.n_codebooks, self.codebook_size = 2 * mono.n_codebooks, mono.codebook_size
        self.context, self.similarity = mono.context, mono.similarity

    def weights(self) -> dict[str, Tensor]:
        return {f"{self.coding}.{name}": tensor for name, tensor in self.mono.weights().items()}

    def keep_codebooks(self, n: int) -> Codec:
        """As `Codec.keep_codebooks`; at least one of each signal."""
        if n < 2:
            raise UserError(f"codec {self.name} codes two signals: n_codebooks must be at least 2, got {n}")
        return super().keep_codebooks(n)

    def codebook_vectors(self) -> Tensor:
        return self.mono.codebook_vectors()[: self.mono.n_codebooks].repeat_interleave(2, dim=0)

    def _encode(self, wav: Tensor) -> Tensor:
        first, second = wav[:, :1], wav[:, 1:]
        if self.coding == "mid_side":
            first, second = (first + second) / 2, (first - second) / 2
        n = self.mono.n_codebooks
        codes = [self.mono._encode(signal)[:, :n] for signal in (first, second)]  # [B, K / 2, T] each
        return torch.stack(codes, dim=2).flatten(1, 2)  # [B, K, T]

    def _decode(self, codes: Tensor) -> Tensor:
        return self._decode_at(codes, 0)

    def _decode_at(self, codes: Tensor, first: int) -> Tensor:
        one, two = (self.mono._decode_at(codes[:, start::2], first) for start in (0, 1))  # [B, 1, S] each
        if self.coding == "mid_side":
            one, two = one + two, one - two
        return torch.cat([one, two], dim=1)
