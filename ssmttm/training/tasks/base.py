"""The interface of a task: a kind of model with its data, losses and samples."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm.data.step_values import StepValues
from ssmttm.data.store import Store
from ssmttm.training.data import store_metadata

Batch = dict[str, Any]  # from a loader: tensors, a TextCondition and lists of str, one entry per item
Losses = dict[str, Tensor]
Modules = Mapping[str, nn.Module]


class Loader(Protocol):
    """Deterministic: batch n is a pure function of (seed, n, world size, rank)."""

    @property
    def steps_per_epoch(self) -> int: ...

    def batch(self, n: int) -> Batch: ...

    def iterate(self, start: int) -> Generator[Batch, None, None]: ...


class Sample(NamedTuple):
    name: str
    wav: Tensor  # [C, S]
    sample_rate: int


class Task(ABC):
    """One kind of training. Losses are partial: they add up, over micro-batches and ranks, to a global mean.

    Attributes:
        modules: the trained modules by name, each with its own optimiser; "model" comes first and is exported.
        frozen: networks used in the forward pass only, on the device and in the precision of the training.
        loss_weights: weight by loss name; a loss without a weight is logged only.
    """

    config: DictConfig
    store: Store
    modules: dict[str, nn.Module]
    frozen: Sequence[nn.Module] = ()
    loss_weights: Mapping[str, float]

    def add_adapter(self) -> None:  # noqa: B027
        """Called once the initial weights are loaded; freezes the model and adds trainable layers, if asked to."""

    @abstractmethod
    def loader(self, split: str, batch_size: int | StepValues, rank: int, world_size: int) -> Loader:
        """The batches of a split; `batch_size` counts the items of all ranks."""

    @abstractmethod
    def loss_denominators(self, batch: Batch) -> Tensor:
        """What the losses of this micro-batch are averaged over, [n]: valid positions, or items."""

    @abstractmethod
    def losses(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> dict[str, Losses]:
        """Partial losses by module that is updated at this step, and by name.

        Args:
            modules: `self.modules` as wrapped by the loop; call these.
            denominators: `loss_denominators` summed over all micro-batches and ranks of the step, [n].
            step: optimiser steps done.
        """

    @abstractmethod
    def validation(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> Losses:
        """Partial losses of the model, as in `losses`, for the validation metrics."""

    def restart_codes(self, step: int) -> dict[str, Tensor]:
        """Called after the optimisers' step; re-seeds codebook entries of the model.

        Returns the re-seeded entries, a bool mask over the leading axes of each parameter that has some, by its name.
        """
        return {}

    def after_step(self, step: int) -> dict[str, float | Tensor]:
        """Called after the optimisers' step; returns values to log, numbers or scalars on the device."""
        return {}

    @abstractmethod
    def throughput(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """Codes predicted, seconds of audio and forward FLOPs of a micro-batch after `step` steps."""

    @abstractmethod
    def samples(self, step: int) -> list[Sample]:
        """Audio for fixed prompts or items with fixed seeds, from the current weights of `modules["model"]`."""

    def metadata(self) -> dict[str, Any]:
        """The data section of a model card: store, fingerprint, licences, hours, codec, text."""
        return store_metadata(self.store, self.config.data.store)
