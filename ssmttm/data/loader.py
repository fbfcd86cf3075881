"""Deterministic loaders: the batch at position n is a pure function of (seed, n, world size, rank).

There is no iterator state. Sample p of a run is `permutation(seed, p // N)(p % N)`; its crop, caption and dropout come
from hash(seed, epoch, id). So a run resumes exactly at any batch, and the global batch is the same for any number of
ranks: rank r takes the r-th contiguous slice. No item is dropped: an epoch may end inside a batch.

Shapes: b items of this rank, K codebooks, T frames, S samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from ssmttm import audio
from ssmttm.data.permutation import Permutation, mix
from ssmttm.data.prefetch import prefetch_batches
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.text.condition import TextCondition


class _Loader(ABC):
    """The order of the samples."""

    def __init__(self, store: Store, split: str, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size {batch_size} must be a positive multiple of the {world_size} processes")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside the world of {world_size}")
        self.store, self.split, self.batch_size, self.seed = store, split, batch_size, seed
        self._rows = store.indices(split)
        self._rank_batch_size = batch_size // world_size
        self._first = rank * self._rank_batch_size

    def __len__(self) -> int:
        """Items per epoch."""
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that begin within one epoch."""
        return -(-len(self._rows) // self.batch_size)

    def sample(self, n: int) -> list[tuple[int, int]]:
        """(epoch, row of the store) of each of this rank's items of batch n."""
        first = n * self.batch_size + self._first
        positions = np.arange(first, first + self._rank_batch_size)  # [b]
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
        batch_size: items of the global batch, over all ranks.
        frames: T; a longer segment is cropped, a shorter one padded with code 0 where `frame_mask` is False.
        seed: for order, crops, caption choice and dropout.
        rank, world_size: this process and the number of processes.
        caption_dropout: probability that an item's caption is replaced by the empty one.
        fixed: every epoch uses the crop, caption and dropout of the first.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        frames: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        caption_dropout: float = 0.0,
        fixed: bool = False,
    ) -> None:
        super().__init__(store, split, batch_size, seed, rank, world_size)
        if frames < 1:
            raise UserError(f"frames must be at least 1, got {frames}")
        if not 0.0 <= caption_dropout <= 1.0:
            raise UserError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        self.frames, self.caption_dropout, self.fixed = frames, caption_dropout, fixed
        self.n_codebooks = store.codes(int(self._rows[0])).shape[0]

    def batch(self, n: int) -> dict[str, Any]:
        """Batch n: codes int64 [b, K, T], frame_mask bool [b, T] (True: valid), captions list[str], text TextCondition,
        ids list[str], first int64 [b] (the first frame of each crop within its segment)."""
        sample = [(0 if self.fixed else epoch, row) for epoch, row in self.sample(n)]
        ids = self.store.ids(np.array([row for _, row in sample]))
        codes = np.zeros((len(sample), self.n_codebooks, self.frames), np.int64)  # [b, K, T]
        mask = np.zeros((len(sample), self.frames), bool)  # [b, T]
        captions, starts = [], []
        for item, ((epoch, row), segment_id) in enumerate(zip(sample, ids, strict=True)):
            segment = self.store.codes(row)  # [K, frames]
            length = min(self.frames, segment.shape[1])
            first = mix(self.seed, epoch, segment_id, "crop") % (segment.shape[1] - length + 1)
            codes[item, :, :length] = segment[:, first : first + length]
            mask[item, :length] = True
            starts.append(first)
            captions.append(self._caption(epoch, row, segment_id))
        text = TextCondition.stack([torch.from_numpy(self.store.text(c).astype(np.float32)) for c in captions])
        return {
            "codes": torch.from_numpy(codes),
            "frame_mask": torch.from_numpy(mask),
            "captions": captions,
            "text": text,
            "ids": ids,
            "first": torch.tensor(starts),
        }

    def _caption(self, epoch: int, row: int, segment_id: str) -> str:
        if mix(self.seed, epoch, segment_id, "dropout") < self.caption_dropout * 2.0**64:
            return ""
        captions = self.store.captions(row)
        return captions[mix(self.seed, epoch, segment_id, "caption") % len(captions)]


class AudioLoader(_Loader):
    """Random mono crops of the store's audio files; only the crop is decoded.

    Args:
        store: a store that keeps its audio.
        samples: S; a shorter file is padded with zeros at its end.
        others: as for `CodesLoader`.
    """

    def __init__(
        self, store: Store, split: str, batch_size: int, samples: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(store, split, batch_size, seed, rank, world_size)
        if samples < 1:
            raise UserError(f"samples must be at least 1, got {samples}")
        self.samples = samples
        self.sample_rate: int = store.info["sample_rate"]

    def batch(self, n: int) -> dict[str, Any]:
        """Batch n: audio float32 [b, 1, S], ids list[str]."""
        sample = self.sample(n)
        ids = self.store.ids(np.array([row for _, row in sample]))
        wav = np.zeros((len(sample), 1, self.samples), np.float32)  # [b, 1, S]
        for item, ((epoch, row), segment_id) in enumerate(zip(sample, ids, strict=True)):
            crop = self._crop(row, mix(self.seed, epoch, segment_id, "crop"))
            wav[item, 0, : len(crop)] = crop
        return {"audio": torch.from_numpy(wav), "ids": ids}

    def _crop(self, row: int, choice: int) -> np.ndarray:
        path = self.store.audio_path(row)
        crop, rate = audio.read_crop(path, self.samples, choice)
        if rate != self.sample_rate:
            raise UserError(f"{path} has {rate} Hz, the store {self.sample_rate} Hz: prepare the store again")
        return crop
