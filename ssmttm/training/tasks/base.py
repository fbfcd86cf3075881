"""What the loop asks of a task: a kind of model, what it learns from, and how to hear how far it is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Batch = dict[str, Any]  # of a loader: tensors, a TextCondition and lists of str, all with one entry an item
Losses = dict[str, Tensor]


class Loader(Protocol):
    """Deterministic: batch n is a pure function of (seed, n, world size, rank)."""

    steps_per_epoch: int

    def batch(self, n: int) -> Batch: ...

    def iterate(self, start: int) -> Iterator[Batch]: ...


class Sample(NamedTuple):
    name: str
    wav: Tensor  # [C, S]
    sample_rate: int


class Task(Protocol):
    """One kind of training. Losses come as shares that add up, over micro-batches and ranks, to a global mean.

    Attributes:
        modules: the players by name, each with its own optimiser; "model" comes first and is what the export holds.
        frozen: networks that are asked and not trained: they run on the device and in the precision of the training.
        loss_weights: weight by loss name; a loss without one is logged and not trained on.
    """

    modules: dict[str, nn.Module]
    frozen: Sequence[nn.Module]
    loss_weights: Mapping[str, float]

    def loader(self, split: str, batch_size: int, rank: int, world_size: int) -> Loader:
        """The batches of a split; `batch_size` is that of all ranks together."""

    def counts(self, batch: Batch) -> Tensor:
        """What the losses of this micro-batch are averaged over, [n]: valid positions, or items."""

    def losses(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> dict[str, Losses]:
        """Named losses by player that takes a turn at this step.

        Args:
            players: `modules` as the loop has wrapped them; call these.
            counts: `counts` summed over all micro-batches and ranks of the step, [n].
            step: steps done before this one.
        """

    def validation(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> Losses:
        """Shares, as of `losses`, of the figures of the model that validation logs."""

    def after_step(self, step: int) -> dict[str, float]:
        """Bookkeeping once the optimisers have stepped; returns figures to log."""

    def work(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """Codes predicted, seconds of audio and forward FLOPs of a micro-batch, when `step` steps are done."""

    def samples(self, step: int) -> list[Sample]:
        """Fixed prompts or items with fixed seeds, made with the weights that `modules["model"]` now holds."""

    def facts(self) -> dict[str, Any]:
        """What a model card must know of the data: store, fingerprint, licences, hours, codec, text."""
