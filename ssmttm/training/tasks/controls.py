"""What the items of a batch may be told besides their captions, found in the store: tempo and melody."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm import audio
from ssmttm.codecs import Codec
from ssmttm.codecs.metrics import frame_chroma
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.models.controls import Controls, SupportsControls
from ssmttm.training.tasks.base import Batch


class StoreControls:
    """Tempo and melody of a store's segments, for a model that was built for them.

    Args:
        store: knows the tempi (`truth`), and keeps the audio whose pitch classes are the melodies.
        model: the model's config.
        data: `tempo_dropout`, `chroma_dropout`.
        codec: that of the store's codes; needed for melodies only.

    Raises:
        UserError: melodies are asked for, and the store's audio has another sample rate than the codec.
    """

    def __init__(self, store: Store, model: SupportsControls, data: Any, codec: Codec | None) -> None:
        self._store, self._codec = store, codec
        self._tempo_dropout, self._chroma_dropout = data.tempo_dropout, data.chroma_dropout
        self._tempi = _tempi(store) if model.tempo else None
        self._rows = {name: row for row, name in enumerate(_names(store))} if model.chroma else None
        if self._rows is not None and store.info["sample_rate"] != codec.sample_rate:
            raise UserError(f"{store.path} keeps audio at {store.info['sample_rate']} Hz, its codec works at "
                            f"{codec.sample_rate} Hz: set model.chroma=false")  # fmt: skip

    def of(self, batch: Batch) -> Controls:
        """All that is known of a batch's crops, on the CPU; no chroma behind a segment's end."""
        return Controls(self._chroma(batch), self._tempo(batch))

    def dropped(self, controls: Controls) -> Controls:
        """The same without the tempo of some items and without the chroma of some, drawn from torch's generator."""
        tempo = _dropped(controls.tempo, self._tempo_dropout)
        return Controls(_dropped(controls.chroma, self._chroma_dropout), tempo)

    def _tempo(self, batch: Batch) -> Tensor | None:
        """[b], NaN where the store does not know it; None if the model takes none."""
        return None if self._tempi is None else torch.tensor([self._tempi[name] for name in batch["ids"]])

    def _chroma(self, batch: Batch) -> Tensor | None:
        """[b, 12, T] of the crops' own audio; None if the model takes none."""
        if self._rows is None:
            return None
        hop, frames, rate = self._codec.hop_length, batch["codes"].shape[-1], self._codec.sample_rate
        wav = torch.zeros(len(batch["ids"]), frames * hop)
        for item, (name, first) in enumerate(zip(batch["ids"], batch["first"].tolist(), strict=True)):
            part = audio.read_part(self._store.audio_path(self._rows[name]), first * hop, frames * hop)[0]
            wav[item, : len(part)] = torch.from_numpy(part)
        return frame_chroma(wav, rate, frames).masked_fill(~batch["frame_mask"].cpu()[:, None], torch.nan)


def _dropped(part: Tensor | None, chance: float) -> Tensor | None:
    """NaN in each item with this chance; nothing is drawn where there is nothing to withhold."""
    if part is None:
        return None
    gone = torch.rand(len(part)) < chance  # [b]
    return part.masked_fill(gone.view(-1, *[1] * (part.ndim - 1)), torch.nan)


def _names(store: Store) -> list[str]:
    return store.ids(np.arange(len(store)))


def _tempi(store: Store) -> dict[str, float]:
    """Beats a minute by segment, NaN where the store does not know them."""
    truths = [store.truth(row) or {} for row in range(len(store))]
    return {name: float(truth.get("bpm", np.nan)) for name, truth in zip(_names(store), truths, strict=True)}
