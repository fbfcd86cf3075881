"""Checkpoints that survive a crash at any byte, and the inference form of a trained model.

A checkpoint is a folder:

    step-00001000/
      config.yaml             the resolved config of the run
      model.safetensors       weights; a second player (a codec's discriminator) has its own file, such as discriminator.safetensors
      ema.safetensors         averaged weights, fp32: what validation, samples and the export use (absent without EMA)
      optimizer.safetensors   tensors named player/parameter/quantity; optimizer.json holds the parameter groups
      rng.json                a list with one entry a rank (`ssmttm.training.rng`)
      state.json              step, samples_seen, fingerprints, versions, licences of the data, last validation
      COMPLETE                sha256 and size of every other file

It is written under a hidden name, every file fsynced, renamed, and COMPLETE comes last: a folder without COMPLETE, or
whose files differ from it, is never loaded. Nothing here is pickled. This module needs torch, safetensors and
omegaconf only.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmttm.errors import UserError

STEP_FOLDER = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: str | Path,
    *,
    config: DictConfig,
    weights: Mapping[str, Mapping[str, Tensor]],
    ema: Mapping[str, Tensor] | None,
    optimizers: Mapping[str, Mapping[str, Any]],
    rng: list[dict[str, Any]],
    state: Mapping[str, Any],
) -> Path:
    """Write one checkpoint; when this returns, it is on the disk whole.

    Args:
        folder: RUN/checkpoints/step-NNNNNNNN.
        weights: state dict by player; the first player is called "model".
        ema: averaged state dict of "model".
        optimizers: `optimizer.state_dict()` by player, of optimisers built from named parameters.
        rng: generator states, one JSON object a rank.
        state: JSON object with at least `step`.

    Raises:
        UserError: the disk is full; the partial folder is removed and earlier checkpoints are untouched.
    """
    folder = Path(folder)
    aside = folder.with_name(f".writing-{folder.name}")
    tensors, groups = flatten_optimizers(optimizers)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for player, values in weights.items():
            _write_tensors(aside / f"{player}.safetensors", values)
        if ema is not None:
            _write_tensors(aside / "ema.safetensors", ema)
        _write_tensors(aside / "optimizer.safetensors", tensors)
        _write_text(aside / "optimizer.json", json.dumps(groups, indent=1))
        _write_text(aside / "rng.json", json.dumps(rng))
        _write_text(aside / "state.json", json.dumps(state, indent=1))
        _write_text(aside / "config.yaml", OmegaConf.to_yaml(config))
        _fsync(aside)
        seal = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in sorted(aside.iterdir())}
        _publish(aside, folder, seal)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"the disk is full, {folder} was not written: earlier checkpoints are intact, free some space and run again"
            ) from error
        raise
    return folder


def _publish(aside: Path, folder: Path, seal: dict[str, Any]) -> None:
    """Rename into place, then COMPLETE. What stood there before (left by a crash or an older attempt) gives way."""
    replaced = folder.with_name(f".replaced-{folder.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    try:
        _write_text(folder / ".COMPLETE", json.dumps(seal, indent=1))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        if replaced.exists():
            replaced.rename(folder)
        raise
    (folder / ".COMPLETE").rename(folder / "COMPLETE")
    _fsync(folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def verify(folder: str | Path) -> None:
    """Check a checkpoint against the sizes and hashes in its COMPLETE file.

    Raises:
        UserError: it is missing, was never finished, or a file differs from what was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: give a folder such as runs/lm/checkpoints/step-00001000")
    seal = folder / "COMPLETE"
    if not seal.is_file():
        raise UserError(f"checkpoint {folder} is unfinished (it has no COMPLETE file): use an earlier one")
    try:
        expected = json.loads(seal.read_text())
    except ValueError as error:
        raise UserError(f"checkpoint {folder} is damaged (COMPLETE cannot be read): use an earlier one") from error
    for name, file in expected.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint {folder} is damaged ({name} is missing): use an earlier one")
        if path.stat().st_size != file["bytes"] or _sha256(path) != file["sha256"]:
            raise UserError(f"checkpoint {folder} is damaged ({name} is not what was written): use an earlier one")


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, good or not."""
    folders = (Path(run_dir) / "checkpoints").glob("step-*")
    return sorted(path for path in folders if STEP_FOLDER.fullmatch(path.name))


def step_of(folder: Path) -> int:
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else int(read_state(folder)["step"])


def latest_good(run_dir: str | Path) -> Path | None:
    """The newest checkpoint that verifies; each newer one that does not is named in a warning line on standard error."""
    for folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder)
        except UserError as error:
            print(f"warning: {error}; falling back to the one before", file=sys.stderr)
        else:
            return folder
    return None


def prune(run_dir: str | Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints and what crashes left behind.

    Nothing is deleted unless the newest one verifies, so the last good one is never lost.
    """
    folders = checkpoints(run_dir)
    if not folders:
        return
    verify(folders[-1])
    for folder in folders[: -max(keep, 1)]:
        shutil.rmtree(folder)
    for pattern in (".writing-step-*", ".replaced-step-*"):
        for folder in (Path(run_dir) / "checkpoints").glob(pattern):
            shutil.rmtree(folder)


def find_model(path: str | Path) -> Path:
    """The folder that holds a model: an exported folder, a checkpoint, or the newest good checkpoint of a run folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        folder = latest_good(path)
        if folder is None:
            raise UserError(
                f"{path} holds no good checkpoint: train longer (train.checkpoint_every), or give another folder"
            )
        return folder
    if not path.is_dir():
        raise UserError(f"no model at {path}: give a run folder, a checkpoint or an exported model")
    if (path / "state.json").exists() or (path / "COMPLETE").exists():
        verify(path)
    elif not (path / "model.safetensors").is_file():
        raise UserError(
            f"no model at {path} (model.safetensors is missing): give a run folder, a checkpoint or an exported model"
        )
    return path


def load_weights(folder: str | Path, ema: bool = True, player: str = "model") -> dict[str, Tensor]:
    """The state dict of a checkpoint or an exported folder; with `ema`, the averaged weights where there are any.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    folder = Path(folder)
    averaged = folder / "ema.safetensors"
    return read_tensors(
        averaged if ema and player == "model" and averaged.is_file() else folder / f"{player}.safetensors"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {path} ({str(error).splitlines()[0]}): the file is missing or damaged, use another checkpoint"
        ) from error


def read_state(folder: str | Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    try:
        return json.loads((Path(folder) / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {Path(folder) / 'state.json'}: the checkpoint is incomplete, use another one"
        ) from error


def read_config(folder: str | Path) -> DictConfig:
    """`config.yaml` of a run, a checkpoint or an exported folder; unknown keys cannot be read."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"no {path}: give a run folder, a checkpoint or an exported model")
    config = OmegaConf.load(path)
    OmegaConf.set_struct(config, True)
    return config


def read_rng(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "rng.json").read_text())


def read_optimizers(folder: Path) -> dict[str, dict[str, Any]]:
    """`optimizer.state_dict()` by player, as `flatten_optimizers` took them apart."""
    tensors = read_tensors(folder / "optimizer.safetensors")
    groups = json.loads((folder / "optimizer.json").read_text())
    return {player: _unflatten_optimizer(player, tensors, groups[player]) for player in groups}


def flatten_optimizers(optimizers: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimiser state dicts by player -> (tensors named player/parameter/quantity, parameter groups by player)."""
    tensors: dict[str, Tensor] = {}
    groups: dict[str, Any] = {}
    for player, state in optimizers.items():
        groups[player] = state["param_groups"]
        for index, name in _parameter_names(state["param_groups"]).items():
            for quantity, value in state["state"].get(index, {}).items():
                tensors[f"{player}/{name}/{quantity}"] = value
    return tensors, groups


def _unflatten_optimizer(player: str, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    index_of = {name: index for index, name in _parameter_names(groups).items()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner, name, quantity = key.split("/")
        if owner == player:
            state.setdefault(index_of[name], {})[quantity] = value
    return {"state": state, "param_groups": groups}


def _parameter_names(groups: list[dict[str, Any]]) -> dict[int, str]:
    return {index: name for group in groups for index, name in zip(group["params"], group["param_names"], strict=True)}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    try:
        save_file(own, path)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    _fsync(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
