"""Adapters: small additions to the linear layers of a model (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353).

An adapter folder, as peft reads and writes it, and a card:

    adapter_config.json         peft's LoraConfig: rank r, lora_alpha, use_dora, target_modules
    adapter_model.safetensors   of each layer base_model.model.LAYER.lora_A.weight [r, I], .lora_B.weight [O, r] and,
                                with DoRA, .lora_magnitude_vector [O]
    adapter_card.json           name, base_model (name, weights_sha256, licences), data and its licences, licence

Merged, the weight W [O, I] of a layer becomes W + sum of strength * delta over the adapters, with the delta of each
alone: B A s for LoRA, and magnitude * V / |V| - W for DoRA, V = W + B A s, |V| by row; s = lora_alpha / r. So adapters
add up in any order, strength 1 is the adapter as it was trained, and strength 0 is the base model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.files import write_text

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_card.json"
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
_UNSUPPORTED = ("modules_to_save", "layer_replication", "alpha_pattern", "rank_pattern", "fan_in_fan_out")


@dataclass(frozen=True)
class LayerUpdate:
    """The adapter of one linear layer: A [r, I], B [O, r], and with DoRA the magnitude [O]."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to the layer's weight [O, I], in float32."""
        weight = weight.float()
        update = self.scaling * (self.B.float() @ self.A.float()).to(weight.device)
        if self.magnitude is None:
            return update
        direction = weight + update
        scale = self.magnitude.to(weight.device).float() / direction.norm(dim=1)
        return scale[:, None] * direction - weight


@dataclass(frozen=True)
class Adapter:
    """An adapter: its name, its card and the update of each layer, by the layer's name."""

    name: str
    card: dict[str, Any]
    layers: dict[str, LayerUpdate]


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder. Raises UserError if it is none, is damaged, or uses options of peft that are not LoRA or
    DoRA on linear layers."""
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS, CARD) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no adapter (it has no {missing[0]}): give a folder written by `ssmttm export`")
    config, card = _read_json(folder / CONFIG), _read_json(folder / CARD)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"cannot read {folder / WEIGHTS} ({error}): copy or export the adapter again") from error
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or used or config.get("bias", "none") != "none":
        wrong = used[0] if used else f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError(f"{folder / CONFIG} has {wrong}: only LoRA and DoRA on linear layers can be used")
    rank, alpha = config["r"], config["lora_alpha"]
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    named = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    return Adapter(card.get("name", folder.name), card, split_layers(named, scaling)[1])


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: Mapping[str, Any]
) -> None:
    """Write the files of an adapter folder into an existing folder.

    Args:
        tensors: LAYER.lora_A.weight and so on, as `adapter_tensors` gives them.
        config: peft's LoraConfig as JSON.
        card: the contents of adapter_card.json.
    """
    save_file({f"{_PREFIX}{name}": value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / CARD, json.dumps(card, indent=2) + "\n")


def adapter_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's part of the state dict of a model with one adapter in training, under the names of the folder."""
    return {_saved_name(name): value for name, value in weights.items() if _part(name)}


def without_adapter(weights: dict[str, Tensor], card: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint whose training had an adapter, merged at strength 1; others as they are.

    Args:
        card: state.json of the checkpoint, or card.json.
    """
    config = (card.get("data") or {}).get("adapter")
    if config is None:
        return weights
    base, layers = split_layers(weights, config["lora_alpha"] / config["r"])
    for name, layer in layers.items():
        weight = base[f"{name}.weight"]
        base[f"{name}.weight"] = (weight.float() + layer.delta(weight)).to(weight.dtype)
    return base


def check_base(adapter: Adapter, weights_sha256: str, model_name: str) -> None:
    """Raises UserError unless an adapter was trained on the model whose weights file has this hash."""
    base = adapter.card["base_model"]
    if base["weights_sha256"] != weights_sha256:
        raise UserError(
            f"adapter {adapter.name} was trained on {base['name']} (weights {base['weights_sha256'][:16]}), not on "
            f"{model_name} ({weights_sha256[:16]}): use it with that model"
        )


def merge(model: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Add adapters, each at a strength, to the weights of a model, in place.

    Returns:
        The weights before, by name, for `unmerge`.

    Raises:
        UserError: a strength is not finite, or a layer is missing, of another shape, or quantised; nothing is changed.
    """
    parameters = dict(model.named_parameters())
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    for adapter, strength in adapters:
        if not math.isfinite(strength):
            raise UserError(f"the strength of adapter {adapter.name} must be a finite number, got {strength}")
        for layer, update in adapter.layers.items():
            name = f"{layer}.weight"
            weight = before.setdefault(name, parameters[name].detach().clone()) if name in parameters else None
            shape = (len(update.B), update.A.shape[1])
            if weight is None or weight.shape != shape:
                found = "is quantised or missing" if weight is None else f"is {tuple(weight.shape)}"
                raise UserError(f"adapter {adapter.name} has {layer} of {shape}, which {found} in this model")
            total = after.setdefault(name, weight.float())
            after[name] = total + strength * update.delta(weight)
    with torch.no_grad():
        for name, weight in after.items():
            parameters[name].copy_(weight)
    return before


def unmerge(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Restore the weights that `merge` returned, bit for bit."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in before.items():
            parameters[name].copy_(weight)


def split_layers(weights: Mapping[str, Tensor], scaling: float) -> tuple[dict[str, Tensor], dict[str, LayerUpdate]]:
    """A state dict's tensors without adapter, and the updates of its layers."""
    base: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        part = _part(name)
        if part is None:
            base[name.replace(".base_layer.", ".")] = value
        else:
            parts.setdefault(name.partition(f".{part}")[0], {})[part] = value
    layers = {
        layer: LayerUpdate(found["lora_A"], found["lora_B"], scaling, found.get("lora_magnitude_vector"))
        for layer, found in parts.items()
    }
    return base, layers


def _part(name: str) -> str | None:
    """lora_A, lora_B or lora_magnitude_vector, or None for a tensor of the base model."""
    return next((part for part in _PARTS if f".{part}" in name), None)


def _saved_name(name: str) -> str:
    """In training peft inserts the adapter's name, "default"; a magnitude is saved without ".weight"."""
    saved = name.replace(".default", "")
    return saved.removesuffix(".weight") if ".lora_magnitude_vector" in saved else saved


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"cannot read {path} ({error}): copy or export the adapter again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: copy or export the adapter again")
    return value
