"""Protocols: benchmark tables, resuming, notes on missing files, comparison of metrics."""

import json
import re
import shutil
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch
from small_music import RATE, clips

from ssmttm import audio, config
from ssmttm.cli.main import main
from ssmttm.errors import UserError, run_cli
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.evaluation.metrics.metric import Metric, check_comparable, compare, differences, table
from ssmttm.evaluation.protocol import evaluate
from ssmttm.evaluation.protocol.embed_files import embed_clips, set_hash
from ssmttm.evaluation.protocol.prompt_lists import read_prompt_list
from ssmttm.generation.pretrained import PipelineParts
from ssmttm.generation.request import Sampling

N = 24
Output = namedtuple("Output", "audios sample_rate")


class Model:
    """A fake pipeline that generates a tone with seeded noise and records its prompts."""

    sampling = PipelineParts.sampling

    def __init__(self, name="model", weights="a" * 64):
        self.metadata, self.prompts = {"model": {"name": name, "weights_sha256": weights}}, []
        self.sampling_defaults = Sampling()

    def __call__(self, prompts, seeds, duration, **settings):
        self.prompts += prompts
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            tone = torch.sin(torch.arange(round(duration * RATE)) * (0.02 + 0.001 * (seed % 50)))
            rows.append(0.1 * tone[None] + 0.02 * torch.randn(1, len(tone), generator=generator))
        return Output(torch.stack(rows), RATE)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A table of captions, and their reference audio."""
    folder = tmp_path_factory.mktemp("benchmark")
    wavs, captions = clips(0, 8)
    lines = ["ytid,caption,is_audioset_eval"]
    for i, (wav, caption) in enumerate(zip(wavs, captions, strict=True)):
        name = f"clip-{i}"
        lines.append(f'{name},"{caption} {i}",{i % 2 == 0}')
        audio.write(folder / "audio" / f"{name}.flac", wav[:, : 5 * RATE], RATE)
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def settings(benchmark, out, *more):
    return config.load(
        "eval=musiccaps", f"prompts={benchmark / 'captions.csv'}", f"references={benchmark / 'audio'}", f"out={out}",
        "eval.embedders=[tiny,log_mel]", "eval.seconds=5", "music_metrics=false", *more, root="eval",
    )  # fmt: skip


@pytest.fixture
def model(monkeypatch):
    model = Model()
    monkeypatch.setattr(evaluate.MusicPipeline, "from_pretrained", lambda checkpoint, second_stage: model)
    return model


# --- running a protocol ----------------------------------------------------------------------------------------------


def test_evaluate_takes_all_audio_of_a_folder_as_references_of_unpaired_prompts(benchmark, tmp_path, model):
    """The dry run of the ICME 2026 challenge, on synthetic data: prompts of one corpus, references of another."""
    prompts = [{"path": f"{i % 100:02d}/{1000 + i}.mp3", "caption": f"prompt {i}"} for i in range(N)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    references = tmp_path / "song_describer"
    shutil.copytree(benchmark / "audio", references / "00")
    overrides = ["eval=attm_dry", f"prompts={tmp_path / 'prompts.json'}", f"references={references}"]
    small = ["eval.embedders=[tiny]", "eval.seconds=5", "music_metrics=false", f"out={tmp_path / 'out'}"]
    found = evaluate.evaluate(config.load(*overrides, *small, root="eval"))
    metrics = {metric["name"]: metric["fingerprint"] for metric in found["metrics"]}
    assert metrics["fad_tiny"]["n_reference"] == 24 and "kl_tiny" not in metrics and not found["reference"]
    assert metrics["fad_tiny"]["reference"] == set_hash(sorted(references.glob("00/*.flac")))
    assert not any("without reference" in note for note in found["notes"])
    assert found["published"]["the best entry of the dry run"]["fad"] == 0.404
    with pytest.raises(UserError, match="no audio in"):
        evaluate.evaluate(config.load(*overrides, *small, f"references={tmp_path / 'none'}", root="eval"))


def test_evaluate_computes_metrics_and_resumes(benchmark, tmp_path, model, capsys):
    out = tmp_path / "out"
    found = evaluate.evaluate(settings(benchmark, out))
    assert len(model.prompts) == N and len(list((out / "audio").glob("*.wav"))) == N
    names = {metric["name"]: metric for metric in found["metrics"]}
    kinds = ("fad", "kad", "mad", "fad_infinity", "precision", "recall", "coverage")
    assert set(names) == {f"{kind}_{e}" for kind in kinds for e in ("tiny", "log_mel")} | {"kl_tiny", "clap_tiny"}
    for metric in names.values():
        assert metric["low"] <= metric["high"] and metric["fingerprint"]["n"] == N
    facts = names["fad_tiny"]["fingerprint"]
    known = {"embedder", "weights", "sample_rate", "clip_seconds", "seed", "guidance_scale", "n_reference", "prompts"}
    assert known <= facts.keys() and facts["guidance_scale"] == 3
    true = {metric["name"]: metric["value"] for metric in found["reference"]}
    assert names["kl_tiny"]["value"] > 1 and true["clap_tiny"] > names["clap_tiny"]["value"] + 0.2
    assert names["fad_tiny"]["value"] > 3 * true["fad_tiny"]
    text = (out / "report.md").read_text()
    assert "As published, not measured here" in text and "4.88" in text and "fad_tiny (↓)" in text
    page = (out / "report.html").read_text()
    assert "As published, not measured here" in page and "4.88" in page and "fad_tiny (↓)" in page

    (out / "audio" / "clip-3.wav").unlink()
    (out / "audio" / "clip-5.json").unlink()  # a clip without its sidecar is incomplete
    (out / "audio" / "clip-7.json").write_text("damaged")
    resumed = evaluate.evaluate(settings(benchmark, out))
    assert len(model.prompts) == N + 3 and resumed["metrics"] == found["metrics"]


def test_evaluate_rejects_clips_of_another_model(benchmark, tmp_path, model):
    evaluate.evaluate(settings(benchmark, tmp_path))
    with pytest.raises(UserError, match="guidance_scale differ"):
        evaluate.evaluate(settings(benchmark, tmp_path, "guidance=5"))
    model.sampling_defaults = Sampling(guidance_scale=1.0)  # a guidance-distilled student
    with pytest.raises(UserError, match="guidance_scale differ"):
        evaluate.evaluate(settings(benchmark, tmp_path))
    model.sampling_defaults = Sampling(top_p=0.9)
    with pytest.raises(UserError, match="top_p differ"):
        evaluate.evaluate(settings(benchmark, tmp_path))
    model.sampling_defaults, model.metadata = Sampling(), {"model": {"name": "model", "weights_sha256": "b" * 64}}
    with pytest.raises(UserError, match="model differ"):
        evaluate.evaluate(settings(benchmark, tmp_path))


def test_evaluate_matches_existing_audio_and_notes_mismatches(benchmark, tmp_path, model):
    existing = tmp_path / "existing"
    for path in sorted((benchmark / "audio").glob("*.flac"))[2:]:
        audio.write(existing / f"{path.stem}.wav", audio.read(path)[0], RATE)
    audio.write(existing / "stranger.wav", torch.zeros(1, 5 * RATE) + 0.1, RATE)
    (existing / "clip-7.wav").write_bytes(b"broken")
    audio.write(existing / "clip-8.wav", torch.ones(1, RATE) * 0.1, RATE)
    found = evaluate.evaluate(settings(benchmark, tmp_path / "out", f"audio={existing}"))
    notes = "\n".join(found["notes"])
    assert "2 prompts without audio" in notes and "stranger.wav" in notes and "2 files skipped" in notes
    assert not model.prompts and found["metrics"][0]["fingerprint"]["n"] == N - 4
    assert found["metrics"][0]["fingerprint"]["guidance_scale"] == "unknown"


def test_evaluate_names_and_leaves_out_audio_without_music(benchmark, tmp_path, model):
    """Also where only the part that is measured, the first 5 s, has none."""
    existing = tmp_path / "existing"
    wavs = {path.stem: audio.read(path)[0] for path in (benchmark / "audio").glob("*.flac")}
    music = wavs["clip-0"]
    wavs |= {
        "clip-3": torch.cat([music, -music]),
        "clip-7": 20_000 * music,
        "clip-11": torch.cat([torch.zeros_like(music), music], 1),
        "clip-15": torch.full_like(music, 0.25),
    }
    existing.mkdir()
    for name, wav in wavs.items():
        sf.write(existing / f"{name}.wav", wav.T.numpy(), RATE, subtype="FLOAT")
    found = evaluate.evaluate(settings(benchmark, tmp_path / "out", f"audio={existing}"))
    reasons = {"3": "cancel", "7": "full scale", "11": "silent", "15": "constant"}
    note = next(note for note in found["notes"] if "files skipped" in note)
    for number, reason in reasons.items():
        assert f"clip-{number}.wav" in note and reason in found["skipped"][str(existing / f"clip-{number}.wav")]
    assert len(found["skipped"]) == 4 and found["metrics"][0]["fingerprint"]["n"] == N - 4


def test_evaluate_of_too_few_usable_clips_tells_why(benchmark, tmp_path, model):
    existing = tmp_path / "existing"
    for path in (benchmark / "audio").glob("*.flac"):
        audio.write(existing / path.name, torch.zeros(1, 5 * RATE), RATE)
    with pytest.raises(UserError, match=r"got 0 of 24 prompts; the first skipped: .*clip-.*silent"):
        evaluate.evaluate(settings(benchmark, tmp_path / "out", f"audio={existing}"))


def test_evaluate_leaves_out_references_without_music(benchmark, tmp_path, model):
    """A silent reference distorts every distance."""
    folder = shutil.copytree(benchmark / "audio", tmp_path / "references")
    audio.write(folder / "clip-4.flac", torch.zeros(1, 5 * RATE), RATE)
    found = evaluate.evaluate(settings(benchmark, tmp_path / "out", f"references={folder}"))
    assert any("clip-4.flac" in note and "silent" in note for note in found["notes"])
    assert found["metrics"][0]["fingerprint"]["n_reference"] == N - 1


def test_evaluate_notes_negative_fad_infinity(benchmark, tmp_path, model):
    """The references themselves as the clips to evaluate."""
    existing = f"audio={benchmark / 'audio'}"
    found = evaluate.evaluate(settings(benchmark, tmp_path / "out", existing, "eval.embedders=[log_mel]"))
    values = {metric["name"]: metric["value"] for metric in found["metrics"]}
    assert values["fad_infinity_log_mel"] < 0 and values["fad_log_mel"] == pytest.approx(0, abs=1e-6)
    notes = [note for note in found["notes"] if "fad_infinity_log_mel is -" in note]
    assert [note.split(":")[0] for note in notes] == ["model", "reference"]
    assert "never negative" in (tmp_path / "out" / "report.md").read_text()


def test_evaluate_without_references_skips_their_metrics(benchmark, tmp_path, model):
    found = evaluate.evaluate(settings(benchmark, tmp_path / "out", f"references={tmp_path}"))
    assert {f["name"] for f in found["metrics"]} == {"clap_tiny"} and not found["reference"]
    assert any("24 prompts without reference audio" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["n=5"], "at least 20 prompts are needed, got 5"),
        (["eval.seconds=4"], "the window of tiny is 5 s"),
        (["references=EMPTY", "eval.embedders=[log_mel]"], "no reference audio"),
        (["references=ONE"], "no distribution"),
        (["references=SILENT"], "none of 1 references can be used; the first: "),
        (["prompts=nowhere.csv"], "does not exist"),
        (["audio=EMPTY"], "no audio"),
        (["eval.embedders=[vggish]"], "weights.vggish=FILE"),
        (["prompts=null"], "needs prompts=FILE"),
        (["eval.caption=words"], "no column 'words'"),
        (["+eval.keep.is_audioset_eval=maybe"], "has no prompts"),
    ],
)
def test_evaluate_rejects_bad_settings_before_generating(benchmark, tmp_path, model, more, message):
    (tmp_path / "EMPTY").mkdir()
    audio.write(tmp_path / "ONE" / "clip-3.wav", torch.rand(1, 5 * RATE) * 0.1, RATE)
    audio.write(tmp_path / "SILENT" / "clip-3.wav", torch.zeros(1, 5 * RATE), RATE)
    more = [re.sub("EMPTY|ONE|SILENT", lambda folder: str(tmp_path / folder[0]), word) for word in more]
    with pytest.raises(UserError) as caught:
        evaluate.evaluate(settings(benchmark, tmp_path / "out", *more))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not model.prompts  # nothing was generated


def test_evaluate_notes_few_clips_and_different_sample_rates(benchmark, tmp_path, model):
    for path in sorted((benchmark / "audio").glob("*.flac")):
        wav = audio.resample(audio.read(path)[0], RATE, 44_100).clamp(-1, 1)
        audio.write(tmp_path / "audio" / f"{path.stem}.wav", wav.repeat(2, 1), 44_100)
    more = f"references={tmp_path / 'audio'}", "music_metrics=true"
    found = evaluate.evaluate(settings(benchmark, tmp_path / "out", *more))
    notes = "\n".join(found["notes"])
    assert f"{N} clips and {N} references are few" in notes
    assert f"model {RATE} Hz; reference 44100 Hz" in notes


def test_evaluate_builtin_needs_store(capsys):
    assert run_cli(lambda: main(["evaluate", "eval=builtin"])) == 2
    assert "store is not set" in capsys.readouterr().err


@pytest.mark.parametrize("name", config.names("eval"))
def test_protocol_config_composes(name):
    settings = config.load(f"eval={name}", root="eval")
    assert settings.eval.name == name and settings.eval.source in ("builtin", "table")


# --- comparing ------------------------------------------------------------------------------------------------------


def metric(value=1.0, name="fad_tiny", better="lower", **facts):
    return Metric(name, value, value - 0.1, value + 0.1, better, {"n": 100, "seed": 0, **facts})


def test_compare_metrics():
    assert "the second is better" in compare(metric(2.0), metric(1.0))
    assert "do not overlap" in compare(metric(2.0), metric(1.0))
    assert "intervals overlap" in compare(metric(1.1), metric(1.0))
    assert "both are 1" in compare(metric(1.0), metric(1.0))
    low, lower = metric(-2.0, "fad_infinity_tiny"), metric(-9.0, "fad_infinity_tiny")
    assert "cannot be ranked" in compare(low, lower) and "the first is better" in compare(low, metric(3.0, low.name))
    assert "the first is better" in compare(metric(2.0, "clap_tiny", "higher"), metric(1.0, "clap_tiny", "higher"))


def test_compare_rejects_different_settings():
    with pytest.raises(UserError, match="n 100 and 200"):
        compare(metric(), metric(n=200))
    with pytest.raises(UserError, match="guidance None and 3"):
        compare(metric(), metric(guidance=3))
    with pytest.raises(UserError, match="different metrics"):
        compare(metric(), metric(name="fad_log_mel"))
    with pytest.raises(UserError, match="seed"):
        table({"a": [metric()], "b": [metric(seed=1)]})
    check_comparable([metric(), metric(3.0)])
    assert differences({"a": 1}, {"a": 1}) == ""
    rows = table({"a": [metric()], "b": [metric(2.0), metric(name="kad_tiny")]})
    assert rows[0] == ["", "fad_tiny (↓)", "kad_tiny (↓)"] and rows[1][2] == ""


def test_evaluate_compare_command(benchmark, tmp_path, model, capsys):
    for name in ("a", "b"):
        model.metadata = {"model": {"name": name, "weights_sha256": name * 64}}
        evaluate.evaluate(settings(benchmark, tmp_path / name))
    evaluate.evaluate(settings(benchmark, tmp_path / "c", "seed=1"))
    assert main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "fad_tiny" in capsys.readouterr().out
    assert run_cli(lambda: main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "c")])) == 2
    assert "seed 0 and 1" in capsys.readouterr().err
    assert run_cli(lambda: main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path)])) == 2
    (tmp_path / "metrics.json").write_text('{"metrics": [{"name": "fad"}]}')
    assert run_cli(lambda: main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path)])) == 2
    assert "another version" in capsys.readouterr().err
    assert run_cli(lambda: main(["evaluate", "compare", str(tmp_path / "a")])) == 2


# --- tables of prompts ----------------------------------------------------------------------------------------------


def test_read_prompt_list_formats(tmp_path):
    rows = [{"path": "00/7.mp3", "caption": "a waltz"}, {"path": "01/8.mp3", "caption": "a jig"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "x.csv").write_text("path,caption\n" + "".join(f"{r['path']},{r['caption']}\n" for r in rows))
    (tmp_path / "x.tsv").write_text("path\tcaption\n" + "".join(f"{r['path']}\t{r['caption']}\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    audio.write(tmp_path / "audio" / "00" / "7.2min.wav", torch.ones(1, RATE) * 0.1, RATE)
    for kind in ("json", "jsonl", "csv", "tsv", "parquet"):
        table = tmp_path / f"x.{kind}"
        templates = ["{path_stem}", "{path_stem}.2min"]
        found = read_prompt_list(table, "{path}", "caption", references=tmp_path / "audio", audio=templates)
        assert [prompt.caption for prompt in found] == ["a waltz", "a jig"] and found[0].name == "00-7-mp3"
        assert found[0].reference == tmp_path / "audio" / "00" / "7.2min.wav" and found[1].reference is None
    (tmp_path / "x.txt").write_text("a waltz\n\na jig\n")
    assert [prompt.name for prompt in read_prompt_list(tmp_path / "x.txt", "", "")] == ["0000-a-waltz", "0001-a-jig"]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "just words"])
def test_read_prompt_list_rejects_bad_file(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        read_prompt_list(tmp_path / "x.json", "{path}", "caption")


def test_read_prompt_list_skips_rows_without_caption_and_rejects_surplus_fields(tmp_path):
    table = tmp_path / "x.csv"
    table.write_text("path,caption\na,a waltz\nb\nc,\n")
    assert [prompt.caption for prompt in read_prompt_list(table, "{path}", "caption")] == ["a waltz"]
    table.write_text("path,caption\na,a slow, sad waltz\n")
    with pytest.raises(UserError, match="line 2, has more fields"):
        read_prompt_list(table, "{path}", "caption")


def test_read_prompt_list_keeps_selected_rows(benchmark):
    found = read_prompt_list(benchmark / "captions.csv", "{ytid}", "caption", {"is_audioset_eval": True})
    assert len(found) == N // 2


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embed_clips_caches_by_content(benchmark, tmp_path, monkeypatch):
    embedder, paths = load_embedder("log_mel"), sorted((benchmark / "audio").glob("*.flac"))[:3]
    first = embed_clips(embedder, paths, 5.0, tmp_path)
    assert first.vectors.shape == (3, 5, embedder.dim)
    monkeypatch.setattr(embedder, "embed", lambda wav: pytest.fail("embedded twice"))
    cached = embed_clips(embedder, paths[::-1], 5.0, tmp_path)
    assert torch.equal(cached.vectors.flip(0), first.vectors)
    assert set_hash(paths) == set_hash(paths[::-1]) != set_hash(paths[:2])
    copy = tmp_path / "copy.flac"
    copy.write_bytes(paths[0].read_bytes())
    assert set_hash([copy]) == set_hash(paths[:1])
    copy.write_bytes(paths[1].read_bytes())
    assert set_hash([copy]) == set_hash(paths[1:2])
    next(tmp_path.glob("*.safetensors")).write_bytes(b"damaged")
    monkeypatch.undo()
    assert torch.equal(embed_clips(embedder, paths, 5.0, tmp_path).vectors, first.vectors)


def test_embeddings_are_independent_of_channels_and_rate(tmp_path):
    wav = clips(0, 8)[0][0][:, : 5 * RATE]
    one = audio.write(tmp_path / "mono.wav", wav, RATE)
    two = audio.write(tmp_path / "stereo.wav", audio.resample(wav, RATE, 48_000).repeat(2, 1).clamp(-1, 1), 48_000)
    vectors = embed_clips(load_embedder("tiny"), [one, two], 5.0, tmp_path).vectors
    difference = float(np.linalg.norm(vectors[0] - vectors[1]) / np.linalg.norm(vectors[0]))
    assert difference < 0.05
