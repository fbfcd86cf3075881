"""What of a training goes into a checkpoint, and back."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm import checkpoint
from ssmttm.errors import UserError
from ssmttm.files import file_sha256
from ssmttm.licences import strictest
from ssmttm.training import rng
from ssmttm.training.ema import EMA
from ssmttm.training.run import config_hash
from ssmttm.training.step import TrainedModule


@dataclass
class Progress:
    """The loop's whole state beside weights, optimisers and generators; plain data, kept in state.json."""

    step: int = 0  # optimiser steps done
    samples_seen: int = 0  # items, over all ranks
    seconds: float = 0.0  # of training, over all resumes
    flops: float = 0.0  # forward and backward, over all ranks
    valid: dict[str, float] = field(default_factory=dict)  # the last validation
    init: dict[str, Any] = field(default_factory=dict)  # the model that the run started from, if any


def save(
    config: DictConfig,
    trained_modules: dict[str, TrainedModule],
    ema: EMA | None,
    progress: Progress,
    facts: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Write the checkpoint of this step and prune old ones; every rank must call it."""
    states = [json.loads(state) for state in gather_object([json.dumps(rng.get_state())])]
    if accelerator.is_main_process:
        run_dir = Path(config.run_dir)
        optimizer, groups = flatten_optimizers(
            {name: module_name.optimizer.state_dict() for name, module_name in trained_modules.items()}
        )
        tensors = {name: module_name.module.state_dict() for name, module_name in trained_modules.items()} | {"optimizer": optimizer}
        if ema is not None:
            tensors["ema"] = ema.state_dict()
        state = {
            **asdict(progress),
            "parameters": sum(parameter.numel() for parameter in trained_modules["model"].module.parameters()),
            "world_size": accelerator.num_processes,
            "config_hash": config_hash(config),
            "data": facts,
            "licence": strictest(facts["licences"] | progress.init.get("licences", {})),
            "versions": _versions(),
        }
        checkpoint.save_checkpoint(
            run_dir / "checkpoints" / f"step-{progress.step:08d}",
            config=config,
            tensors=tensors,
            documents={"optimizer": groups, "rng": states, "state": state},
        )
        checkpoint.prune(run_dir, config.train.keep_checkpoints)
    accelerator.wait_for_everyone()


def restore(folder: Path, trained_modules: dict[str, TrainedModule], ema: EMA | None, facts: dict[str, Any], rank: int) -> Progress:
    """Bring everything back to where `save` left it.

    Raises:
        UserError: the checkpoint was trained on another store, or learnt from another teacher.
    """
    state = checkpoint.read_state(folder)
    old, new = state["data"]["fingerprint"], facts["fingerprint"]
    if old != new:
        raise UserError(
            f"{folder} was trained on another store (fingerprint {old}, not {new}): give that one as data.store"
        )
    _check_same_teacher(folder, state["data"].get("teacher", {}), facts.get("teacher", {}))
    optimizers = unflatten_optimizers(
        checkpoint.read_tensors(folder, "optimizer"), checkpoint.read_document(folder, "optimizer")
    )
    for name, module_name in trained_modules.items():
        module_name.module.load_state_dict(checkpoint.load_weights(folder, ema=False, module_name=name))
        module_name.optimizer.load_state_dict(optimizers[name])
    if ema is not None:
        ema.load_state_dict(checkpoint.read_tensors(folder, "ema"))
    states = checkpoint.read_document(folder, "rng")
    if rank < len(states):
        rng.set_state(states[rank])
    else:
        print(f"rank {rank} was not there at {folder}: its dropout starts from the step", flush=True)
        rng.seed_all(state["step"], rank)
    return Progress(**{key: state[key] for key in ("step", "samples_seen", "seconds", "flops", "valid", "init")})


def _check_same_teacher(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """A language model is known by the hash of its weights, a codec by its fingerprint."""
    for key in ("weights_sha256", "fingerprint"):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{folder} learnt from another teacher, {old['name']} ({key} {old[key][:16]}), not from {new['name']} "
                f"({new[key][:16]}): give that one as teacher, or another run_dir"
            )


def start_from(model: str | Path, module: nn.Module, codec: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fill a module with the weights of another run, checkpoint or exported model (averaged where there are any).

    Args:
        codec: what the codes of the new run were made with, name and fingerprint; None: it learns from no codes.

    Returns:
        What the new run must remember of it: name, steps of training, hash of the weights, licences of its data.

    Raises:
        UserError: there is no such model, it is of another shape, or it speaks another codec's codes.
    """
    folder = checkpoint.find_model(model)
    card = checkpoint.read_document(folder, "card" if (folder / "card.json").is_file() else "state")
    spoken = card["data"].get("codec")
    if codec and spoken and codec["fingerprint"] != spoken["fingerprint"]:
        raise UserError(
            f"init={model} learnt codes of {spoken['name']} ({spoken['fingerprint']}), this store's are of "
            f"{codec['name']} ({codec['fingerprint']}): start from a model of the same codec"
        )
    checkpoint.fill(module, checkpoint.load_weights(folder), folder)
    averaged = folder / "ema.safetensors"
    digest = file_sha256(averaged if averaged.is_file() else folder / "model.safetensors")
    licences = card["data"]["licences"] | card.get("init", {}).get("licences", {})
    return {"name": Path(model).name, "step": card["step"], "weights_sha256": digest, "licences": licences}


def flatten_optimizers(optimizers: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`optimizer.state_dict()` by player -> (tensors named player/parameter/quantity, parameter groups by player).

    The optimisers must have been built from named parameters.
    """
    tensors: dict[str, Tensor] = {}
    groups: dict[str, Any] = {}
    for module_name, state in optimizers.items():
        groups[module_name] = state["param_groups"]
        for index, name in _parameter_names(state["param_groups"]).items():
            for quantity, value in state["state"].get(index, {}).items():
                tensors[f"{module_name}/{name}/{quantity}"] = value
    return tensors, groups


def unflatten_optimizers(tensors: dict[str, Tensor], groups: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `flatten_optimizers`; copies, so that no optimiser works on a mapped file."""
    states: dict[str, dict[str, Any]] = {module_name: {"state": {}, "param_groups": own} for module_name, own in groups.items()}
    index_of = {
        (module_name, name): index for module_name, own in groups.items() for index, name in _parameter_names(own).items()
    }
    for key, value in tensors.items():
        module_name, name, quantity = key.split("/")
        states[module_name]["state"].setdefault(index_of[module_name, name], {})[quantity] = value.clone()
    return states


def _parameter_names(groups: list[dict[str, Any]]) -> dict[int, str]:
    pairs = (zip(group["params"], group.get("param_names", []), strict=True) for group in groups)
    return {index: name for group in pairs for index, name in group}


def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
