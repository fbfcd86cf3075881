"""A page about a store: how much of what, under which licences, what was refused and why, and how some of it sounds.

Everything is counted by columns (pyarrow), so that a million segments take seconds.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.reports.rejected import many, read_rejected, rejected, rejected_in_short, selection, short
from data_prep.stages.captions.tag_words import CATEGORIES
from ssmttm.data.store import SPLITS, Store
from ssmttm.errors import UserError
from ssmttm.licences import POLICIES, tier
from ssmttm.reports.charts import Bar, Bars, Clip, Folded, Heading, Histogram, Numbers, Stack, plain
from ssmttm.reports.html import Block, Facts, Row, Section, Text, write_page
from ssmttm.reports.spectrogram import ticks

_SHOWN = 15  # bars of one kind
_CATEGORIES = 4  # of tags
_EXAMPLES = 12


def write_report(store: Store, out: Path) -> Path:
    """Write the page; its players name the store's audio by relative paths, so that both can be moved together.

    Returns:
        `out`.

    Raises:
        UserError: the file cannot be written, or the store is not to be trusted.
    """
    table, tags, rejections = store.manifest, _tags_of(store.manifest), read_rejected(store.path / "rejected.csv")
    music, by_hours = _music(table, tags)
    sets, alike = selection(store.path / "decontamination.json")
    sections = [
        Section("At a glance", [Numbers(_headline(store)), *rejected_in_short(rejections)]),
        Section("Licences", _licences(table)),
        Section("What kind of music", music),
        Section("Splits", _splits(table)),
        Section("Segments", _segments(table)),
        Section("Captions", _captions(table)),
        Section("Rejected", [*rejected(rejections), *alike]),
        Section("Evaluation sets kept out", sets),
        Section("Examples", _examples(store, _chosen(table, tags, by_hours), out)),
        Section("How it was made", _config(store)),
    ]
    lead = "A store is a corpus made ready for training and evaluation. This page tells what this one holds."
    return write_page(out, plain(f"The store {store.path.resolve().name}"), sections, lead)


def _headline(store: Store) -> dict[str, str]:
    table = store.manifest
    size = sum(entry["bytes"] for entry in store.info["files"].values()) + _size_of(store.path / "audio")
    return {
        "music": _time(pc.sum(table["duration"]).as_py() or 0.0),
        "segments": f"{len(store):,}",
        "works": f"{_distinct(table, ('track',), ('title', 'author', 'source_url')):,}",
        "artists": f"{_distinct(table, ('artist',), ('author',)):,}",
        "on disk": _bytes(size),
    }


def _distinct(table: pa.Table, *choices: tuple[str, ...]) -> int:
    """Different values of the first of some groups of columns that says anything; rows that say nothing left out."""
    for columns in choices:
        if set(columns) <= set(table.column_names):
            known = table.select(columns).group_by(list(columns)).aggregate([])
            count = sum(any(values) for values in zip(*(known[name].to_pylist() for name in columns), strict=True))
            if count:
                return count
    return 0


def _licences(table: pa.Table) -> list[Block]:
    found = table.group_by("licence").aggregate([("duration", "sum"), ("id", "count"), ("licence_url", "max")])
    bars = []
    for row in sorted(found.to_pylist(), key=lambda row: -row["duration_sum"]):
        seconds, remark = row["duration_sum"], f"{_tier(row['licence'] or '')}; {many(row['id_count'], 'segment')}"
        bars.append(Bar(row["licence"] or "none stated", seconds, _time(seconds), row["licence_url_max"] or "", remark))
    told = "; ".join(f"{policy}: {what}" for policy, what in POLICIES.items())
    note = f"Each with the narrowest policy that lets it in ({told}). ATTRIBUTION.csv names every work."
    return [Heading("Hours by licence", note), Bars(bars)]


def _tier(licence: str) -> str:
    try:
        return f"policy {tier(licence)}"
    except UserError:
        return "no policy lets it in"


class _Tags(NamedTuple):
    """The tags of all segments, one after the other: the row of each one's segment, and the tag."""

    rows: pa.ChunkedArray
    names: pa.ChunkedArray


def _tags_of(table: pa.Table) -> _Tags:
    lists = table["tags"]
    return _Tags(pc.list_parent_indices(lists), pc.list_flatten(lists))


def _music(table: pa.Table, tags: _Tags) -> tuple[list[Block], list[str]]:
    """Bars of the categories of tags, genre first; and the tags of the first category, those of most hours first.

    Where no tag has a category, a segment's first one is taken for its genre.
    """
    by_category: dict[str, dict[str, float]] = {}
    tag_of: dict[tuple[str, str], str] = {}
    for tag, seconds in _seconds_of(tags.names, table["duration"].take(tags.rows)).items():
        category, mark, name = tag.partition("---")
        category, name = (CATEGORIES.get(category, category), name) if mark else ("tag", tag)
        amounts = by_category.setdefault(category, {})
        amounts[name] = amounts.get(name, 0.0) + seconds
        tag_of[category, name] = tag
    if not by_category:
        return [Text("No segment has a tag.")], []
    if list(by_category) == ["tag"]:
        firsts = table.filter(pc.greater(pc.list_value_length(table["tags"]), 0))
        by_category["first tag"] = _seconds_of(pc.list_element(firsts["tags"], 0), firsts["duration"])
    order = sorted(by_category, key=lambda category: (category not in ("genre", "first tag"), category))
    charts = [_chart(category, _most_first(by_category[category])) for category in order[:_CATEGORIES]]
    note = Text("A segment with several tags counts for each of them.")
    return [note, Row(charts)], [tag_of.get((order[0], name), name) for name in _most_first(by_category[order[0]])]


def _most_first(seconds: dict[str, float]) -> dict[str, float]:
    """By amount, then by name."""
    return dict(sorted(seconds.items(), key=lambda item: (-item[1], item[0])))


def _seconds_of(names: pa.ChunkedArray, seconds: pa.ChunkedArray) -> dict[str, float]:
    """The seconds of each name."""
    found = pa.table({"name": names, "seconds": seconds}).drop_null().group_by("name").aggregate([("seconds", "sum")])
    return dict(zip(found["name"].to_pylist(), found["seconds_sum"].to_pylist(), strict=True))


def _chart(category: str, seconds: dict[str, float]) -> Block:
    bars = [Bar(name, amount, _time(amount)) for name, amount in islice(seconds.items(), _SHOWN)]
    rest = [Text(f"and {len(seconds) - _SHOWN:,} more")] if len(seconds) > _SHOWN else []
    return Stack([Heading(f"Hours by {category}"), Bars(bars), *rest])


def _splits(table: pa.Table) -> list[Block]:
    found = table.select(["split", "duration"]).group_by("split").aggregate([("duration", "sum"), ("split", "count")])
    sums = {row["split"]: (row["duration_sum"], row["split_count"]) for row in found.to_pylist()}
    bars = []
    for split in SPLITS:
        seconds, count = sums.get(split, (0.0, 0))
        bars.append(Bar(split, seconds, _time(seconds), remark=many(count, "segment")))
    note = "Train is learned from, valid is watched while learning, test is for the figures that are reported."
    return [Heading("Hours by split", note), Bars(bars)]


def _segments(table: pa.Table) -> list[Block]:
    heading = Heading("Lengths", "How many segments there are of each length.")
    blocks: list[Block] = [Stack([heading, _histogram(table["duration"].drop_null().to_numpy(), "seconds")])]
    loudness = table["loudness"].drop_null().to_numpy() if "loudness" in table.column_names else np.empty(0)
    loudness = loudness[np.isfinite(loudness)]
    if len(loudness):
        heading = Heading("Loudness", "How many segments are how loud (ITU-R BS.1770).")
        blocks.append(Stack([heading, _histogram(loudness, "LUFS")]))
    return [Row(blocks)]


def _captions(table: pa.Table) -> list[Block]:
    texts = pc.list_flatten(table["captions"]).drop_null()
    if len(texts) == 0:
        return [Text("No segment has a caption.")]
    without = pc.equal(pc.list_value_length(table["captions"]).fill_null(0), 0)
    words = pc.add(pc.count_substring(texts, " "), 1).to_numpy()
    facts = {
        "captions": f"{len(texts):,}",
        "different ones": f"{pc.count_distinct(texts).as_py():,}",
        "a segment": f"{len(texts) / len(table):.2g}",
        "segments without any": f"{pc.sum(without).as_py():,}",
        "median of words": f"{np.median(words):.0f}",
    }
    heading = Heading("Lengths", "How many captions there are of each length.")
    return [Facts(facts), heading, _histogram(words, "words", whole=True)]


def _histogram(values: np.ndarray, unit: str, whole: bool = False) -> Block:
    """Between round numbers; the outermost 0.05 % at either end are put to those before them."""
    low, high = (float(edge) for edge in np.quantile(values, (0.0005, 0.9995)))
    if low == high:
        return Text(f"All of them: {low:g} {unit}.")
    edges = ticks(low, high, about=24)
    if whole and edges[1] - edges[0] < 1:
        edges = [float(edge) for edge in range(int(low), int(high) + 2)]
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    return Histogram(edges, counts.tolist(), unit)


def _chosen(table: pa.Table, tags: _Tags, by_hours: Sequence[str]) -> list[int]:
    """Rows to listen to: one of each of the commonest tags, then some spread over the table; always the same ones."""
    rows: dict[int, None] = {}
    for tag in by_hours[:_EXAMPLES]:
        of_it = tags.rows.filter(pc.equal(tags.names, tag))
        rows[of_it[int(hashlib.sha256(tag.encode()).hexdigest(), 16) % len(of_it)].as_py()] = None
    for place in range(_EXAMPLES):
        if len(rows) < min(_EXAMPLES, len(table)):
            rows[(2 * place + 1) * len(table) // (2 * _EXAMPLES)] = None
    has_audio = table["audio"]
    return [row for row in rows if has_audio[row].as_py()]


def _examples(store: Store, rows: Sequence[int], out: Path) -> list[Block]:
    if not rows:
        return [Text("This store keeps no audio.")]
    columns = [name for name in store.manifest.column_names if name not in ("truth", "content_hash")]
    chosen = store.manifest.select(columns).take(pa.array(rows)).to_pylist()
    return [Row([_clip(row, _beside(store.audio_path(index), out)) for index, row in zip(rows, chosen, strict=True)])]


def _clip(row: dict[str, Any], path: str) -> Clip:
    facts = {
        "by": row["author"] or "unknown",
        "licence": row["licence"],
        "split": row["split"],
        "length": f"{row['duration']:.1f} s",
        "tags": ", ".join(tag.partition("---")[2] or tag for tag in (row["tags"] or [])[:8]),
        "id": row["id"],
    }
    loudness = row.get("loudness")
    if loudness is not None:
        facts["loudness"] = f"{loudness:.1f} LUFS"
    told = {name: short(value) for name, value in facts.items() if value}
    captions = [short(caption) for caption in (row["captions"] or [])[:3]]
    return Clip(path, short(row["title"] or row["id"], 80), captions, told, row["source_url"] or "")


def _beside(file: Path, out: Path) -> str:
    """A file's path as seen from the page."""
    return Path(os.path.relpath(file.resolve(), out.resolve().parent)).as_posix()


def _config(store: Store) -> list[Block]:
    info = store.info
    codec, text = info["codec"], info["text"]
    facts = {
        "audio": f"{info['sample_rate']:,} Hz" if info.get("sample_rate") else "none",
        "codec": f"{codec['name']} ({codec['fingerprint']})" if codec else "none",
        "text encoder": f"{text['name']} ({text['fingerprint']})" if text else "none",
        "config": info.get("config_hash", "unknown"),
        "store": store.fingerprint,
    }
    settings = json.dumps(info.get("config"), indent=2)
    return [Facts({name: short(value) for name, value in facts.items()}),
            Folded("All settings", [Text(settings, code=True)])]  # fmt: skip


def _size_of(folder: Path) -> int:
    """Bytes of the files of a folder."""
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        return sum(_size_of(Path(entry)) if entry.is_dir() else entry.stat().st_size for entry in entries)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def _bytes(size: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.0f} kB"
