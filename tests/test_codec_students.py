"""Student codec decoders: architectures, weight transfer, stage matching and training."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import assert_same_runs, run_contents, train_with_stops
from small_stores import SAMPLE_RATE, small_codec, write_audio_store
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.dac.modeling_dac import DacConfig, DacDecoder

from ssmttm import config
from ssmttm.codecs import StudentCodec, TinyCodec, TinyCodecConfig, build_codec, encoder_of, load_codec
from ssmttm.codecs.metrics import codec_quality
from ssmttm.codecs.students.cost import decoding_cost
from ssmttm.distill.codec.matching import StageProjections, match_frame_rates, matched_stages, traced_outputs
from ssmttm.distill.codec.transfer import transfer_decoder
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.accuracy import reconstruct_with_codec
from ssmttm.export.model_folder import export
from ssmttm.training import loop
from ssmttm.training.tasks import distill_codec

TINY = TinyCodecConfig(
    sample_rate=8000, hop_length=320, window=640, n_codebooks=3, codebook_size=32, codebook_dim=4, encoder_width=24,
    encoder_blocks=(1, 1), decoder_width=32, decoder_blocks=(2, 2), decoder_look_ahead=(1, 1),
)  # fmt: skip
SPECTRAL = {"kind": "spectral", "width": 32, "blocks": [2, 2], "look_ahead": [1, 1]}
DAC = {
    "kind": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 32, "downsampling_ratios": [2, 3, 5],
    "upsampling_ratios": [5, 3, 2], "sampling_rate": 3000, "n_codebooks": 3, "codebook_size": 16, "codebook_dim": 4,
}  # fmt: skip
CONV = {"kind": "conv", "width": 32, "ratios": [5, 3, 2]}


def randomised(codec):
    """No parameter keeps its initial value: a scale of 1 or a bias of 0 would hide what is not transferred."""
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.add_(0.3 * parameter.abs().mean().clamp_min(0.1) * torch.randn_like(parameter))
    return codec.eval()


def teacher_of(kind):
    torch.manual_seed(0)
    return randomised(TinyCodec(TINY) if kind == "spectral" else build_codec(DAC))


def codes_for(codec, frames=40, batch=2, seed=0):
    torch.manual_seed(seed)
    return torch.randint(codec.codebook_size, (batch, codec.n_codebooks, frames))


def student_of(teacher, sizes, transfer=True):
    student = StudentCodec.from_teacher(teacher, sizes).eval()
    names = transfer_decoder(teacher, student, [codes_for(teacher, seed=s) for s in (1, 2)]) if transfer else []
    return student, names


SIZES = {"spectral": SPECTRAL, "conv": CONV}


# --- weight transfer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_student_of_equal_size_decodes_as_its_teacher(kind):
    teacher = teacher_of(kind)
    student, transferred = student_of(teacher, SIZES[kind])
    assert sorted(transferred) == sorted(name for name, _ in student.named_parameters())
    codes = codes_for(teacher)
    decoded = teacher.decode(codes)
    assert decoded.std() > 1e-2
    torch.testing.assert_close(student.decode(codes), decoded, atol=2e-5, rtol=1e-4)
    for n in (2, 1):
        fewer = student.keep_codebooks(n).decode(codes[:, :n])
        torch.testing.assert_close(fewer, teacher.keep_codebooks(n).decode(codes[:, :n]), atol=2e-5, rtol=1e-4)


def zero(parameter, dead, axis=0):
    parameter.data.index_fill_(axis, dead, 0.0)


def test_transfer_drops_silent_channels_of_a_dac_exactly():
    teacher = teacher_of("conv")
    decoder = teacher.model.decoder
    halves = [torch.randperm(32 // 2**i)[: 16 // 2**i] for i in range(4)]
    zero(decoder.conv1.weight, halves[0]), zero(decoder.conv1.bias, halves[0])
    for block, dead in zip(decoder.block, halves[1:], strict=True):
        zero(block.conv_t1.weight, dead, 1), zero(block.conv_t1.bias, dead)
        for unit in (block.res_unit1, block.res_unit2, block.res_unit3):
            inner = torch.randperm(2 * len(dead))[: len(dead)]
            zero(unit.conv1.weight, inner), zero(unit.conv1.bias, inner)
            zero(unit.conv2.weight, dead), zero(unit.conv2.bias, dead)
    student, _ = student_of(teacher, {**CONV, "width": 16})
    codes = codes_for(teacher)
    torch.testing.assert_close(student.decode(codes), teacher.decode(codes), atol=2e-5, rtol=1e-4)


def test_depthwise_student_equals_dac_with_diagonal_convolutions():
    teacher = teacher_of("conv")
    for block in teacher.model.decoder.block:
        for unit in (block.res_unit1, block.res_unit2, block.res_unit3):
            unit.conv1.weight.data *= torch.eye(len(unit.conv1.weight))[..., None]
    student, _ = student_of(teacher, {**CONV, "depthwise": True})
    codes = codes_for(teacher)
    torch.testing.assert_close(student.decode(codes), teacher.decode(codes), atol=2e-5, rtol=1e-4)


def test_transfer_drops_silent_channels_and_hidden_units_of_a_tiny_codec():
    """Channels come in pairs of opposite sign: their mean is 0 with and without the silent ones, and layer norms over
    fewer channels differ by one factor, which the transfer measures."""
    teacher = teacher_of("spectral")
    dead_pairs = torch.randperm(16)[:8]
    dead = torch.cat([2 * dead_pairs, 2 * dead_pairs + 1])

    def mirror(weight, *biases):
        for value in (weight.data, *(bias.data for bias in biases)):
            value[1::2] = -value[::2]
            zero(value, dead)

    mirror(teacher.widen.weight, teacher.widen.bias)
    up = teacher.up.weight.data.view(2, 32, 32), teacher.up.bias.data.view(2, 32)
    mirror(up[0][0], up[1][0]), mirror(up[0][1], up[1][1])
    for block in [*teacher.decoder_coarse, *teacher.decoder_fine]:
        mirror(block.contract.weight, block.contract.bias)
        block.scale.data[1::2] = block.scale.data[::2]
        block.depthwise.weight.data[1::2] = block.depthwise.weight.data[::2]
        mirror(block.depthwise.bias)
        zero(block.norm.weight, dead), zero(block.norm.bias, dead)
        silent = torch.randperm(64)[:32]
        zero(block.expand.weight, silent), zero(block.expand.bias, silent)
    zero(teacher.head.norm.weight, dead), zero(teacher.head.norm.bias, dead)
    student, _ = student_of(teacher, {**SPECTRAL, "width": 16})
    codes = codes_for(teacher)
    torch.testing.assert_close(student.decode(codes), teacher.decode(codes), atol=1e-3, rtol=1e-3)


def test_transfer_selects_blocks_evenly_and_only_codebooks_of_other_kinds():
    teacher = teacher_of("spectral")
    student, _ = student_of(teacher, {**SPECTRAL, "blocks": [1, 2]})
    assert torch.equal(student.decoder.coarse[0].expand.bias, teacher.decoder_coarse[1].expand.bias)
    for kind, sizes in (("spectral", {**CONV, "width": 16, "ratios": [8, 8, 5]}), ("conv", SPECTRAL)):
        other = teacher_of(kind)
        student, transferred = student_of(other, sizes)
        assert transferred == [] and torch.equal(student.codebooks, other.codebook_vectors())
        assert student.decode(codes_for(other)).shape == other.decode(codes_for(other)).shape


def test_spectral_student_of_an_encodec():
    teacher = build_codec({"kind": "encodec", "num_filters": 4, "upsampling_ratios": [5, 4, 2], "hidden_size": 16,
                           "codebook_size": 32, "target_bandwidths": [6.0], "sampling_rate": 24000})  # fmt: skip
    student, transferred = student_of(teacher.eval(), SPECTRAL)
    codes = codes_for(teacher, 9)
    assert transferred == [] and student.decode(codes).shape == (2, 1, 9 * 40) == teacher.decode(codes).shape
    with traced_outputs(student.decoder_stages()) as ours, traced_outputs(teacher.decoder_stages()) as theirs:
        student.decode(codes), teacher.decode(codes)
    assert [x.shape[1] for x in theirs] == [9, 9 * 5, 9 * 20, 9 * 40]
    assert matched_stages(ours, theirs) == [0, 0]  # frames at 1 and 2 times the codes'


# --- decoders ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(),
    sizes=st.sampled_from([
        SPECTRAL, {**SPECTRAL, "look_ahead": [0, 2], "upsampling": 5}, {**SPECTRAL, "window": 320, "upsampling": 4},
        {**CONV, "ratios": [5, 4, 16]}, {**CONV, "ratios": [5, 8, 8], "depthwise": True}, {**CONV, "ratios": [64, 5]},
    ]),
)  # fmt: skip
def test_streaming_equals_decoding_for_any_chunking(data, sizes):
    student, _ = student_of(TinyCodec(TINY), {**sizes, "width": 8}, transfer=False)
    randomised(student)
    parts = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=6))
    codes = codes_for(student, sum(parts))
    chunks = list(student.decode_stream(iter(codes.split(parts, dim=-1))))
    if not sum(parts):
        assert not chunks
        return
    whole = student.decode(codes)
    assert whole.shape == (2, 1, sum(parts) * 320) and whole.std() > 1e-4
    torch.testing.assert_close(torch.cat(chunks, dim=-1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [
    SPECTRAL, {**SPECTRAL, "look_ahead": [0, 2], "upsampling": 5}, {**SPECTRAL, "window": 320, "upsampling": 4},
    {**SPECTRAL, "window": 1280, "blocks": [1, 1]}, {**CONV, "ratios": [5, 4, 16]}, {**CONV, "ratios": [64, 5]},
])  # fmt: skip
def test_context_is_the_exact_receptive_field(sizes):
    student, _ = student_of(TinyCodec(TINY), {**sizes, "width": 16}, transfer=False)
    decoder = randomised(student).decoder.double()
    history, look_ahead = student.context
    latents = torch.randn(1, 12, 80, dtype=torch.float64)
    changed = latents.clone()
    changed[..., 40] += 1e3
    with torch.no_grad():
        moved = (decoder(latents) != decoder(changed))[0, 0].view(80, 320).any(dim=1).nonzero()[:, 0]
    assert (moved.min(), moved.max()) == (40 - look_ahead, 40 + history)


def test_student_context_is_within_bound_of_dac():
    student, _ = student_of(teacher_of("conv"), CONV, transfer=False)
    assert all(own <= bound for own, bound in zip(student.context, teacher_of("conv").context, strict=True))


@pytest.mark.parametrize("frames", [1, 7])
@pytest.mark.parametrize("sizes", [SPECTRAL, {**SPECTRAL, "upsampling": 4, "expansion": 3}, {**CONV, "ratios": [5, 64]},
                                   {**CONV, "ratios": [5, 64], "depthwise": True}])  # fmt: skip
def test_decoder_flops_equal_torch_flop_counter(sizes, frames):
    decoder = student_of(TinyCodec(TINY), sizes, transfer=False)[0].decoder
    with FlopCounterMode(display=False) as counter:
        decoder(torch.randn(1, 12, frames))
    assert decoder.flops(frames) == counter.get_total_flops()


def test_decoding_cost_of_teacher_and_student():
    teacher = teacher_of("spectral")
    student, _ = student_of(teacher, SPECTRAL)
    cost = decoding_cost(student)
    assert cost.flops == student.decoder.flops(25)
    assert cost.parameters == sum(p.numel() for p in student.parameters()) + student.codebooks.numel()
    parts = (teacher.quantiser.project_out, teacher.widen, teacher.decoder_coarse, teacher.up, teacher.decoder_fine,
             teacher.head)  # fmt: skip
    own = sum(p.numel() for part in parts for p in part.parameters()) + teacher.quantiser.codebooks.numel()
    assert decoding_cost(teacher).parameters == own and decoding_cost(teacher).flops > cost.flops


def test_conv_decoder_has_parameters_of_transformers_dac_decoder():
    student, _ = student_of(teacher_of("conv"), CONV, transfer=False)
    theirs = DacDecoder(DacConfig(decoder_hidden_size=32, upsampling_ratios=[5, 3, 2])).state_dict()
    ours = {name: value.shape for name, value in student.decoder.state_dict().items()}
    assert ours.pop("conv1.weight") == (32, 3 * 5, 7)
    assert ours == {name: value.shape for name, value in theirs.items() if name != "conv1.weight"}


# --- stages -----------------------------------------------------------------------------------------------------------


def test_stage_distance_gradient_equals_closed_form():
    torch.manual_seed(0)
    projections = StageProjections([torch.nn.Linear(3, 5), torch.nn.Linear(2, 4)])
    shapes = ((2, 6, 3), (2, 4, 2)), ((2, 6, 5), (2, 12, 4))
    ours, theirs = ([torch.randn(shape) for shape in side] for side in shapes)
    leaves = [x.clone().requires_grad_() for x in ours]
    inputs = [*leaves, *projections.parameters()]
    gradients = torch.autograd.grad(projections(leaves, theirs).sum(), inputs)
    targets = [theirs[0], theirs[1].view(2, 4, 3, 4).mean(2)]
    for linear, x, target, gradient in zip(projections, ours, targets, gradients, strict=False):
        error = x @ linear.weight.T + linear.bias - target
        energy = target.square().sum((1, 2), keepdim=True)  # of each item
        expected = error @ linear.weight * (2 / energy / 2)  # of a mean over two stages
        torch.testing.assert_close(gradient, expected)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_stage_projections_start_at_least_squares_optimum():
    torch.manual_seed(0)
    x, y = torch.randn(2, 30, 4), torch.randn(2, 30, 3) * torch.tensor([1.0, 9.0])[:, None, None]
    image = x @ torch.randn(4, 6) + 3
    copied, fitted = (StageProjections.fitted([x], [target]) for target in (image, y))
    assert copied([x], [image]).max() < 1e-10
    optimum = fitted([x], [y]).sum().item()
    with torch.no_grad():
        for parameter in fitted.parameters():
            for change in (0.02, -0.02):
                parameter.add_(change)
                assert fitted([x], [y]).sum().item() > optimum
                parameter.sub_(change)
    teacher = teacher_of("conv")
    student, _ = student_of(teacher, CONV)
    codes = codes_for(teacher)
    with traced_outputs(student.decoder_stages()) as ours, traced_outputs(teacher.decoder_stages()) as theirs:
        student.decode(codes), teacher.decode(codes)
    assert [x.shape for x in ours] == [x.shape for x in theirs] == [(2, 199, 16), (2, 596, 8), (2, 1192, 4)]
    assert matched_stages(ours, theirs) == [0, 1, 2] and matched_stages(ours[:1], [*theirs[:1], *theirs]) == [1]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_match_frame_rates_pools_to_the_lower_rate():
    slow, quick = torch.randn(1, 4, 3), torch.arange(24.0).view(1, 12, 2)
    a, b = match_frame_rates(slow, quick)
    assert a is slow and torch.equal(b, quick.view(1, 4, 3, 2).mean(2))
    assert torch.equal(match_frame_rates(quick, slow)[0], b)


# --- folders and checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_student_is_restored_from_its_folder(kind, tmp_path):
    teacher = teacher_of(kind)
    student, _ = student_of(teacher, SIZES[kind])
    student.save(tmp_path / "whole", half=False)
    student.save(tmp_path / "half")
    codes = codes_for(teacher)
    loaded = load_codec(tmp_path / "whole")
    assert isinstance(loaded, StudentCodec) and loaded.name == "whole" and not loaded.training
    assert loaded.fingerprint == teacher.fingerprint and loaded.decoder_fingerprint == student.decoder_fingerprint
    assert torch.equal(loaded.decode(codes), student.decode(codes))
    assert torch.equal(loaded.from_latents(loaded.to_latents(codes)), codes)
    half = load_codec(tmp_path / "half", n_codebooks=2)
    assert half.fingerprint == teacher.fingerprint and half.decoder_fingerprint != student.decoder_fingerprint
    half.check_codebooks(teacher)
    torch.testing.assert_close(half.decode(codes[:, :2]), student.keep_codebooks(2).decode(codes[:, :2]), atol=2e-2,
                               rtol=0)  # fmt: skip
    settings = json.loads((tmp_path / "half" / "config.json").read_text())
    assert settings["teacher"] == teacher.name and settings["decoder"]["kind"] == kind
    (tmp_path / "half" / "config.json").write_text(json.dumps({**settings, "sample_rats": 3}))
    with pytest.raises(UserError, match="cannot be read"):
        load_codec(tmp_path / "half")


def test_student_cannot_encode_or_teach():
    student, _ = student_of(teacher_of("spectral"), SPECTRAL, transfer=False)
    with pytest.raises(UserError, match="only decodes: encode with its teacher, tiny"):
        student.encode(torch.zeros(1, 1, 640))
    with pytest.raises(UserError, match="is a student"):
        StudentCodec.from_teacher(student, SPECTRAL)
    with pytest.raises(UserError, match="other codebooks"):
        student.check_codebooks(randomised(TinyCodec(TINY)))


def test_codec_quality_of_student_uses_codes_of_teacher():
    teacher = teacher_of("spectral")
    student, _ = student_of(teacher, SPECTRAL)
    wav = 0.1 * torch.randn(1, 1, 16000)
    assert codec_quality(student, wav, teacher) == pytest.approx(codec_quality(teacher, wav), abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("spectral", {"width": 64}, r"codec_student\.width is 64, its teacher's 32"),
        ("spectral", {"width": 16, "expansion": 5}, "expansion is 80, its teacher's 64"),
        ("spectral", {"blocks": [3, 2]}, r"blocks\[0\] is 3, its teacher's 2"),
        ("spectral", {"look_ahead": [1, 0]}, "look_ahead"),
        ("spectral", {"window": 1280}, r"codec_student\.window=640, as of the teacher, got 1280"),
        ("spectral", {"upsampling": 7}, "upsampling=7"),
        ("spectral", {"upsampling": 1, "window": 320}, "window=320"),
        ("spectral", {"kernel": 1}, r"look_ahead must be in \[0, 1\)"),
        ("spectral", {"width": 0}, "sizes must be at least 1"),
        ("spectral", {"ratios": [2]}, "ratios"),
        ("spectral", {"kind": "linear"}, "unknown decoder kind 'linear': choose from spectral, conv"),
        ("conv", {"width": 64}, r"codec_student\.width is 64"),
        ("conv", {"width": 20}, "multiple of 8"),
        ("conv", {"ratios": [3, 5, 2]}, r"needs codec_student\.ratios=\[5, 3, 2\]"),
        ("conv", {"ratios": [5, 2]}, "must be the codec.s hop length 30"),
        ("conv", {"ratios": [30, 1]}, "at least 2"),
    ],
)
def test_invalid_sizes_are_rejected_in_one_line(kind, sizes, message):
    with pytest.raises(UserError, match=message) as caught:
        student_of(teacher_of(kind), {**SIZES[kind], **sizes})
    assert "\n" not in str(caught.value)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_audio_store(tmp_path_factory.mktemp("store") / "audio")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "codec"
    small_codec(folder)
    (folder / "card.json").write_text(json.dumps({"data": {"licences": {"CC-BY-4.0": 3}}}))
    return folder


@pytest.fixture
def config_of(store, teacher_folder, tmp_path):
    def make(*overrides, run_dir="run"):
        sizes = (
            f"data.store={store}", f"teacher={teacher_folder}", f"run_dir={tmp_path / run_dir}", "data.batch_size=4",
            "codec_student.width=8", "codec_student.blocks=[1,1]", "optim.lr=0.01", "schedule.warmup_steps=2",
            "codec_training.adversarial_start=3", "train.log_every=1", "train.eval_every=0", "train.precision=fp32",
            "train.checkpoint_every=100", "train.sample_every=0",
        )  # fmt: skip
        return config.load("experiment=tinyttm_codec", *sizes, *overrides)

    return make


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_student_learns_and_its_export_decodes(config_of, teacher_folder, tmp_path):
    overrides = (
        "codec_training.adversarial_start=null",
        "train.steps=30",
        "train.eval_every=30",
        "train.sample_every=30",
    )
    run_dir = loop.train(config_of(*overrides))
    rows = metrics(run_dir)
    losses = [row for row in rows if "loss" in row]
    assert {"mel", "spectrum", "decoder"} <= losses[0].keys() and any("valid/mel" in row for row in rows)
    assert sum(r["mel"] for r in losses[-5:]) < 0.8 * sum(r["mel"] for r in losses[:5])
    student = load_codec(export(run_dir, tmp_path / "exported"))
    teacher = load_codec(teacher_folder)
    assert student.fingerprint == teacher.fingerprint and student.sample_rate == SAMPLE_RATE
    assert student.decode(codes_for(teacher, 5)).shape == (2, 1, 5 * teacher.hop_length)
    card = json.loads((tmp_path / "exported" / "card.json").read_text())
    assert card["task"] == "distill_codec" and card["data"]["codec"]["fingerprint"] == teacher.fingerprint
    assert card["data"]["licences"] == {"CC0-1.0": 12, "CC-BY-4.0": 3} and card["data"]["teacher"]["transferred"] > 10
    continued = config_of(
        f"init={tmp_path / 'exported'}", "codec_student.transfer=false", "train.steps=1", run_dir="continued"
    )
    assert math.isfinite(metrics(loop.train(continued))[0]["loss"])


def test_student_from_scratch_learns_stages_of_teacher(config_of):
    alone = ("losses.mel=0", "losses.spectrum=0", "codec_student.transfer=false", "codec_student.width=16")
    rows = metrics(loop.train(config_of(*alone, "codec_training.adversarial_start=null", "train.steps=40")))
    assert sum(r["decoder"] for r in rows[-5:]) < 0.8 * sum(r["decoder"] for r in rows[:5])


def test_training_with_discriminator_resumes_exactly(config_of, tmp_path, monkeypatch):
    loop.train(config_of("train.steps=6", run_dir="unbroken"))
    stopped = config_of("train.steps=6", run_dir="stopped")
    train_with_stops(stopped, distill_codec.CodecDistillTask, (2, 4), monkeypatch)
    unbroken = run_contents(tmp_path / "unbroken")
    assert_same_runs(unbroken, run_contents(tmp_path / "stopped"))
    assert {"model", "discriminator", "projections", "ema", "optimizer"} == unbroken[0].keys()


def test_only_the_students_decoder_is_trained(config_of):
    task = distill_codec.CodecDistillTask(config_of())
    before = task.teacher.fingerprint
    batch = task.loader("train", 4, 0, 1).batch(0)
    losses = task.losses(task.modules, batch, task.loss_denominators(batch), 3)
    assert losses.keys() == {"model", "discriminator"}
    assert losses["model"].keys() == {"mel", "spectrum", "decoder", "adversarial", "feature"}
    sum(losses["model"].values()).backward()
    assert all(p.grad is not None for name in ("model", "projections") for p in task.modules[name].parameters())
    assert all(p.grad is None for p in task.teacher.parameters()) and task.teacher.fingerprint == before
    assert all(p.grad is None for p in task.modules["discriminator"].parameters())
    frames = math.ceil(task.samples_per_item / 96)
    assert task.throughput(batch, 0)[2] > 4 * task.codec.decoder.flops(frames)
    unmatched = distill_codec.CodecDistillTask(config_of("losses.decoder=0"))
    assert unmatched.losses(unmatched.modules, batch, unmatched.loss_denominators(batch), 0)["model"].keys() == {
        "mel",
        "spectrum",
    }


def test_stage_distances_of_micro_batches_add_up(config_of):
    """With items of very different levels."""
    task = distill_codec.CodecDistillTask(config_of("codec_student.transfer=false"))
    batch = task.loader("train", 4, 0, 1).batch(0)
    batch["audio"] *= torch.tensor([0.01, 1.0, 0.1, 1.0])[:, None, None]
    counts = task.loss_denominators(batch)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    whole, *found = (task.losses(task.modules, b, counts, 0)["model"]["decoder"] for b in (batch, *parts))
    torch.testing.assert_close(sum(found), whole, rtol=1e-4, atol=1e-6)


def test_conv_student_of_spectral_teacher_trains(config_of):
    overrides = ("codec_student.kind=conv", "codec_student.ratios=[8,12]", "codec_student.width=16", "train.steps=2")
    rows = metrics(loop.train(config_of(*overrides)))
    assert math.isfinite(rows[-1]["decoder"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null"], "teacher is not set"),
        (["teacher=tiny_lm"], "no such folder"),
        (["teacher=ssmttm/assets/tiny_lm"], r"no config\.json"),
        (["teacher=tiny"], "audio at 2400 Hz"),
        (["codec_student.kind=wave"], r"unknown codec_student\.kind=wave"),
        (["codec_student.kind=conv"], r"codec_student\.ratios is not set"),
        (["codec_student.width=32"], "its teacher's 16"),
        (["init=somewhere"], "set only one of them"),
    ],
)
def test_invalid_settings_are_rejected(config_of, overrides, message):
    with pytest.raises(UserError, match=message):
        distill_codec.CodecDistillTask(config_of(*overrides))


def test_teacher_without_stages_is_rejected(config_of, monkeypatch):
    monkeypatch.setattr(TinyCodec, "decoder_stages", lambda self: [])
    with pytest.raises(UserError, match=r"losses\.decoder=0"):
        distill_codec.CodecDistillTask(config_of())


def test_resume_with_another_teacher_is_rejected(config_of, teacher_folder, tmp_path):
    own = tmp_path / "codec"
    small_codec(own)
    loop.train(config_of(f"teacher={own}", "train.steps=1"))
    torch.manual_seed(5)
    randomised(load_codec(own)).save(own)
    with pytest.raises(UserError, match=r"learnt from another teacher, codec .*: give that one as teacher"):
        loop.train(config_of(f"teacher={own}", "train.steps=2"))


def test_decoding_cost_counts_lstm_flops():
    """Torch's FLOP counter omits them: two layers of four gates, each with two products, at every frame."""
    sizes = {"num_filters": 4, "hidden_size": 8, "upsampling_ratios": [4, 2], "codebook_size": 16, "codebook_dim": 8}
    teacher = build_codec({"kind": "encodec", "sampling_rate": 800, "target_bandwidths": [4.0], **sizes})
    with_lstm = decoding_cost(teacher).flops
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        teacher.decode(torch.zeros(1, teacher.n_codebooks, 200, dtype=torch.int64))
    width = teacher.model.decoder.layers[1].lstm.hidden_size
    assert with_lstm - counter.get_total_flops() / 2 == 2 * 2 * 8 * width**2 * teacher.frame_rate


def test_encoder_of_student_is_found_by_name(tmp_path):
    """Evaluation needs it: the teacher codec is found by its name and checked by its fingerprint."""
    teacher = small_codec(tmp_path / "codec")
    student = StudentCodec.from_teacher(teacher, {"kind": "spectral", "width": 8})
    assert encoder_of(teacher) is teacher and encoder_of(student).fingerprint == teacher.fingerprint
    wav = torch.randn(1, 2000) * 0.1
    expected = student.decode(teacher.encode(wav[None]))[0][:, :2000]
    torch.testing.assert_close(reconstruct_with_codec(student, wav, SAMPLE_RATE, encoder_of(student)), expected)
    student.config = replace(student.config, fingerprint="0" * 16)
    with pytest.raises(UserError, match="restore the original"):
        encoder_of(student)
