"""Sources: small files with the quirks of each data set, and arbitrary bytes in each table."""

import csv
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_stores import write_rows_store

from data_prep.sources import SOURCES, folder, records
from data_prep.sources.evaluation_sets import read_evaluation_set
from data_prep.track import KINDS, Rejection, Track
from ssmttm.errors import UserError

TRACKS = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS"
VIDEO = "-0SdAVK79lg"


def write(path: Path, content: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_csv(path: Path, *rows: tuple) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def read(name: str, root: Path, index: Path | None = None) -> tuple[dict[str, Track], dict[str, Rejection]]:
    """Tracks and rejections by id; ids are unique, kinds known and reasons part of a sentence."""
    found = list(SOURCES[name].tracks(root, index))
    tracks = {item.id: item for item in found if isinstance(item, Track)}
    rejections = {item.item: item for item in found if isinstance(item, Rejection)}
    assert len(tracks) + len(rejections) == len(found)
    for item in rejections.values():
        assert item.kind in KINDS and item.reason and not item.reason.endswith("."), item
    for item in tracks.values():
        assert (root / item.path).is_file()
        "".join((item.id, item.path, item.title, *item.captions)).encode()
    return tracks, rejections


# --- MTG-Jamendo ---

LICENCES = """\
48/948.mp3
Stand by "me" by Ann by Bob from Jamendo: http://www.jamendo.com/track/948
Available under a Creative Commons Attribution-NonCommercial-ShareAlike license: http://creativecommons.org/licenses/by-nc-sa/3.0/

14/214.mp3
Intro chiante by David TMX from Jamendo: http://www.jamendo.com/track/214
Available under a Free Art license: http://artlibre.org/licence/lal/
--
15/215.mp3
Available under the moon by Eve from Jamendo: http://www.jamendo.com/track/215
Available under a Creative Commons Attribution license: http://creativecommons.org/licenses/by/2.0/fr/
16/216.mp3

17/217.mp3
A by B from Jamendo: http://www.jamendo.com/track/217
Available under a Creative Commons Attribution license: http://creativecommons.org/licenses/by/3.0/

17/217.mp3
A by B from Jamendo: http://www.jamendo.com/track/217
Available under a Creative Commons Attribution-NoDerivatives license: http://creativecommons.org/licenses/by-nd/3.0/
"""
TITLES = """\
TRACK_ID\tARTIST_ID\tALBUM_ID\tTRACK_NAME\tARTIST_NAME\tALBUM_NAME\tRELEASEDATE\tURL
track_0000948\tartist_000087\talbum_000149\tStand by "me"\tAnn by Bob\tAn "album\t2005-04-12\thttp://www.jamendo.com/track/948
track_0000214\tartist_000014\talbum_000031\tIntro chiante\t\tDavid TMX\tTrio\t2005-01-01\thttp://www.jamendo.com/track/214
"""
ROWS = [
    "track_0000948\tartist_000087\talbum_000149\t48/948.mp3\t212.7\tgenre---rock\tmood/theme---happy\tinstrument---guitar",
    "track_0000214\tartist_000014\talbum_000031\t14/214.mp3\t124.6\tgenre---punkrock",
    "track_0000215\tartist_000014\talbum_000031\t15/215.mp3\t124.6",
    "track_0000216\tartist_000014\talbum_000031\t16/216.mp3\t124.6\tgenre---metal",
    "track_0000217\tartist_000014\talbum_000031\t17/217.mp3\t124.6\tgenre---metal",
    "track_0000218\tartist_000014\talbum_000031\t18/218.mp3\t124.6\tgenre---metal",
    "track_0000219\tartist_000014\talbum_000031\t../../etc/passwd\t124.6\tgenre---metal",
    "a broken line",
]


@pytest.fixture()
def jamendo(tmp_path):
    root = tmp_path / "jamendo"
    write(root / "data" / "raw_30s_cleantags.tsv", "\r\n".join([TRACKS, *ROWS, ""]))
    write(root / "data" / "raw.meta.tsv", TITLES)
    write(root / "audio_licenses.txt", LICENCES)
    for name in ("48/948.mp3", "14/214.low.mp3", "15/215.mp3", "16/216.mp3", "17/217.mp3"):
        write(root / "audio" / name)
    return root


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

FMA_COLUMNS = (("", ""), ("album", "title"), ("artist", "id"), ("artist", "name"), ("set", "split"), ("set", "subset"),
               ("track", "genre_top"), ("track", "genres_all"), ("track", "license"), ("track", "tags"),
               ("track", "title"))  # fmt: skip
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

CAPS = ("ytid", "start_s", "end_s", "audioset_positive_labels", "aspect_list", "caption", "author_id",
        "is_balanced_subset", "is_audioset_eval")  # fmt: skip


def caps_row(video, start=30, aspects="['low quality', 'slow tempo']", caption='A "sad" song,\nslow.', part=False):
    return (video, start, start + 10, "/m/0140xf", aspects, caption, 4, False, part)


NAMES = [f"[{VIDEO}]-[30-40].wav", f"{VIDEO}.wav", f"{VIDEO}_30.mp3", f"{VIDEO}-30.wav", f"{VIDEO}_30_40.wav",
         f"{VIDEO}_30-40.flac", f"{VIDEO}_30000_40000.wav", f"Y{VIDEO}.wav", f"Y{VIDEO}_30.000_40.000.wav"]  # fmt: skip


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


BENCH = {"dataset": "MusicBench", "location": f"data_aug2/{VIDEO}_1.wav", "main_caption": "A song in G minor.",
         "alt_caption": "A song.", "prompt_key": "The key is G minor.", "beats": [[0.1], [1.0]], "bpm": 120.0,
         "key": ["G", "minor"], "keyprob": [0.9], "is_audioset_eval_mcaps": False}  # fmt: skip


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

SDD = ("caption_id", "track_id", "caption", "is_valid_subset", "familiarity", "artist_id", "album_id", "path",
       "duration")  # fmt: skip


@pytest.fixture()
def describer(tmp_path):
    root = tmp_path / "sdd"
    write_csv(
        root / "song_describer.csv", SDD,
        (1, 948, "A rock song, loud.", True, 2, 87, 149, "48/948.mp3", 212.7),
        (2, 214, "Not checked.", "", 1, 14, 31, "14/214.mp3", 100.0),
        (3, 948, "Wrong.", False, 2, 87, 149, "48/948.mp3", 212.7),
        (4, 948, "Guitars.", True, 0, 87, 149, "48/948.mp3", 212.7),
        (5, 215, "Gone.", True, 0, 14.0, 149, "15/215.mp3", 212.7),
        (6, "x", "Whose?", True, 0, 14, 149, "15/215.mp3", 212.7),
    )  # fmt: skip
    write(root / "audio_licenses.txt", LICENCES.replace("\n\n", "\n--\n"))
    write(root / "audio" / "48" / "948.2min.mp3")
    write(root / "audio" / "14" / "214.2min.mp3")
    return root


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
    captions = [{"id": "949", "start_time": 0, "end_time": 30, "caption": "A."}, {"id": 948, "caption": "Slow."},
                {"id": "948", "caption": "Fast."}, {"id": "948", "caption": {}}, {"id": "948", "caption": "Slow."}]
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


# --- folder ---

COLUMNS = ("path", "caption", "licence", "title", "author", "source_url")


def test_folder_reads_captions_csv(tmp_path):
    for name in ("a.wav", "deep/er/b.M4A", "c.xyz", ".hidden/d.wav", "e.txt", "deep/.f.wav", "named.bin", "g.flac"):
        write(tmp_path / name)
    write_csv(
        tmp_path / "captions.csv", COLUMNS,
        ("a.wav", "a loud song", "CC BY 4.0", "", "Ann", ""), ("a.wav", "eine laute 🎵", "", "A", "", ""),
        ("a.wav", "a loud song", "https://creativecommons.org/licenses/by/4.0/", "", "", "https://example.org"),
        ("./deep//er/b.M4A", "", "", "", "Bob", ""),
        ("named.bin", "x", "", "", "", ""), ("gone.wav", "x", "", "", "", ""), ("gone.wav", "y", "", "", "", ""),
        ("../x.wav", "", "", "", "", ""), ("/etc/passwd", "", "", "", "", ""), ("", "nothing", "", "", "", ""),
        ("g.flac", "one, two", "CC0", "", "", "", "", "too many"),
    )  # fmt: skip
    tracks, rejections = read("folder", tmp_path)
    assert list(tracks) == ["a.wav", "g.flac", "deep/er/b.M4A", "named.bin"]
    assert tracks["a.wav"] == Track(
        id="a.wav",
        path="a.wav",
        licence="CC BY 4.0",
        title="A",
        author="Ann",
        source_url="https://example.org",
        evidence="captions.csv line 2",
        captions=("a loud song", "eine laute 🎵"),
    )
    assert (tracks["deep/er/b.M4A"].author, tracks["deep/er/b.M4A"].title) == ("Bob", "b")
    kinds = {name: rejection.kind for name, rejection in rejections.items()}
    assert kinds == {"gone.wav": "missing", "../x.wav": "outside", "/etc/passwd": "outside",
                     "captions.csv line 11": "metadata", "captions.csv line 12": "metadata"}  # fmt: skip
    assert "captions.csv line 7" in rejections["gone.wav"].reason


def test_folder_accepts_other_columns_and_spelling(tmp_path):
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav")
    write(tmp_path / "c.wav")
    write(tmp_path / "captions.csv", b"\xef\xbb\xbf Path ,LICENSE,Artist,tags,split\r\n"
          b"a.wav,CC0,jamendo:artist:87,\"genre---rock, loud;slow\",Validation\r\nb.wav,,,\"['x', 'y']\",eval\r\n"
          b"c.wav,,,,half\r\n")  # fmt: skip
    tracks, rejections = read("folder", tmp_path)
    first, second = tracks["a.wav"], tracks["b.wav"]
    assert (first.licence, first.artist, first.split) == ("CC0", "jamendo:artist:87", "valid")
    assert first.tags == ("genre---rock", "tag---loud", "tag---slow") and first.title == "a"
    assert second.tags == ("tag---x", "tag---y") and second.split == "test"
    assert rejections["c.wav"].kind == "metadata" and "'half'" in rejections["c.wav"].reason


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
def test_folder_reads_json_lines(tmp_path, name):
    for file in ("a.wav", "b.wav", "c.wav"):
        write(tmp_path / file)
    lines = [
        {"file_name": "a.wav", "caption": ["one", "two", "one"], "license": "CC0",
         "tags": ["genre---rock"], "title": 7},
        {"path": "b.wav", "captions": "three"}, {"path": "c.wav", "title": {"no": 1}},
        {"path": "c.wav", "author": "\ud800"},
    ]  # fmt: skip
    write(tmp_path / name, "\n\n".join(map(json.dumps, lines)) + "\nnot json\n[]\n" + "[" * 100_000)
    tracks, rejections = read("folder", tmp_path)
    assert tracks["a.wav"].captions == ("one", "two") and tracks["a.wav"].licence == "CC0"
    assert tracks["a.wav"].tags == ("genre---rock",) and tracks["a.wav"].title == "7"
    assert tracks["b.wav"].captions == ("three",) and tracks["a.wav"].evidence == f"{name} line 1"
    assert {rejection.kind for rejection in rejections.values()} == {"metadata"} and len(rejections) == 5


def test_folder_reads_sidecar_files(tmp_path):
    for name in ("a.wav", "deep/b.wav", "c.wav", "d.wav", "e.wav"):
        write(tmp_path / name)
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\ntwo\n")
    write(tmp_path / "a.json", json.dumps({"license": "CC0", "caption": "three", "tags": "rock"}))
    write(tmp_path / "deep" / "b.json", json.dumps({"licence": "CC BY 4.0", "author": "Ann"}))
    write(tmp_path / "c.json", "{")
    write(tmp_path / "d.txt", b"\xff\xfe")
    write(tmp_path / "e.txt", b"x" * (records.MAX_LINE + 1))
    tracks, rejections = read("folder", tmp_path)
    assert tracks["a.wav"].captions == ("three", "one", "two") and tracks["a.wav"].tags == ("tag---rock",)
    assert (tracks["deep/b.wav"].evidence, tracks["deep/b.wav"].author) == ("b.json", "Ann")
    assert {name: rejection.kind for name, rejection in rejections.items()} == dict.fromkeys(
        ("c.wav", "d.wav", "e.wav"), "metadata"
    )


def test_folder_with_strange_names_and_links(tmp_path):
    root = tmp_path / "root"
    for name in ("new\nline.wav", "comma, \"quote\".wav", "=formula.wav"):
        write(root / name)
    write(Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.wav")))
    write(tmp_path / "outside" / "x.wav")
    (root / "link.wav").symlink_to(tmp_path / "outside" / "x.wav")
    (root / "loop").symlink_to(root)
    write(root / "store" / "store.json")
    write(root / "store" / "audio" / "segment.flac")
    tracks, rejections = read("folder", root)
    assert set(tracks) == {"new\nline.wav", 'comma, "quote".wav', "=formula.wav", "link.wav"}
    kinds = {name: rejection.kind for name, rejection in rejections.items()}
    assert kinds == {"caf?.wav": "metadata", "loop": "outside"}


def test_folder_errors_name_the_problem(tmp_path):
    with pytest.raises(UserError, match="no audio file"):
        read("folder", tmp_path)
    with pytest.raises(UserError, match="no folder"):
        read("folder", tmp_path / "none")
    write(tmp_path / "a.wav")
    with pytest.raises(UserError, match="no file"):
        read("folder", tmp_path, tmp_path / "none.csv")
    for content, words in ((b"", "empty"), (b"title,caption\n1,2\n", "no column 'path'"),
                           ("path,caption\na.wav,\u00e9\n".encode("latin-1"), "UTF-8"),
                           ("path,caption\na.wav,b\n".encode("utf-16"), "UTF-8")):  # fmt: skip
        write(tmp_path / "captions.csv", content)
        with pytest.raises(UserError, match=words):
            read("folder", tmp_path)
    write_csv(tmp_path / "captions.csv", COLUMNS)
    write(tmp_path / "captions.jsonl", "{}")
    with pytest.raises(UserError, match="both describe"):
        read("folder", tmp_path)
    with pytest.raises(UserError, match="no line with a JSON object"):
        read("folder", tmp_path, tmp_path / "captions.jsonl")


def strict(root: Path) -> dict[str, Track]:
    """The tracks of a folder whose metadata must all reach a file; no rejections."""
    found = list(folder.tracks(root, allow_unmatched=False))
    assert all(isinstance(item, Track) for item in found), found
    return {item.id: item for item in found}


@pytest.mark.parametrize("column", ["text", "Captions", "PROMPT", "description"])
@pytest.mark.parametrize("path", ["file_name", "File Name", "filename", "audio-path"])
def test_folder_reads_columns_by_their_common_names(tmp_path, path, column):
    write(tmp_path / "a.wav")
    write_csv(tmp_path / "metadata.csv", (path, column), ("a.wav", "words"))
    assert strict(tmp_path)["a.wav"].captions == ("words",)


@pytest.mark.parametrize("name", ["License", "licence_url", "track-license", "Licença", "LIZENZ", "spdx", "rights"])
def test_folder_reads_a_licence_under_any_name(tmp_path, name):
    for file in ("a.wav", "b.wav"):
        write(tmp_path / file)
    write_csv(tmp_path / "metadata.csv", ("file_name", name), ("a.wav", "CC-BY-NC-ND-4.0"))
    write(tmp_path / "b.json", json.dumps({"meta": [{name: "CC-BY-NC-ND-4.0"}]} if name != "rights" else
                                          {name: "CC-BY-NC-ND-4.0"}))  # fmt: skip
    assert [track.licence for track in strict(tmp_path).values()] == ["CC-BY-NC-ND-4.0"] * 2


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_folder_with_columns_of_another_meaning_is_an_error(tmp_path, form):
    write(tmp_path / "a.wav")
    rows = {"csv": "path,lyrics,foo\na.wav,x,y\n", "jsonl": '{"path": "a.wav", "lyrics": "x", "foo": "y"}\n'}
    write(tmp_path / f"metadata.{form}", rows[form])
    with pytest.raises(UserError, match="the columns 'lyrics', 'foo' are not understood"):
        read("folder", tmp_path)


def test_folder_rejects_files_with_contradictory_licences_or_splits(tmp_path):
    for name in "abcdef":
        write(tmp_path / f"{name}.wav")
    write_csv(
        tmp_path / "captions.csv", ("path", "licence", "license", "split"),
        ("a.wav", "CC-BY-NC-ND-4.0", "", ""), ("A.WAV", "CC-BY-4.0", "", ""),
        ("b.wav", "CC-BY-4.0", "CC-BY-NC-ND-4.0", ""), ("c.wav", "CC-BY-4.0", "", ""),
        ("e.wav", "CC-BY-4.0", "CC BY 4.0", "Held-out"), ("f.wav", "", "", "train"), ("f.wav", "", "", "TEST"),
    )  # fmt: skip
    write(tmp_path / "c.json", '{"license": "CC-BY-NC-ND-4.0"}')
    write(tmp_path / "d.json", '{"licence": "CC-BY-NC-ND-4.0", "licence": "CC-BY-4.0"}')
    tracks, rejections = read("folder", tmp_path)
    assert {name: item.kind for name, item in rejections.items()} == {
        "a.wav": "licence", "b.wav": "licence", "c.wav": "licence", "d.wav": "licence", "f.wav": "metadata",
    }  # fmt: skip
    assert "'CC-BY-NC-ND-4.0' (captions.csv line 2), 'CC-BY-4.0' (captions.csv line 3)" in rejections["a.wav"].reason
    assert list(tracks) == ["e.wav"] and tracks["e.wav"].split == "test"


@pytest.mark.parametrize(
    ("file", "written"),
    [("Song.wav", "song.WAV"), ("caf\u00e9.wav", "cafe\u0301.wav"), ("cafe\u0301.wav", "CAF\u00c9.wav"),
     ("a/b.wav", "a\\b.wav"), ("a/b.wav", ".\\a\\b.wav")],
)  # fmt: skip
def test_folder_matches_paths_written_in_another_way(tmp_path, file, written):
    write(tmp_path / file)
    write_csv(tmp_path / "metadata.csv", ("path", "licence"), (written, "CC-BY-NC-ND-4.0"))
    assert strict(tmp_path)[file].licence == "CC-BY-NC-ND-4.0"


@pytest.mark.parametrize("sidecar", ["Song.json", "Song.JSON", "song.json", "Song.wav.json", "SONG.WAV.json"])
def test_folder_matches_sidecar_files_named_in_another_way(tmp_path, sidecar):
    write(tmp_path / "x" / "Song.wav")
    write(tmp_path / "x" / sidecar, '{"license": "CC-BY-NC-ND-4.0"}')
    assert strict(tmp_path)["x/Song.wav"].licence == "CC-BY-NC-ND-4.0"


@pytest.mark.parametrize(
    ("name", "content"),
    [("metadata.csv", "path,licence\nother.wav,CC-BY-NC-ND-4.0\n"), ("Metadata.CSV", "path,licence\na,CC0-1.0\n"),
     ("metadata.csv", "path,licence\na.wav,CC0-1.0,,more\n"), ("metadata.jsonl", '{"path": "a.wav"}\n{'),
     ("metadata.csv", "path,licence\n,CC-BY-NC-ND-4.0\n"), ("song.json", '{"license": "CC-BY-NC-ND-4.0"}'),
     ("sub/metadata.csv", "path,licence\na.wav,CC-BY-NC-ND-4.0\n"), ("metadata.tsv", "path\tlicence\n"),
     ("metadata.json", '[{"path": "a.wav"}]')],
)  # fmt: skip
def test_folder_metadata_that_reach_no_file_are_an_error(tmp_path, name, content):
    write(tmp_path / "a.wav")
    write(tmp_path / name, content)
    with pytest.raises(UserError):
        list(folder.tracks(tmp_path, allow_unmatched=False))


@pytest.mark.parametrize(
    ("written", "split"),
    [("Train", "train"), ("TRAINING", "train"), ("val", "valid"), ("Dev", "valid"), ("validation_set", "valid"),
     ("eval", "test"), ("Held-out", "test"), ("hold_out", "test"), ("test split", "test"), ("\uff34est", "test")],
)  # fmt: skip
@pytest.mark.parametrize("column", ["split", "Subset", "partition"])
def test_folder_reads_splits_as_people_write_them(tmp_path, column, written, split):
    write(tmp_path / "a.wav")
    write_csv(tmp_path / "metadata.csv", ("path", column), ("a.wav", written))
    assert strict(tmp_path)["a.wav"].split == split


def test_folder_keeps_the_splits_of_its_folders(tmp_path, caplog):
    for file in ("train/a.wav", "Held_Out/x/b.wav", "more/c.wav", "val/train.wav", "d.wav"):
        write(tmp_path / file)
    splits = {name: track.split for name, track in strict(tmp_path).items()}
    assert splits == {"train/a.wav": "train", "Held_Out/x/b.wav": "test", "more/c.wav": "", "val/train.wav": "valid",
                      "d.wav": ""}  # fmt: skip
    assert "the folders Held_Out, train, val are read as splits" in caplog.text
    write_csv(tmp_path / "captions.csv", ("path", "split"), ("train/a.wav", "test"))
    assert "several splits" in read("folder", tmp_path)[1]["train/a.wav"].reason


@pytest.mark.parametrize("names", [("test", "eval"), ("train",), ("training", "live"), ("train.wav", "test.wav")])
def test_folder_whose_folders_are_no_splits_states_none(tmp_path, names):
    for name in names:
        write(tmp_path / name / "a.wav")
    assert {track.split for track in strict(tmp_path).values()} == {""}


# --- limits ---


def test_unclosed_quotation_mark_is_rejected(tmp_path):
    write(tmp_path / "a.wav")
    write(tmp_path / "captions.csv", 'path,caption\na.wav,"one\nb.wav,two\n')
    assert "never closed" in read("folder", tmp_path)[1]["captions.csv line 2"].reason


def test_huge_cells_and_lines_are_rejected_and_reading_continues(tmp_path):
    write(tmp_path / "a.wav")
    big = b"x" * (3 * records.MAX_LINE)
    for content in (b"path,caption\nz.wav," + big + b"\na.wav,good\n",
                    b'path,caption\nz.wav,"' + big.replace(b"x" * 50_000, b"x" * 49_999 + b"\n") + b'"\na.wav,good\n',
                    b"path,caption\r\nz\0.wav,x\ra.wav,good\r"):  # fmt: skip
        write(tmp_path / "captions.csv", content)
        tracks, rejections = read("folder", tmp_path)
        assert tracks["a.wav"].captions == ("good",), content[:40]
        assert "captions.csv line 2" in rejections
    (tmp_path / "captions.csv").unlink()
    write(tmp_path / "captions.jsonl", b'{"path": "' + big + b'"}\n{"path": "a.wav", "caption": "good"}\n')
    tracks, rejections = read("folder", tmp_path)
    assert tracks["a.wav"].captions == ("good",) and tracks["a.wav"].evidence == ""
    assert "longer than" in rejections["captions.jsonl line 1"].reason


def test_long_lists_are_rejected(tmp_path):
    write(tmp_path / "a.wav")
    write_csv(tmp_path / "captions.csv", ("path", "tags"), ("a.wav", str(["x" * 10] * 3000)))
    assert "longer than" in read("folder", tmp_path)[1]["captions.csv line 2"].reason


def test_paths_with_the_same_hash_keep_their_own_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.folder.hash", lambda path: 7, raising=False)
    for name in ("a.wav", "b.wav"):
        write(tmp_path / name)
    write_csv(tmp_path / "captions.csv", COLUMNS, ("b.wav", "two", "", "", "", ""), ("a.wav", "one", "", "", "", ""))
    tracks, _ = read("folder", tmp_path)
    assert (tracks["a.wav"].captions, tracks["b.wav"].captions) == (("one",), ("two",))


def test_many_captions_of_one_path_take_linear_time(tmp_path):
    """For an existing and for a missing file."""
    write(tmp_path / "a.wav")
    rows = [(name, f"caption {n}", "", "", "", "") for n in range(4000) for name in ("a.wav", "b.wav")]
    write_csv(tmp_path / "captions.csv", COLUMNS, *rows)
    tracks, rejections = read("folder", tmp_path)
    assert len(tracks["a.wav"].captions) == 4000 and set(rejections) == {"b.wav"}


FMA_TABLE = (*zip(*FMA_COLUMNS, strict=True), ("2", "", "1", "A", "", "small", "", "[21]", "x", "", "t"))
HEADS = {
    "jamendo": ("data/raw_30s_cleantags.tsv", f"{TRACKS}\r\n{ROWS[0]}\r\n"),
    "jamendo licences": ("audio_licenses.txt", LICENCES),
    "jamendo titles": ("data/raw.meta.tsv", TITLES),
    "fma": ("fma_metadata/tracks.csv", "".join(",".join(row) + "\n" for row in FMA_TABLE)),
    "fma licences": ("fma_metadata/raw_tracks.csv", "track_id,license_title,license_url\n2,a,b\n"),
    "fma genres": ("fma_metadata/genres.csv", "genre_id,title\n21,Rock\n"),
    "musiccaps": ("musiccaps-public.csv", ",".join(CAPS) + f"\n{VIDEO},30,40,,['a'],x,,,\n"),
    "musicbench": ("MusicBench_train.json", json.dumps(BENCH) + "\n"),
    "song-describer": ("song_describer.csv", ",".join(SDD) + "\n1,948,A,True,2,87,149,48/948.mp3,2\n"),
    "jamendomaxcaps": ("2008-01-01.jsonl", '{"id": "948", "license_ccurl": "x"}\n'),
    "jamendomaxcaps captions": ("final_caption30sec.jsonl", '{"id": "948", "caption": "x"}\n'),
    "folder": ("captions.csv", "path,caption,tags\na.wav,x,['a']\n"),
    "folder lines": ("captions.jsonl", '{"path": "a.wav", "caption": ["x"]}\n'),
    "folder json": ("a.json", '{"caption": ["x"]}'),
    "folder text": ("a.txt", "x\n"),
}
NOISE = st.binary(max_size=200) | st.lists(
    st.sampled_from([b",", b"\t", b'"', b"\n", b"\r", b"\0", b"[", b"{", b"}", b"]", b":", b"\xff", b"'", b"948",
                     b"../", b"a.wav", b"track_", b"\xef\xbb\xbf", b"by", b"\\ud800", b"-" * 50, b"(" * 50]),
    max_size=40,
).map(b"".join)  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A root where each source finds what it needs."""
    root = tmp_path_factory.mktemp("everything")
    for file in ("audio/48/948.mp3", "fma_small/000/000002.mp3", f"{VIDEO}.wav", f"data_aug2/{VIDEO}_1.wav",
                 "audio/948.mp3", "a.wav"):  # fmt: skip
        write(root / file)
    return root


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(noise=NOISE, keep=st.booleans())
def test_arbitrary_bytes_in_any_table(everything, name, noise, keep):
    source = name.split()[0]
    others = [entry for entry in HEADS if entry.split()[0] == source and entry != name]
    if source == "folder":
        others = []  # one table a folder
    files = [write(everything / HEADS[other][0], HEADS[other][1]) for other in others]
    if name == "song-describer":
        files.append(write(everything / "audio_licenses.txt", LICENCES))
    path, head = HEADS[name]
    files.append(write(everything / path, (head.encode() if keep else b"") + noise))
    try:
        found = list(SOURCES[source].tracks(everything))
    except UserError as error:
        assert "\n" not in str(error)
        return
    finally:
        for file in files:
            file.unlink()
    for item in found:
        assert isinstance(item, Track) or (item.kind in KINDS and item.item.encode())
        if isinstance(item, Track):
            "".join((item.id, item.path, item.licence, item.title, item.author, *item.captions, *item.tags)).encode()


# --- evaluation sets ---


def test_evaluation_sets_from_tables(describer, jamendo, tmp_path):
    (describer / "song_describer.csv").write_text(
        (describer / "song_describer.csv").read_text().replace("6,x,", "6,216,")
    )
    write(describer / "audio" / "99" / "999.mp3")  # possibly of the corpus
    write(describer / "audio" / "other.mp3")
    sdd = read_evaluation_set(describer / "song_describer.csv")
    assert sdd.works == {f"jamendo:{number}" for number in (948, 214, 215, 216)}  # also those without a valid caption
    assert sdd.artists == {"jamendo:artist:87", "jamendo:artist:14"} and sdd.name == "song_describer"
    assert {path.name for path in sdd.audio} == {"948.2min.mp3", "214.2min.mp3"}
    assert read_evaluation_set(describer) == sdd

    split = write(jamendo / "autotagging-test.tsv", f"{TRACKS}\r\n{ROWS[0]}\r\n{ROWS[2]}\r\n")
    test = read_evaluation_set(split)
    assert test.works == {"jamendo:948", "jamendo:215"} and test.artists == sdd.artists
    assert test.audio == [jamendo / "audio" / "48" / "948.mp3", jamendo / "audio" / "15" / "215.mp3"]

    clips = [write(tmp_path / "caps" / "audio" / name) for name in sorted(NAMES)]
    write(tmp_path / "caps" / "audio" / "abcdefghijk.wav")
    caps = read_evaluation_set(write_csv(tmp_path / "caps" / "musiccaps-public.csv", CAPS, caps_row(VIDEO)))
    assert caps.works == {f"youtube:{VIDEO}"} and not caps.artists and caps.audio == clips
    bench = read_evaluation_set(write(tmp_path / "caps" / "MusicBench_test_A.json", json.dumps(BENCH)))
    assert bench.works == caps.works and bench.audio == clips
    (tmp_path / "caps" / "audio" / "Y123456789a_30.wav").touch()
    write_csv(tmp_path / "caps" / "musiccaps-public.csv", CAPS, caps_row("Y123456789a"))
    assert [path.name for path in read_evaluation_set(tmp_path / "caps").audio] == ["Y123456789a_30.wav"]


def test_evaluation_sets_from_audio_and_from_a_store(tmp_path):
    write(tmp_path / "clips" / "a" / "x.wav")
    clips = read_evaluation_set(tmp_path / "clips")
    assert clips.audio == [tmp_path / "clips" / "a" / "x.wav"] and clips.name == "clips" and not clips.works
    rows = [{"id": split, "split": split, "licence": "CC0-1.0", "duration": 1.0, "audio": f"audio/{split}.flac"}
            for split in ("train", "test")]  # fmt: skip
    store = write_rows_store(tmp_path / "store", rows)
    assert read_evaluation_set(store.path).audio == [store.path / "audio" / "test.flac"]


def test_evaluation_set_errors_name_the_problem(describer, jamendo, tmp_path):
    with pytest.raises(UserError, match=r"song_describer\.csv line 7"):  # a track that could not be excluded
        read_evaluation_set(describer / "song_describer.csv")
    with pytest.raises(UserError, match="line 8"):
        read_evaluation_set(jamendo / "data" / "raw_30s_cleantags.tsv")
    with pytest.raises(UserError, match="has not the columns of"):
        read_evaluation_set(write_csv(tmp_path / "x.csv", ("a", "b"), (1, 2)))
    with pytest.raises(UserError, match="no audio file and no known table"):
        (tmp_path / "empty").mkdir()
        read_evaluation_set(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no .*none"):
        read_evaluation_set(tmp_path / "none")
    with pytest.raises(UserError, match="has no recording"):
        read_evaluation_set(write_csv(tmp_path / "y.csv", CAPS))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(noise=NOISE, head=st.sampled_from([b"", *(HEADS[name][1].encode() for name in HEADS)]))
def test_arbitrary_bytes_as_evaluation_set(tmp_path_factory, noise, head):
    path = write(tmp_path_factory.mktemp("any") / "x.csv", head + noise)
    try:
        assert read_evaluation_set(path).works
    except UserError as error:
        assert "\n" not in str(error)


def test_tables_are_read_in_little_memory(tmp_path):
    """Tables of 2 MB take less than 1 MB."""
    names = [f"{n % 100:02d}/{n}.mp3" for n in range(1, 1001)]
    for name in names:
        write(tmp_path / "audio" / name)
    notes = [(f"audio/{name}", "x" * 2000, *[""] * 4) for name in reversed(names)]
    write_csv(tmp_path / "captions.csv", COLUMNS, *notes)
    rows = [f"track_{n}\tartist_1\talbum_1\t{name}\t1.0" + 160 * "\tgenre---rock" for n, name in enumerate(names, 1)]
    write(tmp_path / "data" / "raw.tsv", "\n".join([TRACKS, *rows]))
    work = "x" * 1900 + " by A from Jamendo: http://b\nAvailable under a X license: http://c\n"
    write(tmp_path / "audio_licenses.txt", "".join(f"{name}\n{work}" for name in names))
    for source in ("folder", "jamendo"):
        for traced in (False, True):  # the first time loads modules
            peak = 0
            if traced:
                tracemalloc.start()
            assert sum(isinstance(item, Track) for item in SOURCES[source].tracks(tmp_path)) == 1000
            if traced:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
        assert peak < 1e6, source


def test_sources_import_no_heavy_package():
    code = "import sys, data_prep.sources; sys.exit(bool({'numpy', 'torch', 'pyarrow', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_sources_have_name_help_and_layout():
    assert list(SOURCES) == ["folder", "jamendo", "fma", "jamendomaxcaps", "musiccaps", "musicbench", "song-describer"]
    for name, source in SOURCES.items():
        assert source.name == name and source.help and source.layout.startswith("ROOT/")
