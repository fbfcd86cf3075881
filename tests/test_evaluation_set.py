"""The evaluation of the embedded models: prompts and what they state, clips that are used again, tables."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks import embedded_models, evaluation_set, model_card
from benchmarks.embedded_models import EXCERPTS, parse_model, spread, structure_table
from benchmarks.evaluation_set import Prompt, caption_prompts, measure, paraphrase_prompts, right, true_clips
from data_prep.builtin import compose, render, write_captions
from data_prep.builtin.composition.annotations import excerpt
from ssmttm import audio
from ssmttm.audio import features
from ssmttm.codecs import load_codec
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.classifiers import AttributeClassifiers
from ssmttm.evaluation.music import tempo
from ssmttm.evaluation.music.structure import Structure
from ssmttm.evaluation.protocol.balanced_prompts import names_key
from ssmttm.export.card import complete_card, describe_card
from ssmttm.generation.output import read_sidecar, write_with_sidecar
from ssmttm.model_folder import read_card
from ssmttm.reports import charts
from ssmttm.reports.page import render as render_page
from ssmttm.reports.tables import Section


class PieceStore:
    """Both halves of built-in pieces, without files."""

    path = "pieces"

    def __init__(self, n):
        self.truths = [excerpt(compose(91, i), s, s + 20) | {"segment": s // 20} for i in range(n) for s in (0, 20)]
        self.manifest = pa.table({"track": [truth["piece"] for truth in self.truths]})

    def __len__(self):
        return len(self.truths)

    def indices(self, split):
        return np.arange(len(self))

    def annotations(self, row):
        return self.truths[row]

    def captions(self, row):
        return write_captions(self.truths[row], row)


@pytest.fixture(scope="module")
def store():
    return PieceStore(18)


def test_prompts_are_of_different_pieces_and_expect_what_they_state(store):
    prompts = caption_prompts(store, "all", 9, seed=3)
    assert len({store.truths[prompt.row]["piece"] for prompt in prompts}) == 9
    assert prompts == caption_prompts(store, "all", 9, seed=3) != caption_prompts(store, "all", 9, seed=4)
    for prompt in prompts:
        truth = store.truths[prompt.row]
        assert prompt.expected["family"] == truth["lead"]["family"] and prompt.expected["mode"] == truth["mode"]
        assert ("key" in prompt.expected) == names_key(prompt.caption, truth)
    with pytest.raises(UserError, match="fewer than"):
        caption_prompts(store, "all", 19, seed=3)


def test_names_key_needs_tonic_and_mode():
    truth = {"key": "Bb", "mode": "minor"}
    for caption in ("a waltz in Bb minor", "B flat minor waltz", "In the key of B-flat minor."):
        assert names_key(caption, truth)
    for caption in ("a waltz in B minor", "a waltz in a minor key", "Bb major", "in the minor mode"):
        assert not names_key(caption, truth)
    assert names_key("in dorian mode on F#", {"key": "F#", "mode": "dorian"})
    assert not names_key("in dorian mode on F#", {"key": "F", "mode": "dorian"})


def test_free_form_prompts_state_three_attributes_and_vary(store):
    captions = caption_prompts(store, "all", 10, seed=0)
    prompts = paraphrase_prompts(store, captions, 9, seed=0)
    templates = [evaluation_set._template_of(prompt.caption) for prompt in prompts]
    assert len(prompts) == 9 and len(set(templates)) >= 7
    for prompt, template in zip(prompts, templates, strict=True):
        truth = store.truths[prompt.row]
        assert truth["lead"]["name"] in prompt.caption and truth["mode"] in prompt.caption
        assert ("{key}" in template) == ("key" in prompt.expected)
    with pytest.raises(UserError, match="free-form"):
        paraphrase_prompts(store, captions, 30, seed=0)


def test_right_counts_only_stated_attributes():
    prompts = [Prompt("0", "", 0, {"family": "brass", "key": "Bb"}), Prompt("1", "", 0, {"family": "organ"})]
    predicted = [{"family": "brass", "key": "A#"}, {"family": "synth", "key": "C"}]
    found = right(prompts, predicted)
    assert found["key"]["rate"] == 1 and found["key"]["n"] == 1, "Bb and A# are the same key"
    assert found["family"]["rate"] == 0.5 and found["family"]["n"] == 2 and set(found) == {"family", "key"}


def test_measurements_are_kept_by_content(tmp_path, monkeypatch):
    wav = 0.1 * torch.sin(2 * torch.pi * 220 * torch.arange(5 * 24_000) / 24_000)[None]
    paths = [audio.write(tmp_path / f"{i}.wav", wav * (1 + i) / 2, 24_000) for i in range(2)]
    classifiers = AttributeClassifiers.from_pretrained()
    first = measure(paths, 5.0, classifiers, tmp_path / "measured")
    monkeypatch.setattr(AttributeClassifiers, "predict", lambda *rest: pytest.fail("measured again"))
    again = measure(paths, 5.0, classifiers, tmp_path / "measured")
    assert again.predicted == first.predicted and again.music.clips.keys() == first.music.clips.keys()
    audio.write(paths[0], wav * 0.3, 24_000)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measure(paths, 5.0, classifiers, tmp_path / "measured")


def test_true_clips_have_the_prompt_in_the_sidecar(tmp_path):
    source = audio.write(tmp_path / "source.wav", torch.full((1, 48_000), 0.1), 24_000)
    store = type("Store", (), {"audio_path": lambda self, row: source})()
    (path,) = true_clips(store, [Prompt("007", "a waltz", 0, {})], 1.0, tmp_path / "true")
    assert (
        audio.read(path)[0].shape[-1] == 24_000
        and json.loads(path.with_suffix(".json").read_text())["prompt"] == "a waltz"
    )


def test_decoded_clips_keep_the_prompt_and_are_written_once(tmp_path, monkeypatch):
    wav = 0.1 * torch.sin(2 * torch.pi * 220 * torch.arange(48_000) / 24_000)[None]
    write_with_sidecar(tmp_path / "true/0.wav", wav, 24_000, {"prompt": "a waltz"})
    codec = load_codec("tiny")
    (path,) = evaluation_set.decoded_clips([tmp_path / "true/0.wav"], codec, 1.0, tmp_path / "codec")
    assert audio.read(path)[0].shape[-1] == 24_000 and read_sidecar(path)["prompt"] == "a waltz"
    monkeypatch.setattr("ssmttm.evaluation.protocol.decoded.encoder_of", lambda codec: pytest.fail("decoded again"))
    evaluation_set.decoded_clips([tmp_path / "true/0.wav"], codec, 1.0, tmp_path / "codec")
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        evaluation_set.decoded_clips([tmp_path / "true/0.wav"], codec, 2.0, tmp_path / "codec")


def test_models_are_named_with_optional_sampling_settings():
    assert parse_model("old=tiny_lm") == ("old", ("tiny_lm", {}))
    assert parse_model("new=runs/a@2.5") == ("new", ("runs/a", {"guidance_scale": 2.5}))
    assert parse_model("new=runs/a@2.5,0.9")[1][1] == {"guidance_scale": 2.5, "top_p": 0.9}
    for word in ("tiny_lm", "a=b@x", "a=b@1,2,3", "a=b@", "codec=tiny_lm"):
        with pytest.raises(UserError, match="--models"):
            parse_model(word)


def test_structure_table_tells_ends_from_excerpts():
    def clip(start, end, onset):
        return Structure((5.0, 15.0), 0.1, start, end, onset, 0.0)

    systems = {EXCERPTS: [clip(0.0, 0.0, 0.1 + i / 1000) for i in range(20)], "ends": [clip(-6.0, -20.0, 1.0)] * 4}
    rows, found = structure_table(systems, {EXCERPTS: 30.0, "ends": 40.0})
    assert rows[2][0] == "ends" and rows[2][-2:] == ["100 %", "100 %"] and rows[1][-1] == "5 %"
    assert found["ends"]["boundaries per 10 s"] == pytest.approx(0.5)


def test_examples_are_spread_over_families():
    prompts = [Prompt(str(i), "", i, {"family": family}) for i, family in enumerate("aababc")]
    assert spread(prompts, 3) == [0, 2, 5] and spread(prompts, 5) == [0, 2, 5, 1, 3]


def test_bar_lines_lie_on_the_beats_with_the_strongest_bass():
    near = []
    for piece in (compose(92, 0), compose(92, 1)):
        truth = excerpt(piece, 0, 12)
        wav = features.rms_normalise(torch.from_numpy(render(piece))[None, : 12 * 24_000])
        bars = tempo.bar_lines(features.onset_strength(wav)[0], truth["bpm"], piece.metre.beats)
        near += [min(abs(time - bar) for bar in truth["bars"]) < 0.1 for time in bars]
    assert np.mean(near) > 0.6
    assert len(tempo.bar_lines(torch.zeros(4, 300), 120.0, 4)) <= 2


def test_page_of_models_shows_clips_and_escapes_prompts():
    picture = charts.spectrogram(0.1 * torch.randn(24_000), 24_000, bars=[0.2, 0.7])
    assert "2 bar lines" in picture.alt
    clip = {"system": "codec", "audio": "audio/000-codec.mp3", "spectrogram": picture, "predicted": {"lead": "organ"}}
    section = Section("Adherence", "note", [["", "mode"], ["codec", "90 %"]])
    html = render_page(
        "models.html", title="t", examples=[{"prompt": "<b>slow</b>", "clips": [clip]}], sections=[section]
    )
    assert "&lt;b&gt;slow" in html and 'src="audio/000-codec.mp3"' in html and "90 %" in html


def test_errors_of_the_command_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "measure", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert embedded_models.run_cli(embedded_models.main) == 2
    assert "none" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_figures_of_a_card_are_those_that_were_measured(tmp_path, capsys):
    rate = {"rate": 0.875, "low": 0.8, "high": 0.9, "n": 200}
    distances = {"fad": {"value": 150.0}, "kad": {"value": 1.5}}
    systems = {name: {"right": {"family": rate}, "distances": distances} for name in ("true music", "codec", "new")}
    systems["new"]["paraphrases"] = {"mode": rate | {"rate": 0.5, "n": 100}}
    results = tmp_path / "measure.json"
    results.write_text(json.dumps({"systems": systems, "prompts": 200, "seed": 0, "sampling": {"new": {"top_p": 0.9}}}))
    folder = tmp_path / "model"
    folder.mkdir()
    data = {"store": "builtin, seed 1", "hours": {"train": 2.0}, "licences": {"CC0-1.0": 360}}
    (folder / "card.json").write_text(json.dumps({"name": "m", "step": 10, "data": data}))
    words = [str(folder), "--recipe", "python train.py experiment=x", "--results", str(results), "--system", "new"]
    model_card.main(words)
    card = json.loads((folder / "card.json").read_text())
    assert card["figures"]["lead's family"] == "87.5 % of 200" and card["step"] == 10 and card["licence"] == "CC0-1.0"
    assert card["figures"]["mode, free-form prompts"] == "50.0 % of 100"
    assert card["figures"]["sampling"] == "top p 0.9"
    assert card["figures"]["KAD"] == "1.5 (true music 1.5, codec 1.5)"
    assert "python train.py experiment=x" in capsys.readouterr().out
    with pytest.raises(UserError, match="no system old"):
        model_card.main([*words[:-1], "old"])
    with pytest.raises(UserError, match="recipe is empty"):
        complete_card(folder, "CC0-1.0", [" "], {})


@pytest.mark.parametrize("name", ["tiny_codec"])
def test_cards_of_embedded_assets_tell_licence_data_recipe_and_figures(name):
    rows = dict(describe_card(read_card(Path(embedded_models.__file__).parents[1] / "ssmttm/assets" / name)))
    assert rows["licence"] == "CC0-1.0" and "CC0-1.0" in rows["data"] and "h to train on" in rows["data"]
    assert {"recipe", "training", "figure: command"} <= rows.keys()
