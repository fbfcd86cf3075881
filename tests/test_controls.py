"""Melody and tempo controls of the language model: positions, null vectors, generation, training, dropout, resuming."""

import pytest
import torch
from processes import train_in_two_processes
from small_runs import assert_same_runs, metric_rows, run_contents, train_with_stops
from small_stores import SAMPLE_RATE, lm_config, small_codec, write_codes_store
from small_token_lms import SMALL, VARIANTS, K, S, V, assert_equal, captions, randomised, small_token_lm
from small_word_encoder import WordEncoder
from torch.nn import functional as F

from ssmttm.audio.features import frame_chroma
from ssmttm.data import open_store
from ssmttm.data.loader import Item
from ssmttm.distill.teacher import Teacher
from ssmttm.errors import UserError
from ssmttm.generation.engine import generate
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.generation.request import Sampling
from ssmttm.models import TokenLM, TokenLMConfig
from ssmttm.models.controls import ChromaEmbedding, Controls, TempoEmbedding
from ssmttm.patterns import get_pattern
from ssmttm.training import loop
from ssmttm.training.tasks import lm
from ssmttm.training.tasks.controls import StoreControls

PATTERNS = ("delay", "parallel", "flatten", "coarse_first")
WITH_CONTROLS = ("model.chroma=true", "model.tempo=true")


def build(name="ours", **changes):
    """A model with both controls and random weights, null vectors included."""
    return randomised(small_token_lm(**{**VARIANTS[name], "chroma": True, "tempo": True, **changes}).double().eval())


def make_controls(items=3, length=S, seed=5):
    g = torch.Generator().manual_seed(seed)
    chroma = torch.rand(items, 12, length, generator=g)
    chroma[0, :, 4:7] = torch.nan
    return Controls(chroma, torch.tensor([90.0, torch.nan, 131.0])[:items])


@pytest.fixture
def codes():
    return torch.randint(V + 1, (3, K, S), generator=torch.Generator().manual_seed(1))


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("n_frames", [1, 2, 7])
def test_pattern_frames_are_the_newest_frame_of_each_position(name, n_frames):
    pattern = get_pattern(name, K)
    numbers = pattern.build(torch.arange(n_frames).expand(1, K, -1), -1)[0].amax(0)  # newest frame by position
    frames = pattern.frames(n_frames)
    assert frames.shape == numbers.shape
    inside = (frames >= 0) & (frames < n_frames)
    assert torch.equal(frames[inside], numbers[inside])
    assert set(range(n_frames)) <= set(frames.tolist())
    assert name == "delay" or inside.all()  # only delay ends with positions that hold older frames only


@pytest.mark.parametrize("name", VARIANTS)
def test_chroma_changes_logits_from_its_position_on(codes, name):
    model, text, controls = build(name), captions(4, 0, 7), make_controls()
    reference = model(codes, text, controls=controls)
    for position in (0, 5, S - 1):
        chroma = controls.chroma.clone()
        chroma[:, :, position] = torch.rand(3, 12)
        other = model(codes, text, controls=Controls(chroma, controls.bpm))
        assert_equal(other[:, :, :position], reference[:, :, :position])
        assert (other[:, :, position] - reference[:, :, position]).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("name", PATTERNS)
def test_training_conditions_each_position_on_the_frame_it_predicts(name, tmp_path, monkeypatch):
    """The chroma of frame t is given to the positions whose targets have frame t as their newest."""
    codec = small_codec(tmp_path / "codec")
    store = write_codes_store(tmp_path / "codes", codec=codec)
    overrides = (*WITH_CONTROLS, f"pattern={name}", "data.chroma_dropout=0")
    task = lm.LanguageModelTask(lm_config(store, tmp_path / "run", *overrides))
    batch, inputs = task.loader("train", 4, 0, 1).batch(0), {}
    reference = task.model.forward

    def forward(codes, text, **options):
        inputs.update(codes=codes, controls=options["controls"])
        return reference(codes, text, **options)

    monkeypatch.setattr(task.model, "forward", forward)
    task.losses({"model": task.model}, batch, task.loss_denominators(batch), 0)
    chroma, frames = inputs["controls"].chroma, task.pattern.frames(batch["codes"].shape[-1])
    assert chroma.shape[-1] == inputs["codes"].shape[-1] == len(frames)
    of_frames = batch["controls"].chroma  # [b, 12, T]
    for position, frame in enumerate(frames.tolist()):
        given = chroma[..., position]
        if 0 <= frame < of_frames.shape[-1]:
            torch.testing.assert_close(given, of_frames[..., frame], equal_nan=True)
        else:
            assert given.isnan().all()


def test_store_controls_match_the_audio_of_the_crop(tmp_path):
    codec = small_codec(tmp_path / "codec")
    store = open_store(write_codes_store(tmp_path / "codes", codec=codec))
    never = ("data.chroma_dropout=0", "data.tempo_dropout=0")
    task = lm.LanguageModelTask(lm_config(store.path, tmp_path / "run", *WITH_CONTROLS, "data.frames=9", *never))
    batch = task.loader("train", 6, 0, 1).batch(1)
    found = batch["controls"]
    for item, name in enumerate(batch["ids"]):
        bpm = 60.0 + 5 * int(name[1:]) if int(name[1:]) % 2 else torch.nan
        torch.testing.assert_close(found.bpm[item], torch.tensor(bpm), equal_nan=True)
        tone = 220 + 40 * int(name[1:])
        wav = torch.sin(2 * torch.pi * tone * torch.arange(20 * codec.hop_length) / codec.sample_rate)[None]
        pitch = frame_chroma(wav, codec.sample_rate, 20)[0].mean(1).argmax()
        valid = batch["frame_mask"][item]
        assert found.chroma[item][:, valid].mean(1).argmax() == pitch
        assert found.chroma[item][:, ~valid].isnan().all()


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 192, 512])
def test_tempo_embedding_resolves_audible_differences_only(width):
    """Before its learnt layers: 2 % apart, a just noticeable difference, is far; 0.1 % is near."""
    embedding, inputs = TempoEmbedding(width), []
    embedding.number.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for bpm in (60.0, 120.0, 180.0):
        embedding(torch.tensor([bpm, 1.001 * bpm, 1.02 * bpm, 2 * bpm]))
        near, noticeable, octave = (inputs[-1][1:] - inputs[-1][0]).norm(dim=1) / inputs[-1][0].norm()
        assert near < 0.1 and noticeable > 0.3 and octave > 0.5


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_prefill_and_steps_with_controls(codes, name):
    model, text, controls = build(name), captions(4, 0, 7), make_controls()
    expected = model(codes, text, controls=controls)
    for split in (1, 9, S):
        state = model.init_state(3)
        found = [model.prefill(codes[..., :split], text, state, controls.select_frames(slice(split)))]
        found += [model.step(codes[..., s], state, controls.select_frames(slice(s, s + 1))) for s in range(split, S)]
        assert_equal(torch.stack(found, 2), expected[:, :, split - 1 :])


def test_nan_controls_equal_none_per_item_and_zero_chroma_does_not(codes):
    model, text, controls = build(), captions(4, 0, 7), make_controls()
    nothing = model(codes, text)
    absent = Controls(torch.full((3, 12, S), torch.nan), torch.full((3,), torch.nan))
    assert_equal(model(codes, text, controls=absent), nothing)
    partly = Controls(controls.chroma.clone(), controls.bpm)
    partly.chroma[1] = torch.nan
    assert_equal(model(codes, text, controls=partly)[1], nothing[1])  # its tempo is NaN too
    silent = Controls(torch.zeros(3, 12, S), None)
    assert (model(codes, text, controls=silent) - nothing).abs().amax((1, 2, 3)).min() > 1e-3
    for one in (Controls(controls.chroma, None), Controls(None, controls.bpm)):
        assert (model(codes, text, controls=one) - nothing)[2].abs().max() > 1e-3


def test_absent_controls_train_the_null_vector_and_present_ones_the_map():
    chroma, tempo = ChromaEmbedding(6), TempoEmbedding(6)
    present = Controls(torch.rand(2, 12, 5), torch.tensor([60.0, 120.0]))
    absent = Controls(torch.full((2, 12, 5), torch.nan), torch.full((2,), torch.nan))
    for controls, trains_null in [(present, False), (absent, True), (Controls(), True)]:
        for module, given in ((chroma, controls.chroma), (tempo, controls.bpm)):
            module.zero_grad()
            module(given).square().add(module(given)).sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
            assert bool(module.null.grad is not None and module.null.grad.abs().sum()) == trains_null
            others = [p.grad for name, p in module.named_parameters() if name != "null"]
            assert bool(sum(0 if g is None else g.abs().sum() for g in others)) != trains_null


def test_model_without_controls_has_no_parameters_for_them():
    without, with_both = (TokenLM(TokenLMConfig(**SMALL, chroma=on, tempo=on)) for on in (False, True))
    assert not [name for name in without.state_dict() if "chroma" in name or "tempo" in name]
    assert without.state_dict().keys() < with_both.state_dict().keys()


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (Controls(torch.zeros(3, 12, S - 1)), r"language model takes chroma of shape \[3, 12, 21\], got \[3, 12, 20\]"),
        (Controls(torch.zeros(3, 11, S)), r"chroma of shape .*, got \[3, 11, 21\]"),
        (Controls(bpm=torch.zeros(2)), r"the language model takes bpm of shape \[3\], got \[2\]"),
    ],
)
def test_controls_of_invalid_shape_are_rejected_with_one_line(codes, controls, message):
    with pytest.raises(UserError, match=message):
        build()(codes, captions(4, 0, 7), controls=controls)
    part = "chroma" if controls.bpm is None else "tempo"
    with pytest.raises(UserError, match=f"was not trained with {part}: leave it out"):
        build(chroma=False, tempo=False)(codes, captions(4, 0, 7), controls=controls)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generation_with_controls_is_independent_of_the_batch(name, guidance):
    """With a melody shorter than the clip; in coarse_first each frame is used twice."""
    model, text, null = build().float(), captions(3, 5, 2), captions(1)
    controls, pattern = make_controls(length=6), get_pattern(name, K)
    sampling = Sampling(top_k=0, guidance_scale=guidance)

    def run(items, controls):
        rows = torch.tensor(items)
        captioned = type(text)(text.embeddings[rows], text.mask[rows])
        seeds = [7 + i for i in items]
        return generate(model, captioned, null, pattern, 9, sampling, seeds, controls=controls.select_rows(rows))

    together = run([0, 1, 2], controls)
    for item in range(3):
        assert torch.equal(run([item], controls)[0], together[item])
    assert not torch.equal(run([0, 1, 2], Controls()), together)


def test_guidance_uses_the_controls_in_the_conditional_row_only(monkeypatch):
    model, calls = build().float(), []
    step, prefill = model.step, model.prefill
    monkeypatch.setattr(model, "step", lambda c, s, w: calls.append(w) or step(c, s, w))
    monkeypatch.setattr(model, "prefill", lambda c, t, s, w: calls.append(w) or prefill(c, t, s, w))
    controls = make_controls(1, 8)
    generate(model, captions(3), captions(1), get_pattern("parallel", K), 8, Sampling(guidance_scale=2.0), [1],
             controls=controls)  # fmt: skip
    chroma = torch.cat([w.chroma[:2] for w in calls], -1)  # [caption and null, 12, 8]; steps have padding rows
    torch.testing.assert_close(chroma[0], controls.chroma[0], equal_nan=True)
    assert all(w.bpm[0] == 90 and w.bpm[1].isnan() for w in calls) and chroma[1].isnan().all()


def test_guided_teacher_has_no_controls_in_its_null_pass(codes):
    model, teacher = build(predict_special=True), object.__new__(Teacher)
    teacher.model, teacher.guidance_scale, teacher.null_text = model, 0.0, captions(2)
    text = captions(4, 0, 7)
    null = captions(2, 2, 2)._replace(embeddings=teacher.null_text.embeddings.expand(3, -1, -1))
    with torch.no_grad():
        assert_equal(teacher(codes, text, make_controls())[0], model(codes, null)[..., :V])
        teacher.guidance_scale = 1.0
        assert_equal(teacher(codes, text, make_controls())[0], model(codes, text, controls=make_controls())[..., :V])


@pytest.mark.parametrize("supported", [True, False])
def test_single_stage_pipeline_takes_supported_controls_only(supported, tmp_path):
    codec = small_codec(tmp_path / "codec")
    controls = dict.fromkeys(("chroma", "tempo", "key", "metre", "bar_position"), supported)
    sizes = dict(n_codebooks=4, codebook_size=16, **controls)
    model = build(**sizes).float()
    pipe = MusicPipeline(model, codec, WordEncoder(dim=model.config.text_dim), get_pattern("delay", 4))
    tone = 0.5 * torch.sin(2 * torch.pi * 300 * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)[None]
    reference = pipe("a march", duration=1.0, seeds=2).codes
    for name, value in (("bpm", 150.0), ("melody", tone), ("key", "D minor"), ("metre", "3/4")):
        if supported:
            assert not torch.equal(pipe("a march", duration=1.0, seeds=2, **{name: value}).codes, reference)
        else:
            with pytest.raises(UserError, match=f"this model was not trained with {name}"):
                pipe("a march", duration=1.0, **{name: value})


# --- training -------------------------------------------------------------------------------------------------------


def test_controls_that_a_store_does_not_state_are_absent_when_a_model_is_trained_further(tmp_path):
    """As from somebody's own songs: an error in a training from scratch."""
    store = open_store(write_codes_store(tmp_path / "store"))  # random codes, no audio
    model = TokenLMConfig(**dict.fromkeys(("chroma", "tempo", "key", "metre", "bar_position", "timing"), True))
    data = lm_config(store.path, tmp_path / "run").data
    codec = small_codec(tmp_path / "codec")
    with pytest.raises(UserError, match=r"no segment .* states its bpm"):
        StoreControls(store, model, data, codec, seed=0)
    controls = StoreControls(store, model, data, codec, seed=0, required=False)
    items = [Item(0, 0, row, str(row), 0, 5) for row in range(2)]
    found = controls.load(items, {"frame_mask": torch.ones(2, 5, dtype=torch.bool)}, drop=True)
    assert found.chroma is None and found.bpm.isnan().all() and found.timing.isnan().all()
    assert (found.key == -1).all() and (found.metre == -1).all() and found.bar_position.isnan().all()


def test_melody_is_learnt():
    """Codes equal to the pitch class of their frame: predictable with the melody, chance without."""
    losses = {}
    for supported in (True, False):
        torch.manual_seed(0)
        model = TokenLM(TokenLMConfig(**{**SMALL, "n_codebooks": 1, "chroma": supported}))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            classes = torch.randint(12, (8, 1, 16))
            chroma = F.one_hot(classes[:, 0], 12).transpose(1, 2).float()
            shifted = torch.cat([torch.full((8, 1, 1), V), classes[..., :-1]], -1)
            logits = model(shifted, captions(*[2] * 8), controls=Controls(chroma if supported else None))
            loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[supported] = loss.item()
    assert losses[True] < 0.7 < 2.2 < losses[False]


def test_run_with_controls_resumes_exactly_and_drops_some(tmp_path, monkeypatch):
    store = write_codes_store(tmp_path / "codes", codec=small_codec(tmp_path / "codec"))
    steps = (*WITH_CONTROLS, "train.steps=8", "train.eval_every=4", "train.eval_batches=1", "data.batch_size=4")
    loop.train(lm_config(store, tmp_path / "unbroken", *steps))
    train_with_stops(lm_config(store, tmp_path / "stopped", *steps), lm.LanguageModelTask, (2, 5), monkeypatch)
    unbroken = run_contents(tmp_path / "unbroken")
    assert_same_runs(unbroken, run_contents(tmp_path / "stopped"))
    never = ("data.chroma_dropout=0", "data.tempo_dropout=0")
    loop.train(lm_config(store, tmp_path / "never", *steps, *never))
    assert [row[1] for row in run_contents(tmp_path / "never")[3]] != [row[1] for row in unbroken[3]]


def test_micro_batches_and_processes_drop_the_same_controls(tmp_path):
    store = write_codes_store(tmp_path / "codes", codec=small_codec(tmp_path / "codec"))
    steps = ("train.steps=3", "train.eval_every=3", "train.eval_batches=1", "data.batch_size=6")
    dropout = ("data.tempo_dropout=0.5", "data.chroma_dropout=0.5", "data.caption_dropout=0.5")
    whole = lm_config(store, tmp_path / "whole", *WITH_CONTROLS, *steps, *dropout)
    loop.train(whole)
    loop.train(lm_config(store, tmp_path / "micro", *WITH_CONTROLS, *steps, *dropout, "train.micro_batch_size=2"))
    train_in_two_processes(whole, tmp_path / "two")
    for metric in ("loss", "grad_norm", "valid/loss"):
        runs = ("whole", "micro", "two")
        found = [[row[metric] for row in metric_rows(tmp_path / run) if metric in row] for run in runs]
        torch.testing.assert_close(*map(torch.tensor, found[:2]), rtol=0, atol=1e-5)
        torch.testing.assert_close(*map(torch.tensor, found[1:]), rtol=0, atol=1e-5)


def test_controls_dropout_rates(tmp_path):
    store = write_codes_store(tmp_path / "codes", codec=small_codec(tmp_path / "codec"))
    rates = ("data.tempo_dropout=0.25", "data.chroma_dropout=0.6")
    task = lm.LanguageModelTask(lm_config(store, tmp_path / "run", *WITH_CONTROLS, *rates))
    items = [Item(epoch, epoch, 1, "s1", 0, 20) for epoch in range(2000)]  # the segment has a tempo

    def dropped(split):
        return task.controls.field(split)(items, {"frame_mask": torch.ones(2000, 20, dtype=torch.bool)})

    found = dropped("train")
    unconditional = torch.tensor([item.is_unconditional(0, 0.1) for item in items])  # their caption is dropped
    assert found.bpm[unconditional].isnan().all() and found.chroma[unconditional].isnan().all()
    assert unconditional.float().mean().item() == pytest.approx(0.1, abs=0.03)
    conditional = ~unconditional
    assert found.bpm[conditional].isnan().float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert found.chroma[conditional, 0, 0].isnan().float().mean().item() == pytest.approx(0.6, abs=0.04)
    assert not dropped("valid").bpm.isnan().any() and not dropped("valid").chroma.isnan().any()


@pytest.mark.parametrize("key", ["tempo_dropout", "chroma_dropout"])
@pytest.mark.parametrize("value", ["1.5", "nan"])
def test_controls_dropout_must_be_a_probability(key, value, tmp_path):
    with pytest.raises(UserError, match=rf"data.{key} must be in \[0, 1\], got "):
        loop.train(lm_config(tmp_path, tmp_path / "run", f"data.{key}={value}"))
