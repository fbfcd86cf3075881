"""The receptive field of convolutional decoders."""

import math
from collections.abc import Sequence


def upsampling_context(ratios: Sequence[int]) -> tuple[int, int]:
    """Receptive field of the decoders of DAC and Oobleck in frames per side: a kernel of 7 at both ends, and for each
    upsampling ratio a transposed convolution (one input sample) and three residual units of kernel 7 and dilations 1,
    3, 9 (39 samples)."""
    reach, rate = 3.0, 1
    for ratio in ratios:
        reach += 1 / rate
        rate *= ratio
        reach += 39 / rate
    frames = math.ceil(reach + 3 / rate)
    return frames, frames
