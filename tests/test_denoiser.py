"""LatentDenoiser: lengths, padding, conditions, bidirectionality, gradients, FLOPs, latent statistics, errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from far_device import FAR, far_device
from small_denoisers import (
    NETWORKS,
    SIZES,
    TEXT_DIM,
    WIDTH,
    C,
    K,
    S,
    captions,
    conditions,
    denoiser,
    new_denoiser,
    noisy,
)
from small_stores import write_codes_store
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.codecs.latents import latent_statistics
from ssmttm.data import open_store
from ssmttm.diffusion.objectives import get_objective
from ssmttm.errors import UserError
from ssmttm.mixers import Mamba2
from ssmttm.mixers.bidirectional import Bidirectional, FullAttention, build_bidirectional
from ssmttm.models import build_model, unet
from ssmttm.models.controls import Controls
from ssmttm.models.denoiser_stack import AdaLNSublayer
from ssmttm.models.latent_denoiser import Conditions
from ssmttm.text.condition import TextCondition
from ssmttm.training.tasks import diffusion

DTYPE = torch.float64
FRAMES = 13  # not a multiple of the U-Net's stride, 4
over_networks = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module", params=NETWORKS)
def model(request):
    return denoiser(request.param, chroma=True, tempo=True).double()


def assert_equal(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def all_conditions(frames=FRAMES, lengths=(4, 0, 7), **options):
    """Conditions with melody and tempo."""
    generator = torch.Generator().manual_seed(8)
    chroma = torch.rand(len(lengths), 12, frames, generator=generator, dtype=DTYPE)
    tempo = torch.linspace(60.0, 180.0, len(lengths), dtype=DTYPE)
    return conditions(frames, lengths, DTYPE, controls=Controls(chroma, tempo), **options)


def run(model, given, frames=FRAMES, dtype=DTYPE):
    with torch.no_grad():
        return model(*noisy(frames, len(given.coarse_latents), dtype), given)


@pytest.mark.parametrize("frames", [1, 5, 37, 64])
def test_denoiser_accepts_any_length(model, frames):
    out = run(model, all_conditions(frames), frames)
    assert out.shape == (3, C, frames) and out.isfinite().all()
    assert (out != 0).any(1).all()


def test_denoiser_padding_changes_no_valid_frame(model):
    """For any amount and content of padding; an unpadded item alone gives the same as in the batch."""
    lengths = (13, 6, 1)
    mask = torch.arange(FRAMES) < torch.tensor(lengths)[:, None]
    given = all_conditions(mask=mask)
    x, time = noisy(FRAMES, dtype=DTYPE)
    with torch.no_grad():
        batch = model(x, time, given)
        other = replace(given, coarse_latents=given.coarse_latents.masked_fill(~mask[:, None], 9.0))
        changed = model(x.masked_fill(~mask[:, None], -7.0), time, other)
        parts = (x, given.coarse_latents, given.controls.chroma, mask.int())
        longer = [pad(part, (0, 9), value=2) for part in parts]
        controls = replace(given.controls, chroma=longer[2])
        padded_conditions = replace(given, coarse_latents=longer[1], controls=controls, mask=longer[3] == 1)
        padded = model(longer[0], time, padded_conditions)
        for item, length in enumerate(lengths):
            text = TextCondition(*(part[item : item + 1] for part in given.text))
            controls = given.controls.select_rows(slice(item, item + 1)).select_frames(slice(length))
            coarse = given.coarse_latents[item, None, :, :length]
            alone = replace(given, coarse_latents=coarse, controls=controls, text=text, mask=None)
            expected = model(x[item, None, :, :length], time[item, None], alone)[0]
            for found in (batch, changed, padded):
                assert_equal(found[item, :, :length], expected)


def test_denoiser_padding_has_no_gradient(model):
    mask = torch.arange(FRAMES) < torch.tensor([13, 6, 2])[:, None]
    x, time = noisy(FRAMES, dtype=DTYPE)
    gradients = []
    for filling in (0.0, 5.0):
        given = all_conditions(mask=mask)
        inputs = [part.masked_fill(~mask[:, None], filling).requires_grad_() for part in (x, given.coarse_latents)]
        out = model(inputs[0], time, replace(given, coarse_latents=inputs[1]))
        model.zero_grad()
        out.transpose(1, 2)[mask].square().sum().backward()
        for part in inputs:
            assert not part.grad.masked_select(~mask[:, None]).any()
            assert (part.grad.transpose(1, 2)[mask] != 0).any(-1).all()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@over_networks
@pytest.mark.parametrize("objective", ["v", "flow", "regression"])
def test_denoiser_and_objective_copy_nothing_between_host_and_device(name, objective):
    """But for the objective's table, which is copied at its first use."""
    model, objective = new_denoiser(name).to(FAR), get_objective(objective)
    given = conditions(FRAMES, mask=torch.ones(3, FRAMES, dtype=torch.bool, device=FAR))
    given = replace(given, coarse_latents=given.coarse_latents.to(FAR), text=given.text.to(FAR))
    clean, time = (tensor.to(FAR) for tensor in noisy(FRAMES))
    objective.add_noise(clean, clean, time)
    with far_device():
        prediction = model(objective.add_noise(clean, clean, time), time, given)
        assert objective.predict_clean(clean, prediction, time).shape == objective.target(clean, clean, time).shape


def test_denoiser_all_true_mask_equals_none(model):
    given = all_conditions(frames=8)
    assert torch.equal(run(model, replace(given, mask=torch.ones(3, 8, dtype=torch.bool)), 8), run(model, given, 8))


@pytest.mark.parametrize("where", ["left", "right", "scattered"])
def test_denoiser_text_padding_changes_nothing(model, where):
    given = all_conditions()
    slots = {"left": range(9, 16), "right": range(7), "scattered": [1, 2, 5, 8, 9, 13, 15]}[where]
    embeddings = torch.full((3, 16, TEXT_DIM), torch.nan)  # values at padding are not read
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for row, valid in enumerate(given.text.mask):
        chosen = torch.tensor(list(slots)[: int(valid.sum())], dtype=torch.long)
        embeddings[row, chosen], mask[row, chosen] = given.text.embeddings[row, valid], True
    assert_equal(run(model, given.with_text(TextCondition(embeddings, mask))), run(model, given))


def test_denoiser_depends_on_every_condition(model):
    given = all_conditions(coarse_noise_aug=torch.tensor([0.1, 0.2, 0.3], dtype=DTYPE))
    all_given = torch.ones(3, dtype=torch.bool)
    chroma, tempo = given.controls.chroma, given.controls.bpm
    nan_chroma = chroma.clone()
    nan_chroma[0, :, :4] = torch.nan

    def with_controls(**changes):
        return replace(given, controls=replace(given.controls, **changes))

    reference = run(model, given)
    assert_equal(run(model, replace(given, has_coarse=all_given)), reference)
    changes = {
        "text": given.with_text(captions(4, 3, 7, seed=9)),
        "no text": given.with_text(captions(0, 1, 0)),
        "other coarse latents": replace(given, coarse_latents=given.coarse_latents.flip(2)),
        "no coarse latents": given.without_coarse(),
        "coarse noise": replace(given, coarse_noise_aug=None),
        "no tempo": with_controls(bpm=None),
        "another tempo": with_controls(bpm=tempo * 1.1),
        "no chroma": with_controls(chroma=None),
        "another chroma": with_controls(chroma=chroma.roll(1, 1)),
    }
    outs = {what: run(model, other) for what, other in changes.items()}
    for what, out in outs.items():
        assert ((out - reference).abs().amax((1, 2)) > 1e-3).all(), what
    x, time = noisy(FRAMES, dtype=DTYPE)
    with torch.no_grad():
        assert ((model(x, 1 - time, given) - reference).abs().amax((1, 2))[[0, 2]] > 1e-3).all()
    unknown = torch.tensor([120.0, torch.nan, torch.nan], dtype=DTYPE)
    mixed = run(model, with_controls(bpm=unknown.where(unknown.isnan(), tempo)))
    assert_equal(mixed[0], reference[0])
    assert_equal(mixed[1:], outs["no tempo"][1:])
    assert_equal(run(model, with_controls(chroma=torch.full_like(chroma, torch.nan))), outs["no chroma"])
    partly = run(model, with_controls(chroma=nan_chroma))
    assert_equal(partly[1:], reference[1:])
    silent = run(model, with_controls(chroma=nan_chroma.nan_to_num(0.0)))
    for other in (reference, silent, outs["no chroma"]):  # a gap differs from the melody, silence and no melody
        assert (partly[0] - other[0]).abs().max() > 1e-3 and partly.isfinite().all()


def test_dropped_coarse_latents_are_not_read(model):
    some = torch.tensor([True, False, True])
    given = replace(all_conditions(), has_coarse=some)
    other = replace(given, coarse_latents=torch.where(some[:, None, None], given.coarse_latents, torch.nan))
    assert_equal(run(model, other), run(model, given))
    assert_equal(run(model, given)[[0, 2]], run(model, replace(given, has_coarse=None))[[0, 2]])
    assert_equal(run(model, given)[1], run(model, given.without_coarse())[1])


@pytest.mark.parametrize("what", ["noisy", "coarse_latents", "chroma"])
def test_denoiser_is_bidirectional(model, what):
    given, (x, time) = all_conditions(), noisy(FRAMES, dtype=DTYPE)
    before = run(model, given)
    for changed, observed in ((FRAMES - 1, 0), (0, FRAMES - 1)):
        other, noise = given, x
        if what == "noisy":
            noise = x.clone()
            noise[..., changed] += 2
        else:
            part = (given.coarse_latents if what == "coarse_latents" else given.controls.chroma).clone()
            part[..., changed] += 2
            controls = replace(given.controls, chroma=part)
            change = {"coarse_latents": part} if what == "coarse_latents" else {"controls": controls}
            other = replace(given, **change)
        with torch.no_grad():
            after = model(noise, time, other)
        assert ((after - before)[..., observed].abs().amax(1) > 1e-7).all()


@over_networks
def test_new_denoiser_outputs_zero_and_every_parameter_learns(name):
    model = new_denoiser(name, chroma=True, tempo=True).train()
    given, (x, time) = all_conditions(), noisy(FRAMES)
    chroma = given.controls.chroma.float()
    chroma[0] = torch.nan
    given = replace(
        given,
        coarse_latents=given.coarse_latents.float(),
        controls=Controls(chroma, torch.tensor([90.0, torch.nan, 120.0])),
        has_coarse=torch.tensor([True, False, True]),
    )
    assert not model(x, time, given).any()
    optimizer, target = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(3, C, FRAMES)
    learnt = set()
    for _ in range(4):  # zero-initialised layers block the gradients of earlier ones at first
        optimizer.zero_grad()
        (model(x, time, given) - target).square().mean().backward()
        learnt |= {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    without_gradient = {key for key, _ in model.named_parameters()} - learnt
    assert not without_gradient
    assert {"null_coarse", "chroma.null", "tempo.null"} <= learnt


@pytest.mark.parametrize("objective", ["v", "flow"])
def test_denoiser_reaches_the_minimal_loss(objective):
    """Latents are the coarse latents plus noise, so the minimal loss is known and needs all inputs."""
    torch.manual_seed(0)
    process, noise_std, steps, rate = get_objective(objective), 0.5, 250, 0.01
    model = new_denoiser(layers="attention", n_layers=1).train()
    text = captions(1)

    def loss(items):
        coarse_latents = torch.randn(items, S, 4)
        clean = coarse_latents.repeat(1, C // S, 1) + noise_std * torch.randn(items, C, 4)
        noise, time = torch.randn_like(clean), process.training_times(torch.rand(items))
        texts = TextCondition(text.embeddings.expand(items, -1, -1), text.mask.expand(items, -1))
        prediction = model(process.add_noise(clean, noise, time), time, Conditions(coarse_latents, texts))
        return (prediction - process.target(clean, noise, time)).square().mean()

    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(64).backward()
        optimizer.step()
    time, one, none = torch.arange(1000) / 1000, torch.ones(1000, 1, 1), torch.zeros(1000, 1, 1)
    signal, sigma = process.add_noise(one, none, time), process.add_noise(none, one, time)
    minimal = (noise_std**2 / ((noise_std * signal).square() + sigma.square())).mean()
    with torch.no_grad():
        assert loss(4000).item() == pytest.approx(minimal.item(), rel=0.04)


@over_networks
def test_denoiser_autocast_agrees_with_float32_and_keeps_float32_residuals(name):
    model, given, dtypes = denoiser(name), conditions(FRAMES), []
    expected = run(model, given, dtype=torch.float32)
    model.network.register_forward_hook(lambda _, inputs, out: dtypes.extend((inputs[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, given, dtype=torch.float32)
    assert dtypes == [torch.float32] * 2
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"layers": "attention"}, 0.002),
        ({"layers": "mamba2"}, 0.02),
        ({"network": "unet", "unet_mults": [1, 1, 2]}, 0.0005),
        ({"layers": "attention", "chroma": True}, 0.002),
    ],
    ids=["attention", "mamba2", "unet", "chroma"],
)
@pytest.mark.parametrize("frames", [64, 250, 251])
def test_denoiser_flops_equal_counted_flops(changes, tolerance, frames):
    model = denoiser(d_model=48, headdim=16, n_heads=4, d_state=32, chunk_size=64, **changes)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        melody = torch.rand(1, 12, frames) if model.config.chroma else None
        model(*noisy(frames, 1), conditions(frames, (20,), controls=Controls(melody)))
    assert model.flops(frames, 20) == pytest.approx(counter.get_total_flops(), rel=tolerance)


# --- statistics of latents ------------------------------------------------------------------------------------------


def test_normalise_and_denormalise_are_inverses():
    model, latents = denoiser(), torch.randn(2, K * WIDTH, 5)
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 2.0, 4.0])
    model.set_statistics(mean, std)
    groups = latents.unflatten(1, (K, WIDTH))
    wanted = ((groups - mean[:, None, None]) / std[:, None, None]).flatten(1, 2)
    torch.testing.assert_close(model.normalise(latents), wanted)
    torch.testing.assert_close(model.denormalise(model.normalise(latents)), latents)
    torch.testing.assert_close(model.normalise(latents[:, S:], first=1), wanted[:, S:])
    torch.testing.assert_close(model.denormalise(wanted[:, S : S + WIDTH], first=1), latents[:, S : S + WIDTH])


class CodebooksOnly:
    """The attributes of a codec that statistics need."""

    n_codebooks, codebook_size = 4, 16

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        offsets = torch.tensor([0.0, 3.0, -1.0, 0.2, 9.0])[:, None, None]
        self.books = torch.randn(5, 16, WIDTH, generator=generator) * (1 + offsets.abs()) + offsets

    def codebook_vectors(self):
        return self.books  # one more than the codec keeps


@pytest.mark.parametrize("counted", [4096, 7])
def test_store_statistics_equal_those_of_the_training_latents(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(diffusion, "_STATISTICS_SEGMENTS", counted)
    store, codec = open_store(write_codes_store(tmp_path / "store")), CodebooksOnly()
    rows = store.indices("train")
    assert len(rows) == 20
    chosen = rows if counted == 4096 else rows[::3]
    codes = torch.from_numpy(np.concatenate([store.codes(int(row)) for row in chosen], 1).astype(np.int64))
    latents = torch.stack([codec.books[k][codes[k]] for k in range(4)]).double()  # [K, T, c]
    found = diffusion.store_statistics(store, codec)
    torch.testing.assert_close(found.mean, latents.mean((1, 2)).float())
    torch.testing.assert_close(found.std, latents.flatten(1).std(1, correction=0).float())
    again = diffusion.store_statistics(store, codec)
    assert found.fingerprint == again.fingerprint and len(found.fingerprint) == 16
    assert found._replace(std=found.std * 1.001).fingerprint != found.fingerprint


def test_latent_std_of_a_constant_codebook_is_positive():
    found = latent_statistics(torch.ones(1, 3, 2), torch.tensor([[0, 5, 0]]))
    assert found.mean.item() == 1 and found.std.item() > 0


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_codebooks": 1}, "n_codebooks=1, got 1"),
        ({"n_coarse_codebooks": 0}, "model.n_coarse_codebooks must be at least 1 .* got 0"),
        ({"n_coarse_codebooks": 4}, "below n_codebooks=4, got 4"),
        ({"network": "transformer"}, "choose from stack, unet"),
        ({"time_dim": 7}, "model.time_dim must be even, got 7"),
        ({"layers": "lstm"}, "lstm"),
        ({"n_layers": 0}, "n_layers"),
        ({"layers": "attention", "n_heads": 3}, "n_heads must divide d_model = 16, got 3"),
        ({"network": "unet", "n_heads": 3}, "n_heads must divide d_model = 16, got 3"),
        ({"d_modle": 3}, "d_modle"),
    ],
)
def test_build_model_rejects_invalid_denoiser_sizes(change, message):
    with pytest.raises(UserError, match=message) as caught:
        build_model({"kind": "latent_denoiser", **SIZES, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, C + 1, 5)}, r"noisy latents of shape .*, got \[3, 10, 5\]"),
        ({"x": torch.zeros(3, C, 6)}, r"the denoiser takes coarse latents of shape \[3, 3, 6\], got \[3, 3, 5\]"),
        ({"x": torch.zeros(3, C, 0), "coarse_latents": torch.zeros(3, S, 0)}, "noisy latents"),
        ({"coarse_latents": torch.zeros(3, S - 1, 5)}, "coarse latents"),
        ({"coarse_latents": torch.zeros(2, S, 5)}, "coarse latents"),
        ({"text": captions(3, 3)}, "got 2 captions for a batch of 3"),
        ({"text": TextCondition(torch.zeros(3, 2, 5), torch.ones(3, 2, dtype=torch.bool))}, "model.text_dim"),
        ({"controls": Controls(torch.zeros(3, 12, 5))}, "this denoiser was not trained with chroma: leave it out"),
        ({"controls": Controls(bpm=torch.zeros(3))}, "this denoiser was not trained with tempo: leave it out"),
        ({"mask": torch.ones(3, 6, dtype=torch.bool)}, r"the denoiser takes a mask of shape \[3, 5\], got \[3, 6\]"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"a mask of shape .*, got \[5\]"),
    ],
)
def test_denoiser_rejects_invalid_inputs_with_one_line(change, message):
    change = dict(change)
    x = change.pop("x", torch.zeros(3, C, 5))
    with pytest.raises(UserError, match=message) as caught:
        denoiser()(x, torch.zeros(3), replace(conditions(5), **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (Controls(torch.zeros(3, 12, 6)), r"the denoiser takes chroma of shape \[3, 12, 5\], got \[3, 12, 6\]"),
        (Controls(torch.zeros(3, 5, 12)), r"chroma of shape .*, got \[3, 5, 12\]"),
        (Controls(torch.zeros(1, 12, 5)), r"chroma of shape .*, got \[1, 12, 5\]"),
        (Controls(bpm=torch.zeros(2)), r"the denoiser takes bpm of shape \[3\], got \[2\]"),
        (Controls(bpm=torch.zeros(3, 1)), r"bpm of shape .*, got \[3, 1\]"),
    ],
)
def test_denoiser_rejects_controls_of_invalid_shape_with_one_line(controls, message):
    with pytest.raises(UserError, match=message) as caught:
        run(denoiser(chroma=True, tempo=True), replace(conditions(5), controls=controls), 5, torch.float32)
    assert "\n" not in str(caught.value)


# --- modules against references --------------------------------------------------------------------------------------


def test_bidirectional_is_the_sum_of_both_directions():
    torch.manual_seed(0)
    forward_mixer, backward_mixer = (Mamba2(16, d_state=8, headdim=8, chunk_size=4).double() for _ in range(2))
    both, x = Bidirectional(forward_mixer, backward_mixer), torch.randn(2, 11, 16, dtype=DTYPE)
    assert_equal(both(x), forward_mixer(x) + backward_mixer(x.flip(1)).flip(1))
    assert both.flops(11) == forward_mixer.flops(11) + backward_mixer.flops(11)
    assert not torch.equal(forward_mixer(x), backward_mixer(x))


def rotary_reference(x):
    """x [T, P]: each pair of features, as a complex number, rotated by its position's angle."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    rates = 10_000.0 ** (-torch.arange(pairs.shape[-1], dtype=DTYPE) * 2 / x.shape[-1])
    angles = torch.arange(len(x), dtype=DTYPE)[:, None] * rates
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_full_attention_equals_softmax_over_valid_frames():
    torch.manual_seed(0)
    layer, x = FullAttention(12, n_heads=3).double().eval(), torch.randn(2, 9, 12, dtype=DTYPE)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    found = layer(x, mask)
    for item, length in ((0, 9), (1, 5)):
        valid, heads = x[item, :length], []
        for head in range(3):
            q, k, v = (p.weight[4 * head : 4 * head + 4] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            scores = rotary_reference(valid @ q.T) @ rotary_reference(valid @ k.T).T / 4**0.5
            heads.append(scores.softmax(-1) @ (valid @ v.T))
        wanted = torch.cat(heads, -1) @ layer.out_proj.weight.T
        assert_equal(found[item, :length], wanted)
        assert not found[item, length:].any()
    assert_equal(layer(x[:1]), found[:1])


def test_linear_attention_equals_its_formula():
    torch.manual_seed(0)
    layer, x = unet.LinearAttention(12, n_heads=3).double(), torch.randn(2, 9, 12, dtype=DTYPE)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    found = layer(x, mask)
    for item, length in ((0, 9), (1, 5)):
        valid = x[item, :length]
        q, k, v = layer.qkv(layer.norm(valid)).chunk(3, -1)
        heads = []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
            weights = k[:, part].softmax(0).T @ v[:, part]  # [P, P], sum over frames
            heads.append(q[:, part].softmax(-1) @ weights)
        assert_equal(found[item, :length], valid + layer.out(torch.cat(heads, -1)))


def perturbed(module):
    """The module with random parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


def test_adaln_sublayer_equals_its_formula_and_adds_nothing_at_first():
    torch.manual_seed(0)
    sublayer = AdaLNSublayer(8, 6, nn.Linear(8, 8)).double()
    x, embedding = torch.randn(2, 5, 8, dtype=DTYPE), torch.randn(2, 6).double()
    assert torch.equal(sublayer(x, embedding), x)
    perturbed(sublayer)
    shift, scale, gate = sublayer.adaln(embedding * embedding.sigmoid())[:, None].split(8, -1)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_equal(sublayer(x, embedding), x + gate * sublayer.inner(normed * (1 + scale) + shift))


def test_residual_block_is_the_identity_at_first():
    block, x, embedding = unet.ResidualBlock(8, 8, 6, dropout=0.0), torch.randn(2, 5, 8), torch.randn(2, 6)
    assert torch.equal(block(x, embedding, None), x)
    assert not torch.allclose(perturbed(block)(x, embedding, None), x)


def test_downsample_averages_valid_frames():
    x = torch.tensor([2.0, 4.0, 6.0, 50.0, 70.0, 90.0])[None, :, None]
    mask = torch.tensor([[True, True, True, False, False, False]])
    assert unet._downsample(x, mask).flatten().tolist() == [3, 6, 0]
    assert unet._downsample(x, None).flatten().tolist() == [3, 28, 80]


@pytest.mark.parametrize(
    "layer",
    [build_bidirectional("attention", 8, n_heads=2, dropout=0.5), unet.ResidualBlock(8, 8, 6, dropout=0.5)],
    ids=["attention", "residual"],
)
def test_denoiser_layer_dropout_acts_in_training_only(layer):
    perturbed(layer).train()
    inputs = (torch.randn(1, 20, 8), *((torch.randn(1, 6), None) if isinstance(layer, unet.ResidualBlock) else ()))
    assert not torch.equal(layer(*inputs), layer(*inputs))
    layer.eval()
    assert torch.equal(layer(*inputs), layer(*inputs))


def test_denoiser_stack_repeats_its_list_of_layers():
    model = new_denoiser(n_layers=5, layers=["mamba2", "mamba2", "attention"])
    kinds = [type(block.mixer.inner) for block in model.network.blocks]
    assert kinds == [Bidirectional, Bidirectional, FullAttention, Bidirectional, Bidirectional]
