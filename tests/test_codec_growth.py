"""The second tiny codec: notes by sinusoids, more codebooks, the start from a smaller codec, and its losses."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import codec_config, small_codec, write_audio_store, write_codes_store

from data_prep.stages.encode import CodecOptions, Windows
from ssmttm.audio.features import mel_filterbank
from ssmttm.codecs import TinyCodec, TinyCodecConfig, load_codec
from ssmttm.codecs.discriminators import DiscriminatorOutput
from ssmttm.codecs.losses import (
    Scale,
    discriminator_accuracy,
    fast_distances,
    spectral_distances,
)
from ssmttm.codecs.notes import NOTES, NoteSpectrum, OscillatorHead, semitone_filterbank
from ssmttm.codecs.quantiser import ResidualQuantiser, rotate_to
from ssmttm.codecs.spectra import magnitudes, magnitudes_reference
from ssmttm.data import open_store
from ssmttm.data.audio_cache import AudioCache
from ssmttm.data.loader import AudioLoader
from ssmttm.errors import UserError
from ssmttm.training import loop
from ssmttm.training.tasks.codec import CodecTask

RATE = 8000
SMALL = TinyCodecConfig(
    sample_rate=RATE, hop_length=320, window=640, n_codebooks=2, codebook_size=32, codebook_dim=4,
    encoder_width=24, encoder_blocks=(1, 1), decoder_width=24, decoder_blocks=(1, 1),
)  # fmt: skip
LARGER = dataclasses.replace(SMALL, n_codebooks=4, note_window=1280, note_width=12, quantiser_gradient="rotation")


def codec_of(config):
    torch.manual_seed(0)
    return TinyCodec(config)


def noise(batch, samples):
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(1))


def tone(hertz, seconds=2.0, phase=0.0):
    time = torch.arange(round(seconds * 24000)) / 24000
    return 0.3 * torch.sin(2 * torch.pi * hertz * time + phase)[None]  # [1, S]


# Notes


def silent(head, frames):
    return torch.full((1, frames, head.read.out_features // 2), -30.0)


def test_semitone_filters_are_centred_on_their_notes():
    bank = semitone_filterbank(24000, 4096)
    for midi, hertz in ((57, 220.0), (69, 440.0), (81, 880.0)):
        assert bank[:, round(hertz * 4096 / 24000)].argmax() == midi - NOTES[0]
    assert bank.amax() <= 1 and bank.amax(dim=1).min() > 0.6


def test_note_spectrum_reads_the_amplitude_of_a_note():
    spectrum = NoteSpectrum(24000, 3840, 480)
    for midi, amplitude in ((57, 0.3), (69, 0.02), (90, 0.1)):
        wav = amplitude * tone(440 * 2 ** ((midi - 69) / 12)) / 0.3
        log_amplitudes = spectrum(wav)[0, 20:-20]
        assert (log_amplitudes.argmax(dim=-1) == midi - NOTES[0]).all()
        torch.testing.assert_close(log_amplitudes.amax(dim=-1).exp().mean(), torch.tensor(amplitude), rtol=0.15, atol=0)
    assert torch.isfinite(spectrum(torch.zeros(1, 4800))).all()


def test_oscillators_are_pure_tones_at_the_frequencies_of_notes():
    head = OscillatorHead(8, 4, 24000, 480)
    for midi in (45, 69, 93):
        log_amplitude = silent(head, 100)
        log_amplitude[..., midi - NOTES[0]] = math.log(0.25)
        wav = head.synthesise(log_amplitude, first=123_456)[0]
        assert wav.shape == (48000,) and wav[480:-480].abs().max() == pytest.approx(0.25, abs=1e-3)
        spectrum = torch.fft.rfft(wav * torch.hann_window(48000)).abs()
        peak = round(440 * 2 ** ((midi - 69) / 12) * 2)  # bins of 0.5 Hz
        assert abs(int(spectrum.argmax()) - peak) <= 1
        assert max(spectrum[: peak - 4].max(), spectrum[peak + 5 :].max()) < 1e-4 * spectrum.max()


def test_oscillators_learn_a_note():
    torch.manual_seed(0)
    head, target = OscillatorHead(4, 4, 24000, 480), magnitudes(tone(440.0, 0.4), 4096, 1024)
    notes, x, optimiser = torch.zeros(1, 10, 4), torch.zeros(1, 20, 4), torch.optim.Adam(head.parameters(), 0.1)
    losses = []
    for _ in range(80):
        optimiser.zero_grad()
        wav = head(notes, x, first=int(torch.randint(1000, ())))
        losses.append((magnitudes(wav, 4096, 1024) - target).abs().mean())
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.15 * losses[0] and head.correct.bias.argmax() == 69 - NOTES[0]


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_stream_of_a_codec_with_oscillators_equals_the_whole(sizes):
    codec = codec_of(LARGER).eval()
    torch.nn.init.constant_(codec.oscillators.read.bias, -2.0)
    codes = torch.randint(0, 32, (1, 4, sum(sizes) + 1))
    chunks = codes.split([*sizes, 1], dim=-1)
    whole = codec.decode(codes)
    torch.testing.assert_close(torch.cat(list(codec.decode_stream(chunks)), dim=-1), whole, atol=1e-4, rtol=0)
    assert (codec.decode(codes, first=7) - whole).abs().max() > 1e-3  # the position changes the phases


def test_codec_config_rejects_an_unusable_note_window_and_gradient():
    for changes, message in (
        ({"note_window": 1000}, "note_window"),
        ({"note_width": 0}, "note_width"),
        ({"quantiser_gradient": "none"}, "straight_through or rotation"),
    ):
        with pytest.raises(UserError, match=message):
            TinyCodecConfig(**changes)


# Quantiser


def test_rotation_gives_the_entry_and_a_rotated_gradient():
    generator = torch.Generator().manual_seed(0)
    e, q = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    e.requires_grad_()
    out = rotate_to(e, q)
    torch.testing.assert_close(out, q)
    outer = torch.randn(5, 4, generator=generator)
    (gradient,) = torch.autograd.grad(out, e, outer)
    norms = q.norm(dim=-1) / e.detach().norm(dim=-1)
    torch.testing.assert_close(gradient.norm(dim=-1), norms * outer.norm(dim=-1))
    angle = torch.cosine_similarity(outer, q)  # of the gradient to the entry
    torch.testing.assert_close(torch.cosine_similarity(gradient, e.detach()), angle)


@pytest.mark.parametrize(("gradient", "same"), [("straight_through", True), ("rotation", False)])
def test_quantiser_gradient_option_changes_the_gradient_and_not_the_output(gradient, same):
    torch.manual_seed(0)
    quantiser = ResidualQuantiser(8, 2, 16, 4, 0.0, gradient).eval()
    z = torch.randn(2, 3, 8, requires_grad=True)
    out, codes, _ = quantiser(z)
    torch.testing.assert_close(out, quantiser.decode(codes))
    plain = ResidualQuantiser(8, 2, 16, 4, 0.0).eval()
    plain.load_state_dict(quantiser.state_dict())
    (ours,) = torch.autograd.grad(out.square().sum(), z)
    (theirs,) = torch.autograd.grad(plain(z)[0].square().sum(), z)
    assert torch.allclose(ours, theirs) == same


# Growing


def test_grown_codec_codes_notes_and_in_between_as_the_smaller_one():
    small = codec_of(SMALL).train()
    small(noise(4, 9600))
    small.eval()
    time = torch.arange(9600) / RATE
    hertz = 440 * 2 ** (torch.randint(-24, 12, (16, 1, 1)) / 12)
    wav = 0.2 * torch.sin(2 * torch.pi * hertz * time) + 0.1 * noise(16, 9600)
    torch.manual_seed(5)
    larger = TinyCodec(LARGER)
    larger.grow_from(small, wav)
    larger.eval()
    codes = larger.encode(wav)
    assert codes.shape[1] == 4 and torch.equal(codes[:, 1::2], small.encode(wav))
    with torch.no_grad():
        notes = larger._encode_latent(wav)[..., 24:]
        left = [(notes - larger.quantiser.decode(codes[:, :k])[..., 24:]).square().mean().item() for k in (1, 3, 4)]
        assert left[0] < 0.5 * notes.var() and left[1] < left[0] and left[2] == pytest.approx(left[1])
        spectrum = larger.note_spectrum(wav[:, 0])
        read = larger.oscillators.read(notes).unflatten(-1, (2, -1)).flatten(1, 2)
    loud = spectrum > -4
    assert loud.any() and (read - spectrum)[loud].abs().mean() < 0.3
    for name in ("decoder_fine.0.expand.weight", "head.project.weight"):
        assert torch.equal(larger.state_dict()[name], small.state_dict()[name])


def test_grow_from_rejects_other_sizes():
    wav = noise(1, 3200)
    with pytest.raises(UserError, match="decoder_width=24"):
        codec_of(dataclasses.replace(LARGER, decoder_width=32)).grow_from(codec_of(SMALL), wav)
    with pytest.raises(UserError, match="at least 3 codebooks"):
        codec_of(dataclasses.replace(LARGER, n_codebooks=6)).grow_from(codec_of(SMALL), wav)
    with pytest.raises(UserError, match="must have a note_window"):
        codec_of(SMALL).grow_from(codec_of(SMALL), wav)


# Losses


@pytest.mark.parametrize(("window", "hop", "bins"), [(256, 64, None), (256, 128, 40), (64, 64, None)])
def test_magnitudes_equal_plain_autograd_in_value_and_gradient(window, hop, bins):
    wav = noise(2, 1000)[:, 0].double().requires_grad_()
    ours, theirs = (f(wav, window, hop, bins) for f in (magnitudes, magnitudes_reference))
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((m.pow(1.3) * weights).sum(), wav)[0] for m in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    silent = torch.zeros(1, 1000, requires_grad=True)
    magnitudes(silent, window, hop).log().sum().backward()
    assert not silent.grad.any()
    with pytest.raises(ValueError, match="fit"):
        magnitudes(wav, 1024, 256)


def test_fast_distances_agree_with_the_metric_and_see_notes():
    a, b = noise(2, 24000)[:, 0], 0.7 * noise(2, 24000)[:, 0]
    scales = (Scale(1024, 80), Scale(256, 20))
    fast, slow = fast_distances(b, a, 24000, scales), spectral_distances(b, a, 24000, scales)
    for name in ("mel", "spectrum"):
        torch.testing.assert_close(fast[name], slow[name], rtol=0.02, atol=0)
    assert all(value < 1e-5 for value in fast_distances(a, a, 24000).values())

    bass = tone(82.4)  # E2
    semitone, shifted = (fast_distances(other, bass, 24000) for other in (tone(87.3), tone(82.4, phase=1.5)))
    assert semitone["pitch"] > 1 and shifted["pitch"] < 0.05
    note = tone(329.6)  # E4
    semitone, shifted = (fast_distances(other, note, 24000) for other in (tone(349.2), tone(329.6, phase=1.5)))
    assert semitone["notes"] > 0.8 and shifted["notes"] < 0.05
    half = fast_distances(note[:, :5000] * 0.5, note[:, :5000], 24000)  # shorter than the longest window
    assert half["pitch"] == pytest.approx(0.5, abs=0.01) and half["notes"] == pytest.approx(0.5, abs=0.01)
    assert "notes" not in fast_distances(note[:, :1500], note[:, :1500], 24000)
    struck = torch.cat([0.01 * note[:, :24000], note[:, :24000]], dim=1)
    late = torch.cat([0.01 * note[:, :26000], note[:, :22000]], dim=1)
    assert fast_distances(late, struck, 24000)["flux"] > 5 * fast_distances(0.7 * struck, struck, 24000)["flux"]
    quiet = fast_distances(torch.zeros_like(note), torch.zeros_like(note), 24000)
    assert quiet["pitch"] == 0 and quiet["notes"] == 0


def test_discriminator_accuracy_is_of_signs():
    def outputs(*values):
        return [DiscriminatorOutput(torch.tensor(row), []) for row in values]

    real, fake = outputs([1.0, 2.0], [1.0, -1.0]), outputs([-1.0, -1.0], [2.0, 3.0])
    assert discriminator_accuracy(real, fake) == pytest.approx((1.0 + 0.25) / 2)


# Training


@pytest.fixture(scope="module")
def audio_store(tmp_path_factory):
    return write_audio_store(tmp_path_factory.mktemp("audio") / "store")


def test_cached_audio_gives_the_same_batches(audio_store, tmp_path):
    store = open_store(audio_store)
    cache = AudioCache(store, tmp_path / "cache")
    files, cached = (AudioLoader(store, "train", 4, 800, 3, cache=given).batch(2) for given in (None, cache))
    assert cached["ids"] == files["ids"]
    torch.testing.assert_close(cached["audio"], files["audio"], rtol=0, atol=0)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").iterdir()) if path.suffix]
    AudioCache(store, tmp_path / "cache")
    assert times == [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").iterdir()) if path.suffix]


def test_cached_audio_of_another_store_is_replaced_and_other_folders_are_refused(audio_store, tmp_path):
    first = open_store(write_audio_store(tmp_path / "other", segments=4, seconds=0.5))
    AudioCache(first, tmp_path / "cache")
    store = open_store(audio_store)
    crop = AudioCache(store, tmp_path / "cache").crop(5, 100, 7)
    assert np.array_equal(crop, AudioLoader(store, "train", 1, 100, 0)._crop(5, 7))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="other files"):
        AudioCache(store, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_codec_starts_from_a_smaller_codec_and_names_it(audio_store, tmp_path):
    small = CodecTask(codec_config(audio_store, tmp_path / "run")).codec
    small(noise(2, 2400))
    small.eval().save(tmp_path / "small", half=False)
    (tmp_path / "small" / "card.json").write_text('{"data": {"licences": {"CC-BY-4.0": 1}}}')
    start = (f"codec_training.start={tmp_path / 'small'}", "codec.n_codebooks=3", "codec.note_window=480",
             "codec_training.fast_losses=true", "train.steps=1")  # fmt: skip
    task = CodecTask(codec_config(audio_store, tmp_path / "run", *start))
    wav = noise(1, 2400)
    assert torch.equal(task.codec.eval().encode(wav)[:, 1::2], load_codec(tmp_path / "small").encode(wav)[:, :1])
    metadata = task.metadata()
    assert metadata["start"]["fingerprint"] == load_codec(tmp_path / "small").fingerprint
    assert set(metadata["licences"]) == {"CC-BY-4.0", "CC0-1.0"}
    with pytest.raises(UserError, match="set only one"):
        CodecTask(codec_config(audio_store, tmp_path / "run", *start, "init=somewhere"))


def test_store_names_the_folder_of_its_codec(tmp_path):
    small_codec(tmp_path / "codec")
    metadata = CodecOptions(str(tmp_path / "codec"), Windows(), "cpu").metadata()
    assert load_codec(metadata["name"]).fingerprint == metadata["fingerprint"]


def test_codes_of_the_smaller_codec_are_refused(tmp_path):
    smaller = small_codec(tmp_path / "codec")
    store = open_store(write_codes_store(tmp_path / "store", codec=smaller))
    store.require_codec(smaller)
    config = dataclasses.replace(smaller.config, note_window=192)
    larger = TinyCodec(config, "larger")
    larger.grow_from(smaller, noise(1, 2400))
    with pytest.raises(UserError, match="was encoded by codec") as error:
        store.require_codec(larger)
    assert "\n" not in str(error.value) and larger.fingerprint in str(error.value)


def test_adversarial_losses_judge_some_items_and_log_accuracy(audio_store, tmp_path):
    config = codec_config(audio_store, tmp_path / "run", "codec_training.adversarial_items=1", "data.batch_size=3")
    task = CodecTask(config)
    batch = task.loader("train", 3, 0, 1).batch(0)
    judged = []
    task.modules["discriminator"].register_forward_pre_hook(lambda module, args: judged.append(len(args[0])))
    losses = task.losses(task.modules, batch, task.loss_denominators(batch), step=3)
    assert judged == [2, 1]  # one real and one decoded item; the decoded one again for the codec
    assert 0 <= losses["discriminator"]["discriminator_accuracy"] <= 1
    assert {"adversarial", "feature"} <= set(losses["model"])


def test_validation_logs_chroma_and_onsets(audio_store, tmp_path):
    run = loop.train(codec_config(audio_store, tmp_path / "run", "train.steps=1", "train.eval_every=1"))
    text = (run / "metrics.jsonl").read_text()
    assert "valid/chroma_similarity" in text and "valid/onset_f" in text


@pytest.mark.parametrize(
    ("bank", "arguments"), [(semitone_filterbank, (7_919, 8_192)), (mel_filterbank, (7_919, 512, 20))]
)
def test_filter_bank_first_made_in_inference_mode_serves_a_training(bank, arguments):
    with torch.inference_mode():
        bank(*arguments)
    weights = bank(*arguments)
    x = torch.ones(weights.shape[-1], dtype=weights.dtype, requires_grad=True)
    (weights @ x).sum().backward()
    assert torch.isfinite(x.grad).all()
