"""captions.csv: what is known of the audio files of a folder. Columns path (needed), caption, licence, title, author,
source_url; several lines of one path are several captions of it."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from ssmttm.errors import UserError

COLUMNS = ("path", "caption", "licence", "title", "author", "source_url")


@dataclass
class Notes:
    """What captions.csv says of one file; empty strings where it says nothing."""

    captions: list[str] = field(default_factory=list)
    licence: str = ""
    title: str = ""
    author: str = ""
    source_url: str = ""


def read_captions(file: Path) -> dict[str, Notes]:
    """Notes by path as written in the file; none if there is no such file.

    Raises:
        UserError: it is not UTF-8 or not CSV, or has no column `path`.
    """
    if not file.is_file():
        return {}
    notes: dict[str, Notes] = {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines)
            first = table.fieldnames or []
            names = {name.strip().lower().replace("license", "licence"): name for name in first}
            if "path" not in names:
                raise UserError(f"{file} has no column 'path' in its first line: the columns are {', '.join(COLUMNS)}")
            for line in table:
                values = {name: (line.get(names.get(name, "")) or "").strip() for name in COLUMNS}
                if values["path"]:
                    _note(notes.setdefault(values["path"], Notes()), values)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{file} is no CSV that can be read ({error}): save it as comma-separated UTF-8") from error
    return notes


def _note(notes: Notes, values: dict[str, str]) -> None:
    if values["caption"] and values["caption"] not in notes.captions:
        notes.captions.append(values["caption"])
    for name in ("licence", "title", "author", "source_url"):
        if values[name]:
            setattr(notes, name, values[name])
