"""Experiment trackers behind one interface: TensorBoard, Weights & Biases, Trackio.

A run's own record is metrics.jsonl and samples/; a tracker shows the same numbers and audio elsewhere. None needs a
network: TensorBoard and Trackio write locally, Weights & Biases does with WANDB_MODE=offline.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.files import write_text

PROJECT = "ssmttm"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
INSTALL = "pip install ssmttm[track]"


class Tracker(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars by name."""

    def write_audio(self, step: int, name: str, wav: Tensor, sample_rate: int) -> None:
        """Log a sample, float32 [C, S] in [-1, 1] on the CPU."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a name that is no tracker, or one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"unknown train.trackers={name}: choose from {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise UserError(f"train.trackers has {name}, which is not installed: {INSTALL}, or leave it out")


def open_trackers(names: Sequence[str], run_dir: Path, config: DictConfig, start_step: int) -> list[Tracker]:
    """Open each tracker for a run that begins, or goes on, after `start_step`.

    Raises:
        UserError: see `check_trackers`; or Weights & Biases has no account and is not offline.
    """
    check_trackers(names)
    return [TRACKERS[name](run_dir, config, start_step) for name in names]


class TensorBoardTracker:
    """Writes to run_dir/tensorboard. Points after `start_step` of an earlier try are hidden; audio is mixed to mono."""

    def __init__(self, run_dir: Path, config: DictConfig, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def write_audio(self, step: int, name: str, wav: Tensor, sample_rate: int) -> None:
        self._writer.add_audio(name, wav.mean(0, keepdim=True), step, sample_rate=sample_rate)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Logs to one run of Weights & Biases, which a resumed training continues. Its files are in run_dir/wandb."""

    def __init__(self, run_dir: Path, config: DictConfig, start_step: int) -> None:
        self._wandb = import_module("wandb")
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), name=run_dir.name, id=_run_id(run_dir),
                resume="allow", dir=str(run_dir), config=_values(config),
            )  # fmt: skip
        except self._wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"train.trackers=wandb: {reason}: run `wandb login`, or set WANDB_MODE=offline") from error
        self._run.define_metric("*", step_metric="step")  # its own steps may not go back, as on a resume

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def write_audio(self, step: int, name: str, wav: Tensor, sample_rate: int) -> None:
        clip = self._wandb.Audio(wav.T.numpy(), sample_rate=sample_rate)
        self._run.log({"step": step, f"samples/{name}": clip})

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """Logs to one run of Trackio, which a resumed training continues, in a local database (TRACKIO_DIR)."""

    def __init__(self, run_dir: Path, config: DictConfig, start_step: int) -> None:
        self._trackio = import_module("trackio")
        self._run = self._trackio.init(
            os.environ.get("TRACKIO_PROJECT", PROJECT), name=f"{run_dir.name}-{_run_id(run_dir)}", resume="allow",
            config=_values(config), embed=False,
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_audio(self, step: int, name: str, wav: Tensor, sample_rate: int) -> None:
        samples = (wav.T * 32767).short().numpy()  # it would normalise floats to their peak
        self._run.log({f"samples/{name}": self._trackio.Audio(samples, sample_rate=sample_rate)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(run_dir: Path) -> str:
    """An id of the run for trackers, kept in run_dir/tracker_id."""
    path = run_dir / "tracker_id"
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:8])
    return path.read_text()


def _values(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=True)


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker, "trackio": TrackioTracker}
