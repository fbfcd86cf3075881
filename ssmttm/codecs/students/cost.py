"""Parameters and FLOPs of decoding, for any codec or VAE."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.codecs.autoencoder import Autoencoder
from ssmttm.codecs.base import Codec


class DecodingCost(NamedTuple):
    """parameters: used in decoding, including codebooks. flops: of matrix products, convolutions and LSTMs, per second
    of audio."""

    parameters: int
    flops: float


def decoding_cost(decoder: Autoencoder, seconds: float = 2.0) -> DecodingCost:
    """Measured by decoding `seconds` of audio; the parameters counted are those that receive a gradient."""
    frames = decoder.zeros(-int(-seconds * decoder.frame_rate // 1))
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    with torch.enable_grad(), counted_flops() as flops:
        wav = decoder._decode(frames)
    reached = torch.autograd.grad(wav.sum(), parameters, allow_unused=True)
    count = sum(p.numel() for p, gradient in zip(parameters, reached, strict=True) if gradient is not None)
    if isinstance(decoder, Codec):
        books = decoder.codebook_vectors()[: decoder.n_codebooks]
        count += 0 if books.requires_grad else books.numel()
    return DecodingCost(count, flops() * decoder.frame_rate / frames.shape[-1])


@contextmanager
def counted_flops() -> Iterator[Callable[[], int]]:
    """Count FLOPs in the context, including LSTMs, which torch's counter omits. Yields a function that returns them."""
    lstm_flops = 0

    def add(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal lstm_flops
        if isinstance(module, nn.LSTM):
            weights = sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)
            lstm_flops += 2 * weights * output[0].shape[:-1].numel()

    hook = register_module_forward_hook(add)
    try:
        with FlopCounterMode(display=False) as counter:
            yield lambda: counter.get_total_flops() + lstm_flops
    finally:
        hook.remove()
