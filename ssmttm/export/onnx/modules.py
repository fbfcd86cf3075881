"""Codec decoders in a form that ONNX supports: real numbers, and lengths that do not depend on tensor values."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.codecs.base import Codec
from ssmttm.codecs.spectral import InverseSTFTHead


def exportable(codec: Codec) -> Codec:
    """A copy whose `_decode` can be traced, equal up to rounding. With an LSTM it is for tracing only."""
    codec = copy.deepcopy(codec)
    child: Any
    for parent in list(codec.modules()):
        for name, child in parent.named_children():
            if isinstance(child, InverseSTFTHead):
                setattr(parent, name, MatrixHead(child))
            elif type(child).__name__ == "EncodecConv1d" and int(child.stride) == 1:
                setattr(parent, name, FixedPaddingConv(child))
            elif isinstance(child, nn.LSTM):
                setattr(parent, name, OnnxLSTM(child))
    return codec


class MatrixHead(InverseSTFTHead):
    """An `InverseSTFTHead` whose inverse DFT is two matrix products: the real part of a spectrum gives the even part of
    a frame, the imaginary part the odd one, and one half of each determines the other by symmetry."""

    even: Tensor
    odd: Tensor

    def __init__(self, head: InverseSTFTHead) -> None:
        nn.Module.__init__(self)
        self.stft, self.norm, self.project = head.stft, head.norm, head.project
        window = len(head.stft.window)
        bins = torch.eye(window // 2 + 1, dtype=torch.float64)
        for name, spectra in (("even", bins), ("odd", 1j * bins)):
            waves = torch.fft.irfft(spectra, window)[:, : window // 2 + 1].float()  # [F, window / 2 + 1]
            self.register_buffer(name, waves, persistent=False)

    def inverse(self, real: Tensor, imaginary: Tensor) -> Tensor:
        even, odd = real @ self.even, imaginary @ self.odd  # [B, n, window / 2 + 1]
        return self.stft.join(torch.cat([even + odd, (even - odd)[..., 1:-1].flip(-1)], -1))


class FixedPaddingConv(nn.Module):
    """transformers' EncodecConv1d at stride 1, with constant padding (transformers computes it with tensors)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.conv, self.mode = layer.conv, layer.pad_mode
        self.norm = layer.norm if layer.norm_type == "time_group_norm" else nn.Identity()
        total = int(layer.padding_total)
        after = 0 if layer.causal else total // 2
        self.padding = (total - after, after)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T]. Input too short for reflection is zero-padded first, and cropped after."""
        missing = torch.sym_max(0, max(self.padding) + 1 - x.shape[-1])
        padded = F.pad(F.pad(x, (0, missing)), self.padding, self.mode)
        return self.norm(self.conv(padded[..., : x.shape[-1] + sum(self.padding)]))


class OnnxLSTM(nn.Module):
    """An nn.LSTM from a zero state as ONNX's operator, with gates in the order i, o, f, c. For tracing only: in torch
    it computes nothing. (torch's own export of an LSTM fixes the length of the example.)"""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.n_layers, self.width = lstm.num_layers, lstm.hidden_size
        for name, weights in lstm.named_parameters():
            i, f, c, o = weights.detach().chunk(4)
            self.register_buffer(name, torch.cat([i, o, f, c])[None])

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[T, B, C] -> [T, B, H], and None as the state."""
        for layer in range(self.n_layers):
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            W, R, W_bias, R_bias = (self.get_buffer(f"{kind}_l{layer}") for kind in kinds)
            operands, shape = (x, W, R, torch.cat([W_bias, R_bias], 1)), (x.shape[0], 1, x.shape[1], self.width)
            y = torch.onnx.ops.symbolic("LSTM", operands, {"hidden_size": self.width}, dtype=x.dtype, shape=shape)
            x = y.squeeze(1)
        return x, None
