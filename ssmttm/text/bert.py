"""BERT (arXiv 1810.04805) for inference, with transformers' parameter names and, bit for bit, its values on a CPU.

transformers imports torch's compiler with every model, three times the time that torch itself takes. So the text
encoder of a model that only samples is loaded here; training and saving need transformers' own class.
Shapes: B captions, L tokens, D width.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.empty_weights import EmptyWeights

_UNUSED = ("pooler.", "embeddings.position_ids")  # tensors of a checkpoint that token states do not need
_AS_WRITTEN = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer classes that use tokenizer.json as it is


@dataclass(frozen=True)
class BertSizes:
    """The fields of transformers' BertConfig that are used here."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    model_type: str = "bert"


class EncoderOutput(NamedTuple):
    """Named as in transformers. last_hidden_state: [B, L, D]."""

    last_hidden_state: Tensor


class Bert(nn.Module):
    """Token ids to token states. Post-norm blocks, absolute positions, exact GELU, no dropout."""

    def __init__(self, config: BertSizes) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
                "position_embeddings": nn.Embedding(config.max_position_embeddings, config.hidden_size),
                "token_type_embeddings": nn.Embedding(config.type_vocab_size, config.hidden_size),
                "LayerNorm": nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
            }
        )
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> EncoderOutput:
        """Token ids and mask, [B, L] each -> states [B, L, D]."""
        table: Any = self.embeddings
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = table["word_embeddings"](input_ids) + table["token_type_embeddings"](torch.zeros_like(input_ids))
        x = table["LayerNorm"](x + table["position_embeddings"](positions))  # [B, L, D]
        mask = attention_mask.bool()
        keys = None  # attention is faster without a mask; a traced graph must work with one
        if torch.compiler.is_exporting() or not bool(mask.all()):
            keys = mask[:, None, None].expand(-1, 1, mask.shape[1], -1)  # [B, 1, L, L]
        for layer in self.encoder["layer"]:  # type: ignore[attr-defined]
            x = layer(x, keys)
        return EncoderOutput(x)


class BertLayer(nn.Module):
    """Self-attention and an MLP, each followed by the residual sum and a norm."""

    def __init__(self, config: BertSizes) -> None:
        super().__init__()
        width, self.n_heads = config.hidden_size, config.num_attention_heads
        projections = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        output = {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, config.layer_norm_eps)}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(projections), "output": nn.ModuleDict(output)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)})
        self.output = nn.ModuleDict(
            {
                "dense": nn.Linear(config.intermediate_size, width),
                "LayerNorm": nn.LayerNorm(width, config.layer_norm_eps),
            }
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """States [B, L, D] and a mask of the keys [B, 1, L, L] (None: all) -> [B, L, D]."""
        attention: Any = self.attention
        projected = [attention["self"][name](x) for name in ("query", "key", "value")]
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in projected)  # [B, H, L, P]
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)
        y = y.transpose(1, 2).flatten(2)  # [B, L, D]
        x = attention["output"]["LayerNorm"](attention["output"]["dense"](y) + x)
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](y + x)


class BertTokenizer:
    """A tokenizer.json, called as transformers' tokenizers are."""

    is_fast = True

    def __init__(self, backend: Tokenizer, pad_token_id: int) -> None:
        self.backend_tokenizer, self.pad_token_id = backend, pad_token_id

    def __call__(self, texts: list[str], truncation: bool = False, max_length: int = 0) -> dict[str, list[list[int]]]:
        """Token ids of each text, with special tokens; truncated to `max_length` with `truncation`."""
        self.backend_tokenizer.no_truncation()
        if truncation:
            self.backend_tokenizer.enable_truncation(max_length)
        return {"input_ids": [encoding.ids for encoding in self.backend_tokenizer.encode_batch(texts)]}


def load_bert(folder: Path) -> tuple[Bert, BertTokenizer] | None:
    """Model and tokenizer of a transformers folder, the weights in float32. None if it holds anything that the classes
    above do not compute as transformers does, or is damaged: then transformers loads it, or says what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_text())
        tokenizer = _load_tokenizer(folder, config.get("pad_token_id") or 0)
        weights = load_file(folder / "model.safetensors")
        sizes = BertSizes(**{field.name: config[field.name] for field in fields(BertSizes) if field.name in config})
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None
    known = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    if config.get("model_type") != "bert" or any(config.get(key, value) != value for key, value in known.items()):
        return None
    with EmptyWeights():
        model = Bert(sizes)
    weights = {name: value.float() for name, value in weights.items() if not name.startswith(_UNUSED)}
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if tokenizer is None or {name: value.shape for name, value in weights.items()} != expected:
        return None
    model.load_state_dict(weights, assign=True)
    return model, tokenizer


def _load_tokenizer(folder: Path, pad_token_id: int) -> BertTokenizer | None:
    """None unless tokenizer.json says all that transformers would do: it builds a BertTokenizer from the options in
    tokenizer_config.json and takes the vocabulary only from tokenizer.json."""
    text = (folder / "tokenizer.json").read_text()
    description, config = json.loads(text), json.loads((folder / "tokenizer_config.json").read_text())
    kind = str(config.get("tokenizer_class"))
    if kind.removesuffix("Fast") == "BertTokenizer":
        normalizer = {
            "type": "BertNormalizer", "clean_text": True, "lowercase": config.get("do_lower_case", True),
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"),
        }  # fmt: skip
        if description["normalizer"] != normalizer or description["pre_tokenizer"] != {"type": "BertPreTokenizer"}:
            return None
    elif kind not in _AS_WRITTEN:
        return None
    backend = Tokenizer.from_str(text)
    backend.no_padding()
    return BertTokenizer(backend, pad_token_id)
