"""A benchmark's prompts, and the reference audio that belongs to them, from the tables that its authors publish.

Tables are read as they come: CSV, TSV, JSON (a list, or one object a line) or Parquet.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmttm.audio import WRITERS
from ssmttm.errors import UserError
from ssmttm.generation.output import slug


@dataclass(frozen=True)
class ListedPrompt:
    """One prompt.

    Attributes:
        name: a file name without extension, different for every prompt of a list.
        reference: the true audio of this prompt; None if there is none at hand.
    """

    name: str
    caption: str
    reference: Path | None = None


def read_prompt_list(
    table: str | Path,
    name: str,
    caption: str,
    keep: Mapping[str, Any] | None = None,
    references: str | Path | None = None,
    audio: Sequence[str] = ("{name}",),
) -> list[ListedPrompt]:
    """Read a benchmark's table.

    Args:
        table: the file; a .txt holds one prompt a line.
        name: template of a prompt's name over its row's columns, such as "{ytid}".
        caption: the caption's column.
        keep: only rows whose columns have these values (compared as lower-case text).
        references: folder of the true audio.
        audio: templates of a reference's path in that folder without extension, over the columns, {name}, and every
            column's value without its own extension as {COLUMN_stem}; any audio format will do.

    Raises:
        UserError: the table is missing, cannot be read, lacks a column, or keeps no row.
    """
    path = Path(table)
    rows = _rows(path)
    if path.suffix == ".txt":
        return [ListedPrompt(f"{i:04d}-{slug(row['caption'])}", row["caption"]) for i, row in enumerate(rows)]
    try:
        kept = [row for row in rows if all(_same(row[column], value) for column, value in (keep or {}).items())]
        prompts = {}
        for row in kept:
            words, stem = str(row[caption] or "").strip(), slug(name.format(**row), longest=120)
            if words:
                prompts.setdefault(stem, ListedPrompt(stem, words, _reference(references, audio, row, stem)))
    except KeyError as error:
        raise UserError(f"{path} has no column {error}: it has {', '.join(rows[0])}") from error
    if not prompts:
        raise UserError(f"{path} has no prompt left of {len(rows)} rows (keep: {dict(keep or {})}): check the file")
    return list(prompts.values())


def find_audio(folder: Path, stem: str) -> Path | None:
    """The audio file of that path without extension, in any format that is read here."""
    for suffix in WRITERS:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    return None


def _reference(
    folder: str | Path | None, templates: Sequence[str], row: Mapping[str, Any], name: str
) -> Path | None:
    if folder is None:
        return None
    bare = {f"{column}_stem": str(Path(str(value)).with_suffix("")) for column, value in row.items() if value}
    stems = [template.format(**{**row, **bare, "name": name}) for template in templates]
    return next((found for stem in stems if (found := find_audio(Path(folder), stem))), None)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no table {path}: give prompts=FILE, the benchmark's own table of captions")
    try:
        if path.suffix == ".txt":
            rows = [{"caption": line.strip()} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif path.suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
                rows = []
                for row in reader:
                    if None in row:  # where the fields go that no column is named for
                        raise UserError(f"{path}, line {reader.line_num}, has more fields than columns: quote its text")
                    rows.append(row)
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8").strip()
            rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    except (ValueError, csv.Error, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}): give CSV, TSV, JSON or Parquet") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no rows with named columns: give the benchmark's own table")
    return rows


def _same(found: Any, wanted: Any) -> bool:
    return str(found).strip().lower() == str(wanted).strip().lower()
