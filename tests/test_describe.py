"""Captions: of tags by templates, of an audio language model of random weights, and other wordings by a hook."""

import json
import re
import shutil
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from data_prep.stages.captions import captions as module
from data_prep.stages.captions.captions import CaptionOptions, describe, fault_of, load_rephraser, template_captions
from data_prep.stages.captions.tag_words import CATEGORIES, GENRES, INSTRUMENTS, MOODS, USES, VOCALS
from ssmttm.errors import UserError
from ssmttm.text.captioner import AudioCaptioner

TAGS = ["genre---jazz", "instrument---piano", "instrument---doublebass", "mood/theme---calm", "mood/theme---film"]
WORDS = ("jazz", "piano", "double bass", "calm", "film")


def test_the_first_caption_says_all_and_others_are_worded_otherwise():
    for id in map(str, range(50)):
        captions = template_captions(TAGS, id, 4)
        assert len(captions) == len(set(captions)) == 4
        assert all(word in captions[0].lower() for word in WORDS), captions[0]
        for caption in captions:
            assert any(word in caption.lower() for word in WORDS)
    first = {template_captions(TAGS, str(id), 1)[0] for id in range(200)}
    assert len(first) > 60, "varied between segments"


def test_an_id_gives_the_same_captions_and_another_other_ones():
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
def test_any_tags_give_at_most_n_plain_sentences(tags, id, n, instrumental):
    captions = template_captions(tags, id, n, instrumental)
    assert len(captions) <= n and len(set(captions)) == len(captions)
    for caption in captions:
        assert caption.strip() == caption and caption.isprintable() and "  " not in caption and "{" not in caption
        assert not re.search(r"\.\.|,,| ,", caption), caption
        assert fault_of(caption) is None or not any(map(str.isalpha, "".join(tags)))


@given(tags=st.lists(known_tags, min_size=1, max_size=5), id=names)
def test_every_known_tag_gives_captions_with_the_right_articles(tags, id):
    captions = template_captions(tags, id, 3)
    assert captions
    for caption in captions:
        wrong = r"\ba ([aei]|a )|\ban ([bcdfghjklmnpqstvwxyz1-9]|an? )|\ban? (bongos|bells)"
        assert not re.search(wrong, caption), caption


def test_nothing_for_no_tags_and_nobodys_name():
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
def test_good_english(tags, words):
    for id in range(30):
        assert re.search(words, template_captions(tags, str(id), 1)[0])


def test_no_voices_where_they_were_removed():
    tags = [*TAGS, "instrument---voice", "genre---choir", "genre---rap"]
    made = " ".join(text for id in range(60) for text in template_captions(tags, str(id), 3, instrumental=True))
    assert not re.search("voice|choral|rap", made)
    assert template_captions(["instrument---voice"], "a", instrumental=True) == []
    assert any("voice" in text for id in range(60) for text in template_captions(tags, str(id)))
    assert "voice" in VOCALS


def write_captioner(folder, seed=0):
    """A Qwen2-Audio of random weights that hears 2 s and spells in letters."""
    torch.manual_seed(seed)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=marks[0], eos_token=marks[2])
    ids = fast.convert_tokens_to_ids(marks)
    ears = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    Qwen2AudioProcessor(ears, fast).save_pretrained(folder)
    heard = Qwen2AudioEncoderConfig(num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
                                    d_model=16, max_source_positions=100)  # fmt: skip
    said = Qwen2Config(vocab_size=len(fast), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    config = Qwen2AudioConfig(audio_config=heard, text_config=said, audio_token_index=ids[3])
    model = Qwen2AudioForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.7)
    plain = fast.convert_tokens_to_ids(list("Ġabcdefghijklmnopqrstuvwxyz"))
    model.lm_head.weight.data[[i for i in range(len(fast)) if i not in plain]] = 0
    model.generation_config.update(eos_token_id=[ids[2], ids[0]], pad_token_id=ids[0], do_sample=True, temperature=0.7,
                                   top_p=0.5, top_k=20)  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_captioner(tmp_path_factory.mktemp("captioner"))


def sounds(n):
    noise = torch.Generator().manual_seed(1)
    return [0.1 * (1 + i) * torch.randn(16_000 + 700 * i, generator=noise) for i in range(n)]


def test_every_clip_gets_its_caption_whatever_the_batch(weights):
    alone = list(AudioCaptioner(weights, batch=1, max_new_tokens=12).captions(sounds(5)))
    assert len(alone) == 5 and len(set(alone)) > 1
    for batch in (2, 4, 5, 8):
        assert list(AudioCaptioner(weights, batch=batch, max_new_tokens=12).captions(iter(sounds(5)))) == alone


def test_the_same_words_again_and_others_for_another_prompt(weights):
    captioner = AudioCaptioner(weights, max_new_tokens=12)
    first = list(captioner.captions(sounds(3)))
    torch.manual_seed(5)
    assert list(captioner.captions(sounds(3))) == first
    assert list(AudioCaptioner(weights, prompt="Sad?", max_new_tokens=12).captions(sounds(3))) != first
    assert not captioner.model.generation_config.do_sample


def test_sounds_are_read_a_batch_at_a_time(weights):
    read = []
    clips = (read.append(i) or clip for i, clip in enumerate(sounds(5)))
    captions = AudioCaptioner(weights, batch=2, max_new_tokens=2).captions(clips)
    next(captions)
    assert read == [0, 1]


def test_a_longer_clip_is_heard_from_its_beginning(weights):
    captioner = AudioCaptioner(weights, max_new_tokens=12)
    clip = sounds(1)[0].repeat(4)
    assert captioner.seconds == 2 and captioner.sample_rate == 16_000
    assert list(captioner.captions([clip])) == list(captioner.captions([clip[:32_000]]))


def test_a_cut_caption_ends_with_a_sentence(weights, monkeypatch):
    captioner = AudioCaptioner(weights, max_new_tokens=20)
    spoken = {"": ""}

    def generate(input_ids, **_):
        ids = captioner.processor.tokenizer(spoken["text"])["input_ids"]
        return torch.cat([input_ids, torch.tensor([ids])], 1)

    monkeypatch.setattr(captioner.model, "generate", generate)
    for text, caption in {
        "One. Two. Thr": "One. Two.", "No end": "No end", "One. Two<|im_end|>": "One. Two", "Done.": "Done.",
    }.items():  # fmt: skip
        spoken["text"] = text
        assert list(captioner.captions(sounds(1))) == [caption]


def test_what_is_no_captioner(weights, tmp_path):
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
        ("", "said nothing"), ("  \n", "said nothing"), ("... !!! ...", "no words"),
        ("the the the the the", "one word"), ("La la LA la", "one word"), ("a piano and " * 12, "repeats itself"),
        ("啊" * 40, "repeats itself"), ("haahahahahaha", "repeats itself"),
    ],
)  # fmt: skip
def test_captions_that_are_no_use(caption, reason):
    rejected = fault_of(caption)
    assert rejected.kind == "caption" and reason in str(rejected)


@pytest.mark.parametrize("caption", ["Rock", "A slow waltz in D minor.", "jazz, jazz fusion", "Ambient music. " * 3])
def test_captions_that_are(caption):
    assert fault_of(caption) is None


def pairs(n, rate=22_050):
    return [(sound.repeat(2, 1), rate) for sound in sounds(n)]


def hook(monkeypatch, function, name="function"):
    made = types.ModuleType("a_hook_of_mine")
    setattr(made, name, function)
    monkeypatch.setitem(sys.modules, "a_hook_of_mine", made)
    load_rephraser.cache_clear()
    return "a_hook_of_mine:function"


def test_known_captions_stay_first_and_what_fails_is_told(monkeypatch):
    said = iter(["A guitar plays.", "la la la la", "", "A flute plays."])
    monkeypatch.setattr(module, "_captions", lambda sounds, settings: (next(said) for _ in sounds))
    name = hook(monkeypatch, lambda captions: [[f"{text} again", text] for text in captions])
    settings = CaptionOptions(templates=1, captioner="x", rephrase=name)
    known, tags = [["Known."], [], [], ["A flute plays."]], [["genre---rock"], ["genre---pop"], [], []]
    made, rejections = describe("abcd", known, tags, settings, pairs(4))
    assert made[0] == ["Known.", "Known. again", "A guitar plays.", "A guitar plays. again"]
    assert made[1] == template_captions(tags[1], "b", 1) and made[2] == []
    assert made[3] == ["A flute plays.", "A flute plays. again"]
    assert [(rejection.item, rejection.kind) for rejection in rejections] == [("b", "caption"), ("c", "caption")]
    assert known == [["Known."], [], [], ["A flute plays."]], "what is given stays as it is"


def test_the_model_hears_each_segment(weights):
    settings = CaptionOptions(templates=0, captioner=weights, batch=2, max_new_tokens=12)
    ids = list("abc")
    made, rejections = describe(ids, [[]] * 3, [[]] * 3, settings, pairs(3, 16_000))
    words = list(AudioCaptioner(weights, max_new_tokens=12).captions(sounds(3)))
    rejected = {rejection.item for rejection in rejections}
    for id, captions, text in zip(ids, made, words, strict=True):
        assert captions == ([] if id in rejected else [" ".join(text.split())])
    assert len(rejected) < 3


def test_what_a_segment_is_called_hangs_on_itself_alone():
    ids, tags, known = list("abc"), [TAGS, TAGS[:1], TAGS[2:]], [["One."], [], ["Two."]]
    together, _ = describe(ids, known, tags, CaptionOptions())
    assert together == [describe([i], [k], [t], CaptionOptions())[0][0] for i, k, t in zip(ids, known, tags, strict=True)]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda captions: 1 / 0, r"a_hook_of_mine:function failed \(ZeroDivisionError"),
        (lambda captions: captions[5], "failed .IndexError"),
        (lambda captions: [[]], "gave 1 lists for 2 captions"),
        (lambda captions: None, "gave a NoneType for 2"),
        (lambda captions: [["good"], [" "]], "a list of texts is needed"),
        (lambda captions: [["good"], "bad"], "a list of texts is needed"),
        (lambda captions: [["good"], [3]], "a list of texts is needed"),
        ("no function", "is no function"),
    ],
)
def test_a_hook_that_fails_is_named(monkeypatch, function, words):
    with pytest.raises(UserError, match=words):
        describe("ab", [["One."], ["Two."]], [[], []], CaptionOptions(rephrase=hook(monkeypatch, function)))


@pytest.mark.parametrize("name", ["", "nowhere.at_all:x", "json:nothing", "json", ":dumps"])
def test_a_hook_that_is_not_there(name):
    with pytest.raises(UserError, match=r"give package\.module:function"):
        load_rephraser(name)


def test_settings_tell_what_decides_the_captions(weights, monkeypatch, tmp_path):
    facts = json.loads(json.dumps(CaptionOptions(captioner=weights, device="cuda").facts()))
    assert "device" not in facts and "Describe this music" in facts["prompt"]
    other = write_captioner(tmp_path, seed=1)
    assert CaptionOptions(captioner=other).facts()["fingerprint"] != facts["fingerprint"]
    assert facts["fingerprint"] == AudioCaptioner(weights).fingerprint

    def rephrase(captions):
        return [[] for _ in captions]

    name = hook(monkeypatch, rephrase)
    assert "return [[] for _ in captions]" in CaptionOptions(rephrase=name).facts()["rephrase_source"]
    with pytest.raises(UserError, match="no audio captioner folder"):
        CaptionOptions(captioner=str(tmp_path / "nowhere")).facts()
