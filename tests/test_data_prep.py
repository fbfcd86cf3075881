"""The command line `python -m data_prep`: encoding in windows, error messages, the built-in music, interruptions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import RATE as MUSIC_RATE
from planted import music, save
from small_stores import small_codec
from torch.nn import functional as F

from data_prep import cli
from data_prep.stages.encode import Windows, encode_all, plan_windows
from data_prep.status import WORK
from ssmttm.data import open_store
from ssmttm.errors import UserError

RATE = 8000
ROOT = Path(__file__).parents[1]


class FakeCodec:
    """Codes are the quantised mean level of each half of a hop, so that they do not depend on windows."""

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


@pytest.mark.parametrize("n_frames", [1, 9, 10, 11, 17, 18, 19, 100])
def test_plan_windows_covers_every_frame_once(n_frames):
    kept = [start + frame for start, first, end in plan_windows(n_frames, 10, 1) for frame in range(first, end)]
    assert kept == list(range(n_frames))
    assert all(end <= 10 for _, _, end in plan_windows(n_frames, 10, 1))
    assert all(first == (0 if start == 0 else 1) for start, first, _ in plan_windows(n_frames, 10, 1))


def test_encode_all_calls_codec_with_one_shape():
    codec, windows = FakeCodec(), Windows(2.0, 0.2, 3)
    rng = torch.Generator().manual_seed(0)
    wavs = [torch.rand(1, samples, generator=rng) for samples in (1, 319, 320, 16000, 16001, 80123)]
    encoded = list(encode_all(wavs, codec, windows))
    assert set(codec.shapes) == {(3, 1, 16000)}
    for wav, codes in zip(wavs, encoded, strict=True):
        np.testing.assert_array_equal(codes, codec.encode(wav[None])[0].numpy())


@pytest.mark.parametrize("seconds", [0.04, 0.2, 1.0, 1.36])
def test_encode_all_with_window_shorter_than_margins(seconds):
    """A resampled segment may be a sample, and so a frame, longer than the window."""
    codec = FakeCodec()
    window = round(seconds * RATE)
    for samples in (window, window + 1, 3 * window):
        (codes,) = encode_all([torch.rand(1, samples)], codec, Windows(seconds, 1.0, 2))
        assert codes.shape[1] == -(-samples // codec.hop_length)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("builtin --hours 0 --out x --codec none --text none", "--hours must be above 0"),
        ("builtin --hours nan --out x --codec none --text none", "--hours must be above 0"),
        ("folder --root nowhere --out x --codec none --text none", "no folder nowhere"),
        ("folder --root . --out . --codec none --text none", "same folder as --root"),
        ("folder --root . --out x --codec none --text none --segment 0.1", "--segment must be in"),
        ("folder --root . --out x --codec nosuchcodec --text none", "nosuchcodec"),
        ("folder --root . --out x --codec none --text none --rephrase nothing:here", "nothing"),
        ("builtin --hours 1 --out x --codec none --text none --until cut", "stages are render, select, pack"),
        ("builtin --hours 1 --out x --codec none --text none --stage codes", "--stage codes: no such stage"),
        ("builtin --hours 1 --out x --codec none --text none --task 1/2", "--task needs --stage"),
        ("pack --root nowhere --codec none --text none", "no store at nowhere"),
        ("status nowhere", "nowhere is not the output of a run"),
        ("report nowhere", "no store at nowhere"),
        ("export nowhere --out x", "no store at nowhere"),
        ("folder --root . --out x --against set.csv", "--against is now --exclude-eval-sets"),
        ("folder --root . --out x --refuse-dual-mono", "--refuse-dual-mono is now --reject-dual-mono"),
        ("folder --root . --out x --stage cut --share=1/2", "--share is now --task"),
    ],
)
def test_cli_reports_mistakes_and_writes_nothing(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        cli.main(arguments.split())
    assert not list(tmp_path.iterdir())


def test_cli_mistake_leaves_folder_usable_and_reports_rejections(tmp_path, capsys):
    """No licence, then another source, then a valid command into the same folder."""
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * MUSIC_RATE])
    same = ["--root", str(tmp_path / "music"), "--out", str(tmp_path / "s"), "--codec", "none", "--text", "none"]
    with pytest.raises(UserError, match=r"all tracks are rejected, see .*rejected.csv; the first: a.wav: no licence"):
        cli.main(["folder", *same])
    with pytest.raises(UserError, match=r"raw_30s_cleantags\.tsv"):
        cli.main(["jamendo", *same])
    save(tmp_path / "music" / "short.wav", music(1)[:MUSIC_RATE])
    right = ["folder", *same, "--licence", "CC0-1.0", "--segment", "5", "--workers", "1"]
    cli.main([*right, "--until", "cut"])
    assert "without --until" in capsys.readouterr().out
    assert "short.wav,cut,short" in (tmp_path / "s" / "rejected.csv").read_text()
    cli.main(right)
    assert "1 rejected, " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other settings \(source.name 'folder' -> 'builtin'.* and \d+ more\)"):
        cli.main(["builtin", "--hours", "1", "--out", str(tmp_path / "s"), "--codec", "none", "--text", "none"])
    with pytest.raises(UserError, match="is a store: encode or caption it again with `python -m data_prep pack"):
        cli.main(["folder", "--root", str(tmp_path / "s"), "--out", str(tmp_path / "t"), "--codec", "none"])
    with pytest.raises(UserError, match="cannot write to /dev/null"):
        cli.main([*right, "--out", "/dev/null/s"])


@pytest.mark.parametrize("words", [["--workers", "0"], ["--task", "4/4"], ["--policy", "any"], ["--vocals", "refuse"]])
def test_cli_rejects_invalid_arguments(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["folder", "--root", ".", "--out", "x", *words])
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_help_shows_commands_examples_and_layouts(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("builtin", "folder", "jamendo", "pack", "status", "report", "examples"))
    with pytest.raises(SystemExit):
        cli.main(["fma", "--help"])
    assert "tracks.csv" in capsys.readouterr().out


def test_builtin_store_is_made_once(tmp_path, monkeypatch, capsys):
    """The built-in music is at 24 kHz, the codec at 2.4 kHz."""
    pytest.importorskip("tinysoundfont")
    codec = small_codec(tmp_path / "codec")
    out = tmp_path / "s"
    arguments = ["builtin", "--hours", "0.005", "--seed", "5", "--out", str(out), "--text", "none", "--workers", "1"]
    assert cli.main([*arguments, "--codec", "none"]) == 0
    assert cli.main([*arguments, "--codec", str(tmp_path / "codec")]) == 0
    store = open_store(out)
    assert store.info["sample_rate"] == 24000 and store.codes(0).shape == (codec.n_codebooks, 500)
    assert store.captions(0)[0] and store.annotations(0)["segment"] == 0
    assert store.info["licences"] == {"CC0-1.0": len(store)}
    assert f"{len(store)} segments, 0.01 h" in capsys.readouterr().out
    monkeypatch.setattr("data_prep.builtin.corpus.render", lambda *_: pytest.fail("rendered again"))
    monkeypatch.setattr("data_prep.stages.encode.encode_all", lambda *_: pytest.fail("encoded again"))
    assert cli.main([*arguments, "--codec", str(tmp_path / "codec")]) == 0
    assert open_store(out).fingerprint == store.fingerprint
    with pytest.raises(UserError, match=r"source\.seed 5 -> 6"):
        cli.main(["6" if word == "5" else word for word in [*arguments, "--codec", "none"]])


def test_probe_and_status_print_their_results(tmp_path, capsys):
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * MUSIC_RATE], 44_100, 2)
    (tmp_path / "music" / "b.mp3").write_text("no music")
    with pytest.raises(UserError, match="1 of 2 files are rejected"):
        cli.main(["probe", str(tmp_path / "music" / "a.wav"), str(tmp_path / "music" / "b.mp3")])
    first, second = capsys.readouterr().out.splitlines()
    assert "2 channels, 44100 Hz, 6.0 s" in first and "rejected (unreadable)" in second
    words = ["folder", "--root", str(tmp_path / "music"), "--out", str(tmp_path / "s"), "--licence", "CC0-1.0",
             "--codec", "none", "--text", "none", "--workers", "1"]  # fmt: skip
    cli.main([*words, "--until", "cut"])
    assert "stage cut is done" in capsys.readouterr().out
    cli.main(["status", str(tmp_path / "s")])
    assert "run the same command again to continue" in capsys.readouterr().out
    cli.main(words)
    cli.main(["status", str(tmp_path / "s")])
    shown = capsys.readouterr().out
    assert "the store is finished" in shown and "cut" in shown and "select" in shown


def test_webdataset_round_trip_preserves_store(tmp_path):
    for index in range(5):
        save(tmp_path / "music" / f"{index}.wav", music(index)[: (6 + index) * MUSIC_RATE])
    (tmp_path / "music" / "captions.csv").write_text("path,caption,title\n3.wav,a quiet song,Third\n")
    more = ["--codec", "none", "--text", "none", "--workers", "1"]
    first = ["folder", "--root", str(tmp_path / "music"), "--out", str(tmp_path / "a"), "--licence", "CC-BY-SA-4.0"]
    cli.main([*first, *more])
    cli.main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "tars")])
    words = ["webdataset", "--root", str(tmp_path / "tars"), "--out", str(tmp_path / "b"), *more]
    cli.main(words)
    old, new = (open_store(tmp_path / name).manifest.to_pylist() for name in "ab")
    columns = ("title", "captions", "licence", "duration", "split", "content_hash")
    before, after = ([[row[name] for name in columns] for row in sorted(rows, key=lambda row: row["content_hash"])]
                     for rows in (old, new))  # fmt: skip
    assert before == after and len(old) == 5 and "a quiet song" in str(before)
    fingerprint = open_store(tmp_path / "b").fingerprint
    cli.main(words)
    assert open_store(tmp_path / "b").fingerprint == fingerprint


def test_tasks_of_stages_make_the_same_store(tmp_path, capsys):
    """As the Slurm scripts: every stage in two tasks, one after the other."""
    for index in range(6):
        save(tmp_path / "music" / f"{index}.wav", music(index)[: 6 * MUSIC_RATE])
    small_codec(tmp_path / "codec")
    words = ["folder", "--root", str(tmp_path / "music"), "--licence", "CC0-1.0", "--workers", "1", "--text", "none",
             "--codec", str(tmp_path / "codec"), "--sample-rate", "24000"]  # fmt: skip
    cli.main([*words, "--out", str(tmp_path / "a")])
    for stage, num_tasks in (("plan", 1), ("reference", 2), ("cut", 2), ("select", 1), ("codes", 2), ("pack", 2)):
        for task in reversed(range(num_tasks)):
            assert not (tmp_path / "b" / "store.json").exists()
            cli.main([*words, "--out", str(tmp_path / "b"), "--stage", stage, "--task", f"{task}/{num_tasks}"])
    assert open_store(tmp_path / "a").fingerprint == open_store(tmp_path / "b").fingerprint
    assert "task 1 of 2 of stage codes is done" in capsys.readouterr().out
    cli.main(["status", str(tmp_path / "b")])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:-1]] == ["plan", "reference", "cut", "select", "codes"]


def test_slurm_chain_ends_at_until(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["builtin", "--hours", "1", "--out", str(tmp_path / "s"), "--codec", "none", "--text", "none"]
    for more, scripts in (["--until", "render"], {"0-render"}), ([], {"0-render", "1-select", "2-pack"}):
        with pytest.raises(UserError, match="sbatch not found"):
            cli.main([*words, "--executor", "slurm", *more])
        assert {path.stem for path in (tmp_path / "s" / WORK / "slurm").glob("*.sbatch")} == scripts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_interrupted_run_prints_one_line_and_continues(tmp_path, number, code):
    for index in range(9):
        save(tmp_path / "music" / f"{index}.wav", music(index)[: (20 + index) * MUSIC_RATE])
    words = ["folder", "--root", tmp_path / "music", "--out", tmp_path / "s", "--codec", "none", "--text", "none",
             "--licence", "CC0-1.0", "--workers", "2", "--segment", "10"]  # fmt: skip
    begin = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv[0] = 'x'; "
    begin += "from ssmttm.errors import run_cli; from data_prep.cli import main; "
    run = subprocess.Popen(
        [sys.executable, "-c", begin + "sys.exit(run_cli(main)) if __name__ == '__main__' else None", *map(str, words)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while time.monotonic() < end and not list((tmp_path / "s" / WORK).glob("cut-*")):
        time.sleep(0.05)
    os.killpg(run.pid, number)  # as a terminal and a scheduler do
    error = run.communicate(timeout=60)[1]
    assert run.returncode == code and "Traceback" not in error and "kept" in error.splitlines()[-1], error
    cli.main([str(word) for word in words])
    assert len(open_store(tmp_path / "s")) == 9 * 2 + 6, "tails from 3 s on"
