"""Decoding in a child process: the samples are libsndfile's and FFmpeg's own, every bad file is one reason, no process
is left over."""

import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.audio import decoder_process
from data_prep.audio.decode import AudioInfo, Decoder, Limits, probe
from data_prep.track import KINDS, Rejected
from ssmttm.audio.containers.lengths import left_out

RATE = 44_100
FFMPEG = decoder_process._ffmpeg()
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="there is no FFmpeg")


@pytest.fixture(scope="module")
def decoder():
    with Decoder() as decoder:
        yield decoder


def noise(seconds: float = 1.0, channels: int = 2, rate: int = RATE) -> np.ndarray:
    """Half a tone, half noise: float32 [s, C]."""
    time = np.arange(round(seconds * rate))[:, None] / rate
    random = np.random.default_rng(0).uniform(-0.2, 0.2, (len(time), channels))
    return (random + 0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def whole(decoder: Decoder, path: Path) -> tuple[np.ndarray, int]:
    blocks = list(decoder.blocks(path))
    return np.concatenate([block for block, _ in blocks], axis=1), blocks[0][1]


def rejected(decoder: Decoder, path: Path) -> Rejected:
    with pytest.raises(Rejected) as caught:
        list(decoder.blocks(path))
    assert caught.value.kind in KINDS and caught.value.reason and "\n" not in caught.value.reason
    assert str(path) not in caught.value.reason
    return caught.value


def ffmpeg(*words: str | Path) -> None:
    subprocess.run([str(FFMPEG), "-v", "error", "-y", "-nostdin", *map(str, words)], check=True, timeout=60)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def soon(condition: Callable[[], bool]) -> None:
    """Wait until it holds, for 60 s at most."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [
        ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_32"), ("wav", "FLOAT"), ("wav", "DOUBLE"), ("wav", "PCM_U8"),
        ("flac", "PCM_16"), ("flac", "PCM_24"), ("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", None), ("aiff", "PCM_16"),
        ("au", "PCM_16"), ("caf", "PCM_24"), ("w64", "PCM_16"), ("rf64", "PCM_16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 2])
def test_decoder_samples_equal_libsndfile(tmp_path, decoder, suffix, subtype, channels):
    rate = 48_000 if subtype == "OPUS" else RATE
    path = tmp_path / f"x.{suffix}"
    sf.write(path, noise(4.0, channels, rate), rate, subtype=subtype)
    wav, header_rate = whole(decoder, path)
    assert header_rate == rate and wav.dtype == np.float32
    assert np.array_equal(wav, sf.read(path, dtype="float32", always_2d=True)[0].T)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.integers(1, 8),
    samples=st.integers(1, 3) | st.integers(30_000, 35_000) | st.integers(260_000, 265_000),
    rate=st.sampled_from([8000, 22_050, 96_000]),
)
def test_decoder_blocks_are_bounded(tmp_path, decoder, channels, samples, rate):
    path = tmp_path / "x.wav"
    pcm = np.random.default_rng(samples).integers(-32768, 32768, (samples, channels), dtype=np.int16)
    sf.write(path, pcm, rate)
    blocks = list(decoder.blocks(path))
    for block, header_rate in blocks:
        assert block.flags.c_contiguous and block.flags.owndata and block.size <= 1 << 18 and header_rate == rate
    assert np.array_equal(np.concatenate([block for block, _ in blocks], axis=1) * 32768, pcm.T)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["x.m4a", "x.mp4", "x.wma", "x.mka", "x.aac", "x.ac3", "x.tta", "x.wv", "x.webm"])
def test_decoder_uses_ffmpeg_for_other_formats(tmp_path, decoder, name):
    sf.write(tmp_path / "x.wav", noise(), RATE)
    path = tmp_path / name
    ffmpeg("-i", tmp_path / "x.wav", path)
    wav, rate = whole(decoder, path)
    assert wav.shape[0] == 2 and abs(wav.shape[1] / rate - 1.0) < 0.1
    ffmpeg("-i", path, "-c:a", "pcm_f32le", tmp_path / "own.wav")
    own = sf.read(tmp_path / "own.wav", dtype="float32")[0].T
    assert own.shape == wav.shape and float(np.abs(own - wav).max()) < 1e-6


@needs_ffmpeg
def test_decoder_ffmpeg_lossless_is_exact(tmp_path, decoder):
    pcm = np.random.default_rng(0).integers(-32768, 32768, (RATE, 2), dtype=np.int16)
    sf.write(tmp_path / "x.wav", pcm, RATE)
    ffmpeg("-i", tmp_path / "x.wav", "-c:a", "alac", tmp_path / "x.m4a")
    assert np.array_equal(whole(decoder, tmp_path / "x.m4a")[0] * 32768, pcm.T)
    assert decoder.probe(tmp_path / "x.m4a") == AudioInfo("mov alac", 2, RATE, 1.0)


@needs_ffmpeg
def test_decoder_reads_first_audio_stream_of_video(tmp_path, decoder):
    """Its picture may last longer than its sound: that is no sound cut short."""
    sf.write(tmp_path / "x.wav", noise(), RATE)
    picture = ["-f", "lavfi", "-i", "color=black:s=32x32:r=5:d=3", "-i", tmp_path / "x.wav"]
    ffmpeg(*picture, "-c:v", "mpeg4", tmp_path / "film.mp4")
    wav, rate = whole(decoder, tmp_path / "film.mp4")
    assert abs(wav.shape[1] / rate - 1.0) < 0.1
    ffmpeg(*picture, "-map", "0:v", "-c:v", "mpeg4", tmp_path / "mute.mp4")
    assert rejected(decoder, tmp_path / "mute.mp4").kind == "unreadable"


@needs_ffmpeg
def test_decoder_rejects_truncated_files_of_ffmpeg(tmp_path, decoder):
    sf.write(tmp_path / "x.wav", noise(5.0), RATE)
    ffmpeg("-i", tmp_path / "x.wav", "-movflags", "+faststart", tmp_path / "x.m4a")
    data = (tmp_path / "x.m4a").read_bytes()
    (tmp_path / "x.m4a").write_bytes(data[: len(data) * 6 // 10])
    assert rejected(decoder, tmp_path / "x.m4a").kind == "unreadable"


def test_decoder_without_ffmpeg_names_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    (tmp_path / "imageio_ffmpeg.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with Decoder() as decoder:
        assert "FFmpeg is not installed: install it" in rejected(decoder, tmp_path / "x.m4a").reason


def test_probe_reads_header(tmp_path):
    sf.write(tmp_path / "x.flac", noise(2.0), RATE)
    assert probe(tmp_path / "x.flac") == AudioInfo("FLAC PCM_16", 2, RATE, 2.0)
    with pytest.raises(Rejected, match="no such file"):
        probe(tmp_path / "none.flac")


def bad_file(path: Path, kind: str) -> None:
    wav = noise()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "text":
        path.write_text("this is no music\n" * 50)
    elif kind in ("nan", "inf"):
        wav[30_000, 1] = float(kind)
        sf.write(path, wav, RATE, subtype="FLOAT", format="WAV")
    elif kind == "no samples":
        sf.write(path, np.zeros((0, 2)), RATE, format="WAV")
    elif kind.startswith("half "):
        made = path.with_name(f"whole.{kind[5:]}")
        sf.write(made, wav, RATE)
        path.write_bytes(made.read_bytes()[: made.stat().st_size // 2])


@pytest.mark.parametrize(
    ("kind", "why", "words"),
    [
        ("missing", "missing", "no such file"),
        ("empty", "unreadable", "is empty"),
        ("folder", "unreadable", "is a folder"),
        ("fifo", "unreadable", "not a regular file"),
        ("socket", "unreadable", "cannot be opened"),
        ("device", "unreadable", "not a regular file"),
        ("loop", "unreadable", "cannot be opened"),
        ("text", "unreadable", "not audio|does not read its format"),
        ("nan", "unreadable", "NaN"),
        ("inf", "unreadable", "infinite"),
        ("no samples", "unreadable", "no samples"),
        ("half wav", "unreadable", "cut short"),
        ("half flac", "unreadable", "damaged"),
        ("half mp3", "unreadable", "cut short"),
        ("half aiff", "unreadable", "cut short"),
        ("half w64", "unreadable", "cut short"),
        ("half caf", "unreadable", "cut short"),
        ("half au", "unreadable", "cut short"),
        ("half rf64", "unreadable", "cut short"),
    ],
)
def test_decoder_rejects_bad_files_with_reason(tmp_path, decoder, kind, why, words):
    bad_file(tmp_path / "song.mp3", kind)
    rejection = rejected(decoder, tmp_path / "song.mp3")
    assert rejection.kind == why
    assert re.search(words, rejection.reason), rejection.reason


def test_decoder_reads_streams_of_unknown_length(tmp_path, decoder):
    """A size of 0xFFFFFFFF, as programs write into a pipe; a FLAC header without a number of samples."""
    path = tmp_path / "x.wav"
    sf.write(path, noise(), RATE)
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    assert whole(decoder, path)[0].shape == (2, RATE)
    sf.write(tmp_path / "x.flac", noise(), RATE)
    data = bytearray((tmp_path / "x.flac").read_bytes())
    data[21] &= 0xF0  # STREAMINFO: 36 bits of total samples
    data[22:26] = bytes(4)
    (tmp_path / "x.flac").write_bytes(data)
    assert whole(decoder, tmp_path / "x.flac")[0].shape == (2, RATE)


@pytest.mark.parametrize("suffix", ["flac", "wav", "aiff", "mp3"])
def test_decoder_ignores_tag_after_audio(tmp_path, decoder, suffix):
    path = tmp_path / f"x.{suffix}"
    sf.write(path, noise(4.0), RATE)
    before = whole(decoder, path)[0]
    path.write_bytes(path.read_bytes() + b"TAG" + b"title".ljust(125))
    assert np.array_equal(whole(decoder, path)[0], before)


@needs_ffmpeg
@pytest.mark.parametrize(
    "how", [["-c:a", "flac", "x.oga"], ["-c:a", "libmp3lame", "-f", "wav", "mp3.wav"], ["-c:a", "adpcm_ms", "ms.wav"]]
)
def test_decoder_rare_containers_and_codecs(tmp_path, decoder, how):
    sf.write(tmp_path / "x.wav", noise(10.0), RATE)
    ffmpeg("-i", tmp_path / "x.wav", *how[:-1], tmp_path / how[-1])
    assert abs(whole(decoder, tmp_path / how[-1])[0].shape[1] / RATE - 10.0) < 0.1


@needs_ffmpeg
@pytest.mark.parametrize("tag", [["-id3v2_version", "0"], ["-metadata", f"comment={'x' * 50_000}"]])
@pytest.mark.parametrize("loud_first", [False, True])
def test_decoder_vbr_mp3_without_length(tmp_path, decoder, tag, loud_first):
    """libsndfile alone guesses from the first frames: it would leave most out, or call it cut short."""
    parts = [noise(4.0), np.zeros((4 * RATE, 2), np.float32)]
    sf.write(tmp_path / "x.wav", np.concatenate(parts if loud_first else parts[::-1]), RATE)
    ffmpeg("-i", tmp_path / "x.wav", "-c:a", "libmp3lame", "-q:a", "4", "-write_xing", "0", *tag, tmp_path / "x.mp3")
    wav, rate = whole(decoder, tmp_path / "x.mp3")
    assert abs(wav.shape[1] / rate - 8.0) < 0.1
    halves = [float(np.abs(half).mean()) for half in (wav[:, : 3 * RATE], wav[:, 5 * RATE :])]
    assert max(halves) > 0.1 and min(halves) < 1e-3 and (halves[0] > halves[1]) == loud_first
    assert decoder.probe(tmp_path / "x.mp3").seconds is None
    next(decoder.blocks(tmp_path / "x.mp3"))
    soon(lambda: len(os.listdir(f"/proc/{decoder.pid}/task")) == 1)  # the one that filled a pipe ends


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_bytes=1000), "larger than 1000 bytes"),
        (Limits(max_seconds=1.5), "longer than 1.5 s"),
        (Limits(max_channels=1), "2 channels"),
        (Limits(rates=(1000, 44_000)), "44100 Hz"),
        (Limits(rates=(44_200, 96_000)), "44100 Hz"),
    ],
)
def test_decoder_limits(tmp_path, limits, words):
    sf.write(tmp_path / "x.flac", noise(2.0), RATE)
    with Decoder(limits) as decoder:
        rejection = rejected(decoder, tmp_path / "x.flac")
    assert rejection.kind == "limit" and words in rejection.reason


def test_decoder_reads_files_just_within_limits(tmp_path):
    sf.write(tmp_path / "x.flac", noise(2.0), RATE)
    limits = Limits((tmp_path / "x.flac").stat().st_size, 2.0, max_channels=2, rates=(RATE, RATE))
    with Decoder(limits) as decoder:
        assert whole(decoder, tmp_path / "x.flac")[0].shape == (2, 2 * RATE)


def test_decoder_crash_is_rejection_and_next_file_is_read(tmp_path):
    sf.write(tmp_path / "x.wav", noise(10.0), RATE)
    with Decoder() as decoder:
        blocks = decoder.blocks(tmp_path / "x.wav")
        next(blocks)
        os.kill(decoder.pid, signal.SIGSEGV)
        with pytest.raises(Rejected, match=r"the decoder crashed \(signal 11\)") as caught:
            list(blocks)
        assert caught.value.kind == "unreadable"
        assert whole(decoder, tmp_path / "x.wav")[0].shape == (2, 10 * RATE)
        os.kill(decoder.pid, signal.SIGKILL)  # while it is idle
        assert whole(decoder, tmp_path / "x.wav")[0].shape == (2, 10 * RATE)


def test_decoder_hang_ends_at_wall_limit(tmp_path):
    sf.write(tmp_path / "x.wav", noise(10.0), RATE)
    with Decoder(Limits(wall_seconds=1.5)) as decoder:
        blocks = decoder.blocks(tmp_path / "x.wav")
        next(blocks)
        pid = decoder.pid
        os.kill(pid, signal.SIGSTOP)  # for ever
        with pytest.raises(Rejected, match=r"longer than 1\.5 s") as caught:
            list(blocks)
        assert caught.value.kind == "limit" and not alive(pid)
        assert whole(decoder, tmp_path / "x.wav")[0].shape == (2, 10 * RATE)


def test_decoder_wall_limit_covers_all_blocks(tmp_path):
    sf.write(tmp_path / "x.wav", noise(20.0), RATE)
    with Decoder(Limits(wall_seconds=1.5)) as decoder:
        blocks = decoder.blocks(tmp_path / "x.wav")
        next(blocks)
        pid = decoder.pid

        def wake() -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        with pytest.raises(Rejected, match=r"longer than 1\.5 s"):
            for _ in range(3):
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(0.9, wake).start()
                next(blocks)


def test_decoder_wall_limit_excludes_caller(tmp_path):
    sf.write(tmp_path / "x.wav", noise(10.0), RATE)
    with Decoder(Limits(wall_seconds=1.5)) as decoder:
        for _ in decoder.blocks(tmp_path / "x.wav"):
            time.sleep(0.6)


def test_decoder_rejects_file_changed_while_read(tmp_path, decoder):
    sf.write(tmp_path / "x.wav", noise(10.0), RATE)
    blocks = decoder.blocks(tmp_path / "x.wav")
    next(blocks)
    with open(tmp_path / "x.wav", "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(Rejected, match=r"cut short|changed while"):
        list(blocks)
    sf.write(tmp_path / "x.wav", noise(10.0), RATE)
    blocks = decoder.blocks(tmp_path / "x.wav")
    next(blocks)
    (tmp_path / "x.wav").open("ab").write(b"more")
    with pytest.raises(Rejected, match="changed while"):
        list(blocks)


def test_decoder_restarts_child_after_bad_file(tmp_path):
    sf.write(tmp_path / "x.wav", noise(10.0), RATE)
    (tmp_path / "bad.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt " + bytes(100))
    with Decoder() as decoder:
        whole(decoder, tmp_path / "x.wav")
        pid = decoder.pid
        next(decoder.blocks(tmp_path / "x.wav"))  # the rest is not wanted
        whole(decoder, tmp_path / "x.wav")
        rejected(decoder, tmp_path / "none.wav")
        assert decoder.pid == pid
        assert len(os.listdir(f"/proc/{pid}/fd")) < 8  # nothing stays open
        rejected(decoder, tmp_path / "bad.wav")
        whole(decoder, tmp_path / "x.wav")
        assert decoder.pid != pid and not alive(pid)
        last = decoder.pid
    assert not alive(last)


def test_decoder_two_files_at_once_raise_runtime_error(tmp_path, decoder):
    sf.write(tmp_path / "x.wav", noise(10.0), RATE)
    blocks = decoder.blocks(tmp_path / "x.wav")
    next(blocks)
    with pytest.raises(RuntimeError, match="one file at a time"):
        next(decoder.blocks(tmp_path / "x.wav"))
    assert sum(block.shape[1] for block, _ in blocks) < 10 * RATE


PARENT = """
import sys, time
from pathlib import Path
from data_prep.audio.decode import Decoder
decoder = Decoder()
blocks = decoder.blocks(Path(sys.argv[1]))
next(blocks)
print(decoder.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("suffix", ["wav", pytest.param("m4a", marks=needs_ffmpeg)])
def test_decoder_child_dies_with_parent(tmp_path, suffix):
    sf.write(tmp_path / "x.wav", noise(100.0), RATE)
    if suffix == "m4a":
        ffmpeg("-i", tmp_path / "x.wav", "-c:a", "alac", tmp_path / "x.m4a")
    command = [sys.executable, "-c", PARENT, tmp_path / f"x.{suffix}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(parent.stdout.readline())]
        pids += map(int, Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split())
        assert len(pids) == (2 if suffix == "m4a" else 1) and all(map(alive, pids))
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    soon(lambda: not any(map(alive, pids)))


@needs_ffmpeg
def test_decoder_ffmpeg_ends_when_caller_stops(tmp_path, decoder):
    sf.write(tmp_path / "x.wav", noise(100.0), RATE)
    ffmpeg("-i", tmp_path / "x.wav", "-c:a", "alac", tmp_path / "x.m4a")
    blocks = decoder.blocks(tmp_path / "x.m4a")
    next(blocks)
    (pid,) = map(int, Path(f"/proc/{decoder.pid}/task/{decoder.pid}/children").read_text().split())
    blocks.close()
    soon(lambda: not Path(f"/proc/{decoder.pid}/task/{decoder.pid}/children").read_text())
    assert not alive(pid)


def test_decoder_imports_no_torch():
    code = "import sys, data_prep.audio.decode, data_prep.paths; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("suffix", ["mp3", "ogg", "flac", "wav", "aiff"])
def test_decoder_rejects_joined_files(tmp_path, decoder, suffix):
    """Decoders stop at the end of the first."""
    path = tmp_path / f"x.{suffix}"
    sf.write(path, noise(2.0), RATE)
    path.write_bytes(2 * path.read_bytes())
    assert re.search("holds (several|a second)", rejected(decoder, path).reason)


@needs_ffmpeg
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("wv", []), ("wv", ["-ac", "6"]), ("mka", ["-c:a", "flac"]), ("mka", ["-c:a", "flac", "-live", "1"]), ("webm", []),
     ("caf", ["-c:a", "pcm_s16be"]), ("tta", []), ("m4a", []), ("wma", []), ("voc", [])],
)  # fmt: skip
def test_decoder_rejects_joined_files_of_other_formats(tmp_path, decoder, suffix, options):
    sf.write(tmp_path / "x.wav", noise(2.0), RATE)
    path = tmp_path / f"x.{suffix}"
    ffmpeg("-i", tmp_path / "x.wav", *options, path)
    assert abs(sum(block.shape[1] / rate for block, rate in decoder.blocks(path)) - 2.0) < 0.1
    path.write_bytes(2 * path.read_bytes())
    assert re.search("holds several", rejected(decoder, path).reason)


def test_joined_ape_files_are_found():
    """No encoder is at hand: only the beginning of such a file."""
    beginning = b"MAC \x96\x0f\0\0\x34\0\0\0\x18\0\0\0" + bytes(5000)
    assert left_out(io.BytesIO(beginning), len(beginning)) == ""
    assert left_out(io.BytesIO(2 * beginning), 2 * len(beginning)) == "holds several APE files in a row"


@pytest.mark.parametrize(("stated", "reason"), [(RATE, "states too short"), (9 * RATE, "cut short")])
def test_decoder_rejects_caf_of_another_length_than_stated(tmp_path, decoder, stated, reason):
    path = tmp_path / "x.caf"
    sf.write(path, noise(2.0), RATE, format="CAF")
    assert whole(decoder, path)[0].shape[1] == 2 * RATE
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 8] = stated.to_bytes(8, "big")
    path.write_bytes(data)
    assert reason in rejected(decoder, path).reason


@needs_ffmpeg
@pytest.mark.parametrize("first", [["-write_xing", "0"], ["-write_xing", "1"]])
def test_decoder_joined_mp3_without_tag_is_whole_or_rejected(tmp_path, decoder, first):
    sf.write(tmp_path / "x.wav", noise(4.0), RATE)
    ffmpeg("-i", tmp_path / "x.wav", *first, tmp_path / "a.mp3")
    ffmpeg("-i", tmp_path / "x.wav", "-write_xing", "0", tmp_path / "b.mp3")
    (tmp_path / "x.mp3").write_bytes((tmp_path / "a.mp3").read_bytes() + (tmp_path / "b.mp3").read_bytes())
    if first[1] == "0":
        assert abs(whole(decoder, tmp_path / "x.mp3")[0].shape[1] / RATE - 8.0) < 0.2
    else:
        assert "where decoders stop" in rejected(decoder, tmp_path / "x.mp3").reason
