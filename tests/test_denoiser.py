"""The latent denoiser: any length, padding, what it is told, both directions, gradients, costs, statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
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

WIDE = torch.float64
FRAMES = 13  # no multiple of the U-Net's stride, 4
over_networks = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module", params=NETWORKS)
def model(request):
    return denoiser(request.param, chroma=True, tempo=True).double()


def assert_equal(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def told_all(frames=FRAMES, lengths=(4, 0, 7), **more):
    """Everything that the model can be told."""
    generator = torch.Generator().manual_seed(8)
    chroma = torch.rand(len(lengths), 12, frames, generator=generator, dtype=WIDE)
    tempo = torch.linspace(60.0, 180.0, len(lengths), dtype=WIDE)
    return conditions(frames, lengths, WIDE, controls=Controls(chroma, tempo), **more)


def run(model, given, frames=FRAMES, dtype=WIDE):
    with torch.no_grad():
        return model(*noisy(frames, len(given.coarse_codes), dtype), given)


@pytest.mark.parametrize("frames", [1, 5, 37, 64])
def test_any_length(model, frames):
    out = run(model, told_all(frames), frames)
    assert out.shape == (3, C, frames) and out.isfinite().all()
    assert (out != 0).any(1).all()


def test_padding_changes_no_real_frame(model):
    """However much of it there is and whatever stands in it; an item alone and unpadded is what it is in the batch."""
    lengths = (13, 6, 1)
    mask = torch.arange(FRAMES) < torch.tensor(lengths)[:, None]
    given = told_all(mask=mask)
    x, time = noisy(FRAMES, dtype=WIDE)
    with torch.no_grad():
        whole = model(x, time, given)
        other = replace(given, coarse_codes=given.coarse_codes.masked_fill(~mask[:, None], 9.0))
        changed = model(x.masked_fill(~mask[:, None], -7.0), time, other)
        parts = (x, given.coarse_codes, given.controls.chroma, mask.int())
        longer = [pad(part, (0, 9), value=2) for part in parts]
        wide = replace(given, coarse_codes=longer[1], controls=replace(given.controls, chroma=longer[2]), mask=longer[3] == 1)
        padded = model(longer[0], time, wide)
        for item, length in enumerate(lengths):
            text = TextCondition(*(part[item : item + 1] for part in given.text))
            controls = given.controls.rows(slice(item, item + 1)).columns(slice(length))
            alone = replace(given, coarse_codes=given.coarse_codes[item, None, :, :length], controls=controls, text=text, mask=None)
            expected = model(x[item, None, :, :length], time[item, None], alone)[0]
            for found in (whole, changed, padded):
                assert_equal(found[item, :, :length], expected)


def test_padding_gets_no_gradient_and_gives_none(model):
    mask = torch.arange(FRAMES) < torch.tensor([13, 6, 2])[:, None]
    x, time = noisy(FRAMES, dtype=WIDE)
    gradients = []
    for filling in (0.0, 5.0):
        given = told_all(mask=mask)
        inputs = [part.masked_fill(~mask[:, None], filling).requires_grad_() for part in (x, given.coarse_codes)]
        out = model(inputs[0], time, replace(given, coarse_codes=inputs[1]))
        model.zero_grad()
        out.transpose(1, 2)[mask].square().sum().backward()
        for part in inputs:
            assert not part.grad.masked_select(~mask[:, None]).any()
            assert (part.grad.transpose(1, 2)[mask] != 0).any(-1).all()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_mask_of_real_frames_only_is_none(model):
    given = told_all(frames=8)
    assert torch.equal(run(model, replace(given, mask=torch.ones(3, 8, dtype=torch.bool)), 8), run(model, given, 8))


@pytest.mark.parametrize("where", ["left", "right", "scattered"])
def test_text_padding_changes_nothing(model, where):
    given = told_all()
    slots = {"left": range(9, 16), "right": range(7), "scattered": [1, 2, 5, 8, 9, 13, 15]}[where]
    embeddings = torch.full((3, 16, TEXT_DIM), torch.nan)  # whatever stands in padding is not read
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for row, real in enumerate(given.text.mask):
        chosen = torch.tensor(list(slots)[: int(real.sum())], dtype=torch.long)
        embeddings[row, chosen], mask[row, chosen] = given.text.embeddings[row, real], True
    assert_equal(run(model, given.with_text(TextCondition(embeddings, mask))), run(model, given))


def test_everything_it_is_told_matters(model):
    given = told_all(coarse_noise_aug=torch.tensor([0.1, 0.2, 0.3], dtype=WIDE))
    yes = torch.ones(3, dtype=torch.bool)
    chroma, tempo = given.controls.chroma, given.controls.tempo
    nan_chroma = chroma.clone()
    nan_chroma[0, :, :4] = torch.nan

    def told(**changes):
        return replace(given, controls=replace(given.controls, **changes))

    whole = run(model, given)
    assert_equal(run(model, replace(given, has_coarse=yes)), whole)
    changes = {
        "text": given.with_text(captions(4, 3, 7, seed=9)),
        "no text": given.with_text(captions(0, 1, 0)),
        "another sketch": replace(given, coarse_codes=given.coarse_codes.flip(2)),
        "no sketch": given.without_coarse(),
        "sketch noise": replace(given, coarse_noise_aug=None),
        "no tempo": told(tempo=None),
        "another tempo": told(tempo=tempo * 1.1),
        "no chroma": told(chroma=None),
        "another chroma": told(chroma=chroma.roll(1, 1)),
    }
    outs = {what: run(model, other) for what, other in changes.items()}
    for what, out in outs.items():
        assert ((out - whole).abs().amax((1, 2)) > 1e-3).all(), what
    x, time = noisy(FRAMES, dtype=WIDE)
    with torch.no_grad():
        assert ((model(x, 1 - time, given) - whole).abs().amax((1, 2))[[0, 2]] > 1e-3).all()
    unknown = torch.tensor([120.0, torch.nan, torch.nan], dtype=WIDE)
    mixed = run(model, told(tempo=unknown.where(unknown.isnan(), tempo)))
    assert_equal(mixed[0], whole[0])
    assert_equal(mixed[1:], outs["no tempo"][1:])
    assert_equal(run(model, told(chroma=torch.full_like(chroma, torch.nan))), outs["no chroma"])
    partly = run(model, told(chroma=nan_chroma))
    assert_equal(partly[1:], whole[1:])
    silent = run(model, told(chroma=nan_chroma.nan_to_num(0.0)))
    for other in (whole, silent, outs["no chroma"]):  # a gap is neither what was there, nor silence, nor no melody
        assert (partly[0] - other[0]).abs().max() > 1e-3 and partly.isfinite().all()


def test_a_sketch_that_is_withheld_is_not_read(model):
    some = torch.tensor([True, False, True])
    given = replace(told_all(), has_coarse=some)
    other = replace(given, coarse_codes=torch.where(some[:, None, None], given.coarse_codes, torch.nan))
    assert_equal(run(model, other), run(model, given))
    assert_equal(run(model, given)[[0, 2]], run(model, replace(given, has_coarse=None))[[0, 2]])
    assert_equal(run(model, given)[1], run(model, given.without_coarse())[1])


@pytest.mark.parametrize("what", ["noisy", "coarse_codes", "chroma"])
def test_both_ends_see_each_other(model, what):
    given, (x, time) = told_all(), noisy(FRAMES, dtype=WIDE)
    before = run(model, given)
    for changed, seen in ((FRAMES - 1, 0), (0, FRAMES - 1)):
        other, noise = given, x
        if what == "noisy":
            noise = x.clone()
            noise[..., changed] += 2
        else:
            part = (given.coarse_codes if what == "coarse_codes" else given.controls.chroma).clone()
            part[..., changed] += 2
            controls = replace(given.controls, chroma=part)
            other = replace(given, coarse_codes=part) if what == "coarse_codes" else replace(given, controls=controls)
        with torch.no_grad():
            after = model(noise, time, other)
        assert ((after - before)[..., seen].abs().amax(1) > 1e-7).all()


@over_networks
def test_a_new_model_says_zero_and_all_of_it_learns(name):
    model = new_denoiser(name, chroma=True, tempo=True).train()
    given, (x, time) = told_all(), noisy(FRAMES)
    chroma = given.controls.chroma.float()
    chroma[0] = torch.nan
    given = replace(given, coarse_codes=given.coarse_codes.float(), controls=Controls(chroma, torch.tensor([90.0, torch.nan, 120.0])),
                    has_coarse=torch.tensor([True, False, True]))  # fmt: skip
    assert not model(x, time, given).any()
    optimizer, target = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(3, C, FRAMES)
    learnt = set()
    for _ in range(4):  # what is zero at first stands before what learns later
        optimizer.zero_grad()
        (model(x, time, given) - target).square().mean().backward()
        learnt |= {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    silent = {key for key, _ in model.named_parameters()} - learnt
    assert not silent
    assert {"null_coarse", "chroma.null", "tempo.null"} <= learnt


@pytest.mark.parametrize("objective", ["v", "flow"])
def test_it_learns_all_that_can_be_known(objective):
    """Latents are their sketch and noise: then the least loss is known, and needs the sketch, the time and the mean."""
    torch.manual_seed(0)
    process, noise_share, steps, rate = get_objective(objective), 0.5, 250, 0.01
    model = new_denoiser(layers="attention", n_layers=1).train()
    text = captions(1)

    def loss(items):
        coarse_codes = torch.randn(items, S, 4)
        clean = coarse_codes.repeat(1, C // S, 1) + noise_share * torch.randn(items, C, 4)
        noise, time = torch.randn_like(clean), process.draw_times(items)
        told = Conditions(coarse_codes, TextCondition(text.embeddings.expand(items, -1, -1), text.mask.expand(items, -1)))
        said = model(process.noisy(clean, noise, time), time, told)
        return (said - process.target(clean, noise, time)).square().mean()

    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(64).backward()
        optimizer.step()
    time, one, none = torch.arange(1000) / 1000, torch.ones(1000, 1, 1), torch.zeros(1000, 1, 1)
    signal, spread = process.noisy(one, none, time), process.noisy(none, one, time)
    least = (noise_share**2 / ((noise_share * signal).square() + spread.square())).mean()
    with torch.no_grad():
        assert loss(4000).item() == pytest.approx(least.item(), rel=0.04)


@over_networks
def test_autocast_agrees_with_float32_and_keeps_the_residual_stream_in_it(name):
    model, given, seen = denoiser(name), conditions(FRAMES), []
    expected = run(model, given, dtype=torch.float32)
    model.network.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, given, dtype=torch.float32)
    assert seen == [torch.float32] * 2
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
def test_flops_are_those_counted(changes, tolerance, frames):
    model = denoiser(d_model=48, headdim=16, n_heads=4, d_state=32, chunk_size=64, **changes)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        melody = torch.rand(1, 12, frames) if model.config.chroma else None
        model(*noisy(frames, 1), conditions(frames, (20,), controls=Controls(melody)))
    assert model.flops(frames, 20) == pytest.approx(counter.get_total_flops(), rel=tolerance)


# --- statistics of latents ------------------------------------------------------------------------------------------


def test_normalising_and_its_inverse():
    model, latents = denoiser(), torch.randn(2, K * WIDTH, 5)
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 2.0, 4.0])
    model.set_statistics(mean, std)
    groups = latents.unflatten(1, (K, WIDTH))
    wanted = ((groups - mean[:, None, None]) / std[:, None, None]).flatten(1, 2)
    torch.testing.assert_close(model.normalised(latents), wanted)
    torch.testing.assert_close(model.denormalised(model.normalised(latents)), latents)
    torch.testing.assert_close(model.normalised(latents[:, S:], first=1), wanted[:, S:])
    torch.testing.assert_close(model.denormalised(wanted[:, S : S + WIDTH], first=1), latents[:, S : S + WIDTH])


class Books:
    """What is asked of a codec here."""

    n_codebooks, codebook_size = 4, 16

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        offsets = torch.tensor([0.0, 3.0, -1.0, 0.2, 9.0])[:, None, None]
        self.books = torch.randn(5, 16, WIDTH, generator=generator) * (1 + offsets.abs()) + offsets

    def codebook_vectors(self):
        return self.books  # one more than the codec keeps


@pytest.mark.parametrize("counted", [4096, 7])
def test_statistics_are_those_of_all_latents_of_the_training_split(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(diffusion, "_COUNTED", counted)
    store, codec = open_store(write_codes_store(tmp_path / "store")), Books()
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


def test_a_codebook_of_one_code_can_still_be_divided_by():
    found = latent_statistics(torch.ones(1, 3, 2), torch.tensor([[0, 5, 0]]))
    assert found.mean.item() == 1 and found.std.item() > 0


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_codebooks": 1}, "model.n_coarse_codebooks=1 of 1"),
        ({"n_coarse_codebooks": 0}, "model.n_coarse_codebooks=0"),
        ({"n_coarse_codebooks": 4}, "leave at least 1"),
        ({"network": "transformer"}, "choose from stack, unet"),
        ({"time_dim": 7}, "model.time_dim=7"),
        ({"layers": "lstm"}, "lstm"),
        ({"n_layers": 0}, "n_layers"),
        ({"layers": "attention", "n_heads": 3}, "n_heads 3"),
        ({"network": "unet", "n_heads": 3}, "n_heads 3"),
        ({"d_modle": 3}, "d_modle"),
    ],
)
def test_sizes_that_make_no_model(change, says):
    with pytest.raises(UserError, match=says) as caught:
        build_model({"kind": "latent_denoiser", **SIZES, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(3, C + 1, 5)}, r"noisy latents are \[3, 10, 5\]"),
        ({"x": torch.zeros(3, C, 6)}, r"sketch latents are \[3, 3, 5\], the denoiser takes \[3, 3, 6\]"),
        ({"x": torch.zeros(3, C, 0), "coarse_codes": torch.zeros(3, S, 0)}, "noisy latents"),
        ({"coarse_codes": torch.zeros(3, S - 1, 5)}, "sketch latents"),
        ({"coarse_codes": torch.zeros(2, S, 5)}, "sketch latents"),
        ({"text": captions(3, 3)}, "2 captions for a batch of 3"),
        ({"text": TextCondition(torch.zeros(3, 2, 5), torch.ones(3, 2, dtype=torch.bool))}, "model.text_dim"),
        ({"controls": Controls(torch.zeros(3, 12, 5))}, "this denoiser was not trained with chroma: leave it out"),
        ({"controls": Controls(tempo=torch.zeros(3))}, "this denoiser was not trained with tempo: leave it out"),
        ({"mask": torch.ones(3, 6, dtype=torch.bool)}, r"the mask is \[3, 6\], the denoiser takes \[3, 5\]"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"the mask is \[5\]"),
    ],
)
def test_what_it_cannot_be_told_is_one_clear_line(change, says):
    change = dict(change)
    x = change.pop("x", torch.zeros(3, C, 5))
    with pytest.raises(UserError, match=says) as caught:
        denoiser()(x, torch.zeros(3), replace(conditions(5), **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("controls", "says"),
    [
        (Controls(torch.zeros(3, 12, 6)), r"the chroma is \[3, 12, 6\], the denoiser takes \[3, 12, 5\]"),
        (Controls(torch.zeros(3, 5, 12)), r"the chroma is \[3, 5, 12\]"),
        (Controls(torch.zeros(1, 12, 5)), r"the chroma is \[1, 12, 5\]"),
        (Controls(tempo=torch.zeros(2)), r"the tempo is \[2\], the denoiser takes \[3\]"),
        (Controls(tempo=torch.zeros(3, 1)), r"the tempo is \[3, 1\]"),
    ],
)
def test_controls_of_another_shape_are_one_clear_line(controls, says):
    with pytest.raises(UserError, match=says) as caught:
        run(denoiser(chroma=True, tempo=True), replace(conditions(5), controls=controls), 5, torch.float32)
    assert "\n" not in str(caught.value)


# --- the parts against references -----------------------------------------------------------------------------------


def test_two_ways_are_one_mixer_ahead_and_one_from_the_end():
    torch.manual_seed(0)
    ahead, back = (Mamba2(16, d_state=8, headdim=8, chunk_size=4).double() for _ in range(2))
    both, x = Bidirectional(ahead, back), torch.randn(2, 11, 16, dtype=WIDE)
    assert_equal(both(x), ahead(x) + back(x.flip(1)).flip(1))
    assert both.flops(11) == ahead.flops(11) + back.flops(11)
    assert not torch.equal(ahead(x), back(x))


def plain_rotary(x):
    """x [T, P]: each pair of features, as one complex number, turned by its position's angle."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    rates = 10_000.0 ** (-torch.arange(pairs.shape[-1], dtype=WIDE) * 2 / x.shape[-1])
    angles = torch.arange(len(x), dtype=WIDE)[:, None] * rates
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_full_attention_is_softmax_over_all_real_frames():
    torch.manual_seed(0)
    layer, x = FullAttention(12, n_heads=3).double().eval(), torch.randn(2, 9, 12, dtype=WIDE)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    found = layer(x, mask)
    for item, length in ((0, 9), (1, 5)):
        real, heads = x[item, :length], []
        for head in range(3):
            q, k, v = (p.weight[4 * head : 4 * head + 4] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            scores = plain_rotary(real @ q.T) @ plain_rotary(real @ k.T).T / 4**0.5
            heads.append(scores.softmax(-1) @ (real @ v.T))
        wanted = torch.cat(heads, -1) @ layer.out_proj.weight.T
        assert_equal(found[item, :length], wanted)
        assert not found[item, length:].any()
    assert_equal(layer(x[:1]), found[:1])


def test_linear_attention_is_its_formula():
    torch.manual_seed(0)
    layer, x = unet.LinearAttention(12, n_heads=3).double(), torch.randn(2, 9, 12, dtype=WIDE)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    found = layer(x, mask)
    for item, length in ((0, 9), (1, 5)):
        real = x[item, :length]
        q, k, v = layer.qkv(layer.norm(real)).chunk(3, -1)
        heads = []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
            weights = k[:, part].softmax(0).T @ v[:, part]  # what each feature of the keys has gathered
            heads.append(q[:, part].softmax(-1) @ weights)
        assert_equal(found[item, :length], real + layer.out(torch.cat(heads, -1)))


def some_of(module):
    """The module with all its parameters at random."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


def test_a_branch_is_its_formula_and_adds_nothing_at_first():
    torch.manual_seed(0)
    sublayer, x, vector = AdaLNSublayer(8, 6, nn.Linear(8, 8)).double(), torch.randn(2, 5, 8, dtype=WIDE), torch.randn(2, 6)
    vector = vector.double()
    assert torch.equal(sublayer(x, vector), x)
    some_of(sublayer)
    shift, scale, gate = sublayer.adaln(vector * vector.sigmoid())[:, None].split(8, -1)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_equal(sublayer(x, vector), x + gate * sublayer.inner(normed * (1 + scale) + shift))


def test_a_residual_block_is_the_identity_at_first():
    block, x, vector = unet.ResidualBlock(8, 8, 6, dropout=0.0), torch.randn(2, 5, 8), torch.randn(2, 6)
    assert torch.equal(block(x, vector, None), x)
    assert not torch.allclose(some_of(block)(x, vector, None), x)


def test_half_the_frames_are_means_of_the_real_ones():
    x = torch.tensor([2.0, 4.0, 6.0, 50.0, 70.0, 90.0])[None, :, None]
    mask = torch.tensor([[True, True, True, False, False, False]])
    assert unet._halved(x, mask).flatten().tolist() == [3, 6, 0]
    assert unet._halved(x, None).flatten().tolist() == [3, 28, 80]


@pytest.mark.parametrize(
    "layer",
    [build_bidirectional("attention", 8, n_heads=2, dropout=0.5), unet.ResidualBlock(8, 8, 6, dropout=0.5)],
    ids=["attention", "residual"],
)
def test_dropout_acts_in_training_only(layer):
    some_of(layer).train()
    inputs = (torch.randn(1, 20, 8), *((torch.randn(1, 6), None) if isinstance(layer, unet.ResidualBlock) else ()))
    assert not torch.equal(layer(*inputs), layer(*inputs))
    layer.eval()
    assert torch.equal(layer(*inputs), layer(*inputs))


def test_a_stack_repeats_its_list_of_layers():
    model = new_denoiser(n_layers=5, layers=["mamba2", "mamba2", "attention"])
    kinds = [type(block.mixer.inner) for block in model.network.blocks]
    assert kinds == [Bidirectional, Bidirectional, FullAttention, Bidirectional, Bidirectional]
