"""Controls of a batch from the store: the tempo and the melody (chroma) of its crops."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm import audio
from ssmttm.audio.features import frame_chroma
from ssmttm.codecs import Codec
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.models.controls import Controls, SupportsControls
from ssmttm.training.tasks.base import Batch


class StoreControls:
    """Tempo and chroma of a store's segments, as far as the model supports them.

    Args:
        store: its annotations hold the tempi; chroma is computed from its audio.
        model: the model's config.
        data: `tempo_dropout`, `chroma_dropout`.
        codec: the codec of the store's codes, at the sample rate of its audio; needed for chroma only.
    """

    def __init__(self, store: Store, model: SupportsControls, data: Any, codec: Codec | None) -> None:
        self._store, self._codec = store, codec
        self._tempo_dropout, self._chroma_dropout = data.tempo_dropout, data.chroma_dropout
        self._tempi = _tempi(store) if model.tempo else None
        self._rows: dict[str, int] | None = None
        if model.chroma:
            assert codec is not None
            self._rows = {segment: row for row, segment in enumerate(_ids(store))}
        if codec is not None and model.chroma and store.info["sample_rate"] != codec.sample_rate:
            raise UserError(f"{store.path} keeps audio at {store.info['sample_rate']} Hz, its codec works at "
                            f"{codec.sample_rate} Hz: set model.chroma=false")  # fmt: skip

    def load(self, batch: Batch) -> Controls:
        """The controls of a batch's crops, on the CPU; chroma is NaN after the end of a segment."""
        return Controls(self._chroma(batch), self._tempo(batch))

    def drop(self, controls: Controls) -> Controls:
        """Drop the tempo and the chroma of random items, drawn from torch's global generator."""
        tempo = _drop(controls.tempo, self._tempo_dropout)
        return Controls(_drop(controls.chroma, self._chroma_dropout), tempo)

    def _tempo(self, batch: Batch) -> Tensor | None:
        """[b], NaN where unknown; None if the model takes no tempo."""
        return None if self._tempi is None else torch.tensor([self._tempi[name] for name in batch["ids"]])

    def _chroma(self, batch: Batch) -> Tensor | None:
        """[b, 12, T] of the crops' audio; None if the model takes no chroma."""
        if self._rows is None or self._codec is None:
            return None
        hop, frames, rate = self._codec.hop_length, batch["codes"].shape[-1], self._codec.sample_rate
        wav = torch.zeros(len(batch["ids"]), frames * hop)
        for item, (segment, first) in enumerate(zip(batch["ids"], batch["first"].tolist(), strict=True)):
            part = audio.read_part(self._store.audio_path(self._rows[segment]), first * hop, frames * hop)[0]
            wav[item, : len(part)] = torch.from_numpy(part)
        return frame_chroma(wav, rate, frames).masked_fill(~batch["frame_mask"].cpu()[:, None], torch.nan)


def _drop(control: Tensor | None, probability: float) -> Tensor | None:
    """Set each item to NaN with this probability."""
    if control is None:
        return None
    is_dropped = torch.rand(len(control)) < probability  # [b]
    return control.masked_fill(is_dropped.view(-1, *[1] * (control.ndim - 1)), torch.nan)


def _ids(store: Store) -> list[str]:
    return store.ids(np.arange(len(store)))


def _tempi(store: Store) -> dict[str, float]:
    """Beats per minute by segment id, NaN where unknown."""
    annotations = [store.annotations(row) or {} for row in range(len(store))]
    return {name: float(known.get("bpm", np.nan)) for name, known in zip(_ids(store), annotations, strict=True)}
