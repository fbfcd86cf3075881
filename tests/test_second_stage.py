"""The second stage: seeds, batches, windows and their overlap; two-stage pipelines, their export and errors."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file, save_file
from small_cli import assert_user_error, run_captured
from small_denoisers import N_COARSE, WIDTH, K, S, captions, denoiser
from small_stores import CODEBOOK_SIZE, HOP, SAMPLE_RATE, lm_config, second_stage_config, small_codec, write_codes_store
from small_word_encoder import WordEncoder

import sample
from ssmttm import MusicPipeline, checkpoint
from ssmttm.audio.features import frame_chroma
from ssmttm.cli import main
from ssmttm.diffusion.samplers import SamplerSettings
from ssmttm.errors import UserError
from ssmttm.export.model_folder import export, export_two_stages
from ssmttm.generation import pretrained
from ssmttm.generation import second_stage as second_stage_module
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.models.controls import Controls
from ssmttm.text.condition import TextCondition
from ssmttm.training import loop

FRAMES, WINDOW, OVERLAP = 40, 16, 4  # windows begin at 0, 12 and 24
TEXT, NULL, SEEDS = captions(5, 2, 7), captions(1, seed=5), [11, 12, 13]
SAMPLERS = {
    "flow": SamplerSettings("flow", None, 3),
    "v": SamplerSettings("v", "ddpm", 3),
    "regression": SamplerSettings("regression"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("second_stage")


@pytest.fixture(scope="module")
def codec(folder):
    return small_codec(folder / "codec")


@pytest.fixture(scope="module")
def model():
    made = denoiser(chroma=True, tempo=True)
    made.set_statistics(torch.tensor([0.1, 0.2, -0.1, 0.0]), torch.tensor([1.0, 0.9, 1.2, 0.8]))
    with torch.no_grad():
        made.output.weight.mul_(3)
    return made


@pytest.fixture
def second_stage(model, codec):
    return SecondStage(model, codec, SecondStageConfig(SAMPLERS["flow"], 2.0, 1.5, WINDOW, OVERLAP))


def make_coarse_codes(frames=FRAMES, items=3):
    return torch.randint(CODEBOOK_SIZE, (items, N_COARSE, frames), generator=torch.Generator().manual_seed(6))


def inputs(items=(0, 1, 2), **more):
    text = TextCondition.stack([TEXT.embeddings[i, TEXT.mask[i]] for i in items])
    return SecondStageInputs(text, NULL, [SEEDS[i] for i in items], **more)


class Spy:
    """Records inputs and outputs of the sampler, and its conditions, per window."""

    def __init__(self, monkeypatch):
        self.known, self.noise, self.made, self.conditions = [], [], [], []
        original_sample, original_guided = second_stage_module.sample, second_stage_module.guided_predictor

        def sampled(predict, settings, noise, generators, known=None, *more):
            self.known.append(known)
            self.noise.append(noise)
            self.made.append(original_sample(predict, settings, noise, generators, known, *more))
            return self.made[-1]

        def guided(model, conditions, *more):
            self.conditions.append(conditions)
            return original_guided(model, conditions, *more)

        monkeypatch.setattr(second_stage_module, "sample", sampled)
        monkeypatch.setattr(second_stage_module, "guided_predictor", guided)


# --- the second stage


@pytest.mark.parametrize("name", SAMPLERS)
def test_coarse_codes_are_the_first_codebooks_of_the_output(model, codec, name):
    settings = SecondStageConfig(SAMPLERS[name], window=WINDOW, overlap=OVERLAP)
    coarse_codes = make_coarse_codes()
    codes = SecondStage(model, codec, settings).generate(coarse_codes, inputs())
    assert codes.shape == (3, K, FRAMES) and codes.dtype == torch.int64
    assert torch.equal(codes[:, :N_COARSE], coarse_codes)
    assert codes.min() >= 0 and codes.max() < CODEBOOK_SIZE
    assert all(len(codes[:, k].unique()) > 4 for k in range(K))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 1.5)])
def test_item_latents_are_bitwise_equal_alone_and_in_any_batch(model, codec, monkeypatch, name, scales):
    """Latents, not only codes: no rounding difference that could change a code."""
    second_stage = SecondStage(model, codec, SecondStageConfig(SAMPLERS[name], *scales, WINDOW, OVERLAP))
    coarse_codes, spy = make_coarse_codes(), Spy(monkeypatch)
    chroma = torch.rand(3, 12, 30, generator=torch.Generator().manual_seed(1))
    tempo = torch.tensor([80.0, 100.0, 120.0])

    def run(items):
        spy.made.clear()
        controls = Controls(chroma[items], tempo[items])
        codes = second_stage.generate(coarse_codes[items], inputs(items, controls=controls))
        return codes, torch.cat(spy.made).unflatten(0, (3, len(items)))  # windows, items

    alone = [run([item]) for item in range(3)]
    for items in [[0, 1, 2], [2, 0]]:
        together, latents = run(items)
        for row, item in enumerate(items):
            assert torch.equal(together[row], alone[item][0][0]), (items, item)
            assert torch.equal(latents[:, row], alone[item][1][:, 0]), (items, item)


@pytest.mark.parametrize("name", SAMPLERS)
def test_batched_generation_as_on_a_gpu_gives_the_same_latents(model, codec, monkeypatch, name):
    """Items with their own captions, tempi and melodies, and known frames of the window before."""
    second_stage = SecondStage(model, codec, SecondStageConfig(SAMPLERS[name], 2.0, 1.5, WINDOW, OVERLAP))
    coarse_codes, spy = make_coarse_codes()[..., :WINDOW], Spy(monkeypatch)
    chroma = torch.rand(3, 12, WINDOW, generator=torch.Generator().manual_seed(1))
    all_inputs = inputs(controls=Controls(chroma, torch.tensor([80.0, torch.nan, 120.0])))
    known = second_stage.generate(coarse_codes, all_inputs)[..., :OVERLAP]
    spy.made.clear()
    second_stage._generate_batch(coarse_codes, (known, None, None), all_inputs, 1.0)
    for item in range(3):
        one = slice(item, item + 1)
        second_stage._generate_batch(coarse_codes[one], (known[one], None, None), all_inputs.select_rows(one), 1.0)
    torch.testing.assert_close(spy.made[0], torch.cat(spy.made[1:]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [[1] * FRAMES, [7] * 5 + [5], [16, 24], [17, 23], [3, 30, 7], [FRAMES, 0]])
def test_stream_does_not_depend_on_chunk_sizes(second_stage, sizes):
    coarse_codes = make_coarse_codes()
    parts = list(second_stage.generate_stream(iter(coarse_codes.split(sizes, -1)), inputs()))
    assert [part.shape[-1] for part in parts] == [16, 12, 12]
    assert torch.equal(torch.cat(parts, -1), second_stage.generate(coarse_codes, inputs()))


def test_window_is_generated_as_soon_as_its_frames_are_there(second_stage):
    consumed = []

    def first_stage_frames():
        for frame in make_coarse_codes().split(1, -1):
            consumed.append(frame)
            yield frame

    stream = second_stage.generate_stream(first_stage_frames(), inputs())
    for frames in (WINDOW + 1, WINDOW + 1 + 12, FRAMES):
        next(stream)
        assert len(consumed) == frames


def test_windows_share_known_codes_in_their_overlap(second_stage, model, codec, monkeypatch):
    """Known latents are those of the window before, and the sampler keeps them."""
    spy = Spy(monkeypatch)
    codes = second_stage.generate(make_coarse_codes(items=1), inputs([0]))
    assert len(spy.made) == 3 and spy.known[0] is None
    for index, (known, made) in enumerate(zip(spy.known, spy.made, strict=True)):
        here = codes[..., 12 * index : 12 * index + WINDOW]
        latents = codec.to_latents(here)
        torch.testing.assert_close(spy.conditions[index].coarse_latents, model.normalise(latents[:, :S]))
        assert torch.equal(codec.from_latents(torch.cat([latents[:, :S], model.denormalise(made, first=1)], 1)), here)
        if index:
            torch.testing.assert_close(known, model.normalise(latents[:, S:, :OVERLAP], first=1))
            assert torch.equal(made[..., :OVERLAP], known)


def test_window_depends_on_the_one_before(second_stage):
    """Only the first twelve coarse frames differ: none of the second window."""
    coarse_codes = make_coarse_codes()
    other = coarse_codes.clone()
    other[..., :12] = (other[..., :12] + 3) % CODEBOOK_SIZE
    first, second = (second_stage.generate(given, inputs()) for given in (coarse_codes, other))
    assert not torch.equal(first[..., 16:28], second[..., 16:28])
    apart = replace(second_stage.settings, overlap=0, window=12)
    independent = SecondStage(second_stage.model, second_stage.codec, apart)
    first, second = (independent.generate(given, inputs()) for given in (coarse_codes, other))
    assert torch.equal(first[..., 12:], second[..., 12:])


def test_windows_have_independent_noise(model, codec, monkeypatch):
    spy = Spy(monkeypatch)
    second_stage = SecondStage(model, codec, SecondStageConfig(SAMPLERS["v"], window=10, overlap=0))
    codes = second_stage.generate(make_coarse_codes(10, items=1).repeat(1, 1, 2), inputs([0]))
    assert spy.known[1].shape[-1] == 0
    assert not torch.equal(spy.noise[0], spy.noise[1])
    assert torch.corrcoef(torch.stack([noise.flatten() for noise in spy.noise]))[0, 1].abs() < 0.4
    assert not torch.equal(codes[..., :10], codes[..., 10:])


@pytest.mark.parametrize("frames", [1, 5, WINDOW])
def test_short_clip_is_a_single_window(second_stage, model, codec, monkeypatch, frames):
    spy, coarse_codes = Spy(monkeypatch), make_coarse_codes(frames)
    codes = second_stage.generate(coarse_codes, inputs())
    assert len(spy.made) == 3 and codes.shape[-1] == frames  # one an item
    wide = SecondStage(model, codec, replace(second_stage.settings, window=1000))
    assert torch.equal(wide.generate(coarse_codes, inputs()), codes)


def test_longer_clip_begins_with_the_codes_of_a_shorter_one(second_stage):
    coarse_codes = make_coarse_codes(60)
    longer, shorter = (second_stage.generate(codes, inputs()) for codes in (coarse_codes, coarse_codes[..., :28]))
    assert torch.equal(longer[..., :28], shorter)


def test_last_window_is_what_is_left(second_stage):
    codes = [part.shape[-1] for part in second_stage.generate_stream([make_coarse_codes(17)], inputs())]
    assert codes == [16, 1]


def test_codes_depend_on_seed_caption_tempo_and_melody(second_stage):
    coarse_codes, plain = make_coarse_codes(items=1), inputs([0])
    first = second_stage.generate(coarse_codes, plain)
    assert torch.equal(second_stage.generate(coarse_codes, plain), first)
    others = {
        "seed": replace(plain, seeds=[99]),
        "caption": replace(plain, text=captions(5, seed=7)),
        "tempo": replace(plain, controls=Controls(bpm=torch.tensor([150.0]))),
        "melody": replace(plain, controls=Controls(torch.ones(1, 12, FRAMES))),
    }
    for what, other in others.items():
        assert not torch.equal(second_stage.generate(coarse_codes, other), first), what


def test_window_gets_its_part_of_the_melody_and_nan_after_its_end(second_stage, monkeypatch):
    spy = Spy(monkeypatch)
    chroma = torch.rand(1, 12, 20, generator=torch.Generator().manual_seed(1))
    second_stage.generate(make_coarse_codes(items=1), inputs([0], controls=Controls(chroma)))
    chromas = [conditions.controls.chroma for conditions in spy.conditions]
    assert [part.shape for part in chromas] == [(1, 12, 16)] * 3
    assert torch.equal(chromas[0], chroma[..., :16]) and torch.equal(chromas[1][..., :8], chroma[..., 12:])
    assert chromas[1][..., 8:].isnan().all() and chromas[2].isnan().all()


def test_guidance_scales_are_used(second_stage, model, codec):
    coarse_codes = make_coarse_codes(10, items=1)
    made = {}
    for scales in [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)]:
        settings = SecondStageConfig(SAMPLERS["flow"], *scales, WINDOW, OVERLAP)
        made[scales] = SecondStage(model, codec, settings).generate(coarse_codes, inputs([0]))
    first, *others = made.values()
    assert all(not torch.equal(first, other) for other in others) and not torch.equal(*others)


@torch.no_grad()
def test_non_finite_output_is_an_error(codec):
    broken = denoiser()
    broken.output.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        SecondStage(broken, codec, SecondStageConfig(SAMPLERS["flow"])).generate(make_coarse_codes(), inputs())
    with pytest.raises(UserError, match="NaN or infinite"):
        codec.from_latents(torch.full((1, K * WIDTH, 5), torch.nan))


def test_second_stage_input_errors(second_stage):
    with pytest.raises(UserError, match="the denoiser expects 1 coarse codebooks, got 2"):
        second_stage.generate(make_coarse_codes().repeat(1, 2, 1), inputs())
    with pytest.raises(UserError, match="no coarse codes"):
        list(second_stage.generate_stream([], inputs()))
    with pytest.raises(UserError, match=r"overlap of windows must be in \[0, 4\] frames, got 5"):
        SecondStageConfig(SAMPLERS["flow"], window=5, overlap=5)
    for scale in (math.nan, -1.0):
        with pytest.raises(UserError, match="guidance_scale"):
            SecondStageConfig(SAMPLERS["flow"], guidance_scale=scale)


def test_settings_from_a_training_config(folder):
    changes = ("diffusion.objective=v", "diffusion.sampler=ddim", "diffusion.steps=7", "diffusion.guidance_scale=2.5",
               "diffusion.coarse_guidance_scale=1.2", "data.frames=33")  # fmt: skip
    found = SecondStageConfig.from_config(second_stage_config(folder, folder, *changes))
    assert found == SecondStageConfig(SamplerSettings("v", "ddim", 7), 2.5, 1.2, 33, 6)


@pytest.mark.parametrize("samples", [100, 1024, 2047, 2048, 5000])
def test_chroma_of_melodies_of_any_length(samples):
    wav = torch.sin(2 * torch.pi * 440 * torch.arange(samples) / 24_000)[None]
    chroma = frame_chroma(wav, 24_000, 3)
    assert chroma.shape == (1, 12, 3) and chroma.isfinite().all()
    if samples > 1000:
        assert (chroma[0].argmax(0) == 9).all()  # A


# --- two-stage pipelines


@pytest.fixture(autouse=True)
def use_word_encoder(monkeypatch):
    monkeypatch.setattr(pretrained, "load_text_encoder", lambda name: WordEncoder())


@pytest.fixture(scope="module")
def store(folder, codec):
    return write_codes_store(folder / "store", codec=codec)


# Large steps, so that a few of them give a model that depends on its conditions.
FEW = ("train.steps=4", "optim.lr=0.1", "schedule.min_lr=0.1", "schedule.warmup_steps=0", "train.eval_every=0")


@pytest.fixture(scope="module")
def first_stage(folder, store):
    return loop.train(lm_config(store, folder / "stage1", "model.n_codebooks=1", *FEW))


@pytest.fixture(scope="module")
def second_stage_run(folder, store):
    options = ("model.tempo=true", "model.chroma=true", "data.frames=16", "diffusion.steps=3")
    return loop.train(second_stage_config(store, folder / "stage2", *options, *FEW, "diffusion.guidance_scale=2"))


@pytest.fixture(scope="module")
def exported(folder, first_stage, second_stage_run):
    assert main.main(["export", str(first_stage), str(folder / "both"), "--second-stage", str(second_stage_run)]) == 0
    return folder / "both"


@pytest.fixture(scope="module")
def pipe(exported):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load_text_encoder", lambda name: WordEncoder())
        return MusicPipeline.from_pretrained(exported)


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_pipeline_of_two_runs(first_stage, second_stage_run):
    one = MusicPipeline.from_pretrained(first_stage)
    two = MusicPipeline.from_pretrained(first_stage, second_stage=second_stage_run)
    assert one.second_stage is None and one.codec.n_codebooks == 1 and two.codec.n_codebooks == K
    first, both = (pipe(["a waltz", "drums"], duration=1.5, seeds=3) for pipe in (one, two))
    assert both.audios.shape == (2, 1, 3600) and both.codes.shape == (2, K, 38)
    assert torch.equal(both.codes[:, :1], first.codes) and not torch.equal(both.audios, first.audios)
    assert all(len(both.codes[:, k].unique()) > 2 for k in range(K))
    alone = two("drums", duration=1.5, seeds=4)
    assert torch.equal(alone.codes[0], both.codes[1]) and torch.equal(alone.audios[0], both.audios[1])
    averaged = checkpoint.load_weights(checkpoint.latest_good(second_stage_run), ema=True)
    assert torch.equal(two.second_stage.model.output.weight, averaged["output.weight"])
    assert not two.second_stage.model.training


def test_export_in_full_precision_equals_its_run(first_stage, second_stage_run, tmp_path):
    one, two = (export(run, tmp_path / run.name, half=False) for run in (first_stage, second_stage_run))
    stages = [(first_stage, second_stage_run), (one, two)]
    pipes = [MusicPipeline.from_pretrained(first, second_stage=second) for first, second in stages]
    expected, output = (each("a march", duration=1.5, seeds=2, bpm=90.0) for each in pipes)
    assert torch.equal(output.codes, expected.codes) and torch.equal(output.audios, expected.audios)


def test_second_stage_argument_overrides_the_folders_own(exported, second_stage_run, tmp_path):
    overridden = MusicPipeline.from_pretrained(exported, second_stage=second_stage_run)
    assert overridden.metadata["second_stage"]["name"].startswith("stage2/step-")
    assert MusicPipeline.from_pretrained(exported).metadata["second_stage"]["name"] == "second_stage"


def test_two_stage_export_equals_the_separate_exports(pipe, exported, first_stage, second_stage_run, tmp_path):
    one, two = export(first_stage, tmp_path / "one"), export(second_stage_run, tmp_path / "two")
    apart = MusicPipeline.from_pretrained(one, second_stage=two)
    output, expected = (each("a march", duration=1.5, seeds=2) for each in (pipe, apart))
    assert torch.equal(output.codes, expected.codes) and torch.equal(output.audios, expected.audios)
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    own = {"card.json", "config.yaml", "model.safetensors"}
    assert files == own | {f"second_stage/{name}" for name in own}
    metadata = pipe.metadata["second_stage"]
    scales = metadata["guidance_scale"], metadata["coarse_guidance_scale"]
    assert (metadata["sampler"], metadata["steps"], *scales) == ("euler", 3, 2, 3)
    assert pipe.metadata["training_data_licences"] == {"CC0-1.0": 24}
    assert pipe.second_stage.settings == SecondStageConfig(SamplerSettings("flow", None, 3), 2, 3, 16, 3)
    with pytest.raises(UserError, match=r"one stage|language model"):
        export_two_stages(first_stage, first_stage, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_export_over_an_earlier_two_stage_export_is_an_error(copy, first_stage, second_stage_run):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    for write in (lambda: export(first_stage, copy), lambda: export_two_stages(first_stage, second_stage_run, copy)):
        with pytest.raises(UserError, match="second stage of an earlier export"):
            write()
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("chunk_seconds", [0.04, 0.3, 60.0])
def test_pipeline_stream_equals_the_whole_clip(pipe, chunk_seconds):
    whole = pipe("strings", duration=1.57, seeds=3).audios[0]
    parts = list(pipe.stream("strings", duration=1.57, seed=3, chunk_seconds=chunk_seconds))
    assert torch.cat(parts, -1).shape == whole.shape and len(parts) > 1
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=1e-5)


def test_progress_sums_to_the_duration(pipe):
    seconds = []
    pipe(["a", "b"], duration=1.6, progress=seconds.append)
    assert len(seconds) > 1 and sum(seconds) == pytest.approx(3.2)


def test_diffusion_steps_are_an_argument_and_leave_the_pipeline_unchanged(pipe):
    default = pipe("a march", duration=1.5, seeds=2)
    assert default.metadata == pipe.metadata | {"engine": default.metadata["engine"]}
    assert default.metadata["second_stage"]["steps"] == 3
    more = pipe("a march", duration=1.5, seeds=2, diffusion_steps=9)
    assert more.metadata["second_stage"]["steps"] == 9 and pipe.metadata["second_stage"]["steps"] == 3
    assert torch.equal(more.codes[:, 0], default.codes[:, 0]) and not torch.equal(more.codes, default.codes)
    assert torch.equal(pipe("a march", duration=1.5, seeds=2).codes, default.codes)
    settings = replace(pipe.second_stage.settings, sampler=replace(pipe.second_stage.settings.sampler, steps=9))
    nine = SecondStage(pipe.second_stage.model, pipe.codec, settings)
    direct = MusicPipeline(pipe.model, pipe.codec, pipe.text_encoder, pipe.pattern, second_stage=nine)
    assert torch.equal(direct("a march", duration=1.5, seeds=2).codes, more.codes)
    chunks = list(pipe.stream("a march", duration=1.5, seed=2, diffusion_steps=9))
    torch.testing.assert_close(torch.cat(chunks, -1), more.audios[0], rtol=0, atol=1e-5)
    for generate in (pipe, pipe.stream):
        with pytest.raises(UserError, match=r"sampling steps must be in \[1, 1000\], got 0"):
            generate("a march", duration=1.5, diffusion_steps=0)


def test_tempo_and_melody_reach_the_second_stage(pipe):
    plain = pipe("a march", duration=1.0, seeds=2).codes
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)[None]
    for controls in ({"bpm": 150.0}, {"melody": tone}, {"melody": tone[:, :HOP]}):
        codes = pipe("a march", duration=1.0, seeds=2, **controls).codes
        assert torch.equal(codes[:, 0], plain[:, 0]) and not torch.equal(codes, plain)


@pytest.mark.parametrize("frames", [5, 100])
def test_melody_is_cut_or_padded_not_stretched(pipe, monkeypatch, frames):
    """For a clip of 13 frames; a stereo melody is averaged."""
    spy = Spy(monkeypatch)
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(frames * HOP) / SAMPLE_RATE)
    pipe("a march", duration=0.5, melody=torch.stack([tone, torch.zeros_like(tone)]))
    chroma, n_frames = spy.conditions[0].controls.chroma, min(frames, 13)
    assert chroma.shape == (1, 12, 13) and chroma[..., n_frames:].isnan().all()
    expected = frame_chroma(0.5 * tone[None, : n_frames * HOP], SAMPLE_RATE, n_frames)
    torch.testing.assert_close(chroma[..., :n_frames], expected)


def test_unsupported_or_invalid_controls_are_errors(pipe, first_stage, store, folder):
    one = MusicPipeline.from_pretrained(first_stage)
    run = loop.train(second_stage_config(store, folder / "without_controls", *FEW))
    without_controls = MusicPipeline.from_pretrained(first_stage, second_stage=run)
    for unsupported in (one, without_controls):
        for controls in ({"bpm": 120.0}, {"melody": torch.zeros(1, 100)}):
            with pytest.raises(UserError, match=f"not trained with {next(iter(controls))}"):
                unsupported("x", duration=0.5, **controls)
            with pytest.raises(UserError, match=f"not trained with {next(iter(controls))}"):
                unsupported.stream("x", duration=0.5, **controls)
    for wrong, message in [
        ({"bpm": -3.0}, "bpm .* got -3"),
        ({"bpm": float("nan")}, "bpm .* got nan"),
        ({"melody": torch.zeros(100)}, "melody"),
        ({"melody": torch.zeros(1, 0)}, "melody"),
        ({"melody": torch.full((1, 9), torch.nan)}, "melody"),
    ]:
        with pytest.raises(UserError, match=message):
            pipe("x", duration=0.5, **wrong)
    with pytest.raises(UserError, match="one stage"):
        one("x", duration=0.5, diffusion_steps=3)
    with pytest.raises(UserError, match="one stage"):
        one.stream("x", duration=0.5, diffusion_steps=3)


# --- the command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run sample.py in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return run_captured(sample.main, ["a march", "--duration", 0.8, *arguments], capsys)

    return run


def test_command_takes_second_stage_diffusion_steps_and_controls(command, exported, first_stage, second_stage_run):
    assert command("--checkpoint", exported, "--out", "x.wav", "--diffusion-steps", 2)[0] == 0
    sidecar = json.loads(Path("x.json").read_text())
    assert sidecar["second_stage"]["steps"] == 2 and sidecar["second_stage"]["sampler"] == "euler"
    assert command("--checkpoint", exported, "--out", "y.wav")[0] == 0
    assert json.loads(Path("y.json").read_text())["second_stage"]["steps"] == 3
    assert Path("x.wav").read_bytes() != Path("y.wav").read_bytes()
    assert command("--checkpoint", first_stage, "--second-stage", second_stage_run, "--out", "z.wav")[0] == 0
    assert json.loads(Path("z.json").read_text())["second_stage"]["name"].startswith("stage2/step-")
    melody = ("--bpm", 140, "--melody", "y.wav")
    assert command("--checkpoint", exported, "--out", "w.wav", *melody)[0] == 0
    sidecar = json.loads(Path("w.json").read_text())
    assert sidecar["bpm"] == 140 and sidecar["melody"] == "y.wav"
    assert Path("w.wav").read_bytes() != Path("y.wav").read_bytes()


def test_command_second_stage_errors(command, exported, first_stage, second_stage_run):
    no_steps = command("--checkpoint", "nowhere", "--diffusion-steps", 0)
    assert_user_error(no_steps, "--diffusion-steps must be at least 1, got 0")
    too_many = command("--checkpoint", exported, "--diffusion-steps", 5000)
    assert_user_error(too_many, "sampling steps must be in [1, 1000], got 5000")
    assert_user_error(command("--checkpoint", first_stage, "--diffusion-steps", 5), "one stage")
    same_stage = command("--checkpoint", first_stage, "--second-stage", first_stage)
    assert_user_error(same_stage, "holds a language model, not a denoiser")
    assert_user_error(command("--checkpoint", second_stage_run), "holds a denoiser, not a language model")
    assert_user_error(command("--checkpoint", first_stage, "--second-stage", "nowhere"), "nowhere")
    assert_user_error(command("--checkpoint", first_stage, "--bpm", 120), "not trained with bpm")
    assert_user_error(command("--checkpoint", exported, "--bpm", 0), "bpm must be above 0")
    assert_user_error(command("--checkpoint", exported, "--melody", "absent.wav"), "absent.wav")


def test_melody_without_music_is_an_error(command, exported, pipe):
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    for name, channels, reason in (
        ("phase", [tone, -tone], "cancel"), ("silent", [0 * tone], "silent"),
        ("constant", [0 * tone + 0.3], "constant"), ("integers", [20_000 * tone], "full scale"),
    ):  # fmt: skip
        melody = torch.stack(channels)
        sf.write(f"{name}.wav", melody.T.numpy(), SAMPLE_RATE, subtype="FLOAT")
        failed = command("--checkpoint", exported, "--melody", f"{name}.wav", "--out", "clip.wav")
        Path(f"{name}.wav").unlink()
        assert_user_error(failed, f"{name}.wav", reason)
        for generate in (pipe, pipe.stream):
            with pytest.raises(UserError, match=f"melody .*{reason}"):
                generate("a march", duration=0.5, melody=melody)
    with pytest.raises(UserError, match=r"melody of 1\.00 s .*silent"):  # the part that would be followed
        pipe("a march", duration=1.0, melody=torch.cat([0 * tone, tone])[None])


@pytest.mark.parametrize("kind", ["codec", "text"])
def test_stages_of_different_stores_are_an_error(command, copy, first_stage, kind, tmp_path):
    card = json.loads((copy / "second_stage/card.json").read_text())
    card["data"][kind]["fingerprint"] = "f" * 16
    (copy / "second_stage/card.json").write_text(json.dumps(card))
    assert_user_error(command("--checkpoint", copy), f"with {kind}", "f" * 16, "both stages must come from one store")
    with pytest.raises(UserError, match="one store"):
        export_two_stages(first_stage, copy / "second_stage", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_latent_statistics_than_those_of_training_are_an_error(command, copy):
    weights = load_file(copy / "second_stage/model.safetensors")
    weights["latent_std"] = weights["latent_std"] * 1.01
    save_file(weights, copy / "second_stage/model.safetensors")
    assert_user_error(command("--checkpoint", copy), "other latent statistics")
    card = json.loads((copy / "second_stage/card.json").read_text())
    del card["data"]["latents"]
    (copy / "second_stage/card.json").write_text(json.dumps(card))
    assert_user_error(command("--checkpoint", copy), "names no latents")


def test_first_stage_with_too_many_codebooks_is_an_error(command, folder, store, second_stage_run):
    two = loop.train(lm_config(store, folder / "two", "model.n_codebooks=2", *FEW))
    message = "generates 2 codebooks, the second stage expects 1"
    assert_user_error(command("--checkpoint", two, "--second-stage", second_stage_run), message)
    with pytest.raises(UserError, match=message):
        export_two_stages(two, second_stage_run, "out")
    assert not Path("out").exists()


def test_two_stage_export_of_exported_folders_is_an_error(exported, first_stage, second_stage_run, tmp_path):
    for stages in [(first_stage, exported / "second_stage"), (exported, second_stage_run)]:
        with pytest.raises(UserError, match="state"):
            export_two_stages(*stages, tmp_path / "out")
        assert not (tmp_path / "out").exists()
