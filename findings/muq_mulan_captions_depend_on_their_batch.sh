#!/bin/bash
# In the text branch of muq's MuQ-MuLan a caption's embedding depends on the longest caption of its batch: the layers
# after XLM-RoBERTa get no padding mask, and their outputs are averaged over the padding too.
# A guess would be that padding changes nothing, as in XLM-RoBERTa itself. Captions given one by one have no padding.
# The weights here are random: how much it changes with trained ones is not measured. muq imports torchaudio, and x-clip
# torchvision; the text branch uses neither, so mocks take their places.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6 einops==0.8.2 easydict==1.13 \
  beartype==0.23.1 ftfy==6.3.1 regex==2026.11.19
"$folder/venv/bin/pip" install --quiet --no-deps muq==0.1.0 x-clip==0.14.4
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version
from unittest.mock import MagicMock

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

sys.modules |= {name: MagicMock() for name in ("torchaudio", "torchaudio.transforms", "torchvision")}
from muq.muq_mulan.models.mulan import MuLanModel
from muq.muq_mulan.models.text import TextTransformerPretrained

transformers.logging.disable_progress_bar()
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
XLMRobertaModel(XLMRobertaConfig(vocab_size=50, **sizes)).save_pretrained("xlm-roberta")
words = ["<s>", "<pad>", "</s>", "<unk>", "a", "slow", "waltz", "fast", "jig", "in", "C"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
tokenizer.save_pretrained("xlm-roberta")

text = TextTransformerPretrained("xlm-roberta", dim=32, model_dim=32, tf_depth=1, heads=2, dim_head=16)
audio = torch.nn.Module()
audio.dim = 32
mulan = MuLanModel(audio, text, dim_latent=16).eval()
print(f"muq {version('muq')}, transformers {transformers.__version__}; a small model of random weights in eval mode")
caption, same, longer = "a slow waltz", "a fast jig", "a fast jig in C in a slow waltz"
cosines, hidden = {}, []
with torch.inference_mode():
    alone = mulan.get_text_latents(raw_texts=[caption])[0]
    for other in (same, longer):
        cosines[other] = float(mulan.get_text_latents(raw_texts=[caption, other])[0] @ alone)
        print(f"'{caption}' beside '{other}': cosine {cosines[other]:.4f} with itself alone")
    for batch in ([caption], [caption, longer]):
        hidden.append(text.model(**text.tokenizer(batch, return_tensors="pt", padding=True)).last_hidden_state[0, :3])
difference = float((hidden[0] - hidden[1]).abs().max())
print(f"XLM-RoBERTa's outputs at its three words, alone and beside the longer: they differ by up to {difference:.1g}")
sys.exit(0 if cosines[same] > 0.9999 and cosines[longer] < 0.99 and difference < 1e-4 else 1)
PYTHON
