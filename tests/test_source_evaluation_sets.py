"""Evaluation sets that a corpus leaves out: works, artists and recordings, from tables, audio and stores."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_sources import (
    BENCH,
    CAPS,
    HEADS,
    NAMES,
    NOISE,
    ROWS,
    TRACKS,
    VIDEO,
    caps_row,
    write,
    write_csv,
    write_describer,
    write_jamendo,
)
from small_stores import write_rows_store

from data_prep.sources.evaluation_sets import read_evaluation_set
from ssmttm.errors import UserError


@pytest.fixture()
def jamendo(tmp_path):
    return write_jamendo(tmp_path / "jamendo")


@pytest.fixture()
def describer(tmp_path):
    return write_describer(tmp_path / "sdd")


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
