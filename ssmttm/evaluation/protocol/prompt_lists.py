"""Prompts of a benchmark and their reference audio, from the tables that its authors publish.

Formats: CSV, TSV, JSON (a list, or one object a line), Parquet, or .txt with one prompt a line.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmttm.audio import WRITERS
from ssmttm.errors import UserError, first_line
from ssmttm.generation.output import slug


@dataclass(frozen=True)
class ListedPrompt:
    """A caption with a unique file name (without extension) and, if available, its reference audio and concepts."""

    name: str
    caption: str
    reference: Path | None = None
    concepts: tuple[str, ...] = ()


def read_prompt_list(
    table: str | Path,
    name: str,
    caption: str,
    keep: Mapping[str, Any] | None = None,
    references: str | Path | None = None,
    audio: Sequence[str] = ("{name}",),
    concepts: str | None = None,
) -> list[ListedPrompt]:
    """Read a benchmark's table.

    Args:
        name: template of the prompt's name, from the columns, such as "{ytid}".
        caption: the caption's column.
        keep: keep only rows with these values (compared as lower-case text).
        references: folder of the reference audio.
        audio: templates of a reference's path in that folder without extension, from the columns, {name}, and
            {COLUMN_stem}, a column's value without extension.
        concepts: the column of the concepts that a caption asks for: a list, or text with commas between them.
    """
    path = Path(table)
    rows = _rows(path)
    if path.suffix == ".txt":
        return [ListedPrompt(f"{i:04d}-{slug(row['caption'])}", row["caption"]) for i, row in enumerate(rows)]
    try:
        kept = [row for row in rows if all(_equal(row[column], value) for column, value in (keep or {}).items())]
        prompts: dict[str, ListedPrompt] = {}
        for row in kept:
            text, stem = str(row[caption] or "").strip(), slug(name.format(**row), longest=120)
            if text:
                asked = () if concepts is None else _concepts(row[concepts])
                prompts.setdefault(stem, ListedPrompt(stem, text, _reference(references, audio, row, stem), asked))
    except KeyError as error:
        raise UserError(f"{path} has no column {error}; its columns: {', '.join(rows[0])}") from error
    if not prompts:
        raise UserError(f"{path} has no prompts in {len(rows)} rows (keep: {dict(keep or {})}): check the file")
    return list(prompts.values())


def find_audio(folder: Path, stem: str) -> Path | None:
    """The audio file with this stem, in any supported format."""
    for suffix in WRITERS:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    return None


def _reference(folder: str | Path | None, templates: Sequence[str], row: Mapping[str, Any], name: str) -> Path | None:
    if folder is None:
        return None
    bare = {f"{column}_stem": str(Path(str(value)).with_suffix("")) for column, value in row.items() if value}
    stems = [template.format(**{**row, **bare, "name": name}) for template in templates]
    paths = [find_audio(Path(folder), stem) for stem in stems]
    return next((path for path in paths if path), None)


def _concepts(value: Any) -> tuple[str, ...]:
    """The concepts of a cell, each once."""
    words = value if isinstance(value, list) else str(value or "").split(",")
    return tuple(dict.fromkeys(stripped for word in words if (stripped := str(word).strip())))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: set prompts=FILE, the benchmark's table of captions")
    try:
        if path.suffix == ".txt":
            rows = [{"caption": line.strip()} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif path.suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
                rows = []
                for row in reader:
                    if None in row:  # csv collects surplus fields under None
                        raise UserError(f"{path}, line {reader.line_num}, has more fields than columns: quote the text")
                    rows.append(row)
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8").strip()
            rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    except (ValueError, csv.Error, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{path} cannot be read ({reason}): use CSV, TSV, JSON or Parquet") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has no rows with named columns: use the benchmark's table")
    return rows


def _equal(value: Any, wanted: Any) -> bool:
    return str(value).strip().lower() == str(wanted).strip().lower()
