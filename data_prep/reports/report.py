"""The HTML report of a store: hours by licence, tag and split, lengths, rejections and examples with audio.

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

from data_prep.reports.rejected import read_decontamination, read_rejected
from data_prep.stages.captions.tag_words import CATEGORIES
from ssmttm.audio.stereo import CANCEL, MAX_BALANCE, STEREO, is_dual_mono
from ssmttm.data.store import SPLITS, STEREO_COLUMNS, Store
from ssmttm.errors import UserError
from ssmttm.licences import POLICIES, tier
from ssmttm.reports import charts
from ssmttm.reports.charts import Bar, Chart
from ssmttm.reports.page import write_page

_SHOWN_TAGS = 15  # of a category
_SHOWN_CATEGORIES = 4
_EXAMPLES = 12


def write_report(store: Store, out: Path) -> Path:
    """Write the page; it names the store's audio by relative paths, so that both can be moved together.

    Returns:
        `out`.

    Raises:
        UserError: the file cannot be written, or the store is damaged.
    """
    table, tags = store.manifest, _flatten_tags(store.manifest)
    tag_charts, genre_tags = _tag_charts(table, tags)
    evaluation_sets, near_duplicates = read_decontamination(store.path / "decontamination.json")
    return write_page(
        out,
        "store.html",
        title=f"The store {store.path.resolve().name}",
        headline=_headline(store),
        policies="; ".join(f"{policy}: {meaning}" for policy, meaning in POLICIES.items()),
        licences=_licence_bars(table),
        tag_charts=tag_charts,
        shown_tags=_SHOWN_TAGS,
        splits=_split_bars(table),
        durations=_histogram(table["duration"], "seconds"),
        loudness=_histogram(table["loudness"], "LUFS") if "loudness" in table.column_names else None,
        stereo=_stereo(table) if store.channels == STEREO else None,
        captions=_captions(table),
        rejections=read_rejected(store.path / "rejected.csv"),
        evaluation_sets=evaluation_sets,
        near_duplicates=near_duplicates,
        examples=_examples(store, _choose_examples(table, tags, genre_tags), out),
        settings=_settings(store),
        config=json.dumps(store.info.get("config"), indent=2),
    )


def _headline(store: Store) -> dict[str, str]:
    table = store.manifest
    size = sum(entry["bytes"] for entry in store.info["files"].values())
    size += sum(path.stat().st_size for path in (store.path / "audio").rglob("*") if path.is_file())
    return {
        "music": _format_time(pc.sum(table["duration"]).as_py() or 0.0),
        "segments": f"{len(store):,}",
        "works": f"{_count_distinct(table, ('track',), ('title', 'author', 'source_url')):,}",
        "artists": f"{_count_distinct(table, ('artist',), ('author',)):,}",
        "on disk": _format_bytes(size),
    }


def _count_distinct(table: pa.Table, *choices: tuple[str, ...]) -> int:
    """Distinct values of the first group of columns that has any; empty rows do not count."""
    for columns in choices:
        if set(columns) <= set(table.column_names):
            known = table.select(columns).group_by(list(columns)).aggregate([])
            count = sum(any(values) for values in zip(*(known[name].to_pylist() for name in columns), strict=True))
            if count:
                return count
    return 0


def _licence_bars(table: pa.Table) -> list[Bar]:
    found = table.group_by("licence").aggregate([("duration", "sum"), ("id", "count"), ("licence_url", "max")])
    bars = []
    for row in sorted(found.to_pylist(), key=lambda row: -row["duration_sum"]):
        seconds, remark = row["duration_sum"], f"{_policy(row['licence'] or '')}; {_segments(row['id_count'])}"
        url = row["licence_url_max"] or ""
        bars.append(Bar(row["licence"] or "none stated", seconds, _format_time(seconds), url, remark))
    return bars


def _policy(licence: str) -> str:
    try:
        return f"policy {tier(licence)}"
    except UserError:
        return "no policy allows it"


class _Tags(NamedTuple):
    """The tags of all segments: the row of each tag's segment, and the tag."""

    rows: pa.ChunkedArray
    names: pa.ChunkedArray


def _flatten_tags(table: pa.Table) -> _Tags:
    return _Tags(pc.list_parent_indices(table["tags"]), pc.list_flatten(table["tags"]))


def _tag_charts(table: pa.Table, tags: _Tags) -> tuple[dict[str, list[Bar]], list[str]]:
    """Bars by category of tags, genre first; and the tags of the first category, most hours first.

    Where no tag has a category, the first tag of a segment counts as its genre.
    """
    by_category: dict[str, dict[str, float]] = {}
    tag_of: dict[tuple[str, str], str] = {}
    for tag, seconds in _seconds_by_name(tags.names, table["duration"].take(tags.rows)).items():
        category, separator, name = tag.partition("---")
        category, name = (CATEGORIES.get(category, category), name) if separator else ("tag", tag)
        amounts = by_category.setdefault(category, {})
        amounts[name] = amounts.get(name, 0.0) + seconds
        tag_of[category, name] = tag
    if not by_category:
        return {}, []
    if list(by_category) == ["tag"]:
        tagged = table.filter(pc.greater(pc.list_value_length(table["tags"]), 0))
        by_category["first tag"] = _seconds_by_name(pc.list_element(tagged["tags"], 0), tagged["duration"])
    order = sorted(by_category, key=lambda category: (category not in ("genre", "first tag"), category))
    bars = {}
    for category in order[:_SHOWN_CATEGORIES]:
        amounts = _most_first(by_category[category])
        bars[category] = [Bar(name, seconds, _format_time(seconds)) for name, seconds in amounts.items()]
    return bars, [tag_of.get((order[0], name), name) for name in _most_first(by_category[order[0]])]


def _most_first(seconds: dict[str, float]) -> dict[str, float]:
    """By amount, then by name."""
    return dict(sorted(seconds.items(), key=lambda item: (-item[1], item[0])))


def _seconds_by_name(names: pa.ChunkedArray, seconds: pa.ChunkedArray) -> dict[str, float]:
    found = pa.table({"name": names, "seconds": seconds}).drop_null().group_by("name").aggregate([("seconds", "sum")])
    return dict(zip(found["name"].to_pylist(), found["seconds_sum"].to_pylist(), strict=True))


def _split_bars(table: pa.Table) -> list[Bar]:
    found = table.select(["split", "duration"]).group_by("split").aggregate([("duration", "sum"), ("split", "count")])
    sums = {row["split"]: (row["duration_sum"], row["split_count"]) for row in found.to_pylist()}
    bars = []
    for split in SPLITS:
        seconds, count = sums.get(split, (0.0, 0))
        bars.append(Bar(split, seconds, _format_time(seconds), remark=_segments(count)))
    return bars


def _captions(table: pa.Table) -> dict[str, Any] | None:
    texts = pc.list_flatten(table["captions"]).drop_null()
    if len(texts) == 0:
        return None
    without = pc.equal(pc.list_value_length(table["captions"]).fill_null(0), 0)
    words = pc.add(pc.count_substring(texts, " "), 1)
    counts = {
        "captions": f"{len(texts):,}",
        "distinct": f"{pc.count_distinct(texts).as_py():,}",
        "per segment": f"{len(texts) / len(table):.2g}",
        "segments without captions": f"{pc.sum(without).as_py():,}",
        "median number of words": f"{np.median(words.to_numpy()):.0f}",
    }
    return {"counts": counts, "lengths": _histogram(words, "words", integer=True)}


def _stereo(table: pa.Table) -> dict[str, Any]:
    """Counts and medians of mid and side over the segments of a stereo store, and histograms."""
    width, correlation, balance = (table[field.name].to_numpy() for field in STEREO_COLUMNS)  # [n] each
    energy_of_mid = 1 - width
    counts = {
        "two equal channels (mono)": f"{np.sum([is_dual_mono(value) for value in width]):,}",
        "channels that cancel in mono": f"{np.sum(energy_of_mid < CANCEL * width):,}",
        "one silent channel": f"{np.sum(np.abs(balance) >= MAX_BALANCE):,}",
        "median width": f"{np.median(width):.2g}",
        "median level of side over mid": _decibels(np.median(width)),
        "median correlation": f"{np.median(correlation):.2f}",
    }
    return {
        "counts": counts,
        "width": _histogram(table["width"], "side's fraction of the energy"),
        "balance": _histogram(table["balance"], "dB"),
    }


def _decibels(width: float) -> str:
    """The level of the side over the mid, at most 60 dB either way."""
    side, mid = max(width, 1e-6), max(1 - width, 1e-6)
    return f"{10 * np.log10(side / mid):.1f} dB"


def _histogram(column: pa.ChunkedArray, unit: str, integer: bool = False) -> Chart | str | None:
    """A histogram of the finite values, a sentence if all are equal, None if there are none."""
    values = column.drop_null().to_numpy()
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    if values.min() == values.max():
        return f"All: {values[0]:g} {unit}."
    return charts.histogram(values, unit, integer)


def _choose_examples(table: pa.Table, tags: _Tags, genre_tags: Sequence[str]) -> list[int]:
    """Rows with audio: one of each of the commonest tags, then some at even distances; always the same ones."""
    rows: dict[int, None] = {}
    for tag in genre_tags[:_EXAMPLES]:
        tagged = tags.rows.filter(pc.equal(tags.names, tag))
        rows[tagged[int(hashlib.sha256(tag.encode()).hexdigest(), 16) % len(tagged)].as_py()] = None
    for index in range(_EXAMPLES):
        if len(rows) < min(_EXAMPLES, len(table)):
            rows[(2 * index + 1) * len(table) // (2 * _EXAMPLES)] = None
    return [row for row in rows if table["audio"][row].as_py()]


def _examples(store: Store, rows: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """The chosen rows of the manifest, each with the `path` of its audio as seen from the page."""
    columns = [name for name in store.manifest.column_names if name not in ("truth", "content_hash")]
    clips = store.manifest.select(columns).take(pa.array(rows, pa.int64())).to_pylist()
    for row, clip in zip(rows, clips, strict=True):
        clip["path"] = Path(os.path.relpath(store.audio_path(row).resolve(), out.resolve().parent)).as_posix()
        clip["tags"] = ", ".join(tag.partition("---")[2] or tag for tag in islice(clip["tags"] or [], 8))
    return clips


def _settings(store: Store) -> dict[str, str]:
    info = store.info
    codec, text = info["codec"], info["text"]
    kind = "stereo" if store.channels == STEREO else "mono"
    return {
        "audio": f"{info['sample_rate']:,} Hz, {kind}" if info.get("sample_rate") else "none",
        "codec": f"{codec['name']} ({codec['fingerprint']})" if codec else "none",
        "text encoder": f"{text['name']} ({text['fingerprint']})" if text else "none",
        "config": info.get("config_hash", "unknown"),
        "store": store.fingerprint,
    }


def _segments(count: int) -> str:
    return f"{count:,} segment{'' if count == 1 else 's'}"


def _format_time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def _format_bytes(size: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.0f} kB"
