"""The report of a store: its counts against the rows, with odd and hostile values, and with missing columns."""

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

from data_prep.reports.report import write_report
from ssmttm.data.store import open_store
from ssmttm.data.writer import StoreWriter
from ssmttm.errors import UserError
from ssmttm.reports.page import printable

BY, SA = "https://creativecommons.org/licenses/by/4.0/", "https://creativecommons.org/licenses/by-sa/3.0/"
GENRES = ("rock", "rock", "rock", "jazz", "jazz", "folk")


# As data_prep.stages.select writes it.
SELECTED = {
    "tracks": 30, "kept": 24, "split_by": "artist", "duplicates": {"file": 3},
    "suspected_duplicates": {
        "pairs": 7,
        "closest": [{"tracks": [f"p{i}", f"q{i}"], "agreement": f"bit error rate 0.2{i}"} for i in range(7)],
    },
    "evaluation": [{"name": "song_describer.csv", "works": 1706, "artists": 350, "audio": 4, "fingerprinted": 3,
                    "left_out": {f"jamendo:{i}": "its artist is in it" for i in range(9)}},
                   {"name": "mine", "works": 0, "artists": 0, "audio": 2, "fingerprinted": 2, "left_out": {}}],
}  # fmt: skip


class Page(HTMLParser):
    """A parsed page: tags with their attributes, text, and tags that were not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.unclosed = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.unclosed.append(tag)

    def handle_endtag(self, tag):
        if self.unclosed and tag == self.unclosed[-1]:
            self.unclosed.pop()

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def __contains__(self, text):
        return text in " ".join(" ".join([*self.text, *(img["alt"] for img in self.attributes("img"))]).split())


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


def report_page(path, out=None):
    file = write_report(open_store(path), out or path / "report.html")
    return Page(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = write_store(tmp_path_factory.mktemp("store") / "mine")
    rejected_rows(path, [("x", "cut", "silent", f"it is silent for {i} % of its length") for i in range(40)]
               + [("y", "select", "duplicate", "the same file as x")] * 3
               + [("z", "select", "evaluation", "its artist is in a set")] * 2)  # fmt: skip
    (path / "decontamination.json").write_text(json.dumps(SELECTED))
    return report_page(path)


def rejected_rows(path, rows):
    with open(path / "rejected.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("item", "stage", "kind", "reason"), *rows])


def test_report_headline_counts_music_works_artists_and_rejections(page):
    assert "music 11 min" in page and "segments 24" in page and "works 6" in page and "artists 3" in page
    assert "45 items rejected: 3 as duplicates, 2 because of an evaluation set, 40 for other reasons" in page


def test_report_shows_hours_policy_and_link_of_each_licence(page):
    assert "CC-BY-SA-3.0 8 min policy open-sa; 18 segments" in page
    assert "CC-BY-4.0 3 min policy open; 6 segments" in page
    assert {BY, SA} <= {link["href"] for link in page.attributes("a")}


def test_report_shows_hours_by_genre_split_and_length(page):
    for words in ("Hours by genre rock 6 min jazz 4 min folk 40 s", "Hours by instrument piano 11 min",
                  "train 10 min 20 segments", "valid 40 s 4 segments", "test 0 s 0 segments", "10 to 11: 4",
                  "29 to 30: 20", "Loudness", "-18 to -17.75: 4"):  # fmt: skip
        assert words in page, words


def test_report_lists_rejections_by_kind_with_different_reasons(page):
    assert "silent 40 silent, wholly or for too large a part (stage: cut 40)" in page
    assert "duplicate 3" in page and "x it is silent for 0 % of its length" in page
    assert "it is silent for 1 % of its length" not in page, "one of each reason"


def test_report_lists_excluded_evaluation_sets(page):
    words = "song_describer.csv 9 items left out. known works 1,706 artists 350 recordings with audio 3"
    assert f"{words} item reason jamendo:0 its artist is in it" in page and "jamendo:5" not in page
    assert "mine 0 items left out. known works 0" in page


def test_report_lists_kept_near_duplicates(page):
    assert "less than duplicates do: 7." in page and "track track agreement p0 q0 bit error rate 0.20" in page


def test_report_counts_captions(page):
    for words in ("captions 48", "distinct 25", "per segment 2", "segments without captions 0", "4 to 5: 24"):
        assert words in page, words


def test_report_examples_cover_the_genres_and_have_audio(page):
    players = page.attributes("audio")
    assert len(players) == 12 and all("controls" in player for player in players)
    names = [player["src"] for player in players]
    assert len(set(names)) == 12 and all(re.fullmatch(r"audio/s\d+\.flac", name) for name in names)
    genres = {GENRES[int(re.sub(r"\D", "", name)) % 6] for name in names[:3]}
    assert genres == {"rock", "jazz", "folk"}, "one of each first"
    assert "A caption of" in page


def test_report_examples_include_a_rare_genre(tmp_path):
    page = report_page(write_store(tmp_path / "a", 300, tags=lambda i: ["genre---polka" if i == 7 else "genre---rock"]))
    names = [player["src"] for player in page.attributes("audio")]
    assert names[1] == "audio/s7.flac" and names[0] != "audio/s0.flac", "not always the first segment of a genre"


def test_report_merges_tag_categories_of_one_meaning(tmp_path):
    tags = [["mood/theme---calm"], ["mood---calm"], ["speed---fast"]]
    page = report_page(write_store(tmp_path / "a", rows=3, tags=lambda i: tags[i]))
    assert "Hours by mood calm 1 min Hours by speed fast 30 s" in page


def test_report_page_is_well_formed_and_fetches_nothing(page):
    assert page.unclosed == [], "every tag is closed"
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(img["src"].startswith("data:image/svg+xml;base64,") for img in page.attributes("img"))
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not (attributes.get("src") or "").startswith(("http", "//", "/"))
    assert "url(" not in " ".join(page.text) and "@import" not in " ".join(page.text)


def test_report_audio_paths_are_relative_to_the_page(tmp_path):
    path = write_store(tmp_path / "my store", rows=2, audio=lambda i: f"audio/a b#{i}?.flac")
    (path / "audio").mkdir()
    out = tmp_path / "pages" / "deep" / "store.html"
    page = report_page(path, out)
    for player in page.attributes("audio"):
        assert player["src"].startswith("../../my%20store/audio/a%20b%23")
        assert (out.parent / unquote(player["src"])).resolve().parent == (path / "audio").resolve()


def test_report_of_the_same_store_is_the_same_page(tmp_path):
    path = write_store(tmp_path / "a")
    first = write_report(open_store(path), tmp_path / "x.html").read_bytes()
    assert write_report(open_store(path), tmp_path / "x.html").read_bytes() == first


HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "a\nb\r\nc",
           "\u202egnp.exe", "שלום", "\u2066x", "&lt;b&gt;", "</pre></details></section>", "\x00\x07", "x" * 5000,
           "javascript:alert(1)", 'https://example.org/"onfocus="alert(1)', "]]>", "<!--", "{style}"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_report_escapes_hostile_text(tmp_path, text):
    hostile = {name: text for name in ("title", "author", "licence_url", "source_url", "artist", "licence")}
    hostile |= {"tags": [f"genre---{text}", f"{text}---x", text], "captions": [text], "id": lambda i: f"{text}{i}"}
    path = write_store(tmp_path / "a", rows=3, **hostile)
    rejected_rows(path, [(text, text, text, text)])
    pairs = {"pairs": 1, "closest": [{"tracks": [text, text], "agreement": text}]}
    sets = [{"name": text, "works": 1, "artists": 1, "fingerprinted": 1, "left_out": {text: text}}]
    (path / "decontamination.json").write_text(json.dumps({"evaluation": sets, "suspected_duplicates": pairs}))
    page = report_page(path)
    plain_page = report_page(write_store(tmp_path / "b", rows=3, tags=["genre---x", "y"], captions=["z"]))
    assert page.unclosed == []
    table_tags = {"div", "table", "thead", "tbody", "tr", "td", "th"}
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain_page.tags} | table_tags
    assert all(img["src"].startswith("data:image/svg+xml;base64,") for img in page.attributes("img"))
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert not (attributes.get("href") or "https://").startswith("javascript"), attributes
    shown = " ".join(page.text)
    assert not set(shown) & set("\u202e\u2066\x00\x07")
    assert " ".join(printable(text).split())[:200] in " ".join(shown.split())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), seconds=st.floats(0.01, 1e6),
       loudness=st.floats(-80, 10) | st.sampled_from([float("-inf"), float("nan"), None]))  # fmt: skip
def test_report_accepts_any_values(tmp_path_factory, text, seconds, loudness):
    path = tmp_path_factory.mktemp("any")
    same = dict(title=text, tags=[text], captions=[text], loudness=loudness)
    write_store(path, rows=5, duration=lambda i: seconds / (i + 1), **same)
    page = report_page(path)
    assert page.unclosed == [] and len(page.attributes("audio")) == 5


def test_report_of_a_store_without_optional_columns(tmp_path):
    """No loudness, no tracks and artists, no audio, no captions or tags, no table of rejections."""
    bare = dict(audio=None, captions=[], tags=[], licence_url=None, source_url=None, title=None, author=None)
    path = write_store(tmp_path / "a", **bare)
    table = pq.read_table(path / "manifest.parquet")
    pq.write_table(table.drop_columns(["loudness", "artist", "track", "work", "evidence"]), path / "manifest.parquet")
    info = json.loads((path / "store.json").read_text())
    info["files"]["manifest.parquet"]["bytes"] = (path / "manifest.parquet").stat().st_size
    (path / "store.json").write_text(json.dumps(info))
    page = report_page(path)
    for words in ("No segment has a caption", "No segment has a tag", "holds no audio", "no record of rejections",
                  "None. Exclude the evaluation sets", "works 0"):  # fmt: skip
        assert words in page, words
    assert "Loudness" not in page


def test_report_counts_titles_and_authors_where_tracks_and_artists_are_missing(tmp_path):
    page = report_page(write_store(tmp_path / "a", track=None, artist="", source_url=""))
    assert "works 6" in page and "artists 3" in page


def test_report_counts_tags_without_category_by_first_and_by_each(tmp_path):
    page = report_page(write_store(tmp_path / "a", tags=lambda i: [GENRES[i % 6], "piano"]))
    assert "Hours by first tag rock 6 min jazz 4 min folk 40 s" in page and "Hours by tag piano 11 min" in page


def test_report_without_rejections(tmp_path):
    path = write_store(tmp_path / "a")
    rejected_rows(path, [])
    assert "Nothing was rejected." in report_page(path)


def test_report_names_the_damaged_file(tmp_path):
    path = write_store(tmp_path / "a")
    (path / "rejected.csv").write_text("something,else\n1,2\n")
    with pytest.raises(UserError, match=r"rejected\.csv is not a table of rejections"):
        report_page(path)
    (path / "rejected.csv").write_text("item,stage,kind,reason\n1,2\n")
    with pytest.raises(UserError, match=r"rejected\.csv cannot be read"):
        report_page(path)
    rejected_rows(path, [])
    for text in ("{", "[]", '{"evaluation": [{}]}', '{"evaluation": 3}', '{"suspected_duplicates": {"pairs": "x"}}'):
        (path / "decontamination.json").write_text(text)
        with pytest.raises(UserError, match=r"decontamination\.json is damaged"):
            report_page(path)
    with pytest.raises(UserError, match="lists audio outside the store"):
        report_page(write_store(tmp_path / "b", audio="../secret.flac"))


def test_report_of_300_000_segments_reads_twelve_examples(tmp_path):
    """Counting works on columns: only the examples are read as rows."""
    path = write_store(tmp_path / "a", rows=60)
    store = open_store(path)
    store.manifest = pa.concat_tables([store.manifest] * 5000)
    page = Page(write_report(store, tmp_path / "x.html").read_text())
    assert "segments 300,000" in page and len(page.attributes("audio")) == 12


def test_report_bars_are_scaled_to_the_longest(page):
    widths = re.findall(r"width:([\d.]+)%", " ".join(bar["style"] for bar in page.attributes("i")))
    assert widths[:2] == ["100.0", "39.1"], "hours by licence: 460 s and 180 s"
    assert len(page.attributes("li")) - len(widths) == 1, "no bar for the split without segments"
