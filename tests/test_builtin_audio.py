"""The built-in corpus as audio: rendering, balance, and producing the same bytes however it is run."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from data_prep.builtin import compose, render, segments, synth
from data_prep.builtin.corpus import render_shard, shard_tasks
from ssmttm.data.splits import split_by_hash
from ssmttm.errors import UserError

RATE = 24_000
HOURS = 3 * 40 / 3600  # three pieces


@pytest.fixture(scope="module")
def produced(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("corpus")
    render_shard(5, 0, 3, folder)
    return folder, pq.read_table(folder / "segments.parquet").to_pylist()


def test_render_is_full_length_audible_and_unclipped() -> None:
    for index in range(4):
        piece = compose(5, index)
        audio = render(piece)
        assert audio.dtype == np.float32 and audio.shape == (int(piece.duration * RATE),)
        assert np.isfinite(audio).all() and np.abs(audio).max() <= 0.9
        seconds = audio.reshape(-1, RATE)
        assert np.sqrt((seconds**2).mean(axis=1))[:-2].min() > 0.005, "a silent second"
        assert 0.03 < np.sqrt((audio**2).mean()) <= 0.12
        assert np.abs(audio[-24:]).max() < 0.01, "the end is faded"


def test_render_keeps_no_state_between_pieces() -> None:
    first, second = compose(5, 0), compose(5, 1)
    alone = render(second)
    render(first)
    assert np.array_equal(render(second), alone)


def test_render_lead_is_louder_than_backing() -> None:
    for index in range(3):
        piece = compose(6, index)
        lead = render(replace(piece, tracks=tuple(t for t in piece.tracks if t.role == "lead")))
        whole = render(piece)
        scale = np.dot(whole, lead) / np.dot(lead, lead)  # the backing hardly correlates with the lead
        backing = whole - scale * lead
        assert 20 * np.log10(np.std(scale * lead) / np.std(backing)) > 4.0, piece.title


def test_render_onsets_show_stated_beat() -> None:
    """The onset strength repeats at the stated beat better than at tempi in no simple ratio to it."""
    librosa = pytest.importorskip("librosa")
    for index in range(3):
        piece = compose(9, index)
        strength = librosa.onset.onset_strength(y=render(piece)[RATE * 5 : RATE * 25], sr=RATE, hop_length=256)
        repeats = librosa.autocorrelate(strength - strength.mean())
        lags = 60 / piece.bpm * RATE / 256 * np.array([1, 0.83, 1.19])
        at = np.interp(lags, np.arange(len(repeats)), repeats)
        assert at[0] > max(at[1:]), piece.title


def test_shard_rows_hold_fields_of_store(produced) -> None:
    folder, rows = produced
    assert [row["id"] for row in rows] == [f"builtin-5-{i:06d}-{s}" for i in range(3) for s in range(2)]
    for row in rows:
        pcm, rate = soundfile.read(folder / row["audio"], dtype="int16")
        assert rate == RATE and len(pcm) == 20 * RATE and row["duration"] == 20.0
        assert hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest() == row["content_hash"]
        truth = json.loads(row["truth"])
        assert truth["piece"] == row["id"][:-2] and truth["segment"] == int(row["id"][-1])
        assert 4 <= len(row["captions"]) <= 6 and -40 < row["loudness"] < -10 and row["track"] == row["id"][:-2]
    for track in pq.read_table(folder / "tracks.parquet").to_pylist():
        assert track["licence"] == "CC0-1.0" and track["author"] == "ssmttm" and track["title"]
        assert track["split"] == split_by_hash(track["id"])
    assert segments(compose(5, 0)) == [(0, 480_000), (480_000, 480_000)]


def test_shard_piece_is_same_in_any_shard(produced, tmp_path: Path) -> None:
    folder, rows = produced
    render_shard(5, 1, 1, tmp_path)
    alone = pq.read_table(tmp_path / "segments.parquet").to_pylist()
    assert alone == rows[2:4]
    for row in alone:
        assert (tmp_path / row["audio"]).read_bytes() == (folder / row["audio"]).read_bytes()


def test_shards_are_unchanged_by_more_hours(tmp_path: Path) -> None:
    few, many = shard_tasks(tmp_path, 20 * 40 / 3600, 5), shard_tasks(tmp_path, 40 * 40 / 3600, 5)
    assert len(few) == 2 and len(many) == 3
    assert few[0].inputs == many[0].inputs and few[0].target == many[0].target and few[1].inputs != many[1].inputs
    assert shard_tasks(tmp_path, 20 * 40 / 3600, 6)[0].target != few[0].target


def test_splits_are_disjoint_by_piece_and_near_90_5_5() -> None:
    splits = [split_by_hash(f"builtin-1-{index:06d}") for index in range(4000)]
    shares = {name: splits.count(name) / len(splits) for name in ("train", "valid", "test")}
    assert shares == pytest.approx({"train": 0.9, "valid": 0.05, "test": 0.05}, abs=0.015)


def test_soundfont_missing_is_one_clear_error(monkeypatch) -> None:
    monkeypatch.setattr(synth.importlib.util, "find_spec", lambda name: None)
    synth._soundfont.cache_clear()
    try:
        with pytest.raises(UserError, match="pretty_midi"):
            render(compose(5, 0))
    finally:
        synth._soundfont.cache_clear()
