"""The field `controls` of a batch: melody (chroma), tempo, key, metre, bar position and timing of its crops, some
dropped."""

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
        required: a control that the model takes must be in the store; else, as for a model that is trained further, it
            is absent from all items.

    Raises:
        UserError: no segment states a required control.
    """

    def __init__(
        self, store: Store, model: SupportsControls, data: Any, codec: Codec | None, seed: int, required: bool = True
    ) -> None:
        self._store, self._codec, self._seed = store, codec if model.chroma else None, seed
        self._dropouts = {key: data[f"{key}_dropout"] for key in CONFIG_KEYS.values()}
        self._tempi = torch.from_numpy(store.tempi()) if model.tempo else None
        self._keys = torch.from_numpy(store.keys()) if model.key else None
        self._metres = torch.from_numpy(store.metres()) if model.metre or model.bar_position else None
        self._timing = torch.from_numpy(store.timing()) if model.timing else None  # [N, 2]
        self._model, self._caption_swap, self._caption_dropout = model, data.caption_swap, data.caption_dropout
        if required:
            self._check_stated()
        self._is_stated = torch.zeros(len(store), dtype=torch.bool)  # [N], whether an item has a tempo, key or metre
        for stated in (self._tempi, self._keys, self._metres):
            if stated is not None:
                self._is_stated |= stated.nan_to_num(-1) >= 0
        if model.chroma:
            assert codec is not None
            if not required and (store.info["sample_rate"] != codec.sample_rate or not store.has_audio()):
                self._codec = None
            elif store.info["sample_rate"] != codec.sample_rate:
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

        With `drop`, each control of an item is dropped independently, and all of them with its caption, as in
        classifier-free guidance of several conditions (arXiv 2306.05284), by hash(seed, epoch, id).
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
        bar_position, timing = self._bar_position(items, mask, drop), self._timing_of(items, mask, drop)
        return Controls(self._chroma(items, mask, drop), bpm, key, metre, bar_position, timing)

    def stated(self, items: Sequence[Item], batch: Mapping[str, Any]) -> Controls:
        """Tempo, key and metre as the items' segments state them; nothing where the caption is of another segment."""
        rows, swapped = torch.tensor([item.row for item in items]), torch.tensor([*map(self._is_swapped, items)])
        bpm = None if self._tempi is None else self._tempi[rows].masked_fill(swapped, torch.nan)
        key = None if self._keys is None else self._keys[rows].masked_fill(swapped, -1)
        metre = self._metres[rows].masked_fill(swapped, -1) if self._model.metre and self._metres is not None else None
        return Controls(bpm=bpm, key=key, metre=metre)

    def _check_stated(self) -> None:
        missing = {
            "tempo": self._tempi is not None and bool(self._tempi.isnan().all()),
            "key": self._keys is not None and bool((self._keys < 0).all()),
            "metre": self._metres is not None and bool((self._metres < 0).all()),
            "bar_position": self._model.bar_position and not self._store.has_bars(),
            "timing": self._timing is not None and bool(self._timing.isnan().all()),
        }
        path = self._store.path
        for key in (key for key, is_missing in missing.items() if is_missing and getattr(self._model, key)):
            if key == "timing":
                raise UserError(
                    f"{path} does not state where its segments are in their tracks: set model.timing=false, or prepare "
                    "it again from the audio"
                )
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

    def _timing_of(self, items: Sequence[Item], frame_mask: Tensor, drop: bool) -> Tensor | None:
        """[b, 2, T] of the crops; None if the model takes none."""
        if self._timing is None:
            return None
        n_frames, rate = frame_mask.shape[1], self._store.info["codec"]["frame_rate"]
        times = (torch.tensor([item.first for item in items])[:, None] + torch.arange(n_frames)) / rate  # [b, T]
        segment = self._timing[torch.tensor([item.row for item in items])]  # [b, 2]
        found = torch.stack([segment[:, :1] + times, segment[:, 1:] - times], 1).float()  # [b, 2, T]
        dropped = torch.stack([self._dropped(items, "timing", drop, side) for side in ("start", "end")], 1)  # [b, 2]
        return found.masked_fill(dropped[..., None] | ~frame_mask[:, None], torch.nan)

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

    def _dropped(self, items: Sequence[Item], condition: str, drop: bool, part: str = "") -> Tensor:
        """Whether a condition of each item, or a part of it, is dropped: bool [b]."""
        if not drop:
            return torch.zeros(len(items), dtype=torch.bool)
        probability = self._dropouts[condition]

        def is_dropped(item: Item) -> bool:
            if item.is_unconditional(self._seed, self._caption_dropout):
                return True
            return item.is_dropped(self._seed, condition + part, probability) and not self._is_swapped(item)

        return torch.tensor([is_dropped(item) for item in items])
