"""Hostile audio files and paths: each is rejected with a reason or decoded, within limits of time and memory.

The decoder has 512 MiB of address space and 60 s per file.
"""

import http.server
import io
import os
import struct
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_decode import mutated, samples, valid_files
from data_prep.audio import decoder_process
from data_prep.audio.decode import Decoder, Limits
from data_prep.paths import inside
from data_prep.track import KINDS, Rejected

RATE = 44_100
LIMITS = Limits(wall_seconds=60, memory_bytes=512 << 20)
needs_ffmpeg = pytest.mark.skipif(decoder_process._ffmpeg() is None, reason="needs FFmpeg")


@pytest.fixture(scope="module")
def decoder():
    with Decoder(LIMITS) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    return valid_files(tmp_path_factory.mktemp("valid"))


def attack(decoder: Decoder, path: Path, max_seconds: float = 45.0) -> Rejected | float:
    """Decode a file: the rejection, or the seconds of audio."""
    start, frames, rate = time.monotonic(), 0, 1
    try:
        for block, rate in decoder.blocks(path):  # noqa: B007
            assert block.size <= 1 << 18 and np.isfinite(block).all()
            frames += block.shape[1]
    except Rejected as rejection:
        assert rejection.kind in KINDS and rejection.reason
        assert "\n" not in rejection.reason and len(rejection.reason) < 200
        return rejection
    finally:
        assert time.monotonic() - start < max_seconds
    return frames / rate


def patched(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def flac_with(data: bytes, *, rate: int = RATE, channels: int = 2, total: int = 0) -> bytes:
    """Replace STREAMINFO's 20 bits of rate, 3 of channels, 5 of sample size, 36 of length."""
    return patched(data, 18, struct.pack(">Q", rate << 44 | (channels - 1) << 41 | 15 << 36 | total))


WRONG_HEADERS = {
    "wav: 4 GB of audio": lambda f: patched(f["x.wav"], f["x.wav"].index(b"data") + 4, b"\xfe\xff\xff\xff"),
    "wav: 65535 channels": lambda f: patched(f["x.wav"], 22, b"\xff\xff"),
    "wav: 64 channels": lambda f: patched(patched(f["x.wav"], 22, b"\x40\0"), 32, b"\x80\0"),
    "wav: no channels": lambda f: patched(f["x.wav"], 22, b"\0\0"),
    "wav: 4 GHz": lambda f: patched(f["x.wav"], 24, b"\xff\xff\xff\xff"),
    "wav: 0 Hz": lambda f: patched(f["x.wav"], 24, b"\0\0\0\0"),
    "wav: 1 Hz": lambda f: patched(f["x.wav"], 24, b"\x01\0\0\0"),
    "wav: 65535 bits": lambda f: patched(f["x.wav"], 34, b"\xff\xff"),
    "wav: a chunk of 4 GB before the audio": lambda f: patched(f["x.wav"], 16, b"\xff\xff\xff\xff"),
    "flac: 2**36 samples": lambda f: flac_with(f["x.flac"], total=(1 << 36) - 1),
    "flac: a day": lambda f: flac_with(f["x.flac"], total=86_400 * RATE),
    "flac: an hour": lambda f: flac_with(f["x.flac"], total=3600 * RATE),
    "flac: 1 sample more": lambda f: flac_with(f["x.flac"], total=len(samples()) + 1),
    "flac: 8 channels": lambda f: flac_with(f["x.flac"], channels=8, total=len(samples())),
    "flac: 1 Hz": lambda f: flac_with(f["x.flac"], rate=1, total=len(samples())),
    "flac: 655350 Hz": lambda f: flac_with(f["x.flac"], rate=655_350, total=len(samples())),
    "aiff: 4 GB of audio": lambda f: patched(f["x.aiff"], f["x.aiff"].index(b"SSND") + 4, b"\xff\xff\xff\xfe"),
    "aiff: infinite rate": lambda f: patched(f["x.aiff"], f["x.aiff"].index(b"COMM") + 16, b"\x7f\xff" + b"\xff" * 8),
    "aiff: 65535 channels": lambda f: patched(f["x.aiff"], f["x.aiff"].index(b"COMM") + 8, b"\xff\xff"),
    "w64: 2**62 bytes": lambda f: patched(f["x.w64"], f["x.w64"].index(b"data") + 16, b"\0" * 7 + b"\x40"),
    "au: 4 GB of audio": lambda f: patched(f["x.au"], 8, b"\xff\xff\xff\xfe"),
    "caf: 2**62 bytes": lambda f: patched(f["x.caf"], f["x.caf"].index(b"data") + 4, b"\x40" + b"\0" * 7),
    "ogg: cut": lambda f: f["x.ogg"][: len(f["x.ogg"]) // 2],
    "mp3: cut": lambda f: f["x.mp3"][: len(f["x.mp3"]) // 2],
    "text named as audio": lambda f: b"\xff\xfbthis is no music\n" * 100,
    "a zip named as audio": lambda f: b"PK\x03\x04" + bytes(10_000),
    "a picture named as audio": lambda f: b"\x89PNG\r\n\x1a\n" + bytes(10_000),
    "a Matlab file named as audio": lambda f: matlab(),
}


def matlab() -> bytes:
    file = io.BytesIO()
    sf.write(file, samples(), RATE, format="MAT5", subtype="PCM_16")
    return file.getvalue()


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_wrong_headers_are_rejected(tmp_path, decoder, files, name):
    (tmp_path / "x.mp3").write_bytes(WRONG_HEADERS[name](files))
    outcome = attack(decoder, tmp_path / "x.mp3")
    assert isinstance(outcome, Rejected) and outcome.kind in ("unreadable", "limit")


def test_wrong_frame_count_of_aiff_is_ignored(tmp_path, decoder, files):
    """AIFF's COMM chunk states more frames than SSND has."""
    data = files["x.aiff"]
    (tmp_path / "x.aiff").write_bytes(patched(data, data.index(b"COMM") + 10, b"\xff\xff\xff\xff"))
    assert attack(decoder, tmp_path / "x.aiff") == len(samples()) / RATE


@pytest.mark.parametrize("length", ["stated", "unstated"])
def test_long_silence_ends_at_the_limit_of_seconds(tmp_path, length):
    """Five hours of silence in 0.3 MB; without a length in the header the samples are counted."""
    path = tmp_path / "x.flac"
    with sf.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(300):
            file.write(np.zeros(8000 * 60, np.int16))
    assert path.stat().st_size < 1_000_000
    if length == "unstated":
        data = path.read_bytes()
        path.write_bytes(flac_with(data, rate=8000, channels=1))
    with Decoder(LIMITS) as decoder:
        rejection = attack(decoder, path)
        assert isinstance(rejection, Rejected) and rejection.reason == "it lasts longer than 14400 s"


@pytest.mark.parametrize("name", ["x.ogg", "opus.ogg", "x.mp3", pytest.param("x.m4a", marks=needs_ffmpeg), "x.wav"])
def test_every_format_obeys_the_limit_of_seconds(tmp_path, files, name):
    (tmp_path / name).write_bytes(files[name])
    with Decoder(Limits(max_seconds=0.5)) as decoder:
        rejection = attack(decoder, tmp_path / name)
    assert isinstance(rejection, Rejected) and rejection.kind == "limit" and "longer than 0.5 s" in rejection.reason


def test_endless_wav_is_rejected(tmp_path, decoder, files):
    """The header of a pipe and 4 GB of zeros (a sparse file)."""
    path = tmp_path / "x.wav"
    place = files["x.wav"].index(b"data") + 4
    path.write_bytes(patched(files["x.wav"], place, b"\xff\xff\xff\xff")[: place + 4])
    with open(path, "r+b") as file:
        file.truncate(LIMITS.max_bytes)
    rejection = attack(decoder, path)
    assert isinstance(rejection, Rejected) and rejection.kind == "limit"
    with open(path, "r+b") as file:
        file.truncate(LIMITS.max_bytes + 1)
    rejection = attack(decoder, path, 20)
    assert isinstance(rejection, Rejected) and rejection.reason == f"it is larger than {LIMITS.max_bytes} bytes"


def id3(size: int) -> bytes:
    return b"ID3\x04\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0))


def big_tag(path: Path, files: dict[str, bytes], kind: str) -> None:
    """Write a valid file with 95 MB or more of tags, mostly a hole in a sparse file."""
    hundred = 100 << 20
    with open(path, "wb") as file:
        if kind == "id3":
            file.write(id3(hundred))
            file.seek(hundred, 1)
            file.write(files["x.mp3"])
        elif kind == "id3 in id3":
            file.write((id3(10) + bytes(10)) * 100_000 + files["x.mp3"])
        elif kind == "wav list":
            file.write(files["x.wav"][:12] + b"LIST" + struct.pack("<I", hundred) + b"INFOIART" + bytes(4))
            file.seek(hundred - 12, 1)
            file.write(files["x.wav"][12:])
        elif kind == "flac pictures":
            data = files["x.flac"]
            size = (1 << 24) - 1 - 41
            picture = struct.pack(">II9s6I", 3, 9, b"image/png", 0, 1, 1, 24, 0, size)
            file.write(data[:4] + bytes([data[4] & 0x7F]) + data[5:42])
            for _ in range(7):
                file.write(b"\x06\xff\xff\xff" + picture)
                file.seek((1 << 24) - 1 - len(picture), 1)
            file.write(data[42:])
        elif kind == "flac paddings":
            data = files["x.flac"]
            file.write(data[:42] + (b"\x01\0\0\0") * 1_000_000 + data[42:])


@pytest.mark.parametrize("kind", ["id3", "id3 in id3", "wav list", "flac pictures", "flac paddings"])
def test_tags_of_100_mb_are_skipped(tmp_path, decoder, files, kind):
    big_tag(tmp_path / "x", files, kind)
    assert attack(decoder, tmp_path / "x") == len(samples()) / RATE


def test_vorbis_comment_beyond_memory_is_rejected(tmp_path, files):
    """libvorbis may crash; the next file is decoded."""
    with sf.SoundFile(tmp_path / "big.ogg", "w", RATE, 2, "VORBIS") as file:
        file.comment = "x" * 20_000_000
        file.write(samples())
    (tmp_path / "x.ogg").write_bytes(files["x.ogg"])
    with Decoder(Limits(wall_seconds=20, memory_bytes=128 << 20)) as decoder:
        assert isinstance(attack(decoder, tmp_path / "big.ogg"), Rejected)
        assert attack(decoder, tmp_path / "x.ogg") == len(samples()) / RATE


@needs_ffmpeg
def test_table_beyond_memory_of_ffmpeg_is_rejected(tmp_path, decoder, files):
    data = files["x.m4a"]
    (tmp_path / "x.m4a").write_bytes(patched(data, data.index(b"stts") + 8, b"\x7f\xff\xff\xff"))
    rejection = attack(decoder, tmp_path / "x.m4a")
    assert isinstance(rejection, Rejected) and (rejection.kind, "memory" in rejection.reason) == ("limit", True)


@pytest.fixture
def server():
    """A local web server; `server.requests` lists the requested paths."""

    class Song(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.requests.append(self.path)  # type: ignore[attr-defined]
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Song) as server:
        server.requests = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
    "hls master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
    "m3u": "{target}\n",
    "concat": "ffconcat version 1.0\nfile '{target}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1" bandwidth="1">'
    "<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "pls": "[playlist]\nFile1={target}\nNumberOfEntries=1\nVersion=2\n",
    "asx": '<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
    "asf redirect": "[Reference]\nRef1={target}\n",
    "avisynth": 'WavSource("{target}")\n',
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_not_followed(tmp_path, decoder, files, server, kind):
    (tmp_path / "secret.wav").write_bytes(files["x.wav"])
    address = f"http://127.0.0.1:{server.server_port}/song.mp3"
    for target in (address, f"file://{tmp_path}/secret.wav", f"{tmp_path}/secret.wav", "secret.wav"):
        for name in ("x.mp3", "x.m4a") if kind == "hls" else ("x.mp3",):
            (tmp_path / name).write_text(PLAYLISTS[kind].format(target=target))
            rejection = attack(decoder, tmp_path / name)
            assert isinstance(rejection, Rejected) and rejection.kind == "unreadable"
    assert not server.requests
    assert len(os.listdir(f"/proc/{decoder.pid}/fd")) < 8  # no file stays open


@needs_ffmpeg
def test_many_error_messages_do_not_block_ffmpeg(tmp_path, decoder):
    sf.write(tmp_path / "x.wav", samples(60.0), RATE)
    command = [decoder_process._ffmpeg(), "-v", "error", "-i", tmp_path / "x.wav", tmp_path / "x.aac"]
    subprocess.run(command, check=True, timeout=60)
    data = bytearray((tmp_path / "x.aac").read_bytes())
    for place in range(2000, len(data), 97):
        data[place] ^= 0x55
    (tmp_path / "x.aac").write_bytes(data)
    assert isinstance(attack(decoder, tmp_path / "x.aac"), Rejected)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["nut", "avi", "ts"])
def test_unlisted_containers_are_rejected(tmp_path, decoder, files, suffix):
    (tmp_path / "x.wav").write_bytes(files["x.wav"])
    command = [decoder_process._ffmpeg(), "-v", "error", "-i", tmp_path / "x.wav", tmp_path / f"x.{suffix}"]
    subprocess.run(command, check=True, timeout=60)
    assert isinstance(attack(decoder, tmp_path / f"x.{suffix}"), Rejected)


@pytest.mark.parametrize("index", range(18))
def test_mutated_files_are_rejected_or_decoded(tmp_path, decoder, files, index):
    """A few of each format; benchmarks/fuzz_decode.py runs for any time."""
    names = sorted(files)
    name = names[index % len(names)]
    rng = np.random.default_rng(index)
    for _ in range(3):
        (tmp_path / name).write_bytes(mutated(files[name], files[names[rng.integers(len(names))]], rng))
        attack(decoder, tmp_path / name)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["x.wav", "x.flac", "x.aiff", "x.mp3", "x.ogg"]),
    edits=st.lists(st.tuples(st.integers(0, 120), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_edited_headers_are_rejected_or_decoded(tmp_path, decoder, files, name, edits):
    data = files[name]
    for place, new in edits:
        data = patched(data, place, new)
    (tmp_path / name).write_bytes(data)
    attack(decoder, tmp_path / name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["x.wav", "x.flac", "x.aiff", "x.w64", "x.au", "x.rf64"]), fraction=st.floats(0, 1))
def test_truncated_files_are_rejected(tmp_path, decoder, files, name, fraction):
    data = files[name]
    (tmp_path / name).write_bytes(data[: round(fraction * (len(data) - 4))])
    assert isinstance(attack(decoder, tmp_path / name), Rejected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=3000))
def test_noise_is_rejected_or_decoded(tmp_path, decoder, data):
    (tmp_path / "x").write_bytes(data)
    attack(decoder, tmp_path / "x")


# Paths


@pytest.fixture
def root(tmp_path):
    (tmp_path / "outside.wav").touch()
    root = tmp_path / "root"
    (root / "album").mkdir(parents=True)
    (root / "album" / "song.wav").touch()
    (root / "also.wav").symlink_to("album/song.wav")
    (root / "round").symlink_to(f"../{root.name}/album")
    (root / "leaf.wav").symlink_to("../outside.wav")
    (root / "out").symlink_to("..")
    (root / "absolute").symlink_to("/etc")
    (root / "nested").symlink_to("out")
    (root / "loop").symlink_to("loop")
    return root


@pytest.mark.parametrize(
    "name",
    ["album/song.wav", "also.wav", "round/song.wav", "album/new.wav", "./album//song.wav", "...", "café – 日本.wav"],
)
def test_inside_accepts_names_in_the_root(root, name):
    assert inside(root, name) == root / name


def test_inside_accepts_a_link_as_root(root, tmp_path):
    (tmp_path / "link").symlink_to("root")
    assert inside(tmp_path / "link", "album/song.wav") == tmp_path / "link" / "album/song.wav"


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "//etc/passwd", "..", "../outside.wav", "album/../../outside.wav", "album/..", "leaf.wav",
        "out/outside.wav", "out/root2/x", "nested/outside.wav", "absolute/passwd",
    ],
)  # fmt: skip
def test_inside_rejects_names_out_of_the_root(root, name):
    with pytest.raises(Rejected) as caught:
        inside(root, name)
    assert caught.value.kind == "outside"


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "./", "a\0b", "a\nb", "a\x1b[2Jb", "a\x7f", "a\x85b", "a\u2028b", "\ud800.wav", "x" * 256, "é" * 128,
        "a/" * 2100,
    ],
)  # fmt: skip
def test_inside_rejects_invalid_names(root, name):
    with pytest.raises(Rejected) as caught:
        inside(root, name)
    assert caught.value.kind == "metadata" and caught.value.reason.isprintable()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.sampled_from(["..", ".", "", "album", "out", "nested", "absolute", "loop", "song.wav", "round", "~", "etc"])
        | st.text(max_size=5),
        max_size=6,
    )
)
def test_inside_never_returns_a_path_out_of_the_root(root, parts):
    try:
        path = inside(root, "/".join(parts))
    except Rejected as rejection:
        assert rejection.kind in ("outside", "metadata")
    else:
        assert Path(os.path.realpath(path)).is_relative_to(root.resolve())
