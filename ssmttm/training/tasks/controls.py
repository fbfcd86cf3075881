"""The field `controls` of a batch: melody (chroma), tempo, key, metre and bar position of its crops, some dropped."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssmttm import audio
from ssmttm.audio.features import frame_chroma
from ssmttm.audio.notation import beats_of
from ssmttm.codecs import Codec
from ssmttm.data.loader import Field, Item
from ssmttm.data.permutation import mix
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.models.controls import CONFIG_KEYS, Controls, SupportsControls, bar_position

_STATED = {"tempo": "bpm", "key": "key", "metre": "metre", "bar_position": "bars"}  # in a store, by key of the model


class StoreControls:
    """The controls of a store's segments that the model was built with.

    Args:
        store: its manifest states the others; chroma is computed from its audio.
        model: the model's config.
        data: `tempo_dropout`, `chroma_dropout` and so on.
        codec: the codec of the store's codes, at the sample rate of its audio; needed for chroma only.
        seed: for the dropout.

    Raises:
        UserError: no segment states a control that the model takes.
    """

    def __init__(self, store: Store, model: SupportsControls, data: Any, codec: Codec | None, seed: int) -> None:
        self._store, self._codec, self._seed = store, codec if model.chroma else None, seed
        self._dropouts = {key: data[f"{key}_dropout"] for key in CONFIG_KEYS.values()}
        self._tempi = torch.from_numpy(store.tempi()) if model.tempo else None
        self._keys = torch.from_numpy(store.keys()) if model.key else None
        self._metres = torch.from_numpy(store.metres()) if model.metre or model.bar_position else None
        self._model, self._caption_swap = model, data.caption_swap
        self._check_stated()
        self._is_stated = torch.zeros(len(store), dtype=torch.bool)  # [N], whether an item has a tempo, key or metre
        for stated in (self._tempi, self._keys, self._metres):
            if stated is not None:
                self._is_stated |= stated.nan_to_num(-1) >= 0
        if model.chroma:
            assert codec is not None
            if store.info["sample_rate"] != codec.sample_rate:
                raise UserError(f"{store.path} keeps audio at {store.info['sample_rate']} Hz, its codec works at "
                                f"{codec.sample_rate} Hz: set model.chroma=false")  # fmt: skip

    def field(self, split: str) -> Field:
        """The field for the loader of a split: controls are dropped in the train split only."""
        return partial(self.load, drop=split == "train")

    def caption_row(self, split: str) -> Callable[[Item], int] | None:
        """The row whose captions an item of a split gets; None: its own. With `data.caption_swap`, some items with a
        control have the captions of another one, and keep all their controls: a model learns that these count."""
        if split != "train" or not self._caption_swap:
            return None
        rows = self._store.indices(split)

        def row(item: Item) -> int:
            return int(rows[mix(self._seed, item.choice_epoch, item.id, "other_caption") % len(rows)])

        return lambda item: row(item) if self._is_swapped(item) else item.row

    def _is_swapped(self, item: Item) -> bool:
        return bool(self._is_stated[item.row]) and item.is_dropped(self._seed, "own_caption", self._caption_swap)

    def load(self, items: Sequence[Item], batch: Mapping[str, Any], drop: bool) -> Controls:
        """The controls of crops, on the CPU: NaN where unknown, dropped, or after the end of a segment.

        With `drop`, each control of an item is dropped independently, by hash(seed, epoch, id).
        """
        rows = torch.tensor([item.row for item in items])
        bpm = key = metre = None
        if self._tempi is not None:
            bpm = self._tempi[rows].masked_fill(self._dropped(items, "tempo", drop), torch.nan)
        if self._keys is not None:
            key = self._keys[rows].masked_fill(self._dropped(items, "key", drop), -1)
        if self._model.metre and self._metres is not None:
            metre = self._metres[rows].masked_fill(self._dropped(items, "metre", drop), -1)
        mask = batch["frame_mask"]
        return Controls(self._chroma(items, mask, drop), bpm, key, metre, self._bar_position(items, mask, drop))

    def _check_stated(self) -> None:
        missing = {
            "tempo": self._tempi is not None and bool(self._tempi.isnan().all()),
            "key": self._keys is not None and bool((self._keys < 0).all()),
            "metre": self._metres is not None and bool((self._metres < 0).all()),
            "bar_position": self._model.bar_position and not self._store.has_bars(),
        }
        path = self._store.path
        for key in (key for key, is_missing in missing.items() if is_missing and getattr(self._model, key)):
            raise UserError(
                f"no segment of {path} states its {_STATED[key]}: set model.{key}=false, or prepare data with a column "
                f"{_STATED[key]}; a store of an earlier version gets it by `python -m data_prep pack --root {path} "
                "--out NEW`"
            )

    def _bar_position(self, items: Sequence[Item], frame_mask: Tensor, drop: bool) -> Tensor | None:
        """[b, 2, T] of the crops; None if the model takes none."""
        if not self._model.bar_position:
            return None
        assert self._metres is not None
        dropped, n_frames = self._dropped(items, "bar_position", drop), frame_mask.shape[1]
        found = torch.full((len(items), 2, n_frames), torch.nan)
        rate = self._store.info["codec"]["frame_rate"]
        for index, item in enumerate(items):
            metre = int(self._metres[item.row])
            if metre >= 0 and not bool(dropped[index]):
                times = (item.first + torch.arange(n_frames, dtype=torch.float64)) / rate
                found[index] = bar_position(times, torch.from_numpy(self._store.bars(item.row)), beats_of(metre))
        return found.masked_fill(~frame_mask[:, None], torch.nan)

    def _chroma(self, items: Sequence[Item], frame_mask: Tensor, drop: bool) -> Tensor | None:
        """[b, 12, T] of the crops' audio; None if the model takes no chroma."""
        if self._codec is None:
            return None
        hop, frames = self._codec.hop_length, frame_mask.shape[1]
        dropped = self._dropped(items, "chroma", drop)  # [b]
        wav = torch.zeros(len(items), frames * hop)
        for index, item in enumerate(items):
            if not dropped[index]:
                part = audio.read_part(self._store.audio_path(item.row), item.first * hop, frames * hop)[0]
                wav[index, : len(part)] = torch.from_numpy(part)
        absent = dropped[:, None, None] | ~frame_mask[:, None]  # [b, 1, T]
        return frame_chroma(wav, self._codec.sample_rate, frames).masked_fill(absent, torch.nan)

    def _dropped(self, items: Sequence[Item], condition: str, drop: bool) -> Tensor:
        """Bool [b]."""
        if not drop:
            return torch.zeros(len(items), dtype=torch.bool)
        probability = self._dropouts[condition]
        dropped = [item.is_dropped(self._seed, condition, probability) and not self._is_swapped(item) for item in items]
        return torch.tensor(dropped)
