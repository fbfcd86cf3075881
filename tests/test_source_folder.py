"""The source `folder`: tables, columns and sidecar files as people write them."""

import json
import os
from pathlib import Path

import pytest
from small_sources import COLUMNS, read, write, write_csv

from data_prep.sources import folder, records
from data_prep.track import Track
from ssmttm.errors import UserError


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
    for name in ("new\nline.wav", 'comma, "quote".wav', "=formula.wav"):
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
