"""Audio files: every format there and back, every bad file one clear line, resampling, loudness."""

import errno
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import torch

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.files import DiskFull

RATE = 24000


def tone(seconds: float = 1.0, rate: int = RATE, hertz: float = 440.0, channels: int = 1) -> torch.Tensor:
    time = torch.arange(round(seconds * rate)) / rate
    return (0.5 * torch.sin(2 * math.pi * hertz * time)).expand(channels, -1).clone()


@pytest.mark.parametrize(("suffix", "error"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05)])
@pytest.mark.parametrize("channels", [1, 2])
def test_roundtrip(tmp_path, suffix, error, channels):
    wav = tone(2.0, channels=channels)
    path = audio.write(tmp_path / f"x.{suffix}", wav, RATE)
    back, rate = audio.read(path, mono=False)
    assert rate == RATE and back.shape == wav.shape and back.dtype == torch.float32
    assert float((back - wav)[:, 2000:-2000].abs().max()) < error
    assert [file.name for file in tmp_path.iterdir()] == [f"x.{suffix}"]


def test_long_vorbis_is_written_in_blocks(tmp_path):
    wav = tone(60.0, 44100, channels=2)
    assert audio.read(audio.write(tmp_path / "x.ogg", wav, 44100), mono=False)[0].shape == wav.shape


def test_one_dimension_and_clipping(tmp_path, caplog):
    path = audio.write(tmp_path / "x.wav", torch.tensor([0.0, 2.0, -3.0, 0.5]), RATE)
    assert torch.allclose(audio.read(path)[0], torch.tensor([[0.0, 1.0, -1.0, 0.5]]), atol=1e-4)
    assert "clipped" in caplog.text


def test_sixteen_bit_samples_and_comment_are_kept(tmp_path):
    pcm = torch.tensor([[0, 1, -1, 32767, -32768, 12345]], dtype=torch.int16)
    path = audio.write(tmp_path / "x.flac", pcm, RATE, "seven words")
    assert torch.equal((audio.read(path)[0] * 32768).to(torch.int16), pcm)
    assert audio.read_comment(path) == "seven words" and audio.read_comment(tmp_path / "none") == ""


def test_mixdown_of_eight_channels_at_8_khz(tmp_path):
    channels = torch.linspace(-0.4, 0.5, 8)[:, None] * torch.ones(8, 8000)
    sf.write(tmp_path / "x.wav", channels.T.numpy(), 8000)
    wav, rate = audio.read(tmp_path / "x.wav", RATE)
    assert rate == RATE and wav.shape == (1, RATE)
    assert torch.allclose(wav[:, 500:-500], torch.tensor(0.05), atol=1e-3)


@pytest.mark.parametrize("to", [8000, 16000, 44100, 48000])
def test_resampling_keeps_a_tone_and_stops_aliases(to):
    made = audio.resample(tone(1.0, RATE, 1000.0), RATE, to)
    assert made.shape == (1, to)
    middle = slice(to // 10, -to // 10)
    assert float((made - tone(1.0, to, 1000.0))[:, middle].abs().max()) < 2e-3
    alias = audio.resample(tone(1.0, RATE, 7000.0), RATE, 8000)
    assert float(alias[:, 800:-800].abs().max()) < 1e-3


def test_resampling_any_shape_and_length():
    made = audio.resample(torch.randn(2, 3, 1001), RATE, 16000)
    assert made.shape == (2, 3, math.ceil(1001 * 16000 / RATE))
    assert audio.resample(tone(), RATE, RATE).shape == (1, RATE)


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_segments_in_a_stream_equal_the_whole(tmp_path, rate, monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK", 5000)
    path = audio.write(tmp_path / "x.wav", 0.3 * torch.randn(2, round(3.3 * rate)).clamp(-1, 1), rate)
    pieces = list(audio.read_segments(path, RATE, 1.0))
    assert [piece.shape[1] for piece in pieces[:3]] == [RATE] * 3 and abs(pieces[3].shape[1] - 0.3 * RATE) <= 1
    whole = audio.read(path, RATE)[0]
    joined = torch.cat(pieces, dim=1)
    assert float((joined - whole[:, : joined.shape[1]]).abs().max()) < 1e-4


def write_lying_wav(path, declared: int) -> None:
    sf.write(path, tone()[0].numpy(), RATE, format="WAV")
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", declared)
    path.write_bytes(data)


def bad_file(path, kind: str) -> None:
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is no music\n" * 50)
    elif kind == "no samples":
        sf.write(path, np.zeros(0), RATE, format="WAV")
    elif kind in ("nan", "inf"):
        noise[7] = float(kind)
        sf.write(path, noise, RATE, subtype="FLOAT", format="WAV")
    elif kind == "lying":
        write_lying_wav(path, 10**8)
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("half "):
        whole = path.with_name(f"whole.{kind[5:]}")
        sf.write(whole, noise, RATE)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "there is no file"),
        ("empty", "is empty"),
        ("text", "no audio that can be read"),
        ("no samples", "holds no samples"),
        ("nan", "NaN"),
        ("inf", "infinite"),
        ("lying", "its header tells of 100000000 bytes of sound, 48000 are there"),
        ("folder", "is a folder"),
        ("half flac", "damaged"),
        ("half wav", "cut short"),
        ("half mp3", "cut short"),
        ("half ogg", "holds no samples"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, kind, words):
    path = tmp_path / "song.mp3"
    bad_file(path, kind)
    with pytest.raises(UserError, match=words) as caught:
        audio.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_wav_from_a_pipe_has_no_length(tmp_path):
    write_lying_wav(tmp_path / "x.wav", 0xFFFFFFFF)
    assert audio.read(tmp_path / "x.wav")[0].shape == (1, RATE)


@pytest.mark.parametrize(
    ("name", "wav", "rate", "words"),
    [
        ("x.aac", tone(), RATE, "must be one of wav, flac, ogg, mp3"),
        ("x", tone(), RATE, "must be one of"),
        ("x.wav", torch.zeros(1, 0), RATE, "no audio to write"),
        ("x.wav", torch.full((1, 5), math.nan), RATE, "NaN"),
        ("x.mp3", tone(), 96000, "cannot write"),
    ],
)
def test_bad_writes(tmp_path, name, wav, rate, words):
    with pytest.raises(UserError, match=words):
        audio.write(tmp_path / name, wav, rate)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = audio.write(tmp_path / "x.wav", tone(), RATE)
    before = path.read_bytes()

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(DiskFull, match="disk is full"):
        audio.write(path, tone(hertz=200), RATE)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_loudness_of_the_standards_tone():
    """BS.1770-4: a 997 Hz sine of 0 dBFS in one channel measures -3.01 LUFS."""
    sine = tone(3.0, 48000, 997.0) * 2
    assert audio.loudness(sine, 48000) == pytest.approx(-3.01, abs=0.05)
    assert audio.loudness(sine * 0.1, 48000) == pytest.approx(-23.01, abs=0.05)
    assert audio.loudness(torch.zeros(1, 48000), 48000) == -math.inf
    assert math.isfinite(audio.loudness(sine[:, :1000], 48000))


def test_normalise():
    quiet = tone(2.0, RATE, 997.0) * 0.01
    assert audio.loudness(audio.normalise(quiet, RATE, -20.0), RATE) == pytest.approx(-20.0, abs=0.1)
    assert float(audio.normalise(quiet, RATE, 6.0).abs().max()) == pytest.approx(1.0)
    assert not audio.normalise(torch.zeros(1, RATE), RATE, -20.0).any()


def test_imports_are_light():
    heavy = "{'transformers', 'torchaudio', 'pyloudnorm', 'soxr'}"
    code = f"import sys, ssmttm.audio, ssmttm.data, ssmttm.text; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
