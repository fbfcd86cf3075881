"""The last stage of every source: rows with audio in, a finished store out (codes, caption embeddings, attribution)."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.attribution import write_attribution
from data_prep.encode import Encoder, Windows, codec_facts, encode_all
from ssmttm import audio
from ssmttm.data.store import SPLITS, Store, open_store, text_name
from ssmttm.data.text_table import write_text_table
from ssmttm.data.writer import StoreWriter, claim
from ssmttm.errors import UserError
from ssmttm.files import written_aside
from ssmttm.text.encoders import TextEncoder

Row = dict[str, Any]


def make_config(source: dict[str, Any], codec: Encoder | None, windows: Windows, device: str) -> dict[str, Any]:
    """Everything that decides what a store's audio and codes are."""
    if codec is None:
        return {"source": source, "codec": None}
    return {"source": source, "codec": codec_facts(codec) | {"windows": windows.facts(), "device": device}}


def claim_for(out: Path, source: dict[str, Any], codec: Encoder | None, device: str) -> None:
    """Refuse another config's folder before any work is done; as `ssmttm.data.writer.claim`."""
    claim(out, make_config(source, codec, Windows(), device))


def pack(
    rows: list[Row],
    out: Path,
    source: dict[str, Any],
    sample_rate: int,
    codec: Encoder | None,
    text: TextEncoder | None,
    device: str = "cpu",
    windows: Windows | None = None,
) -> Store:
    """Encode, embed and finish a store.

    Args:
        rows: manifest columns, `audio` a path inside `out`.
        out: the store's folder, which holds the audio already.
        source: what the audio was made from and how; part of the config that a second run must share.
        sample_rate: Hz of the audio files.
        codec: None for a store of audio only.
        text: None for a store without caption embeddings.

    Raises:
        UserError: `out` is of another config, an audio file cannot be read, or the disk is full.
    """
    windows = windows or Windows()
    config = make_config(source, codec, windows, device)
    facts = None if codec is None else config["codec"]
    writer = StoreWriter(out, config, facts, sample_rate)
    if codec is None:
        for row in rows:
            writer.add(row)
    else:
        _add_codes(rows, writer, codec, windows, device)
    if text is not None:
        _embed_captions(rows, out / text_name(text.name), text)
    store = writer.finish(
        None if text is None else {"name": text.name, "fingerprint": text.fingerprint, "dim": text.dim}
    )
    write_attribution(store)
    return store


def repack(root: Path, out: Path | None, codec: Encoder | None, text: TextEncoder | None, device: str) -> Store:
    """Give an existing store with audio another codec or text encoder, in place or as a new store.

    Raises:
        UserError: `root` is no store or keeps no audio, or has codes of another codec and `out` is not given.
    """
    store = open_store(root)
    rows = [row | {"shard": -1, "offset": 0, "frames": 0} for row in store.manifest.to_pylist()]
    files = [store.audio_path(index) for index in range(len(store))]
    out = out or root
    if out.resolve() != root.resolve():
        for row, file in zip(tqdm(rows, desc="audio", unit="segment"), files, strict=True):
            _share(file, out / row["audio"])
    return pack(rows, out, store.info["config"]["source"], store.info["sample_rate"], codec, text, device)


def summary(store: Store) -> str:
    """One line: segments, hours by split, size, place."""
    counts, hours = store.info["counts"], store.info["hours"]
    splits = ", ".join(f"{split} {counts[split]} / {hours[split]:.2f} h" for split in SPLITS)
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    codec, text = store.info["codec"], store.info["text"]
    return (
        f"{store.path}: {len(store)} segments, {sum(hours.values()):.2f} h ({splits}), {size / 1e6:.1f} MB, "
        f"codec {codec['name'] if codec else 'none'}, text {text['name'] if text else 'none'}"
    )


def _add_codes(rows: list[Row], writer: StoreWriter, codec: Encoder, windows: Windows, device: str) -> None:
    fresh = [row for row in rows if row["id"] not in writer]

    def wavs() -> Iterator[Tensor]:
        for row in fresh:
            yield audio.read(writer.path / row["audio"], codec.sample_rate)[0]

    hours = sum(row["duration"] for row in rows) / 3600
    kept = hours - sum(row["duration"] for row in fresh) / 3600
    try:
        with hours_bar(f"codes ({codec.name})", hours, kept) as advance:
            for row, codes in zip(fresh, encode_all(wavs(), codec, windows, device), strict=True):
                writer.add(row, codes)
                advance(row["duration"])
    finally:
        writer.flush()  # what is encoded stays, also when the run is stopped
    added = {row["id"] for row in fresh}
    for row in rows:
        if row["id"] not in added:
            writer.add(row)


def _embed_captions(rows: list[Row], path: Path, text: TextEncoder) -> None:
    captions = {caption for row in rows for caption in row.get("captions") or []}

    def encode(batch: list[str]) -> list[np.ndarray]:
        condition = text.encode(batch)
        return [states[mask].cpu().numpy() for states, mask in zip(*condition, strict=True)]

    with tqdm(total=len(captions | {""}), desc=f"captions ({text.name})", unit="caption") as bar:
        write_text_table(path, captions, encode, text.dim, text.fingerprint, bar.update)


@contextmanager
def hours_bar(name: str, hours: float, kept: float = 0.0) -> Iterator[Callable[[float], None]]:
    """A progress bar in hours of audio, of which `kept` were there before; gives the function to add seconds."""
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}{postfix}]"
    begun, done = time.monotonic(), 0.0
    with tqdm(total=hours, initial=kept, desc=name, bar_format=shape) as bar:

        def advance(seconds: float) -> None:
            nonlocal done
            done += seconds
            bar.set_postfix_str(f"{done / max(time.monotonic() - begun, 1e-3):.1f}x real time", refresh=False)
            bar.update(min(seconds / 3600, hours - bar.n))

        yield advance


def _share(source: Path, target: Path) -> None:
    """The same file in another store: a hard link where the disk allows, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        with written_aside(target) as aside:
            shutil.copyfile(source, aside)


def pick_device(asked: str) -> str:
    """`auto` is the GPU where there is one. Raises UserError for a device that is not there."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave --device out")
    return asked
