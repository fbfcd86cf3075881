"""Every key of a task's config is read while the task trains."""

from collections.abc import Iterator

import pytest
from omegaconf import DictConfig, OmegaConf
from small_encoders import write_bert
from small_stores import (
    codec_config,
    lm_config,
    second_stage_config,
    small_codec,
    write_audio_store,
    write_codes_store,
)
from small_vaes import vae_config

from ssmttm import config
from ssmttm.codecs.students.decoders import ConvConfig, SpectralConfig
from ssmttm.config.training import CodecStudentConfig
from ssmttm.training import loop

TWO_STEPS = ("train.steps=2", "train.eval_every=2", "train.eval_batches=1", "data.batch_size=2", "train.sample_every=2",
             "train.sample_seconds=0.4", "train.precision=fp32", "schedule.warmup_steps=1")  # fmt: skip
AUDIO_STEPS = [*(key for key in TWO_STEPS if "sample_seconds" not in key), "codec_training.adversarial_start=1",
               "codec_training.fast_losses=true"]  # fmt: skip
WHOLE = ("model.", "codec.", "codec_student.")  # passed whole to a dataclass, which refuses a key that it does not have


@pytest.fixture
def read_keys(monkeypatch):
    """Full keys of all values that are read from a config as an attribute, an item or by `get`."""
    keys: set[str] = set()

    def recording(original):
        def read(node, key, *default):
            if isinstance(key, str) and not key.startswith("_"):
                keys.add(node._get_full_key(key))
            return original(node, key, *default)

        return read

    for name in ("__getattr__", "__getitem__", "get"):
        monkeypatch.setattr(DictConfig, name, recording(getattr(DictConfig, name)))
    return keys


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def codes_store(root):
    return write_codes_store(root / "codes", codec=small_codec(root / "codec"), text_folder=write_bert(root / "bert"))


@pytest.fixture(scope="module")
def audio_store(root):
    return write_audio_store(root / "audio")


@pytest.fixture(scope="module")
def settings(root, codes_store, audio_store):
    """A config of each task in which every option is in use."""
    text = ("model.text_dim=16", "data.text_encoder=bert")
    teacher = loop.train(lm_config(codes_store, root / "teacher", *text, *TWO_STEPS))
    tags = ("losses.tags=1", "tag_head.block=1", "model.tempo=true", "model.predict_controls=true")
    paths = (f"data.store={codes_store}", f"teacher={teacher}", "text_student.joint_step=1", "data.frames=20")
    return {
        "lm": lm_config(codes_store, root / "lm", *text, *TWO_STEPS, *tags),
        "diffusion": second_stage_config(codes_store, root / "diffusion", *text, *TWO_STEPS),
        "codec": codec_config(audio_store, root / "codec-run", *AUDIO_STEPS),
        "distill": lm_config(codes_store, root / "distill", "task=distill", f"teacher={teacher}", *text, *TWO_STEPS,
                             "losses.hidden=1"),
        "distill_codec": config.load(
            "task=distill_codec", f"data.store={audio_store}", f"teacher={root / 'codec'}", *AUDIO_STEPS,
            f"run_dir={root / 'decoder'}", "codec_student.width=8", "codec_student.blocks=[1,1]",
        ),
        "distill_text": config.load("task=distill_text", f"run_dir={root / 'text'}", *paths, *TWO_STEPS),
        "vae": vae_config(audio_store, root / "vae", *AUDIO_STEPS),
    }  # fmt: skip


@pytest.mark.parametrize("task", config.names("task"))
def test_every_key_of_a_task_is_read(task, settings, read_keys):
    loop.train(settings[task])
    if task == "codec":
        loop.train(settings["vae"])  # whose loss `kl` codecs do not have
    unread = set(leaves(settings[task])) - read_keys
    assert sorted(key for key in unread if not key.startswith(WHOLE)) == []


def leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, value in OmegaConf.to_container(node).items():
        if isinstance(value, dict):
            yield from leaves(OmegaConf.create(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_keys_of_codec_student_are_those_of_its_decoders():
    decoders = {*SpectralConfig.__dataclass_fields__, *ConvConfig.__dataclass_fields__}
    assert set(CodecStudentConfig.__dataclass_fields__) == {*decoders, "kind", "transfer"}
