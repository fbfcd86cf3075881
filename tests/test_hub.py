"""Revisions of hub names: what is asked for is fetched, and what was fetched is recorded with its commit."""

from pathlib import Path

import pytest
import torch
from small_codecs import hf_codec
from transformers import BertConfig, BertModel, BertTokenizerFast

from ssmttm.codecs import StudentCodec, encoder_of, load_codec
from ssmttm.errors import UserError
from ssmttm.generation.loading import ASSETS, open_model_folder
from ssmttm.hub import split_revision
from ssmttm.text.encoders import load_text_encoder
from ssmttm.training.data import check_text_encoder

OLD, NEW = "a" * 40, "b" * 40


def write_codec(folder, seed):
    codec = hf_codec("dac")
    torch.manual_seed(seed)
    torch.nn.init.normal_(codec.model.decoder.conv2.weight)
    codec.model.save_pretrained(folder)


def write_encoder(folder, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=6, **sizes), add_pooling_layer=False).save_pretrained(folder)
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "piano", "drums")
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)


LOADERS = {"codec": (load_codec, write_codec), "encoder": (load_text_encoder, write_encoder)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with two commits of a codec and of an encoder, of which the older has the tag v1; offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, (_, write) in LOADERS.items():
        for seed, commit in enumerate((OLD, NEW)):
            write(tmp_path / f"models--someone--{name}" / "snapshots" / commit, seed)
        set_revision(tmp_path, name, "main", NEW)
        set_revision(tmp_path, name, "v1", OLD)
    return tmp_path


def set_revision(cache, name, revision, commit):
    refs = cache / f"models--someone--{name}" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / revision).write_text(commit)


@pytest.mark.parametrize("kind", LOADERS)
def test_revision_is_fetched_and_recorded(hub, kind):
    load, name = LOADERS[kind][0], f"someone/{kind}"
    newest = load(name)
    assert newest.name == f"{name}@{NEW}"
    for old in (load(name, revision="v1"), load(f"{name}@v1"), load(f"{name}@{OLD}"), load(name, revision=OLD)):
        assert old.name == f"{name}@{OLD}" and old.fingerprint != newest.fingerprint


@pytest.mark.parametrize("kind", LOADERS)
def test_recorded_name_gives_the_same_after_the_branch_has_moved(hub, kind):
    load, name = LOADERS[kind][0], f"someone/{kind}"
    recorded = load(name)
    set_revision(hub, kind, "main", OLD)
    assert load(name).fingerprint != recorded.fingerprint
    assert load(recorded.name).fingerprint == recorded.fingerprint


def test_students_codec_is_pinned_to_the_teachers_commit(hub):
    teacher = load_codec("someone/codec@v1")
    student = StudentCodec.from_teacher(teacher, {"kind": "spectral", "width": 8})
    assert encoder_of(student).fingerprint == teacher.fingerprint and student.config.teacher.endswith(OLD)


def test_model_folder_of_a_revision(hub):
    snapshots = hub / "models--someone--model" / "snapshots"
    snapshots.mkdir(parents=True)
    for commit, model in ((OLD, "tiny_lm"), (NEW, "tinyttm_tiny")):
        (snapshots / commit).symlink_to(ASSETS / model, target_is_directory=True)
    set_revision(hub, "model", "main", NEW)
    assert open_model_folder("someone/model").path.name == NEW
    assert open_model_folder("someone/model", revision=OLD).path.name == OLD
    assert open_model_folder(f"someone/model@{OLD}").name == "tiny_lm"
    for local in (None, "tiny_lm", ASSETS / "tiny_lm"):
        with pytest.raises(UserError, match=r"revision=v1 is of a hub id, and .*tiny_lm is a local folder"):
            open_model_folder(local, revision="v1")


@pytest.mark.parametrize("load", [load_codec, load_text_encoder, open_model_folder])
def test_revision_that_is_not_there_is_reported(hub, load):
    for name in ("someone/codec@v9", f"someone/codec@{'c' * 40}"):
        with pytest.raises(UserError, match=r"someone/codec") as error:
            load(name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="names another revision than revision=v2"):
        load("someone/codec@v1", revision="v2")
    with pytest.raises(UserError, match="names no revision after the @"):
        load("someone/codec@")


def test_split_revision():
    assert split_revision("someone/codec") == ("someone/codec", None)
    assert split_revision("someone/codec@refs/pr/1") == ("someone/codec", "refs/pr/1")
    assert split_revision("someone/codec", "v1") == split_revision("someone/codec@v1", "v1") == ("someone/codec", "v1")


def test_text_encoder_of_a_store_may_be_pinned():
    from omegaconf import OmegaConf

    config = OmegaConf.create({"data": {"text_encoder": "google/flan-t5-base", "store": "s"}, "model": {"text_dim": 8}})
    check_text_encoder(config, {"text": {"name": f"google/flan-t5-base@{OLD}", "dim": 8}})
    with pytest.raises(UserError, match="holds the text of"):
        check_text_encoder(config, {"text": {"name": f"google/flan-t5-large@{OLD}", "dim": 8}})


def test_folder_with_an_at_sign_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("codec@v1").mkdir()
    write_codec("codec@v1", 0)
    assert load_codec("codec@v1").name == load_codec(Path("codec@v1")).name == "codec@v1"
