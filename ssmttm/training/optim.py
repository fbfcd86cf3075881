"""AdamW with the right parameters left out of weight decay, and the learning rate as a function of the global step."""

import math

from omegaconf import DictConfig
from torch import nn
from torch.optim import AdamW


def build_optimizer(module: nn.Module, config: DictConfig) -> AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters.

    No weight decay on anything of one dimension or none (norms, biases, A_log, D, dt_bias), on what is marked
    `_no_weight_decay` by its module, and, unless `decay_embeddings`, on embeddings.

    Args:
        config: `optim` group: lr, weight_decay, betas, eps, decay_embeddings.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed, spared = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        spare = (
            parameter.ndim <= 1
            or getattr(parameter, "_no_weight_decay", False)
            or (id(parameter) in embeddings and not config.decay_embeddings)
        )
        (spared if spare else decayed).append((name, parameter))
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]] or groups[:1]  # a module may have state and no parameter
    return AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: DictConfig) -> float:
    """The rate of optimiser step `step` (0 is the first): linear warm-up to lr, then cosine down to min_lr at `steps`.

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
