"""Small decoders of a codec's latents, for students: ConvNeXt with an inverse-STFT head, and DAC's decoder.

Both have a bounded receptive field (`context`), so they stream, and list the modules whose outputs can be matched to a
teacher's (`stages`, from the latents to the audio).
Shapes: B batch, K codebooks of width c, C = K c, T frames, D channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.codecs.spectral import STFT, InverseSTFTHead, Stack, decoder_context
from ssmttm.errors import UserError

DILATIONS = (1, 3, 9)
KERNEL = 7  # of DAC's convolutions


class LatentConv(nn.Conv1d):
    """Convolution over codebook vectors with a constant 1 appended to each: [B, k c, T] -> [B, D, T], zero padding.

    Any projection per codebook with a bias, followed by a convolution of their sum (as in DAC and `TinyCodec`), can be
    written as one `LatentConv`, also where only the first k of the K codebooks are given.
    """

    def __init__(self, n_codebooks: int, codebook_dim: int, width: int, kernel: int) -> None:
        super().__init__(n_codebooks * (codebook_dim + 1), width, kernel)
        self.codebook_dim = codebook_dim

    def forward(self, latents: Tensor) -> Tensor:
        vectors = rearrange(latents, "b (k c) t -> b k c t", c=self.codebook_dim)
        x = rearrange(F.pad(vectors, (0, 0, 0, 1), value=1.0), "b k c t -> b (k c) t")  # [B, k (c + 1), T]
        return F.conv1d(x, self.weight[:, : x.shape[1]], self.bias, padding=self.kernel_size[0] // 2)


@dataclass(frozen=True)
class SpectralConfig:
    """Sizes of a `SpectralDecoder`.

    Attributes:
        width: D.
        blocks: ConvNeXt blocks at the frame rate, and at `upsampling` times the frame rate.
        look_ahead: future taps of each of these blocks.
        upsampling: STFT hops per code frame.
        window: STFT window in samples, an even multiple of the hop; None: two code frames.
    """

    width: int = 192
    blocks: tuple[int, int] = (4, 3)
    look_ahead: tuple[int, int] = (1, 0)
    expansion: int = 2
    kernel: int = 7
    upsampling: int = 2
    window: int | None = None

    def __post_init__(self) -> None:
        for field in ("blocks", "look_ahead"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if min(self.width, self.expansion, self.upsampling, *self.blocks) < 1:
            raise UserError(f"spectral decoder: sizes must be at least 1, got {self}")
        if max(self.look_ahead) >= self.kernel or min(self.look_ahead) < 0:
            raise UserError(f"spectral decoder: look_ahead must be in [0, {self.kernel}), got {list(self.look_ahead)}")


class SpectralDecoder(nn.Module):
    """ConvNeXt at the frame rate and a multiple of it, then an inverse STFT (after Vocos, arXiv 2306.00814).

    The decoder of `TinyCodec` in any size and for any codec: no layer runs at the sample rate.

    Raises:
        UserError: the hop length does not fit upsampling and window.
    """

    def __init__(self, config: SpectralConfig, n_codebooks: int, codebook_dim: int, hop_length: int) -> None:
        super().__init__()
        self.config = c = config
        hop, window = hop_length // c.upsampling, c.window or 2 * hop_length
        if hop_length % c.upsampling or window % (2 * hop):
            raise UserError(
                f"spectral decoder: upsampling must divide the hop length {hop_length}, and window be an even multiple "
                f"of the STFT hop; got upsampling={c.upsampling} and window={window}"
            )
        self.first = LatentConv(n_codebooks, codebook_dim, c.width, 1)
        self.coarse = Stack(c.blocks[0], c.width, c.expansion, c.kernel, c.look_ahead[0])
        self.up = nn.Linear(c.width, c.upsampling * c.width)  # transposed convolution, as many taps as its stride
        self.fine = Stack(c.blocks[1], c.width, c.expansion, c.kernel, c.look_ahead[1])
        self.head = InverseSTFTHead(c.width, STFT(window, hop))

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, T] -> wav [B, 1, T * hop_length]."""
        x = self.coarse(self.first(latents).transpose(1, 2))  # [B, T, D]
        x = rearrange(self.up(x), "b t (u d) -> b (t u) d", u=self.config.upsampling)  # [B, u T, D]
        return self.head(self.fine(x))[:, None]

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The stacks, with outputs [B, T, D] and [B, u T, D]."""
        return self.coarse, self.fine

    @property
    def context(self) -> tuple[int, int]:
        """Frames of history and of look-ahead that one frame of audio depends on."""
        c = self.config
        return decoder_context(c.blocks, c.look_ahead, c.kernel, c.upsampling, self.head.stft)

    def flops(self, n_frames: int) -> int:
        """FLOPs of matrix products and convolutions for one clip."""
        c = self.config
        block = 2 * c.kernel * c.width + 4 * c.expansion * c.width**2
        fine = c.blocks[1] * block + 2 * c.width * self.head.project.out_features
        coarse = c.blocks[0] * block + 2 * self.first.in_channels * c.width + 2 * c.upsampling * c.width**2
        return n_frames * (coarse + c.upsampling * fine)


@dataclass(frozen=True)
class ConvConfig:
    """Sizes of a `ConvDecoder`.

    Attributes:
        width: channels before the first upsampling; each upsampling halves them.
        ratios: strides of the upsamplings; their product is the hop length.
        depthwise: make the convolutions of kernel 7 in the residual units depthwise.
    """

    width: int
    ratios: tuple[int, ...]
    depthwise: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if not self.ratios or min(self.ratios) < 2:
            raise UserError(f"conv decoder: ratios must be strides of at least 2, got {list(self.ratios)}")
        if self.width < 1 or self.width % 2 ** len(self.ratios):
            raise UserError(f"conv decoder: width must be a multiple of {2 ** len(self.ratios)}, got {self.width}")

    @property
    def widths(self) -> list[int]:
        """Channels before each upsampling and after the last one."""
        return [self.width // 2**i for i in range(len(self.ratios) + 1)]


class ConvDecoder(nn.Module):
    """DAC's decoder (arXiv 2306.06546, section 3.1): transposed convolutions and residual units with Snake.

    Parameters are named as in transformers' DacDecoder; `conv1` takes codebook vectors instead of their projections.

    Raises:
        UserError: the product of the ratios is not the hop length.
    """

    def __init__(self, config: ConvConfig, n_codebooks: int, codebook_dim: int, hop_length: int) -> None:
        super().__init__()
        self.config, self.hop_length = config, hop_length
        if math.prod(config.ratios) != hop_length:
            raise UserError(
                f"conv decoder: the product of ratios must be the codec's hop length {hop_length}, got "
                f"{list(config.ratios)} with product {math.prod(config.ratios)}"
            )
        widths = config.widths
        self.conv1 = LatentConv(n_codebooks, codebook_dim, widths[0], KERNEL)
        self.block = nn.ModuleList(
            UpsamplingBlock(before, after, ratio, config.depthwise)
            for before, after, ratio in zip(widths, widths[1:], config.ratios, strict=False)
        )
        self.snake1 = Snake(widths[-1])
        self.conv2 = nn.Conv1d(widths[-1], 1, KERNEL, padding=KERNEL // 2)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, T] -> wav [B, 1, T * hop_length]; zeros at the end where odd strides leave it a few samples short."""
        x = self.conv1(latents)
        for block in self.block:
            x = block(x)
        wav = self.conv2(self.snake1(x)).tanh()
        return F.pad(wav, (0, latents.shape[-1] * self.hop_length - wav.shape[-1]))

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The upsampling blocks, with outputs [B, D, T']."""
        return list(self.block)

    @property
    def context(self) -> tuple[int, int]:
        """Frames of history and of look-ahead that one frame of audio depends on: the receptive field, layer by layer
        from the samples of the frame back to the codes."""
        reach = KERNEL // 2
        first, last = -reach, self.hop_length - 1 + reach
        for ratio in reversed(self.config.ratios):
            units, padding = reach * sum(DILATIONS), math.ceil(ratio / 2)
            first, last = first - units + padding, last + units + padding
            first, last = math.ceil((first - 2 * ratio + 1) / ratio), last // ratio
        return reach - first, last + reach

    def flops(self, n_frames: int) -> int:
        """FLOPs of convolutions for one clip."""
        widths, length = self.config.widths, n_frames
        total = 2 * KERNEL * length * self.conv1.in_channels * widths[0]
        for before, after, ratio in zip(widths, widths[1:], self.config.ratios, strict=False):
            total += 2 * 2 * ratio * length * before * after
            length = ratio * length - ratio % 2
            total += len(DILATIONS) * 2 * length * after * (KERNEL * (1 if self.config.depthwise else after) + after)
        return total + 2 * KERNEL * length * widths[-1]


class Snake(nn.Module):
    """x + sin(a x)^2 / a, with one a per channel (arXiv 2006.08195): [B, D, T] -> [B, D, T]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, width, 1))
        self.alpha._no_weight_decay = True

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha + 1e-9).reciprocal() * (self.alpha * x).sin().square()


class ResidualUnit(nn.Module):
    """A dilated convolution and a pointwise one, each after a Snake: [B, D, T] -> [B, D, T]."""

    def __init__(self, width: int, dilation: int, depthwise: bool) -> None:
        super().__init__()
        self.snake1, self.snake2 = Snake(width), Snake(width)
        padding, groups = dilation * (KERNEL // 2), width if depthwise else 1
        self.conv1 = nn.Conv1d(width, width, KERNEL, dilation=dilation, padding=padding, groups=groups)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


class UpsamplingBlock(nn.Module):
    """A transposed convolution and three residual units: [B, D, T] -> [B, D', T * ratio - ratio % 2]."""

    def __init__(self, before: int, after: int, ratio: int, depthwise: bool) -> None:
        super().__init__()
        self.snake1 = Snake(before)
        self.conv_t1 = nn.ConvTranspose1d(before, after, 2 * ratio, ratio, padding=math.ceil(ratio / 2))
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(after, d, depthwise) for d in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.res_unit3(self.res_unit2(self.res_unit1(self.conv_t1(self.snake1(x)))))
