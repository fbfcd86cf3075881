"""The sampling settings of a model's card: those of a call, a stream and an evaluation that give none."""

import json

import pytest
import torch

from ssmttm import MusicPipeline
from ssmttm.errors import UserError
from ssmttm.evaluation.protocol.generate import Decoding
from ssmttm.generation.request import Sampling
from ssmttm.model_folder import write_card

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
    assert Decoding.of(own, 0.5, 7, top_p=None).settings() == Decoding.of(plain, 0.5, 7, top_k=1).settings()


def test_a_students_guidance_is_off_unless_its_card_says_otherwise(tmp_path):
    student = MusicPipeline.from_pretrained("tinyttm_tiny", device="cpu")
    assert student.guidance_scale == 1
    student.sampling_defaults = Sampling(guidance_scale=1.5, top_p=0.9)
    copy = MusicPipeline.from_pretrained(student.save_pretrained(tmp_path / "copy"), device="cpu")
    assert copy.sampling_defaults == Sampling(guidance_scale=1.5, top_p=0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"top_p": 1.5}, "top_p must be in"), ({"topp": 0.9}, "topp"), ({"temperature": "warm"}, "temperature")],
)
def test_settings_of_a_card_are_checked(folder, tmp_path, settings, message):
    copy = MusicPipeline.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "copy")
    write_card(copy, json.loads((copy / "card.json").read_text()) | {"sampling": settings})
    with pytest.raises(UserError, match=f"no valid sampling settings, .*{message}"):
        MusicPipeline.from_pretrained(copy, device="cpu")
