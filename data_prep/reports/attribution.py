"""ATTRIBUTION.csv: title, author, source, licence, modifications and evidence of every work in a store.

The texts stand as their authors wrote them. A title may begin with a sign that a spreadsheet takes for a formula:
import all columns as text there.
"""

import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from ssmttm.data.store import Store
from ssmttm.files import atomic_write

FILE = "ATTRIBUTION.csv"
COLUMNS = ("title", "author", "source_url", "licence", "licence_url", "modifications", "evidence", "segments")
_BATCH = 8192


def write_attribution(store: Store) -> Path:
    """Write one line per work, in the manifest's order, with the number of its segments; returns the file.

    Consecutive rows that share all columns are one work, so memory does not grow with the store.
    """
    path = store.path / FILE
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)  # ends lines with CRLF: a carriage return in a title is then quoted
        table.writerow(COLUMNS)
        for work, segments in groupby(_works(store)):
            table.writerow((*work, sum(1 for _ in segments)))
    return path


def _works(store: Store) -> Iterator[tuple[str, ...]]:
    """The work of each segment: all columns but the last."""
    present = [name for name in COLUMNS if name in store.manifest.column_names]
    for batch in store.manifest.select(present).to_batches(_BATCH):
        empty = [""] * batch.num_rows
        columns = (batch[name].to_pylist() if name in present else empty for name in COLUMNS[:-1])
        yield from zip(*([cell or "" for cell in column] for column in columns), strict=True)
