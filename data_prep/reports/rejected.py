"""What a store's report tells about tracks that are not in it: rejections, evaluation sets and near-duplicates."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.track import KINDS
from ssmttm.errors import UserError
from ssmttm.reports.charts import Bar

_EXAMPLES = 3  # of each kind
_SEARCHED = 1000  # rejections of a kind that are searched for them
_LISTED = 5  # tracks of an evaluation set, near-duplicate pairs


class Rejections(NamedTuple):
    """The rows of rejected.csv, counted.

    Attributes:
        counts: by stage and kind.
        examples: some rows [kind, item, reason] of each kind, with different reasons.
    """

    counts: Counter[tuple[str, str]]
    examples: list[tuple[str, str, str]]

    @property
    def by_kind(self) -> Counter[str]:
        """How many items of each kind."""
        kinds: Counter[str] = Counter()
        for (_, kind), count in self.counts.items():
            kinds[kind] += count
        return kinds

    def bars(self) -> list[Bar]:
        """A bar for each kind, the most frequent first."""
        bars = []
        for kind, count in sorted(self.by_kind.items(), key=lambda item: (-item[1], item[0])):
            stages = ", ".join(f"{stage} {n:,}" for (stage, other), n in sorted(self.counts.items()) if other == kind)
            bars.append(Bar(kind, count, f"{count:,}", remark=f"{KINDS.get(kind, 'unknown kind')} (stage: {stages})"))
        return bars


def read_rejected(file: Path) -> Rejections | None:
    """Read rejected.csv; None if there is no such file.

    Raises:
        UserError: the file is damaged or has other columns.
    """
    if not file.is_file():
        return None
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[str, list[tuple[str, str, str]]] = {}
    shapes: set[tuple[str, str]] = set()
    try:
        with open(file, encoding="utf-8", errors="replace", newline="") as lines:
            table = csv.reader(lines)
            if next(table, []) != ["item", "stage", "kind", "reason"]:
                raise UserError(f"{file} is not a table of rejections: prepare the store again")
            for item, stage, kind, reason in table:
                counts[stage, kind] += 1
                found = examples.setdefault(kind, [])
                shape = (kind, re.sub(r"\d+", "0", reason)[:40])  # reasons that differ in numbers only are one
                if len(found) < _EXAMPLES and counts[stage, kind] <= _SEARCHED and shape not in shapes:
                    shapes.add(shape)
                    found.append((kind, item, reason))
    except (csv.Error, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): prepare the store again") from error
    order = sorted(examples, key=lambda kind: (-sum(n for (_, k), n in counts.items() if k == kind), kind))
    return Rejections(counts, [example for kind in order for example in examples[kind]])


def read_decontamination(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read decontamination.json.

    Returns:
        The evaluation sets, each with name, counts and rows [item, reason] of left-out items; and the near-duplicates
        that were kept, as their number `pairs` and the `closest` rows [track, track, agreement].

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        return [], {"pairs": 0, "closest": []}
    try:
        found = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        sets = [_evaluation_set(entry) for entry in found.get("evaluation", [])]
        suspected = found.get("suspected_duplicates") or {"pairs": 0, "closest": []}
        closest = [[*pair["tracks"], pair["agreement"]] for pair in suspected["closest"][:_LISTED]]
        return sets, {"pairs": f"{suspected['pairs']:,}" if suspected["pairs"] else "", "closest": closest}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): prepare the store again") from error


def _evaluation_set(entry: dict[str, Any]) -> dict[str, Any]:
    audio = entry["fingerprinted"]
    counts = {"known works": entry["works"], "artists": entry["artists"], "recordings with audio": audio}
    return {
        "name": entry["name"],
        "n_left_out": len(entry["left_out"]),
        "counts": {name: f"{count:,}" for name, count in counts.items()},
        "left_out": list(entry["left_out"].items())[:_LISTED],
    }
