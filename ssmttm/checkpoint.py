"""Checkpoints that survive a crash at any byte.

A checkpoint is a folder, written by `ssmttm.training.checkpointer`:

    step-00001000/
      config.yaml             the resolved config of the run
      model.safetensors       weights; a second player, such as a codec's discriminator, has a file of its own name
      ema.safetensors         averaged weights, fp32: what validation, samples and the export use (absent without EMA)
      optimizer.safetensors   tensors named player/parameter/quantity; optimizer.json holds the parameter groups
      rng.json                a list with one entry a rank (`ssmttm.training.rng`)
      state.json              step, samples_seen, fingerprints, versions, licences of the data, last validation
      COMPLETE                sha256 and size of every other file

It is written under a hidden name, every file fsynced, renamed, and COMPLETE comes last: a folder without COMPLETE, or
whose files differ from it, is never loaded. Nothing here is pickled. This module needs safetensors and omegaconf only.
"""

import errno
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
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.files import file_sha256, fsync

STEP_FOLDER = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    folder: str | Path,
    *,
    config: DictConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
) -> Path:
    """Write one checkpoint; when this returns, it is on the disk whole.

    Args:
        folder: RUN/checkpoints/step-NNNNNNNN.
        tensors: by the name of their file: model, optimizer, ...
        documents: JSON values by the name of their file: state (with at least `step`), ...

    Raises:
        UserError: the disk is full; the partial folder is removed and earlier checkpoints are untouched.
    """
    folder = Path(folder)
    aside = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, values in tensors.items():
            _write_tensors(aside / f"{name}.safetensors", values)
        for name, value in documents.items():
            _write_text(aside / f"{name}.json", json.dumps(value, indent=1))
        _write_text(aside / "config.yaml", OmegaConf.to_yaml(config))
        fsync(aside)
        seal = {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in aside.iterdir()}
        _publish(aside, folder, seal)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full, {folder} is not written, earlier ones are intact: free some space and run again"
            ) from error
        raise
    return folder


def _publish(aside: Path, folder: Path, seal: dict[str, Any]) -> None:
    """Rename into place, then COMPLETE. What stood there before (of a crash, or damaged) gives way."""
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
    fsync(folder)
    fsync(folder.parent)
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
        if path.stat().st_size != file["bytes"] or file_sha256(path) != file["sha256"]:
            raise UserError(f"checkpoint {folder} is damaged ({name} is not what was written): use an earlier one")


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, good or not."""
    folders = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, from its name, or from its state where the folder was renamed."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else int(read_document(folder, "state")["step"])


def latest_good(run_dir: str | Path) -> Path | None:
    """The newest checkpoint that verifies; a warning line on standard error names each newer one that does not."""
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
        (folder / "COMPLETE").unlink(missing_ok=True)  # a half-deleted folder must not look whole
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
                f"{path} holds no good checkpoint: train on (train.checkpoint_every), or give another folder"
            )
        return folder
    if not path.is_dir():
        raise UserError(f"no model at {path}: give a run folder, a checkpoint or an exported model")
    if (path / "state.json").exists() or (path / "COMPLETE").exists():
        verify(path)
    elif not (path / "model.safetensors").is_file():
        raise UserError(
            f"no model at {path} (it has no model.safetensors): give a run, a checkpoint or an exported model"
        )
    return path


def load_weights(folder: str | Path, ema: bool = True, module_name: str = "model") -> dict[str, Tensor]:
    """The state dict of a checkpoint or an exported folder; with `ema`, the averaged weights where there are any.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    averaged = Path(folder) / "ema.safetensors"
    return read_tensors(folder, "ema" if ema and module_name == "model" and averaged.is_file() else module_name)


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a state dict that must be the module's own, name by name and shape by shape.

    Raises:
        UserError: it is not; says which tensors differ and that they came from `source`.
    """
    wrong = differences(module.state_dict(), weights)
    if wrong:
        raise UserError(f"{source} does not hold this model: {wrong}. Weights and config.yaml must be of one model")
    module.load_state_dict(dict(weights))


def differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first three names whose shapes differ and how many more there are, in words; "" where there are none."""
    expected, found = ({name: tuple(value.shape) for name, value in side.items()} for side in (wanted, given))
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    listed = "; ".join(
        f"{name} is {found.get(name, 'absent')}, {expected.get(name, 'nothing')} is expected" for name in wrong[:3]
    )
    return f"{listed}; and {len(wrong) - 3} more" if len(wrong) > 3 else listed


def read_tensors(folder: str | Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors. Raises UserError if it is missing or cannot be read."""
    path = Path(folder) / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path} ({reason}): it is missing or damaged, use another checkpoint") from error


def read_document(folder: str | Path, name: str) -> Any:
    """The value of NAME.json. Raises UserError if it is missing or cannot be read."""
    path = Path(folder) / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: it is missing or damaged, use another checkpoint") from error


def read_state(folder: str | Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return read_document(folder, "state")


def read_config(folder: str | Path) -> DictConfig:
    """`config.yaml` of a run, a checkpoint or an exported folder; unknown keys cannot be read."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"no {path}: give a run folder, a checkpoint or an exported model")
    config = OmegaConf.load(path)
    OmegaConf.set_struct(config, True)
    return config


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    try:
        save_file(own, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    fsync(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    fsync(path)
