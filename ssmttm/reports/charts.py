"""More blocks of `page`: large numbers, bars, histograms, clips that lie beside the page.

Text may be anybody's: it is escaped, stands apart from the direction of what surrounds it, and links lead to http only.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from ssmttm.reports.html import Block
from ssmttm.reports.spectrogram import ticks

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Numbers:
    """The few figures to see first, large, under their names."""

    numbers: Mapping[str, str]

    def html(self) -> str:
        """As HTML."""
        cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in self.numbers.items())
        return f'<dl class="numbers">{"".join(cells)}</dl>'


@dataclass(frozen=True)
class Bar:
    """One line of `Bars`: how long, what to write for it, where its label leads, and a remark beneath."""

    label: str
    size: float
    value: str
    link: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Bars:
    """Amounts side by side; the longest bar fills the width."""

    bars: Sequence[Bar]

    def html(self) -> str:
        """As a list."""
        longest = max((bar.size for bar in self.bars), default=0.0) or 1.0
        lines = []
        for bar in self.bars:
            part = f'<i style="width:{100 * bar.size / longest:.1f}%"></i>' if bar.size else ""
            track = f'<span class="track">{part}</span>'
            value = f'<span class="value">{escape(bar.value)}</span>'
            remark = f"<small>{anybodys(bar.remark)}</small>" if bar.remark else ""
            lines.append(f"<li><span>{linked(bar.label, bar.link)}</span>{track}{value}{remark}</li>")
        return f'<ul class="bars">{"".join(lines)}</ul>'


@dataclass(frozen=True)
class Histogram:
    """How many of something lie between neighbouring edges: n counts, n >= 1, and n + 1 edges."""

    edges: Sequence[float]
    counts: Sequence[int]
    label: str

    def html(self) -> str:
        """As an inline SVG of 640 x 230."""
        left, right, top, bottom = 8.0, 632.0, 30.0, 160.0
        low, span = self.edges[0], (self.edges[-1] - self.edges[0]) or 1.0
        most = max(self.counts) or 1

        def across(edge: float) -> float:
            return left + (edge - low) / span * (right - left)

        parts = [f'<path class="grid" d="M{left} {bottom}H{right}"/>']
        for first, end, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            height = count / most * (bottom - top)
            place = f'x="{across(first) + 1:.1f}" y="{bottom - height:.1f}" height="{height:.1f}"'
            width = max(across(end) - across(first) - 2, 1)
            parts.append(f'<rect {place} width="{width:.1f}"><title>{first:g} to {end:g}: {count:,}</title></rect>')
        highest = list(self.counts).index(max(self.counts))
        middle = (across(self.edges[highest]) + across(self.edges[highest + 1])) / 2
        anchor = "start" if middle < 80 else "end" if middle > 560 else "middle"
        parts.append(f'<text x="{middle:.1f}" y="{top - 6}" text-anchor="{anchor}">{max(self.counts):,}</text>')
        for edge in ticks(low, low + span):
            if low - 1e-9 <= edge <= low + span + 1e-9:
                anchor = "start" if across(edge) < 30 else "end" if across(edge) > 610 else "middle"
                parts.append(f'<text x="{across(edge):.1f}" y="{bottom + 26}" text-anchor="{anchor}">{edge:g}</text>')
        parts.append(f'<text x="320" y="220" text-anchor="middle">{escape(self.label)}</text>')
        size = 'class="histogram" viewBox="0 0 640 230"'
        return f'<svg {size} role="img" aria-label="{escape(self.label)}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Clip:
    """An audio file beside the page: a title, what is said of it, and `facts` beneath the player.

    Attributes:
        path: relative to the page, with `/`.
        title: with `link`, it leads there.
        words: paragraphs.
    """

    path: str
    title: str
    words: Sequence[str]
    facts: Mapping[str, str]
    link: str = ""

    def html(self) -> str:
        """As HTML."""
        words = "".join(f"<p>{anybodys(text)}</p>" for text in self.words)
        facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{anybodys(v)}</dd></div>" for k, v in self.facts.items())
        label = escape(plain(self.title))
        source = f'aria-label="{label}" src="{escape(quote(self.path))}"'
        return (
            f'<figure class="clip"><figcaption>{linked(self.title, self.link)}</figcaption>'
            f'<audio controls preload="none" {source}></audio>{words}<dl>{facts}</dl></figure>'
        )


@dataclass(frozen=True)
class Heading:
    """A heading within a section, and a remark under it."""

    title: str
    remark: str = ""

    def html(self) -> str:
        """As HTML."""
        remark = f'<p class="note">{escape(self.remark)}</p>' if self.remark else ""
        return f"<h3>{anybodys(self.title)}</h3>{remark}"


@dataclass(frozen=True)
class Stack:
    """Blocks one under the other in one cell of a row."""

    blocks: Sequence[Block]

    def html(self) -> str:
        """As HTML."""
        return f"<div>{''.join(block.html() for block in self.blocks)}</div>"


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown when their summary is clicked."""

    summary: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """As HTML."""
        inside = "".join(block.html() for block in self.blocks)
        return f"<details><summary>{escape(self.summary)}</summary>{inside}</details>"


def anybodys(text: str) -> str:
    """Text of whatever script as HTML that cannot turn what stands around it."""
    return f"<bdi>{escape(plain(text))}</bdi>"


def plain(text: str) -> str:
    """Text on one line, its control characters and those that reverse what follows shown as a replacement mark."""
    return _CONTROLS.sub("\ufffd", " ".join(text.split()))


def linked(text: str, link: str) -> str:
    """Text as HTML, with a link if that leads to http or https."""
    if not link.lower().startswith(("https://", "http://")):
        return anybodys(text)
    return f'<a href="{escape(link)}" rel="noopener noreferrer">{anybodys(text)}</a>'
