"""Training an adapter with peft: LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353) on a model's linear layers.

The layers of the model are replaced in place by peft's, which add B A x to the frozen W x. `ssmttm.adapters` has the
format and merges without peft.
"""

import json
import math
import warnings
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ssmttm.errors import UserError
from ssmttm.ops.int8 import Int8Linear

DEFAULT_TARGETS = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "heads")  # of them, those that a model has
METHODS = ("lora", "dora")
_PREDICTOR = "control_predictor"  # reads the captions alone and keeps its weights
_NOT_CALLED = ("dt_proj",)  # Mamba-1 uses its weight directly


def check_adapter(config: DictConfig) -> bool:
    """Whether a training with this config trains an adapter. Raises UserError for settings that cannot be used."""
    adapter = config.adapter
    if adapter.method is not None and adapter.method not in METHODS:
        raise UserError(f"unknown adapter.method={adapter.method}: choose from {', '.join(METHODS)}, or null for none")
    if adapter.rank < 1:
        raise UserError(f"adapter.rank must be at least 1, got {adapter.rank}")
    if not 0 < adapter.alpha < math.inf:
        raise UserError(f"adapter.alpha must be above 0 and finite, got {adapter.alpha}")
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"adapter.dropout must be in [0, 1), got {adapter.dropout}")
    if adapter.targets is not None and not adapter.targets:
        raise UserError("adapter.targets is empty: name linear layers, such as [in_proj,out_proj], or set it to null")
    if adapter.method is None:
        return False
    if not config.init:
        raise UserError(f"adapter.method={adapter.method} needs the model that it is for: give init=MODEL")
    if find_spec("peft") is None:
        raise UserError(f"adapter.method={adapter.method} needs peft: pip install ssmttm[lora]")
    return True


def add_adapter(model: nn.Module, adapter: DictConfig) -> dict[str, Any]:
    """Freeze a model and give its target layers trainable updates, in place. At first they are zero.

    Args:
        adapter: the section `adapter` of the config.

    Returns:
        peft's LoraConfig as JSON, the adapter_config.json of the adapter.

    Raises:
        UserError: a target names no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, adapter.targets)
    has_predictor = getattr(model, _PREDICTOR, None) is not None  # its `heads` are a target by name only
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, use_dora=adapter.method == "dora",
        target_modules=targets, exclude_modules=rf"{_PREDICTOR}(\..*)?" if has_predictor else None,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model is not one of transformers
        get_peft_model(model, config)
    values = config.to_dict() | {"target_modules": targets, "inference_mode": True}
    return json.loads(json.dumps(values, default=str))


def find_targets(model: nn.Module, targets: list[str] | None) -> list[str]:
    """The targets as they are given, or the default ones that the model has. Raises UserError for one that names no
    linear layer, or one that cannot have an adapter."""
    linear = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Int8Linear) and not name.startswith(_PREDICTOR)
    ]  # fmt: skip
    ends = sorted({name.rpartition(".")[2] for name in linear} - set(_NOT_CALLED))
    if targets is None:
        return [target for target in DEFAULT_TARGETS if target in ends]
    for target in targets:
        matched = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matched or matched[0].endswith(_NOT_CALLED):
            raise UserError(
                f"adapter.targets has {target}, no linear layer of this model: choose from {', '.join(ends)}"
            )
    return list(targets)
