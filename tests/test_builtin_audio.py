"""The built-in corpus as audio: rendering, balance, and producing the same bytes however it is run."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from data_prep.builtin import compose, render, segments, synth
from data_prep.builtin.composition.score import Room
from data_prep.builtin.corpus import render_shard, shard_tasks
from data_prep.builtin.reverb import ROOMS, impulse_response, reverberate
from ssmttm.audio import features, resample
from ssmttm.audio.stereo import stereo_statistics
from ssmttm.data.splits import split_by_hash
from ssmttm.errors import UserError
from ssmttm.evaluation.music.repetition import repetition

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


def test_reverb_decays_as_its_room_and_is_the_same_each_time() -> None:
    times = {}
    for room, shape in ROOMS.items():
        response = impulse_response(room, RATE)
        assert np.array_equal(response, impulse_response.__wrapped__(room, RATE))
        assert np.sum(response**2) == pytest.approx(1, abs=1e-3) and not response[: int(shape.before * RATE)].any()
        left = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] + 1e-12)
        times[room] = 3 * (np.argmax(left < -25) - np.argmax(left < -5)) / RATE
        assert 0.65 * shape.decay < times[room] < 1.1 * shape.decay, room
    assert times["cathedral"] > times["hall"] > times["studio"]


def test_reverb_rings_on_after_sound() -> None:
    click = np.zeros(RATE, np.float32)
    click[100] = 1
    wet = reverberate(click, "hall", RATE)
    assert wet.shape == click.shape and wet.dtype == np.float32
    assert not np.abs(wet[:100]).max() > 1e-4 and np.abs(wet[RATE // 2 :]).max() > 1e-4


def test_render_room_is_heard() -> None:
    """A piece in a cathedral is smoother in time than the same piece with no room."""
    piece = compose(5, 2)
    dry = render(replace(piece, room=Room("studio", -80.0)))
    wet = render(replace(piece, room=Room("cathedral", -4.0)))

    def valleys(audio: np.ndarray) -> float:
        level = 10 * np.log10((audio[: 36 * RATE].reshape(-1, RATE // 50) ** 2).mean(axis=1) + 1e-9)
        return float(np.median(level) - np.percentile(level, 5))

    assert valleys(wet) < valleys(dry) - 0.5


def test_render_strong_sections_are_louder() -> None:
    differences = []
    for index in range(12):
        piece = compose(8, index)
        names = {row["name"]: row for row in piece.truth["sections"]}
        if {"verse", "chorus"} <= set(names):
            audio = render(piece)
            level = {name: audio[int(names[name]["start"] * RATE) : int(names[name]["end"] * RATE)].std()
                     for name in ("verse", "chorus")}
            differences.append(20 * np.log10(level["chorus"] / level["verse"]))
    assert len(differences) >= 2 and np.mean(differences) > 1.5


def test_ride_raises_accompaniment_where_lead_rests() -> None:
    lead = np.ones(4 * RATE, np.float32)
    lead[: 2 * RATE] = 0
    gain = synth.ride(lead, RATE)
    assert gain[RATE // 2] == pytest.approx(10 ** (5 / 20), rel=0.01) and gain[-1] == pytest.approx(1)
    assert np.abs(np.diff(gain)).max() < 1e-3


def test_compressor_is_gentle_and_leaves_soft_passages() -> None:
    tone = np.sin(np.arange(4 * RATE) * 0.2).astype(np.float32)
    tone[: 2 * RATE] *= 0.25
    out = synth.compress(tone, RATE)
    assert np.array_equal(out[: RATE], tone[: RATE])
    assert -3.5 < 20 * np.log10(out[-RATE:].std() / tone[-RATE:].std()) < -0.5


def test_render_micro_timing_moves_onsets() -> None:
    piece = compose(5, 0)
    lead = piece.tracks[0]
    note = replace(lead.notes[0], late=0.0, held=0.0)
    early, late = (render(replace(piece, tracks=(replace(lead, notes=(replace(note, late=shift),)),)))
                   for shift in (0.0, 0.1))
    onset = [int(np.argmax(np.abs(audio) > 0.05 * np.abs(audio).max())) for audio in (early, late)]
    assert (onset[1] - onset[0]) / RATE == pytest.approx(0.1, abs=0.006)


def test_pieces_repeat_themselves() -> None:
    """At least 6 % of the time repeats what was heard before, in the project's own measure."""
    shares = []
    for index in range(12):
        audio = torch.from_numpy(render(compose(31, index)))[None]
        mono = features.rms_normalise(resample(audio, RATE, features.SAMPLE_RATE))
        shares.append(repetition(features.log_mel(mono)[0]).fraction)
    assert np.mean(shares) > 0.06


def test_stereo_render_is_panned_and_its_mid_is_the_mono_render() -> None:
    piece = compose(5, 0)
    wav, mono = synth.render_stereo(piece, 12_000), render(piece, 12_000)
    assert wav.shape == (2, len(mono)) and np.abs(wav).max() <= 0.9
    found = stereo_statistics(wav)
    assert 0.02 < found.width < 0.4 and abs(found.balance) < 6
    mid = wav.mean(axis=0)
    assert mid @ mono / np.sqrt((mid @ mid) * (mono @ mono)) > 0.9
