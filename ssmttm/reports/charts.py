"""Charts by matplotlib as data URIs. matplotlib is imported when the first chart is drawn.

Colours suit a light and a dark page: the background is transparent, axes and labels are grey.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import signal
from torch import Tensor

from ssmttm.reports.page import data_uri

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.figure import Figure

_GREY = "#7d8590"
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.labelcolor": _GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": _GREY,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "ssmttm",  # equal charts give equal bytes
    "text.color": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}
_BLUE, _ORANGE, _GREEN, _VIOLET = "#3d7fb8", "#d2603f", "#4c9a51", "#9067bb"
_MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml"}
_STEPS = [1, 2, 2.5, 5, 10]  # of round numbers
_WINDOW, _HOP = 0.085, 0.02  # seconds of a spectrogram's frames
_LOWEST, _HIGHEST, _RANGE = 60.0, 12_000.0, 70.0  # Hz, Hz, dB


class Chart(NamedTuple):
    """A picture as a data URI, and what it shows in words."""

    src: str
    alt: str


class Bar(NamedTuple):
    """A bar of the template macro `bar_chart`: its length, the text for its value, a link of its label, a remark."""

    label: str
    size: float
    value: str
    link: str = ""
    remark: str = ""


def style() -> AbstractContextManager[None]:
    """matplotlib's settings for the charts of a page; a figure is drawn and saved within."""
    import matplotlib
    from cycler import cycler

    return matplotlib.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=[_ORANGE, _BLUE, _GREEN, _VIOLET])})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. It needs no display: pyplot is not used."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, format: str, dpi: int = 110) -> bytes:
    """The bytes of a figure as png or svg; the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=dpi, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Chart:
    """Named lines [(x, y), ...]; points that are not finite are left out."""
    with style():
        figure = new_figure(7.8, 2.6)
        axes = figure.subplots()
        for name, line in lines.items():
            points = np.array(line, dtype=float).reshape(-1, 2)
            points = points[np.isfinite(points).all(1)]
            axes.plot(points[:, 0], points[:, 1], marker="o" if len(points) == 1 else None, label=name)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.legend()
        return _chart(figure, "svg", f"{y_label} over {x_label}: {', '.join(lines)}")


def histogram(values: np.ndarray, label: str, integer: bool = False) -> Chart:
    """How many values [n], n >= 1, lie between round numbers; the outermost 0.05 % count for the bins at the ends."""
    from matplotlib.ticker import MaxNLocator

    low, high = np.quantile(values, (0.0005, 0.9995))
    locator = MaxNLocator(nbins=24, steps=_STEPS, integer=integer)
    edges = locator.tick_values(low, high + 1 if integer else high)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    bins = [f"{first:g} to {last:g}: {n:,}" for first, last, n in zip(edges, edges[1:], counts, strict=False) if n]
    with style():
        figure = new_figure(4.6, 2.2)
        axes = figure.subplots()
        axes.stairs(counts, edges, fill=True, color=_BLUE)
        axes.set(xlabel=label, ylabel="count")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=_STEPS, integer=integer))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        return _chart(figure, "svg", f"Histogram of {label}. {'; '.join(bins)}")


def spectrogram(wav: Tensor, sample_rate: int, bars: Sequence[float] = ()) -> Chart:
    """A spectrogram in decibel over seconds and, logarithmic, hertz; `bars` are seconds of lines. wav [S] or [1, S]."""
    times, frequencies, decibel = spectrum(wav, sample_rate)
    with style():
        figure = new_figure(4.6, 1.9)
        axes = figure.subplots()
        axes.pcolormesh(times, frequencies, decibel, cmap="magma", vmin=-_RANGE, vmax=0)
        axes.vlines(bars, _LOWEST, frequencies[-1], colors="white", linewidth=0.7, alpha=0.8)
        axes.set(xlabel="seconds", ylabel="Hz", yscale="log")
        axes.set_yticks([100, 1000, 10_000], ["100", "1k", "10k"])
        axes.set_ylim(_LOWEST, frequencies[-1])
        axes.grid(False)
        return _chart(figure, "png", f"Spectrogram with {len(bars)} bar lines" if len(bars) else "Spectrogram")


def spectrum(wav: Tensor, sample_rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds [T], hertz [F] and decibel below the loudest [F, T]. wav [S] or [1, S]."""
    samples = np.nan_to_num(wav.reshape(-1).float().numpy())
    window, hop = round(_WINDOW * sample_rate), round(_HOP * sample_rate)
    samples = np.pad(samples, (0, max(window - len(samples), 0)))
    frequencies, times, power = signal.spectrogram(samples, sample_rate, "hann", window, window - hop, mode="magnitude")
    kept = (frequencies > 0) & (frequencies <= _HIGHEST)
    decibel = 20 * np.log10(power[kept] / max(power.max(), 1e-9) + 1e-9)
    return times, frequencies[kept], decibel


def _chart(figure: Figure, format: str, alt: str) -> Chart:
    return Chart(data_uri(_MEDIA_TYPES[format], save(figure, format)), alt)
