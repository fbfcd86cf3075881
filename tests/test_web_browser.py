"""The page of `ssmttm web` in a headless Chromium, with the embedded model. Skipped where there is no Chromium."""

import json
import time
from urllib.request import urlopen

import pytest
import torch

from ssmttm import MusicPipeline, audio
from ssmttm.generation.streaming.session import StreamSession

browser_module = pytest.importorskip("browser", reason="the extra web is not installed")
if browser_module.CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

from web_server import run_server  # noqa: E402

pytestmark = pytest.mark.timeout(90)
TECHNO = "a fast techno track in A minor with a sawtooth synth lead"
HYMN = "a slow, solemn hymn in C major on a church organ"
IS_PLAYING = "document.body.dataset.state === 'playing' && heardSeconds() > 0.3"
HEARD_SECONDS = """globalThis.heardSeconds = () => {
    const [minutes, seconds] = document.getElementById("time").value.split(":");
    return 60 * Number(minutes) + Number(seconds);
}; globalThis.text = (id) => document.getElementById(id).textContent;"""


@pytest.fixture(scope="module")
def server():
    with run_server({"tiny_lm": MusicPipeline.from_pretrained()}) as (port, service):
        yield f"http://127.0.0.1:{port}/", service


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = browser_module.Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def open_page(browser, server):
    """A function that opens the page. What went wrong in the pages fails the test at its end."""
    pages = []
    browser.events.clear()

    def open_page(**size):
        page = browser.open(server[0], **size)
        pages.append(page)
        page.wait("document.getElementById('model')?.options.length === 1")
        page.evaluate(HEARD_SECONDS)
        return page

    yield open_page
    for page in pages:
        page.close()
    wrong = [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    wrong = [event for event in wrong if "status of 422" not in str(event)]  # of the upload that is no audio
    assert not wrong, wrong
    browser_module.wait_for(lambda: server[1].scheduler.counts() == (0, 0), 10, server[1].scheduler.counts)


def heard_level(page, seconds=0.5):
    """The highest level that the audio thread reports in some time."""
    end, level = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        level = max(level, page.evaluate("document.getElementById('level').value"))
    return level


def sidecar_of(page):
    with urlopen(page.evaluate("document.getElementById('download_json').href")) as answer:
        return json.load(answer)


def test_type_press_hear_change_and_come_back(open_page, server):
    page = open_page()
    page.type("#prompt", TECHNO)
    page.click("#play")
    page.wait(IS_PLAYING)
    assert 0.01 < heard_level(page) <= 1
    drawn = "(id) => new Set(document.getElementById(id).getContext('2d').getImageData(0, 0, 2000, 190).data).size"
    assert page.evaluate(f"({drawn})('spectrogram')") > 20 and page.evaluate(f"({drawn})('waveform')") > 3
    page.click("#keep")
    page.wait("document.querySelectorAll('#moments li').length === 1")
    page.type("#prompt", HYMN)
    assert page.evaluate("document.body.classList.contains('edited')")
    start = time.monotonic()
    page.press("Enter", 13)
    page.wait(f"text('heard') === {json.dumps(HYMN)}")
    assert time.monotonic() - start < 3  # alone on a quiet machine below 1 s
    page.click("#moments button:last-child")
    page.wait("text('status').startsWith('Playing') && heardSeconds() < 2.5")
    page.wait(IS_PLAYING)
    assert heard_level(page) > 0.01
    history = sidecar_of(page)["history"]
    assert [list(entry) for entry in history] == [["position", "seed"]]  # the branch with the hymn is left
    page.click("#play")  # Stop
    page.wait("document.body.dataset.state === 'idle'")
    browser_module.wait_for(lambda: server[1].scheduler.counts() == (0, 0), 5, server[1].scheduler.counts)


def test_page_shows_the_controls_that_the_model_drew(open_page, monkeypatch):
    controls = {"bpm": 91.7, "key": "D minor", "metre": "3/4", "drawn": ["bpm", "key", "metre"]}
    monkeypatch.setattr(StreamSession, "controls", property(lambda session: controls))
    page = open_page()
    page.evaluate("document.getElementById('bpm').disabled = false")  # as for a model with a tempo
    page.click("#play")
    page.wait("document.querySelector('output[for=bpm]').textContent === 'free: 92, D minor, 3/4'")
    page.click("#play")  # Stop


def test_pages_at_once_and_some_are_left_while_they_play(open_page, browser, server):
    pages = [open_page(), open_page(), open_page()]
    for page in pages:
        page.click("#play")
    for page in pages:
        page.wait(IS_PLAYING)
        assert heard_level(page) > 0.01
    scheduler = server[1].scheduler
    assert scheduler.counts() == (3, 0)
    pages[0].call("Page.navigate", url="about:blank")
    browser_module.wait_for(lambda: scheduler.counts() == (2, 0), 5, scheduler.counts)
    pages[1].close()
    browser_module.wait_for(lambda: scheduler.counts() == (1, 0), 5, scheduler.counts)
    before = pages[2].evaluate("heardSeconds()")
    pages[2].wait(f"heardSeconds() > {before + 0.5}")


def test_upload_and_go_on_from_it(open_page, tmp_path):
    (tmp_path / "notes.wav").write_text("no audio, but text\n" * 100)
    time_axis = torch.arange(12_000) / 24_000
    audio.write(tmp_path / "loop.wav", 0.3 * torch.sin(2 * torch.pi * 440 * time_axis) * (time_axis * 8).cos(), 24_000)
    page = open_page()
    page.click("summary")
    page.choose_file("#clip", tmp_path / "notes.wav")
    page.wait("text('error').includes('notes.wav cannot be read as audio')")
    page.choose_file("#clip", tmp_path / "loop.wav")
    page.wait("text('clip_state').includes('goes on from loop.wav (0.5 s)')")
    assert page.evaluate("document.getElementById('error').hidden")
    page.type("#duration", "1.5")
    page.type("#seed", "7")
    page.click("#play")
    page.wait(IS_PLAYING)
    assert heard_level(page, 0.3) > 0.01
    page.wait("document.body.dataset.state === 'idle'")  # to its end
    sidecar = sidecar_of(page)
    assert sidecar["continue_from"] == "loop.wav" and sidecar["seed"] == 7
    assert sidecar["duration"] == pytest.approx(2.0, abs=0.01)
    assert page.evaluate("heardSeconds()") == pytest.approx(2.0, abs=0.15)


def test_a_phone_and_a_keyboard(open_page):
    page = open_page(width=360, height=740)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.type("#prompt", "")
    page.press("Enter", 13)
    page.wait("text('error').includes('prompt 1 is empty')")
    page.type("#prompt", HYMN)
    reached = []
    for _ in range(14):
        page.press("Tab", 9)
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"play", "guidance_scale", "temperature", "volume", "SUMMARY"} <= set(reached), reached
    named = "[...document.querySelectorAll('button, input, select, textarea, canvas, meter')]"
    unnamed = f"{named}.filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map((e) => e.id)"
    assert page.evaluate(unnamed) == []
    page.evaluate("document.getElementById('play').focus()")
    page.press("Enter", 13)
    page.wait(IS_PLAYING)
    page.press("Enter", 13)
    page.wait("document.body.dataset.state === 'idle'")


def test_nothing_is_loaded_from_elsewhere(browser, open_page, server):
    page = open_page()
    address = server[0]
    page.call("Page.navigate", url=address + "docs")
    page.wait("document.body?.innerText.includes('/v1/generate') && document.body.innerText.includes('guidance_scale')")
    loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and all(name.startswith(address) for name in loaded), loaded
