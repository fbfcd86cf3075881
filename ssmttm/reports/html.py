"""One self-contained HTML page: players, spectrograms, curves and tables, nothing fetched from anywhere.

write_page("demo.html", "What it sounds like", [
    Section("A slow waltz", [Player(wav, 24_000, "the fresh model"), Facts({"key": "D minor", "tempo": "82 bpm"})]),
    Section("Training", [Curve({"training loss": points}, "step", "loss")]),
])
"""

import base64
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ssmttm import audio
from ssmttm.files import write_text
from ssmttm.reports.spectrogram import spectrogram_png, ticks
from ssmttm.reports.style import STYLE


class Block(Protocol):
    """Something on a page."""

    def html(self) -> str:
        """As HTML."""


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` sets it as a command."""

    text: str
    code: bool = False

    def html(self) -> str:
        """As HTML."""
        return f"<pre>{escape(self.text)}</pre>" if self.code else f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Facts:
    """Names with short values; a value that is False is marked as bad, True as good."""

    facts: Mapping[str, str | float | bool]

    def html(self) -> str:
        """As HTML."""
        return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt>{_value(v)}</div>' for k, v in self.facts.items())}</dl>"


@dataclass(frozen=True)
class Table:
    """A table: a heading a column, then rows."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | float]]

    def html(self) -> str:
        """As HTML."""
        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.headings)
        body = "".join(f"<tr>{''.join(f'<td>{escape(_short(v))}</td>' for v in row)}</tr>" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class TrainedModule:
    """Audio [S] or [1, S] with its spectrogram; `format` is mp3 or flac. `facts` stand beneath."""

    wav: Tensor
    sample_rate: int
    caption: str
    facts: Mapping[str, str | float | bool] | None = None
    format: str = "mp3"

    def html(self) -> str:
        """As HTML."""
        with tempfile.TemporaryDirectory() as folder:
            sound = audio.write(Path(folder) / f"sound.{self.format}", self.wav, self.sample_rate).read_bytes()
        media = {"mp3": "audio/mpeg", "flac": "audio/flac"}[self.format]
        picture = _data_uri("image/png", spectrogram_png(self.wav, self.sample_rate))
        caption, facts = escape(self.caption), Facts(self.facts).html() if self.facts else ""
        return (
            f'<figure><figcaption>{caption}</figcaption><img alt="Spectrogram: {caption}" src="{picture}">'
            f'<audio controls preload="metadata" src="{_data_uri(media, sound)}"></audio>{facts}</figure>'
        )


@dataclass(frozen=True)
class Picture:
    """A picture as the bytes of a PNG."""

    png: bytes
    caption: str

    def html(self) -> str:
        """As HTML."""
        return f'<figure><img alt="{escape(self.caption)}" src="{_data_uri("image/png", self.png)}"></figure>'


@dataclass(frozen=True)
class Row:
    """Blocks side by side where there is room."""

    blocks: Sequence[Block]

    def html(self) -> str:
        """As HTML."""
        return f'<div class="row">{"".join(block.html() for block in self.blocks)}</div>'


@dataclass(frozen=True)
class Curve:
    """Lines over one axis: {name: [(x, y), ...]}; points that are not finite are left out."""

    lines: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str
    y_label: str

    def html(self) -> str:
        """As an inline SVG of 640 x 280."""
        lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in self.lines.items()}
        points = [point for line in lines.values() for point in line]
        if not points:
            return "<p>No points.</p>"
        left, right, top, bottom = 52.0, 628.0, 12.0, 240.0
        across, up = [x for x, _ in points], [y for _, y in points]
        xs, ys = ticks(min(across), max(across)), ticks(min(up), max(up))
        low_x, high_x = min(across), max(max(across), min(across) + 1e-9)

        def at(x: float, y: float) -> tuple[float, float]:
            share_x, share_y = (x - low_x) / (high_x - low_x), (y - ys[0]) / (ys[-1] - ys[0])
            return round(left + share_x * (right - left), 1), round(bottom - share_y * (bottom - top), 1)

        parts = []
        for y in ys:
            parts.append(f'<path class="grid" d="M{left} {at(low_x, y)[1]}H{right}"/>')
            parts.append(f'<text x="{left - 6}" y="{at(low_x, y)[1] + 4}" text-anchor="end">{_short(y)}</text>')
        for x in (x for x in xs if low_x <= x <= high_x):
            parts.append(f'<text x="{at(x, ys[0])[0]}" y="{bottom + 18}" text-anchor="middle">{_short(x)}</text>')
        for i, (name, line) in enumerate(lines.items()):
            path = " ".join(f"{x},{y}" for x, y in (at(*point) for point in line))
            parts.append(f'<polyline class="line{i % 4}" points="{path}"/>')
            place = f'x="{right}" y="{top + 14 + 17 * i}" text-anchor="end"'
            parts.append(f'<text class="name{i % 4}" {place}>{escape(name)}</text>')
        parts.append(f'<text x="{(left + right) / 2}" y="274" text-anchor="middle">{escape(self.x_label)}</text>')
        parts.append(
            f'<text x="12" y="{(top + bottom) / 2}" transform="rotate(-90 12 {(top + bottom) / 2})" '
            f'text-anchor="middle">{escape(self.y_label)}</text>'
        )
        label = escape(f"{self.y_label} over {self.x_label}")
        return f'<svg viewBox="0 0 640 280" role="img" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def write_page(path: str | Path, title: str, sections: Sequence[Section], lead: str = "") -> Path:
    """Write the page, whole or not at all; `lead` is a paragraph under the title.

    Raises:
        UserError: the file cannot be written, or a player's audio holds nothing, NaN or infinity.
    """
    body = "".join(
        f"<section><h2>{escape(section.title)}</h2>{''.join(block.html() for block in section.blocks)}</section>"
        for section in sections
    )
    opening = f"<h1>{escape(title)}</h1>" + (f'<p class="lead">{escape(lead)}</p>' if lead else "")
    write_text(Path(path), _PAGE.format(title=escape(title), style=STYLE, body=opening + body))
    return Path(path)


def _short(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _value(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return f'<dd class="{"good" if value else "bad"}">{"yes" if value else "no"}</dd>'
    return f"<dd>{escape(_short(value))}</dd>"


def _data_uri(media: str, data: bytes) -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>{body}</body>
</html>
"""
