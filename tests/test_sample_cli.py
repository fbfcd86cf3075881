"""sample.py and MusicPipeline: output files, sidecars, formats, and errors of one line."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from small_cli import assert_user_error, run_captured
from small_word_encoder import WordEncoder

import sample
from ssmttm import MusicPipeline, audio
from ssmttm.checkpoint import save_checkpoint
from ssmttm.codecs import TinyCodec, TinyCodecConfig
from ssmttm.errors import UserError
from ssmttm.generation import loading, pretrained
from ssmttm.generation.output import read_sidecar, slug
from ssmttm.generation.progress import Progress
from ssmttm.generation.request import MAX_SEED, read_prompts
from ssmttm.model_folder import RENAMED_CARD_KEYS, check_layout, check_tensor_names, read_card
from ssmttm.models import build_model

MODEL = dict(
    kind="token_lm", n_codebooks=4, codebook_size=32, d_model=32, n_layers=2, d_state=8, headdim=16, text_dim=12,
)  # fmt: skip
SIZES = dict(n_codebooks=4, codebook_size=32, codebook_dim=4, encoder_width=16, decoder_width=16)
ENCODER = {"name": "words", "fingerprint": "0123456789abcdef"}


def write_model(folder: Path, codec: dict, seed: int = 0, **card) -> Path:
    """An exported model with random weights."""
    torch.manual_seed(seed)
    model = build_model(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    folder.mkdir(parents=True)
    OmegaConf.save({"task": "lm", "pattern": "delay", "model": MODEL}, folder / "config.yaml")
    save_file(model.state_dict(), folder / "model.safetensors")
    data = {"licences": {"CC0-1.0": 40}, "codec": codec, "text": ENCODER}
    (folder / "card.json").write_text(json.dumps({"name": "random", "data": data} | card))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    codec = TinyCodec(TinyCodecConfig(**SIZES)).eval()
    codec.save(root / "codec")
    codec = TinyCodec.load(root / "codec")
    return write_model(root / "lm", {"name": str(root / "codec"), "fingerprint": codec.fingerprint})


@pytest.fixture(autouse=True)
def use_word_encoder(monkeypatch):
    monkeypatch.setattr(pretrained, "load_text_encoder", lambda name: WordEncoder(**ENCODER, dim=MODEL["text_dim"]))


@pytest.fixture
def command(model_folder, tmp_path, monkeypatch, capsys):
    """Run sample.py on the random model in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        defaults = [] if "--checkpoint" in arguments else ["--checkpoint", model_folder]
        defaults += [] if "--duration" in arguments else ["--duration", 0.4]
        return run_captured(sample.main, [*arguments, *defaults], capsys)

    return run


@pytest.fixture(scope="module")
def pipe(model_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load_text_encoder", lambda name: WordEncoder(**ENCODER, dim=MODEL["text_dim"]))
        return MusicPipeline.from_pretrained(model_folder)


def save_run(model_folder, run_dir) -> Path:
    """A run folder with the checkpoint of the random model; its averaged weights are different ones."""
    weights = load_file(model_folder / "model.safetensors")
    data = json.loads((model_folder / "card.json").read_text())["data"]
    return save_checkpoint(
        run_dir / "checkpoints" / "step-00000007",
        config=OmegaConf.load(model_folder / "config.yaml"),
        tensors={"model": weights, "ema": {name: value.flip(0) for name, value in weights.items()}},
        documents={"state": {"step": 7, "data": data}},
    )


# --- the pipeline


def test_pipeline_output_shape_and_determinism(pipe):
    out = pipe(["a slow waltz", "drums"], duration=0.5, seeds=[4, 9])
    assert out.audios.shape == (2, 1, 12_000) and out.audios.dtype == torch.float32
    assert out.sample_rate == pipe.sample_rate == 24_000
    assert out.codes.shape == (2, 4, 13)
    alone = pipe("drums", duration=0.5, seeds=[9])
    assert torch.equal(alone.codes[0], out.codes[1]) and torch.equal(alone.audios[0], out.audios[1])
    assert not torch.equal(out.codes[0], out.codes[1])


@pytest.mark.parametrize("seeds", [5, np.int64(5), np.array([5, 6])])
def test_single_seed_expands_to_consecutive_seeds(pipe, seeds):
    assert torch.equal(pipe(["a", "b"], 0.2, seeds=seeds).codes, pipe(["a", "b"], 0.2, seeds=[5, 6]).codes)


@pytest.mark.parametrize("chunk_seconds", [0.04, 0.3, 60.0])
def test_stream_equals_the_whole_clip(pipe, chunk_seconds):
    whole = pipe("strings", duration=1.27, seeds=3).audios[0]
    parts = list(pipe.stream("strings", duration=1.27, seed=3, chunk_seconds=chunk_seconds))
    assert torch.cat(parts, -1).shape == whole.shape
    assert torch.allclose(torch.cat(parts, -1), whole, atol=1e-5)
    assert len(parts) > 1 or chunk_seconds > 1


def test_stream_starts_before_the_clip_is_complete(pipe, monkeypatch):
    steps = []
    step = pipe.model.step
    monkeypatch.setattr(pipe.model, "step", lambda *inputs: steps.append(0) or step(*inputs))
    next(pipe.stream("strings", duration=20.0, chunk_seconds=0.2, engine="torch"))
    assert 0 < len(steps) < 80  # of 500


def test_stream_checks_its_arguments_at_once(pipe):
    with pytest.raises(UserError, match="duration"):
        pipe.stream("strings", duration=-1)


def test_progress_sums_to_the_duration(pipe):
    seconds = []
    pipe(["a", "b"], duration=1.2, progress=seconds.append)
    assert len(seconds) > 1 and sum(seconds) == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("wrong", "messages"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["x", " \n"]}, "prompt 2 is empty"),
        ({"duration": float("nan")}, "duration"),
        ({"seeds": [1, 2]}, "got 2 seeds for 1 prompts"),
        ({"seeds": -1}, "seed must be in .* got -1"),
        ({"seeds": MAX_SEED + 1}, "seed"),
    ],
)
def test_pipeline_argument_errors(pipe, wrong, messages):
    with pytest.raises(UserError, match=messages):
        pipe(**({"prompts": "x", "duration": 0.1} | wrong))


def test_maximum_duration_is_configurable(pipe, monkeypatch):
    with pytest.raises(UserError, match=r"at most 600 s.*max_duration"):
        pipe("x", duration=601)
    monkeypatch.setattr(pipe, "max_duration", 0.1)
    with pytest.raises(UserError, match=r"at most 0\.1 s"):
        pipe("x", duration=0.2)


# --- output of the command


def test_command_writes_audio_and_sidecar(command, model_folder):
    code, out, err = command("a slow waltz", "--seed", 5, "--guidance", 2, "--top-k", 10, "--top-p", 0.9,
                             "--temperature", 0.8, "--out", "new/waltz.wav")  # fmt: skip
    assert code == 0, err
    assert "new/waltz.wav" in out and "0.40 s" in out and "x real time" in out
    wav, rate = audio.read("new/waltz.wav")
    assert wav.shape == (1, 9600) and rate == 24_000 and wav.abs().max() > 0
    sidecar = json.loads(Path("new/waltz.json").read_text())
    expected = {
        "prompt": "a slow waltz", "seed": 5, "duration": 0.4, "guidance_scale": 2.0, "top_k": 10, "top_p": 0.9,
        "temperature": 0.8, "sample_rate": 24_000, "text_encoder": ENCODER, "training_data_licences": {"CC0-1.0": 40},
        "file": "waltz.wav",
    }  # fmt: skip
    assert expected.items() <= sidecar.items()
    assert sidecar["model"]["name"] == "random" and len(sidecar["model"]["weights_sha256"]) == 64
    assert sidecar["codec"]["fingerprint"] and sidecar["software"].startswith("ssmttm ")
    assert sidecar["digitalSourceType"] == "trainedAlgorithmicMedia"
    assert sorted(path.name for path in Path("new").iterdir()) == ["waltz.json", "waltz.wav"]


def test_sidecar_reproduces_the_clip(command, pipe):
    command("a fugue", "an echo", "--seed", 8, "--out", "clips")
    sidecar = json.loads(Path("clips/an-echo.json").read_text())
    again = pipe(sidecar["prompt"], seeds=sidecar["seed"], **{
        key: sidecar[key] for key in ("duration", "guidance_scale", "temperature", "top_k", "top_p")
    })  # fmt: skip
    audio.write("again.wav", again.audios[0], again.sample_rate)
    assert Path("again.wav").read_bytes() == Path("clips/an-echo.wav").read_bytes()


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_audio_format_follows_the_extension(command, suffix):
    assert command("organ", "--out", f"x.{suffix}")[0] == 0
    wav, rate = audio.read(f"x.{suffix}")
    assert rate == 24_000 and abs(wav.shape[1] - 9600) < 2400


def test_folder_output_names_files_by_prompt_without_overwriting(command):
    first = command("A waltz!", "a waltz", "🎵🎶", "שיר ערש", "--batch-size", 3, "--out", "clips")
    assert first[0] == 0, first[2]
    names = {"a-waltz.wav", "a-waltz-2.wav", "music.wav", "שיר-ערש.wav"}
    assert {path.name for path in Path("clips").glob("*.wav")} == names
    before = {path: path.read_bytes() for path in Path("clips").iterdir()}
    assert command("a waltz", "--out", "clips", "--format", "flac")[0] == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Path("clips/a-waltz-3.flac").exists() and Path("clips/a-waltz-3.json").exists()


def test_clips_have_own_seeds_and_do_not_depend_on_the_batch_size(command):
    command("same words", "same words", "other words", "--seed", 3, "--out", "together", "--batch-size", 3)
    command("same words", "same words", "other words", "--seed", 3, "--out", "apart", "--batch-size", 1)
    together = {path.name: path.read_bytes() for path in Path("together").glob("*.wav")}
    assert together == {path.name: path.read_bytes() for path in Path("apart").glob("*.wav")}
    assert together["same-words.wav"] != together["same-words-2.wav"]
    assert json.loads(Path("together/same-words-2.json").read_text())["seed"] == 4


def test_named_output_file_is_overwritten(command):
    command("a", "--out", "x.wav", "--seed", 1)
    before = Path("x.wav").read_bytes()
    assert command("a", "--out", "x.wav", "--seed", 2)[0] == 0
    assert Path("x.wav").read_bytes() != before
    assert json.loads(Path("x.json").read_text())["seed"] == 2


def test_audio_files_of_one_stem_have_own_sidecars(command):
    prompts = {"take.wav": "a waltz", "take.mp3": "a march", "take.flac": "a jig"}
    for _ in range(2):  # written again, each keeps its own
        for name, prompt in prompts.items():
            assert command(prompt, "--out", name)[0] == 0
        for name, prompt in prompts.items():
            found = read_sidecar(Path(name))
            assert (found["file"], found["prompt"]) == (name, prompt)
    assert {path.name for path in Path().glob("*.json")} == {"take.json", "take.mp3.json", "take.flac.json"}


def test_sidecar_of_renamed_or_converted_audio(command):
    assert command("a waltz", "--out", "take.wav")[0] == 0
    Path("take.mp3").write_bytes(b"of another program")
    assert read_sidecar(Path("take.mp3")) == {}
    Path("take.wav").rename("best.wav")
    Path("take.json").rename("best.json")
    assert read_sidecar(Path("best.wav"))["prompt"] == "a waltz"
    Path("best.wav").rename("best.flac")  # converted, without the original
    assert read_sidecar(Path("best.flac"))["prompt"] == "a waltz"


def test_prompts_file(command):
    Path("p.txt").write_bytes("\ufeff# mine\r\n\r\n  a jig \r\ncalm 钢琴\n#x\n".encode())
    assert read_prompts(Path("p.txt")) == ["a jig", "calm 钢琴"]
    code, out, _ = command("one more", "--prompts-file", "p.txt", "--out", "all")
    assert code == 0 and len(out.splitlines()) == 3
    assert {path.stem for path in Path("all").glob("*.wav")} == {"one-more", "a-jig", "calm-钢琴"}


def test_interrupt_keeps_complete_files(command, monkeypatch):
    written = audio.write

    def interrupted(path, wav, sample_rate):
        if Path(path).stem == "second":
            raise KeyboardInterrupt
        return written(path, wav, sample_rate)

    monkeypatch.setattr(audio, "write", interrupted)
    code, out, err = command("first", "second", "third", "--batch-size", 1, "--out", "clips")
    assert code == 130 and "Traceback" not in err
    assert sorted(path.name for path in Path("clips").iterdir()) == ["first.json", "first.wav"]
    assert "first.wav" in out


def test_very_long_prompt_is_truncated_in_file_names(command):
    code, _, err = command(" ".join(f"word{i}" for i in range(10_000)), "--out", "clips")
    assert code == 0, err
    assert all(len(path.name.encode()) < 200 for path in Path("clips").iterdir())


def test_warnings_are_printed_above_the_progress_bar(capsys):
    with Progress(10.0) as progress:
        logging.getLogger("ssmttm.text.encoders").warning("the caption %r is cut", "x")
        progress.advance(9.9)
        progress.advance(0.2)
        assert progress.throughput() > 0
    out, err = capsys.readouterr()
    assert "warning: the caption 'x' is cut" in err and "10.0/10.0 s of audio" in err and out == ""


def test_slug_of_prompts():
    assert slug("A slow WALTZ, in D-minor!") == "a-slow-waltz-in-d-minor"
    assert (
        slug("../../etc/passwd") == "etc-passwd" and slug("🎵\ufe0f ") == "music" and slug("हिन्दी राग") == "हिन्दी-राग"
    )
    assert len(slug("字" * 500).encode()) < 200


# --- errors of the command


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["no prompt"]),
        ([""], ["prompt 1 is empty"]),
        (["ok", "   "], ["prompt 2 is empty"]),
        (["a\udcff"], ["prompt 1", "UTF-8"]),
        (["x", "--duration", "0"], ["duration must be above 0", "got 0"]),
        (["x", "--duration", "-3"], ["duration must be above 0", "got -3"]),
        (["x", "--duration", "nan"], ["duration must be above 0", "got nan"]),
        (["x", "--duration", "1e9"], ["at most 600 s", "--max-duration"]),
        (["x", "--max-duration", "nan"], ["at most nan s"]),
        (["x", "--guidance", "-1"], ["guidance must be at least 0", "got -1"]),
        (["x", "--guidance", "nan"], ["guidance must be at least 0", "got nan"]),
        (["x", "--temperature", "0"], ["temperature must be above 0", "got 0"]),
        (["x", "--top-k", "-1"], ["top_k must be at least 0", "got -1"]),
        (["x", "--top-p", "0"], ["top_p must be in (0, 1]", "got 0"]),
        (["x", "--top-p", "1.5"], ["top_p must be in (0, 1]", "got 1.5"]),
        (["x", "--seed", "-1"], ["seed must be in", "got -1"]),
        (["x", "--seed", str(MAX_SEED + 1)], ["seed"]),
        (["x", "--batch-size", "0"], ["--batch-size must be at least 1, got 0"]),
        (["x", "--out", "x.aiff"], [".aiff", ".flac"]),
        (["x", "--format", "wma"], [".wma", ".flac"]),
        (["x", "y", "--out", "x.wav"], ["x.wav", "2 prompts", "folder"]),
        (["x", "--out", "/proc/nowhere/x.wav"], ["/proc/nowhere", "--out"]),
        (["x", "--prompts-file", "absent.txt"], ["absent.txt"]),
        (["x", "--prompts-file", "."], ["."]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_argument_errors_are_one_line_before_a_model_is_loaded(command, monkeypatch, arguments, messages):
    monkeypatch.setattr(MusicPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert_user_error(command(*arguments), *messages)


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (b"", "has no prompt"),
        (b"# only\n\n", "has no prompt"),
        (b"ok\n\xff\xfe\n", "line 2"),
        (b"a\n\nRIFF\0", "line 3"),
    ],
)
def test_bad_prompts_file_error_names_the_line(command, content, messages):
    Path("p.txt").write_bytes(content)
    assert_user_error(command("--prompts-file", "p.txt"), "p.txt", messages)


def test_file_in_place_of_the_output_folder_is_an_error(command):
    Path("taken").write_text("mine")
    assert_user_error(command("x", "--out", "taken/x.wav"), "taken")
    assert_user_error(command("x", "y", "--out", "taken"), "taken")
    assert Path("taken").read_text() == "mine"


def test_foreign_json_is_not_overwritten(command):
    Path("package.json").write_text('{"name": "mine"}')
    assert_user_error(command("x", "--out", "package.wav"), "package.json")
    assert json.loads(Path("package.json").read_text()) == {"name": "mine"}


@pytest.fixture
def copy(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def test_run_and_checkpoint_load_the_averaged_weights(model_folder, pipe, tmp_path):
    folder = save_run(model_folder, tmp_path / "my_run")
    from_run, from_folder = (MusicPipeline.from_pretrained(path) for path in (tmp_path / "my_run", folder))
    assert from_run.metadata == from_folder.metadata
    assert from_run.metadata["model"]["name"] == "my_run/step-00000007"
    assert from_run.metadata["model"]["weights_sha256"] != pipe.metadata["model"]["weights_sha256"]
    codes = [each("a march", duration=0.4).codes for each in (from_run, from_folder, pipe)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert torch.equal(from_run.model.embedding.weight, pipe.model.embedding.weight.flip(0))


def test_damaged_checkpoint_is_an_error(command, model_folder):
    folder = save_run(model_folder, Path("run"))
    os.truncate(folder / "ema.safetensors", 1000)
    assert_user_error(command("x", "--checkpoint", folder), "ema.safetensors")
    (folder / "COMPLETE").unlink()
    assert_user_error(command("x", "--checkpoint", folder), "COMPLETE")


def test_missing_model_is_an_error(command):
    assert_user_error(command("x", "--checkpoint", "./nowhere"), "nowhere")
    Path("empty").mkdir()
    assert_user_error(command("x", "--checkpoint", "empty"), "empty", "model.safetensors")


def test_unreachable_hub_is_an_error(command, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert_user_error(command("x", "--checkpoint", "someone/model"), "someone/model", "no route to the hub")
    assert_user_error(command("x", "--checkpoint", "not a/hub id"), "not a/hub id")


def test_truncated_weights_are_an_error(command, copy):
    os.truncate(copy / "model.safetensors", 1000)
    assert_user_error(command("x", "--checkpoint", copy), "model.safetensors")


def test_weights_of_another_model_are_an_error(command, copy):
    save_file({"something.weight": torch.zeros(3)}, copy / "model.safetensors")
    assert_user_error(command("x", "--checkpoint", copy), "model.safetensors", "config.yaml")
    (copy / "model.safetensors").write_text("<html>not found</html>")
    assert_user_error(command("x", "--checkpoint", copy), "model.safetensors")


def test_codec_in_place_of_a_language_model_is_an_error(command, copy):
    OmegaConf.save({"task": "codec"}, copy / "config.yaml")
    assert_user_error(command("x", "--checkpoint", copy), "codec")


@pytest.mark.parametrize("kind", ["codec", "text"])
def test_other_codec_or_text_encoder_than_at_training_is_an_error(command, copy, kind):
    card = json.loads((copy / "card.json").read_text())
    card["data"][kind]["fingerprint"] = "f" * 16
    (copy / "card.json").write_text(json.dumps(card))
    assert_user_error(command("x", "--checkpoint", copy), kind, "f" * 16)
    del card["data"][kind]
    (copy / "card.json").write_text(json.dumps(card))
    assert_user_error(command("x", "--checkpoint", copy), kind)


@pytest.mark.parametrize("content", ["", "[]", '{"name": "x"}'])
def test_damaged_card_is_an_error(command, copy, content):
    (copy / "card.json").write_text(content)
    assert_user_error(command("x", "--checkpoint", copy), "card")


def test_process_exit_code_and_error_line(model_folder, tmp_path):
    """Exit code and the single line, with no Python warning before it."""
    done = subprocess.run(
        [sys.executable, Path(sample.__file__), "x", "--duration", "0"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["error: duration must be above 0 seconds, got 0.0"]


# --- folders of older versions


@pytest.fixture
def two_stage_copy(tmp_path):
    return Path(shutil.copytree(loading.ASSETS / "tiny_lm", tmp_path / "old"))


def test_old_second_stage_subfolder_names_the_new_one(command, two_stage_copy):
    (two_stage_copy / "second_stage").rename(two_stage_copy / "painter")
    assert_user_error(command("x", "--checkpoint", two_stage_copy), "old subfolder painter: rename it to second_stage")


def test_old_config_key_names_the_new_one(command, two_stage_copy):
    config = two_stage_copy / "second_stage" / "config.yaml"
    config.write_text(config.read_text().replace("n_coarse_codebooks", "sketch_codebooks"))
    assert_user_error(command("x", "--checkpoint", two_stage_copy), "sketch_codebooks", "model.n_coarse_codebooks")


@pytest.mark.parametrize(("old", "new"), RENAMED_CARD_KEYS.items())
def test_old_card_key_names_the_new_one(command, copy, old, new):
    card = json.loads((copy / "card.json").read_text())
    card["data"]["text"] = card["data"]["text"] | {old: "plain"}
    (copy / "card.json").write_text(json.dumps(card))
    assert_user_error(command("x", "--checkpoint", copy), f"old key data.text.{old}: rename {old} to {new}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("blocks.0.branches.0.norm.weight", "blocks.0.sublayers.0.norm.weight"),
        ("blocks.0.branches.0.modulation.weight", "blocks.0.sublayers.0.adaln.weight"),
        ("blocks.0.branches.0.inner.ahead.D", "blocks.0.sublayers.0.inner.forward_mixer.D"),
        ("blocks.0.branches.0.inner.back.D", "blocks.0.sublayers.0.inner.backward_mixer.D"),
        ("blocks.0.branches.1.inner.0.weight", "blocks.0.sublayers.1.inner.fc1.weight"),
        ("blocks.0.branches.1.inner.3.weight", "blocks.0.sublayers.1.inner.fc2.weight"),
        ("null_sketch", "null_coarse"),
        ("sketch_noise.linear.weight", "coarse_noise_aug.linear.weight"),
    ],
)
def test_old_tensor_name_names_the_new_one(command, copy, old, new):
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {old: torch.zeros(1)}, copy / "model.safetensors")
    assert_user_error(command("x", "--checkpoint", copy), "old names", f"{old} is now {new}")


@pytest.mark.parametrize("folder", ["tiny_lm", "tiny_lm/second_stage", "tinyttm_tiny", "tinyttm_tiny/second_stage"])
def test_embedded_models_have_no_old_names(folder):
    path = loading.ASSETS / folder
    check_layout(path)
    read_card(path)
    check_tensor_names(load_file(path / "model.safetensors"), path)
