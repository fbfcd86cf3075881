"""The sampling settings of a model's card: those of a call, a stream and an evaluation that give none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
from ssmttm import MusicPipeline
from ssmttm.cli.main import main
from ssmttm.distill.teacher import Teacher
from ssmttm.errors import UserError
from ssmttm.evaluation.protocol.generate import Decoding
from ssmttm.generation.loading import load_language_model
from ssmttm.generation.request import Sampling
from ssmttm.model_folder import write_card
from ssmttm.training.checkpointer import load_initial_weights

PROMPT = "a slow waltz in D minor on a music box"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the embedded model without settings of its own."""
    pipe = MusicPipeline.from_pretrained(device="cpu")
    folder = pipe.save_pretrained(tmp_path_factory.mktemp("models") / "plain")
    card = json.loads((folder / "card.json").read_text())
    card.pop("sampling", None)
    write_card(folder, card)
    return folder


def with_sampling(folder, target, **settings):
    """The folder again with these settings."""
    pipe = MusicPipeline.from_pretrained(folder, device="cpu")
    pipe.sampling_defaults = Sampling(**settings)
    return MusicPipeline.from_pretrained(pipe.save_pretrained(target), device="cpu")


def test_calls_streams_and_evaluations_take_the_models_settings(folder, tmp_path):
    plain, own = MusicPipeline.from_pretrained(folder, device="cpu"), with_sampling(folder, tmp_path / "own", top_k=1)
    assert plain.sampling_defaults == Sampling() and own.sampling_defaults == Sampling(top_k=1)
    expected = plain(PROMPT, duration=0.5, top_k=1).codes
    assert torch.equal(own(PROMPT, duration=0.5).codes, expected)
    assert not torch.equal(own(PROMPT, duration=0.5, top_k=250).codes, expected)
    assert own.session(PROMPT, duration=0.5).request.sampling == Sampling(top_k=1)
    assert own.session(PROMPT, duration=0.5, temperature=0.5).request.sampling == Sampling(0.5, top_k=1)
    assert Decoding.of(own, 0.5, 7, min_p=0.1).settings() == {"min_p": 0.1} | Decoding.of(own, 0.5, 7).settings()
    assert Decoding.of(own, 0.5, 7, top_p=None).settings() == Decoding.of(plain, 0.5, 7, top_k=1).settings()


def test_a_students_guidance_is_off_unless_its_card_says_otherwise(tmp_path):
    student = MusicPipeline.from_pretrained("tinyttm_tiny", device="cpu")
    assert student.guidance_scale == 1
    student.sampling_defaults = Sampling(guidance_scale=1.5, top_p=0.9)
    copy = MusicPipeline.from_pretrained(student.save_pretrained(tmp_path / "copy"), device="cpu")
    assert copy.sampling_defaults == Sampling(guidance_scale=1.5, top_p=0.9)


def test_repainting_and_commands_take_the_models_settings(folder, tmp_path, monkeypatch):
    own, plain = with_sampling(folder, tmp_path / "own", top_k=1), MusicPipeline.from_pretrained(folder, device="cpu")
    clip = (plain(PROMPT, duration=1.0).audios[0], plain.sample_rate)
    found = [pipe.repaint(PROMPT, clip, (0.4, 0.8), candidates=1, **options).codes
             for pipe, options in ((own, {}), (plain, {"top_k": 1}), (plain, {}))]  # fmt: skip
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    monkeypatch.chdir(tmp_path)
    words = [PROMPT, "--checkpoint", str(tmp_path / "own"), "--duration", "0.3", "--out", "x.wav"]
    assert sample.main(words) == 0 and json.loads(Path("x.json").read_text())["top_k"] == 1
    assert sample.main([*words, "--top-k", "7"]) == 0 and json.loads(Path("x.json").read_text())["top_k"] == 7


def test_models_made_from_another_one_have_its_settings(folder, tmp_path):
    """Its card says so, until their own does."""
    own = with_sampling(folder, tmp_path / "own", top_p=0.8, guidance_scale=2.0)._folders[0]
    init = load_initial_weights(str(own.path), load_language_model(own))
    assert init["sampling"]["top_p"] == 0.8
    tuned = replace(own, card={"data": own.card["data"], "init": init})
    assert tuned.sampling == Sampling(top_p=0.8, guidance_scale=2.0)
    again = replace(own, card={"data": own.card["data"], "init": init, "sampling": {"top_p": 0.7}})
    assert again.sampling == Sampling(top_p=0.7, guidance_scale=2.0)
    teacher = Teacher(str(own.path))
    assert teacher.student_sampling == own.sampling
    entry = teacher.student_metadata({"licences": {}, "text": {}})["teacher"]
    student = replace(own, card={"data": own.card["data"] | {"teacher": entry}})
    assert student.sampling == own.sampling
    guided = replace(own, card={"data": own.card["data"] | {"teacher": entry | {"distilled_guidance_scale": 3}}})
    assert guided.sampling == Sampling(top_p=0.8, guidance_scale=1.0)


def test_card_of_settings_is_printed(folder, tmp_path, capsys):
    with_sampling(folder, tmp_path / "own", top_p=0.8)
    main(["info", str(tmp_path / "own")])
    assert "top p 0.8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 1.5}, "top_p must be in"), ({"topp": 0.9}, "topp"), ({"temperature": "warm"}, "temperature must be"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"min_p": True}, "min_p must be a number"), ("warm", "mapping"), (["top_p"], "mapping"),
    ],
)  # fmt: skip
def test_settings_of_a_card_are_checked(folder, tmp_path, settings, message):
    copy = MusicPipeline.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "copy")
    write_card(copy, json.loads((copy / "card.json").read_text()) | {"sampling": settings})
    with pytest.raises(UserError, match=f"no valid sampling settings, .*{message}"):
        MusicPipeline.from_pretrained(copy, device="cpu")
