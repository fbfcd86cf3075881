"""Vocabularies cut down to the pieces of words that some captions are made of.

WordPiece takes the longest piece that fits, Unigram the split of highest score: with fewer pieces to choose from, but
the chosen ones among them, either cuts these captions as before. Other words fall into smaller pieces, at worst ASCII
characters; what has none (other scripts, unless the captions hold them) becomes the unknown piece.
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
_SPACE = "\u2581"  # marks a word's first piece in a Unigram vocabulary
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def trim(model: Any, tokenizer: Any, captions: Iterable[str]) -> tuple[Any, Any]:
    """A copy of an encoder and its tokenizer that know only the pieces of some captions, marks and ASCII characters.

    Args:
        model: a BertModel or a T5EncoderModel.
        tokenizer: its fast tokenizer.
        captions: after trimming they are cut as before, and their states are the same to the bit.

    Raises:
        UserError: the captions hold no word that is known, or the tokenizer is of a kind that cannot be trimmed.
    """
    captions = sorted({"", *captions})
    before = tokenizer(captions)["input_ids"]
    kept = _kept(json.loads(tokenizer_json(tokenizer)), {piece for ids in before for piece in ids})
    new_id = {old: new for new, old in enumerate(kept)}
    smaller = plain_tokenizer(_renumbered(tokenizer_json(tokenizer), new_id), tokenizer.special_tokens_map)
    if smaller(captions)["input_ids"] != [[new_id[piece] for piece in ids] for ids in before]:
        raise UserError("the trimmed tokenizer cuts the captions otherwise: set text_student.trim=false")
    return _with_rows(model, kept, new_id), smaller


def tokenizer_json(tokenizer: Any) -> str:
    """What a fast tokenizer does, as JSON, but for padding and cutting. Raises UserError if it is none."""
    if not tokenizer.is_fast:
        raise UserError("a text student needs the tokenizer.json of a fast tokenizer: this encoder's folder has none")
    return json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None})


def plain_tokenizer(description: str, marks: Mapping[str, str]) -> Any:
    """A tokenizer of transformers that does what a JSON of `tokenizer_json` says, and nothing of its own.

    Args:
        marks: which pieces are pad_token, unk_token and so on.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(description), **marks)


def _kept(description: dict[str, Any], used: set[int]) -> list[int]:
    """The ids that stay, in their order."""
    model = description["model"]
    if model["type"] not in KINDS:
        raise UserError(f"a {model['type']} vocabulary cannot be trimmed ({', '.join(KINDS)} can): "
                        "set text_student.trim=false")  # fmt: skip
    unigram = model["type"] == "Unigram"
    ids = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
    unknown = model["unk_id"] if unigram else ids[model["unk_token"]]
    marks = {unknown, *(added["id"] for added in description["added_tokens"])}
    prefix = _SPACE if unigram else model.get("continuing_subword_prefix", "")
    if not used - marks - {ids.get(prefix)}:
        raise UserError("there is no word in the captions that the text encoder knows: nothing is left of its "
                        "vocabulary; set text_student.trim=false")  # fmt: skip
    small = {i for piece, i in ids.items() if _is_small(piece.removeprefix(prefix)) or _BYTE.fullmatch(piece)}
    if unigram:  # the unknown piece's score hangs on the lowest one
        scores = [(score, i) for i, (_, score) in enumerate(model["vocab"])]
        small.add(min(scores)[1])
    return sorted(used | marks | small)


def _is_small(piece: str) -> bool:
    return piece == "" or (len(piece) == 1 and piece.isascii())


def _renumbered(description: str, new_id: Mapping[int, int]) -> str:
    """The tokenizer with the pieces of `new_id` only, under their new ids."""
    whole = json.loads(description)
    model = whole["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
        model["unk_id"] = new_id[model["unk_id"]]
    else:
        model["vocab"] = {piece: new_id[i] for piece, i in model["vocab"].items() if i in new_id}
    for added in whole["added_tokens"]:
        added["id"] = new_id[added["id"]]
    if whole["post_processor"]:
        _renumber_marks(whole["post_processor"], new_id)
    return json.dumps(whole)


def _renumber_marks(processor: dict[str, Any], new_id: Mapping[int, int]) -> None:
    """In what puts [CLS], </s> and the like around a text."""
    for part in processor.get("processors", []):
        _renumber_marks(part, new_id)
    if processor["type"] == "TemplateProcessing":
        for mark in processor["special_tokens"].values():
            mark["ids"] = [new_id[i] for i in mark["ids"]]
    for key in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if key in processor:
            processor[key] = [processor[key][0], new_id[processor[key][1]]]


def _with_rows(model: Any, kept: Sequence[int], new_id: Mapping[int, int]) -> Any:
    """A copy of the encoder with these rows of its embedding."""
    model = copy.deepcopy(model)
    table = model.get_input_embeddings()
    smaller = nn.Embedding(len(kept), table.embedding_dim, padding_idx=new_id.get(table.padding_idx))
    with torch.no_grad():
        smaller.weight.copy_(table.weight[torch.tensor(kept)])
    model.set_input_embeddings(smaller.requires_grad_(table.weight.requires_grad))
    model.config.vocab_size = len(kept)
    for key, value in model.config.to_dict().items():
        if key.endswith("_token_id") and isinstance(value, int):
            setattr(model.config, key, new_id.get(value))
    return model
