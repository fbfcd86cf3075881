"""HTML pages, charts and tables of reports."""

import base64
import re

import matplotlib.image
import numpy as np
import pytest
import torch

from ssmttm.errors import UserError
from ssmttm.reports import charts
from ssmttm.reports.page import embed_audio, render, write_page
from ssmttm.reports.tables import Section, markdown_report

RATE = 24_000


def tone(hertz, seconds=1.0):
    return 0.3 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)[None]


def decode(uri):
    return base64.b64decode(uri.split(",")[1])


def demo_page(**changes):
    sample = {
        "model": "a <b>small</b> model",
        "audio": embed_audio(tone(440), RATE),
        "spectrogram": charts.spectrogram(tone(440), RATE),
        "predictions": {"key": "D minor", "not noise": False},
    }
    context = {
        "title": "Music & models",
        "loss_curve": charts.curve({"loss": [(0, 6.9), (10, 5.5), (20, float("nan"))]}, "step", "loss"),
        "training": {"steps": "20"},
        "prompts": {"a <b>slow</b> waltz": [sample, sample | {"audio": embed_audio(tone(330), RATE, "flac")}]},
        "differences": [["model", "mean"], ["small", "9 dB"]],
    }
    return render("demo.html", **context | changes)


def test_page_is_one_self_contained_file():
    page = demo_page()
    assert page.count("<audio controls") == 2 and page.count("data:image/png;base64,") == 2
    assert "data:audio/mpeg;base64," in page and "data:audio/flac;base64," in page and "data:image/svg+xml" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", page)
    assert "prefers-color-scheme: dark" in page and "<td><bdi>9 dB</bdi></td>" in page


def test_page_escapes_its_values():
    page = demo_page(training={"<i>": '"><script>alert(1)</script>', "reversed": "\u202etxt.exe\x00"})
    assert "<b>" not in page and "<i>" not in page and "<script" not in page
    assert "Music &amp; models" in page and "\u202e" not in page and "\ufffdtxt.exe\ufffd" in page


def test_page_marks_checks_as_passed_or_failed():
    assert '<dd class="bad">no</dd>' in demo_page()
    assert '<dd class="good">yes</dd>' in demo_page(training={"finite": True})


def test_page_with_a_missing_value_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(Exception, match="undefined"):
        write_page(tmp_path / "page.html", "report.html", title="No sections")
    assert not list(tmp_path.iterdir())


def test_report_is_the_same_in_markdown_and_html():
    sections = [Section(text="Model: <tiny>."), Section("Metrics", rows=[["", "fad"], ["tiny", "1.5 (1 to 2)"]])]
    text = markdown_report("A report", sections)
    assert text == "# A report\n\nModel: <tiny>.\n\n## Metrics\n\n|  | fad |\n| --- | --- |\n| tiny | 1.5 (1 to 2) |\n"
    page = render("report.html", title="A report", charts=[], sections=sections)
    assert "<p>Model: &lt;tiny&gt;.</p>" in page and "<h2>Metrics</h2>" in page and "<bdi>1.5 (1 to 2)</bdi>" in page


@pytest.mark.parametrize("wav", [torch.zeros(1, 0), torch.full((1, 9), float("nan"))])
def test_audio_that_cannot_be_written_is_an_error(wav):
    with pytest.raises(UserError):
        embed_audio(wav, RATE)


@pytest.mark.parametrize(
    "points", [[], [(0, 1.0)], [(0, float("nan"))], [(0, float("inf")), (1, 2.0)], [(3, 3), (3, 3)]]
)
def test_curve_accepts_odd_points(points):
    svg = decode(charts.curve({"loss": points}, "step", "nats").src).decode()
    assert svg.count("<svg") == 1 and "nan" not in svg.lower().split("<g ", 1)[1] and "inf" not in svg


def test_chart_of_equal_values_is_equal_bytes():
    values = np.random.default_rng(0).normal(size=200)
    assert charts.histogram(values, "x") == charts.histogram(values, "x")


def test_histogram_counts_all_values_between_round_numbers():
    assert charts.histogram(np.array([0.1, 0.2, 0.7]), "s").alt.startswith("Histogram of s. 0.1 to 0.125: 1; ")
    lengths = np.repeat([1, 4], [3, 1000])
    assert charts.histogram(lengths, "words", integer=True).alt == "Histogram of words. 1 to 2: 3; 4 to 5: 1,000"
    outliers = np.array([*np.linspace(0, 10, 5000), 1e9])
    words = charts.histogram(outliers, "s").alt
    assert sum(int(count.replace(",", "")) for count in re.findall(r": ([\d,]+)", words)) == 5001
    assert "1e+09" not in words


def test_spectrogram_has_its_note_at_its_frequency(tmp_path):
    for hertz in (440, 880):
        times, frequencies, decibel = charts.spectrum(tone(hertz), RATE)
        assert decibel.shape == (len(frequencies), len(times)) and decibel.max() == pytest.approx(0, abs=1e-4)
        assert abs(frequencies[decibel.mean(1).argmax()] - hertz) < 12
    (tmp_path / "chart.png").write_bytes(decode(charts.spectrogram(tone(440), RATE).src))
    assert matplotlib.image.imread(tmp_path / "chart.png").shape[2] == 4
    assert charts.spectrogram(tone(440), RATE) != charts.spectrogram(tone(880), RATE)


@pytest.mark.parametrize("wav", [torch.zeros(1, 24_000), torch.zeros(1), torch.full((9,), float("nan"))])
def test_spectrogram_accepts_odd_audio(wav):
    assert np.isfinite(charts.spectrum(wav, RATE)[2]).all()
    assert decode(charts.spectrogram(wav, RATE).src).startswith(b"\x89PNG")
