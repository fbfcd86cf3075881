"""`ssmttm compress`: training of the parts of a recipe, assembly, sizes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_denoisers import denoiser
from small_pipelines import small_pipeline
from small_stores import (
    CODEBOOK_DIM,
    CODEBOOK_SIZE,
    TEXT_DIM,
    lm_config,
    second_stage_config,
    small_codec,
    write_codes_store,
)
from small_vaes import LATENT_CHANNELS, small_vae
from small_word_encoder import WordEncoder
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.end_to_end import random_system
from ssmttm import MusicPipeline, config
from ssmttm.cli.main import main
from ssmttm.codecs import StudentCodec
from ssmttm.codecs.vae import PatchedVAE
from ssmttm.compress import recipe
from ssmttm.compress.assemble import assemble
from ssmttm.compress.sizes import Component, comparison, components, total
from ssmttm.errors import Preempted, UserError
from ssmttm.export.model_folder import export, export_two_stages
from ssmttm.files import directory_lock
from ssmttm.generation import pretrained
from ssmttm.generation.loading import ASSETS, open_model_folder, open_second_stage_folder
from ssmttm.generation.second_stage import SecondStage
from ssmttm.ops.int8 import Int8Linear
from ssmttm.training import loop

BUDGET = 89.2e6  # arXiv 2406.17159
LM = ("experiment=tinyttm_lm,model=tiny,model.chroma=false,"
      "model.d_model=16,model.n_layers=2,model.headdim=8,model.d_state=4,model.n_codebooks=4,"
      f"model.codebook_size=16,model.text_dim={TEXT_DIM},data.frames=20,train.steps=4,distill.guidance_scale=2,"
      "train.eval_every=0,train.checkpoint_every=2")  # fmt: skip
CODEC = ("experiment=tinyttm_codec,codec_student.width=8,codec_student.blocks=[1,1],data.seconds=0.5,"
         "data.batch_size=2,train.steps=3,train.eval_every=0,train.checkpoint_every=2")  # fmt: skip


class Encoder(WordEncoder):
    """With weights to count."""

    model = nn.Linear(3, 5)


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    monkeypatch.setattr(pretrained, "load_text_encoder", lambda name: Encoder())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("compression")
    return write_codes_store(root / "codes", codec=small_codec(root / "codec"))


@pytest.fixture(scope="module")
def teacher(store):
    wide = ("model.d_model=32", "model.n_layers=4", "data.batch_size=4", "train.eval_every=0", "train.steps=5")
    return loop.train(lm_config(store, store.parent / "teacher", *wide, "train.checkpoint_every=1000"))


@pytest.fixture
def arguments(store, teacher, tmp_path):
    """Command-line arguments for a recipe with the given parts."""

    def build(**parts):
        parts = {"text": "null", "codec": "null", "lm": "null", **parts}
        keys = [f"recipe.{part}={value}" for part, value in parts.items()]
        return ["recipe=tinyttm_tiny", f"teacher={teacher}", f"store={store}", f"work={tmp_path / 'work'}",
                f"out={tmp_path / 'out'}", *keys]  # fmt: skip

    return build


def list_override(keys):
    """Comma-separated overrides as a list override: ['a','b']."""
    parts, depth, start = [], 0, 0
    for end, letter in enumerate(keys + ","):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append(f"'{keys[start:end]}'")
            start = end + 1
    return f"[{','.join(parts)}]"


def test_recipe_produces_a_working_system(arguments, teacher, tmp_path, capsys):
    command = arguments(lm=list_override(LM), codec=list_override(CODEC), int8="true")
    assert main(["compress", *command]) == 0
    out = tmp_path / "out"
    pipe = MusicPipeline.from_pretrained(out, "cpu")
    assert pipe.guidance_scale == 1 and isinstance(pipe.model.heads, Int8Linear)
    assert isinstance(pipe.codec, StudentCodec) and pipe.codec.decoder.config.width == 8
    audio = pipe("a march", duration=0.4).audios
    assert audio.shape[-1] == 960 and bool(audio.isfinite().all())
    card = json.loads((out / "card.json").read_text())
    assert card["weights"] == "int8" and card["data"]["codec"]["name"] == "./codec" and card["data"]["teacher"]
    assert card["data"]["licences"] == {"NOASSERTION": None, "CC0-1.0": 24}  # the small codec has no card
    assert card["licence"] == "NOASSERTION"
    assert str(tmp_path) not in "".join(p.read_text() for p in out.rglob("*") if p.suffix in (".json", ".yaml"))
    printed = capsys.readouterr().out
    assert "codec decoder" in printed and "smaller" in (out / "sizes.md").read_text() and str(out) in printed
    with pytest.raises(UserError, match="not empty"):
        main(["compress", *command])


def test_second_stage_of_the_teacher_is_kept(store, arguments, tmp_path):
    """With the student codec, and with a language model whose first codebook it completes."""
    first = loop.train(
        lm_config(store, tmp_path / "first", "model.n_codebooks=1", "train.steps=2", "train.eval_every=0")
    )
    second = loop.train(second_stage_config(store, tmp_path / "second", "train.steps=2", "train.eval_every=0"))
    whole = export_two_stages(first, second, tmp_path / "whole")
    lm = LM.replace("model.n_codebooks=4", "model.n_codebooks=1").replace("model.n_layers=2", "model.n_layers=1")
    command = arguments(lm=list_override(lm), codec=list_override(CODEC), int8="true")
    command[1] = f"teacher={whole}"
    assert main(["compress", *command]) == 0
    out = tmp_path / "out"
    pipe = MusicPipeline.from_pretrained(out, "cpu")
    assert isinstance(pipe.model.heads, Int8Linear) and isinstance(pipe.codec, StudentCodec)
    assert pipe("a march", duration=0.4).codes.shape[1] == 4
    weights = [(folder / "second_stage" / "model.safetensors").read_bytes() for folder in (out, whole)]
    assert weights[0] == weights[1]
    assert "| second stage |" in (out / "sizes.md").read_text()
    with pytest.raises(UserError, match=r"reads the text encoder's states.* set recipe\.text=null"):
        command = arguments(text="['experiment=tinyttm_text']")
        command[1] = f"teacher={whole}"
        command[4] = f"out={tmp_path / 'again'}"
        main(["compress", *command])


def test_second_stage_reads_the_student_of_the_text_encoder(tmp_path):
    """Its card names it, so that both stages fit."""
    folder = Path(shutil.copytree(ASSETS / "tiny_lm", tmp_path / "lm"))
    card = json.loads((folder / "card.json").read_text())
    card["data"]["text"] = {"name": "./text_encoder", "fingerprint": "5" * 16}
    (folder / "card.json").write_text(json.dumps(card))
    shutil.rmtree(folder / "second_stage")
    out = assemble(folder, None, tmp_path / "out", second_stage=ASSETS / "tiny_lm" / "second_stage")
    second = open_second_stage_folder(open_model_folder(out), None)
    assert second.provenance("text") == {"name": "../text_encoder", "fingerprint": "5" * 16}


def test_finished_trainings_are_skipped(arguments, tmp_path):
    command = arguments(lm=list_override(LM))
    main(["compress", *command])
    metrics = (tmp_path / "work" / "lm" / "metrics.jsonl").read_text()
    command[4] = f"out={tmp_path / 'again'}"
    main(["compress", *command])
    assert (tmp_path / "work" / "lm" / "metrics.jsonl").read_text() == metrics
    first, second = (MusicPipeline.from_pretrained(tmp_path / name).model for name in ("out", "again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_part_whose_teacher_was_continued_is_rejected(arguments, tmp_path):
    """A second language model, in place of the text encoder, learns from the first."""

    def train_all(steps):
        lm = f"{LM},train.precision=fp32,distill.guidance_scale=1"
        command = arguments(lm=list_override(f"{lm},train.steps={steps}"), text=list_override(lm))
        for keys in recipe.training_overrides(config.load(*command, root="compress")).values():
            loop.train(config.load(*keys))

    train_all(2)
    train_all(2)
    with pytest.raises(UserError, match=r"text/.* learnt from another teacher, lm/step-00000002 .* lm/step-00000003"):
        train_all(3)


def test_parts_without_training_stay_the_teachers(arguments, teacher, tmp_path):
    whole = export(teacher, tmp_path / "exported", half=False)
    command = arguments(int8="true")
    command[1] = f"teacher={whole}"
    main(["compress", *command])
    ours, theirs = (MusicPipeline.from_pretrained(folder, "cpu") for folder in (tmp_path / "out", whole))
    assert type(ours.codec) is type(theirs.codec) and ours.guidance_scale == theirs.guidance_scale == 3
    assert torch.equal(ours.model.embedding.weight, theirs.model.embedding.weight.half().float())


def test_teachers_of_the_parts(arguments, teacher, tmp_path):
    """The text encoder's teacher is the new language model, the decoder's the codec of the recipe's teacher."""
    command = arguments(lm=list_override(LM), codec=list_override(CODEC), text="['experiment=tinyttm_lm']")
    overrides = recipe.training_overrides(config.load(*command, root="compress"))
    assert list(overrides) == ["lm", "text", "codec"]
    teachers = {part: config.load(*keys).teacher for part, keys in overrides.items()}
    expected = (str(teacher), str(tmp_path / "work" / "lm"), str(teacher.parent / "codec"))
    assert teachers == dict(zip(("lm", "text", "codec"), expected, strict=True))
    alone = recipe.training_overrides(config.load(*arguments(text="['experiment=tinyttm_lm']"), root="compress"))
    assert f"teacher='{teacher}'" in alone["text"]
    with pytest.raises(UserError, match=r"train\.steps"):
        recipe.training_overrides(config.load(*arguments(text="['train.stepz=3']"), root="compress"))


def test_two_compressions_in_one_folder_are_rejected(arguments, tmp_path):
    settings = config.load(*arguments(int8="true"), root="compress")
    with (
        directory_lock(tmp_path / "work", "compression"),
        pytest.raises(UserError, match="another compression is writing to"),
    ):
        recipe.compress(settings)


@pytest.mark.parametrize(("code", "error"), [(2, UserError), (75, Preempted), (1, subprocess.CalledProcessError)])
def test_exit_code_of_training_is_raised(code, error):
    recipe.run_training([sys.executable, "-c", "pass"], "lm")
    with pytest.raises(error):
        recipe.run_training([sys.executable, "-c", f"raise SystemExit({code})"], "lm")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_signal_is_passed_to_the_training(number, error, tmp_path):
    """The parent waits until the training has ended."""
    parent, marker = os.getpid(), tmp_path / "stopped"
    code = f"""
import os, pathlib, signal, time
def stop(*_):
    time.sleep(0.5); pathlib.Path({str(marker)!r}).touch(); os._exit(75)
signal.signal(signal.SIGTERM, stop); os.kill({parent}, {int(number)}); time.sleep(60)
"""
    with pytest.raises(error):
        recipe.run_training([sys.executable, "-c", code], "lm")
    assert marker.exists()


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_component_sizes(teacher):
    pipe = MusicPipeline.from_pretrained(teacher, "cpu")
    text, language, decoder = components(pipe)
    assert (text.name, text.parameters, text.stored) == ("text encoder", 20, 80)
    assert language.parameters == sum(p.numel() for p in pipe.model.parameters()) == language.stored / 4
    assert decoder.parameters < sum(p.numel() for p in pipe.codec.parameters())  # without its encoder
    pipe.guidance_scale = 1.0
    once = components(pipe)[1]
    assert language.flops == 2 * once.flops
    state = pipe.model.init_state(1)
    carried = sum(t.numel() * 4 for s in state.blocks for b in s if b.inner is not None for _, t in b.inner._tensors())
    positions = pipe.pattern.sequence_length(250) / 10
    assert language.read - once.read == pytest.approx(2 * carried * positions)


@pytest.mark.parametrize("channels", [1, 2])
def test_sizes_of_a_model_with_a_vae_are_those_of_the_decoder_of_its_vae(tmp_path, channels):
    """And of the codebook of the coarse codes, which the second stage reads."""
    pipe = small_pipeline(tmp_path, two_stages=True)
    pipe.text_encoder.model = Encoder.model
    by_codec = components(pipe)
    stage, vae = pipe.second_stage, small_vae(sample_rate=2400, ratios=(4, 4, 3), channels=channels)
    model = denoiser(n_codebooks=1, vae_channels=LATENT_CHANNELS, vae_frames=2)
    pipe.second_stage = SecondStage(model, stage.codec, stage.settings, PatchedVAE(vae, 2))
    text, language, decoder, second = components(pipe)
    assert (text, language) == tuple(by_codec[:2])
    with FlopCounterMode(display=False) as counter:
        vae.decode(vae.zeros(100))  # 2 s
    assert decoder.name == "VAE decoder" and decoder.flops == counter.get_total_flops() / 2
    assert decoder.parameters == sum(p.numel() for p in vae.model.decoder.parameters()) == decoder.stored / 4
    book = CODEBOOK_SIZE * CODEBOOK_DIM
    assert second.parameters == sum(p.numel() for p in model.parameters()) + book == second.stored / 4
    assert by_codec[3].parameters == sum(p.numel() for p in stage.model.parameters())


def test_comparison_table_and_total():
    old, new = ([Component(name, n * 10**6, 0, 3e6 * n, 2e6) for name in "ab"] for n in (4, 1))
    assert total(old) == Component("all", 8_000_000, 0, 24e6, 4e6)
    lines = comparison(old, new).splitlines()
    assert (
        lines[2]
        == "| a | 4.0 → 1.0 (4.0x smaller) | 0.0 → 0.0 | 12.0 → 3.0 (4.0x smaller) | 2.0 → 2.0 (1.0x smaller) |"
    )
    assert lines[4].startswith("| all | 8.0 → 2.0 (4.0x smaller) |")


@pytest.mark.parametrize("name", ["tinyttm_89m", "tinyttm_ssm_89m"])
def test_presets_are_within_parameter_budget_of_the_paper(name):
    """Text encoder, language model and decoder, counted as in the paper; each system generates audio."""
    pipe = random_system(name)
    parts = components(pipe)
    assert 0.95 * BUDGET < total(parts).parameters <= BUDGET
    assert [part.name for part in parts] == ["text encoder", "language model", "codec decoder"]
    audio = pipe("a march", duration=0.1).audios
    assert audio.shape == (1, 1, 3200) and bool(audio.isfinite().all())


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "changes nothing"),
        ({"teacher": "null"}, "teacher is not set"),
        ({"store": "null"}, "store is not set"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"recipe": "null"}, "recipe is not set"),
    ],
)
def test_invalid_settings_are_rejected(arguments, change, message):
    command = arguments(int8="true" if "teacher" in change else "false") + [
        f"{key}={value}" for key, value in change.items()
    ]
    if "recipe" in change:
        command = command[1:4]
    with pytest.raises(UserError, match=message):
        main(["compress", *command])


def test_decoder_of_another_codec_is_rejected(arguments, teacher, store, tmp_path):
    other = tmp_path / "other"
    torch.manual_seed(9)
    codec = StudentCodec.from_teacher(
        type(small_codec(other))(small_codec(other).config), {"kind": "spectral", "width": 8}
    )
    codec.save(tmp_path / "student")
    with pytest.raises(UserError, match="decodes the codes of codec"):
        assemble(teacher, tmp_path / "student", tmp_path / "out")
    assert not (tmp_path / "out").exists()
