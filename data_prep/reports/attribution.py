"""ATTRIBUTION.csv: title, author, source, licence, modifications and evidence of every work in a store.

The texts stand as their authors wrote them, so a title may begin with a sign that a spreadsheet takes for a formula:
import the file there with all columns as text.
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
    """Write one line a work, in the manifest's order, with the number of its segments; returns the file.

    Rows that follow each other and share all columns are one work, so the memory that this takes does not grow with the
    store.
    """
    path = store.path / FILE
    with atomic_write(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)  # with CRLF, or a carriage return in a title would end the line
        table.writerow(COLUMNS)
        for work, segments in groupby(_works(store)):
            table.writerow((*work, sum(1 for _ in segments)))
    return path


def _works(store: Store) -> Iterator[tuple[str, ...]]:
    """The work of each segment: all columns but the last."""
    present = [name for name in COLUMNS if name in store.manifest.column_names]
    for batch in store.manifest.select(present).to_batches(_BATCH):
        blank = [""] * batch.num_rows
        cells = (batch[name].to_pylist() if name in present else blank for name in COLUMNS[:-1])
        yield from zip(*([cell or "" for cell in column] for column in cells), strict=True)
