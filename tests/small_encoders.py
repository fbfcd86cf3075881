"""Small text encoders with random weights in transformers folders: BERT with WordPiece, T5 with Unigram."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

CAPTIONS = ("a slow piano", "loud drums", "slow drums with a flute", "pianos", "a loud flute, slowly", "piano, piano")
LETTERS = "abcdefghijklmnopqrstuvwxyz,"
WORDS = ["slow", "piano", "loud", "drums", "with", "flute", "violin", "choir", "waltz", "organ"]


def write_bert(folder: Path, width: int = 16, layers: int = 2, seed: int = 0) -> Path:
    """Head width 8, 40 positions."""
    names = ["[PAD]", *(f"[unused{i}]" for i in range(5)), "[UNK]", "[CLS]", "[SEP]", *WORDS, "##ly", "é"]
    vocab = {name: i for i, name in enumerate([*names, *LETTERS, *(f"##{letter}" for letter in LETTERS)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special_tokens = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special_tokens)
    torch.manual_seed(seed)
    sizes = dict(hidden_size=width, num_attention_heads=width // 8, num_hidden_layers=layers)
    sizes |= dict(intermediate_size=2 * width, max_position_embeddings=40, vocab_size=len(vocab))
    config = BertConfig(initializer_range=0.2, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def write_t5(folder: Path, width: int = 16, layers: int = 2, seed: int = 0) -> Path:
    """Head width 8."""
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("s", -4.0), ("ly", -5.0)]
    tokens += [(f"▁{word}", -6.0 - i) for i, word in enumerate(WORDS)] + [("▁a", -3.5), ("ano", -7.0), ("▁pi", -7.5)]
    tokens += [("é", -12.0)] + [(letter, -11.0 - i / 10) for i, letter in enumerate(LETTERS) if letter != "s"]
    tokens += [("ß", -19.0), ("<extra_id_0>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(tokens, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<extra_id_0>"])
    torch.manual_seed(seed)
    sizes = dict(d_model=width, d_kv=8, num_heads=width // 8, d_ff=2 * width, num_layers=layers)
    T5EncoderModel(T5Config(vocab_size=len(tokens) + 3, **sizes)).save_pretrained(folder)
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
