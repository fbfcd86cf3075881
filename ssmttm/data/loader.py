"""Deterministic loaders: the batch at position n is a pure function of (seed, n, world size, rank).

There is no iterator state. Sample p of a run is `permutation(seed, p // N)(p % N)`; every random choice for it (crop,
caption, dropout of conditions, a diffusion's time and noise) comes from hash(seed, epoch, id). So a run resumes exactly
at any batch, and the global batch is the same for any number of ranks, micro-batches and prefetched batches: rank r
takes the r-th contiguous slice. No item is dropped: an epoch may end inside a batch.

Shapes: b items of this rank, K codebooks, T frames, S samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ssmttm import audio
from ssmttm.data.audio_cache import AudioCache, store_channels
from ssmttm.data.permutation import Permutation, mix, uniform
from ssmttm.data.prefetch import prefetch_batches
from ssmttm.data.step_values import StepValues
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.text.condition import TextCondition


class Item(NamedTuple):
    """A crop of a segment, as one item of a batch."""

    epoch: int  # pass over the data
    choice_epoch: int  # of the crop, the caption and the dropout of conditions: 0 if they are fixed
    row: int  # of the store
    id: str
    first: int  # first frame within the segment
    length: int  # valid frames, at most T

    def is_dropped(self, seed: int, condition: str, probability: float) -> bool:
        """Whether a condition of the item is dropped, by hash(seed, epoch, id)."""
        return uniform(seed, self.choice_epoch, self.id, f"{condition}_dropout") < probability

    def is_unconditional(self, seed: int, caption_dropout: float) -> bool:
        """Whether the caption of the item is dropped, and all else that it is conditioned on."""
        return mix(seed, self.choice_epoch, self.id, "dropout") < caption_dropout * 2.0**64


Field = Callable[[Sequence[Item], Mapping[str, Any]], Any]  # the items and the other fields of a batch -> its new field


class _Loader(ABC):
    """The order of the samples."""

    def __init__(
        self, store: Store, split: str, batch_size: int | StepValues, seed: int, rank: int, world_size: int
    ) -> None:
        self._batch_size = batch_size if isinstance(batch_size, StepValues) else StepValues(batch_size)
        for size in self._batch_size.all():
            if size < 1 or size % world_size:
                raise UserError(f"batch_size {size} must be a positive multiple of the {world_size} processes")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside the world of {world_size}")
        self.store, self.split, self.seed = store, split, seed
        self._rows = store.indices(split)
        self._rank, self._world_size = rank, world_size
        if split == "train" and len(self._rows) < world_size:
            raise UserError(
                f"{store.path} has {len(self._rows)} train segments for {world_size} processes: start fewer"
            )

    def __len__(self) -> int:
        """Items per epoch."""
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that begin within one epoch, of the first batch size."""
        return -(-len(self._rows) // self._batch_size(0))

    def sample(self, n: int) -> list[tuple[int, int]]:
        """(epoch, row of the store) of each of this rank's items of batch n."""
        size = self._batch_size(n) // self._world_size  # b
        first = self._batch_size.total(n) + self._rank * size
        positions = np.arange(first, first + size)  # [b]
        epochs, within = np.divmod(positions, len(self._rows))
        order = np.empty_like(within)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            order[in_epoch] = Permutation(len(self._rows), self.seed, int(epoch), "order")(within[in_epoch])
        return [(int(epoch), int(row)) for epoch, row in zip(epochs, self._rows[order], strict=True)]

    def iterate(self, start: int = 0, prefetch: int = 2) -> Generator[dict[str, Any], None, None]:
        """Batches start, start + 1, ... endlessly, up to `prefetch` prepared ahead in a thread. Close it when done."""
        return prefetch_batches(self.batch, start, prefetch)

    @abstractmethod
    def batch(self, n: int) -> dict[str, Any]:
        """Batch n of this rank."""


class CodesLoader(_Loader):
    """Random crops of stored codes with their text condition.

    Args:
        store: a store with codes and text embeddings.
        split: train, valid or test.
        batch_size: items of the global batch, over all ranks; may change with n.
        frames: T, may change with n; a longer segment is cropped, a shorter one padded with code 0 where `frame_mask`
            is False.
        seed: for order, crops, caption choice and dropout.
        rank, world_size: this process and the number of processes.
        caption_dropout: probability that an item's caption is replaced by the empty one.
        fixed: every epoch uses the crop, caption and dropout of the first.
        fields: further fields of the batches by name, computed where the batches are, in the prefetch thread. Their
            values are tensors, tuples of these, or have `select_rows` and `to`; they depend on their arguments only.
        caption_row: the row whose captions an item gets; None: its own.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int | StepValues,
        frames: int | StepValues,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        caption_dropout: float = 0.0,
        fixed: bool = False,
        fields: Mapping[str, Field] | None = None,
        caption_row: Callable[[Item], int] | None = None,
    ) -> None:
        super().__init__(store, split, batch_size, seed, rank, world_size)
        self._frames = frames if isinstance(frames, StepValues) else StepValues(frames)
        if min(self._frames.all()) < 1:
            raise UserError(f"frames must be at least 1, got {min(self._frames.all())}")
        if not 0.0 <= caption_dropout <= 1.0:
            raise UserError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        self.caption_dropout, self.fixed = caption_dropout, fixed
        self.fields, self._caption_row = dict(fields or {}), caption_row
        self.n_codebooks = store.codes(int(self._rows[0])).shape[0]

    def batch(self, n: int) -> dict[str, Any]:
        """Batch n: codes int64 [b, K, T], frame_mask bool [b, T] (True: valid), captions list[str], text TextCondition,
        ids list[str], first int64 [b] (the first frame of each crop within its segment), and the further fields."""
        items, frames = self._items(n), self._frames(n)
        codes = np.zeros((len(items), self.n_codebooks, frames), np.int64)  # [b, K, T]
        mask = np.zeros((len(items), frames), bool)  # [b, T]
        for index, item in enumerate(items):
            segment = self.store.codes(item.row)  # [K, frames]
            codes[index, :, : item.length] = segment[:, item.first : item.first + item.length]
            mask[index, : item.length] = True
        captions = [self._caption(item) for item in items]
        batch = {
            "codes": torch.from_numpy(codes),
            "frame_mask": torch.from_numpy(mask),
            "captions": captions,
            "text": TextCondition.stack([torch.from_numpy(self.store.text(c).astype(np.float32)) for c in captions]),
            "ids": [item.id for item in items],
            "first": torch.tensor([item.first for item in items]),
        }
        return batch | {name: field(items, batch) for name, field in self.fields.items()}

    def _items(self, n: int) -> list[Item]:
        sample = self.sample(n)
        items = []
        for (epoch, row), segment_id in zip(sample, self.store.ids(np.array([row for _, row in sample])), strict=True):
            choice_epoch, frames = 0 if self.fixed else epoch, self.store.codes(row).shape[1]
            length = min(self._frames(n), frames)
            first = mix(self.seed, choice_epoch, segment_id, "crop") % (frames - length + 1)
            items.append(Item(epoch, choice_epoch, row, segment_id, first, length))
        return items

    def _caption(self, item: Item) -> str:
        if item.is_unconditional(self.seed, self.caption_dropout):
            return ""
        captions = self.store.captions(item.row if self._caption_row is None else self._caption_row(item))
        return captions[mix(self.seed, item.choice_epoch, item.id, "caption") % len(captions)]


class LatentCrops:
    """The field `latents` of a `CodesLoader`'s batches: a VAE's latents of the crops, aligned to their codes, float32
    [b, c, T * r]; 0 where `frame_mask` is False. Raises UserError if one is not finite."""

    def __init__(self, store: Store) -> None:
        self.store, self.per_frame = store, int(store.vae_info["frames_per_code"])  # r
        self.channels: int = store.vae_info["latent_channels"]

    def __call__(self, items: Sequence[Item], batch: Mapping[str, Any]) -> torch.Tensor:
        frames, r = batch["codes"].shape[-1], self.per_frame
        crops = np.zeros((len(items), self.channels, frames * r), np.float32)  # [b, c, T * r]
        for crop, item in zip(crops, items, strict=True):
            segment = self.store.latents(item.row)  # [c, frames * r]
            crop[:, : item.length * r] = segment[:, item.first * r : (item.first + item.length) * r]
            if not np.isfinite(crop).all():
                raise UserError(
                    f"{self.store.path}: the latents of segment {item.id} contain NaN or infinite values: encode the "
                    "store again"
                )
        return torch.from_numpy(crops)


class AudioLoader(_Loader):
    """Random crops of the store's audio files, of its C channels; only the crop is decoded.

    Args:
        store: a store that keeps its audio.
        samples: S; a shorter file is padded with zeros at its end.
        cache: the store's audio, read instead of its files.
        others: as for `CodesLoader`.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int | StepValues,
        samples: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        cache: AudioCache | None = None,
    ) -> None:
        super().__init__(store, split, batch_size, seed, rank, world_size)
        if samples < 1:
            raise UserError(f"samples must be at least 1, got {samples}")
        self.samples, self.cache = samples, cache
        self.sample_rate: int = store.info["sample_rate"]

    def batch(self, n: int) -> dict[str, Any]:
        """Batch n: audio float32 [b, C, S], ids list[str]."""
        sample = self.sample(n)
        ids = self.store.ids(np.array([row for _, row in sample]))
        wav = np.zeros((len(sample), self.store.channels, self.samples), np.float32)  # [b, C, S]
        for item, ((epoch, row), segment_id) in enumerate(zip(sample, ids, strict=True)):
            crop = self._crop(row, mix(self.seed, epoch, segment_id, "crop"))
            wav[item, :, : crop.shape[1]] = crop
        return {"audio": torch.from_numpy(wav), "ids": ids}

    def _crop(self, row: int, choice: int) -> np.ndarray:
        if self.cache is not None:
            return self.cache.crop(row, self.samples, choice)
        path = self.store.audio_path(row)
        crop, rate = audio.read_crop(path, self.samples, choice, mono=False)
        if rate != self.sample_rate:
            raise UserError(f"{path} has {rate} Hz, the store {self.sample_rate} Hz: prepare the store again")
        return store_channels(crop, self.store, path)  # [C, <= S]
