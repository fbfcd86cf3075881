"""The embedded models with their codecs and text encoders."""

import pytest
import torch

from ssmttm import MusicPipeline
from ssmttm.codecs.metrics import chroma_similarity
from ssmttm.compress.sizes import components


@pytest.fixture(scope="module", params=[None, "tinyttm_tiny"])
def pipe(request):
    return MusicPipeline.from_pretrained(request.param)


def test_embedded_models_generate_audio_that_depends_on_seed_and_prompt(pipe):
    out = pipe(["a calm piano piece", "a calm piano piece", "fast techno with drums"], duration=2.0, seeds=[0, 1, 0])
    assert out.audios.shape == (3, 1, 48_000) and out.sample_rate == 24_000
    assert torch.isfinite(out.audios).all() and out.audios.abs().max() <= 1.5
    assert (out.audios.square().mean((1, 2)).sqrt() > 1e-3).all()
    assert len({codes.numpy().tobytes() for codes in out.codes}) == 3
    again = pipe("fast techno with drums", duration=2.0, seeds=[0])
    assert torch.equal(again.codes[0], out.codes[2]) and torch.equal(again.audios[0], out.audios[2])


def test_embedded_models_stream(pipe):
    whole = pipe("a march for brass", duration=1.5, seeds=3).audios[0]
    parts = list(pipe.stream("a march for brass", duration=1.5, seed=3))
    assert len(parts) > 1 and torch.allclose(torch.cat(parts, -1), whole, atol=1e-5)


def test_embedded_models_take_long_prompts_emoji_and_any_script(pipe, caplog):
    out = pipe([" ".join(f"word{i}" for i in range(10_000)), "🎻🎶", "медленный вальс", "鋼琴"], duration=0.2)
    assert out.audios.shape == (4, 1, 4800)
    assert "the first 128 are kept" in caplog.text


def test_embedded_models_have_metadata(pipe):
    assert len(pipe.metadata["model"]["weights_sha256"]) == 64
    assert [pipe.metadata[part]["name"] for part in ("codec", "text_encoder")] == ["tiny", "minilm"]
    assert set(pipe.metadata["training_data_licences"]) == {"CC0-1.0"}


def test_embedded_student_is_smaller_than_its_teacher():
    teacher, student = (components(MusicPipeline.from_pretrained(name)) for name in ("tiny_lm", "tinyttm_tiny"))
    assert [part.name for part in teacher] == ["text encoder", "language model", "codec decoder", "second stage"]
    old, new = teacher[1], student[1]  # the language model; the other parts are the teacher's
    assert new.parameters < 0.6 * old.parameters and new.flops < old.flops / 3 and new.read < old.read / 3
    assert [part.parameters for part in student[2:]] == [part.parameters for part in teacher[2:]]


def test_embedded_models_generate_all_codebooks_in_windows(pipe):
    """A clip of several windows of the second stage, whole and as a stream."""
    out = pipe("a calm piano piece", duration=4.0, seeds=[3])
    assert out.codes.shape == (1, pipe.codec.n_codebooks, 100) and out.audios.square().mean().sqrt() > 1e-3
    assert pipe.second_stage.settings.window < 100 and pipe.model.config.n_codebooks < pipe.codec.n_codebooks
    assert "second_stage" in pipe.metadata
    parts = list(pipe.stream("a calm piano piece", duration=4.0, seed=3))
    assert len(parts) > 1 and torch.allclose(torch.cat(parts, -1), out.audios[0], atol=1e-5)


def test_embedded_models_take_all_controls_and_state_what_was_drawn(pipe):
    out = pipe("a slow waltz", duration=0.4, seeds=[1], bpm=90)
    (stated,) = out.metadata["controls"]
    assert stated["bpm"] == 90 and stated["drawn"] == ["key", "metre"]
    given = {name: stated[name] for name in ("bpm", "key", "metre")}
    again = pipe("a slow waltz", duration=0.4, seeds=[1], **given)
    assert torch.equal(again.codes, out.codes) and not again.metadata["controls"][0].get("drawn")
    assert not torch.equal(pipe("a slow waltz", duration=0.4, seeds=[1], bpm=180).codes, out.codes)


@pytest.mark.parametrize("engine", ["torch", "fused", "ort"])
def test_embedded_model_has_the_same_codes_in_every_engine(engine):
    """The most likely codes of half a second."""
    pipe = MusicPipeline.from_pretrained("tiny_lm")
    codes = [pipe("a slow waltz", duration=0.5, seeds=[1], top_k=1, engine=one).codes for one in ("torch", engine)]
    assert torch.equal(*codes)


def test_embedded_model_follows_a_melody():
    """A scale of sine tones, unrelated to the caption."""
    pipe = MusicPipeline.from_pretrained("tiny_lm")
    time = torch.arange(pipe.sample_rate // 2) / pipe.sample_rate
    notes = [0.4 * torch.sin(2 * torch.pi * 261.63 * 2 ** (n / 12) * time) for n in (0, 4, 7, 5, 9, 2, 11, 7)]
    melody = torch.cat([note * torch.exp(-2 * time) for note in notes])[None]
    similarity = {}
    for name, given_melody in (("with", melody), ("without", None)):
        made = pipe(["a slow waltz on a music box"] * 2, duration=4.0, seeds=0, melody=given_melody).audios[:, 0]
        similarity[name] = chroma_similarity(made, melody.expand(2, -1), pipe.sample_rate).mean()
    assert similarity["with"] > similarity["without"] + 0.15, similarity
