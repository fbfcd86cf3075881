"""The page about a store: its figures against the rows, whatever the rows say, and with what older stores lack."""

import csv
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.reports import report
from data_prep.reports.report import write_report
from ssmttm.data.store import open_store
from ssmttm.data.writer import StoreWriter
from ssmttm.errors import UserError
from ssmttm.reports.charts import Bar, Bars, Histogram, plain

BY, SA = "https://creativecommons.org/licenses/by/4.0/", "https://creativecommons.org/licenses/by-sa/3.0/"
GENRES = ("rock", "rock", "rock", "jazz", "jazz", "folk")


# As data_prep.stages.select writes it.
SELECTED = {
    "tracks": 30, "kept": 24, "split_by": "artist", "duplicates": {"file": 3},
    "suspected_duplicates": {
        "pairs": 7,
        "closest": [{"tracks": [f"p{i}", f"q{i}"], "agreement": f"bit error rate 0.2{i}"} for i in range(7)],
    },
    "evaluation": [{"name": "song_describer.csv", "works": 1706, "artists": 350, "audio": 4, "heard": 3,
                    "left_out": {f"jamendo:{i}": "its artist is in it" for i in range(9)}},
                   {"name": "mine", "works": 0, "artists": 0, "audio": 2, "heard": 2, "left_out": {}}],
}  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag was closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "path", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def __contains__(self, words):
        return words in " ".join(" ".join(self.text).split())


def write_store(path, rows=24, **changes):
    """Segments of 30 s and, every sixth, of 10 s; two licences; six works of three artists."""
    writer = StoreWriter(path, {"source": {"name": "folder"}}, sample_rate=24_000)
    for i in range(rows):
        row = {
            "id": f"s{i}", "split": "valid" if i % 6 == 5 else "train", "duration": 10.0 if i % 6 == 5 else 30.0,
            "licence": "CC-BY-SA-3.0" if i % 4 else "CC-BY-4.0", "licence_url": SA if i % 4 else BY,
            "title": f"Title {i // 4}", "author": f"Author {i // 8}", "track": f"t{i // 4}", "artist": f"a{i // 8}",
            "tags": [f"genre---{GENRES[i % 6]}", "instrument---piano"], "captions": [f"A caption of {i}", "Slow"],
            "loudness": -20.0 + i % 7, "audio": f"audio/s{i}.flac", "source_url": f"https://example.org/{i}",
        }  # fmt: skip
        writer.add(row | {name: value(i) if callable(value) else value for name, value in changes.items()})
    writer.finish()
    return path


def page_of(path, out=None):
    file = write_report(open_store(path), out or path / "report.html")
    return Page(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = write_store(tmp_path_factory.mktemp("store") / "mine")
    rejected_rows(path, [("x", "cut", "silent", f"it is silent for {i} % of its length") for i in range(40)]
               + [("y", "select", "duplicate", "the same file as x")] * 3
               + [("z", "select", "evaluation", "its artist is in a set")] * 2)  # fmt: skip
    (path / "decontamination.json").write_text(json.dumps(SELECTED))
    return page_of(path)


def rejected_rows(path, rows):
    with open(path / "rejected.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("item", "stage", "kind", "reason"), *rows])


def test_headline(page):
    assert "music 11 min" in page and "segments 24" in page and "works 6" in page and "artists 3" in page
    assert "45 items refused: 3 as duplicates, 2 because an evaluation set holds them, 40 for other reasons" in page


def test_hours_by_licence_with_tier_and_link(page):
    assert "CC-BY-SA-3.0 8 min policy open-sa; 18 segments" in page
    assert "CC-BY-4.0 3 min policy open; 6 segments" in page
    assert {BY, SA} <= {link["href"] for link in page.of("a")}


def test_hours_by_genre_split_and_length(page):
    for words in ("Hours by genre rock 6 min jazz 4 min folk 40 s", "Hours by instrument piano 11 min",
                  "train 10 min 20 segments", "valid 40 s 4 segments", "test 0 s 0 segments", "10 to 11: 4",
                  "29 to 30: 20", "Loudness", "-18 to -17.75: 4"):  # fmt: skip
        assert words in page, words


def test_refusals_by_kind_with_examples_that_differ(page):
    assert "silent 40 silent, wholly or for too large a part (stage: cut 40)" in page
    assert "duplicate 3" in page and "x it is silent for 0 % of its length" in page
    assert "it is silent for 1 % of its length" not in page, "one of each sort"


def test_evaluation_sets(page):
    words = "song_describer.csv 9 items left out. known works 1,706 artists 350 recordings that could be heard 3"
    assert f"{words} item why jamendo:0 its artist is in it" in page and "jamendo:5" not in page
    assert "mine 0 items left out. known works 0" in page


def test_tracks_that_sound_alike(page):
    assert "less than copies do: 7." in page and "track and how far p0 q0 bit error rate 0.20" in page


def test_captions(page):
    for words in ("captions 48", "different ones 25", "a segment 2", "segments without any 0", "4 to 5: 24"):
        assert words in page, words


def test_examples_are_spread_over_the_genres_and_can_be_heard(page):
    players = page.of("audio")
    assert len(players) == 12 and all("controls" in player for player in players)
    names = [player["src"] for player in players]
    assert len(set(names)) == 12 and all(re.fullmatch(r"audio/s\d+\.flac", name) for name in names)
    genres = {GENRES[int(re.sub(r"\D", "", name)) % 6] for name in names[:3]}
    assert genres == {"rock", "jazz", "folk"}, "one of each first"
    assert "A caption of" in page


def test_a_rare_genre_is_heard_too(tmp_path):
    page = page_of(write_store(tmp_path / "a", 300, tags=lambda i: ["genre---polka" if i == 7 else "genre---rock"]))
    names = [player["src"] for player in page.of("audio")]
    assert names[1] == "audio/s7.flac" and names[0] != "audio/s0.flac", "of a genre not just the first"


def test_categories_of_one_meaning_are_one(tmp_path):
    tags = [["mood/theme---calm"], ["mood---calm"], ["speed---fast"]]
    page = page_of(write_store(tmp_path / "a", rows=3, tags=lambda i: tags[i]))
    assert "Hours by mood calm 1 min Hours by speed fast 30 s" in page


def test_the_page_is_whole_and_fetches_nothing(page):
    assert page.open == [], "every tag is closed"
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not (attributes.get("src") or "").startswith(("http", "//", "/"))
    assert "url(" not in " ".join(page.text) and "@import" not in " ".join(page.text)


def test_players_find_the_audio_from_wherever_the_page_lies(tmp_path):
    path = write_store(tmp_path / "my store", rows=2, audio=lambda i: f"audio/a b#{i}?.flac")
    (path / "audio").mkdir()
    out = tmp_path / "pages" / "deep" / "store.html"
    page = page_of(path, out)
    for player in page.of("audio"):
        assert player["src"].startswith("../../my%20store/audio/a%20b%23")
        assert (out.parent / unquote(player["src"])).resolve().parent == (path / "audio").resolve()


def test_the_same_store_gives_the_same_page(tmp_path):
    path = write_store(tmp_path / "a")
    first = write_report(open_store(path), tmp_path / "x.html").read_bytes()
    assert write_report(open_store(path), tmp_path / "x.html").read_bytes() == first


HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "a\nb\r\nc",
           "\u202egnp.exe", "שלום", "\u2066x", "&lt;b&gt;", "</pre></details></section>", "\x00\x07", "x" * 5000,
           "javascript:alert(1)", 'https://example.org/"onfocus="alert(1)', "]]>", "<!--", "{style}"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_anybodys_text_stays_text(tmp_path, text):
    mean = {name: text for name in ("title", "author", "licence_url", "source_url", "artist", "licence")}
    mean |= {"tags": [f"genre---{text}", f"{text}---x", text], "captions": [text], "id": lambda i: f"{text}{i}"}
    path = write_store(tmp_path / "a", rows=3, **mean)
    rejected_rows(path, [(text, text, text, text)])
    pairs = {"pairs": 1, "closest": [{"tracks": [text, text], "agreement": text}]}
    sets = [{"name": text, "works": 1, "artists": 1, "heard": 1, "left_out": {text: text}}]
    (path / "decontamination.json").write_text(json.dumps({"evaluation": sets, "suspected_duplicates": pairs}))
    page = page_of(path)
    plain_page = page_of(write_store(tmp_path / "b", rows=3, tags=["genre---x", "y"], captions=["z"]))
    assert page.open == []
    of_tables = {"table", "thead", "tbody", "tr", "td", "th"}
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain_page.tags} | of_tables
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert not (attributes.get("href") or "https://").startswith("javascript"), attributes
    shown = " ".join(page.text)
    assert not set(shown) & set("\u202e\u2066\x00\x07")
    assert plain(text)[:200] in " ".join(shown.split())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), seconds=st.floats(0.01, 1e6),
       loudness=st.floats(-80, 10) | st.sampled_from([float("-inf"), float("nan"), None]))  # fmt: skip
def test_any_rows_give_a_page(tmp_path_factory, text, seconds, loudness):
    path = tmp_path_factory.mktemp("any")
    same = dict(title=text, tags=[text], captions=[text], loudness=loudness)
    write_store(path, rows=5, duration=lambda i: seconds / (i + 1), **same)
    page = page_of(path)
    assert page.open == [] and len(page.of("audio")) == 5


def test_a_store_of_before(tmp_path):
    """No loudness, no tracks and artists, no audio, no captions or tags, no quarantine table."""
    bare = dict(audio=None, captions=[], tags=[], licence_url=None, source_url=None, title=None, author=None)
    path = write_store(tmp_path / "a", **bare)
    table = pq.read_table(path / "manifest.parquet")
    pq.write_table(table.drop_columns(["loudness", "artist", "track", "work", "evidence"]), path / "manifest.parquet")
    info = json.loads((path / "store.json").read_text())
    info["files"]["manifest.parquet"]["bytes"] = (path / "manifest.parquet").stat().st_size
    (path / "store.json").write_text(json.dumps(info))
    page = page_of(path)
    for words in ("No segment has a caption", "No segment has a tag", "keeps no audio", "no record of what was refused",
                  "None were named", "works 0"):  # fmt: skip
        assert words in page, words
    assert "Loudness" not in page


def test_titles_and_authors_stand_in_for_tracks_and_artists(tmp_path):
    page = page_of(write_store(tmp_path / "a", track=None, artist="", source_url=""))
    assert "works 6" in page and "artists 3" in page


def test_plain_tags_are_counted_by_the_first_and_by_each(tmp_path):
    page = page_of(write_store(tmp_path / "a", tags=lambda i: [GENRES[i % 6], "piano"]))
    assert "Hours by first tag rock 6 min jazz 4 min folk 40 s" in page and "Hours by tag piano 11 min" in page


def test_nothing_refused(tmp_path):
    path = write_store(tmp_path / "a")
    rejected_rows(path, [])
    assert "Nothing was refused." in page_of(path)


def test_what_is_damaged_is_named(tmp_path):
    path = write_store(tmp_path / "a")
    (path / "rejected.csv").write_text("something,else\n1,2\n")
    with pytest.raises(UserError, match=r"quarantine\.csv is no quarantine table"):
        page_of(path)
    (path / "rejected.csv").write_text("item,stage,kind,reason\n1,2\n")
    with pytest.raises(UserError, match=r"quarantine\.csv cannot be read"):
        page_of(path)
    rejected_rows(path, [])
    for text in ("{", "[]", '{"evaluation": [{}]}', '{"evaluation": 3}', '{"suspected_duplicates": {"pairs": "x"}}'):
        (path / "decontamination.json").write_text(text)
        with pytest.raises(UserError, match=r"decontamination\.json is damaged"):
            page_of(path)
    with pytest.raises(UserError, match="names audio outside itself"):
        page_of(write_store(tmp_path / "b", audio="../secret.flac"))


def test_a_million_tags_are_counted_by_columns(tmp_path, monkeypatch):
    """No loop over rows: a hundred times as many take far less than a hundred times as long."""
    path = write_store(tmp_path / "a", rows=60)
    store = open_store(path)
    store.manifest = pa.concat_tables([store.manifest] * 5000)
    calls = []
    monkeypatch.setattr(report, "_clip", lambda row, path: calls.append(row) or report.Text("clip"))
    page = Page(write_report(store, tmp_path / "x.html").read_text())
    assert "segments 300,000" in page and len(calls) == 12


def test_bars_and_histograms():
    html = Bars([Bar("a", 2.0, "two"), Bar("b", 1.0, "one"), Bar("c", 0.0, "none")]).html()
    assert re.findall(r"width:([\d.]+)%", html) == ["100.0", "50.0"]
    page = Page(Histogram([0.0, 1.0, 2.0], [4, 2], "things").html())
    assert [float(bar["height"]) for bar in page.of("rect")] == [130.0, 65.0]
    assert Histogram([0.0, 1.0, 2.0], [3, 3], "things").html().count(">3</text>") == 1
    assert Page(Histogram([0.0, 1.0], [0], "things").html()).open == []
