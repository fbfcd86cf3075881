"""Stores and models of an older embedded codec: one clear line each."""

import json
import shutil

import pytest
from small_stores import lm_config, write_codes_store

from ssmttm import MusicPipeline
from ssmttm.codecs import load_codec
from ssmttm.errors import UserError
from ssmttm.generation.loading import ASSETS
from ssmttm.models import build_model
from ssmttm.training.checkpointer import load_initial_weights
from ssmttm.training.tasks.lm import LanguageModelTask

OLD = "93b77ea0bc138861"  # the fingerprint of `tiny` with eight codebooks


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def old_model(tmp_path):
    folder = shutil.copytree(ASSETS / "tiny_lm", tmp_path / "old")
    for card in (folder / "card.json", folder / "second_stage" / "card.json"):
        change_json(card, lambda content: content["data"]["codec"].update(fingerprint=OLD))
    return folder


def refused(call):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and OLD in message and load_codec().fingerprint in message
    return message


def test_a_store_of_the_older_codec_must_be_encoded_again(tmp_path):
    store = write_codes_store(tmp_path / "store")
    change_json(store / "store.json", lambda info: info["codec"].update(name="tiny", fingerprint=OLD))
    message = refused(lambda: LanguageModelTask(lm_config(store, tmp_path / "run")))
    assert "or encode the store again with `python -m data_prep pack --root" in message and "--codec tiny" in message


def test_a_model_of_the_older_codec_needs_that_codec(old_model):
    message = refused(lambda: MusicPipeline.from_pretrained(old_model))
    assert "was trained with codec 'tiny'" in message and "restore the original, or use a model" in message


def test_a_model_of_the_older_codec_starts_no_training_with_the_present_one(old_model):
    codec = {"name": "tiny", "fingerprint": load_codec().fingerprint}
    model = build_model(MusicPipeline.from_pretrained("tiny_lm")._folders[0].config.model)
    assert "start from a model of the same codec" in refused(lambda: load_initial_weights(old_model, model, codec))
    assert load_initial_weights("tiny_lm", model, codec)["name"] == "tiny_lm"
