"""Painting sketches: seeds, batches, windows and their seams; the pipeline of two stages, its export, its refusals."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_denoisers import N_COARSE, WIDTH, K, S, captions, denoiser
from small_stores import (
    CODEBOOK_SIZE,
    HOP,
    SAMPLE_RATE,
    TEXT_DIM,
    TEXT_FINGERPRINT,
    lm_config,
    second_stage_config,
    small_codec,
    write_codes_store,
)

import sample
from ssmttm import MusicPipeline, audio, checkpoint
from ssmttm.audio.features import frame_chroma
from ssmttm.cli import main
from ssmttm.diffusion.samplers import SamplerSettings
from ssmttm.errors import UserError, run_cli
from ssmttm.export.model_folder import export, export_two_stages
from ssmttm.generation import pipeline
from ssmttm.generation import second_stage as painting
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
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("second_stage")


@pytest.fixture(scope="module")
def codec(root):
    return small_codec(root / "codec")


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
    """Keeps what the sampler is given and gives back, window by window, and under which conditions."""

    def __init__(self, monkeypatch):
        self.known, self.noise, self.made, self.conditions = [], [], [], []
        real_sample, real_guided = painting.sample, painting.guided_predictor

        def sampled(predict, settings, noise, generators, known=None):
            self.known.append(known)
            self.noise.append(noise)
            self.made.append(real_sample(predict, settings, noise, generators, known))
            return self.made[-1]

        def guided(model, conditions, *more):
            self.conditions.append(conditions)
            return real_guided(model, conditions, *more)

        monkeypatch.setattr(painting, "sample", sampled)
        monkeypatch.setattr(painting, "guided_predictor", guided)


# --- the painter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sketch_comes_out_as_the_first_codebook(model, codec, name):
    settings = SecondStageConfig(SAMPLERS[name], window=WINDOW, overlap=OVERLAP)
    coarse_codes = make_coarse_codes()
    codes = SecondStage(model, codec, settings).generate(coarse_codes, inputs())
    assert codes.shape == (3, K, FRAMES) and codes.dtype == torch.int64
    assert torch.equal(codes[:, :N_COARSE], coarse_codes)
    assert codes.min() >= 0 and codes.max() < CODEBOOK_SIZE
    assert all(len(codes[:, k].unique()) > 4 for k in range(K))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 1.5)])
def test_an_item_is_the_same_alone_and_in_any_batch(model, codec, monkeypatch, name, scales):
    """To the bit in its latents, so that no rounding can tip a code."""
    second_stage = SecondStage(model, codec, SecondStageConfig(SAMPLERS[name], *scales, WINDOW, OVERLAP))
    coarse_codes, spy = make_coarse_codes(), Spy(monkeypatch)
    chroma = torch.rand(3, 12, 30, generator=torch.Generator().manual_seed(1))
    tempo = torch.tensor([80.0, 100.0, 120.0])

    def run(items):
        spy.made.clear()
        codes = second_stage.generate(coarse_codes[items], inputs(items, controls=Controls(chroma[items], tempo[items])))
        return codes, torch.cat(spy.made).unflatten(0, (3, len(items)))  # windows, items

    alone = [run([item]) for item in range(3)]
    for items in [[0, 1, 2], [2, 0]]:
        together, latents = run(items)
        for row, item in enumerate(items):
            assert torch.equal(together[row], alone[item][0][0]), (items, item)
            assert torch.equal(latents[:, row], alone[item][1][:, 0]), (items, item)


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_items_at_once_as_on_a_gpu_give_the_same_latents(model, codec, monkeypatch, name):
    """Items with captions, tempi and melodies of their own and frames held from the window before."""
    second_stage = SecondStage(model, codec, SecondStageConfig(SAMPLERS[name], 2.0, 1.5, WINDOW, OVERLAP))
    coarse_codes, spy = make_coarse_codes()[..., :WINDOW], Spy(monkeypatch)
    chroma = torch.rand(3, 12, WINDOW, generator=torch.Generator().manual_seed(1))
    told = inputs(controls=Controls(chroma, torch.tensor([80.0, torch.nan, 120.0])))
    known = second_stage.generate(coarse_codes, told)[..., :OVERLAP]
    spy.made.clear()
    second_stage._rows(coarse_codes, known, told)
    for item in range(3):
        one = slice(item, item + 1)
        second_stage._rows(coarse_codes[one], known[one], told.rows(one))
    torch.testing.assert_close(spy.made[0], torch.cat(spy.made[1:]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [[1] * FRAMES, [7] * 5 + [5], [16, 24], [17, 23], [3, 30, 7], [FRAMES, 0]])
def test_a_stream_in_any_chunks_is_the_whole(second_stage, sizes):
    coarse_codes = make_coarse_codes()
    parts = list(second_stage.generate_stream(iter(coarse_codes.split(sizes, -1)), inputs()))
    assert [part.shape[-1] for part in parts] == [16, 12, 12]
    assert torch.equal(torch.cat(parts, -1), second_stage.generate(coarse_codes, inputs()))


def test_a_window_is_painted_as_soon_as_it_is_written(second_stage):
    taken = []

    def written():
        for frame in make_coarse_codes().split(1, -1):
            taken.append(frame)
            yield frame

    stream = second_stage.generate_stream(written(), inputs())
    for frames in (WINDOW + 1, WINDOW + 1 + 12, FRAMES):
        next(stream)
        assert len(taken) == frames


def test_windows_share_their_codes_at_the_seams(second_stage, model, codec, monkeypatch):
    """What a window is given as known is what the one before has found, and it stays so."""
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


def test_a_window_follows_the_one_before(second_stage):
    """Only the first twelve frames of the sketches differ: no frame of the second window."""
    coarse_codes = make_coarse_codes()
    other = coarse_codes.clone()
    other[..., :12] = (other[..., :12] + 3) % CODEBOOK_SIZE
    first, second = (second_stage.generate(given, inputs()) for given in (coarse_codes, other))
    assert not torch.equal(first[..., 16:28], second[..., 16:28])
    apart = replace(second_stage.settings, overlap=0, window=12)
    first, second = (SecondStage(second_stage.model, second_stage.codec, apart).generate(given, inputs()) for given in (coarse_codes, other))
    assert torch.equal(first[..., 12:], second[..., 12:])


def test_windows_draw_noise_of_their_own(model, codec, monkeypatch):
    spy = Spy(monkeypatch)
    second_stage = SecondStage(model, codec, SecondStageConfig(SAMPLERS["v"], window=10, overlap=0))
    codes = second_stage.generate(make_coarse_codes(10, items=1).repeat(1, 1, 2), inputs([0]))
    assert spy.known[1].shape[-1] == 0
    assert not torch.equal(spy.noise[0], spy.noise[1])
    assert torch.corrcoef(torch.stack([noise.flatten() for noise in spy.noise]))[0, 1].abs() < 0.4
    assert not torch.equal(codes[..., :10], codes[..., 10:])


@pytest.mark.parametrize("frames", [1, 5, WINDOW])
def test_what_fits_into_one_window_is_one(second_stage, model, codec, monkeypatch, frames):
    spy, coarse_codes = Spy(monkeypatch), make_coarse_codes(frames)
    codes = second_stage.generate(coarse_codes, inputs())
    assert len(spy.made) == 3 and codes.shape[-1] == frames  # one an item
    wide = SecondStage(model, codec, replace(second_stage.settings, window=1000))
    assert torch.equal(wide.generate(coarse_codes, inputs()), codes)


def test_a_longer_piece_begins_as_the_shorter_one(second_stage):
    coarse_codes = make_coarse_codes(60)
    assert torch.equal(second_stage.generate(coarse_codes, inputs())[..., :28], second_stage.generate(coarse_codes[..., :28], inputs()))


def test_a_chunk_less_than_a_window_more_ends_in_a_window_of_what_is_left(second_stage):
    codes = [part.shape[-1] for part in second_stage.generate_stream([make_coarse_codes(17)], inputs())]
    assert codes == [16, 1]


def test_seed_caption_tempo_and_melody_matter(second_stage):
    coarse_codes, plain = make_coarse_codes(items=1), inputs([0])
    first = second_stage.generate(coarse_codes, plain)
    assert torch.equal(second_stage.generate(coarse_codes, plain), first)
    others = {
        "seed": replace(plain, seeds=[99]),
        "caption": replace(plain, text=captions(5, seed=7)),
        "tempo": replace(plain, controls=Controls(tempo=torch.tensor([150.0]))),
        "melody": replace(plain, controls=Controls(torch.ones(1, 12, FRAMES))),
    }
    for what, other in others.items():
        assert not torch.equal(second_stage.generate(coarse_codes, other), first), what


def test_each_window_hears_its_part_of_the_melody_and_none_behind_its_end(second_stage, monkeypatch):
    spy = Spy(monkeypatch)
    chroma = torch.rand(1, 12, 20, generator=torch.Generator().manual_seed(1))
    second_stage.generate(make_coarse_codes(items=1), inputs([0], controls=Controls(chroma)))
    embeddings = [given.controls.chroma for given in spy.conditions]
    assert [part.shape for part in embeddings] == [(1, 12, 16)] * 3
    assert torch.equal(embeddings[0], chroma[..., :16]) and torch.equal(embeddings[1][..., :8], chroma[..., 12:])
    assert embeddings[1][..., 8:].isnan().all() and embeddings[2].isnan().all()


def test_scales_are_handed_on(second_stage, model, codec):
    coarse_codes = make_coarse_codes(10, items=1)
    made = {}
    for scales in [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)]:
        settings = SecondStageConfig(SAMPLERS["flow"], *scales, WINDOW, OVERLAP)
        made[scales] = SecondStage(model, codec, settings).generate(coarse_codes, inputs([0]))
    first, *others = made.values()
    assert all(not torch.equal(first, other) for other in others) and not torch.equal(*others)


@torch.no_grad()
def test_numbers_that_are_not_finite_are_named(codec):
    broken = denoiser()
    broken.output.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        SecondStage(broken, codec, SecondStageConfig(SAMPLERS["flow"])).generate(make_coarse_codes(), inputs())
    with pytest.raises(UserError, match="NaN or infinite"):
        codec.from_latents(torch.full((1, K * WIDTH, 5), torch.nan))


def test_what_cannot_be_painted_is_one_clear_line(second_stage):
    with pytest.raises(UserError, match="the sketch has 2 codebooks, the denoiser is told 1"):
        second_stage.generate(make_coarse_codes().repeat(1, 2, 1), inputs())
    with pytest.raises(UserError, match="no sketch"):
        list(second_stage.generate_stream([], inputs()))
    with pytest.raises(UserError, match="windows of 5 frames cannot overlap by 5"):
        SecondStageConfig(SAMPLERS["flow"], window=5, overlap=5)
    for scale in (math.nan, -1.0):
        with pytest.raises(UserError, match="guidance_scale"):
            SecondStageConfig(SAMPLERS["flow"], guidance_scale=scale)


def test_settings_are_those_of_a_training(root):
    changes = ("diffusion.objective=v", "diffusion.sampler=ddim", "diffusion.steps=7", "diffusion.guidance_scale=2.5",
               "diffusion.coarse_guidance_scale=1.2", "data.frames=33")  # fmt: skip
    found = SecondStageConfig.of(second_stage_config(root, root, *changes))
    assert found == SecondStageConfig(SamplerSettings("v", "ddim", 7), 2.5, 1.2, 33, 6)


@pytest.mark.parametrize("samples", [100, 1024, 2047, 2048, 5000])
def test_a_melody_may_be_of_any_length(samples):
    wav = torch.sin(2 * torch.pi * 440 * torch.arange(samples) / 24_000)[None]
    embeddings = frame_chroma(wav, 24_000, 3)
    assert embeddings.shape == (1, 12, 3) and embeddings.isfinite().all()
    if samples > 1000:
        assert (embeddings[0].argmax(0) == 9).all()  # A


# --- two stages ------------------------------------------------------------------------------------------------------


class WordEncoder:
    """Every word is a vector drawn from its own letters; the empty caption is one marker."""

    name, fingerprint, dim, max_tokens = "fake", TEXT_FINGERPRINT, TEXT_DIM, 64

    def encode(self, texts):
        rows = []
        for caption in texts:
            seeds = [int.from_bytes(word.encode()[-6:], "big") for word in ["<s>", *caption.split()]]
            rows.append(torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]))
        return TextCondition.stack(rows)


@pytest.fixture(autouse=True)
def words_for_text(monkeypatch):
    monkeypatch.setattr(pipeline, "load_text_encoder", lambda name: WordEncoder())


@pytest.fixture(scope="module")
def store(root, codec):
    return write_codes_store(root / "store", codec=codec)


# Steps so large that a few of them leave a model that is not indifferent to what it is told.
FEW = ("train.steps=4", "optim.lr=0.1", "optim.min_lr=0.1", "optim.warmup_steps=0", "train.eval_every=0")


@pytest.fixture(scope="module")
def first_stage(root, store):
    return loop.train(lm_config(store, root / "coarse_codes", "model.n_codebooks=1", *FEW))


@pytest.fixture(scope="module")
def second_stage_run(root, store):
    told = ("model.tempo=true", "model.chroma=true", "data.frames=16")
    return loop.train(
        second_stage_config(store, root / "generate", *told, *FEW, "diffusion.steps=3", "diffusion.guidance_scale=2")
    )


@pytest.fixture(scope="module")
def exported(root, first_stage, second_stage_run):
    assert main.main(["export", str(first_stage), str(root / "both"), "--second-stage", str(second_stage_run)]) == 0
    return root / "both"


@pytest.fixture(scope="module")
def pipe(exported):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_text_encoder", lambda name: WordEncoder())
        return MusicPipeline.from_pretrained(exported)


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_two_runs_make_one_pipeline(first_stage, second_stage_run):
    one, two = MusicPipeline.from_pretrained(first_stage), MusicPipeline.from_pretrained(first_stage, second_stage=second_stage_run)
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


def test_an_export_in_full_precision_makes_what_its_run_makes(first_stage, second_stage_run, tmp_path):
    one, two = (export(run, tmp_path / run.name, half=False) for run in (first_stage, second_stage_run))
    pipes = [
        MusicPipeline.from_pretrained(first, second_stage=second) for first, second in [(first_stage, second_stage_run), (one, two)]
    ]
    wanted, found = (each("a march", duration=1.5, seeds=2, tempo=90.0) for each in pipes)
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.audios, wanted.audios)


def test_a_painter_that_is_named_goes_before_the_folders_own(exported, second_stage_run, tmp_path):
    named = MusicPipeline.from_pretrained(exported, second_stage=second_stage_run)
    assert named.facts["second_stage"]["name"].startswith("generate/step-")
    assert MusicPipeline.from_pretrained(exported).facts["second_stage"]["name"] == "second_stage"


def test_an_export_of_two_stages_is_each_of_its_exports(pipe, exported, first_stage, second_stage_run, tmp_path):
    one, two = export(first_stage, tmp_path / "one"), export(second_stage_run, tmp_path / "two")
    apart = MusicPipeline.from_pretrained(one, second_stage=two)
    found, wanted = (each("a march", duration=1.5, seeds=2) for each in (pipe, apart))
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.audios, wanted.audios)
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    own = {"card.json", "config.yaml", "model.safetensors"}
    assert files == own | {f"second_stage/{name}" for name in own}
    facts = pipe.facts["second_stage"]
    assert (facts["sampler"], facts["steps"], facts["guidance_scale"], facts["coarse_guidance_scale"]) == ("euler", 3, 2, 3)
    assert pipe.facts["training_data_licences"] == {"CC0-1.0": 24}
    assert pipe.second_stage.settings == SecondStageConfig(SamplerSettings("flow", None, 3), 2, 3, 16, 3)
    with pytest.raises(UserError, match=r"one stage|language model"):
        export_two_stages(first_stage, first_stage, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_second_stage_of_an_earlier_export_is_not_taken_for_another_models(copy, first_stage, second_stage_run):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    for write in (lambda: export(first_stage, copy), lambda: export_two_stages(first_stage, second_stage_run, copy)):
        with pytest.raises(UserError, match="second stage of an earlier export"):
            write()
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("chunk_seconds", [0.04, 0.3, 60.0])
def test_a_stream_is_the_whole_piece_in_parts(pipe, chunk_seconds):
    whole = pipe("strings", duration=1.57, seeds=3).audios[0]
    parts = list(pipe.stream("strings", duration=1.57, seed=3, chunk_seconds=chunk_seconds))
    assert torch.cat(parts, -1).shape == whole.shape and len(parts) > 1
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=1e-5)


def test_progress_adds_up(pipe):
    embeddings = []
    pipe(["a", "b"], duration=1.6, progress=embeddings.append)
    assert len(embeddings) > 1 and sum(embeddings) == pytest.approx(3.2)


def test_more_steps_paint_otherwise_and_are_remembered(pipe, exported):
    other = MusicPipeline.from_pretrained(exported)
    other.set_diffusion_steps(9)
    assert other.second_stage.settings.sampler.steps == 9 == other.facts["second_stage"]["steps"]
    found, wanted = (each("a march", duration=1.5, seeds=2).codes for each in (other, pipe))
    assert torch.equal(found[:, 0], wanted[:, 0]) and not torch.equal(found, wanted)
    with pytest.raises(UserError, match=r"sampling steps must be in \[1, 1000\], got 0"):
        other.set_diffusion_steps(0)
    assert other.facts["second_stage"]["steps"] == 9
    bare = MusicPipeline(pipe.model, pipe.codec, pipe.text_encoder, pipe.pattern, second_stage=other.second_stage)
    bare.set_diffusion_steps(2)
    assert bare.second_stage.settings.sampler.steps == 2


def test_tempo_and_melody_reach_the_second_stage(pipe):
    plain = pipe("a march", duration=1.0, seeds=2).codes
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)[None]
    for wish in ({"tempo": 150.0}, {"melody": tone}, {"melody": tone[:, :HOP]}):
        codes = pipe("a march", duration=1.0, seeds=2, **wish).codes
        assert torch.equal(codes[:, 0], plain[:, 0]) and not torch.equal(codes, plain)


@pytest.mark.parametrize("frames", [5, 100])
def test_a_melody_is_neither_stretched_nor_squeezed(pipe, monkeypatch, frames):
    """Against a piece of 13 frames; a melody of two channels is their mean."""
    spy = Spy(monkeypatch)
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(frames * HOP) / SAMPLE_RATE)
    pipe("a march", duration=0.5, melody=torch.stack([tone, torch.zeros_like(tone)]))
    embeddings, told = spy.conditions[0].controls.chroma, min(frames, 13)
    assert embeddings.shape == (1, 12, 13) and embeddings[..., told:].isnan().all()
    torch.testing.assert_close(embeddings[..., :told], frame_chroma(0.5 * tone[None, : told * HOP], SAMPLE_RATE, told))


def test_tempo_and_melody_that_cannot_be_had(pipe, first_stage, store, root):
    one = MusicPipeline.from_pretrained(first_stage)
    deaf = MusicPipeline.from_pretrained(first_stage, second_stage=loop.train(second_stage_config(store, root / "deaf", *FEW)))
    for silent in (one, deaf):
        for wish in ({"tempo": 120.0}, {"melody": torch.zeros(1, 100)}):
            with pytest.raises(UserError, match=f"not trained with a {next(iter(wish))}"):
                silent("x", duration=0.5, **wish)
            with pytest.raises(UserError, match=f"not trained with a {next(iter(wish))}"):
                silent.stream("x", duration=0.5, **wish)
    for wrong, says in [
        ({"tempo": -3.0}, "tempo is -3"),
        ({"tempo": float("nan")}, "tempo is nan"),
        ({"melody": torch.zeros(100)}, "melody"),
        ({"melody": torch.zeros(1, 0)}, "melody"),
        ({"melody": torch.full((1, 9), torch.nan)}, "melody"),
    ]:
        with pytest.raises(UserError, match=says):
            pipe("x", duration=0.5, **wrong)
    with pytest.raises(UserError, match="one stage"):
        one.set_diffusion_steps(3)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run sample.py in an empty folder: (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = run_cli(lambda: sample.main(["a march", "--duration", "0.8", *map(str, arguments)]))
        return code, capsys.readouterr().err

    return run


def test_the_command_takes_a_painter_and_its_steps(command, exported, first_stage, second_stage_run):
    assert command("--checkpoint", exported, "--out", "x.wav", "--diffusion-steps", 2)[0] == 0
    record = json.loads(Path("x.json").read_text())
    assert record["second_stage"]["steps"] == 2 and record["second_stage"]["sampler"] == "euler"
    assert command("--checkpoint", exported, "--out", "y.wav")[0] == 0
    assert json.loads(Path("y.json").read_text())["second_stage"]["steps"] == 3
    assert Path("x.wav").read_bytes() != Path("y.wav").read_bytes()
    assert command("--checkpoint", first_stage, "--second-stage", second_stage_run, "--out", "z.wav")[0] == 0
    assert json.loads(Path("z.json").read_text())["second_stage"]["name"].startswith("generate/step-")
    melody = ("--tempo", 140, "--melody", "y.wav")
    assert command("--checkpoint", exported, "--out", "w.wav", *melody)[0] == 0
    told = json.loads(Path("w.json").read_text())
    assert told["tempo"] == 140 and told["melody"] == "y.wav"
    assert Path("w.wav").read_bytes() != Path("y.wav").read_bytes()


def refused(result, *says):
    code, err = result
    lines = [line for line in err.splitlines() if line.strip() and not line.lstrip("\r").startswith("sampling:")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    for part in says:
        assert part in lines[0], lines[0]
    assert not [path for path in Path().rglob("*") if path.suffix in audio.WRITERS]


def test_steps_and_painters_that_make_no_sense(command, exported, first_stage, second_stage_run):
    refused(command("--checkpoint", "nowhere", "--diffusion-steps", 0), "--diffusion-steps is 0: give 1 or more")
    refused(command("--checkpoint", exported, "--diffusion-steps", 5000), "sampling steps must be in [1, 1000], got 5000")
    refused(command("--checkpoint", first_stage, "--diffusion-steps", 5), "one stage")
    refused(command("--checkpoint", first_stage, "--second-stage", first_stage), "holds a language model, not a denoiser")
    refused(command("--checkpoint", second_stage_run), "holds a denoiser, not a language model")
    refused(command("--checkpoint", first_stage, "--second-stage", "nowhere"), "nowhere")
    refused(command("--checkpoint", first_stage, "--tempo", 120), "not trained with a tempo")
    refused(command("--checkpoint", exported, "--tempo", 0), "tempo is 0")
    refused(command("--checkpoint", exported, "--melody", "absent.wav"), "absent.wav")


@pytest.mark.parametrize("kind", ["codec", "text"])
def test_stages_of_different_stores(command, copy, first_stage, kind, tmp_path):
    card = json.loads((copy / "second_stage/card.json").read_text())
    card["data"][kind]["fingerprint"] = "f" * 16
    (copy / "second_stage/card.json").write_text(json.dumps(card))
    refused(command("--checkpoint", copy), f"with {kind}", "f" * 16, "both stages must come from one store")
    with pytest.raises(UserError, match="one store"):
        export_two_stages(first_stage, copy / "second_stage", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_that_are_not_those_of_training(command, copy):
    weights = load_file(copy / "second_stage/model.safetensors")
    weights["latent_std"] = weights["latent_std"] * 1.01
    save_file(weights, copy / "second_stage/model.safetensors")
    refused(command("--checkpoint", copy), "other statistics of latents")
    card = json.loads((copy / "second_stage/card.json").read_text())
    del card["data"]["latents"]
    (copy / "second_stage/card.json").write_text(json.dumps(card))
    refused(command("--checkpoint", copy), "names no latents")


def test_a_first_stage_that_writes_more_than_a_sketch(command, root, store, second_stage_run):
    two = loop.train(lm_config(store, root / "two", "model.n_codebooks=2", *FEW))
    says = "writes 2 codebooks, the denoiser is to be told 1"
    refused(command("--checkpoint", two, "--second-stage", second_stage_run), says)
    with pytest.raises(UserError, match=says):
        export_two_stages(two, second_stage_run, "out")
    assert not Path("out").exists()


def test_what_is_exported_already_is_not_exported_again_by_halves(exported, first_stage, second_stage_run, tmp_path):
    for stages in [(first_stage, exported / "second_stage"), (exported, second_stage_run)]:
        with pytest.raises(UserError, match="state"):
            export_two_stages(*stages, tmp_path / "out")
        assert not (tmp_path / "out").exists()
