"""Vocabulary trimming: keep only the subword tokens that a set of captions uses.

WordPiece takes the longest matching token, Unigram the segmentation of highest score, so both tokenize these captions
as before. Other words become smaller tokens, at worst ASCII characters; characters outside the vocabulary (other
scripts, unless the captions use them) become the unknown token.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ssmttm.errors import UserError

KINDS = ("WordPiece", "WordLevel", "Unigram")
_SPACE = "\u2581"  # prefix of a word's first token in a Unigram vocabulary
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def trim(model: Any, tokenizer: Any, captions: Iterable[str]) -> tuple[Any, Any]:
    """A copy of an encoder and tokenizer with only special tokens, ASCII characters and the tokens of some captions.

    `model` is a BertModel or a T5EncoderModel. The captions have the same tokens and states, bit for bit, as before.

    Raises:
        UserError: the vocabulary has no word of the captions, or the tokenizer is of an unsupported kind.
    """
    captions = sorted({"", *captions})
    before = tokenizer(captions)["input_ids"]
    kept = _kept_ids(json.loads(tokenizer_json(tokenizer)), {token for ids in before for token in ids})
    new_id = {old: new for new, old in enumerate(kept)}
    trimmed = plain_tokenizer(_renumber(tokenizer_json(tokenizer), new_id), tokenizer.special_tokens_map)
    if trimmed(captions)["input_ids"] != [[new_id[token] for token in ids] for ids in before]:
        raise UserError("the trimmed tokenizer tokenizes the captions differently: set text_student.trim=false")
    return _select_embeddings(model, kept, new_id), trimmed


def tokenizer_json(tokenizer: Any) -> str:
    """A fast tokenizer as JSON, without padding and truncation. Raises UserError if it is a slow one."""
    if not tokenizer.is_fast:
        raise UserError("a text student needs a fast tokenizer: this encoder's folder has no tokenizer.json")
    return json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None})


def plain_tokenizer(description: str, special_tokens: Mapping[str, str]) -> Any:
    """A transformers tokenizer from the JSON of `tokenizer_json`; special_tokens: pad_token, unk_token and so on."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(description), **special_tokens)


def _kept_ids(description: dict[str, Any], used: set[int]) -> list[int]:
    """Ids to keep: used, special and single-character tokens, in ascending order."""
    model = description["model"]
    if model["type"] not in KINDS:
        raise UserError(
            f"a {model['type']} vocabulary cannot be trimmed ({', '.join(KINDS)} can): set text_student.trim=false"
        )
    unigram = model["type"] == "Unigram"
    ids = {token: i for i, (token, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
    unknown = model["unk_id"] if unigram else ids[model["unk_token"]]
    special = {unknown, *(added["id"] for added in description["added_tokens"])}
    prefix = _SPACE if unigram else model.get("continuing_subword_prefix", "")
    if not used - special - {ids.get(prefix)}:
        raise UserError("the text encoder knows no word of the captions: set text_student.trim=false")
    small = {i for token, i in ids.items() if _is_small(token.removeprefix(prefix)) or _BYTE.fullmatch(token)}
    if unigram:  # the unknown token's score depends on the lowest score
        scores = [(score, i) for i, (_, score) in enumerate(model["vocab"])]
        small.add(min(scores)[1])
    return sorted(used | special | small)


def _is_small(token: str) -> bool:
    return token == "" or (len(token) == 1 and token.isascii())


def _renumber(description: str, new_id: Mapping[int, int]) -> str:
    """The tokenizer with only the tokens of `new_id`, under their new ids."""
    tokenizer = json.loads(description)
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
        model["unk_id"] = new_id[model["unk_id"]]
    else:
        model["vocab"] = {token: new_id[i] for token, i in model["vocab"].items() if i in new_id}
    for added in tokenizer["added_tokens"]:
        added["id"] = new_id[added["id"]]
    if tokenizer["post_processor"]:
        _renumber_post_processor(tokenizer["post_processor"], new_id)
    return json.dumps(tokenizer)


def _renumber_post_processor(processor: dict[str, Any], new_id: Mapping[int, int]) -> None:
    """Renumber the special tokens that are put around a text, such as [CLS] and </s>."""
    for part in processor.get("processors", []):
        _renumber_post_processor(part, new_id)
    if processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [new_id[i] for i in special["ids"]]
    for key in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if key in processor:
            processor[key] = [processor[key][0], new_id[processor[key][1]]]


def _select_embeddings(model: Any, kept: Sequence[int], new_id: Mapping[int, int]) -> Any:
    """A copy of the encoder with these rows of its embedding table."""
    model = copy.deepcopy(model)
    table = model.get_input_embeddings()
    trimmed = nn.Embedding(len(kept), table.embedding_dim, padding_idx=new_id.get(table.padding_idx))
    with torch.no_grad():
        trimmed.weight.copy_(table.weight[torch.tensor(kept)])
    model.set_input_embeddings(trimmed.requires_grad_(table.weight.requires_grad))
    model.config.vocab_size = len(kept)
    for key, value in model.config.to_dict().items():
        if key.endswith("_token_id") and isinstance(value, int):
            setattr(model.config, key, new_id.get(value))
    return model
