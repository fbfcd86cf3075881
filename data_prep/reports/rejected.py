"""What the page about a store tells of what is not in it: refusals, evaluation sets, tracks that sound alike."""

import csv
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.track import KINDS
from ssmttm.errors import UserError
from ssmttm.reports.charts import Bar, Bars, Heading, plain
from ssmttm.reports.html import Block, Facts, Table, Text

_REASONS = 3  # examples of refusals, a kind
_SEARCHED = 1000  # refusals of a kind that are looked through for them
_LISTED = 5  # tracks of one evaluation set, pairs that are alike


class Rejections(NamedTuple):
    """What rejected.csv tells: how many of each stage and kind, and a few of each kind whose reasons differ."""

    counts: Counter[tuple[str, str]]
    examples: dict[str, dict[str, str]]  # kind -> reason -> item

    def of(self, kind: str) -> int:
        """How many there are of a kind."""
        return sum(count for (_, other), count in self.counts.items() if other == kind)


def read_rejected(file: Path) -> Rejections | None:
    """None if there is no such file. Raises UserError if it is no quarantine table."""
    if not file.is_file():
        return None
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[str, dict[str, str]] = {}
    shapes: set[tuple[str, str]] = set()
    try:
        with open(file, encoding="utf-8", errors="replace", newline="") as lines:
            table = csv.reader(lines)
            if next(table, []) != ["item", "stage", "kind", "reason"]:
                raise UserError(f"{file} is no quarantine table: prepare the store again")
            for item, stage, kind, reason in table:
                counts[stage, kind] += 1
                some = examples.setdefault(kind, {})
                if len(some) == _REASONS or counts[stage, kind] > _SEARCHED:
                    continue
                if (shape := (kind, re.sub(r"\d+", "0", reason)[:40])) not in shapes:
                    shapes.add(shape)
                    some[reason] = item
    except (csv.Error, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): prepare the store again") from error
    return Rejections(counts, examples)


def rejected_in_short(rejections: Rejections | None) -> list[Block]:
    """One sentence, if there is a record."""
    if rejections is None:
        return []
    copies, held_out, total = rejections.of("duplicate"), rejections.of("evaluation"), rejections.counts.total()
    return [Text(f"{many(total, 'item')} refused: {copies:,} as duplicates, {held_out:,} because an evaluation set "
                 f"holds them, {total - copies - held_out:,} for other reasons, which stand below.")]  # fmt: skip


def rejected(rejections: Rejections | None) -> list[Block]:
    """How many of each kind, and some of them with their reasons."""
    if rejections is None:
        return [Text("This store keeps no record of what was refused.")]
    if not rejections.counts:
        return [Text("Nothing was refused.")]
    bars, rows = [], []
    for kind in sorted(rejections.examples, key=lambda kind: (-rejections.of(kind), kind)):
        stages = ", ".join(f"{stage} {n:,}" for (stage, other), n in sorted(rejections.counts.items()) if other == kind)
        remark = f"{KINDS.get(kind, 'no known kind')} (stage: {stages})"
        bars.append(Bar(kind, rejections.of(kind), f"{rejections.of(kind):,}", remark=remark))
        rows += [(short(kind), short(item), short(reason)) for reason, item in rejections.examples[kind].items()]
    note = "A refused item never stops a run. rejected.csv holds all of them."
    some = Table(["kind", "item", "why"], rows)
    return [Heading("Refusals by kind", note), Bars(bars), Heading("Some of them"), some]


def selection(file: Path) -> tuple[list[Block], list[Block]]:
    """What decontamination.json tells: of evaluation sets, and of tracks that were kept though they sound alike.

    Raises:
        UserError: it is damaged.
    """
    told: dict[str, Any] = {}
    try:
        if file.is_file():
            told = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        sets = [block for one in told.get("evaluation", []) for block in _kept_out(one)]
        alike = _near_duplicates(told["suspected_duplicates"]) if told.get("suspected_duplicates") else []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): prepare the store again") from error
    none = "None were named: give them as --against when the store is prepared, before a score is reported."
    return sets or [Text(none)], alike


def _kept_out(one: dict[str, Any]) -> list[Block]:
    """Of one evaluation set how much is known of it, and what was left out for it."""
    left = {str(item): str(reason) for item, reason in one["left_out"].items()}
    facts = {"known works": one["works"], "artists": one["artists"], "recordings that could be heard": one["heard"]}
    blocks: list[Block] = [
        Heading(str(one["name"]), f"{many(len(left), 'item')} left out."),
        Facts({name: f"{count:,}" for name, count in facts.items()}),
    ]
    some = [(short(item), short(reason)) for item, reason in islice(left.items(), _LISTED)]
    return [*blocks, Table(["item", "why"], some)] if some else blocks


def _near_duplicates(suspected: dict[str, Any]) -> list[Block]:
    """Pairs of tracks for people to listen to."""
    if not suspected["pairs"]:
        return []
    note = f"Pairs of kept tracks that agree, but less than copies do: {suspected['pairs']:,}. The closest:"
    rows = [(*map(short, pair["tracks"]), short(pair["agreement"])) for pair in suspected["closest"][:_LISTED]]
    return [Heading("Kept, though alike", note), Table(["track", "and", "how far"], rows)]


def many(count: int, what: str) -> str:
    """So many of something, in English."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def short(text: str, most: int = 300) -> str:
    """Anybody's text on one line that is not too long."""
    return plain(text if len(text) <= most else f"{text[:most]} ...")
