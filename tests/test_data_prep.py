"""data_prep: from files to a store with a small deterministic codec; bad files, licences, resuming, refusals."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.nn import functional as F

from data_prep import __main__ as command
from data_prep.captions import read_captions
from data_prep.encode import Windows, encode_all, plan
from data_prep.folder import JOURNAL, Cut, produce, split_of, splits_of
from data_prep.journal import Journal
from data_prep.licences import allowed, normalise
from data_prep.pack import claim_for, pack, repack, summary
from ssmttm.data import AudioLoader, CodesLoader, open_store
from ssmttm.errors import UserError
from ssmttm.text import TextCondition

RATE = 8000


class FakeCodec:
    """Codes are the quantised mean level of each half of a hop: local, so windows must not change them."""

    name, fingerprint, sample_rate, hop_length, n_codebooks, codebook_size = "fake", "c0dec", RATE, 320, 2, 64
    frame_rate = 25.0

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def to(self, device: str) -> "FakeCodec":
        return self

    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(wav.shape))
        padded = F.pad(wav, (0, -wav.shape[-1] % self.hop_length))
        levels = padded.reshape(len(wav), -1, 2, self.hop_length // 2).abs().mean(-1)  # [B, T, 2]
        return (levels * 63).round().long().transpose(1, 2)


class FakeText:
    name, fingerprint, dim = "words", "7ex7", 3

    def encode(self, captions: list[str]) -> TextCondition:
        return TextCondition.stack([torch.full((1 + len(text.split()), 3), float(len(text))) for text in captions])


def song(path, seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0, **how) -> None:
    rng = np.random.default_rng(seed)
    samples = np.repeat(rng.uniform(0.05, 0.9, round(seconds * 25) + 1), rate // 25)[: round(seconds * rate)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.stack([samples * (rng.integers(0, 2, len(samples)) * 2 - 1)] * channels, 1), rate, **how)


def write_captions(root, *lines: tuple[str, ...]) -> None:
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "caption", "licence", "title", "author", "source_url"), *lines])


def rejected(out) -> dict[str, str]:
    with open(out / "rejected.csv", encoding="utf-8") as file:
        return {line["path"]: line["reason"] for line in csv.DictReader(file)}


def prepare(root, out, codec=None, text=None, licence="CC0-1.0", **more):
    cut = Cut(RATE, more.pop("segment", 20.0))
    claim_for(out, cut.source(), codec, "cpu")
    rows = produce(root, out, cut, licence, **more)
    return pack(rows, out, cut.source(), RATE, codec, text or FakeText())


@pytest.fixture
def root(tmp_path):
    """Three good files of 4, 7 and 25 s."""
    for seed, (name, seconds) in enumerate({"a.flac": 4, "deep/er/b.wav": 7, "c.flac": 25}.items()):
        song(tmp_path / "root" / name, seconds, seed=seed)
    return tmp_path / "root"


def test_folder_to_store(root, tmp_path):
    write_captions(
        root,
        ("c.flac", "a loud song", "CC BY-SA 4.0", "Loud", "Ann", "https://example.org/c"),
        ("c.flac", "eine laute 🎵", "", "", "", ""),
    )
    codec = FakeCodec()
    store = prepare(root, tmp_path / "s", codec)
    table = {row["title"]: row for row in store.manifest.to_pylist() if row["duration"] != 5.0}
    assert len(store) == 4 and set(table) == {"a", "b", "Loud"}
    row = table["Loud"]
    assert (row["licence"], row["author"], row["duration"], row["frames"]) == ("CC-BY-SA-4.0", "Ann", 20.0, 500)
    assert row["captions"] == ["a loud song", "eine laute 🎵"] and row["licence_url"].endswith("/by-sa/4.0/")
    assert table["a"]["licence"] == "CC0-1.0" and table["a"]["captions"] == []
    for index in range(len(store)):
        wav, _ = sf.read(store.audio_path(index), dtype="float32")
        expected = codec.encode(torch.from_numpy(wav)[None, None])[0].numpy()
        np.testing.assert_array_equal(store.codes(index), expected)
    assert store.text("eine laute 🎵").shape == (4, 3) and store.text("").shape == (1, 3)
    assert sum(store.info["counts"].values()) == 4 and store.info["codec"]["windows"]["batch"] == 4
    assert sum(store.info["hours"].values()) == pytest.approx(36 / 3600, abs=3e-4)
    assert "4 segments, 0.01 h" in summary(store) and "codec fake" in summary(store)
    assert not [path for path in store.path.rglob("*") if path.suffix in (".pkl", ".pt", ".npy")]


def test_attribution_names_every_work_once(root, tmp_path):
    write_captions(root, ("c.flac", "", "CC-BY-4.0", 'A "quoted", title', "Ann", "https://example.org/c"))
    store = prepare(root, tmp_path / "s")
    with open(store.path / "ATTRIBUTION.csv", encoding="utf-8") as file:
        works = {line["title"]: line for line in csv.DictReader(file)}
    assert set(works) == {"a", "b", 'A "quoted", title'}
    work = works['A "quoted", title']
    assert (work["author"], work["licence"], work["segments"]) == ("Ann", "CC-BY-4.0", "2")
    assert "mixed down to mono, resampled to 8000 Hz" in work["modifications"]


def test_loaders_read_what_data_prep_makes(root, tmp_path):
    store = prepare(root, tmp_path / "s", FakeCodec())
    split = store.manifest["split"][0].as_py()
    assert CodesLoader(store, split, 2, 50, 0).batch(0)["codes"].shape == (2, 2, 50)
    assert AudioLoader(store, split, 2, 4000, 0).batch(0)["audio"].shape == (2, 1, 4000)


def make_bad_files(root) -> dict[str, str]:
    """Every way in which a file can be bad, and a word of the reason that must be given."""
    noise = np.random.default_rng(9).standard_normal(5 * RATE).astype(np.float32) * 0.1
    (root / "empty.wav").touch()
    (root / "text.mp3").write_text("this is no music\n" * 99)
    sf.write(root / "nothing.wav", np.zeros(0), RATE)
    sf.write(root / "silent.wav", np.zeros(5 * RATE), RATE)
    for name, value in {"nan.wav": np.nan, "inf.wav": np.inf}.items():
        sf.write(root / name, np.where(np.arange(5 * RATE) == 99, value, noise), RATE, subtype="FLOAT")
    song(root / "lying.wav", 5)
    data = bytearray((root / "lying.wav").read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", 10**8)
    (root / "lying.wav").write_bytes(data)
    song(root / "cut.flac", 50, seed=5)
    (root / "cut.flac").write_bytes((root / "cut.flac").read_bytes()[:-20000])
    song(root / "short.flac", 1)
    song(root / "copy.flac", 4, seed=0)
    (root / "locked").mkdir()
    return {
        "empty.wav": "empty", "text.mp3": "no audio", "nothing.wav": "no samples", "silent.wav": "silent",
        "nan.wav": "NaN", "inf.wav": "infinite", "lying.wav": "header tells", "cut.flac": "", "short.flac": "shorter",
        "copy.flac": "the same file as a.flac", "locked": "is a folder", "gone.wav": "no such file",
        "../away.wav": "outside", "mine.flac": "all rights reserved", "nd.flac": "--policy nd", "cc.flac": "no version",
    }  # fmt: skip


def test_bad_files_are_told_and_stop_nothing(root, tmp_path):
    reasons = make_bad_files(root)
    song(root / "eight.wav", 4, 48000, 8, seed=11)
    song(root / "old.mp3", 5, 44100, 2, seed=12)
    for seed, name in enumerate(("mine.flac", "nd.flac", "cc.flac"), 20):
        song(root / name, 4, seed=seed)
    write_captions(
        root, ("a.flac", "the first", "CC0", "", "", ""), ("locked", "", "CC0", "", "", ""),
        ("gone.wav", "", "CC0", "", "", ""), ("../away.wav", "", "CC0", "", "", ""),
        ("mine.flac", "", "all rights reserved", "", "", ""), ("nd.flac", "", "CC BY-ND 4.0", "", "", ""),
        ("cc.flac", "", "CC BY", "", "", ""),
    )  # fmt: skip
    store = prepare(root, tmp_path / "s", FakeCodec())
    told = rejected(tmp_path / "s")
    assert told.keys() == reasons.keys()
    for name, word in reasons.items():
        assert word in told[name], (name, told[name])
    assert set(store.manifest["title"].to_pylist()) == {"a", "b", "c", "eight", "old"}
    kept = {path.name for path in (tmp_path / "s" / "audio").iterdir()}
    assert kept == {name.removeprefix("audio/") for name in store.manifest["audio"].to_pylist()}


def test_processes_change_nothing(root, tmp_path):
    (root / "empty.wav").touch()
    one, two = prepare(root, tmp_path / "one"), prepare(root, tmp_path / "two", processes=2)
    assert one.fingerprint == two.fingerprint and rejected(tmp_path / "one") == rejected(tmp_path / "two")


def test_no_usable_file_is_an_error(tmp_path):
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match="no audio file under"):
        prepare(tmp_path / "root", tmp_path / "s")
    (tmp_path / "root" / "x.wav").touch()
    with pytest.raises(UserError, match=r"no usable audio file.*x\.wav: it is empty"):
        prepare(tmp_path / "root", tmp_path / "s")
    assert rejected(tmp_path / "s").keys() == {"x.wav"}
    with pytest.raises(UserError, match="there is no folder"):
        prepare(tmp_path / "nowhere", tmp_path / "s")
    with pytest.raises(UserError, match="same folder as --root"):
        prepare(tmp_path / "root", tmp_path / "root")


def test_without_a_licence_nothing_comes_in(root, tmp_path):
    with pytest.raises(UserError, match="no usable audio file"):
        prepare(root, tmp_path / "s", licence=None)
    assert all("no licence" in reason for reason in rejected(tmp_path / "s").values())
    with pytest.raises(UserError, match="'free beer' is not known"):
        prepare(root, tmp_path / "s", licence="free beer")
    assert len(prepare(root, tmp_path / "s", licence="CC-BY-4.0")) == 4


def test_of_two_copies_the_one_with_notes_counts(root, tmp_path):
    song(root / "z.flac", 4, seed=0)  # the same bytes as a.flac, which sorts first
    write_captions(root, ("z.flac", "known", "CC-BY-NC-4.0", "Z", "Zoe", ""))
    store = prepare(root, tmp_path / "s")
    assert rejected(tmp_path / "s") == {"a.flac": "the same file as z.flac"}
    assert store.info["licences"] == {"CC-BY-NC-4.0": 1, "CC0-1.0": 3}


def test_a_second_run_reuses_audio_and_codes(root, tmp_path, monkeypatch):
    first = prepare(root, tmp_path / "s", FakeCodec())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.flac")}
    monkeypatch.setattr("data_prep.folder.cut_file", lambda *_: pytest.fail("cut again"))
    codec = FakeCodec()
    again = prepare(root, tmp_path / "s", codec)
    assert codec.shapes == [] and again.fingerprint == first.fingerprint
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.flac")}
    monkeypatch.undo()
    song(root / "new.flac", 5, seed=33)
    grown = prepare(root, tmp_path / "s", codec)
    assert len(grown) == 5 and len(codec.shapes) == 1


def test_a_run_stopped_while_encoding_goes_on(root, tmp_path):
    class Stops(FakeCodec):
        def encode(self, wav):
            if self.shapes:
                raise KeyboardInterrupt
            return super().encode(wav)

    for seed in range(6):
        song(root / f"more{seed}.flac", 4, seed=50 + seed)
    with pytest.raises(KeyboardInterrupt):
        prepare(root, tmp_path / "s", Stops())
    with pytest.raises(UserError, match="unfinished"):
        open_store(tmp_path / "s")
    codec = FakeCodec()
    resumed = prepare(root, tmp_path / "s", codec)
    whole = prepare(root, tmp_path / "t", FakeCodec())
    assert len(codec.shapes) == 2  # 10 segments in batches of 4: the first was kept
    assert resumed.manifest["id"] == whole.manifest["id"]
    for index in range(len(whole)):
        np.testing.assert_array_equal(resumed.codes(index), whole.codes(index))


def test_other_settings_never_mix(root, tmp_path):
    prepare(root, tmp_path / "s", FakeCodec())
    with pytest.raises(UserError, match=r"other settings .source\.segment 20\.0 -> 10\.0"):
        prepare(root, tmp_path / "s", FakeCodec(), segment=10.0)
    other = FakeCodec()
    other.fingerprint = "another"
    with pytest.raises(UserError, match=r"codec\.fingerprint 'c0dec' -> 'another'"):
        prepare(root, tmp_path / "s", other)


def test_audio_first_codes_later(root, tmp_path):
    store = prepare(root, tmp_path / "s")
    with pytest.raises(UserError, match="audio only"):
        store.codes(0)
    coded = prepare(root, tmp_path / "s", FakeCodec())
    assert coded.codes(0).shape[0] == 2
    other = FakeCodec()
    other.fingerprint = other.name = "another"
    with pytest.raises(UserError, match="other settings"):
        repack(tmp_path / "s", None, other, FakeText(), "cpu")
    second = repack(tmp_path / "s", tmp_path / "t", other, FakeText(), "cpu")
    assert second.info["codec"]["name"] == "another" and second.audio_path(0).is_file()
    np.testing.assert_array_equal(second.codes(1), coded.codes(1))


def test_a_damaged_segment_is_named_when_encoding(root, tmp_path):
    store = prepare(root, tmp_path / "s")
    store.audio_path(2).write_bytes(b"fLaC" + b"\0" * 100)
    with pytest.raises(UserError, match=store.audio_path(2).name):
        prepare(root, tmp_path / "s", FakeCodec())


@pytest.mark.parametrize("n_frames", [1, 9, 10, 11, 17, 18, 19, 100])
def test_windows_cover_every_frame_once(n_frames):
    kept = [start + frame for start, first, end in plan(n_frames, 10, 1) for frame in range(first, end)]
    assert kept == list(range(n_frames))
    assert all(end <= 10 for _, _, end in plan(n_frames, 10, 1))
    assert all(first == (0 if start == 0 else 1) for start, first, _ in plan(n_frames, 10, 1))


def test_encoding_has_one_shape(root):
    codec, windows = FakeCodec(), Windows(2.0, 0.2, 3)
    rng = torch.Generator().manual_seed(0)
    wavs = [torch.rand(1, samples, generator=rng) for samples in (1, 319, 320, 16000, 16001, 80123)]
    made = list(encode_all(wavs, codec, windows))
    assert set(codec.shapes) == {(3, 1, 16000)}
    for wav, codes in zip(wavs, made, strict=True):
        np.testing.assert_array_equal(codes, codec.encode(wav[None])[0].numpy())


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        ("CC BY 4.0", "CC-BY-4.0"), ("cc-by-sa-3.0", "CC-BY-SA-3.0"), ("CC0", "CC0-1.0"),
        ("CC0 1.0 Universal", "CC0-1.0"), ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("http://creativecommons.org/licenses/by-nc-sa/3.0/", "CC-BY-NC-SA-3.0"),
        ("https://creativecommons.org/licenses/by/4.0/deed.en", "CC-BY-4.0"),
        ("http://creativecommons.org/licenses/by/3.0/at/", "CC-BY-3.0-AT"),
        ("https://creativecommons.org/licenses/by-nc-sa/2.0/es/", "LicenseRef-CC-BY-NC-SA-2.0-ES"),
        ("LicenseRef-CC-BY-NC-SA-2.0-ES", "LicenseRef-CC-BY-NC-SA-2.0-ES"),
        ("https://creativecommons.org/licenses/by-nd-nc/1.0/", "CC-BY-NC-ND-1.0"),
        ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International", "CC-BY-NC-SA-4.0"),
        ("Attribution-Non Commercial-No Derivatives 4.0 International", "CC-BY-NC-ND-4.0"),
        ("Free Art License 1.3", "LAL-1.3"), ("http://artlibre.org/licence/lal/", "LAL-1.3"),
        ("https://creativecommons.org/publicdomain/mark/1.0/", "CC-PDM-1.0"),
    ],
)  # fmt: skip
def test_licences(text, spdx):
    assert normalise(text).spdx == spdx
    assert normalise(normalise(text).spdx).spdx == spdx
    assert normalise(text).url.startswith("https://")


@pytest.mark.parametrize("text", ["", "MIT", "CC BY", "CC BY-FOO 4.0", "CC-BY-9.9", "public domain", "CC-SA-1.0"])
def test_unknown_licences(text):
    with pytest.raises(UserError, match="licence"):
        normalise(text)


def test_policies():
    table = {"CC0": "open", "CC BY 4.0": "open", "CC BY-SA 4.0": "open-sa", "LAL-1.3": "open-sa",
             "CC BY-NC-SA 4.0": "research-nc", "CC BY-ND 4.0": "nd"}  # fmt: skip
    order = ["open", "open-sa", "research-nc", "nd"]
    for text, least in table.items():
        let_in = [policy for policy in order if allowed(normalise(text), policy) is None]
        assert let_in == order[order.index(least) :]


def test_splits_are_by_hash():
    splits = [split_of(str(index)) for index in range(4000)]
    shares = [splits.count(name) / 4000 for name in ("train", "valid", "test")]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.015)


@pytest.mark.parametrize("files", [1, 2, 3, 5, 12])
def test_small_corpora_have_every_split(files):
    for trial in range(60):
        hashes = [f"{trial} {index}" for index in range(files)]
        splits = splits_of(hashes)
        assert set(splits.values()) >= set(("train", "valid", "test")[:files])
        assert splits == splits_of(reversed(hashes))
    many = splits_of(str(index) for index in range(500))
    assert many == {name: split_of(name) for name in many}


def test_captions_file_errors(tmp_path):
    file = tmp_path / "captions.csv"
    assert read_captions(file) == {}
    file.write_text("name,caption\nx,y\n")
    with pytest.raises(UserError, match="no column 'path'"):
        read_captions(file)
    file.write_bytes(b"path,caption\nx,\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_captions(file)
    file.write_text("﻿Path , License\nx.wav,CC0\n", encoding="utf-8")
    assert read_captions(file)["x.wav"].licence == "CC0"


def test_journal_outlives_a_torn_line(tmp_path):
    with Journal(tmp_path / JOURNAL) as journal:
        journal.add("a", n=1)
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"key": "b", "n"')
    with Journal(tmp_path / JOURNAL) as journal:
        assert journal.entries.keys() == {"a"}
        journal.add("c", n=3)
    assert Journal(tmp_path / JOURNAL).entries["c"]["n"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("builtin --hours 0 --out x --codec none --text none", "--hours must be above 0"),
        ("builtin --hours nan --out x --codec none --text none", "--hours must be above 0"),
        ("folder --root nowhere --out x --codec none --text none", "there is no folder nowhere"),
        ("folder --root . --out x --codec none --text none --segment 0.1", "--segment must be"),
        ("folder --root . --out x --codec none --text none --workers 0", "--workers must be"),
        ("folder --root . --out x --codec nosuchcodec --text none", "nosuchcodec"),
        ("pack --root nowhere --codec none --text none", "no store at nowhere"),
    ],
)
def test_command_mistakes(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        command.main(arguments.split())
    assert not list(tmp_path.iterdir())


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("builtin", "folder", "pack", "examples"))


def test_command_makes_a_store(root, tmp_path, capsys):
    arguments = f"folder --root {root} --out {tmp_path / 's'} --codec none --text none --licence CC0-1.0"
    assert command.main([*arguments.split(), "--sample-rate", "8000"]) == 0
    assert "4 segments" in capsys.readouterr().out and len(open_store(tmp_path / "s")) == 4


def test_builtin_to_store_and_again(tmp_path, monkeypatch, capsys):
    """The built-in music is at 24 kHz, the codec here at 8: it is resampled on the way."""
    pytest.importorskip("tinysoundfont")
    codec = FakeCodec()
    monkeypatch.setattr("ssmttm.codecs.load_codec", lambda name: codec)
    arguments = ["builtin", "--hours", "0.005", "--seed", "5", "--out", str(tmp_path / "s"), "--text", "none"]
    assert command.main([*arguments, "--codec", "none"]) == 0
    assert command.main(arguments) == 0
    store = open_store(tmp_path / "s")
    assert store.info["sample_rate"] == 24000 and store.codes(0).shape == (2, 500) and store.captions(0)[0]
    assert store.truth(0)["segment"] == 0 and store.info["licences"] == {"CC0-1.0": len(store)}
    calls = len(codec.shapes)
    monkeypatch.setattr("data_prep.builtin.corpus.render", lambda *_: pytest.fail("rendered again"))
    assert command.main(arguments) == 0 and len(codec.shapes) == calls
    assert open_store(tmp_path / "s").fingerprint == store.fingerprint
    with pytest.raises(UserError, match=r"source\.seed 5 -> 6"):
        command.main(["6" if word == "5" else word for word in arguments])
    assert f"{len(store)} segments, 0.01 h" in capsys.readouterr().out


SLOW_AFTER_THE_FIRST = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
from data_prep import __main__, folder
from ssmttm.errors import run_cli
cut, calls = folder.cut_file, []
def slow(*arguments):
    calls.append(arguments)
    if len(calls) > 1:
        time.sleep(100)
    return cut(*arguments)
folder.cut_file = slow
sys.exit(run_cli(__main__.main))
"""


def test_interrupt_is_one_line_and_keeps_what_is_done(root, tmp_path):
    arguments = ["folder", "--root", root, "--out", tmp_path / "s", "--codec", "none", "--text", "none"]
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW_AFTER_THE_FIRST, *arguments, "--licence", "CC0"],
        cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    journal = tmp_path / "s" / JOURNAL
    end = time.monotonic() + 120
    while time.monotonic() < end and not (journal.exists() and journal.read_text().strip()):
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "Traceback" not in error and "what was finished is kept" in error.splitlines()[-1]
    (done,) = [json.loads(line) for line in journal.read_text().splitlines() if line]
    assert all((tmp_path / "s" / name).is_file() for name, _ in done["segments"])
