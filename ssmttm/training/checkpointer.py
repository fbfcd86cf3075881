"""Saving a training to a checkpoint, restoring it, and starting from the weights of another model."""

import contextlib
import copy
import json
import platform
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ssmttm import adapters, checkpoint
from ssmttm.errors import UserError
from ssmttm.files import DiskFull, atomic_folder, clear_errors, fsync
from ssmttm.generation.loading import find_folder
from ssmttm.licences import strictest
from ssmttm.model_folder import read_card
from ssmttm.training import rng
from ssmttm.training.ema import EMA
from ssmttm.training.parallel.ranks import JointWork
from ssmttm.training.parallel.sharding import local_part, sharded_as
from ssmttm.training.run import settings_hash
from ssmttm.training.step import TrainedModule


@dataclass
class Progress:
    """The state of the loop besides weights, optimisers and generators; stored in state.json."""

    step: int = 0  # optimiser steps done
    samples_seen: int = 0  # items of all ranks
    seconds: float = 0.0  # of training, including those before a resume
    flops: float = 0.0  # forward and backward, of all ranks
    schedule_steps: int = 0  # length of the learning rate's schedule
    timed_steps: int = 0  # steps that take train.minutes, once decided
    valid: dict[str, float] = field(default_factory=dict)  # metrics of the last validation
    init: dict[str, Any] = field(default_factory=dict)  # the model of the initial weights, if any
    skipping: dict[str, Any] = field(default_factory=dict)  # `SkipStep.state`
    rollbacks: int = 0
    left_out: int = 0  # batches that roll-backs left out: step n takes batch n + left_out
    lr_factor: float = 1.0  # of roll-backs


def step_folder(config: DictConfig, step: int) -> Path:
    """The folder of a checkpoint of this run."""
    return Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"


class CheckpointWriter:
    """Writes checkpoints in a thread from a snapshot, so that the loop waits only for the snapshot. Every rank has one.

    The main process writes them alone or, of sharded modules, every rank its parts. A checkpoint waits for the one
    before. When the disk is full, a line says so, the last good checkpoint stays, and the training goes on; an error
    that is not the user's is raised at the next call.

    Args:
        saved: the checkpoint that the run starts from.
        sharded: whether the modules are sharded.

    Attributes:
        saved: the last checkpoint that is written; main process only.
    """

    def __init__(self, config: DictConfig, accelerator: Accelerator, saved: Path | None, sharded: bool) -> None:
        self._config, self._accelerator, self.saved = config, accelerator, saved
        self._main = accelerator.is_main_process
        rank, world_size = (accelerator.process_index, accelerator.num_processes) if sharded else (0, 1)
        self._ranks = JointWork(rank, world_size)
        self._writes = self._main or sharded
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(
        self,
        trained_modules: dict[str, TrainedModule],
        ema: EMA | None,
        progress: Progress,
        metadata: dict[str, Any],
    ) -> None:
        """Take a snapshot and start to write it. Every rank must call it."""
        states = [json.loads(state) for state in gather_object([json.dumps(rng.get_state())])]
        if not self._writes:
            return
        self.wait()
        optimizer, groups = flatten_optimizers(
            {name: optimizer.state_dict() for name, optimizer in named_optimizers(trained_modules).items()}
        )
        tensors = {name: module.module.state_dict() for name, module in trained_modules.items()}
        tensors["optimizer"] = optimizer
        if ema is not None:
            tensors["ema"] = ema.state_dict()
        state = {
            **asdict(progress),
            "parameters": sum(parameter.numel() for parameter in trained_modules["model"].module.parameters()),
            "world_size": self._accelerator.num_processes,
            "config_hash": settings_hash(self._config),
            "data": metadata,
            "licence": strictest(metadata["licences"] | progress.init.get("licences", {})),
            "versions": _versions(),
        }
        documents = {"optimizer": groups, "rng": states, "state": copy.deepcopy(state)}
        folder = step_folder(self._config, progress.step)
        self._writing = self._executor.submit(self._write, folder, checkpoint.snapshot(self._own(tensors)), documents)
        if not self._config.train.async_checkpoints:
            self.wait()

    def poll(self) -> None:
        """Report what became of a checkpoint that is no longer being written."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self, last: bool = False) -> None:
        """Wait until the checkpoint is written. Raises UserError for a full disk if it is the last one."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            self.saved = writing.result()
        except DiskFull as error:
            if last:
                raise
            if not self._main:
                return
            kept = f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint was written yet"
            print(f"warning: {error}; {kept}; the training goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._executor.shutdown()

    def _own(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """What this rank writes, by file name: its parts of sharded tensors and, as the main process, the others."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        return {
            file if world_size == 1 else checkpoint.part_name(file, rank, world_size): {
                name: local_part(value) for name, value in values.items() if self._main or isinstance(value, DTensor)
            }
            for file, values in tensors.items()
        }

    def _write(self, folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> Path:
        if self._ranks.world_size == 1:
            checkpoint.save_checkpoint(folder, config=self._config, tensors=tensors, documents=documents)
        else:
            self._write_parts(folder, tensors, documents)
        if self._main:
            checkpoint.prune(self._config.run_dir, self._config.train.keep_checkpoints)
        return folder

    def _write_parts(self, folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> None:
        """As `save_checkpoint`, by all ranks together: each writes and hashes its parts in a folder of the main
        process, which then adds the other files and renames it."""
        with contextlib.ExitStack() as stack:
            temporary = self._ranks.on_first(lambda: stack.enter_context(atomic_folder(folder)))

            def write_own() -> dict[str, Any]:
                with clear_errors(folder):
                    entries = checkpoint.write_tensors(temporary, tensors)
                    for name in entries:
                        fsync(temporary / name)
                    return entries

            entries = {name: entry for own in self._ranks.on_each(write_own) for name, entry in own.items()}

            def publish() -> None:
                checkpoint.complete(temporary, self._config, documents, entries)
                stack.close()

            self._ranks.on_first(publish)


def restore(
    folder: Path, trained_modules: dict[str, TrainedModule], ema: EMA | None, metadata: dict[str, Any], rank: int
) -> Progress:
    """Load a checkpoint written by `save`. Raises UserError if its store or teacher is another one."""
    state = checkpoint.read_state(folder)
    old, new = state["data"]["fingerprint"], metadata["fingerprint"]
    if old != new:
        raise UserError(
            f"{folder} was trained on another store (fingerprint {old}, not {new}): give that one as data.store"
        )
    _check_same_teacher(folder, state["data"].get("teacher", {}), metadata.get("teacher", {}))
    optimizers = unflatten_optimizers(
        checkpoint.TensorFiles(folder, "optimizer"), checkpoint.read_document(folder, "optimizer"), trained_modules
    )
    for name, module in trained_modules.items():
        module.load_weights(checkpoint.TensorFiles(folder, name))
    for name, optimizer in named_optimizers(trained_modules).items():
        optimizer.load_state_dict(optimizers[name])
    if ema is not None:
        ema.load_state_dict(checkpoint.TensorFiles(folder, "ema"))
    states = checkpoint.read_document(folder, "rng")
    if rank < len(states):
        rng.set_state(states[rank])
    else:
        print(f"{folder} has no generator state for rank {rank}: it is seeded from the step", flush=True)
        rng.seed_all(state["step"], rank)
    kept = {key: state[key] for key in ("step", "samples_seen", "seconds", "flops", "valid", "init")}
    newer = ("timed_steps", "skipping", "rollbacks", "left_out", "lr_factor")  # not in older checkpoints
    return Progress(**kept, **{key: state[key] for key in newer if key in state})


def _check_same_teacher(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """A language model is identified by the hash of its weights, a codec by its fingerprint."""
    for key in ("weights_sha256", "fingerprint"):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{folder} learnt from another teacher, {old['name']} ({key} {old[key][:16]}), not from {new['name']} "
                f"({new[key][:16]}): give that one as teacher, or another run_dir"
            )


def load_initial_weights(model: str | Path, module: nn.Module, codec: dict[str, Any] | None = None) -> dict[str, Any]:
    """Load the weights of another run, checkpoint or exported model. Raises UserError if they do not fit.

    Args:
        codec: name and fingerprint of the codec of the new run's codes; None if it uses no codes.

    Returns:
        `Progress.init`: name, step, hash of the weights, licences of the data and sampling settings of that model, the
        last only if it has some of its own.
    """
    folder = checkpoint.find_model(find_folder(model))
    card = read_card(folder)
    own_codec = card["data"].get("codec")
    if codec and own_codec and codec["fingerprint"] != own_codec["fingerprint"]:
        raise UserError(
            f"init={model} uses the codes of {own_codec['name']} ({own_codec['fingerprint']}), this store has those of "
            f"{codec['name']} ({codec['fingerprint']}): start from a model of the same codec"
        )
    checkpoint.load_into(module, adapters.without_adapter(checkpoint.load_weights(folder), card), folder)
    licences = card["data"]["licences"] | card.get("init", {}).get("licences", {})
    sampling = card.get("sampling") or card.get("init", {}).get("sampling")
    return {
        "name": card.get("name", Path(model).name),
        "step": card["step"],
        "weights_sha256": checkpoint.weights_sha256(folder),
        "licences": licences,
        **({"sampling": sampling} if sampling else {}),
    }


def named_optimizers(trained_modules: dict[str, TrainedModule]) -> dict[str, Optimizer]:
    """All optimisers: AdamW by the name of its module, another one with its kind, as model.muon."""
    return {
        name if kind == "adamw" else f"{name}.{kind}": optimizer
        for name, module in trained_modules.items()
        for kind, optimizer in module.optimizers.items()
    }


def flatten_optimizers(optimizers: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`optimizer.state_dict()` by name -> (tensors named optimiser/parameter/quantity, parameter groups by name).

    The optimisers must have been built from named parameters.
    """
    tensors: dict[str, Tensor] = {}
    groups: dict[str, Any] = {}
    for module_name, state in optimizers.items():
        groups[module_name] = state["param_groups"]
        for name, index in _parameter_indices(state["param_groups"]).items():
            for quantity, value in state["state"].get(index, {}).items():
                tensors[f"{module_name}/{name}/{quantity}"] = value
    return tensors, groups


def unflatten_optimizers(
    tensors: Mapping[str, Tensor], groups: dict[str, Any], trained_modules: dict[str, TrainedModule]
) -> dict[str, dict[str, Any]]:
    """The inverse of `flatten_optimizers`, from whole tensors; those of sharded parameters are sharded likewise."""
    states: dict[str, dict[str, Any]] = {name: {"state": {}, "param_groups": own} for name, own in groups.items()}
    indices = {optimizer: _parameter_indices(own) for optimizer, own in groups.items()}
    parameters = {name: dict(module.module.named_parameters()) for name, module in trained_modules.items()}
    for key in tensors:
        optimizer, name, quantity = key.split("/")
        parameter = parameters[optimizer.partition(".")[0]][name]
        states[optimizer]["state"].setdefault(indices[optimizer][name], {})[quantity] = sharded_as(
            tensors[key], parameter
        )
    return states


def _parameter_indices(groups: list[dict[str, Any]]) -> dict[str, int]:
    pairs = (zip(group.get("param_names", []), group["params"], strict=True) for group in groups)
    return {name: index for group in pairs for name, index in group}


def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
