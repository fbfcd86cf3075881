"""sample.py and the pipeline under it: files, records, formats, and every mistake as one clear line."""

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

import sample
from ssmttm import MusicPipeline, audio
from ssmttm.checkpoint import save_checkpoint
from ssmttm.codecs import TinyCodec, TinyCodecConfig
from ssmttm.errors import UserError, run_cli
from ssmttm.generation import loading, pipeline
from ssmttm.generation.output import slug
from ssmttm.generation.progress import Progress
from ssmttm.generation.request import MAX_SEED, read_prompts
from ssmttm.models import build_model
from ssmttm.text.condition import TextCondition

MODEL = dict(
    kind="token_lm", n_codebooks=4, codebook_size=32, d_model=32, n_layers=2, d_state=8, headdim=16, text_dim=12,
)  # fmt: skip
SIZES = dict(n_codebooks=4, codebook_size=32, codebook_dim=4, encoder_width=16, decoder_width=16)
ENCODER = {"name": "words", "fingerprint": "0123456789abcdef"}


class WordEncoder:
    """Every word is a vector drawn from its own letters; the empty caption is one marker."""

    name, fingerprint, dim, max_tokens = ENCODER["name"], ENCODER["fingerprint"], 12, 64

    def encode(self, captions):
        rows = []
        for caption in captions:
            words = ["<s>", *caption.split()][: self.max_tokens]
            seeds = [int.from_bytes(word.encode()[-6:], "big") for word in words]
            rows.append(torch.stack([torch.randn(12, generator=torch.Generator().manual_seed(s)) for s in seeds]))
        return TextCondition.stack(rows)


def write_model(folder: Path, codec: dict, seed: int = 0, **card) -> Path:
    """An exported model of random weights."""
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
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    codec = TinyCodec(TinyCodecConfig(**SIZES)).eval()
    codec.save(root / "codec")
    codec = TinyCodec.load(root / "codec")
    return write_model(root / "lm", {"name": str(root / "codec"), "fingerprint": codec.fingerprint})


@pytest.fixture(autouse=True)
def words_for_text(monkeypatch):
    monkeypatch.setattr(pipeline, "load_text_encoder", lambda name: WordEncoder())


@pytest.fixture
def command(made, tmp_path, monkeypatch, capsys):
    """Run sample.py on the random model in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        given = [str(argument) for argument in arguments]
        more = [] if "--checkpoint" in given else ["--checkpoint", str(made)]
        more += [] if "--duration" in given else ["--duration", "0.4"]
        code = run_cli(lambda: sample.main([*given, *more]))
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def pipe(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_text_encoder", lambda name: WordEncoder())
        return MusicPipeline.from_pretrained(made)


def saved_run(made, run_dir) -> Path:
    """A run folder with the checkpoint of the random model; the averaged weights are those of another one."""
    weights = load_file(made / "model.safetensors")
    data = json.loads((made / "card.json").read_text())["data"]
    return save_checkpoint(
        run_dir / "checkpoints" / "step-00000007",
        config=OmegaConf.load(made / "config.yaml"),
        tensors={"model": weights, "ema": {name: value.flip(0) for name, value in weights.items()}},
        documents={"state": {"step": 7, "data": data}},
    )


def refused(result, *says):
    """The run ended with one line that says this, and wrote nothing."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip() and not line.lstrip("\r").startswith("sampling:")]
    assert code == 2 and out == "", err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in says:
        assert part in lines[0], lines[0]
    assert not [path for path in Path().rglob("*") if path.suffix in audio.WRITERS]


# --- the pipeline


def test_output_shape_and_determinism(pipe):
    out = pipe(["a slow waltz", "drums"], duration=0.5, seeds=[4, 9])
    assert out.audios.shape == (2, 1, 12_000) and out.audios.dtype == torch.float32
    assert out.sample_rate == pipe.sample_rate == 24_000
    assert out.codes.shape == (2, 4, 13)
    alone = pipe("drums", duration=0.5, seeds=[9])
    assert torch.equal(alone.codes[0], out.codes[1]) and torch.equal(alone.audios[0], out.audios[1])
    assert not torch.equal(out.codes[0], out.codes[1])


@pytest.mark.parametrize("seeds", [5, np.int64(5), np.array([5, 6])])
def test_one_number_seeds_them_all_in_turn(pipe, seeds):
    assert torch.equal(pipe(["a", "b"], 0.2, seeds=seeds).codes, pipe(["a", "b"], 0.2, seeds=[5, 6]).codes)


@pytest.mark.parametrize("chunk_seconds", [0.04, 0.3, 60.0])
def test_a_stream_is_the_whole_piece_in_parts(pipe, chunk_seconds):
    whole = pipe("strings", duration=1.27, seeds=3).audios[0]
    parts = list(pipe.stream("strings", duration=1.27, seed=3, chunk_seconds=chunk_seconds))
    assert torch.cat(parts, -1).shape == whole.shape
    assert torch.allclose(torch.cat(parts, -1), whole, atol=1e-5)
    assert len(parts) > 1 or chunk_seconds > 1


def test_a_stream_starts_before_the_piece_is_done(pipe, monkeypatch):
    steps = []
    step = pipe.model.step
    monkeypatch.setattr(pipe.model, "step", lambda *inputs: steps.append(0) or step(*inputs))
    next(pipe.stream("strings", duration=20.0, chunk_seconds=0.2))
    assert len(steps) < 80  # of 500


def test_a_stream_refuses_at_once(pipe):
    with pytest.raises(UserError, match="duration"):
        pipe.stream("strings", duration=-1)


def test_progress_adds_up(pipe):
    embeddings = []
    pipe(["a", "b"], duration=1.2, progress=embeddings.append)
    assert len(embeddings) > 1 and sum(embeddings) == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["x", " \n"]}, "prompt 2 is empty"),
        ({"duration": float("nan")}, "duration"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seeds": -1}, "seed -1"),
        ({"seeds": MAX_SEED + 1}, "seed"),
    ],
)
def test_the_pipeline_refuses(pipe, wrong, says):
    with pytest.raises(UserError, match=says):
        pipe(**({"prompts": "x", "duration": 0.1} | wrong))


def test_the_maximum_duration_can_be_raised(pipe, monkeypatch):
    with pytest.raises(UserError, match=r"maximum is 600 s.*max_duration"):
        pipe("x", duration=601)
    monkeypatch.setattr(pipe, "max_duration", 0.1)
    with pytest.raises(UserError, match=r"0\.1 s"):
        pipe("x", duration=0.2)


# --- what the command writes


def test_one_prompt_one_file_and_its_record(command, made):
    code, out, err = command("a slow waltz", "--seed", 5, "--guidance", 2, "--top-k", 10, "--top-p", 0.9,
                             "--temperature", 0.8, "--out", "new/waltz.wav")  # fmt: skip
    assert code == 0, err
    assert "new/waltz.wav" in out and "0.40 s" in out and "x real time" in out
    wav, rate = audio.read("new/waltz.wav")
    assert wav.shape == (1, 9600) and rate == 24_000 and wav.abs().max() > 0
    record = json.loads(Path("new/waltz.json").read_text())
    expected = {
        "prompt": "a slow waltz", "seed": 5, "duration": 0.4, "guidance_scale": 2.0, "top_k": 10, "top_p": 0.9,
        "temperature": 0.8, "sample_rate": 24_000, "text_encoder": ENCODER, "training_data_licences": {"CC0-1.0": 40},
        "file": "waltz.wav",
    }  # fmt: skip
    assert expected.items() <= record.items()
    assert record["model"]["name"] == "random" and len(record["model"]["weights_sha256"]) == 64
    assert record["codec"]["fingerprint"] and record["software"].startswith("ssmttm ")
    assert record["digitalSourceType"] == "trainedAlgorithmicMedia"
    assert sorted(path.name for path in Path("new").iterdir()) == ["waltz.json", "waltz.wav"]


def test_the_record_is_enough_to_make_the_piece_again(command, pipe):
    command("a fugue", "an echo", "--seed", 8, "--out", "pieces")
    record = json.loads(Path("pieces/an-echo.json").read_text())
    again = pipe(record["prompt"], seeds=record["seed"], **{
        key: record[key] for key in ("duration", "guidance_scale", "temperature", "top_k", "top_p")
    })  # fmt: skip
    audio.write("again.wav", again.audios[0], again.sample_rate)
    assert Path("again.wav").read_bytes() == Path("pieces/an-echo.wav").read_bytes()


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_formats_by_extension(command, suffix):
    assert command("organ", "--out", f"x.{suffix}")[0] == 0
    wav, rate = audio.read(f"x.{suffix}")
    assert rate == 24_000 and abs(wav.shape[1] - 9600) < 2400


def test_several_prompts_go_into_a_folder_by_name_and_never_over_one_another(command):
    first = command("A waltz!", "a waltz", "🎵🎶", "שיר ערש", "--batch-size", 3, "--out", "pieces")
    assert first[0] == 0, first[2]
    names = {"a-waltz.wav", "a-waltz-2.wav", "music.wav", "שיר-ערש.wav"}
    assert {path.name for path in Path("pieces").glob("*.wav")} == names
    before = {path: path.read_bytes() for path in Path("pieces").iterdir()}
    assert command("a waltz", "--out", "pieces", "--format", "flac")[0] == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Path("pieces/a-waltz-3.flac").exists() and Path("pieces/a-waltz-3.json").exists()


def test_each_piece_has_its_own_seed_and_is_the_same_in_any_batch(command):
    command("same words", "same words", "other words", "--seed", 3, "--out", "together", "--batch-size", 3)
    command("same words", "same words", "other words", "--seed", 3, "--out", "apart", "--batch-size", 1)
    together = {path.name: path.read_bytes() for path in Path("together").glob("*.wav")}
    assert together == {path.name: path.read_bytes() for path in Path("apart").glob("*.wav")}
    assert together["same-words.wav"] != together["same-words-2.wav"]
    assert json.loads(Path("together/same-words-2.json").read_text())["seed"] == 4


def test_a_named_file_is_overwritten(command):
    command("a", "--out", "x.wav", "--seed", 1)
    before = Path("x.wav").read_bytes()
    assert command("a", "--out", "x.wav", "--seed", 2)[0] == 0
    assert Path("x.wav").read_bytes() != before
    assert json.loads(Path("x.json").read_text())["seed"] == 2


def test_a_prompts_file(command):
    Path("p.txt").write_bytes("\ufeff# mine\r\n\r\n  a jig \r\ncalm 钢琴\n#x\n".encode())
    assert read_prompts(Path("p.txt")) == ["a jig", "calm 钢琴"]
    code, out, _ = command("one more", "--prompts-file", "p.txt", "--out", "all")
    assert code == 0 and len(out.splitlines()) == 3
    assert {path.stem for path in Path("all").glob("*.wav")} == {"one-more", "a-jig", "calm-钢琴"}


def test_an_interrupt_keeps_what_is_written_whole(command, monkeypatch):
    written = audio.write

    def interrupted(path, wav, sample_rate):
        if Path(path).stem == "second":
            raise KeyboardInterrupt
        return written(path, wav, sample_rate)

    monkeypatch.setattr(audio, "write", interrupted)
    code, out, err = command("first", "second", "third", "--batch-size", 1, "--out", "pieces")
    assert code == 130 and "Traceback" not in err
    assert sorted(path.name for path in Path("pieces").iterdir()) == ["first.json", "first.wav"]
    assert "first.wav" in out


def test_a_very_long_prompt_is_cut(command):
    code, _, err = command(" ".join(f"word{i}" for i in range(10_000)), "--out", "pieces")
    assert code == 0, err
    assert all(len(path.name.encode()) < 200 for path in Path("pieces").iterdir())


def test_warnings_stand_above_the_bar(capsys):
    with Progress(10.0) as progress:
        logging.getLogger("ssmttm.text.encoders").warning("the caption %r is cut", "x")
        progress.advance(9.9)
        progress.advance(0.2)
        assert progress.lap() > 0
    out, err = capsys.readouterr()
    assert "warning: the caption 'x' is cut" in err and "10.0/10.0 s of audio" in err and out == ""


def test_file_names_out_of_prompts():
    assert slug("A slow WALTZ, in D-minor!") == "a-slow-waltz-in-d-minor"
    assert (
        slug("../../etc/passwd") == "etc-passwd" and slug("🎵\ufe0f ") == "music" and slug("हिन्दी राग") == "हिन्दी-राग"
    )
    assert len(slug("字" * 500).encode()) < 200


# --- what the command refuses


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["no prompt"]),
        ([""], ["prompt 1 is empty"]),
        (["ok", "   "], ["prompt 2 is empty"]),
        (["a\udcff"], ["prompt 1", "UTF-8"]),
        (["x", "--duration", "0"], ["duration is 0"]),
        (["x", "--duration", "-3"], ["duration is -3"]),
        (["x", "--duration", "nan"], ["duration is nan"]),
        (["x", "--duration", "1e9"], ["maximum is 600 s", "--max-duration"]),
        (["x", "--guidance", "-1"], ["guidance is -1"]),
        (["x", "--guidance", "nan"], ["guidance is nan"]),
        (["x", "--temperature", "0"], ["temperature is 0"]),
        (["x", "--top-k", "-1"], ["top_k is -1"]),
        (["x", "--top-p", "0"], ["top_p is 0"]),
        (["x", "--top-p", "1.5"], ["top_p is 1.5"]),
        (["x", "--seed", "-1"], ["seed -1"]),
        (["x", "--seed", str(MAX_SEED + 1)], ["seed"]),
        (["x", "--batch-size", "0"], ["--batch-size is 0"]),
        (["x", "--out", "x.aiff"], [".aiff", ".flac"]),
        (["x", "--format", "wma"], [".wma", ".flac"]),
        (["x", "y", "--out", "x.wav"], ["x.wav", "2 prompts", "folder"]),
        (["x", "--out", "/proc/nowhere/x.wav"], ["/proc/nowhere", "--out"]),
        (["x", "--prompts-file", "absent.txt"], ["absent.txt"]),
        (["x", "--prompts-file", "."], ["."]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_mistakes_are_one_line_before_any_model_is_loaded(command, monkeypatch, arguments, says):
    monkeypatch.setattr(MusicPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    refused(command(*arguments), *says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no prompt"),
        (b"# only\n\n", "holds no prompt"),
        (b"ok\n\xff\xfe\n", "line 2"),
        (b"a\n\nRIFF\0", "line 3"),
    ],
)
def test_bad_prompts_files_are_refused_by_line(command, content, says):
    Path("p.txt").write_bytes(content)
    refused(command("--prompts-file", "p.txt"), "p.txt", says)


def test_a_file_where_the_folder_should_be(command):
    Path("taken").write_text("mine")
    refused(command("x", "--out", "taken/x.wav"), "taken")
    refused(command("x", "y", "--out", "taken"), "taken")
    assert Path("taken").read_text() == "mine"


def test_another_programs_json_is_not_overwritten(command):
    Path("package.json").write_text('{"name": "mine"}')
    refused(command("x", "--out", "package.wav"), "package.json")
    assert json.loads(Path("package.json").read_text()) == {"name": "mine"}


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_a_run_a_checkpoint_and_an_export_with_averaged_weights(made, pipe, tmp_path):
    folder = saved_run(made, tmp_path / "my_run")
    from_run, from_folder = (MusicPipeline.from_pretrained(path) for path in (tmp_path / "my_run", folder))
    assert from_run.facts == from_folder.facts
    assert from_run.facts["model"]["name"] == "my_run/step-00000007"
    assert from_run.facts["model"]["weights_sha256"] != pipe.facts["model"]["weights_sha256"]
    codes = [each("a march", duration=0.4).codes for each in (from_run, from_folder, pipe)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert torch.equal(from_run.model.embedding.weight, pipe.model.embedding.weight.flip(0))


def test_a_damaged_checkpoint(command, made):
    folder = saved_run(made, Path("run"))
    os.truncate(folder / "ema.safetensors", 1000)
    refused(command("x", "--checkpoint", folder), "ema.safetensors")
    (folder / "COMPLETE").unlink()
    refused(command("x", "--checkpoint", folder), "COMPLETE")


def test_a_missing_model(command):
    refused(command("x", "--checkpoint", "./nowhere"), "nowhere")
    Path("empty").mkdir()
    refused(command("x", "--checkpoint", "empty"), "empty", "model.safetensors")


def test_an_unreachable_hub(command, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(loading, "snapshot_download", unreachable)
    refused(command("x", "--checkpoint", "someone/model"), "someone/model", "no route to the hub")
    refused(command("x", "--checkpoint", "not a/hub id"), "not a/hub id")


def test_a_truncated_model(command, copy):
    os.truncate(copy / "model.safetensors", 1000)
    refused(command("x", "--checkpoint", copy), "model.safetensors")


def test_a_foreign_model(command, copy):
    save_file({"something.weight": torch.zeros(3)}, copy / "model.safetensors")
    refused(command("x", "--checkpoint", copy), "model.safetensors", "config.yaml")
    (copy / "model.safetensors").write_text("<html>not found</html>")
    refused(command("x", "--checkpoint", copy), "model.safetensors")


def test_a_codecs_run_is_no_language_model(command, copy):
    OmegaConf.save({"task": "codec"}, copy / "config.yaml")
    refused(command("x", "--checkpoint", copy), "codec")


@pytest.mark.parametrize("kind", ["codec", "text"])
def test_a_codec_or_text_encoder_that_the_model_was_not_trained_with(command, copy, kind):
    card = json.loads((copy / "card.json").read_text())
    card["data"][kind]["fingerprint"] = "f" * 16
    (copy / "card.json").write_text(json.dumps(card))
    refused(command("x", "--checkpoint", copy), kind, "f" * 16)
    del card["data"][kind]
    (copy / "card.json").write_text(json.dumps(card))
    refused(command("x", "--checkpoint", copy), kind)


@pytest.mark.parametrize("content", ["", "[]", '{"name": "x"}'])
def test_a_broken_card(command, copy, content):
    (copy / "card.json").write_text(content)
    refused(command("x", "--checkpoint", copy), "card")


def test_the_real_process(made, tmp_path):
    """Exit code and the single line, with no Python warning before it."""
    done = subprocess.run(
        [sys.executable, Path(sample.__file__), "x", "--duration", "0"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["error: duration is 0.0 s: give a number of seconds above 0"]
