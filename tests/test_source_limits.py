"""Limits of every source: damaged and huge tables, arbitrary bytes, time and memory."""

import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_sources import COLUMNS, HEADS, LICENCES, NOISE, TRACKS, VIDEO, read, write, write_csv

from data_prep.sources import SOURCES, records
from data_prep.track import KINDS, Track
from ssmttm.errors import UserError


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
