"""What musicians and programs do with a pipeline: streams to standard output, playing, saving, the hub, adapters."""

import io
import json
import struct
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from small_cli import assert_user_error, run_captured
from small_pipelines import small_pipeline

import sample
from ssmttm import MusicPipeline, audio
from ssmttm.adapters import write_adapter
from ssmttm.audio import live
from ssmttm.errors import UserError


@pytest.fixture(scope="module")
def embedded():
    return MusicPipeline.from_pretrained(device="cpu")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run sample.py on a small pipeline in an empty folder: (exit code, standard output, standard error)."""
    pipe = small_pipeline(tmp_path / "model")
    monkeypatch.setattr(MusicPipeline, "from_pretrained", lambda *names, **options: pipe)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return run_captured(sample.main, ["a harp", "--engine", "torch", *arguments], capsys)

    return run


class Standard(io.StringIO):
    """Standard output whose bytes are kept."""

    def __init__(self):
        super().__init__()
        self.buffer = io.BytesIO()


# --- streams to programs and devices


def test_stream_is_wav_or_pcm_and_equals_the_file(command, monkeypatch, tmp_path):
    assert command("--duration", 1.3, "--out", "clip.wav")[0] == 0
    expected, rate = audio.read("clip.wav")
    found = {}
    for name in ("wav", "pcm"):
        monkeypatch.setattr(sys, "stdout", out := Standard())
        arguments = ["a harp", "--engine", "torch", "--duration", "1.3", "--stream", "-", "--format", name]
        assert sample.main(arguments) == 0 and out.getvalue() == ""
        found[name] = out.buffer.getvalue()
    monkeypatch.undo()
    assert found["wav"][44:] == found["pcm"] and len(found["pcm"]) == 2 * expected.shape[-1]
    (tmp_path / "streamed.wav").write_bytes(found["wav"])
    streamed, streamed_rate = audio.read(tmp_path / "streamed.wav")
    assert streamed_rate == rate
    torch.testing.assert_close(streamed, expected, rtol=0, atol=2 / 32768)


def test_stream_header_and_samples_of_stereo():
    file = io.BytesIO()
    chunks = [torch.tensor([[0.0, 0.5], [1.0, -2.0]]), torch.tensor([[-1.0], [0.25]])]
    assert live.write_stream(file, chunks, 48_000, 2, "wav") == 3
    content = file.getvalue()
    assert struct.unpack("<HHIIHH", content[20:36]) == (1, 2, 48_000, 192_000, 4, 16)
    assert content[40:44] == b"\xff" * 4
    assert struct.unpack("<6h", content[44:]) == (0, 32767, 16384, -32767, -32767, 8192)


def test_chunks_are_written_when_they_are_made():
    written = []

    def chunks():
        for _ in range(3):
            written.append(len(file.getvalue()))
            yield torch.zeros(1, 100)

    file = io.BytesIO()
    live.write_stream(file, chunks(), 24_000, 1, "pcm")
    assert written == [0, 200, 400]


def test_reader_that_stops_ends_the_stream_quietly(command, monkeypatch):
    class Closed(Standard):
        def __init__(self):
            super().__init__()
            self.buffer = self

        def write(self, content):
            if not isinstance(content, str):
                raise BrokenPipeError
            return 0

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    from ssmttm.errors import run_cli

    assert run_cli(lambda: sample.main(["a harp", "--duration", "60", "--stream", "-"])) == 0


class Device:
    """A sound device that keeps what is played."""

    def __init__(self, samplerate, channels, dtype):
        self.settings, self.played = (samplerate, channels, dtype), []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def write(self, samples):
        self.played.append(torch.from_numpy(samples.copy()))


def test_play_writes_to_the_device(monkeypatch):
    devices = []
    module = types.ModuleType("sounddevice")
    module.OutputStream = lambda **options: devices.append(Device(**options)) or devices[-1]
    module.PortAudioError = RuntimeError
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert live.play([torch.zeros(2, 5), torch.ones(2, 3)], 24_000, 2) == 8
    assert devices[0].settings == (24_000, 2, "float32") and devices[0].closed
    assert torch.cat(devices[0].played).shape == (8, 2)

    def no_device(**options):
        raise RuntimeError("no default output device")

    module.OutputStream = no_device
    with pytest.raises(UserError, match="there is no sound device to play on"):
        live.play([], 24_000, 1)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UserError, match="needs sounddevice and PortAudio"):
        live.play([], 24_000, 1)


# --- sample.py


def test_command_continues_repaints_schedules_and_loops(command):
    assert command("--duration", 2, "--out", "clip.wav")[0] == 0
    assert command("--continue", "clip.wav", "--duration", 1, "--out", "longer.wav")[0] == 0
    assert audio.read("longer.wav")[0].shape[-1] == 3 * 2400
    assert json.loads(Path("longer.json").read_text())["continue_from"] == "clip.wav"
    assert command("--continue", "clip.wav", "--repaint", "0.5:1", "--out", "part.wav")[0] == 0
    clip, part = audio.read("clip.wav")[0], audio.read("part.wav")[0]
    assert torch.equal(part[:, :900], clip[:, :900]) and not torch.equal(part, clip)
    assert json.loads(Path("part.json").read_text())["repaint"]["region"] == [0.5, 1.0]
    assert command("--at", 1, "loud drums", "--at", 0.5, "a flute", "--duration", 2, "--out", "at.wav")[0] == 0
    times = [seconds for seconds, _ in json.loads(Path("at.json").read_text())["schedule"]]
    assert times == [0.5, 1.0] and Path("at.wav").read_bytes() != Path("clip.wav").read_bytes()
    assert command("--bars", 2, "--bpm", 120, "--loop", "--negative", "noise", "--out", "loop.wav")[0] == 0
    sidecar = json.loads(Path("loop.json").read_text())
    assert sidecar["loop"] and sidecar["bars"] == 2 and sidecar["negative_prompt"] == "noise"
    assert audio.read("loop.wav")[0].shape[-1] == 4 * 2400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--repaint", "1:2"), "name it with --continue FILE"),
        (("--repaint", "2:1", "--continue", "x.wav"), "a region is two times in seconds such as 5:8, got 2:1"),
        (("--continue", "nowhere.wav"), "nowhere.wav"),
        (("--at", "soon", "techno"), "--at takes seconds and a prompt"),
        (("--at", "2", " "), "the prompt of --at 2 is empty"),
        (("--at", "20", "techno"), "there is no second 20 in the music"),
        (("--bars", "4"), "a length in bars needs a tempo"),
        (("--key", "H minor"), "is no key"),
        (("--key", "D minor"), "not trained with key"),
        (("--metre", "4/5"), "no known metre"),
        (("--min-p", "1"), "min_p must be in"),
        (("--stream", "file.wav"), "--stream takes - (standard output)"),
        (("--stream", "-", "--format", "mp3"), "a stream is wav or pcm"),
        (("--stream", "-", "--play"), "two ways out"),
        (("--stream", "-", "--loop"), "need the whole clip"),
        (("--engine", "magic"), "unknown engine 'magic'"),
        (("--bars", "4", "--bpm", "90", "--duration", "9"), "--bars and --duration are two lengths"),
        (("--continue", "x.wav", "--repaint", "1:2", "--duration", "9"), "--repaint keeps the length of the clip"),
        (("--continue", "x.wav", "--repaint", "1:2", "--bars", "2", "--bpm", "90"), "keeps the length of the clip"),
        (("--continue", "x.wav", "--repaint", "1:2", "--max-duration", "9"), "keeps the length of the clip"),
        (("--continue", "x.wav", "--repaint", "1:2", "--batch-size", "2"), "make one clip: leave out --batch-size"),
        (("--stream", "-", "--batch-size", "2"), "make one clip: leave out --batch-size"),
        (("--play", "--batch-size", "2"), "make one clip: leave out --batch-size"),
        (("--stream", "-", "--out", "x.wav"), "--out x.wav and --stream are two ways out"),
        (("--play", "--out", "x.wav"), "--out x.wav and --play are two ways out"),
        (("--play", "--format", "wav"), "--play writes no file: leave out --format wav"),
        (("--out", "x.wav", "--format", "mp3"), "--out x.wav and --format mp3 differ"),
        (("--tempo", "90"), "the flag --tempo was renamed: write --bpm"),
        (("--adapter", "nowhere"), "loaded from a folder"),
        (("--adapter", ".:much"), "the strength of --adapter .:much must be a number"),
    ],
)
def test_wrong_commands_are_errors_of_one_line(command, arguments, message):
    assert_user_error(command(*arguments), message)


def test_live_output_is_of_one_prompt(command, capsys):
    assert_user_error(run_captured(sample.main, ["a", "b", "--play"], capsys), "take one prompt, got 2")


# --- folders and the hub


def test_save_pretrained_writes_a_model_that_generates_the_same(embedded, tmp_path):
    embedded.save_pretrained(tmp_path / "copy")
    copy = MusicPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    for options in ({"engine": "torch"}, {"engine": "auto"}):
        found, expected = (pipe("a waltz", duration=0.3, **options).codes for pipe in (copy, embedded))
        assert torch.equal(found, expected)
    assert copy.metadata["model"]["weights_sha256"] == embedded.metadata["model"]["weights_sha256"]
    with pytest.raises(UserError, match="inside the model's own folder"):
        embedded.save_pretrained(embedded._folders[0].path / "copy")


def test_pipelines_of_no_folder_cannot_be_saved_or_adapted(tmp_path):
    pipe = small_pipeline(tmp_path)
    for call in (lambda: pipe.save_pretrained(tmp_path / "x"), lambda: pipe.load_adapter(tmp_path)):
        with pytest.raises(UserError, match="loaded from a folder"):
            call()


def test_push_to_hub_uploads_the_folder(embedded, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))

        def create_branch(self, repo_id, branch, exist_ok):
            calls.append(branch)

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir()), revision, commit_message))
            return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert embedded.push_to_hub("me/waltzes", private=True, revision="v2", message="Second") == "https://hub/commit/1"
    files = ["card.json", "config.yaml", "model.safetensors", "second_stage"]
    assert calls == [("me/waltzes", True, True), "v2", ("me/waltzes", files, "v2", "Second")]

    def refuse(*arguments, **options):
        raise OSError("401 Client Error\nUnauthorized")

    monkeypatch.setattr(Api, "upload_folder", refuse)
    with pytest.raises(UserError, match=r"cannot upload to me/waltzes \(401 Client Error\)") as error:
        embedded.push_to_hub("me/waltzes")
    assert "\n" not in str(error.value)


def test_dtype_is_that_of_the_language_model():
    pipe = MusicPipeline.from_pretrained(device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.model.parameters()} == {torch.bfloat16}
    assert next(pipe.codec.parameters()).dtype == torch.float32
    out = pipe("a waltz", duration=0.3)
    assert out.audios.dtype == torch.float32 and out.audios.isfinite().all()
    assert pipe.to("cpu", torch.float32) is pipe and pipe.model.embedding.weight.dtype == torch.float32
    with pytest.raises(UserError, match=r"the weights cannot be torch\.int8"):
        pipe.to(dtype=torch.int8)


# --- adapters


def make_adapter(folder, pipe, seed, scale=1.0, sha256=None):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in pipe.model.named_parameters():
        if name.endswith(("in_proj.weight", "heads.weight")):
            rows, columns = parameter.shape
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.lora_A.weight"] = scale * torch.randn(4, columns, generator=generator) / columns**0.5
            tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 2
    base = {"name": "tiny_lm", "weights_sha256": sha256 or pipe.metadata["model"]["weights_sha256"], "licences": {}}
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    write_adapter(folder, tensors, config, {"name": folder.name, "base_model": base, "licence": "CC-BY-4.0"})
    return folder


def test_adapters_add_up_at_their_strengths_and_can_be_unloaded(embedded, tmp_path):
    one, two = make_adapter(tmp_path / "one", embedded, 1), make_adapter(tmp_path / "two", embedded, 2)
    weight = embedded.model.heads.weight
    before = weight.detach().clone()
    deltas = []
    for folder in (one, two):
        tensors = load_file(folder / "adapter_model.safetensors")
        A, B = (tensors[f"base_model.model.heads.lora_{part}.weight"] for part in "AB")
        deltas.append(B @ A)
    plain = {engine: embedded("a waltz", duration=0.3, engine=engine).codes for engine in ("torch", "auto")}
    embedded.load_adapter(one, 0.5)
    embedded.load_adapter(two)
    torch.testing.assert_close(weight, before + 0.5 * deltas[0] + deltas[1])
    out = embedded("a waltz", duration=0.3)
    assert not torch.equal(out.codes, plain["auto"])  # the fused engine has copies of the weights
    assert torch.equal(out.codes, embedded("a waltz", duration=0.3, engine="torch").codes)
    names = [(own["name"], own["strength"], own["licence"]) for own in out.metadata["adapters"]]
    assert names == [("one", 0.5, "CC-BY-4.0"), ("two", 1.0, "CC-BY-4.0")]
    merged = MusicPipeline.from_pretrained(embedded.save_pretrained(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(merged.model.heads.weight, weight, rtol=1e-3, atol=1e-3)  # float16
    embedded.unload_adapters()
    assert torch.equal(weight, before) and "adapters" not in embedded.metadata
    for engine, codes in plain.items():
        assert torch.equal(embedded("a waltz", duration=0.3, engine=engine).codes, codes)


def test_adapter_of_another_model_is_refused_in_one_line_and_changes_nothing(embedded, tmp_path):
    other = make_adapter(tmp_path / "other", embedded, 1, sha256="0" * 64)
    good = make_adapter(tmp_path / "good", embedded, 2)
    embedded.load_adapter(good, 2.0)
    weight = embedded.model.heads.weight.detach().clone()
    for folder, strength, message in [
        (other, 1.0, "was trained on tiny_lm"), (tmp_path, 1.0, "is no adapter"), (good, float("nan"), "strength"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            embedded.load_adapter(folder, strength)
        assert "\n" not in str(error.value)
    assert torch.equal(embedded.model.heads.weight, weight) and len(embedded.metadata["adapters"]) == 1
    embedded.unload_adapters()


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_open_stream_refuses_other_adapters_and_goes_on_when_they_are_gone(embedded, tmp_path, weights):
    one = make_adapter(tmp_path / "one", embedded, 1)
    session, expected = (embedded.session("a waltz", weights=weights, chunk_seconds=0.2) for _ in range(2))
    assert torch.equal(session.next_chunk(), expected.next_chunk())
    embedded.load_adapter(one)
    with pytest.raises(UserError, match=r"the adapters, .* changed while this stream was open") as error:
        session.next_chunk()
    assert "\n" not in str(error.value)
    other = embedded.session("a waltz", weights=weights)
    embedded.unload_adapters()
    with pytest.raises(UserError, match="changed while this stream was open"):
        other.next_chunk()
    assert torch.equal(session.next_chunk(), expected.next_chunk())


def test_state_saved_with_an_adapter_is_refused_without_it(embedded, tmp_path):
    folder = make_adapter(tmp_path / "one", embedded, 1)
    embedded.load_adapter(folder)
    path = embedded.save_state(tmp_path / "state", embedded.session("a waltz"))
    embedded.unload_adapters()
    with pytest.raises(UserError, match="is of another model"):
        embedded.load_state(path)
