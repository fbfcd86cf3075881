"""The stage `codes`: the segments of a shard as codes of one codec, in batches of one fixed shape."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_prep.shard_task import Counts
from data_prep.stages.encode import Encoder, Windows, codec_facts, encode_all
from data_prep.stages.segments import Segments
from ssmttm import audio
from ssmttm.data.prefetch import prefetch_batches
from ssmttm.data.tensorfile import write_tensors

CODES_FILE = "codes.safetensors"


@dataclass(frozen=True)
class Coder:
    """A codec by name, loaded once in each process that encodes.

    Attributes:
        name: as `ssmttm.codecs.load_codec` takes it.
        windows: the fixed shape that it is called with.
        device: cpu or cuda.
    """

    name: str
    windows: Windows
    device: str

    def facts(self) -> dict[str, Any]:
        """What decides the codes, but for a machine's rounding."""
        codec = _loaded(self.name, "cpu")  # the GPU may be another machine's
        return codec_facts(codec) | {"windows": self.windows.facts()}

    def exact_facts(self) -> dict[str, Any]:
        """Everything that decides the codes."""
        return self.facts() | {"batch": self.windows.batch, "device": self.device}

    @property
    def codec(self) -> Encoder:
        """The codec, loaded."""
        return _loaded(self.name, self.device)


def encode_shard(coder: Coder, segments: Segments, folder: Path) -> Counts:
    """Write `codes` uint16 [K, T_total] and `offsets` of a shard's segments, in the order of its rows."""
    rows, codec = segments.read(), coder.codec
    made = list(encode_all(_read_ahead(segments, rows, codec.sample_rate), codec, coder.windows, coder.device))
    offsets = np.cumsum([0, *(codes.shape[1] for codes in made)], dtype=np.int64)  # [n+1]
    codes = np.concatenate([np.empty((codec.n_codebooks, 0), np.uint16), *made], axis=1)  # [K, T_total]
    write_tensors(folder / CODES_FILE, {"codes": codes, "offsets": offsets})
    return {"segments": len(rows), "seconds": sum(row["duration"] for row in rows)}


def _read_ahead(segments: Segments, rows: list[dict[str, Any]], rate: int) -> Iterator[Tensor]:
    """The waveforms [1, S], read by a thread while the codec works on the ones before."""

    def read(index: int) -> Tensor:
        if index == len(rows):
            raise _Over
        return audio.read(segments.audio / rows[index]["audio"], rate)[0]

    with suppress(_Over):
        yield from prefetch_batches(read, 0, 4)


class _Over(Exception):
    """There is no more sound: it ends the thread that reads."""


@lru_cache(maxsize=1)
def _loaded(name: str, device: str) -> Encoder:
    from ssmttm.codecs import load_codec

    return load_codec(name).to(device)
