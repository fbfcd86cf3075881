"""What every operation shares: the dtype of its sums, and checks of its operands."""

from collections.abc import Mapping

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of decays, states and sums: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def unsupported_dtype(*tensors: Tensor) -> str:
    """The dtype of a tensor that the CUDA kernels do not compute in, float64; "" if there is none."""
    return "float64" if any(tensor.dtype == torch.float64 for tensor in tensors) else ""


def check_shapes(expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Compare each operand's shape with the expected one; None is an operand left out.

    Raises:
        ValueError: a shape differs.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
