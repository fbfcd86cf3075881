"""The field `controls` of a batch: the tempo and the melody (chroma) of its crops, some of them dropped."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssmttm import audio
from ssmttm.audio.features import frame_chroma
from ssmttm.codecs import Codec
from ssmttm.data.loader import Field, Item
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.models.controls import Controls, SupportsControls


class StoreControls:
    """Tempo and chroma of a store's segments, as far as the model supports them.

    Args:
        store: its annotations hold the tempi; chroma is computed from its audio.
        model: the model's config.
        data: `tempo_dropout`, `chroma_dropout`.
        codec: the codec of the store's codes, at the sample rate of its audio; needed for chroma only.
        seed: for the dropout.
    """

    def __init__(self, store: Store, model: SupportsControls, data: Any, codec: Codec | None, seed: int) -> None:
        self._store, self._codec, self._seed = store, codec if model.chroma else None, seed
        self._tempo_dropout, self._chroma_dropout = data.tempo_dropout, data.chroma_dropout
        self._tempi = torch.from_numpy(store.tempi()) if model.tempo else None
        if model.chroma:
            assert codec is not None
            if store.info["sample_rate"] != codec.sample_rate:
                raise UserError(f"{store.path} keeps audio at {store.info['sample_rate']} Hz, its codec works at "
                                f"{codec.sample_rate} Hz: set model.chroma=false")  # fmt: skip

    def field(self, split: str) -> Field:
        """The field for the loader of a split: controls are dropped in the train split only."""
        return partial(self.load, drop=split == "train")

    def load(self, items: Sequence[Item], batch: Mapping[str, Any], drop: bool) -> Controls:
        """The controls of crops, on the CPU: NaN where unknown, dropped, or after the end of a segment.

        With `drop`, each item's tempo and chroma are dropped independently, by hash(seed, epoch, id).
        """
        return Controls(self._chroma(items, batch["frame_mask"], drop), self._tempo(items, drop))

    def _tempo(self, items: Sequence[Item], drop: bool) -> Tensor | None:
        """[b]; None if the model takes no tempo."""
        if self._tempi is None:
            return None
        tempo = self._tempi[torch.tensor([item.row for item in items])]
        return tempo.masked_fill(self._dropped(items, "tempo", self._tempo_dropout if drop else 0.0), torch.nan)

    def _chroma(self, items: Sequence[Item], frame_mask: Tensor, drop: bool) -> Tensor | None:
        """[b, 12, T] of the crops' audio; None if the model takes no chroma."""
        if self._codec is None:
            return None
        hop, frames = self._codec.hop_length, frame_mask.shape[1]
        dropped = self._dropped(items, "chroma", self._chroma_dropout if drop else 0.0)  # [b]
        wav = torch.zeros(len(items), frames * hop)
        for index, item in enumerate(items):
            if not dropped[index]:
                part = audio.read_part(self._store.audio_path(item.row), item.first * hop, frames * hop)[0]
                wav[index, : len(part)] = torch.from_numpy(part)
        absent = dropped[:, None, None] | ~frame_mask[:, None]  # [b, 1, T]
        return frame_chroma(wav, self._codec.sample_rate, frames).masked_fill(absent, torch.nan)

    def _dropped(self, items: Sequence[Item], condition: str, probability: float) -> Tensor:
        """Bool [b]."""
        return torch.tensor([item.is_dropped(self._seed, condition, probability) for item in items])
