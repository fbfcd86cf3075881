"""Audio files: round trips of every format, errors of bad files, resampling, loudness."""

import errno
import io
import math
import struct
import subprocess
import sys

import numpy as np
import pyloudnorm
import pytest
import soundfile as sf
import torch

from ssmttm import audio
from ssmttm.audio import torchaudio_adapter
from ssmttm.audio.containers import flac
from ssmttm.errors import UserError
from ssmttm.files import DiskFull

RATE = 24000


def tone(seconds: float = 1.0, rate: int = RATE, hertz: float = 440.0, channels: int = 1) -> torch.Tensor:
    time = torch.arange(round(seconds * rate)) / rate
    return (0.5 * torch.sin(2 * math.pi * hertz * time)).expand(channels, -1).clone()


@pytest.mark.parametrize(("suffix", "error"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05)])
@pytest.mark.parametrize("channels", [1, 2])
def test_audio_round_trip(tmp_path, suffix, error, channels):
    wav = tone(2.0, channels=channels)
    path = audio.write(tmp_path / f"x.{suffix}", wav, RATE)
    back, rate = audio.read(path, mono=False)
    assert rate == RATE and back.shape == wav.shape and back.dtype == torch.float32
    assert float((back - wav)[:, 2000:-2000].abs().max()) < error
    assert [file.name for file in tmp_path.iterdir()] == [f"x.{suffix}"]


def test_write_long_vorbis_file(tmp_path):
    wav = tone(60.0, 44100, channels=2)
    assert audio.read(audio.write(tmp_path / "x.ogg", wav, 44100), mono=False)[0].shape == wav.shape


def test_write_accepts_one_dimension_and_clips(tmp_path, caplog):
    path = audio.write(tmp_path / "x.wav", torch.tensor([0.0, 2.0, -3.0, 0.5]), RATE)
    assert torch.allclose(audio.read(path)[0], torch.tensor([[0.0, 1.0, -1.0, 0.5]]), atol=1e-4)
    assert "clipped" in caplog.text


def test_write_keeps_16_bit_samples_and_comment(tmp_path):
    pcm = torch.tensor([[0, 1, -1, 32767, -32768, 12345]], dtype=torch.int16)
    path = audio.write(tmp_path / "x.flac", pcm, RATE, "seven words")
    assert torch.equal((audio.read(path)[0] * 32768).to(torch.int16), pcm)
    assert audio.read_comment(path) == "seven words" and audio.read_comment(tmp_path / "none") == ""


def test_wav_and_flac_of_float_audio_have_the_nearest_16_bit_samples(tmp_path):
    wav = 2 * torch.rand(2, RATE, generator=torch.Generator().manual_seed(0)) - 1
    wav[0, :3] = torch.tensor([1.0, -1.0, 0.6 / 32768])
    expected = (wav.double() * 32768).round().clamp(-32768, 32767)
    for suffix in ("wav", "flac"):
        path = audio.write(tmp_path / f"x.{suffix}", wav, RATE)
        samples = audio.read(path, mono=False)[0]
        assert torch.equal(samples.double() * 32768, expected), suffix
        again = audio.read(audio.write(path, samples, RATE), mono=False)[0]
        assert torch.equal(again, samples)  # reading and writing again changes nothing


def test_read_mixes_eight_channels_down_and_resamples(tmp_path):
    channels = torch.linspace(-0.4, 0.5, 8)[:, None] * torch.ones(8, 8000)
    sf.write(tmp_path / "x.wav", channels.T.numpy(), 8000)
    wav, rate = audio.read(tmp_path / "x.wav", RATE)
    assert rate == RATE and wav.shape == (1, RATE)
    assert torch.allclose(wav[:, 500:-500], torch.tensor(0.05), atol=1e-3)


@pytest.mark.parametrize("to", [8000, 16000, 44100, 48000])
def test_resample_keeps_tone_and_suppresses_aliases(to):
    resampled = audio.resample(tone(1.0, RATE, 1000.0), RATE, to)
    assert resampled.shape == (1, to)
    middle = slice(to // 10, -to // 10)
    assert float((resampled - tone(1.0, to, 1000.0))[:, middle].abs().max()) < 2e-3
    alias = audio.resample(tone(1.0, RATE, 7000.0), RATE, 8000)
    assert float(alias[:, 800:-800].abs().max()) < 1e-3


def test_resample_any_shape_and_length():
    resampled = audio.resample(torch.randn(2, 3, 1001), RATE, 16000)
    assert resampled.shape == (2, 3, math.ceil(1001 * 16000 / RATE))
    assert audio.resample(tone(), RATE, RATE).shape == (1, RATE)


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_read_segments_equals_read(tmp_path, rate, monkeypatch):
    monkeypatch.setattr("ssmttm.audio.io._BLOCK", 5000)
    path = audio.write(tmp_path / "x.wav", 0.3 * torch.randn(2, round(3.3 * rate)).clamp(-1, 1), rate)
    segments = list(audio.read_segments(path, RATE, 1.0))
    assert [segment.shape[1] for segment in segments[:3]] == [RATE] * 3 and abs(segments[3].shape[1] - 0.3 * RATE) <= 1
    whole = audio.read(path, RATE)[0]
    joined = torch.cat(segments, dim=1)
    assert float((joined - whole[:, : joined.shape[1]]).abs().max()) < 1e-4


def write_wav_with_wrong_length(path, declared: int) -> None:
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
        path.write_text("this is not audio\n" * 50)
    elif kind == "no samples":
        sf.write(path, np.zeros(0), RATE, format="WAV")
    elif kind in ("nan", "inf"):
        noise[7] = float(kind)
        sf.write(path, noise, RATE, subtype="FLOAT", format="WAV")
    elif kind == "wrong length":
        write_wav_with_wrong_length(path, 10**8)
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("half "):
        whole = path.with_name(f"whole.{kind[5:]}")
        sf.write(whole, noise, RATE)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "is empty"),
        ("text", "cannot be read as audio"),
        ("no samples", "contains no samples"),
        ("nan", "NaN"),
        ("inf", "infinite"),
        ("wrong length", "its header declares 100000000 bytes of audio, it has 48000"),
        ("folder", "is a folder"),
        ("half flac", "cannot be read as audio"),
        ("half wav", "is truncated"),
        ("half mp3", "is truncated"),
        ("half ogg", "contains no samples"),
    ],
)
def test_read_bad_file_raises_one_line_error(tmp_path, kind, message):
    path = tmp_path / "song.mp3"
    bad_file(path, kind)
    with pytest.raises(UserError, match=message) as caught:
        audio.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_read_wav_without_length_from_pipe(tmp_path):
    write_wav_with_wrong_length(tmp_path / "x.wav", 0xFFFFFFFF)
    assert audio.read(tmp_path / "x.wav")[0].shape == (1, RATE)


@pytest.mark.parametrize(
    ("name", "wav", "rate", "message"),
    [
        ("x.aac", tone(), RATE, "must be one of wav, flac, ogg, mp3"),
        ("x", tone(), RATE, "must be one of"),
        ("x.wav", torch.zeros(1, 0), RATE, "no audio to write"),
        ("x.wav", torch.full((1, 5), math.nan), RATE, "NaN"),
        ("x.mp3", tone(), 96000, "cannot write"),
    ],
)
def test_write_rejects_bad_arguments(tmp_path, name, wav, rate, message):
    with pytest.raises(UserError, match=message):
        audio.write(tmp_path / name, wav, rate)
    assert not list(tmp_path.iterdir())


def test_write_keeps_old_file_on_full_disk(tmp_path, monkeypatch):
    path = audio.write(tmp_path / "x.wav", tone(), RATE)
    before = path.read_bytes()

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(DiskFull, match="disk is full"):
        audio.write(path, tone(hertz=200), RATE)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_loudness_of_bs1770_reference_tone():
    """BS.1770-4: a 997 Hz sine of 0 dBFS in one channel measures -3.01 LUFS."""
    sine = tone(3.0, 48000, 997.0) * 2
    assert audio.integrated_loudness(sine, 48000) == pytest.approx(-3.01, abs=0.05)
    assert audio.integrated_loudness(sine * 0.1, 48000) == pytest.approx(-23.01, abs=0.05)
    assert audio.integrated_loudness(torch.zeros(1, 48000), 48000) == -math.inf
    assert math.isfinite(audio.integrated_loudness(sine[:, :1000], 48000))


@pytest.mark.parametrize("channels", range(1, 6))
@pytest.mark.parametrize("rate", [8000, RATE, 44100, 48000])
def test_loudness_equals_pyloudnorm(channels, rate):
    """With the filters of the standard (De Man); the class's default filters differ from it by up to 0.1 LU."""
    generator = torch.Generator().manual_seed(rate + channels)
    wav = 0.1 * torch.randn(channels, 5 * rate, generator=generator) * torch.rand(channels, 1, generator=generator)
    wav[:, 2 * rate : 3 * rate] *= 1e-3  # below the relative gate
    theirs = pyloudnorm.Meter(rate, filter_class="DeMan").integrated_loudness(wav.T.double().numpy())
    assert audio.integrated_loudness(wav, rate) == pytest.approx(theirs, abs=1e-3)
    default = pyloudnorm.Meter(rate).integrated_loudness(wav.T.double().numpy())
    assert audio.integrated_loudness(wav, rate) == pytest.approx(default, abs=0.1 if rate > 8000 else 1.0)


def test_loudness_rejects_six_channels():
    with pytest.raises(UserError, match="up to 5 channels, got 6"):
        audio.integrated_loudness(torch.zeros(6, RATE), RATE)


def test_normalise_loudness():
    quiet = tone(2.0, RATE, 997.0) * 0.01
    normalised = audio.normalise_loudness(quiet, RATE, -20.0)
    assert audio.integrated_loudness(normalised, RATE) == pytest.approx(-20.0, abs=0.1)
    assert float(audio.normalise_loudness(quiet, RATE, 6.0).abs().max()) == pytest.approx(1.0)
    assert not audio.normalise_loudness(torch.zeros(1, RATE), RATE, -20.0).any()


def test_audio_import_is_light():
    heavy = "{'transformers', 'torchaudio', 'pyloudnorm', 'soxr', 'scipy'}"
    code = f"import sys, ssmttm.audio, ssmttm.data, ssmttm.text; print({heavy} & {{*sys.modules}})"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "set()"


def joined(path, kind: str) -> None:
    """Two files of a second of noise each, one after the other."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((RATE, 1)).astype(np.float32)
    sf.write(path, noise, RATE, format="OGG" if kind == "ogg" else kind.upper())
    data = path.read_bytes()
    path.write_bytes(data + (b"ID3\x04\0\0\0\0\0\x05title" if kind == "flac" else b"") + data)


@pytest.mark.parametrize("kind", ["mp3", "ogg", "flac", "wav", "aiff", "au"])
def test_read_rejects_joined_files(tmp_path, kind):
    joined(tmp_path / f"x.{kind}", kind)
    with pytest.raises(UserError, match=r"holds (several|a second)"):
        audio.read(tmp_path / f"x.{kind}")


def test_read_rejects_wav_with_too_short_length(tmp_path):
    sf.write(tmp_path / "x.wav", 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    whole = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "x.wav").write_bytes(whole[:40] + struct.pack("<I", RATE) + whole[44:])
    with pytest.raises(UserError, match="states too short"):
        audio.read(tmp_path / "x.wav")
    for rest in (bytes(10_000), b"LIST" + struct.pack("<I", 8000) + bytes(8000)):
        (tmp_path / "x.wav").write_bytes(whole + rest)
        assert audio.read(tmp_path / "x.wav")[0].shape == (1, RATE)


@pytest.mark.parametrize("kind", ["flac", "24 bit", "stereo"])
@pytest.mark.parametrize("missing", [1, 3 * RATE])
def test_read_rejects_flac_with_too_few_samples_stated(tmp_path, kind, missing):
    file, subtype = tmp_path / "x.flac", "PCM_24" if kind == "24 bit" else "PCM_16"
    noise = 0.1 * np.random.default_rng(0).standard_normal((4 * RATE, 2 if kind == "stereo" else 1))
    sf.write(file, noise, RATE, subtype)
    whole = file.read_bytes()
    head = int.from_bytes(whole[21:26], "big")
    assert head % 2**36 == 4 * RATE
    file.write_bytes(whole[:21] + (head - missing).to_bytes(5, "big") + whole[26:])
    with pytest.raises(UserError, match=f"holds {4 * RATE} samples, but states {4 * RATE - missing}"):
        audio.read(file)
    for written in (whole, whole + b"TAG" + bytes(125)):
        file.write_bytes(written)
        assert audio.read(file)[0].shape == (1, 4 * RATE)


def test_read_accepts_the_end_of_a_flac_stream_whose_frames_keep_their_numbers(tmp_path):
    sf.write(tmp_path / "x.flac", 0.1 * np.random.default_rng(0).standard_normal(4 * RATE), RATE)
    whole = (tmp_path / "x.flac").read_bytes()
    block, start = int.from_bytes(whole[10:12], "big"), flac._after_metadata(io.BytesIO(whole), 4)
    places = (found.start() for found in flac._SYNC.finditer(whole, start))
    frames = [place for place in places if flac._header(whole[place : place + 64], block)]
    skipped, length = flac._header(whole[frames[5] : frames[5] + 64], block)[0], 4 * RATE
    head = bytearray(whole[:start])
    head[21:26] = (int.from_bytes(head[21:26], "big") - skipped).to_bytes(5, "big")
    (tmp_path / "x.flac").write_bytes(head + whole[frames[5] :])
    assert skipped > 0 and audio.read(tmp_path / "x.flac")[0].shape == (1, length - skipped)


# --- the extra `audio` ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torchaudio_adapter.load("torchaudio.functional")[0] is None, reason="torchaudio does not load")
def test_torchaudio_resamples_as_soxr_does():
    times = torch.arange(2 * 44100) / 44100
    wav = sum(torch.sin(2 * torch.pi * f * times) for f in (60, 440, 3000, 9000)) / 4
    theirs = torchaudio_adapter.resample(wav[None], 44100, 24000)
    ours = audio.resample(wav[None], 44100, 24000)
    assert theirs.shape == ours.shape
    assert float((theirs - ours)[:, 1000:-1000].abs().max()) < 1e-3


@pytest.mark.skipif(torchaudio_adapter.load("torchcodec.decoders")[0] is None, reason="torchcodec does not load")
def test_torchcodec_decodes_as_libsndfile_does(tmp_path):
    wav = 0.3 * torch.randn(2, RATE, generator=torch.Generator().manual_seed(0))
    file = audio.write(tmp_path / "x.flac", wav, RATE)
    found, rate, seconds = torchaudio_adapter.decode(file)
    assert rate == RATE and seconds == pytest.approx(1.0)
    torch.testing.assert_close(found, audio.read(file, mono=False)[0], rtol=0, atol=1e-6)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write packages of the extra `audio`."""
    monkeypatch.syspath_prepend(tmp_path)
    torchaudio_adapter.load.cache_clear()

    def write(name: str, code: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        (tmp_path / f"{name}-9.9.dist-info").mkdir()
        (tmp_path / f"{name}-9.9.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")

    yield write
    torchaudio_adapter.load.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("torchaudio", "torchcodec"))]:
        del sys.modules[name]


def test_package_that_does_not_load_is_passed_over(package, tmp_path):
    """A build for CUDA beside a torch for CPUs raises OSError when it is imported."""
    package("torchaudio", "raise OSError('libcudart.so.13: cannot open shared object file')")
    assert torchaudio_adapter.resample(torch.zeros(1, 100), 44100, 24000) is None
    assert "torchaudio passed over, it does not load here (libcudart.so.13: cannot" in torchaudio_adapter.describe()
    (tmp_path / "x.m4a").write_bytes(b"\0\0\0\x1cftypM4A " + bytes(5000))
    with pytest.raises(UserError, match=r"x\.m4a cannot be read as audio"):
        audio.read(tmp_path / "x.m4a")


def test_package_that_does_not_load_without_a_message_is_named_by_its_error(package):
    package("torchaudio", "raise OSError")
    assert "torchaudio passed over, it does not load here (OSError)" in torchaudio_adapter.describe()


DECODERS = """
import torch
class AudioDecoder:
    def __init__(self, path):
        self.metadata = type("", (), {"duration_seconds_from_header": 2.0})
    def get_all_samples(self):
        return type("", (), {"data": torch.full((2, SAMPLES), 0.25), "sample_rate": 24000})
"""


@pytest.mark.parametrize("seconds", [2.0, 1.5])
def test_file_unknown_to_libsndfile_is_decoded_whole_by_torchcodec(package, tmp_path, seconds):
    package("torchcodec", "")
    (tmp_path / "torchcodec/decoders.py").write_text(DECODERS.replace("SAMPLES", str(round(24000 * seconds))))
    (tmp_path / "x.m4a").write_bytes(b"\0\0\0\x1cftypM4A " + bytes(5000))
    if seconds < 2:
        with pytest.raises(UserError, match=r"x\.m4a is truncated \(1\.5 of 2\.0 s\)"):
            audio.read(tmp_path / "x.m4a")
        return
    wav, rate = audio.read(tmp_path / "x.m4a")
    assert rate == 24000 and torch.equal(wav, torch.full((1, 48000), 0.25))
    assert "torchcodec 9.9" in torchaudio_adapter.describe()


@pytest.mark.parametrize("noisy_first", [False, True])
def test_read_mp3_without_length_is_whole(tmp_path, noisy_first):
    """Its first frame, which states the length, is left out."""
    noise = 0.3 * np.random.default_rng(0).standard_normal(4 * RATE)
    parts = [noise, np.zeros(4 * RATE)] if noisy_first else [np.zeros(4 * RATE), noise]
    sf.write(tmp_path / "x.mp3", np.concatenate(parts), RATE, bitrate_mode="VARIABLE")
    data = (tmp_path / "x.mp3").read_bytes()
    assert b"Xing" in data[:64]
    (tmp_path / "x.mp3").write_bytes(data[data.index(data[:2], 4) :])
    assert abs(audio.read(tmp_path / "x.mp3")[0].shape[1] / RATE - 8.0) < 0.2
    crop, _ = audio.read_crop(tmp_path / "x.mp3", 100 * RATE, 0)
    assert abs(len(crop) / RATE - 8.0) < 0.2
    assert len(audio.read_part(tmp_path / "x.mp3", 7 * RATE, 1000)[0]) == 1000
