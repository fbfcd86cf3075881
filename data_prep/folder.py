"""The source `folder`: audio files of any kind to mono FLAC segments with licence, captions and split.

A file that cannot be used never stops the run: it goes to rejected.csv with the reason. Finished files are kept in a
journal, so a second run cuts only what is new.
"""

import csv
import hashlib
import io
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.captions import Notes, read_captions
from data_prep.journal import Journal
from data_prep.licences import Licence, allowed, normalise
from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.files import DiskFull, file_sha256, write_text

EXTENSIONS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64"}
JOURNAL = "folder.jsonl"
REJECTED = "rejected.csv"
_SPLITS = ((90, "train"), (95, "valid"), (100, "test"))


@dataclass(frozen=True)
class Cut:
    """How files become segments: Hz, seconds, and the shortest tail that is kept."""

    sample_rate: int
    segment: float = 20.0
    min_tail: float = 3.0

    def source(self) -> dict[str, Any]:
        """The part of a store's config that this source decides."""
        return {"name": "folder", **asdict(self)}


def check(root: Path, out: Path) -> None:
    """Raises UserError unless `root` is a folder and `out` another one."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the folder of your audio files as --root")
    if out.resolve() == root.resolve():
        raise UserError(f"--out is the same folder as --root ({root}): give the store a folder of its own")


def split_of(sha256: str) -> str:
    """Split by a file's hash: 90 % train, 5 % valid, 5 % test; all segments of a file, and its copies, go together."""
    share = int(hashlib.sha256(sha256.encode()).hexdigest()[:8], 16) % 100
    return next(name for limit, name in _SPLITS if share < limit)


def splits_of(hashes: Iterable[str]) -> dict[str, str]:
    """The split of each file by `split_of`; in a corpus so small that a split is empty, the next files by hash fill it.

    Train comes first, then valid, then test, as far as there are files.
    """
    ranked = sorted(set(hashes), key=lambda sha256: hashlib.sha256(sha256.encode()).hexdigest())
    splits = {sha256: split_of(sha256) for sha256 in ranked}
    names = [name for _, name in _SPLITS]
    for name in names[: len(ranked)]:
        if name not in splits.values():
            spare = [sha256 for sha256 in ranked if list(splits.values()).count(splits[sha256]) > 1]
            unneeded = [sha256 for sha256 in ranked if splits[sha256] not in names[: len(ranked)]]
            splits[(unneeded or spare)[0]] = name
    return splits


def produce(
    root: Path, out: Path, cut: Cut, default_licence: str | None = None, policy: str = "research-nc", processes: int = 1
) -> list[dict[str, Any]]:
    """Cut every usable file under `root` into `out`/audio and return the manifest rows; rejected.csv tells the rest.

    Args:
        default_licence: for files of which captions.csv names none; None refuses those.
        policy: a key of `data_prep.licences.POLICIES`.

    Raises:
        UserError: no folder, no audio file or no usable one in it, captions.csv cannot be read, or the disk is full.
    """
    check(root, out)
    fallback = normalise(default_licence) if default_licence else None
    notes = read_captions(root / "captions.csv")
    files = _find(root, out, notes)
    if not files and not notes:
        raise UserError(f"there is no audio file under {root} ({', '.join(sorted(EXTENSIONS))})")
    rejected: dict[str, str] = {}
    wanted: dict[str, Licence] = {}
    for name in files:
        licence = _licence(root, name, notes.get(name, Notes()), fallback, policy)
        if isinstance(licence, str):
            rejected[name] = licence
        else:
            wanted[name] = licence
    usable: dict[str, dict[str, Any]] = {}
    seen: dict[str, str] = {}
    noted_first = sorted(wanted, key=lambda name: (name not in notes, name))  # of copies, the one with a licence counts
    for name, entry in _cut_all(root, out, noted_first, cut, processes):
        if "reason" in entry:
            rejected[name] = entry["reason"]
        elif entry["sha256"] in seen:
            rejected[name] = f"the same file as {seen[entry['sha256']]}"
        else:
            seen[entry["sha256"]] = name
            usable[name] = entry
    splits = splits_of(seen)
    rows: list[dict[str, Any]] = []
    for name, entry in usable.items():
        rows += _rows(name, entry, notes.get(name, Notes()), wanted[name], splits[entry["sha256"]], cut)
    _write_rejected(out / REJECTED, rejected)
    print(f"{len(seen)} of {len(files)} files are usable, {len(rejected)} were rejected ({out / REJECTED} says why)")
    if not rows:
        first = next((f": {name}: {reason}" for name, reason in sorted(rejected.items())), "")
        raise UserError(f"no usable audio file under {root}, {out / REJECTED} says why{first}")
    return rows


def _find(root: Path, out: Path, notes: dict[str, Notes]) -> list[str]:
    """Relative paths of the audio files and of what captions.csv names, sorted; hidden ones and `out` left out."""
    out = out.resolve()
    found = set(notes)
    for path in root.rglob("*"):
        inside = path.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.suffix.lower() in EXTENSIONS and not hidden and path.is_file() and out not in path.resolve().parents:
            found.add(inside.as_posix())
    return sorted(found)


def _licence(root: Path, name: str, notes: Notes, fallback: Licence | None, policy: str) -> Licence | str:
    """The file's licence, or why it is refused."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "captions.csv names a file outside the folder"
    if not (root / name).exists():
        return "captions.csv names it, but there is no such file"
    if not notes.licence and fallback is None:
        return "no licence: name one in captions.csv, or give --licence for files without one"
    try:
        licence = normalise(notes.licence) if notes.licence else fallback
    except UserError as error:
        return str(error)
    assert licence is not None
    return allowed(licence, policy) or licence


def _cut_all(root: Path, out: Path, names: list[str], cut: Cut, processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, entry) of every file, in order; an entry has sha256 and segments, or the reason of its rejection."""
    with Journal(out / JOURNAL) as journal:
        keys = {name: _key(root / name, name) for name in names}
        fresh = [name for name in names if not _is_done(journal.entries.get(keys[name]), out)]
        bar = tqdm(total=len(names), initial=len(names) - len(fresh), desc="files", unit="file")
        with bar, _mapper(processes) as run:
            for name, facts in zip(fresh, run(partial(cut_file, root, out, cut), fresh), strict=True):
                journal.add(keys[name], **facts)
                bar.update()
        for name in names:
            yield name, journal.entries[keys[name]]


def cut_file(root: Path, out: Path, cut: Cut, name: str) -> dict[str, Any]:
    """Cut one file into `out`/audio; returns its sha256 and segments, or the reason why it cannot be used."""
    path = root / name
    segments: list[tuple[str, float]] = []
    loudest = 0.0
    try:
        audio.check_file(path)
        digest = file_sha256(path)
        for index, wav in enumerate(audio.read_segments(path, cut.sample_rate, cut.segment)):
            seconds = wav.shape[1] / cut.sample_rate
            if seconds < cut.min_tail:
                break
            peak = float(wav.abs().max())
            loudest = max(loudest, peak)
            target = f"audio/{digest[:16]}-{index:04d}.flac"
            audio.write(out / target, wav / max(1.0, peak), cut.sample_rate)
            segments.append((target, seconds))
    except DiskFull:
        raise
    except UserError as error:
        return _reject(out, segments, str(error).replace(f"{path} ", "it "))
    except OSError as error:
        return _reject(out, segments, f"it cannot be read ({error.strerror or error})")
    if not segments:
        return _reject(out, segments, f"it is shorter than {cut.min_tail:g} s")
    if loudest == 0:
        return _reject(out, segments, "it is silent throughout")
    return {"sha256": digest, "segments": segments}


def _reject(out: Path, segments: list[tuple[str, float]], reason: str) -> dict[str, Any]:
    for target, _ in segments:
        (out / target).unlink()
    return {"reason": reason}


def _rows(
    name: str, entry: dict[str, Any], notes: Notes, licence: Licence, split: str, cut: Cut
) -> list[dict[str, Any]]:
    """Manifest rows of one file's segments."""
    done = f"mixed down to mono, resampled to {cut.sample_rate} Hz, cut to segments of {cut.segment:g} s"
    shared = {
        "captions": notes.captions,
        "split": split,
        "licence": licence.spdx,
        "licence_url": licence.url,
        "title": notes.title or _printable(Path(name).stem),
        "author": notes.author,
        "source_url": notes.source_url,
        "modifications": done,
        "content_hash": entry["sha256"],
    }
    return [
        {"id": Path(target).stem, "duration": seconds, "audio": target, **shared}
        for target, seconds in entry["segments"]
    ]


def _key(path: Path, name: str) -> str:
    stat = path.stat()
    return f"{name}|{stat.st_size}|{stat.st_mtime_ns}"


def _is_done(entry: dict[str, Any] | None, out: Path) -> bool:
    """Whether a file's segments are all there; a rejected file is looked at again."""
    return bool(entry and "segments" in entry) and all((out / target).is_file() for target, _ in entry["segments"])


@contextmanager
def _mapper(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, or that of a pool of processes, which leaves Ctrl-C to this one."""
    if processes == 1:
        yield map
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _ignore_interrupt)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_rejected(path: Path, rejected: dict[str, str]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("path", "reason"))
    table.writerows((_printable(name), _printable(reason)) for name, reason in sorted(rejected.items()))
    write_text(path, text.getvalue())


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()
