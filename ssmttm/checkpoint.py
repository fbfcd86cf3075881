"""Checkpoints that survive a crash at any byte.

A checkpoint is a folder, written by `ssmttm.training.checkpointer`:

    step-00001000/
      config.yaml             the resolved config of the run
      model.safetensors       weights; another trained module, such as a codec's discriminator, has its own file
      ema.safetensors         averaged weights, float32, used for validation, samples and export (absent without EMA)
      optimizer.safetensors   tensors named optimiser/parameter/quantity; optimizer.json holds the parameter groups
      rng.json                a list with one entry per rank (`ssmttm.training.rng`)
      state.json              step, samples_seen, fingerprints, versions, licences of the data, last validation
      COMPLETE                sha256 and size of every other file, written last

A sharded training has a part of each safetensors file from every rank, model.rank-0-of-8.safetensors and so on: the
rank's rows of each tensor, one after the other along the first axis. Tensors that are in the first part only are whole.
`read_tensors` and `TensorFiles` join them, so every reader takes such a checkpoint.

The folder is written under a temporary name, fsynced and renamed. A folder without COMPLETE, or whose files differ from
it, is never loaded. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssmttm import config as configs
from ssmttm.errors import UserError, first_line
from ssmttm.files import atomic_folder, file_entry, file_sha256

STEP_FOLDER = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    folder: str | Path,
    *,
    config: DictConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
) -> Path:
    """Write one checkpoint atomically. Raises UserError if it cannot be written, such as on a full disk.

    Args:
        folder: RUN/checkpoints/step-NNNNNNNN.
        tensors: by file name: model, optimizer, ...; see `snapshot`.
        documents: JSON values by file name: state (with at least `step`), ...
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        complete(temporary, config, documents, write_tensors(temporary, tensors))
    return folder


def write_tensors(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Write NAME.safetensors for each name; returns their entries of COMPLETE."""
    paths = {name: folder / f"{name}.safetensors" for name in tensors}
    for name, path in paths.items():
        _write_tensors(path, tensors[name])
    return {path.name: file_entry(path) for path in paths.values()}


def complete(folder: Path, config: DictConfig, documents: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Write the other files of a checkpoint, COMPLETE last; `entries` are those of its tensors."""
    for name, value in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    others = [*(f"{name}.json" for name in documents), "config.yaml"]
    listed = {**entries, **{name: file_entry(folder / name) for name in others}}
    (folder / "COMPLETE").write_text(json.dumps(listed, indent=1))


def part_name(name: str, rank: int, world_size: int) -> str:
    """The name of a rank's part of NAME, without the suffix."""
    return f"{name}.rank-{rank}-of-{world_size}"


def snapshot(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies in the memory of the host, each with storage of its own, which `save_checkpoint` needs."""
    return {
        file: {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
        for file, values in tensors.items()
    }


def verify(folder: str | Path) -> None:
    """Raises UserError unless all files of a checkpoint have the sizes and hashes of its COMPLETE file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: give a folder such as runs/lm/checkpoints/step-00001000")
    try:
        expected = json.loads((folder / "COMPLETE").read_text())
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {folder} is unfinished (it has no COMPLETE file): use an earlier one") from error
    except ValueError as error:
        raise UserError(f"checkpoint {folder} is damaged (COMPLETE cannot be read): use an earlier one") from error
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or file_entry(path) != entry:
            raise UserError(f"checkpoint {folder} is damaged ({name} is missing or differs): use an earlier one")


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, without verifying them."""
    folders = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, from its name, or from state.json if the folder was renamed."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else int(read_document(folder, "state")["step"])


def latest_good(run_dir: str | Path) -> Path | None:
    """The newest checkpoint that verifies; prints a warning for each newer one that does not."""
    folders = checkpoints(run_dir)
    for index, folder in reversed(list(enumerate(folders))):
        try:
            verify(folder)
        except UserError as error:
            print(f"warning: {error}" + ("; falling back to the one before" if index else ""), file=sys.stderr)
        else:
            return folder
    return None


def prune(run_dir: str | Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and temporary folders left by crashes.

    Nothing is deleted unless the newest one verifies, so the last good one is never lost.
    """
    folders = checkpoints(run_dir)
    if not folders:
        return
    verify(folders[-1])
    for folder in folders[: -max(keep, 1)]:
        (folder / "COMPLETE").unlink(missing_ok=True)  # a half-deleted folder must not look complete
        shutil.rmtree(folder)
    for folder in (Path(run_dir) / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(folder)


def find_model(path: str | Path) -> Path:
    """An exported folder, a checkpoint, or the newest good checkpoint of a run. Raises UserError if there is none."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        folder = latest_good(path)
        if folder is None:
            raise UserError(f"{path} holds no good checkpoint: train longer, or give another folder")
        return folder
    if not path.is_dir():
        raise UserError(f"no model at {path}: give a run folder, a checkpoint or an exported model")
    if (path / "state.json").exists() or (path / "COMPLETE").exists():
        verify(path)
    elif not tensor_files(path, "model"):
        raise UserError(f"no model at {path} (it has no model.safetensors): give a run, a checkpoint or an export")
    return path


def load_weights(folder: str | Path, ema: bool = True, module_name: str = "model") -> dict[str, Tensor]:
    """The state dict of a checkpoint or an exported folder; with `ema`, the averaged weights if there are any."""
    averaged = ema and module_name == "model" and tensor_files(folder, "ema")
    return read_tensors(folder, "ema" if averaged else module_name)


def weights_sha256(folder: str | Path) -> str:
    """The hash of the file with the weights that `load_weights` reads; of the hashes of its parts, if it has some."""
    files = tensor_files(folder, "ema") or tensor_files(folder, "model")
    hashes = [file_sha256(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_into(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load the weights of `source`. Raises UserError if their names and shapes are not those of the module."""
    wrong = differences(module.state_dict(), weights)
    if wrong:
        raise UserError(f"{source} does not hold this model: {wrong}. Weights and config.yaml must be of one model")
    module.load_state_dict(dict(weights))


def differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """A text with the first three tensors whose shapes differ, and how many more there are; "" if there are none."""
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    found = {name: tuple(value.shape) for name, value in given.items()}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    listed = "; ".join(
        f"{name} is {found.get(name, 'absent')}, {expected.get(name, 'nothing')} is expected" for name in wrong[:3]
    )
    return f"{listed}; and {len(wrong) - 3} more" if len(wrong) > 3 else listed


def tensor_files(folder: str | Path, name: str) -> list[Path]:
    """NAME.safetensors of a checkpoint or an exported folder, or its parts by rank; none if there is no such file."""
    whole = Path(folder) / f"{name}.safetensors"
    if whole.is_file():
        return [whole]
    return sorted(Path(folder).glob(f"{name}.rank-*-of-*.safetensors"), key=lambda path: int(path.name.split("-")[1]))


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of NAME.safetensors, or of its parts joined along the first axis; each is read when it is used.

    Raises:
        UserError: a file is missing or cannot be read.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        paths = tensor_files(folder, name) or [Path(folder) / f"{name}.safetensors"]
        count = int(paths[0].name.split("-")[-1].split(".")[0]) if len(paths[0].suffixes) > 1 else 1
        if len(paths) != count:
            raise UserError(f"{folder} has {len(paths)} of its {count} parts of {name}: use another checkpoint")
        try:
            self._files = [safe_open(path, "pt") for path in paths]
        except (OSError, SafetensorError) as error:
            reason = first_line(error)
            raise UserError(
                f"cannot read {paths[0]} ({reason}): it is missing or damaged, use another checkpoint"
            ) from error
        self._keys = [set(file.keys()) for file in self._files]

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(name) for file, keys in zip(self._files, self._keys, strict=True) if name in keys]
        if not parts:
            raise KeyError(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __contains__(self, name: object) -> bool:
        return name in self._keys[0]  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._files[0].keys())

    def __len__(self) -> int:
        return len(self._keys[0])


def read_tensors(folder: str | Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, joined if it has parts. Raises UserError if it is missing or cannot be read."""
    return dict(TensorFiles(folder, name))


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
    """`config.yaml` of a run, a checkpoint or an exported folder; see `ssmttm.config.read_config`."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"no {path}: give a run folder, a checkpoint or an exported model")
    return configs.read_config(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # it reports a full disk in its text only
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
