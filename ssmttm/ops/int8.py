"""Weight-only int8 linear layers: a decoding step reads a quarter of the bytes.

Row o of a weight W [O, I] is stored as round(W[o] / scale[o]), scale[o] = max |W[o]| / 127: one scale per
row. In a step on a CPU torch's kernel multiplies these with activations rounded to bfloat16 and accumulates in float32;
sequences and other devices dequantise the weights to float32.
"""

import torch
from torch import Tensor, nn

from ssmttm.ops.linear import Linear, linear

BLOCK = 8  # rows per kernel call
NOT_QUANTISED = ("dt_proj",)  # Mamba-1's: tiny, and the mixer uses its weight and bias separately


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, I] -> int8 [O, I] and scale [O], float32 rounded to bfloat16 values; 1 for a row of zeros."""
    weight = weight.detach().float()
    largest = weight.abs().amax(1)  # [O]
    scale = torch.where(largest > 0, largest / 127, 1.0).bfloat16().float()
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantise_rows(int8: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight [O, I]."""
    return int8 * scale[:, None]


def int8_linear(x: Tensor, int8: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] by the weight of int8 [O, I] and scale [O], plus bias [O] -> [..., O], in the dtype of x. In a step, a
    row's result does not depend on the other rows."""
    if not _is_step(x, int8):
        return linear(x, dequantise_rows(int8, scale).to(x.dtype), bias)
    blocks = x.bfloat16().split(BLOCK)
    y = torch.cat([torch._weight_int8pack_mm(rows, int8, scale.bfloat16()) for rows in blocks]).to(x.dtype)
    return y if bias is None else y.add_(bias)


def _is_step(x: Tensor, int8: Tensor) -> bool:
    """Whether torch's kernel can run: it reads 16 columns and writes 4 at once, past the end if they do not divide."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.ndim != 2 or torch.is_grad_enabled():
        return False
    return int8.shape[0] % 4 == 0 and int8.shape[1] % 16 == 0


class Int8Linear(Linear):
    """A `Linear` whose weight is kept as `int8` [O, I] and `scale` [O]; reading `weight` restores it. Not trainable."""

    int8: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        int8, scale = quantise_rows(source.weight)
        self.register_buffer("int8", int8)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().float())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Float32 [O, I]."""
        return dequantise_rows(self.int8, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.int8, self.scale, self.bias)


def quantise(module: nn.Module) -> nn.Module:
    """Replace every `Linear` in a module, except those named in NOT_QUANTISED, by an `Int8Linear`, in place.

    Embeddings, norms and convolutions are unchanged. Returns the module.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and not isinstance(child, Int8Linear) and name not in NOT_QUANTISED:
                setattr(parent, name, Int8Linear(child))
    return module
