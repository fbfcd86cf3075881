"""Reports as sections of text and tables, and their Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One part of a report; `rows` is a table whose first row is the heading."""

    title: str = ""
    text: str = ""
    rows: Rows = ()


def markdown_table(rows: Rows) -> str:
    """Rows as a Markdown table; the first row is the heading."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_report(title: str, sections: Sequence[Section]) -> str:
    """A report as Markdown; the template report.html shows the same sections."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}" if section.title else "")
        parts.append(section.text)
        parts.append(markdown_table(section.rows) if section.rows else "")
    return "\n\n".join(part for part in parts if part) + "\n"
