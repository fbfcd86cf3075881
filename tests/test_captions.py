"""Captions from tags by templates, from a random audio language model, and paraphrases by a user's function."""

import json
import re
import shutil
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_captioner import write_captioner

from data_prep.stages.captions import stage
from data_prep.stages.captions.stage import CaptionOptions, check_caption, load_rephraser, make_captions
from data_prep.stages.captions.tag_words import CATEGORIES, GENRES, INSTRUMENTS, MOODS, USES, VOCALS
from data_prep.stages.captions.templates import template_captions
from ssmttm.errors import UserError
from ssmttm.text.captioner import AudioCaptioner

TAGS = ["genre---jazz", "instrument---piano", "instrument---doublebass", "mood/theme---calm", "mood/theme---film"]
WORDS = ("jazz", "piano", "double bass", "calm", "film")


def test_template_captions_first_uses_all_tags_and_others_differ():
    for id in map(str, range(50)):
        captions = template_captions(TAGS, id, 4)
        assert len(captions) == len(set(captions)) == 4
        assert all(word in captions[0].lower() for word in WORDS), captions[0]
        for caption in captions:
            assert any(word in caption.lower() for word in WORDS)
    first = {template_captions(TAGS, str(id), 1)[0] for id in range(200)}
    assert len(first) > 60, "captions vary between segments"


def test_template_captions_depend_on_id_only():
    assert template_captions(TAGS, "a") == template_captions(TAGS, "a")
    assert template_captions(TAGS, "a") != template_captions(TAGS, "b")
    known = "Calm music with a double bass and a piano"
    assert known in {text.rstrip(".") for id in range(3000) for text in template_captions(TAGS, str(id))}


names = st.text(st.characters(codec="utf-8"), max_size=12)
known_tags = st.one_of(
    st.sampled_from([f"genre---{name}" for name in GENRES]), st.sampled_from([f"mood/theme---{n}" for n in USES]),
    st.sampled_from([f"instrument---{name}" for name in INSTRUMENTS]), st.sampled_from([f"mood---{n}" for n in MOODS]),
)  # fmt: skip
tags_of_any_kind = st.lists(
    st.one_of(known_tags, st.builds("{}---{}".format, st.sampled_from(sorted(CATEGORIES)), names), names), max_size=8
)


@given(tags=tags_of_any_kind, id=names, n=st.integers(1, 5), instrumental=st.booleans())
def test_template_captions_of_any_tags_are_plain_text(tags, id, n, instrumental):
    captions = template_captions(tags, id, n, instrumental)
    assert len(captions) <= n and len(set(captions)) == len(captions)
    for caption in captions:
        assert caption.strip() == caption and caption.isprintable() and "  " not in caption and "{" not in caption
        assert not re.search(r"\.\.|,,| ,", caption), caption
        assert check_caption(caption) is None or not any(map(str.isalpha, "".join(tags)))


@given(tags=st.lists(known_tags, min_size=1, max_size=5), id=names)
def test_template_captions_have_correct_articles(tags, id):
    captions = template_captions(tags, id, 3)
    assert captions
    for caption in captions:
        wrong = r"\ba ([aei]|a )|\ban ([bcdfghjklmnpqstvwxyz1-9]|an? )|\ban? (bongos|bells)"
        assert not re.search(wrong, caption), caption


def test_template_captions_ignore_unknown_and_hostile_tags():
    assert template_captions([], "a") == []
    hostile = ["artist---Nina", "title---Blue", "album---Blue", "Nina", "---", "genre---", "genre---<b>", "key---loud",
               "genre---" + "x" * 41, "instrument---a\x00b"]  # fmt: skip
    assert template_captions(hostile, "a") == []
    for id in range(40):
        assert not re.search("Nina|Blue|nina|blue", " ".join(template_captions([*hostile, *TAGS], str(id))))


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (["genre---rnb"], r"\b(an )?R&B (music|piece|track|composition)"),
        (["genre---80s"], "1980s-style"),
        (["genre---Old-Time / Historic"], "[Oo]ld-time and historic"),
        (["genre---latin"], "Latin"),
        (["bpm---128.0", "genre---house"], "at 128 bpm"),
        (["tempo---slow", "genre---house"], "[Ss]low house"),
        (["key---c# Minor", "genre---house"], "in C# minor"),
        (["instrument---ukulele"], "a ukulele"),
        (["instrument---strings"], r"(?<!a )strings"),
        (["instrument---electric_guitar"], "an electric guitar"),
        (["mood/theme---space"], "for a journey through space|It would suit a journey"),
    ],
)
def test_template_captions_word_tags_in_english(tags, words):
    for id in range(30):
        assert re.search(words, template_captions(tags, str(id), 1)[0])


def test_template_captions_of_instrumental_music_mention_no_vocals():
    tags = [*TAGS, "instrument---voice", "genre---choir", "genre---rap"]
    joined = " ".join(text for id in range(60) for text in template_captions(tags, str(id), 3, instrumental=True))
    assert not re.search("voice|choral|rap", joined)
    assert template_captions(["instrument---voice"], "a", instrumental=True) == []
    assert any("voice" in text for id in range(60) for text in template_captions(tags, str(id)))
    assert "voice" in VOCALS


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_captioner(tmp_path_factory.mktemp("captioner"))


def clips(n):
    noise = torch.Generator().manual_seed(1)
    return [0.1 * (1 + i) * torch.randn(16_000 + 700 * i, generator=noise) for i in range(n)]


def test_captioner_does_not_depend_on_batch_size(weights):
    alone = list(AudioCaptioner(weights, batch=1, max_new_tokens=12).captions(clips(5)))
    assert len(alone) == 5 and len(set(alone)) > 1
    for batch in (2, 4, 5, 8):
        assert list(AudioCaptioner(weights, batch=batch, max_new_tokens=12).captions(iter(clips(5)))) == alone


def test_captioner_is_deterministic_and_depends_on_prompt(weights):
    captioner = AudioCaptioner(weights, max_new_tokens=12)
    first = list(captioner.captions(clips(3)))
    torch.manual_seed(5)
    assert list(captioner.captions(clips(3))) == first
    assert list(AudioCaptioner(weights, prompt="Sad?", max_new_tokens=12).captions(clips(3))) != first
    assert not captioner.model.generation_config.do_sample


def test_captioner_reads_clips_batch_by_batch(weights):
    read = []
    stream = (read.append(i) or clip for i, clip in enumerate(clips(5)))
    captions = AudioCaptioner(weights, batch=2, max_new_tokens=2).captions(stream)
    next(captions)
    assert read == [0, 1]


def test_captioner_uses_the_start_of_a_long_clip(weights):
    captioner = AudioCaptioner(weights, max_new_tokens=12)
    clip = clips(1)[0].repeat(4)
    assert captioner.seconds == 2 and captioner.sample_rate == 16_000
    assert list(captioner.captions([clip])) == list(captioner.captions([clip[:32_000]]))


def test_captioner_cuts_long_captions_after_a_sentence(weights, monkeypatch):
    captioner = AudioCaptioner(weights, max_new_tokens=20)
    answer = {"text": ""}

    def generate(input_ids, **_):
        ids = captioner.processor.tokenizer(answer["text"])["input_ids"]
        return torch.cat([input_ids, torch.tensor([ids])], 1)

    monkeypatch.setattr(captioner.model, "generate", generate)
    for text, caption in {
        "One. Two. Thr": "One. Two.", "No end": "No end", "One. Two<|im_end|>": "One. Two", "Done.": "Done.",
    }.items():  # fmt: skip
        answer["text"] = text
        assert list(captioner.captions(clips(1))) == [caption]


def test_captioner_rejects_other_folders(weights, tmp_path):
    with pytest.raises(UserError, match="no audio captioner folder"):
        AudioCaptioner(str(tmp_path / "nowhere"))
    copy = shutil.copytree(weights, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="cannot be loaded"):
        AudioCaptioner(str(copy))
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2' model: a captioner is a Qwen2-Audio"):
        AudioCaptioner(str(copy))


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "is empty"), ("  \n", "is empty"), ("... !!! ...", "no words"),
        ("the the the the the", "one word"), ("La la LA la", "one word"), ("a piano and " * 12, "repeats itself"),
        ("啊" * 40, "repeats itself"), ("haahahahahaha", "repeats itself"),
    ],
)  # fmt: skip
def test_check_caption_rejects_useless_captions(caption, reason):
    rejected = check_caption(caption)
    assert rejected.kind == "caption" and reason in str(rejected)


@pytest.mark.parametrize("caption", ["Rock", "A slow waltz in D minor.", "jazz, jazz fusion", "Ambient music. " * 3])
def test_check_caption_accepts_good_captions(caption):
    assert check_caption(caption) is None


def pairs(n, rate=22_050):
    return [(clip.repeat(2, 1), rate) for clip in clips(n)]


def user_function(monkeypatch, function, name="function"):
    module = types.ModuleType("user_module")
    setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "user_module", module)
    load_rephraser.cache_clear()
    return "user_module:function"


def test_make_captions_keeps_known_captions_and_reports_failures(monkeypatch):
    answers = iter(["A guitar plays.", "la la la la", "", "A flute plays."])
    monkeypatch.setattr(stage, "_model_captions", lambda clips, options: (next(answers) for _ in clips))
    name = user_function(monkeypatch, lambda captions: [[f"{text} again", text] for text in captions])
    settings = CaptionOptions(templates=1, captioner="x", rephrase=name)
    known, tags = [["Known."], [], [], ["A flute plays."]], [["genre---rock"], ["genre---pop"], [], []]
    captions, rejections = make_captions("abcd", known, tags, settings, pairs(4))
    assert captions[0] == ["Known.", "Known. again", "A guitar plays.", "A guitar plays. again"]
    assert captions[1] == template_captions(tags[1], "b", 1) and captions[2] == []
    assert captions[3] == ["A flute plays.", "A flute plays. again"]
    assert [(rejection.item, rejection.kind) for rejection in rejections] == [("b", "caption"), ("c", "caption")]
    assert known == [["Known."], [], [], ["A flute plays."]], "the input is not changed"


def test_make_captions_uses_the_captioner(weights):
    settings = CaptionOptions(templates=0, captioner=weights, batch=2, max_new_tokens=12)
    ids = list("abc")
    captions, rejections = make_captions(ids, [[]] * 3, [[]] * 3, settings, pairs(3, 16_000))
    words = list(AudioCaptioner(weights, max_new_tokens=12).captions(clips(3)))
    rejected = {rejection.item for rejection in rejections}
    for id, texts, text in zip(ids, captions, words, strict=True):
        assert texts == ([] if id in rejected else [" ".join(text.split())])
    assert len(rejected) < 3


def test_make_captions_does_not_depend_on_other_segments():
    ids, tags, known = list("abc"), [TAGS, TAGS[:1], TAGS[2:]], [["One."], [], ["Two."]]
    together, _ = make_captions(ids, known, tags, CaptionOptions())
    alone = [make_captions([i], [k], [t], CaptionOptions())[0][0] for i, k, t in zip(ids, known, tags, strict=True)]
    assert together == alone


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda captions: 1 / 0, r"user_module:function of --rephrase failed \(ZeroDivisionError"),
        (lambda captions: captions[5], "failed .IndexError"),
        (lambda captions: [[]], "got 1 lists for 2 captions"),
        (lambda captions: None, "got a NoneType for 2"),
        (lambda captions: [["good"], [" "]], "must return lists of texts"),
        (lambda captions: [["good"], "bad"], "must return lists of texts"),
        (lambda captions: [["good"], [3]], "must return lists of texts"),
        ("no function", "is not a function"),
    ],
)
def test_rephrase_errors_name_the_function(monkeypatch, function, words):
    with pytest.raises(UserError, match=words):
        options = CaptionOptions(rephrase=user_function(monkeypatch, function))
        make_captions("ab", [["One."], ["Two."]], [[], []], options)


@pytest.mark.parametrize("name", ["", "nowhere.at_all:x", "json:nothing", "json", ":dumps"])
def test_rephrase_function_must_exist(name):
    with pytest.raises(UserError, match=r"give package\.module:function"):
        load_rephraser(name)


def test_caption_metadata_depends_on_captioner_and_function(weights, monkeypatch, tmp_path):
    metadata = json.loads(json.dumps(CaptionOptions(captioner=weights, device="cuda").metadata()))
    assert "device" not in metadata and "Describe this music" in metadata["prompt"]
    other = write_captioner(tmp_path, seed=1)
    assert CaptionOptions(captioner=other).metadata()["fingerprint"] != metadata["fingerprint"]
    assert metadata["fingerprint"] == AudioCaptioner(weights).fingerprint

    def rephrase(captions):
        return [[] for _ in captions]

    name = user_function(monkeypatch, rephrase)
    assert "return [[] for _ in captions]" in CaptionOptions(rephrase=name).metadata()["rephrase_source"]
    with pytest.raises(UserError, match="no audio captioner folder"):
        CaptionOptions(captioner=str(tmp_path / "nowhere")).metadata()
