"""Sources: small files with the quirks of each data set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_sources import (
    BENCH,
    CAPS,
    FMA_COLUMNS,
    LICENCES,
    NAMES,
    ROWS,
    TITLES,
    TRACKS,
    VIDEO,
    caps_row,
    read,
    write,
    write_csv,
    write_describer,
    write_jamendo,
)

from data_prep.sources import SOURCES
from data_prep.track import Track
from ssmttm.errors import UserError

# --- MTG-Jamendo ---


@pytest.fixture()
def jamendo(tmp_path):
    return write_jamendo(tmp_path / "jamendo")


def test_jamendo_reads_tracks_and_rejections(jamendo):
    tracks, rejections = read("jamendo", jamendo)
    assert tracks["jamendo:948"] == Track(
        id="jamendo:948",
        path="audio/48/948.mp3",
        licence="http://creativecommons.org/licenses/by-nc-sa/3.0/",
        title='Stand by "me"',
        author="Ann by Bob",
        source_url="http://www.jamendo.com/track/948",
        artist="jamendo:artist:87",
        work="jamendo:948",
        evidence="audio_licenses.txt line 1",
        tags=("genre---rock", "mood/theme---happy", "instrument---guitar"),
    )
    second = tracks["jamendo:214"]
    assert second.path == "audio/14/214.low.mp3" and second.licence == "http://artlibre.org/licence/lal/"
    assert (second.title, second.author, second.evidence) == ("Intro chiante", "David TMX", "audio_licenses.txt line 5")
    third = tracks["jamendo:215"]
    assert third.tags == () and third.licence.endswith("/by/2.0/fr/") and third.evidence == "audio_licenses.txt line 9"
    assert (third.title, third.author) == ("Available under the moon", "Eve")  # not in raw.meta.tsv
    assert tracks["jamendo:216"].licence == tracks["jamendo:216"].evidence == ""
    assert rejections["jamendo:217"].kind == "licence" and rejections["jamendo:218"].kind == "missing"
    assert [rejections[f"raw_30s_cleantags.tsv line {n}"].kind for n in (8, 9)] == ["metadata"] * 2
    assert len(tracks) == 4 and len(rejections) == 4


def test_jamendo_without_titles_does_not_split_ambiguous_names(jamendo):
    titles = jamendo / "data" / "raw.meta.tsv"
    write(titles, TITLES.replace("chiante\t\t", "chiante\tII\t"))
    assert read("jamendo", jamendo)[0]["jamendo:214"].title == "Intro chiante II"
    titles.unlink()
    tracks, _ = read("jamendo", jamendo)
    assert (tracks["jamendo:948"].title, tracks["jamendo:948"].author) == ('Stand by "me" by Ann by Bob', "")
    assert (tracks["jamendo:214"].title, tracks["jamendo:214"].author) == ("Intro chiante", "David TMX")


def test_jamendo_accepts_windows_line_ends_in_licences(jamendo):
    expected, _ = read("jamendo", jamendo)
    write(jamendo / "audio_licenses.txt", LICENCES.replace("\n", "\r\n"))
    assert read("jamendo", jamendo)[0] == expected


def test_jamendo_reads_official_splits(jamendo, tmp_path):
    """With the licences in the repository and the audio elsewhere."""
    clone, audio = tmp_path / "clone", tmp_path / "unpacked"
    (jamendo / "audio").rename(audio)
    write(clone / "audio_licenses.txt", LICENCES)
    names = dict(zip(("train", "validation", "test"), ROWS[:3], strict=True))
    for split, row in names.items():
        write(clone / "data" / "splits" / "split-0" / f"autotagging-{split}.tsv", f"{TRACKS}\r\n{row}\r\n")
    tracks, _ = read("jamendo", audio, clone / "data" / "splits" / "split-0")
    assert [track.split for track in tracks.values()] == ["train", "valid", "test"]
    one, _ = read("jamendo", audio, clone / "data" / "splits" / "split-0" / "autotagging-validation.tsv")
    assert [track.split for track in one.values()] == ["valid"]
    assert tracks["jamendo:948"].licence.endswith("by-nc-sa/3.0/")


def test_jamendo_errors_name_the_missing_file(jamendo, tmp_path):
    write(tmp_path / "link.tsv", "raw_30s_cleantags_50artists.tsv")
    with pytest.raises(UserError, match=r"it is a link to .*50artists.tsv"):
        read("jamendo", jamendo, tmp_path / "link.tsv")
    with pytest.raises(UserError, match=r"autotagging-train\.tsv"):
        read("jamendo", jamendo, jamendo / "data")
    (jamendo / "audio_licenses.txt").unlink()
    with pytest.raises(UserError, match=r"no audio_licenses\.txt in .*: copy it from the root"):
        read("jamendo", jamendo)
    with pytest.raises(UserError, match=r"raw_30s_cleantags.tsv: copy"):
        read("jamendo", tmp_path)
    write(jamendo / "audio_licenses.txt", LICENCES)
    (jamendo / "audio").rename(jamendo / "elsewhere")
    with pytest.raises(UserError, match="no audio in"):
        read("jamendo", jamendo)


# --- FMA ---

NC_SA = "Attribution-NonCommercial-ShareAlike 3.0 International"


def fma_row(number, split="training", subset="small", genres="[21]", licence=NC_SA, tags="[]"):
    return (number, "An album", 1, "AWOL", split, subset, "Hip-Hop", genres, licence, tags, f"Song {number}")


@pytest.fixture()
def fma(tmp_path):
    root = tmp_path / "fma"
    rows = [
        fma_row(2, genres="[21, 103]", tags="['Lo-Fi ', 'lo-fi']"), fma_row(3, split="validation"),
        fma_row(5, split="test"), fma_row(6), fma_row(7, licence="FMA-Limited: Download Only"),
        fma_row(8, genres="[" * 5000), fma_row(9, split="odd"), fma_row(99134), fma_row("x"),
        fma_row(10, subset="large"), fma_row(11),
    ]  # fmt: skip
    first, second = zip(*FMA_COLUMNS, strict=True)
    write_csv(root / "fma_metadata" / "tracks.csv", first, second, ("track_id", *[""] * 10), *rows)
    write_csv(
        root / "fma_metadata" / "raw_tracks.csv",
        ("track_id", "license_title", "license_url", "track_title", "track_url"),
        (2, NC_SA, "http://creativecommons.org/licenses/by-nc-sa/3.0/", "Food", "http://freemusicarchive.org/2"),
        (3, "Attribution 3.0 United States", "http://creativecommons.org/licenses/by/3.0/us/", "x", ""),
        (5, "Free Art License", "http://artlibre.org/licence/lal/en/", "x", ""),
        (7, "FMA-Limited: Download Only", "http://freemusicarchive.org/FMA_Limited", "x", ""),
    )
    write_csv(root / "fma_metadata" / "genres.csv", ("genre_id", "#tracks", "parent", "title", "top_level"),
              (21, 1, 0, "Hip-Hop", 21), (103, 1, 17, "Soundtrack", 17))  # fmt: skip
    for number in (2, 3, 5, 6, 7, 8, 9, 99134, 10):
        write(root / "fma_small" / f"{number:06d}"[:3] / f"{number:06d}.mp3")
    return root


def test_fma_reads_tracks_and_rejections(fma):
    tracks, rejections = read("fma", fma)
    assert tracks["fma:2"] == Track(
        id="fma:2",
        path="fma_small/000/000002.mp3",
        licence="http://creativecommons.org/licenses/by-nc-sa/3.0/",
        title="Song 2",
        author="AWOL",
        source_url="http://freemusicarchive.org/2",
        artist="fma:artist:1",
        work="fma:2",
        evidence="raw_tracks.csv line 2",
        tags=("genre---hip-hop", "genre---soundtrack", "tag---lo-fi"),
        split="train",
    )
    assert tracks["fma:3"].split == "valid" and tracks["fma:3"].licence.endswith("/by/3.0/us/")
    assert tracks["fma:5"].split == "test" and "artlibre" in tracks["fma:5"].licence
    assert tracks["fma:6"].licence == NC_SA and tracks["fma:6"].evidence == "tracks.csv line 7"
    assert set(tracks) == {"fma:2", "fma:3", "fma:5", "fma:6"}
    assert {name: rejection.kind for name, rejection in rejections.items()} == {
        "fma:7": "licence", "fma:8": "metadata", "fma:9": "metadata", "fma:99134": "missing", "fma:x": "metadata",
        "fma:11": "missing",
    }  # fmt: skip


def test_fma_reads_largest_unpacked_subset(fma):
    write(fma / "fma_large" / "000" / "000010.mp3")
    assert read("fma", fma)[0]["fma:10"].path == "fma_large/000/000010.mp3"


def test_fma_without_raw_tracks_uses_licence_titles(fma):
    (fma / "fma_metadata" / "raw_tracks.csv").unlink()
    tracks, rejections = read("fma", fma)
    assert tracks["fma:3"].licence == NC_SA and rejections["fma:7"].kind == "licence"


def test_fma_errors_name_the_missing_file(fma, tmp_path):
    with pytest.raises(UserError, match=r"no file .*tracks\.csv \(the tracks of FMA"):
        read("fma", tmp_path)
    with pytest.raises(UserError, match="no column track/title"):
        read("fma", fma, fma / "fma_metadata" / "genres.csv")
    (fma / "fma_small").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="no audio in"):
        read("fma", fma)


# --- MusicCaps, MusicBench ---


@pytest.mark.parametrize("name", NAMES[:-1])
def test_musiccaps_finds_clips_by_usual_names(tmp_path, name):
    rows = [caps_row(VIDEO), caps_row("abcdefghijk", part=True), caps_row("short"), caps_row("abcdefghijX"),
            caps_row("abcdefghijY", aspects="__import__('os')")]  # fmt: skip
    write_csv(tmp_path / "musiccaps-public.csv", CAPS, *rows)
    write(tmp_path / "clips" / "a" / name)
    write(tmp_path / "clips" / "abcdefghijk.wav")
    write(tmp_path / "clips" / "abcdefghijY.wav")
    tracks, rejections = read("musiccaps", tmp_path)
    track = tracks[f"musiccaps:{VIDEO}"]
    assert track.path == f"clips/a/{name}" and track.work == f"youtube:{VIDEO}" and track.split == "train"
    assert track.captions == ('A "sad" song,\nslow.',) and track.tags == ("aspect---low quality", "aspect---slow tempo")
    assert track.licence == ""  # the captions' licence is not the audio's
    assert tracks["musiccaps:abcdefghijk"].split == "test"
    assert [rejections[f"musiccaps:{name}"].kind for name in ("short", "abcdefghijX", "abcdefghijY")] == [
        "metadata", "missing", "metadata",
    ]  # fmt: skip


@pytest.mark.parametrize(("written", "split"), [("1", "test"), ("TRUE", "test"), ("0", "train"), ("maybe", None)])
def test_musiccaps_reads_its_evaluation_flag_in_any_form(tmp_path, written, split):
    write_csv(tmp_path / "musiccaps-public.csv", CAPS, caps_row(VIDEO, part=written))
    write(tmp_path / f"{VIDEO}.wav")
    tracks, rejections = read("musiccaps", tmp_path)
    assert [track.split for track in tracks.values()] == [split] * bool(split) and len(rejections) == (not split)


@pytest.mark.parametrize("form", ["json", "csv"])
def test_musicbench_reads_json_lines_and_csv(tmp_path, form):
    rows = [BENCH, BENCH | {"location": "../x.wav"}, BENCH | {"location": "data/none_of_youtube.wav"},
            BENCH | {"location": f"data/{VIDEO}.wav", "alt_caption": None, "key": None},
            BENCH | {"location": f"data/{VIDEO}_7.wav"}]  # fmt: skip
    if form == "json":
        index = write(tmp_path / "MusicBench_train.json", "".join(json.dumps(row) + "\n" for row in rows))
    else:
        index = write_csv(tmp_path / "MusicBench_train.csv", tuple(BENCH), *(tuple(row.values()) for row in rows))
    for name in (f"data_aug2/{VIDEO}_1.wav", f"data/{VIDEO}.wav", "data/none_of_youtube.wav"):
        write(tmp_path / "datashare" / name)
    tracks, rejections = read("musicbench", tmp_path, index)
    track = tracks[f"musicbench:data_aug2/{VIDEO}_1.wav"]
    assert track.captions == ("A song in G minor.", "A song.") and track.tags == ("key---g minor",)
    assert track.work == f"youtube:{VIDEO}" and track.split == "train" and track.licence == ""
    plain = tracks[f"musicbench:data/{VIDEO}.wav"]
    assert plain.captions == ("A song in G minor.",) and plain.tags == () and plain.work == track.work
    assert sorted(rejection.kind for rejection in rejections.values()) == ["metadata", "missing", "outside"]


def test_musicbench_as_one_json_list_is_an_error(tmp_path):
    write(tmp_path / "MusicBench_train.json", json.dumps([BENCH]))
    with pytest.raises(UserError, match="JSON object per line"):
        read("musicbench", tmp_path)


# --- Song Describer ---


@pytest.fixture()
def describer(tmp_path):
    return write_describer(tmp_path / "sdd")


def test_song_describer_reads_validated_captions(describer, jamendo):
    tracks, rejections = read("song-describer", describer)
    track = tracks["song-describer:948"]
    assert track.captions == ("A rock song, loud.", "Guitars.") and track.split == "test"
    assert track.path == "audio/48/948.2min.mp3" and track.licence.endswith("/by-nc-sa/3.0/")
    same = read("jamendo", jamendo)[0]["jamendo:948"]
    assert (track.work, track.artist) == (same.work, same.artist) == ("jamendo:948", "jamendo:artist:87")
    kinds = {name: rejection.kind for name, rejection in rejections.items()}
    assert kinds == {"song-describer:214": "caption", "song-describer:215": "missing",
                     "song_describer.csv line 7": "metadata"}  # fmt: skip


# --- JamendoMaxCaps ---


def test_jamendomaxcaps_joins_metadata_and_captions(tmp_path, jamendo):
    record = {
        "id": "948", "name": "Stand", "artist_id": "87", "artist_name": "Ann", "shareurl": "https://www.jamendo.com/track/948",
        "license_ccurl": "http://creativecommons.org/licenses/by-nc-nd/3.0/",
        "musicinfo": {"vocalinstrumental": "instrumental", "speed": "medium",
                      "tags": {"genres": ["rock"], "instruments": [], "vartags": ["happy"]}},
    }  # fmt: skip
    lines = [json.dumps(record), json.dumps(record), "{", json.dumps({"id": 949, "name": None, "license_ccurl": ""}),
             json.dumps({"id": "950"}), json.dumps({"name": "?"}), json.dumps({"id": "951", "name": {}})]  # fmt: skip
    write(tmp_path / "2008-02-15.jsonl", "\n".join(lines))
    write(tmp_path / "2008-02-16.jsonl", json.dumps(record | {"name": "Again"}))
    captions = [
        {"id": "949", "start_time": 0, "end_time": 30, "caption": "A."},
        {"id": 948, "caption": "Slow."},
        {"id": "948", "caption": "Fast."},
        {"id": "948", "caption": {}},
        {"id": "948", "caption": "Slow."},
    ]
    write(tmp_path / "final_caption30sec.jsonl", "\n".join(map(json.dumps, captions)))
    for number in (948, 949, 951):
        write(tmp_path / "audio" / f"{number}.mp3")
    tracks, rejections = read("jamendomaxcaps", tmp_path)
    track = tracks["jamendomaxcaps:948"]
    assert track.captions == ("Slow.", "Fast.") and track.tags == ("genre---rock", "mood/theme---happy",
                                                                       "speed---medium")  # fmt: skip
    assert track.title == "Stand" and track.licence.endswith("by-nc-nd/3.0/")
    assert track.evidence == "2008-02-15.jsonl line 1"
    assert (track.work, track.artist) == ("jamendo:948", "jamendo:artist:87")
    assert tracks["jamendomaxcaps:949"].licence == tracks["jamendomaxcaps:949"].evidence == ""
    kinds = {name: rejection.kind for name, rejection in rejections.items()}
    assert kinds == {
        "2008-02-15.jsonl line 3": "metadata", "2008-02-15.jsonl line 5": "missing",
        "2008-02-15.jsonl line 6": "metadata", "2008-02-15.jsonl line 7": "metadata",
        "final_caption30sec.jsonl line 4": "metadata",
    }  # fmt: skip


# --- all sources ---


def test_sources_import_no_heavy_package():
    code = "import sys, data_prep.sources; sys.exit(bool({'numpy', 'torch', 'pyarrow', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_sources_have_name_help_and_layout():
    assert list(SOURCES) == ["folder", "jamendo", "fma", "jamendomaxcaps", "musiccaps", "musicbench", "song-describer"]
    for name, source in SOURCES.items():
        assert source.name == name and source.help and source.layout.startswith("ROOT/")
