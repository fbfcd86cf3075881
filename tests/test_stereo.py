"""Stereo from files to stores and batches: channels in their order, levels kept, mono noticed."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from small_stores import write_audio_store

from data_prep.audio.quality import measure
from data_prep.cli import main
from data_prep.reports.report import write_report
from data_prep.stages.cut import Cut
from data_prep.stages.segments import Segments, channels_of, write_audio, write_segments
from data_prep.stages.vocals import detect_shard, remove_shard
from ssmttm import audio
from ssmttm.audio.stereo import mix_down, stereo_statistics, with_channels
from ssmttm.codecs import load_codec
from ssmttm.data import AudioLoader, Store, open_store
from ssmttm.data.audio_cache import AudioCache
from ssmttm.data.writer import StoreWriter
from ssmttm.errors import UserError

SECONDS = 4
LEVEL = 0.05  # RMS of the noise
GAINS = {"left": (1.0, 0.0), "right": (0.0, 1.0), "anti": (1.0, -1.0), "equal": (1.0, 1.0), "panned": (1.0, -0.5)}


def noise(seed: int, rate: int) -> np.ndarray:
    """Noise in bursts, [S], with nothing above 8 kHz."""
    generator = np.random.default_rng(seed)
    n = SECONDS * rate
    spectrum = np.fft.rfft(generator.standard_normal(n) * np.repeat(generator.uniform(0.3, 1, 8), -(-n // 8))[:n])
    spectrum[np.fft.rfftfreq(n, 1 / rate) > 8000] = 0
    wav = np.fft.irfft(spectrum, n)
    return (LEVEL * wav / np.sqrt(np.mean(wav**2))).astype(np.float32)


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """A file for each of GAINS at 44.1 or 48 kHz, a mono file, and one of six channels."""
    folder = tmp_path_factory.mktemp("music")
    for index, (name, gains) in enumerate(GAINS.items()):
        rate = (44_100, 48_000)[index % 2]
        sf.write(folder / f"{name}.flac", noise(index, rate)[:, None] * np.array(gains), rate, subtype="PCM_24")
    sf.write(folder / "mono.wav", noise(20, 44_100), 44_100)
    sf.write(folder / "surround.wav", np.stack([noise(30 + c, 48_000) for c in range(6)], axis=1), 48_000)
    return folder


def prepare(root: Path, out: Path, *more: str) -> Store:
    words = ["folder", "--root", str(root), "--out", str(out), "--licence", "CC0-1.0", "--workers", "1"]
    main([*words, "--segment", "4", "--codec", "none", "--text", "none", *more])
    return open_store(out)


@pytest.fixture(scope="module")
def store(music, tmp_path_factory) -> Store:
    return prepare(music, tmp_path_factory.mktemp("stereo") / "store", "--channels", "2", "--rate", "44100")


def row_of(store: Store, name: str) -> int:
    return [Path(track).stem for track in store.manifest["track"].to_pylist()].index(name)


@pytest.mark.parametrize("name", GAINS)
def test_stereo_store_keeps_order_levels_and_phase_of_the_channels(store, name):
    wav, rate = audio.read(store.audio_path(row_of(store, name)), mono=False)
    assert (rate, wav.shape) == (44_100, (2, SECONDS * 44_100))
    original = noise(list(GAINS).index(name), (44_100, 48_000)[list(GAINS).index(name) % 2])
    expected = audio.resample(torch.from_numpy(original), (44_100, 48_000)[list(GAINS).index(name) % 2], 44_100)
    for channel, gain in zip(wav, GAINS[name], strict=True):
        assert float((channel - gain * expected).abs().max()) < 2 / 32768
        if gain:
            level = 20 * np.log10(float(channel.square().mean().sqrt()) / (LEVEL * abs(gain)))
            assert abs(level) < 0.1  # dB


def test_stereo_store_says_so_and_counts_mono(store, capsys):
    assert store.channels == store.info["channels"] == 2
    columns = store.manifest.select(["track", "width", "correlation", "balance"]).to_pylist()
    found = {Path(row["track"]).stem: (row["width"], row["correlation"], row["balance"]) for row in columns}
    assert found["equal"][0] < 1e-6 and found["mono"][0] < 1e-6
    assert found["anti"] == pytest.approx((1.0, -1.0, 0.0), abs=1e-4)
    assert found["left"] == pytest.approx((0.5, 0.0, 60.0), abs=1e-3)
    assert found["right"] == pytest.approx((0.5, 0.0, -60.0), abs=1e-3)
    assert found["panned"] == pytest.approx((0.9, -1.0, 6.02), abs=1e-2)
    with open(store.path / "rejected.csv", newline="") as file:
        (rejected,) = csv.DictReader(file)
    assert (rejected["item"], rejected["kind"]) == ("surround.wav", "channels")
    assert rejected["reason"] == "it has 6 channels: mix it down to two"
    page = write_report(store, store.path / "report.html").read_text()
    assert "two equal channels (mono)" in page and "channels that cancel in mono" in page and "stereo" in page


def test_loudness_of_stereo_is_that_of_both_channels(store):
    loudness = store.manifest["loudness"].to_pylist()
    left, equal, anti = (loudness[row_of(store, name)] for name in ("left", "equal", "anti"))
    for name, value in (("left", left), ("equal", equal), ("anti", anti)):
        wav, rate = audio.read(store.audio_path(row_of(store, name)), mono=False)
        assert value == pytest.approx(audio.integrated_loudness(wav, rate), abs=0.05)
    assert equal > left + 2.5


def test_reject_dual_mono_leaves_mono_files_out_too(music, tmp_path):
    store = prepare(music, tmp_path / "s", "--channels", "2", "--reject-dual-mono")
    kept = {Path(track).stem for track in store.manifest["track"].to_pylist()}
    assert kept == GAINS.keys() - {"equal"}


def test_mono_run_is_what_it_was(music, tmp_path):
    """Neither settings nor samples of a mono store depend on the choice of channels."""
    store = prepare(music, tmp_path / "s")
    tracks = [Path(track).stem for track in store.manifest["track"].to_pylist()]
    assert sorted(tracks) == ["equal", "left", "mono", "right", "surround"]  # the others cancel
    assert store.channels == 1 and "width" not in store.manifest.column_names
    assert "channels" not in Cut(24_000).settings() and Cut(24_000, channels=2).settings()["channels"] == 2
    for name in ("left", "surround"):
        wav, rate = sf.read(next(music.glob(f"{name}.*")), dtype="float32", always_2d=True)
        expected = audio.resample(torch.from_numpy(wav.mean(axis=1)), rate, 24_000)
        columns = write_audio(tmp_path / "x.flac", expected, 24_000)
        row = tracks.index(name)
        assert store.manifest["content_hash"][row].as_py() == columns["content_hash"]
        assert audio.read(store.audio_path(row), mono=False)[0].shape[0] == 1


def test_pack_keeps_stereo_and_resumes(store, tmp_path):
    words = ["pack", "--root", str(store.path), "--out", str(tmp_path / "p"), "--codec", "none", "--text", "none"]
    main([*words, "--workers", "1"])
    packed = open_store(tmp_path / "p")
    assert packed.channels == 2 and packed.manifest["width"].equals(store.manifest["width"])
    packed.verify()
    before = (tmp_path / "p" / "store.json").read_bytes()
    main([*words, "--workers", "1"])
    assert (tmp_path / "p" / "store.json").read_bytes() == before
    with pytest.raises(UserError, match=r"source.cut.channels 2 -> None"):
        prepare(store.path.parent, store.path, "--channels", "1", "--rate", "44100")


@pytest.mark.parametrize(("channels", "codec", "words"), [
    ("2", "tiny", "codec tiny is mono, and the audio has 2 channels: use a stereo codec"),
    ("1", "tiny_stereo", "codec tiny_stereo is stereo, and the audio is mono: prepare it with --channels 2"),
])  # fmt: skip
def test_codec_of_other_channels_is_refused_before_anything_is_written(music, tmp_path, channels, codec, words):
    with pytest.raises(UserError, match=words):
        prepare(music, tmp_path / "s", "--channels", channels, "--codec", codec)
    assert not (tmp_path / "s").exists()


def test_stereo_codec_encodes_a_stereo_store_in_the_order_of_the_channels(music, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    (one / "right.flac").write_bytes((music / "right.flac").read_bytes())
    store = prepare(one, tmp_path / "s", "--channels", "2", "--codec", "tiny_stereo")
    assert store.info["codec"]["channels"] == 2 and store.info["sample_rate"] == 24_000
    assert store.codes(0).shape == (16, SECONDS * 25)
    codec = load_codec("tiny_stereo")
    store.require_codec(codec)
    left, right = codec.decode(torch.from_numpy(store.codes(0).astype(np.int64))[None])[0]
    assert 20 * np.log10(float(right.square().mean() / left.square().mean()) ** 0.5) > 20
    original = audio.read(store.audio_path(0), mono=False)[0][1:]
    alone = codec.mono.decode(codec.mono.encode(original[None]))
    assert abs(10 * np.log10(float(right.square().mean() / alone.square().mean()))) < 3  # of noise


def test_mono_codec_refuses_to_encode_a_stereo_store(store, tmp_path):
    with pytest.raises(UserError, match="codec tiny is mono, and the audio has 2 channels"):
        main(["pack", "--root", str(store.path), "--out", str(tmp_path / "p"), "--codec", "tiny", "--text", "none"])
    assert not (tmp_path / "p").exists()


def test_loader_and_cache_give_both_channels(store, tmp_path):
    loader = AudioLoader(store, "train", 2, 1000, 3)
    batch = loader.batch(0)
    assert batch["audio"].shape == (2, 2, 1000)
    for wav, name in zip(batch["audio"], batch["ids"], strict=True):
        row = store.manifest["id"].to_pylist().index(name)
        whole = audio.read(store.audio_path(row), mono=False)[0]
        assert any(torch.equal(whole[:, s : s + 1000], wav) for s in _starts(whole, wav))
    cached = AudioLoader(store, "train", 2, 1000, 3, cache=AudioCache(store, tmp_path / "cache")).batch(0)
    torch.testing.assert_close(cached["audio"], batch["audio"], rtol=0, atol=0)


def _starts(whole: torch.Tensor, crop: torch.Tensor) -> list[int]:
    """Where the crop's first samples occur."""
    return torch.nonzero((whole[:, : whole.shape[1] - 999] == crop[:, :1]).all(0))[:, 0].tolist()


def test_mono_file_in_a_stereo_store_is_a_user_error(tmp_path):
    writer = StoreWriter(tmp_path / "s", {}, None, 8000, channels=2)
    sf.write(tmp_path / "s" / "a.wav", np.zeros(8000), 8000)
    writer.add({"id": "a", "split": "train", "licence": "CC0-1.0", "duration": 1.0, "audio": "a.wav"})
    store = writer.finish()
    with pytest.raises(UserError, match=r"a\.wav has 1 channels, the store 2: prepare the store again"):
        AudioLoader(store, "train", 1, 100, 0).batch(0)
    with pytest.raises(UserError, match="has 1 channels"):
        AudioCache(store, tmp_path / "cache")
    assert open_store(write_audio_store(tmp_path / "mono", segments=4, seconds=0.5)).channels == 1


class _Detection:
    """Says whether it hears anything."""

    def rejection(self, wav: torch.Tensor, rate: int):
        assert wav.shape[0] == 1 and float(wav.square().mean().sqrt()) > LEVEL / 4
        return None


class _Removal:
    modification = "halved"

    def remove(self, wav: torch.Tensor, rate: int) -> torch.Tensor:
        return wav / 2


def test_vocal_stages_analyse_channels_that_cancel_and_keep_stereo(store, tmp_path):
    rows = [row | {"shard": -1} for row in store.manifest.to_pylist()]
    write_segments(tmp_path, rows)
    segments = Segments("0", tmp_path / "rows.parquet", store.path, "x")
    (tmp_path / "detected").mkdir()
    assert detect_shard(_Detection(), segments, tmp_path / "detected")["segments"] == len(rows)
    (tmp_path / "removed").mkdir()
    assert remove_shard(_Removal(), segments, tmp_path / "removed")["segments"] == len(rows)
    removed = Segments("0", tmp_path / "removed" / "rows.parquet", tmp_path / "removed", "y").read()
    assert channels_of(removed) == 2
    for before, after in zip(rows, removed, strict=True):
        assert after["loudness"] == pytest.approx(before["loudness"] - 6.02, abs=0.1)
        assert after["width"] == pytest.approx(before["width"], abs=1e-3)


def test_mix_down_does_not_cancel_and_measure_uses_both_channels():
    wav = noise(1, 24_000)
    assert np.array_equal(mix_down(np.stack([wav, -wav])), wav)
    assert np.allclose(mix_down(np.stack([wav, 0.5 * wav])), 0.75 * wav)
    anti = np.stack([wav, -wav])
    assert measure(anti, 24_000).loudness == float("-inf")
    assert measure(anti, 24_000, mixed=False).loudness == pytest.approx(audio.integrated_loudness(anti, 24_000))
    assert measure(anti, 24_000, mixed=False).bandwidth > 7_000


def test_stereo_statistics_and_with_channels_at_the_edges():
    assert stereo_statistics(np.zeros((2, 10), np.float32)) == (0.0, 0.0, 0.0)
    assert stereo_statistics(np.zeros((2, 10), np.float32)).is_dual_mono
    with pytest.raises(ValueError, match="two channels"):
        stereo_statistics(np.zeros((1, 10)))
    assert with_channels(np.ones((3, 4)), 1, "x").shape == (1, 4)
    with pytest.raises(UserError, match="x has 3 channels: mix it down to two"):
        with_channels(np.ones((3, 4)), 2, "x")
