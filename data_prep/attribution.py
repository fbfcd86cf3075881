"""ATTRIBUTION.csv: title, author, source, licence and modifications of every work in a store."""

import csv
import io
from pathlib import Path

from ssmttm.data.store import Store
from ssmttm.files import write_text

COLUMNS = ("title", "author", "source_url", "licence", "licence_url", "modifications", "segments")


def write_attribution(store: Store) -> Path:
    """Write one line a work (segments that share all columns are one), in the manifest's order; returns the file."""
    works: dict[tuple[str, ...], int] = {}
    for batch in store.manifest.select(COLUMNS[:-1]).to_batches():
        for row in batch.to_pylist():
            work = tuple(row[column] or "" for column in COLUMNS[:-1])
            works[work] = works.get(work, 0) + 1
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows((*work, count) for work, count in works.items())
    path = store.path / "ATTRIBUTION.csv"
    write_text(path, text.getvalue())
    return path
