"""A store's audio as one memory-mapped array of 16-bit samples, so that a crop costs a copy instead of decoding a file.

samples.int16  [S_total, C], the audio of all rows one after another, little-endian, without a header
cache.json     the store's fingerprint and sample rate, the first sample of each row and the end; written last
"""

import json
from pathlib import Path

import numpy as np

from ssmttm import audio
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.files import directory_lock, temporary_path, write_text

FULL_SCALE = 32768
_ALL = 1 << 62  # more samples than any file has


class AudioCache:
    """The cache of a store in `folder`, written there if it is missing or of another state of the store.

    A 16-bit file, as `data_prep` writes them, gives exactly its samples; others are rounded to 16 bits.

    Raises:
        UserError: a file cannot be read or has another sample rate or number of channels than the store, another
            process writes the cache, or the folder holds something else.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self._key = {"store": store.fingerprint, "sample_rate": store.info["sample_rate"]}
        info = self._read(folder)
        if info is None:
            if folder.is_dir() and any(
                path.name not in ("samples.int16", "cache.json", ".lock") for path in folder.iterdir()
            ):
                raise UserError(f"data.cache={folder} holds other files: choose an empty folder")
            with directory_lock(folder, "preparation"):
                info = self._read(folder) or self._write(store, folder)
        self._starts: list[int] = info["starts"]  # n + 1
        self._samples = np.memmap(folder / "samples.int16", dtype="<i2", mode="r").reshape(-1, store.channels)

    def crop(self, row: int, samples: int, choice: int) -> np.ndarray:
        """A crop of a row as float32 [C, <= samples]; arguments as for `ssmttm.audio.read_crop`."""
        start, end = self._starts[row], self._starts[row + 1]
        length = min(samples, end - start)
        first = start + choice % (end - start - length + 1)
        return self._samples[first : first + length].T.astype(np.float32) / FULL_SCALE

    def _read(self, folder: Path) -> dict | None:
        """cache.json, unless it is missing or of another state of the store."""
        path = folder / "cache.json"
        info = json.loads(path.read_text()) if path.is_file() else None
        return info if info and info["key"] == self._key else None

    def _write(self, store: Store, folder: Path) -> dict:
        (folder / "cache.json").unlink(missing_ok=True)
        temporary = temporary_path(folder / "samples.int16")
        lengths = []
        with temporary.open("wb") as raw:
            for row in range(len(store)):
                path = store.audio_path(row)
                wav, rate = audio.read_part(path, 0, _ALL, mono=False)
                wav = store_channels(wav, store, path)  # [C, S]
                if rate != self._key["sample_rate"]:
                    raise UserError(f"{path} has {rate} Hz, the store {self._key['sample_rate']} Hz: prepare it again")
                np.clip(np.rint(wav.T * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype("<i2").tofile(raw)
                lengths.append(wav.shape[1])
        temporary.rename(folder / "samples.int16")
        info = {"key": self._key, "starts": [0, *np.cumsum(lengths, dtype=np.int64).tolist()]}
        write_text(folder / "cache.json", json.dumps(info))
        return info


def store_channels(wav: np.ndarray, store: Store, path: Path) -> np.ndarray:
    """Audio of a file [C', S] on the channels of its store, [C, S]. Raises UserError for a mono file in stereo."""
    if store.channels == 1:
        return wav.mean(axis=0, keepdims=True) if len(wav) > 1 else wav
    if len(wav) != store.channels:
        raise UserError(f"{path} has {len(wav)} channels, the store {store.channels}: prepare the store again")
    return wav
