"""The spectral codec's modules, quantiser, losses and discriminator; training steps; autocast."""

import pytest
import torch
from small_codecs import HF_CODECS, RATE, SCALES_SMALL, build_codec_of, small_codec, tones

from ssmttm.codecs import CodecOutput
from ssmttm.codecs.discriminators import MultiResolutionDiscriminator
from ssmttm.codecs.losses import (
    adversarial_losses,
    discriminator_loss,
    reconstruction_losses,
    spectral_distances,
)
from ssmttm.codecs.quantiser import ResidualQuantiser
from ssmttm.codecs.spectral import STFT

# Parts


def test_stft_inverse_and_head_reconstruct_the_waveform():
    stft = STFT(640, 160)
    wav = torch.randn(2, 160 * 21)
    spectrum = stft(wav)
    assert spectrum.shape == (2, 21, 321)
    torch.testing.assert_close(stft.inverse(spectrum), wav, atol=1e-5, rtol=0)
    head = small_codec().head
    wav_found = head.synthesise(spectrum.abs().clamp_min(1e-12).log(), spectrum.angle())
    torch.testing.assert_close(wav_found, wav, atol=1e-4, rtol=0)


def test_quantiser_codes_are_nearest_to_residual_by_cosine():
    torch.manual_seed(0)
    quantiser = ResidualQuantiser(12, 3, 16, 4, dropout=0.0).eval()
    z = torch.randn(1, 5, 12)
    out, codes, _ = quantiser(z)
    residual = z
    for k in range(3):
        e = quantiser.project_in[k](residual)
        cosine = torch.cosine_similarity(e[:, :, None], quantiser.codebooks[k], dim=-1)
        assert torch.equal(cosine.argmax(-1), codes[:, k])
        residual = residual - quantiser.project_out[k](quantiser.codebooks[k][codes[:, k]])
    torch.testing.assert_close(z - residual, out)
    assert torch.equal(quantiser.encode(z), codes)
    torch.testing.assert_close(quantiser.decode(codes), out)


def test_quantiser_dropout_keeps_the_first_codebooks():
    torch.manual_seed(0)
    quantiser = ResidualQuantiser(12, 3, 16, 4, dropout=1.0).train()
    z = torch.randn(200, 5, 12)
    out, codes, _ = quantiser(z)
    partial = [quantiser.decode(codes[:, :n]) for n in (1, 2, 3)]
    kept = torch.stack([(out - part).abs().amax(dim=(1, 2)) < 1e-5 for part in partial])
    assert (kept.sum(dim=0) == 1).all() and (kept.sum(dim=1) > 30).all()


def test_quantiser_unused_entries_are_restarted_and_used_ones_kept():
    torch.manual_seed(0)
    quantiser = ResidualQuantiser(12, 2, 64, 4, dropout=0.0).train()
    z = torch.randn(16, 40, 12)
    quantiser(z)
    with torch.no_grad():
        quantiser.codebooks[:, 8:] = -quantiser.codebooks[:, :1] * 1e-3 + torch.tensor([50.0, 0, 0, 0])  # one direction
    quantiser.usage.zero_()
    quantiser(z)
    used = quantiser.usage > 0
    before = quantiser.codebooks.detach().clone()
    restarted = quantiser.restart_unused(z, min_usage=1e-3)
    assert torch.equal(restarted, ~used) and (restarted.sum(dim=1) > 20).all()
    assert torch.equal(quantiser.codebooks[used], before[used])
    assert (quantiser.usage == 0).all()
    quantiser(z)
    assert ((quantiser.usage > 0).float().mean(dim=1) > 0.9).all()


def test_codec_usage_counts_are_in_state_dict():
    codec = small_codec().train()
    codec(tones(2, 3200))
    state = codec.state_dict()
    assert state["quantiser.usage"].sum() == 2 * 3 * 10 and state["quantiser.seeded"]
    other = small_codec()
    other.load_state_dict(state)
    assert torch.equal(other.quantiser.usage, codec.quantiser.usage)


def test_codec_restart_of_unused_codes_is_seeded_by_torch():
    def restarted():
        codec = small_codec().train()
        wav = tones(2, 3200)
        codec(wav)
        torch.manual_seed(7)
        codec.restart_unused_codes(wav)
        return codec.quantiser.codebooks

    assert torch.equal(restarted(), restarted())


# Training


def test_codec_gradients_reach_every_parameter_in_every_step():
    codec = small_codec(quantiser_dropout=1.0).train()
    wav = tones(4, 3300)
    for _ in range(3):
        codec.zero_grad(set_to_none=True)
        output = codec(wav)
        assert output.audio.shape == wav.shape and output.codes.shape == (4, 3, 11)
        sum(reconstruction_losses(output, wav, RATE, SCALES_SMALL).values()).backward()
        assert [name for name, p in codec.named_parameters() if p.grad is None] == []
    assert all(p.grad.abs().sum() > 0 for p in codec.parameters())


def test_codec_overfits_tones():
    codec = small_codec().train()
    wav = tones(4, 8000)
    optimiser = torch.optim.AdamW(codec.parameters(), 2e-3, betas=(0.8, 0.95))
    mels = []
    for step in range(60):
        terms = reconstruction_losses(codec(wav), wav, RATE, SCALES_SMALL)
        loss = 15 * terms["mel"] + terms["spectrum"] + terms["codebook"] + 0.25 * terms["commitment"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        mels.append(terms["mel"].item())
        if step % 20 == 19:
            codec.restart_unused_codes(wav)
    assert min(mels[-5:]) < 0.6 * mels[0]


def test_codec_losses_are_float32_under_bf16_autocast():
    codec, wav = small_codec().train(), tones(2, 3200)
    with torch.autocast("cpu", torch.bfloat16):
        losses = reconstruction_losses(codec(wav), wav, RATE, SCALES_SMALL)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    codec.zero_grad()
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in codec.parameters())


@pytest.mark.parametrize("kind", ["tiny", *HF_CODECS])
def test_codec_computes_the_same_under_autocast(kind):
    codec = build_codec_of(kind).eval()
    wav = torch.randn(2, 1, codec.hop_length * 30) * 0.1
    codes = codec.encode(wav)
    latents = codec.to_latents(codes) + 0.3 * torch.randn(2, codec.latent_channels, 30)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(wav), codes)
        assert torch.equal(codec.from_latents(latents), found := codec.from_latents(latents))
        audio = codec.decode(codes)
    assert torch.equal(codec.from_latents(latents), found) and torch.equal(codec.decode(codes), audio)


@pytest.mark.parametrize("kind", ["tiny", "dac"])
def test_codec_training_quantises_in_float32_under_autocast(kind):
    codec = build_codec_of(kind).train()
    wav = torch.randn(4, 1, codec.hop_length * 60) * 0.1
    quantiser = codec.quantiser if kind == "tiny" else codec.model.quantizer
    inputs = []
    handle = quantiser.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        output = codec(wav)
    handle.remove()
    codes = quantiser.encode(inputs[0]) if kind == "tiny" else quantiser.eval()(inputs[0])[1]
    assert inputs[0].dtype == torch.float32 and torch.equal(codes, output.codes)
    assert {loss.dtype for loss in output.losses.values()} == {torch.float32}
    output.audio.float().sum().backward()


@pytest.mark.parametrize("kind", ["tiny", "dac"])
def test_codec_restart_is_the_same_under_autocast(kind):
    def books(enabled):
        codec = build_codec_of(kind).train()
        wav = torch.randn(2, 1, codec.hop_length * 20, generator=torch.Generator().manual_seed(0)) * 0.1
        codec(wav)
        before = dict(codec.named_parameters())
        before = {name: value.detach().clone() for name, value in before.items()}
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            restarted = codec.restart_unused_codes(wav)
        for name, mask in restarted.items():
            changed = (dict(codec.named_parameters())[name] != before[name]).any(-1)
            assert mask.any() and torch.equal(changed, mask)
        return codec.codebook_vectors()

    assert torch.equal(books(True), books(False))


def test_spectral_losses_are_zero_for_equal_audio_and_skip_long_windows():
    wav = tones(2, 2000)
    equal = reconstruction_losses(CodecOutput(wav, None, {}), wav, RATE)
    assert equal["mel"] == 0 and equal["spectrum"] == 0
    quieter = spectral_distances(wav[:, 0] / 10, wav[:, 0], RATE, SCALES_SMALL)
    assert quieter["spectrum"] == pytest.approx(0.9, abs=0.02)
    with pytest.raises(ValueError, match="shorter"):
        spectral_distances(wav[:, 0, :100], wav[:, 0, :100], RATE)


def test_discriminator_trains_and_gives_generator_gradients():
    torch.manual_seed(0)
    discriminator = MultiResolutionDiscriminator((512, 256), channels=8)
    real, fake = tones(4, 4000), tones(4, 4000, seed=1) + 0.02 * torch.randn(4, 1, 4000)
    optimiser = torch.optim.AdamW(discriminator.parameters(), 2e-3, betas=(0.8, 0.95))
    losses = []
    for _ in range(80):
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.2) and losses[-1] < 1
    assert all(p.grad is not None for p in discriminator.parameters())

    output = fake.clone().requires_grad_()
    terms = adversarial_losses(discriminator(real), discriminator(output))
    assert terms["feature"] > 0 and terms["adversarial"] > 0
    sum(terms.values()).backward()
    assert output.grad.abs().sum() > 0
    same = adversarial_losses(discriminator(real), discriminator(real))
    assert same["feature"] == 0 and same["adversarial"] < terms["adversarial"]
