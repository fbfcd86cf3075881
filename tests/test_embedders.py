"""Embedders: the interface, the published networks with random weights, and metrics of degraded music."""

import json
import logging
import shutil

import librosa
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_music import DEGRADATIONS, RATE, clips
from torch import nn

from benchmarks.attm_dry import write_clap
from ssmttm import audio
from ssmttm.audio.features import mel_filterbank
from ssmttm.cli import train_embedder
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.evaluation.embedders import EMBEDDERS, load_embedder, mono_at, panns, vggish
from ssmttm.evaluation.embedders.base import Classifier, Embedder, JointEmbedder
from ssmttm.evaluation.embedders.tiny import TinyEmbedder
from ssmttm.evaluation.metrics.clap_score import clap_score
from ssmttm.evaluation.metrics.frechet import frechet_distance
from ssmttm.evaluation.metrics.kernel import kernel_distance
from ssmttm.evaluation.metrics.kl import kl_divergence
from ssmttm.files import file_sha256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small random checkpoints of transformers' CLAP and AST, and weights of VGGish and CNN14."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    folder = tmp_path_factory.mktemp("weights")
    write_clap(folder / "clap", 10)
    ast = ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=5, max_length=1024
    )
    ASTForAudioClassification(ast).save_pretrained(folder / "ast")
    ASTFeatureExtractor().save_pretrained(folder / "ast")
    return folder


def write_weights(file, kind, path):
    """Write random weights with the published names, of a class of the module `file`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "load_weights", lambda *rest, **more: "0" * 16)
        torch.manual_seed(1)
        module = kind("unused")
    tensors = {name: value.clone() for name, value in module.state_dict().items()}
    if path.suffix == ".pth":
        torch.save({"model": {**tensors, "spectrogram_extractor.stft.conv_real.weight": torch.ones(2)}}, path)
    else:
        save_file(tensors, path)
    return module


@pytest.fixture(scope="module")
def weights(folder):
    write_weights(panns, panns.PannsEmbedder, folder / "cnn14.pth")
    write_weights(vggish, vggish.VggishEmbedder, folder / "vggish.safetensors")
    return {
        "clap": str(folder / "clap"), "ast": str(folder / "ast"), "panns": str(folder / "cnn14.pth"),
        "vggish": str(folder / "vggish.safetensors"), "tiny": None, "log_mel": None, "codec": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name, (module, _) in EMBEDDERS.items() if "packages." not in module])
def test_embedder_keeps_interface(name, weights):
    embedder = load_embedder(name, weights[name])
    assert isinstance(embedder, Embedder) and embedder.name == name and len(embedder.fingerprint) == 16
    generator = torch.Generator().manual_seed(0)
    seconds = 2.5 * embedder.seconds
    wav = 0.1 * torch.randn(2, round(seconds * embedder.sample_rate), generator=generator)
    vectors = embedder.embed(wav)
    assert vectors.shape == (2, 2, embedder.dim) and vectors.dtype == torch.float32
    assert torch.isfinite(vectors).all() and torch.equal(vectors, embedder.embed(wav))
    torch.testing.assert_close(embedder.embed(wav[1:])[0], vectors[1], rtol=1e-3, atol=1e-3)
    first = embedder.embed(wav[:, : round(embedder.seconds * embedder.sample_rate)])
    torch.testing.assert_close(first[:, 0], vectors[:, 0], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="shorter"):
        embedder.embed(wav[:, : round(0.5 * embedder.seconds * embedder.sample_rate)])
    if isinstance(embedder, Classifier):
        posteriors = embedder.posteriors(wav)
        assert posteriors.shape == (2, len(embedder.classes)) and torch.allclose(posteriors.sum(1), torch.ones(2))
    if isinstance(embedder, JointEmbedder):
        sound, text = embedder.joint_audio(wav), embedder.joint_text(["a slow waltz", "a fast jig in C"])
        assert sound.shape == text.shape and torch.allclose(text.norm(dim=1), torch.ones(2), atol=1e-5)
        alone = embedder.joint_text(["a slow waltz"])
        torch.testing.assert_close(alone[0], text[0], rtol=1e-3, atol=1e-4)


def test_tiny_embedder_is_classifier_and_joint_embedder():
    tiny = load_embedder("tiny")
    assert isinstance(tiny, Classifier) and isinstance(tiny, JointEmbedder) and len(tiny.classes) >= 10
    assert not isinstance(load_embedder("log_mel"), Classifier)


def test_mel_filterbanks_equal_librosa():
    ours = mel_filterbank(32_000, 1024, 64, 50.0, 14_000.0).numpy()
    theirs = librosa.filters.mel(sr=32_000, n_fft=1024, n_mels=64, fmin=50, fmax=14_000)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    htk = mel_filterbank(16_000, 512, 64, 125.0, 7500.0, scale="htk", norm=None, triangles="mel").numpy()
    theirs = librosa.filters.mel(sr=16_000, n_fft=512, n_mels=64, fmin=125, fmax=7500, htk=True, norm=None)
    assert np.abs(htk - theirs).max() < 0.06  # librosa's slopes are linear in Hz, VGGish's in mel
    peaks = [int(row.argmax()) for row in htk]
    assert peaks == sorted(peaks) and np.all(htk.max(1) > 0.5)


def test_cnn14_equals_plain_layers(folder, weights):
    """The same weights in plain torch functions, on librosa's spectrogram."""
    embedder = load_embedder("panns", weights["panns"])
    wav = 0.1 * torch.randn(1, 320_000, generator=torch.Generator().manual_seed(0))
    power = np.abs(librosa.stft(wav[0].numpy(), n_fft=1024, hop_length=320, pad_mode="reflect")) ** 2
    bank = librosa.filters.mel(sr=32_000, n_fft=1024, n_mels=64, fmin=50, fmax=14_000)
    x = torch.from_numpy(10 * np.log10(np.maximum(bank @ power, 1e-10))).T[None, None].float()  # [1, 1, T, 64]
    x = embedder.bn0(x.transpose(1, 3)).transpose(1, 3)
    for i in range(1, 7):
        block = getattr(embedder, f"conv_block{i}")
        x = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
        x = nn.functional.avg_pool2d(x, 2 if i < 6 else 1)
    x = x.mean(3)
    expected = torch.relu(embedder.fc1(x.max(2).values + x.mean(2)))
    torch.testing.assert_close(embedder.embed(wav)[0], expected, rtol=1e-3, atol=1e-4)


def vggish_by_definition(tensors, wav):
    """VGGish from its tensors, by numpy and torch functions only: wav [S] at 16 kHz -> [W, 128]."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([wav[i : i + 400] * hann for i in range(0, len(wav) - 399, 160)])
    magnitude = np.abs(np.fft.rfft(frames, 512))

    def to_mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges, bins = np.linspace(to_mel(125), to_mel(7500), 66), to_mel(np.linspace(0, 8000, 257))
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0, np.minimum(rise, fall))  # [257, 64]
    bank[0] = 0
    log_mel = np.log(magnitude @ bank + 0.01)
    n_windows = len(log_mel) // 96
    x = torch.from_numpy(log_mel[: n_windows * 96]).float().reshape(n_windows, 1, 96, 64)
    for layer, pool in ((0, True), (3, True), (6, False), (8, True), (11, False), (13, True)):
        x = nn.functional.conv2d(x, tensors[f"features.{layer}.weight"], tensors[f"features.{layer}.bias"], padding=1)
        x = x.clamp_min(0)
        x = nn.functional.max_pool2d(x, 2) if pool else x
    x = x.permute(0, 2, 3, 1).reshape(n_windows, -1)
    for layer in (0, 2, 4):
        x = x.clamp_min(0) if layer else x
        x = x @ tensors[f"embeddings.{layer}.weight"].T + tensors[f"embeddings.{layer}.bias"]
    return x


def test_vggish_equals_its_definition_and_has_no_last_activation(weights):
    embedder = load_embedder("vggish", weights["vggish"])
    wav = 0.1 * torch.randn(1, 16_000 * 3 + 240, generator=torch.Generator().manual_seed(0))
    expected = vggish_by_definition(load_file(weights["vggish"]), wav[0].double().numpy())
    found = embedder.embed(wav)[0]
    assert found.shape == expected.shape == (3, 128) and float(found.min()) < 0 < float(found.max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert embedder.settings == {"activation": "none"}
    assert embedder.fingerprint != file_sha256(weights["vggish"])[:16]  # that of the embedding after the ReLU


@pytest.fixture
def fused_clap(folder, tmp_path):
    """A random CLAP checkpoint with feature fusion."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor

    torch.manual_seed(0)
    config = ClapConfig.from_pretrained(folder / "clap")
    config.audio_config.enable_fusion, config.audio_config.fusion_type = True, "aff_2d"
    config.audio_config.enable_patch_fusion = True
    ClapModel(config).save_pretrained(tmp_path)
    tokenizer = ClapProcessor.from_pretrained(folder / "clap").tokenizer
    ClapProcessor(ClapFeatureExtractor(truncation="fusion"), tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_clap_with_fusion_is_a_function_of_the_clip(fused_clap):
    embedder = load_embedder("clap", str(fused_clap))
    wav = 0.1 * torch.randn(3, 48_000 * 10, generator=torch.Generator().manual_seed(0))
    together = embedder.embed(wav)
    for seed in range(4):
        np.random.seed(seed)  # the generator that transformers draws from
        torch.testing.assert_close(embedder.embed(wav), together, rtol=0, atol=0)
    for clip, expected in zip(wav, together, strict=True):
        torch.testing.assert_close(embedder.embed(clip[None])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_length", [5, 10])
def test_clap_window_is_the_clip_of_the_checkpoint(folder, tmp_path, max_length):
    """Nothing is padded, repeated or cropped, and the extractor's settings are part of the fingerprint."""
    from transformers import ClapFeatureExtractor, ClapProcessor

    shutil.copytree(folder / "clap", tmp_path / "clap")
    tokenizer = ClapProcessor.from_pretrained(folder / "clap").tokenizer
    extractor = ClapFeatureExtractor(truncation="rand_trunc", max_length_s=max_length, frequency_min=50)
    ClapProcessor(extractor, tokenizer).save_pretrained(tmp_path / "clap")
    embedder, usual = load_embedder("clap", str(tmp_path / "clap")), load_embedder("clap", str(folder / "clap"))
    assert embedder.seconds == max_length and (embedder.fingerprint == usual.fingerprint) == (max_length == 10)
    wav = 0.1 * torch.randn(1, 48_000 * 10, generator=torch.Generator().manual_seed(0))
    vectors = embedder.embed(wav)
    assert vectors.shape[1] == 10 // max_length and torch.equal(vectors, embedder.embed(wav))
    with pytest.raises(UserError, match="shorter than the window"):
        embedder.embed(wav[:, : 48_000 * max_length - 1])


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("tinny", None, "must be one of tiny"),
        ("vggish", None, "weights.vggish=FILE"),
        ("panns", "nowhere.pth", "weights.panns=FILE"),
        ("clap", "nowhere", "nowhere"),
        ("ast", "nowhere", "nowhere"),
        ("tiny", "nowhere", "train one"),
    ],
)
def test_missing_weights_raise_one_line_error(name, source, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        load_embedder(name, source and str(tmp_path / source))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_weights_raise_error(tmp_path, weights):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="vggish"):
        load_embedder("vggish", str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="panns"):
        load_embedder("panns", weights["vggish"])
    TinyEmbedder(["a", "b"]).save(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        load_embedder("tiny", str(tmp_path / "tiny"))


def test_embedder_save_load_and_fingerprint(tmp_path):
    embedder = load_embedder("tiny")
    embedder.save(tmp_path)
    loaded = load_embedder("tiny", str(tmp_path))
    assert loaded.fingerprint == embedder.fingerprint and loaded.classes == embedder.classes
    with torch.no_grad():
        loaded.tag.bias += 0.5
    assert loaded.fingerprint != embedder.fingerprint
    assert json.loads((tmp_path / "config.json").read_text())["held_out"]["true"]["recall_at_10"] > 0.9


def test_mono_at_averages_channels_and_resamples():
    log_mel = load_embedder("log_mel")
    stereo = torch.stack([torch.ones(44_100), torch.zeros(44_100)])
    mono = mono_at(stereo, 44_100, log_mel)
    assert mono.shape == (1, 24_000) and float(mono[0, 12_000]) == pytest.approx(0.5, abs=0.01)


# --- degraded music --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embeddings():
    """Embeddings of clean clips, degraded ones, and other clips of the same pieces as the reference."""
    logging.disable(logging.WARNING)
    wavs, captions = clips(0, 18)
    clean, captions = wavs[::3], captions[::3]
    sets = {"reference": [*wavs[1::3], *wavs[2::3]], "clean": clean}
    sets |= {name: [degrade(w) for w in clean] for name, degrade in DEGRADATIONS.items()}
    embedders = {name: load_embedder(name) for name in ("tiny", "log_mel", "codec")}
    vectors = {
        name: {kind: torch.cat([e.embed(w)[0] for w in wavs]) for kind, wavs in sets.items()}
        for name, e in embedders.items()
    }
    yield embedders["tiny"], sets, captions, vectors
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize("name", ["tiny", "log_mel", "codec"])
@pytest.mark.parametrize("degraded", DEGRADATIONS)
def test_distances_increase_for_degraded_music(embeddings, degraded, name, distance):
    vectors = embeddings[3][name]
    clean = distance(vectors["clean"], vectors["reference"])
    found = distance(vectors[degraded], vectors["reference"])
    if degraded != "shuffled":
        assert found > 1.5 * max(clean, 0)
    elif name != "codec":  # the mean of codec latents does not depend on the order of a clip's parts
        assert found > clean


def test_kernel_distance_is_largest_for_silence(embeddings):
    for name in ("tiny", "codec"):
        vectors = embeddings[3][name]
        distances = {k: kernel_distance(vectors[k], vectors["reference"]) for k in vectors if k != "reference"}
        assert distances["silence"] == max(distances.values()), name


@pytest.mark.parametrize("degraded", DEGRADATIONS)
def test_kl_and_clap_score_of_degraded_music(embeddings, degraded):
    tiny, sets, captions, _ = embeddings
    clean = torch.cat([tiny.posteriors(w) for w in sets["clean"]])
    found = torch.cat([tiny.posteriors(w) for w in sets[degraded]])
    assert float(kl_divergence(found, clean).mean()) > 0.3
    text = tiny.joint_text(captions)
    audio, of_clean = (torch.cat([tiny.joint_audio(w) for w in sets[kind]]) for kind in (degraded, "clean"))
    assert float(clap_score(audio, text).mean()) < float(clap_score(of_clean, text).mean()) - 0.03


def test_clap_score_and_kl_of_wrong_prompts(embeddings):
    tiny, sets, captions, _ = embeddings
    audio = torch.cat([tiny.joint_audio(w) for w in sets["clean"]])
    wrong = [*captions[1:], captions[0]]
    right_score, wrong_score = (float(clap_score(audio, tiny.joint_text(c)).mean()) for c in (captions, wrong))
    assert right_score > wrong_score + 0.2
    posteriors = torch.cat([tiny.posteriors(w) for w in sets["clean"]])
    assert float(kl_divergence(posteriors.roll(1, 0), posteriors).mean()) > 1
    assert tiny.sample_rate == RATE


class ShortStore:
    """Rows of the given seconds, whose audio is a tone of 300 Hz times the row's number; codes say the same."""

    path = "store"

    def __init__(self, folder, seconds):
        self.folder, self.seconds = folder, seconds
        for row, length in enumerate(seconds):
            audio.write(self.audio_path(row), self.tone(row, round(length * RATE)), RATE)

    def tone(self, row, samples):
        return 0.3 * torch.sin(2 * torch.pi * 300 * (row + 1) * torch.arange(samples) / RATE)[None]

    def audio_path(self, row):
        return self.folder / f"{row}.wav"

    def codes(self, row):
        return np.full((1, -(-round(self.seconds[row] * RATE) // 320)), row, np.uint16)  # whole frames


def test_train_embedder_pairs_true_and_decoded_audio_of_each_row(tmp_path):
    """Codes cover whole frames, so a segment just under 20 s decodes to 20 s."""
    store = ShortStore(tmp_path, [20.5, 19.995, 20.0, 3.0, 21.0])

    class FrameCodec:
        sample_rate = RATE

        def decode(self, codes):
            return store.tone(int(codes[0, 0, 0]), codes.shape[-1] * 320)[None]

    true, decoded, kept = train_embedder.log_mels(store, np.arange(5), FrameCodec())
    assert kept.tolist() == [0, 2, 4] and len(true) == len(decoded) == 3
    peaks = true.float().mean(-1).argmax(-1)
    assert len(set(peaks.tolist())) == 3 and torch.equal(decoded.float().mean(-1).argmax(-1), peaks)
    with pytest.raises(UserError, match="no segment of 20 s"):
        train_embedder.log_mels(store, np.array([1, 3]), FrameCodec())


def test_train_embedder_writes_embedder_that_loads(tmp_path, monkeypatch):
    """Six segments, two steps."""
    from data_prep.__main__ import main as prepare

    store, out = tmp_path / "store", tmp_path / "out"
    prepare(["builtin", "--hours", "0.06", "--seed", "5", "--out", str(store)])
    rows = {"train": slice(0, 6), "valid": slice(6, 8), "test": slice(8, 10)}
    monkeypatch.setattr(Store, "indices", lambda self, split: np.arange(len(self))[rows[split]])
    words = ["train_embedder", "--store", str(store), "--out", str(out), "--steps", "2", "--batch", "4"]
    monkeypatch.setattr("sys.argv", words)
    train_embedder.main()
    embedder = load_embedder("tiny", str(out))
    held_out = embedder.card["held_out"]
    assert embedder.card["steps"] == 2 and held_out["true"]["n"] == held_out["reconstructed"]["n"] > 0
    assert 0 <= held_out["true"]["recall_at_1"] <= held_out["true"]["recall_at_10"] <= 1
    assert embedder.embed(torch.zeros(1, 5 * RATE)).shape == (1, 1, embedder.dim)
