"""Which kernel runs an operation, and why.

Every operation has a portable PyTorch path; some have a CUDA kernel from mamba_ssm or causal_conv1d too. The choice is
made per call, from the device of the tensors and from what the kernel takes (mamba_ssm 2.3, causal_conv1d 1.7), and no
kernel package is imported before it is needed for a CUDA tensor.
`use("portable")` or `use("cuda")` overrides the choice in a `with` block, `set_backend` permanently. On a CPU a caller
may provide kernels for inference, in a `with` block of `cpu_kernels`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch

from ssmttm.errors import UserError

Backend = Literal["auto", "portable", "cuda"]
BACKENDS: tuple[Backend, ...] = ("auto", "portable", "cuda")
INSTALL = "pip install ssmttm[cuda]"


class Kernel(NamedTuple):
    """The module and function of a CUDA kernel."""

    module: str
    function: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


class Row(NamedTuple):
    """One line of `describe()`."""

    operation: str
    device: str
    kernel: str
    reason: str


KERNELS: dict[str, Kernel] = {
    "ssd": Kernel("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
    "ssd_step": Kernel("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
    "selective_scan": Kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "selective_scan_step": Kernel("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
    "causal_conv": Kernel("causal_conv1d", "causal_conv1d_fn"),
    "causal_conv_step": Kernel("causal_conv1d", "causal_conv1d_update"),
}

# What the import of an installed package raises where its extension, its dependencies or the driver do not fit.
IMPORT_ERRORS = (ImportError, AttributeError, OSError, ValueError, TypeError, RuntimeError, LookupError)

_chosen: Backend = "auto"
_cpu_kernels: ContextVar[Mapping[str, Callable[..., Any]] | None] = ContextVar("cpu_kernels", default=None)


def set_backend(name: Backend) -> None:
    """Override the choice permanently: "auto", "portable" or "cuda".

    Raises:
        UserError: no backend has that name.
    """
    global _chosen
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    _chosen = name


@contextmanager
def use(name: Backend) -> Iterator[None]:
    """Override the choice within a `with` block; see `set_backend`."""
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def cuda_kernel(operation: str, device: torch.device, unsupported: str = "") -> Callable[..., Any] | None:
    """The CUDA kernel for `operation` on tensors of `device`, or None for the portable path.

    Args:
        unsupported: what of these operands the kernel does not take, such as "float64"; "" if it takes them.

    Raises:
        UserError: the backend is "cuda", and the kernel is not available or does not take the operands.
    """
    if _chosen == "portable" or (_chosen == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise UserError(f"backend 'cuda' is set, but {operation} got tensors on {device}: move them to a GPU")
    if unsupported:
        if _chosen == "cuda":
            raise UserError(
                f"backend 'cuda' is set, but the kernel of {operation} does not take {unsupported}: set 'auto'"
            )
        return None
    function, problem = _load(operation)
    if function is None and _chosen == "cuda":
        kernel = KERNELS[operation]
        raise UserError(f"backend 'cuda' needs {kernel.package} for {operation}, but {problem}: {INSTALL}")
    return function


@contextmanager
def cpu_kernels(kernels: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Use kernels for "causal_conv" and "ssd" in a `with` block, in this thread; see `ssmttm.generation.engines`."""
    token = _cpu_kernels.set(kernels)
    try:
        yield
    finally:
        _cpu_kernels.reset(token)


def cpu_kernel(operation: str, *operands: torch.Tensor | None) -> Callable[..., Any] | None:
    """The kernel for `operation` that the caller provides, or None. It takes float32 on a CPU, and no gradient."""
    kernels = _cpu_kernels.get()
    if kernels is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    for tensor in operands:
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            return None
    return kernels.get(operation)


def describe() -> list[Row]:
    """The kernel of each operation on each available device, for `ssmttm info`."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [_row(operation, device) for operation in KERNELS for device in devices]


def _row(operation: str, device: str) -> Row:
    kernel = KERNELS[operation]
    if _chosen == "portable":
        return Row(operation, device, "torch", "the backend is 'portable'")
    if device != "cuda":
        return Row(operation, device, "torch", f"{kernel.package} runs on CUDA only")
    function, problem = _load(operation)
    if function is None:
        return Row(operation, device, "torch", f"{problem} ({INSTALL})")
    return Row(operation, device, kernel.package, f"{kernel.function} is installed")


@cache
def _load(operation: str) -> tuple[Callable[..., Any] | None, str]:
    """The kernel's function, or None and the reason. An installed package may still fail to load its extension.

    The package is imported first: where that fails, its modules that were imported before stay in `sys.modules`, and
    one of them would be found or not by the order of the calls.
    """
    kernel = KERNELS[operation]
    try:
        import_module(kernel.package)
        return getattr(import_module(kernel.module), kernel.function), ""
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    except IMPORT_ERRORS as error:
        return None, f"{kernel.module} does not load here ({' '.join(str(error).split())})"
