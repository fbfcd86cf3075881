"""Blocks of a model that save memory by recomputation in the backward, or time by compilation.

With `full` a block keeps its input only (arXiv 1604.06174). With `selective` it also keeps the results of its matrix
products, and of attention; norms, convolutions, gates and scans, which hold most of the memory and little of the time,
are computed again. Gradients are those without recomputation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ssmttm.errors import UserError
from ssmttm.models.blocks import Block
from ssmttm.models.denoiser_stack import DenoiserBlock

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
    """Make the blocks of a module recompute or compile their forward, where it records gradients.

    Raises:
        UserError: unknown `recompute`; the module has no blocks; compiled blocks cannot be recomputed selectively.
    """
    if recompute not in MODES:
        raise UserError(f"unknown train.recompute={recompute}: choose from {', '.join(MODES)}")
    if recompute == "none" and not compiled:
        return
    blocks = [part for part in module.modules() if isinstance(part, Block | DenoiserBlock)]
    if not blocks:
        raise UserError(
            f"train.recompute={recompute} and train.compile={str(compiled).lower()} act on the blocks of language models "
            "and denoisers, this model has none: leave them out"
        )
    if compiled and recompute == "selective":
        raise UserError("train.recompute=selective cannot see into compiled blocks: set train.compile=false, or full")
    for block in blocks:
        block.forward = _with_gradient(block.forward, recompute, compiled)


def _with_gradient(forward: Callable[..., Any], recompute: str, compiled: bool) -> Callable[..., Any]:
    """`forward` as it is without gradients, else compiled or recomputed."""
    train = torch.compile(forward) if compiled else forward
    if recompute != "none":
        contexts = (
            {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if recompute == "selective" else {}
        )
        train = partial(checkpoint, train, use_reentrant=False, **contexts)

    def call(*args: Any, **options: Any) -> Any:
        return (train if torch.is_grad_enabled() else forward)(*args, **options)

    return call


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE
