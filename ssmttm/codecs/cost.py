"""What decoding costs, counted the same way for every codec."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.codecs.base import Codec


class DecodingCost(NamedTuple):
    """parameters: that decoding makes use of, with the codebooks. flops: of matrix products and convolutions, for a
    second of audio."""

    parameters: int
    flops: float


def decoding_cost(codec: Codec, seconds: float = 2.0) -> DecodingCost:
    """Decode so many seconds, rounded up to frames, and count; parameters are those that a gradient reaches."""
    frames = -int(-seconds * codec.frame_rate // 1)
    codes = torch.zeros(1, codec.n_codebooks, frames, dtype=torch.int64)
    parameters = [parameter for parameter in codec.parameters() if parameter.requires_grad]
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        wav = codec._decode(codes)
    reached = torch.autograd.grad(wav.sum(), parameters, allow_unused=True)
    count = sum(p.numel() for p, gradient in zip(parameters, reached, strict=True) if gradient is not None)
    books = codec.codebook_vectors()[: codec.n_codebooks]
    frozen_books = 0 if books.requires_grad else books.numel()
    return DecodingCost(count + frozen_books, counter.get_total_flops() * codec.frame_rate / frames)
