"""Blocks of a model that save memory by recomputation in the backward, or time by compilation.

With `full` each sublayer of a block keeps its input only (arXiv 1604.06174). With `selective` it also keeps the results
of its matrix products, and of attention; norms, convolutions, gates and scans, which hold most of the memory and little
of the time, are computed again. Gradients are those without recomputation.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from ssmttm.errors import UserError
from ssmttm.mixers import Mixer
from ssmttm.models.blocks import Sublayer
from ssmttm.models.denoiser_stack import AdaLNSublayer
from ssmttm.ops.ssd import chunked

MODES = ("none", "selective", "full")

_aten = torch.ops.aten
_SAVED = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def set_up_blocks(module: nn.Module, recompute: str, compiled: bool) -> None:
    """Make the sublayers of a module's blocks recompute or compile their forward, where it records gradients.

    The operations of the module's mixers have a backward that is written by hand: compiled sublayers call them as they
    are. The two halves of the chunked SSD are compiled by themselves, for the whole process.

    Raises:
        UserError: unknown `recompute`; the module has no blocks; compiled blocks cannot be recomputed selectively.
    """
    if recompute not in MODES:
        raise UserError(f"unknown train.recompute={recompute}: choose from {', '.join(MODES)}")
    if recompute == "none" and not compiled:
        return
    sublayers = [part for part in module.modules() if isinstance(part, Sublayer | AdaLNSublayer)]
    if not sublayers:
        raise UserError(
            f"train.recompute={recompute} and train.compile={str(compiled).lower()} act on the blocks of language "
            "models and denoisers, this model has none: leave them out"
        )
    if compiled and recompute == "selective":
        raise UserError("train.recompute=selective cannot see into compiled blocks: set train.compile=false, or full")
    if compiled:
        _wrap_operations(module, torch.compiler.disable)
        for name in ("_training_forward", "_backward"):
            setattr(chunked, name, torch.compile(getattr(chunked, name), dynamic=False))
    if recompute == "selective":
        _wrap_operations(module, _whole)
    for sublayer in sublayers:
        sublayer.forward = _with_gradient(sublayer.forward, recompute, compiled)  # type: ignore[method-assign]


def _wrap_operations(module: nn.Module, wrap: Callable[..., Any]) -> None:
    """Replace the operations of the mixers of this module only."""
    for mixer in module.modules():
        if isinstance(mixer, Mixer):
            mixer.operations = {name: wrap(operation) for name, operation in mixer.operations.items()}


def _with_gradient(forward: Callable[..., Any], recompute: str, compiled: bool) -> Callable[..., Any]:
    """`forward` as it is without gradients, else compiled or recomputed."""
    train = torch.compile(forward) if compiled else forward
    if recompute != "none":
        contexts = _selective_contexts if recompute == "selective" else noop_context_fn
        train = partial(checkpoint, train, use_reentrant=False, context_fn=contexts)

    def call(*args: Any, **options: Any) -> Any:
        return (train if torch.is_grad_enabled() else forward)(*args, **options)

    return call


class _Selective:
    """A context of selective recomputation, in which `_whole` operations are computed again as a whole."""

    active: ContextVar[bool] = ContextVar("selective", default=False)

    def __init__(self, context: AbstractContextManager[Any]) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._context.__enter__()
        self._token = self.active.set(True)

    def __exit__(self, *error: Any) -> None:
        self.active.reset(self._token)
        self._context.__exit__(*error)


def _selective_contexts() -> tuple[_Selective, _Selective]:
    """Those of the forward and of the recomputation."""
    first, again = create_selective_checkpoint_contexts(_policy)
    return _Selective(first), _Selective(again)


def _whole(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose many small steps are not seen by `_policy`, each of which would cost a call."""

    @wraps(operation)
    def call(*args: Any, **options: Any) -> Any:
        with _disable_current_modes() if _Selective.active.get() else nullcontext():
            return operation(*args, **options)

    return call


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE
