"""The dry run of the ICME 2026 challenge on synthetic data in its format: one command, resumed after two kills; the
concept score; LAION's checkpoints of CLAP."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from small_captioner import write_captioner

from benchmarks import attm_dry
from benchmarks.attm_dry import measured, write_clap, write_synthetic_data
from ssmttm import audio, config
from ssmttm.cli.main import main
from ssmttm.errors import UserError
from ssmttm.evaluation.embedders import laion_clap, load_embedder
from ssmttm.evaluation.embedders import weights as embedder_weights
from ssmttm.evaluation.embedders.packages import passt
from ssmttm.evaluation.metrics.compute import Clip
from ssmttm.evaluation.protocol import embed_files, evaluate, generate
from ssmttm.evaluation.protocol.concept_coverage import QUESTION, concept_coverage, verdict
from ssmttm.evaluation.protocol.prompt_lists import read_prompt_list
from ssmttm.files import file_sha256
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.generation.request import Sampling
from ssmttm.text.captioner import AudioCaptioner

N, SECONDS = 24, 2
MODEL = {"name": "model", "weights_sha256": "a" * 64}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """The dry run at a small scale, as overrides of its protocol."""
    folder = tmp_path_factory.mktemp("song_describer")
    clap = f"eval.weights.clap={write_clap(folder / 'clap', SECONDS)}"
    return [*write_synthetic_data(folder, N, 2.5), clap, f"eval.seconds={SECONDS}", "batch=4", "music_metrics=false"]


def run_killed(arguments, module, name, calls):
    """Run `ssmttm` in a forked process that kills itself at the given call of a function."""
    child = os.fork()
    if child == 0:
        function, made = getattr(module, name), []

        def counted(*given):
            made.append(given)
            if len(made) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given)

        try:
            setattr(module, name, counted)
            main(arguments)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_dry_run_killed_twice_gives_the_results_of_an_unbroken_run(overrides, tmp_path, monkeypatch):
    """Killed while it generates and while it embeds; what was generated and embedded is not made again."""
    pipeline, embedded = MusicPipeline.from_pretrained(device="cpu"), []
    monkeypatch.setattr(evaluate.MusicPipeline, "from_pretrained", lambda checkpoint, second_stage: pipeline)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    words, clips = ["evaluate", "eval=attm_dry", *overrides], broken / "audio"
    run_killed([*words, f"out={broken}"], generate, "write_with_sidecar", N // 2 + 1)
    made = {path: path.stat().st_mtime_ns for path in clips.glob("[!.]*.wav")}
    assert len(made) == N // 2
    run_killed([*words, f"out={broken}"], embed_files, "_embed_clip", N + N // 2)
    assert len(list(clips.glob("[!.]*.wav"))) == N and not (broken / "metrics.json").exists()

    embed = embed_files._embed_clip
    monkeypatch.setattr(embed_files, "_embed_clip", lambda *of: embedded.append(of[1]) or embed(*of))
    main([*words, f"out={broken}"])
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert len(embedded) == N and not any(clips in path.parents for path in embedded)  # the references only
    main([*words, f"out={whole}"])
    first, second = measured(broken), measured(whole)
    for name in ("metrics", "published", "notes", "skipped", "model"):
        assert first[name] == second[name], name
    assert {"loading", "checking files", "generating", "embedding", "metrics"} <= second["seconds"].keys()
    facts = {metric["name"]: metric["fingerprint"] for metric in second["metrics"]}
    assert facts["fad_clap"]["n_reference"] == N and facts["fad_clap"]["sample_rate"] == 48_000
    assert facts["clap_clap"]["weights"] == load_embedder("clap", overrides[2].partition("=")[2]).fingerprint
    assert "published results have other weights of clap" in (whole / "report.md").read_text()


# --- concepts --------------------------------------------------------------------------------------------------------


class Judge:
    """Hears a concept where the clip is loud; answers in different words."""

    fingerprint, sample_rate = "f" * 16, 16_000

    def __init__(self):
        self.asked = []

    def answers(self, questions):
        for wav, question in questions:
            self.asked.append((len(wav), question))
            if "unclear" in question:
                yield "It is hard to say."
            else:
                yield "Yes, it is." if float(wav.abs().max()) > 0.3 else " no"


@pytest.fixture
def clips(tmp_path):
    """A loud clip, a soft one and one without concepts, of 3 s at 24 kHz in stereo."""
    found = []
    for name, level, concepts in (
        ("loud", 0.5, ("rock", "sad", "unclear")),
        ("soft", 0.1, ("rock",)),
        ("none", 0.1, ()),
    ):
        audio.write(tmp_path / f"{name}.wav", level * torch.ones(2, 72_000), 24_000)
        found.append(Clip(tmp_path / f"{name}.wav", f"{name} music", concepts=concepts))
    return found


def test_concept_coverage_is_the_mean_share_of_concepts_that_are_heard(clips, tmp_path):
    judge = Judge()
    metric, notes = concept_coverage(clips, judge, 2.0, {"seed": 1}, tmp_path)
    assert metric.value == pytest.approx((2 / 3 + 0) / 2) and metric.better == "higher"
    assert metric.fingerprint["n"] == 2 and metric.fingerprint["seed"] == 1
    assert judge.asked == [(32_000, QUESTION.format(concept=word)) for word in ("rock", "sad", "unclear", "rock")]
    assert not any("music" in question.replace("of this music", "") for _, question in judge.asked)  # not the prompt
    assert notes == ["1 prompts without concepts are left out of ccs",
                     "1 of 4 answers are neither yes nor no and count as no in ccs"]  # fmt: skip
    assert concept_coverage(clips, judge, 2.0, {"seed": 1}, tmp_path)[0] == metric and len(judge.asked) == 4  # cached
    more = [replace(clips[1], concepts=("rock", "piano")), *clips[2:]]
    assert concept_coverage(more, judge, 2.0, {}, tmp_path)[0].fingerprint["prompts"] != metric.fingerprint["prompts"]
    assert [question for _, question in judge.asked[4:]] == [QUESTION.format(concept="piano")]


@pytest.mark.parametrize(
    ("answer", "word"),
    [("Yes.", "yes"), ("**no**, it is", "no"), ("YES", "yes"), ("yesterday", ""), ("", ""), ("The answer is yes", "")],
)
def test_verdict_is_the_first_word(answer, word):
    assert verdict(answer) == word


def test_captioner_answers_each_question_about_its_own_clip(tmp_path):
    captioner = AudioCaptioner(write_captioner(tmp_path), max_new_tokens=8)
    noise = torch.Generator().manual_seed(0)
    wavs = [0.1 * torch.randn(16_000, generator=noise) for _ in range(3)]
    questions = [(wavs[0], "piano"), (wavs[1], "a long question about drums"), (wavs[2], "piano"), (wavs[0], "drums")]
    together = list(captioner.answers(questions))
    assert together == [next(captioner.answers([question])) for question in questions]
    assert len(set(together)) > 1
    assert list(captioner.captions(wavs)) == list(captioner.answers((wav, captioner.prompt) for wav in wavs))


def test_evaluate_judges_concepts(overrides, tmp_path):
    """Of existing audio, by a random Qwen2-Audio: the metric, its answers in the cache, and errors before anything."""
    folder = tmp_path / "audio"
    prompts = read_prompt_list(overrides[0].partition("=")[2], "{path}", "caption", concepts="tags")
    assert all(len(prompt.concepts) == 3 for prompt in prompts)
    for i, prompt in enumerate(prompts):
        noise = 0.1 * torch.randn(1, 24_000 * SECONDS, generator=torch.Generator().manual_seed(i))
        audio.write(folder / f"{prompt.name}.wav", noise, 24_000)
    judge = write_captioner(tmp_path / "judge")
    words = [f"eval.judge={judge}", f"audio={folder}", "eval.embedders=[tiny]", "eval.seconds=5", f"out={tmp_path}"]
    words = [*overrides, *words, "eval.seconds=2", "eval.embedders=[clap]"]
    found = evaluate.evaluate(config.load("eval=attm_dry", *words, root="eval"))
    metric = next(metric for metric in found["metrics"] if metric["name"] == "ccs_qwen2_audio")
    assert 0 <= metric["value"] <= 1 and metric["fingerprint"]["n"] == N
    (answers,) = (tmp_path / "embeddings").glob("answers-*.json")
    assert len(json.loads(answers.read_text())) == sum(len(prompt.concepts) for prompt in prompts)
    with pytest.raises(UserError, match="no audio captioner folder"):
        evaluate.evaluate(config.load("eval=attm_dry", *words, f"eval.judge={tmp_path / 'no'}", root="eval"))
    with pytest.raises(UserError, match="needs prompts with concepts"):
        evaluate.evaluate(config.load("eval=attm_dry", *words, "eval.concepts=null", root="eval"))
    with pytest.raises(UserError, match="no column 'words'"):
        evaluate.evaluate(config.load("eval=attm_dry", *words, "eval.concepts=words", root="eval"))


class Level:
    """A Scorer of one axis: the level of a clip."""

    name, sample_rate, seconds, dim, settings, axes = "level", 16_000, 1.0, 1, {}, ("loud",)
    fingerprint = "l" * 16

    def embed(self, wav):
        return wav.unfold(-1, 16_000, 16_000).abs().mean(-1, keepdim=True)  # [B, W, 1]


@pytest.fixture
def existing(tmp_path, monkeypatch):
    """Overrides for existing audio of N prompts with references of their own; two prompts have concepts."""
    prompts = [{"path": f"track-{i}", "caption": f"prompt {i}", "tags": ["rock"] if i < 2 else []} for i in range(N)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    for i in range(N):
        for folder in ("audio", "true"):
            noise = 0.1 * torch.randn(1, 48_000, generator=torch.Generator().manual_seed(len(folder) * i))
            audio.write(tmp_path / folder / f"track-{i}.wav", noise, 24_000)
    monkeypatch.setattr(evaluate, "load_embedder", lambda name, weights: Level())
    monkeypatch.setattr(evaluate, "captioner_folder", lambda path: path)
    return ["eval=attm_dry", f"prompts={tmp_path / 'prompts.json'}", f"references={tmp_path / 'true'}",
            f"audio={tmp_path / 'audio'}", f"out={tmp_path / 'out'}", "music_metrics=false", "eval.seconds=2",
            "eval.audio=['{path}']"]  # fmt: skip


def test_notes_on_concepts_say_whose_clips_and_nothing_is_judged_without_concepts(existing, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "AudioCaptioner", lambda *rest, **more: Judge())
    settings = config.load(*existing, "eval.judge=folder", root="eval")
    found = evaluate.evaluate(settings)
    note = f"{N - 2} prompts without concepts are left out of ccs"
    assert [text for text in found["notes"] if "ccs" in text] == [f"model: {note}", f"reference: {note}"]
    for i in range(2):
        (tmp_path / "audio" / f"track-{i}.wav").write_bytes(b"broken")
    found = evaluate.evaluate(settings)
    assert "ccs is left out: all prompts with concepts were skipped" in found["notes"]
    assert [metric["name"] for metric in found["metrics"]] == ["loud_level"]


@pytest.mark.parametrize("unpaired", [True, False])
def test_scorer_embeds_no_references_that_no_metric_uses(existing, tmp_path, monkeypatch, unpaired):
    """References that belong to no prompt, and those of some prompts only, which are not measured on their own."""
    embed, embedded = embed_files._embed_clip, []
    monkeypatch.setattr(embed_files, "_embed_clip", lambda *of: embedded.append(of[1]) or embed(*of))
    if unpaired:
        existing.append("eval.audio=[]")
    else:
        (tmp_path / "true" / "track-0.wav").write_bytes(b"broken")
    assert not evaluate.evaluate(config.load(*existing, root="eval"))["reference"]
    assert sorted(embedded) == sorted((tmp_path / "audio").glob("*.wav"))


@pytest.fixture
def vae_pipeline(existing, tmp_path, monkeypatch):
    """A model whose clips, those that exist, are decoded by a VAE, evaluated on the prompts of a store."""
    clips = sorted((tmp_path / "audio").glob("*.wav"), key=lambda path: int(path.stem.removeprefix("track-")))
    made = SimpleNamespace(name="latents")
    pipeline = SimpleNamespace(
        codec=SimpleNamespace(), decoder=made, sampling=lambda **given: Sampling(), metadata={"model": MODEL}
    )
    monkeypatch.setattr(evaluate.MusicPipeline, "from_pretrained", lambda checkpoint, second_stage: pipeline)
    monkeypatch.setattr(evaluate, "generate", lambda *rest: clips)
    protocol_data = evaluate._protocol_data

    def of_a_store(settings):
        data = protocol_data(settings)
        return replace(data, store=object(), labelled=[prompt.name for prompt in data.prompts])

    monkeypatch.setattr(evaluate, "_protocol_data", of_a_store)
    return pipeline


def test_music_metrics_of_a_model_with_a_vae_are_compared_with_its_vae(existing, vae_pipeline, monkeypatch):
    """Its codec does not make its clips, so that what the codec decodes is no bound for them."""
    given = []

    def decoded(paths, decoder, *rest):
        given.append(decoder)
        return paths

    monkeypatch.setattr(evaluate, "decoded_files", decoded)
    words = [*existing, "audio=null", "music_metrics=true", "adherence=false"]
    found = evaluate.evaluate(config.load(*words, root="eval"))
    assert given == [vae_pipeline.decoder] and set(found["music_metrics"]) == {"model", "reference", "codec"}


def test_prompt_adherence_of_a_model_with_a_vae_is_measured_with_its_vae(existing, vae_pipeline, monkeypatch):
    given = []
    monkeypatch.setattr(evaluate, "measure_adherence", lambda *rest: given.append(rest))
    evaluate.evaluate(config.load(*existing, "audio=null", "adherence=true", root="eval"))
    assert given[0][1] == [f"track-{i}" for i in range(N)] and given[0][3] is vae_pipeline.decoder


def test_passt_without_network_is_one_line(monkeypatch):
    def unreachable(mode):
        raise URLError("")

    monkeypatch.setattr(passt, "import_package", lambda *names: SimpleNamespace(get_basic_model=unreachable))
    with pytest.raises(UserError, match=r"^the weights of passt cannot be downloaded .*eval\.weights\.passt=FILE$"):
        load_embedder("passt")


def test_package_whose_error_has_no_message_is_one_line(monkeypatch):
    def fails(name):
        raise ImportError

    monkeypatch.setattr(embedder_weights, "import_module", fails)
    with pytest.raises(UserError, match=r"needs the package p \(ImportError\)"):
        embedder_weights.import_package("e", "p", "p.module")


def test_benchmark_deletes_only_its_own_folder(tmp_path, monkeypatch):
    def stop(*rest):
        raise InterruptedError

    monkeypatch.setattr(attm_dry, "write_synthetic_data", stop)
    stale = tmp_path / attm_dry.FOLDER / "whole"
    stale.mkdir(parents=True)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InterruptedError):
        attm_dry.main(["--out", str(tmp_path)])
    assert (tmp_path / "mine.txt").read_text() == "kept" and not stale.exists()


def test_concepts_of_a_table_are_lists_or_separated_by_commas(tmp_path):
    cells = {"a": ["rock", " piano ", "rock"], "b": "calm, jazz,", "c": None}
    rows = [{"id": name, "caption": f"caption {name}", "tags": cell} for name, cell in cells.items()]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    found = read_prompt_list(tmp_path / "t.json", "{id}", "caption", concepts="tags")
    assert [prompt.concepts for prompt in found] == [("rock", "piano"), ("calm", "jazz"), ()]
    assert all(prompt.concepts == () for prompt in read_prompt_list(tmp_path / "t.json", "{id}", "caption"))


# --- LAION's checkpoints ---------------------------------------------------------------------------------------------


AUDIO_NAMES = {
    "attention.self": "attn", "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2", "batch_norm": "bn0",
    "audio_model.audio_encoder": "audio_branch",
}  # fmt: skip


@pytest.fixture(scope="module")
def laion(tmp_path_factory):
    """A small random CLAP, in transformers' format and as LAION publishes it."""
    from transformers import ClapModel

    folder = tmp_path_factory.mktemp("laion")
    source = write_clap(folder / "hf", 10)
    model = ClapModel.from_pretrained(source).eval()
    model.audio_model.audio_encoder.batch_norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(source)
    tensors = {"module.audio_branch.tscam_conv.weight": torch.zeros(3)}
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("_ids")}
    for name, value in weights.items():
        if name.startswith("audio_model") and ".query." in name:  # LAION's audio branch has them in one
            value = torch.cat([value, *(weights[name.replace("query", part)] for part in ("key", "value"))])
            name = name.replace("query", "qkv")
        if not (name.startswith("audio_model") and (".key." in name or ".value." in name)):
            tensors[f"module.{to_laion(name)}"] = value
    torch.save({"epoch": 15, "best": np.float64(0.9), "state_dict": tensors}, folder / "clap.pt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folder / "hf" / name).read_bytes())
    return folder


def to_laion(name):
    """LAION's name of a tensor of transformers."""
    if name.startswith("audio_model"):
        for old, new in AUDIO_NAMES.items():
            name = name.replace(old, new)
    name = name.replace("text_model", "text_branch")
    return name.replace("_projection.linear1", "_projection.0").replace("_projection.linear2", "_projection.2")


def test_clap_reads_laions_file(laion, tmp_path, monkeypatch):
    """Equal to transformers' model of the same weights, whose extractor begins at 50 Hz, too."""
    monkeypatch.setattr(laion_clap, "_HEAD_WIDTH", 8)
    ours, theirs = load_embedder("clap", str(laion / "clap.pt")), load_embedder("clap", str(laion / "hf"))
    wav = 0.1 * torch.randn(2, 480_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.embed(wav), theirs.embed(wav), rtol=0, atol=0)
    torch.testing.assert_close(ours.joint_text(["in a"]), theirs.joint_text(["in a"]), rtol=0, atol=0)
    assert ours.sample_rate == 48_000 and ours.seconds == 10 and ours.processor.tokenizer.model_max_length == 77
    tensors = torch.load(laion / "clap.pt", weights_only=False)["state_dict"]
    for change, message in (
        ({"module.audio_branch.layers.0.more": torch.ones(1)}, "more does not fit"),
        (None, "norm"),
    ):
        wrong = {**tensors, **change} if change else {k: v for k, v in tensors.items() if "norm" not in k}
        torch.save({"state_dict": wrong}, tmp_path / "wrong.pt")
        with pytest.raises(UserError, match=message):
            load_embedder("clap", str(tmp_path / "wrong.pt"))
    (tmp_path / "text.pt").write_text("nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_embedder("clap", str(tmp_path / "text.pt"))


def test_note_on_weights_tells_the_published_file_from_others(laion):
    name = laion / "clap.pt"
    own = config.load("eval=attm_dry", f"eval.weights.clap={name}", root="eval").eval
    assert "other weights of clap" in evaluate._weights_notes(own)[0]
    own.published_weights.clap = file_sha256(name)
    assert evaluate._weights_notes(own) == []
    for weights in (None, str(laion / "hf")):
        own.weights.clap = weights
        assert len(evaluate._weights_notes(own)) == 1
