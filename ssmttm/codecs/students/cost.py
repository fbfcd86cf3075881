"""What decoding costs, counted the same way for every codec."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.codecs.base import Codec


class DecodingCost(NamedTuple):
    """parameters: that decoding makes use of, with the codebooks. flops: of matrix products, convolutions and LSTMs,
    for a second of audio."""

    parameters: int
    flops: float


def decoding_cost(codec: Codec, seconds: float = 2.0) -> DecodingCost:
    """Decode so many seconds, rounded up to frames, and count; parameters are those that a gradient reaches."""
    frames = -int(-seconds * codec.frame_rate // 1)
    codes = torch.zeros(1, codec.n_codebooks, frames, dtype=torch.int64)
    parameters = [parameter for parameter in codec.parameters() if parameter.requires_grad]
    with torch.enable_grad(), counted_flops() as flops:
        wav = codec._decode(codes)
    reached = torch.autograd.grad(wav.sum(), parameters, allow_unused=True)
    count = sum(p.numel() for p, gradient in zip(parameters, reached, strict=True) if gradient is not None)
    books = codec.codebook_vectors()[: codec.n_codebooks]
    frozen_books = 0 if books.requires_grad else books.numel()
    return DecodingCost(count + frozen_books, flops() * codec.frame_rate / frames)


@contextmanager
def counted_flops() -> Iterator[Callable[[], int]]:
    """Yields a function that tells the FLOPs of what has run inside: matrix products, convolutions, and LSTMs, which
    torch's own counter leaves out."""
    of_lstms = 0

    def add(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal of_lstms
        if isinstance(module, nn.LSTM):
            weights = sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)
            of_lstms += 2 * weights * output[0].shape[:-1].numel()

    hook = register_module_forward_hook(add)
    try:
        with FlopCounterMode(display=False) as counter:
            yield lambda: counter.get_total_flops() + of_lstms
    finally:
        hook.remove()
